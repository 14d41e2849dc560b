"""Networks and a module for those who bring none."""
