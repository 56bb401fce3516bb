"""From teacher to student: an objective over a pair of models."""
