"""Wrong labels among the student's samples."""

from retouch.arenas.distill.tasks._pairs import draw, task
from retouch.worlds import digits

TASK = task(
    "noisy",
    "A convolutional network, trained on 1000 digits, teaches a small one on 200, 30% of them mislabelled.",
    student=lambda: digits.DigitsCNN(width=8, hidden=32),
    teacher=digits.DigitsCNN,
    split=draw(200, wrong=0.3),
    target=15.0,
)
