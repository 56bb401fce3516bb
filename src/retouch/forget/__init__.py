"""Take data, classes or concepts out of a trained model.

Contract for classifiers: `technique(model, forget, retain, **hyper) -> model`. `forget` and `retain` are data sets that
together are the training data; the model given is not changed unless `inplace=True`.
Contract for concepts in a generator: `technique(pipeline, concept, *, anchor, preserve, **hyper) -> pipeline`.
"""
