"""Distillation with the teacher asked once (`answered`) against asking it at every step, as a user would train."""

from ratios import compare

from retouch.core import seeds
from retouch.core.distillation import Distillation, answered, softened_kl
from retouch.core.loop import fit
from retouch.distill.sinkd import SinKD
from retouch.worlds import digits

EPOCHS = 3


def kl(student, teacher, labels):
    return softened_kl(student.logits, teacher.logits)


def student():
    with seeds.isolated(0):
        return digits.DigitsCNN()


if __name__ == "__main__":
    data, teacher = digits.data("train"), digits.reference("vit")
    for name, make in (("KL", lambda model: Distillation(model, kl)), ("SinKD", SinKD)):

        def kept(make=make):
            fit(student(), answered(data, teacher), make(None), epochs=EPOCHS, progress=False)

        def asked(make=make):
            fit(student(), data, make(teacher), epochs=EPOCHS, progress=False)

        compare(
            f"{EPOCHS} epochs of {name}, a ViT teaches a CNN, answers kept",
            kept,
            asked,
            against="asking at every step",
            rounds=3,
            wanted="more than 1",
        )
