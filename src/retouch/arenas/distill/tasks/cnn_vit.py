"""A convolutional network teaches a transformer."""

from retouch.arenas.distill.tasks._pairs import task, vit
from retouch.worlds import digits

TASK = task(
    "cnn_vit",
    "A convolutional network, trained on 1000 digits, teaches a small ViT on 200 of them.",
    student=vit,
    teacher=digits.DigitsCNN,
)
