"""Section `models`: what is compared, one named entry each.

An entry is an architecture with the optimizer settings tuned for it. What must be equal for a fair comparison (data, budget, seed,
schedule) is set elsewhere, mostly in section `train`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from stacklm.code import file_units, package_versions
from stacklm.config.optimizer import DEFAULT_OPTIMIZER, Optimizer
from stacklm.config.schema import Natural, ParamsError, Range, Size, nearest
from stacklm.files import project_root

DEEPEST = 1024
"""Maximum stacks or blocks in series; each is built separately."""
WIDEST = 2**22
"""Maximum width of a stack's output, and of all its heads' queries together."""
Heads = Annotated[int, Range(1, 2**12)]
ConvSize = Annotated[int, Range(1, 16)]
Role = Literal["embedding", "matrix", "vector", "head"]
"""The role of a parameter determines how an optimizer treats it."""


@dataclass(frozen=True)
class Stack:
    """N = `layers` parallel decoder layers that emit d = `features` each."""

    layers: Annotated[int, Range(1, 2**16)]
    """N, the parallel layers of the stack."""
    features: Size
    """d, the features that each layer emits."""
    d_ff: Size
    """Hidden width of the mix, or of the feed-forward network unless ffn is per_layer."""

    def __post_init__(self) -> None:
        if self.width > WIDEST:
            raise ParamsError(f"layers {self.layers} * features {self.features} = {self.width}; a stack gives at most {WIDEST}")

    @property
    def width(self) -> int:
        """W, the width of the stack's output."""
        return self.layers * self.features


@dataclass(frozen=True)
class PublishedAttention:
    """Queries, keys and values of d_model / n_heads per head, an output projection, a reduction to d features; with biases."""

    kind: Literal["published"] = "published"


@dataclass(frozen=True)
class FactoredAttention:
    """Each head maps x to d features by one matrix, which replaces value, output projection and reduction; no biases."""

    kind: Literal["factored"] = "factored"
    qk_head_dim: Size | None = None
    """Head dim of queries and keys; null: d_model / n_heads."""
    rope: bool = False
    """Rotary position embedding of queries and keys, instead of positions added to the embedding."""
    qk_norm: bool = False
    """Normalize queries and keys."""
    kv_sharing: Literal["none", "stack"] = "none"
    """stack: all layers of a stack share keys and values."""


@dataclass(frozen=True)
class Stacked:
    """The stacked-parallel decoder; all settings below `stacks` default to the published form. See docs/variants.md."""

    d_model: Size
    """Width of the embedding, and of every stack except the last."""
    n_heads: Heads
    """Attention heads of each layer."""
    stacks: tuple[Stack, ...]
    """The stacks in series."""
    kind: Literal["stacked"] = "stacked"
    attention: PublishedAttention | FactoredAttention = PublishedAttention()
    """published, or factored: fewer matrices, more settings."""
    ffn: Literal["per_layer", "relu2", "swiglu"] = "per_layer"
    """per_layer: a small network in every layer, then a mix of two maps. Else the mix is one map, followed by one such network."""
    residual: bool = False
    """Whether a stack's output is added to its input or replaces it."""
    skip_connections: Literal["none", "input", "dense", "dynamic"] = "none"
    """Inputs of a stack besides the previous output. input: x_0; dense: all earlier outputs; dynamic: these, each with a weight
    that depends on the token, also for the head."""
    conv_size: ConvSize = 1
    """Width of the short convolution at a stack's input, in tokens. 1: none, 2: a token shift."""
    tie_embeddings: bool = False
    """Project to d_model and share the embedding's weights with the head; else the head is as wide as the last stack."""
    tokens_per_extra_stack: Natural = 0
    """Add one stack in the middle per that many tokens of context beyond the first token; 0: never."""
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    """Fraction of activations dropped in training."""

    def __post_init__(self) -> None:
        _check_heads(self.d_model, self.n_heads)
        if not self.stacks:
            raise ParamsError("stacks: [] is not allowed; name at least one stack")
        for i, stack in enumerate(self.stacks[:-1]):
            if stack.width != self.d_model:
                raise ParamsError(
                    f"stacks[{i}]: features {stack.features} * layers {stack.layers} = {stack.width}, but every stack "
                    f"except the last must give d_model = {self.d_model}"
                )
        for i, stack in enumerate(self.stacks):
            if (queries := stack.layers * self.n_heads * self.qk_head_dim) > WIDEST:
                raise ParamsError(
                    f"stacks[{i}]: layers {stack.layers} * n_heads {self.n_heads} * qk_head_dim {self.qk_head_dim} = {queries}, "
                    f"above {WIDEST}"
                )
        last = self.stacks[-1].width
        if self.residual and last < self.d_model:
            raise ParamsError(f"residual: adds d_model {self.d_model} to the last stack's {last}; it must give at least as much")
        if self.tokens_per_extra_stack and len(self.stacks) == 1 and last != self.d_model:
            raise ParamsError(
                f"tokens_per_extra_stack: {self.tokens_per_extra_stack} repeats the only stack, "
                f"so it must give d_model = {self.d_model}, not {last}"
            )
        if self.skip_connections in ("input", "dense") and len(self.stacks) == 1 and not self.tokens_per_extra_stack:
            raise ParamsError(
                f"skip_connections: {self.skip_connections} needs at least 2 stacks; before the only one there is nothing but x_0"
            )
        if self.rope and self.qk_head_dim % 2:
            raise ParamsError(f"attention: rope turns pairs, so qk_head_dim must be even, not {self.qk_head_dim}")

    @property
    def qk_head_dim(self) -> int:
        """K, the head dim of queries and keys."""
        chosen = self.attention.qk_head_dim if isinstance(self.attention, FactoredAttention) else None
        return chosen or self.d_model // self.n_heads

    @property
    def rope(self) -> bool:
        """Whether queries and keys have rotary positions."""
        return isinstance(self.attention, FactoredAttention) and self.attention.rope

    def stacks_for(self, context: int) -> tuple[Stack, ...]:
        """The stacks of a model for that context length, including those added by `tokens_per_extra_stack`."""
        further = self._further(context)
        middle = (len(self.stacks) - 1) // 2
        return (*self.stacks[:middle], *(self.stacks[middle],) * (1 + further), *self.stacks[middle + 1 :])

    def depth(self, context: int) -> int:
        """S, the number of steps that cannot run in parallel."""
        return len(self.stacks) + self._further(context)

    def _further(self, context: int) -> int:
        return (context - 1) // self.tokens_per_extra_stack if self.tokens_per_extra_stack else 0


