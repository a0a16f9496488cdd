"""2. The mathematics of a spike."""
