"""Change how a network learns: layers, callbacks, objectives and samplers that are applied while it trains.

Contract: what a technique gives goes into `fit`, each thing at its own place, so that techniques combine:

    a callback      fit(model, data, callbacks=[CutMix()])
    a layer         fit(convert(model), data)
    an objective    fit(model, data, LOOK(...))
    a sampler       fit(model, DataLoader(data, sampler=RepeatedRandomSampler(...)))

A technique that can train an ordinary image classifier also has `recipe(model, data, validation, **hyper) -> Recipe`,
which puts its parts together: that is what `retouch train NAME` runs.
"""
