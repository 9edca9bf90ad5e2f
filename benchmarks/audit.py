"""What an audit costs, as CPU seconds and in steps of the training that it precedes.

    python benchmarks/audit.py [--params params.yaml] [--rounds 3]

CPU seconds are those of all threads, because other work on the machine hardly disturbs them; medians of rounds in which the
audit and 10 training steps of each model take turns. Imports are not in them, nor is the check of the token shards.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from stacklm.audit.audit import certify
from stacklm.config.model import Architecture
from stacklm.config.params import load
from stacklm.config.train import Train
from stacklm.console import table
from stacklm.model.build import ModelConfig, build

STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    params = load(options.params)
    vocab_size, train = params.tokenizer.vocab_size, params.train
    torch.set_num_threads(train.threads)
    rows = []
    for name, model in params.models.items():
        config = ModelConfig(model.architecture, vocab_size, train.context_length)
        step = training(model.architecture, vocab_size, train)
        step()
        pairs = [(seconds(lambda config=config: certify(config, train)), seconds(step)) for _ in range(options.rounds)]
        audits, steps = zip(*pairs, strict=True)
        ratio = statistics.median(STEPS * ours / theirs for ours, theirs in pairs)
        spread = f"{min(audits):.1f} to {max(audits):.1f}"
        rows.append(
            [name, f"{statistics.median(audits):.1f} s", spread, f"{statistics.median(steps) / STEPS:.3f} s", f"{ratio:.0f}"]
        )
    print(table(["model", "audit", "lowest to highest", "training step", "audit, in steps"], rows))


def training(architecture: Architecture, vocab_size: int, train: Train) -> Callable[[], None]:
    """`STEPS` plain training steps of a batch of random tokens."""
    model = build(architecture, vocab_size, train.context_length).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids_BT = torch.randint(vocab_size, (train.global_batch_size, train.context_length + 1))

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
            optimizer.step()

    return steps


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
