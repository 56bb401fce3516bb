"""A contestant each."""
