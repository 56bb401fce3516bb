"""Find out what a model knows, where it fails and what it leaks.

Contract: `technique(model, ...) -> findings`. A probe of text-to-image pipelines also has
`findings(pipeline, prompt, **hyper) -> Findings`: that is what `retouch audit NAME` runs.
"""