@dataclass(frozen=True)
class Dense:
    """A modern decoder: rotary positions, QK-norm, RMSNorm, no biases."""

    d_model: Size
    """Width of the residual stream."""
    n_heads: Heads
    """Attention heads of each layer."""
    n_layers: Annotated[int, Range(1, DEEPEST)]
    """Decoder layers in series."""
    d_ff: Size
    """Hidden width of the feed-forward network."""
    kind: Literal["dense"] = "dense"
    ffn: Literal["relu2", "swiglu"] = "relu2"
    """The feed-forward network's activation."""
    conv_size: ConvSize = 1
    """Width of the short convolution at an attention's input, in tokens. 1: none, 2: a token shift."""
    tie_embeddings: bool = False
    """Share the embedding's weights with the head."""
    skip_connections: Literal["none", "dynamic"] = "none"
    """dynamic: a layer, and the head, also read all earlier outputs, each with a weight that depends on the token."""

    def __post_init__(self) -> None:
        _check_heads(self.d_model, self.n_heads)
        if (self.d_model // self.n_heads) % 2:
            raise ParamsError(f"d_model {self.d_model} / n_heads {self.n_heads} is odd; rotary positions need an even head dim")

    def depth(self, context: int) -> int:
        """L, the number of steps that cannot run in parallel."""
        return self.n_layers


@dataclass(frozen=True)
class Python:
    """Your own model, loaded from one file. See docs/your-model.md."""

    path: str
    """The file, relative to the project's root unless absolute."""
    class_: str
    """The class in that file, called as `class(vocab_size, context_length, **settings)`."""
    kind: Literal["python"] = "python"
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of the class. Experiments at equal budgets choose its `d_ff`, if it has one."""

    def depth(self, context: int) -> None:
        """Not known."""

    def file(self, root: Path | None = None) -> Path:
        """The full path of the file in the project at `root`, by default the project around the current directory, if any."""
        return (root or project_root() or Path.cwd()) / Path(self.path).expanduser()


@dataclass(frozen=True)
class HuggingFace:
    """An architecture of `transformers`, from its configuration, with fresh weights. See docs/your-model.md."""

    config: str
    """The configuration class, such as LlamaConfig."""
    kind: Literal["huggingface"] = "huggingface"
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    """Its arguments, except vocabulary size and context length."""
    roles: dict[str, Role] = field(default_factory=dict, hash=False)
    """Roles of parameters by name patterns, such as `"*.A_log": vector`, where the role by module type is wrong."""

    def depth(self, context: int) -> None:
        """Not known."""


Architecture = Stacked | Dense | Python | HuggingFace


def own_code(architecture: Architecture, root: Path | None = None) -> dict[str, str]:
    """The code outside this package that a model runs: a hash of each function and class, and package versions.

    Empty for a model of this package. `root` is that of the project, see `Python.file`. Raises `ParamsError` if a file is missing
    or not Python.
    """
    if isinstance(architecture, HuggingFace):
        return package_versions({"transformers"})
    if not isinstance(architecture, Python):
        return {}
    file = architecture.file(root)
    try:
        return file_units(file)
    except OSError:
        there = sorted(path.name for path in file.parent.glob("*.py"))
        raise ParamsError(f"path: no file {architecture.path} in {file.parent}{nearest(file.name, there)}") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise ParamsError(f"path: {architecture.path} is not UTF-8") from None
        raise ParamsError(f"{architecture.path}, line {error.lineno}: {error.msg}\n    {(error.text or '').strip()}") from None


@dataclass(frozen=True)
class Model:
    """One entry of the comparison."""

    architecture: Architecture
    """The architecture that computes the logits."""
    optimizer: Optimizer = DEFAULT_OPTIMIZER
    """The optimizer, with the settings tuned for this architecture."""


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ParamsError(f"n_heads: {heads} does not divide d_model {width}")
