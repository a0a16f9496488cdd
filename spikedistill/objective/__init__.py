"""4. What the student is taught: a file a published method."""
