"""Teach a student what a larger model knows.

Contract: a technique is an objective over (student, teacher). `core.distillation.Distillation(teacher, loss)` is the
objective for `fit`, a technique gives the `loss(student, teacher, labels)` of two answers, or an objective of its own:

    fit(student, data, SinKD(teacher))

A technique that can teach an ordinary classifier also has `recipe(student, teacher, data, validation, **hyper) ->
Recipe`, which is what `retouch distill NAME` runs.
"""
