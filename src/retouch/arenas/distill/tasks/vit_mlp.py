"""A transformer teaches a network of two layers."""

from retouch.arenas.distill.tasks._pairs import mlp, task, vit

TASK = task(
    "vit_mlp",
    "A ViT, trained on 1000 digits, teaches a network of two layers on 200 of them.",
    student=lambda: mlp(32),
    teacher=lambda: vit(48, 3),
)
