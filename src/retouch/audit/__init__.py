"""Find out what a model knows, where it fails and what it leaks."""
