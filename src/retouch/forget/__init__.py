"""Take data, classes or concepts out of a trained model."""
