"""Measures for arenas and users: pure functions on tensors and arrays."""
