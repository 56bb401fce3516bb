"""One contestant a file."""
