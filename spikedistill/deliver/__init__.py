"""7. What leaves: finished runs read back, tables, pictures."""
