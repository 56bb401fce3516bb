"""Change a given image, and leave the rest of it alone."""
