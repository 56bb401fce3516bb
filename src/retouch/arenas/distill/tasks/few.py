"""Few samples to learn from."""

from retouch.arenas.distill.tasks._pairs import draw, task
from retouch.worlds import digits

TASK = task(
    "few",
    "A convolutional network, trained on 1000 digits, teaches a small one on 50 of them.",
    student=lambda: digits.DigitsCNN(width=4, hidden=16),
    teacher=digits.DigitsCNN,
    split=draw(50),
    target=15.0,
)
