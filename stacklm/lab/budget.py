"""Arms at an equal budget: the cost of an arm on every axis, and the shape that meets the baseline's on the axis held equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from stacklm.config.model import Architecture, Dense, HuggingFace, Model, Python
from stacklm.config.schema import ParamsError
from stacklm.config.train import Train
from stacklm.model.build import ModelConfig
from stacklm.model.cache import KEYS_AND_VALUES
from stacklm.model.count import count
from stacklm.plan.plan import cache_bytes

Axis = Literal["parameters", "training_flops", "tokens", "seconds"]

CLOSE, FAR = 0.01, 0.05
"""Relative mismatch on the axis held equal above which an arm gets a warning, and above which it is an error."""
WIDEST = 1 << 20
D_FF = ("d_ff", "intermediate_size")
"""Names of the feed-forward hidden width in settings; the second is that of `transformers`."""


@dataclass(frozen=True)
class Cost:
    """Costs of one arm: trained parameters, FLOPs and tokens of a whole run, matrix products in series per token (the serial
    depth), and KV cache bytes per token (None without a KV cache). The last two are unknown for a model from outside this
    package."""

    parameters: int
    training_flops: int
    tokens: int
    depth: int | None
    kv_bytes: int | None


def cost(model: Model, train: Train, vocab_size: int) -> Cost:
    """The costs of a run of that model, counted without running it."""
    architecture, context = model.architecture, train.context_length
    counts = count(architecture, vocab_size, context)
    tokens = train.last_step * train.tokens_per_step
    return Cost(
        parameters=counts.total,
        training_flops=tokens * counts.training_flops_per_token,
        tokens=tokens,
        depth=architecture.depth(context),
        kv_bytes=cache_bytes(ModelConfig(architecture, vocab_size, context), KEYS_AND_VALUES),
    )


def mismatch(arm: Cost, baseline: Cost) -> dict[str, float]:
    """The relative difference on every axis known for both: `arm / baseline - 1`."""
    pairs = ((name, getattr(arm, name), getattr(baseline, name)) for name in Cost.__dataclass_fields__)
    return {name: ours / theirs - 1 for name, ours, theirs in pairs if ours is not None and theirs}


def scaled(architecture: Architecture, factor: float) -> Architecture:
    """The same architecture with all widths multiplied by `factor`: d_model, heads of the same dim, features and d_ff.

    Raises `ParamsError` naming the first width that would not be a whole number, and for a model from outside this package.
    """
    if isinstance(architecture, (Python, HuggingFace)):
        if factor != 1:
            raise ParamsError(
                f"sizes: {factor:g} multiplies widths, but the widths of kind {architecture.kind} are unknown; write [1]"
            )
        return architecture
    widths: dict[str, object] = {name: _times(name, getattr(architecture, name), factor) for name in ("d_model", "n_heads")}
    if isinstance(architecture, Dense):
        return replace(architecture, **widths, d_ff=_times("d_ff", architecture.d_ff, factor))
    stacks = tuple(
        replace(
            stack,
            features=_times(f"stacks[{i}].features", stack.features, factor),
            d_ff=_times(f"stacks[{i}].d_ff", stack.d_ff, factor),
        )
        for i, stack in enumerate(architecture.stacks)
    )
    return replace(architecture, **widths, stacks=stacks)


def _times(name: str, width: int, factor: float) -> int:
    product = width * factor
    if product != int(product) or product < 1:
        raise ParamsError(f"size {factor:g}: {name} {width} * {factor:g} = {product:g} is not a whole number")
    return int(product)


def fitted(
    name: str, model: Model, train: Train, vocab_size: int, target: Cost, axis: Axis, fit: bool = True
) -> tuple[Model, Cost]:
    """The model with the d_ff that comes nearest to the target on the axis held equal, and its costs.

    The d_ff of several stacks keep their proportions. On the axes `tokens` and `seconds`, without `fit`, and for a model without
    d_ff, the shape is not changed. Raises `ParamsError` with the numbers if the mismatch is above `FAR`.
    """
    if axis == "seconds":
        return model, cost(model, train, vocab_size)
    if axis != "tokens" and fit and (now := d_ff_of(model.architecture)) is not None:
        wanted = getattr(target, axis)

        @cache
        def missed(d_ff: int) -> int:
            counts = count(with_d_ff(model.architecture, d_ff), vocab_size, train.context_length)
            return (counts.total if axis == "parameters" else counts.training_flops_per_token * target.tokens) - wanted

        above = _linear(missed, now)
        if not isinstance(model.architecture, (Python, HuggingFace)):  # not quite linear: d_ff of further stacks are rounded
            while above < WIDEST and missed(above) < 0:
                above += 1
            while above > 1 and missed(above - 1) >= 0:
                above -= 1
        nearest = min(range(max(1, above - 1), above + 1), key=lambda d_ff: abs(missed(d_ff)))
        model = replace(model, architecture=with_d_ff(model.architecture, nearest))
    reached = cost(model, train, vocab_size)
    off = mismatch(reached, target)[axis]
    if abs(off) > FAR:
        d_ff = d_ff_of(model.architecture)
        raise ParamsError(
            f"{name} cannot meet the budget: the nearest is {getattr(reached, axis):,} {axis} at "
            f"{'its settings, which have no d_ff to adjust' if d_ff is None else f'd_ff {d_ff}'}, {off:+.1%} from the baseline's "
            f"{getattr(target, axis):,}; at most {FAR:.0%} is allowed: change its other widths or its number of layers"
        )
    return model, reached


def _linear(missed: Callable[[int], int], now: int) -> int:
    """The d_ff that meets the target if costs are linear in it. Counting may require building and running the model, so few widths
    are tried, and no huge ones."""
    slope = (missed(2 * now) - missed(now)) / now
    return now if slope <= 0 else min(WIDEST, max(1, math.ceil(now - missed(now) / slope)))


def d_ff_of(architecture: Architecture) -> int | None:
    """The d_ff of the first stack, or of every layer; None for a model from outside this package without such a setting."""
    if isinstance(architecture, (Python, HuggingFace)):
        found = (architecture.settings.get(name) for name in D_FF)
        return next((value for value in found if isinstance(value, int)), None)
    return architecture.d_ff if isinstance(architecture, Dense) else architecture.stacks[0].d_ff


def with_d_ff(architecture: Architecture, d_ff: int) -> Architecture:
    """The architecture with this d_ff, as in `d_ff_of`; those of further stacks in proportion."""
    if isinstance(architecture, (Python, HuggingFace)):
        name = next(name for name in D_FF if name in architecture.settings)
        return replace(architecture, settings={**architecture.settings, name: d_ff})
    if isinstance(architecture, Dense):
        return replace(architecture, d_ff=d_ff)
    first = architecture.stacks[0].d_ff
    stacks = tuple(replace(stack, d_ff=max(1, round(stack.d_ff * d_ff / first))) for stack in architecture.stacks)
    return replace(architecture, stacks=stacks)
