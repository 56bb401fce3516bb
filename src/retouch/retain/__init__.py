"""Learn something new without losing the old."""
