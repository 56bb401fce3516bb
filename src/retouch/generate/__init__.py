"""New kinds of output from a pretrained generator."""
