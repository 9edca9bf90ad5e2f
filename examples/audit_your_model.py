"""Audit your own model for causality: here also a faulty one, to show how the fault is reported.

python examples/audit_your_model.py
"""

from torch import Tensor, nn

from stacklm.audit.audit import certify, in_float32
from stacklm.config.model import Architecture, Dense
from stacklm.model.build import ModelConfig, build

CONFIG = ModelConfig(Dense(d_model=32, n_heads=2, n_layers=2, d_ff=64), vocab_size=64, context_length=32)


class PeeksAhead(nn.Module):
    """A feed-forward network that also reads the next position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.inner(x_BTC + 0.1 * x_BTC.roll(-1, dims=1))


def faulty(architecture: Architecture, vocab_size: int, context: int) -> nn.Module:
    model = build(architecture, vocab_size, context)
    block = model.get_submodule("blocks.0")
    block.feed_forward = PeeksAhead(block.get_submodule("feed_forward"))
    return model


def main() -> None:
    for name, builder in {"sound": build, "faulty": faulty}.items():
        found = certify(CONFIG, in_float32(CONFIG.context_length), build=builder)
        print(found.table(name))
        print(f"{name}: {'passed' if found.passed else 'FAILED'}\n")


if __name__ == "__main__":
    main()
