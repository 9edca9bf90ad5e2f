"""Operations that depend on the device: one name each, and behind it the kernel that is fastest there.

`attention` is causal attention with values narrower than keys, in blocks on a CPU and fused on a GPU; `elementwise` has norms,
rotations and squared ReLU with gradients written out for a CPU. A model is written with the names below and is correct with the
plain definition of each, which stands beside its test.
"""

from stacklm.model.kernels.attention import causal_attention, checkpointed, project, sum_heads
from stacklm.model.kernels.elementwise import rms_norm, rotate, squared_relu

__all__ = ["causal_attention", "checkpointed", "project", "rms_norm", "rotate", "squared_relu", "sum_heads"]
