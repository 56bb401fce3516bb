"""Fit a pretrained model to new data with few weights."""
