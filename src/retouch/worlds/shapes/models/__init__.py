"""Reference models of the shapes world: diffusers' and transformers' own classes, small, and how they are trained.

architectures     the untrained models and their tokenizer
recipes           how long each trains and how fast, and on what
latents           the autoencoder
wordings          captions, and the text encoder
training          the UNet, CLIP, and the class-conditional models
references        the shipped models as pipelines and denoisers
measures          how good they are
building          training all of them again
"""
