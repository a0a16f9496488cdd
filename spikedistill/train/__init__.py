"""6. How: recipe values, the one loop, checkpoints, run directories."""
