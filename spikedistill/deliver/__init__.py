"""7. Results: finished runs read back, tables and pictures."""
