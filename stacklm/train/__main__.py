"""Training without the pipeline: for `torchrun` on one machine or several, and for a first try.

    python -m stacklm.train --model dense
    torchrun --nproc-per-node 2 -m stacklm.train --model dense

It reads the same settings, shards and certificate as the stage `pretrain`, needs none of the pipeline's libraries, and
writes to a separate folder; the same command resumes a killed run. See docs/devices.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from stacklm.config.params import load
from stacklm.config.schema import ParamsError, listed, nearest
from stacklm.train.distributed import FINAL
from stacklm.train.pretrain import pretrain


def main() -> None:
    options = _options()
    try:
        params = load(options.params)
        if options.model not in params.models:
            raise ParamsError(
                f"no model {options.model!r}; the models are {listed(params.models)}{nearest(options.model, params.models)}"
            )
        seed = params.seeds[0] if options.seed is None else options.seed
        out = options.out / f"{options.model}-{seed}"
        pretrain(
            replace(params.train, seed=seed),
            params.models[options.model],
            options.shards,
            options.certificate or Path(f"out/audits/{options.model}.json"),
            trained=options.trained or out / "trained",
            timing=options.timing or out / "timing.jsonl",
            work=options.work or out / "work",
        )
    except FINAL as error:
        sys.exit(f"stacklm: {error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stacklm.train", description="Train one model of params.yaml.")
    parser.add_argument("--model", required=True, help="its name in params.yaml")
    parser.add_argument("--seed", type=int, metavar="N", help="by default the first of params.yaml")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE")
    parser.add_argument(
        "--shards", type=Path, default=Path("out/shards"), metavar="FOLDER", help="tokens, as stage `shards` makes them"
    )
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="of the audit; by default out/audits/MODEL.json")
    parser.add_argument(
        "--out", type=Path, default=Path("out/runs"), metavar="FOLDER", help="for what follows, in MODEL-SEED/; out/runs"
    )
    parser.add_argument("--trained", type=Path, metavar="FOLDER", help="weights and losses")
    parser.add_argument("--timing", type=Path, metavar="FILE", help="times and memory (JSON lines)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="checkpoints; all nodes must see it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
