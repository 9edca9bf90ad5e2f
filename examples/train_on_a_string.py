"""Train a tiny stacked-parallel decoder on one string, without the pipeline: a model, an optimizer and a loop.

python examples/train_on_a_string.py
"""

import torch

from stacklm.config.evaluate import Sample
from stacklm.config.model import Stack, Stacked
from stacklm.config.optimizer import AdamW
from stacklm.evaluate.generate import generate
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.train.loss import Objective
from stacklm.train.optimizer import build_optimizer

TEXT = b"In a stack, many layers read the same input in parallel; few stacks stand in series. " * 8
CONTEXT, BATCH, STEPS = 32, 8, 200


def main() -> None:
    torch.manual_seed(0)
    architecture = Stacked(
        d_model=64,
        n_heads=4,
        stacks=(Stack(layers=4, features=16, d_ff=128), Stack(layers=4, features=32, d_ff=256)),
    )
    model = build(architecture, vocab_size=256, context=CONTEXT)
    objective = Objective(model)
    optimizer = build_optimizer(model, AdamW(peak_lr=5e-3))
    ids = torch.tensor(list(TEXT))

    for step in range(1, STEPS + 1):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        inputs_BT = torch.stack([ids[start : start + CONTEXT] for start in starts])
        targets_BT = torch.stack([ids[start + 1 : start + CONTEXT + 1] for start in starts])
        optimizer.zero_grad()
        loss = objective(inputs_BT, targets_BT) / targets_BT.numel()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats per byte")

    decoder = Decoder(model.eval(), CONTEXT)
    continued = generate(decoder, list(b"In a stack, "), Sample(max_new_tokens=40, temperature=0))
    print("In a stack, " + bytes(continued).decode(errors="replace"))


if __name__ == "__main__":
    main()
