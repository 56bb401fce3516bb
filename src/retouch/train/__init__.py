"""Better training: what is applied while a network learns."""
