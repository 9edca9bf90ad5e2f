"""Cost of an audit, in CPU seconds and in training steps.

    python benchmarks/audit.py [--params params.yaml] [--rounds 3]

CPU seconds are summed over all threads, because other work on the machine hardly affects them. Figures are medians over rounds
that alternate the audit with 10 training steps of each model. Imports and the check of the token shards are excluded.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import torch
from bench import command_line, timed, train_steps

from stacklm.audit.audit import certify
from stacklm.config.params import load
from stacklm.console import table
from stacklm.lab.speed import random_batches
from stacklm.model.build import ModelConfig
from stacklm.plan.memory import fresh_run

STEPS = 10


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    params = load(options.params)
    vocab_size, train = params.tokenizer.vocab_size, params.train
    torch.set_num_threads(train.threads)
    rows = []
    for name, model in params.models.items():
        config = ModelConfig(model.architecture, vocab_size, train.context_length)
        run = fresh_run(model, vocab_size, train, random_batches(train, vocab_size, STEPS))
        training = partial(train_steps, run, STEPS)
        training()
        pairs = [(timed(partial(certify, config, train)).cpu, timed(training).cpu) for _ in range(options.rounds)]
        audits, steps = zip(*pairs, strict=True)
        ratio = statistics.median(STEPS * ours / theirs for ours, theirs in pairs)
        spread = f"{min(audits):.1f} to {max(audits):.1f}"
        rows.append(
            [name, f"{statistics.median(audits):.1f} s", spread, f"{statistics.median(steps) / STEPS:.3f} s", f"{ratio:.0f}"]
        )
    print(table(["model", "audit", "lowest to highest", "training step", "audit, in steps"], rows))


if __name__ == "__main__":
    main()
