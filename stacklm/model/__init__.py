"""Models: decoders that turn token ids into features and features into logits.

Dimension letters, carried as suffixes of names (`x_BTC`) in every module:

    B  batch                              N  parallel layers of a stack
    T  time: positions of a window        H  heads of a layer
    C  width of the stream                K  dim of a head's queries and keys, C / H
    V  vocabulary                         D  features that a parallel layer emits
    S  stacks                             W  width of a stack's output, N * D
    L  layers of a dense decoder          F  hidden units of a feed-forward
    E  outputs of a linear map            R  rows: windows, or places of windows
    G  heads of all layers, N * H         U  all tokens so far, of which T are new

`build` makes a model from its settings; `dense` and `stacked` are the two kinds. `packed` holds the N parallel layers as
published, `folded` a leaner attention with settings of its own, `attention` what both attend by, `wiring` what stands
between stacks; `reference` and `loops` are the same in plain loops. `family` lists variants; `roles` and `count` say what a
model consists of and costs; `cache` decodes with a memory; `store` writes and reads weights.
"""
