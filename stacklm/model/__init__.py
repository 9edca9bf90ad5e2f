"""Models: decoders that turn token ids into features, and features into logits.

    stacked    the stacked-parallel decoder: published and factored attention, stacks, what varies
    dense      its dense twin
    layers     what both are made of
    kernels/   operations that depend on the device
    build      a model from its settings; the published ones by name
    count      roles of parameters, and what a model has and costs
    cache      decoding with a cache
    variants   variants of a stacked model, and trades of depth for parallel layers
    store      weights on disk

Dimensions are letters carried as suffixes of names (`x_BTC`); each file says at its top which it uses.
"""
