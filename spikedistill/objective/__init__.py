"""What the student is taught: one file per published method."""
