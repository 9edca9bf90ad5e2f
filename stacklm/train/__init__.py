"""Training: one loop, exact to the bit on a CPU however often it is killed and resumed.

`pretrain` is the stage: it builds everything and calls `trainer`, the loop. Around the loop, one file each:
`optimizer`, `schedule`, `loss`, `validate`, `checkpoint`, `metrics`, `interrupt` and `machine`. Several processes are a
`team`, brought up by `launch` or by torchrun; `parallel` says how they share a model.
"""
