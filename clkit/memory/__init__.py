"""What is remembered of past experiences, and how it is stored."""
