"""The same samples in less time: fewer or cheaper steps."""
