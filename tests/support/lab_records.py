"""An experiment with made-up scores instead of training runs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import partial

from ruamel.yaml import YAML

from stacklm.code import digest
from stacklm.config.params import Params
from stacklm.config.schema import read
from stacklm.lab.experiment import Arm, Experiment, arms, settings, stated
from stacklm.lab.findings import Findings
from stacklm.lab.schedule import Lab, Planned
from stacklm.lab.speed import Latency
from support.checkout import PARAMS

FILE = """\
question: Which of three is best?
refuted_by: no difference
budget: parameters
margin: 0.005
baseline: {architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 2, d_ff: 64}, optimizer: {peak_lr: 2e-3}}
candidates:
  better: {change: {architecture.ffn: swiglu}}
  equal: {change: {optimizer.beta2: 0.99}}
  worse: {change: {optimizer.beta1: 0.5}}
seeds: {tune: [101, 102], judge: [1, 2, 3, 4, 5, 6, 7, 8]}
sizes: [1, 2]
"""
SWIGLU = """\
question: Does SwiGLU help?
refuted_by: the interval lies above the margin
budget: parameters
margin: 0.005
baseline: {architecture: {kind: dense, d_model: 16, n_heads: 2, n_layers: 1, d_ff: 32}, optimizer: {peak_lr: 3.2e-2}}
candidates:
  swiglu: {change: {architecture.ffn: swiglu}}
seeds: {tune: [101], judge: [1, 2, 3]}
rates: 3
"""
TWO_HUNDRED = SWIGLU.replace("[101]", str([*range(101, 111)])).replace("[1, 2, 3]", str([*range(1, 11)])) + "sizes: [1, 2]\n"
"""The same experiment with two hundred trials."""
TRUTH = {"baseline": 2.0, "better": 1.96, "equal": 2.0, "worse": 2.06}
BEST = {"baseline": 1e-3, "better": 3e-3, "equal": 1e-3, "worse": 1.6e-2}


def lab_of(experiment: Experiment | str, params: Params = PARAMS) -> Lab:
    """The lab of an experiment, given as object or as text of its file, in a tiny project."""
    if isinstance(experiment, str):
        experiment = read(Experiment, YAML(typ="safe").load(experiment))
    return Lab(experiment, arms(experiment, params), settings(experiment, params), data="d" * 64, code="c" * 64)


def make_lab(sizes: str = "[1, 2]") -> Lab:
    return lab_of(FILE.replace("sizes: [1, 2]", f"sizes: {sizes}"))


def shaped_findings(shapes: Sequence[tuple[int, int]], truth: Mapping[str, float]) -> Findings:
    """The findings of an experiment on stacked models of these (S, N) and dense ones, with made-up scores around `truth`."""
    tree = YAML(typ="safe").load(FILE) | {"budget": "tokens", "sizes": [1], "candidates": {}}
    for S, N in shapes:
        stacks = [{"layers": N, "features": 24 // N, "d_ff": 24}] * S
        form = {"kind": "stacked", "d_model": 24, "n_heads": 2, "stacks": stacks, "residual": True}
        tree["candidates"][f"stacked-{S}x{N}"] = {"model": {"architecture": form, "optimizer": {"peak_lr": 2e-3}}}
    lab = lab_of(read(Experiment, tree))
    scores = partial(recorded, truth={"baseline": 2.0, **truth}, best=dict.fromkeys(["baseline", *truth], 2e-3))
    return Findings("shapes", lab, course(lab, record=scores)[0])


def measured(planned: Planned, truth: Mapping[str, float] = TRUTH, best: Mapping[str, float] = BEST) -> dict:
    """Made-up scores: quadratic in the log of the learning rate, with noise per seed and less noise per arm."""
    name, seed, rate = planned.arm.name, planned.trial.train.seed, planned.trial.model.optimizer.peak_lr
    noise = 0.004 * random.Random(f"{seed}").gauss(0, 1) + 0.001 * random.Random(f"{seed}{name}").gauss(0, 1)
    bits = truth[name] / planned.arm.size**0.1 * (1 + noise + 0.01 * math.log2(rate / best[name]) ** 2)
    return {"valid": {"bits_per_byte": bits}, "test": {"bits_per_byte": 1.1 * bits}}


def course(lab: Lab, at_once: int = 1, record=measured) -> tuple[dict, list[Planned]]:
    """The records of all trials, and the trials in the order in which `at_once` workers would run them."""
    records, done = {}, []
    while pending := lab.pending(records):
        for planned in pending[:at_once]:
            assert planned.trial.identity not in records
            records[planned.trial.identity] = record(planned)
            done.append(planned)
    return records, done


def recorded(planned: Planned, **scores: Mapping[str, float]) -> dict:
    """A complete record of a trial with made-up scores on a test set of 40 documents."""
    found, common, own = measured(planned, **scores), random.Random("documents"), random.Random(planned.trial.identity)
    sizes = [common.randint(500, 4_000) for _ in range(40)]
    nats = found["test"]["bits_per_byte"] * math.log(2)
    return {
        "identity": planned.trial.identity,
        **found,
        "groups": {
            "nats": " ".join(f"{nats * size * own.gauss(1, 0.01):.2f}" for size in sizes),
            "bytes": " ".join(map(str, sizes)),
        },
        "weights": own.randbytes(32).hex(),
        "flops": planned.arm.cost.training_flops,
        "seconds": planned.arm.cost.training_flops / 1e8,
        "began": "2026-01-02T03:04:05+00:00",
        "machine": {"system": "Linux", "processor": "x86_64", "kernels": "AVX2", "python": "3.12.1", "torch": "2.13.0"},
    }


def timed(arms: Sequence[Arm], medians: Sequence[float]) -> Latency:
    """Made-up decoding times; the quartiles are a tenth below the median and a fifth above."""
    return Latency(
        machine={"system": "Linux", "kernels": "AVX2"},
        measured="2026-01-02",
        context=16,
        rounds=25,
        seconds={arm.key: (median, 0.9 * median, 1.2 * median) for arm, median in zip(arms, medians, strict=True)},
        architectures={arm.key: digest(stated(arm.model.architecture))[:16] for arm in arms},
    )
