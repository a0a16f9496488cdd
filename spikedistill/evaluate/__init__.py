"""5. How well: accuracy at every step, agreement, firing rates."""
