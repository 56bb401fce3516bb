"""Reference models of the shapes world: diffusers' and transformers' own classes, small, and how they are trained.

architectures     the untrained models and their tokenizer
training          one recipe a model
references        the shipped models as pipelines and denoisers, their quality, and `build`
"""
