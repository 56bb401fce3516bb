"""A problem each."""
