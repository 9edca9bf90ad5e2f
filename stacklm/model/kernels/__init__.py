"""Device-dependent operations: each name dispatches to the fastest kernel on the device.

`attention` is causal attention with values narrower than keys, blocked on a CPU and fused on a GPU; `elementwise` has norms, rotary
embeddings and squared ReLU with hand-written gradients for a CPU. Models use only the names below; the plain definition of each,
which could replace it, is beside its test.
"""

from stacklm.model.kernels.attention import causal_attention, checkpointed, project, sum_heads
from stacklm.model.kernels.elementwise import rms_norm, rotate, squared_relu

__all__ = ["causal_attention", "checkpointed", "project", "rms_norm", "rotate", "squared_relu", "sum_heads"]
