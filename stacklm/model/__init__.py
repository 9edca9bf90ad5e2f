"""Models: decoders that turn token ids into features, and features into logits.

    stacked    the stacked-parallel decoder: published and factored attention, stacks, variants
    dense      its dense twin
    layers     layers used by both
    kernels/   device-dependent operations
    build      a model from its settings; presets of the published models
    count      roles of parameters; parameter and FLOP counts
    cache      decoding with a cache
    variants   variants of a stacked model, and trading depth for parallel layers
    store      weights on disk

Tensor names carry their dimension letters as suffixes (`x_BTC`); each file lists its letters at the top.
"""
