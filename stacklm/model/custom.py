"""A user's own model, loaded from one file (docs/your-model.md).

Dimension letters: B batch, T time, W features, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from stacklm.code import beside, digest
from stacklm.config.model import Python, Role, own_code
from stacklm.config.schema import ParamsError, listed, nearest
from stacklm.model.kernels import checkpointed
from stacklm.model.layers import LanguageModel
from stacklm.model.measured import flops, roles_by_type

ROLES = get_args(Role)
SIZES = ("vocab_size", "context_length")
_loaded: dict[tuple[Path, str], ModuleType] = {}
_names: set[str] = set()
"""Names of the modules imported from the folders of users' files."""


class ModelError(ParamsError):
    """The user's model failed; the message names their file and line."""


class Custom(LanguageModel):
    """Wraps a model with `forward`, and optionally `features` and `head`, `decode` and `role_of`.

    With `features` and `head` the loss is computed in chunks of logits. Otherwise the logits are used as features and the head
    is the identity. All of the user's code runs inside the context `guard()`.
    """

    prefix = "net."

    def __init__(
        self, net: nn.Module, name: str, vocab_size: int, context: int, guard: Callable[[], AbstractContextManager]
    ) -> None:
        super().__init__()
        self.net, self.name, self.vocab_size, self.context, self.guard = net, name, vocab_size, context, guard
        self._nothing = nn.Identity()
        two_steps = callable(getattr(net, "features", None)) and isinstance(getattr(net, "head", None), nn.Module)
        self.in_two_steps = two_steps
        self._run: Callable[[Tensor], Any] = self._first_step
        width = getattr(net.head, "out_features", vocab_size) if two_steps else vocab_size
        if width != vocab_size:
            raise ParamsError(f"{name}: its head gives {width} numbers for each token, and the vocabulary has {vocab_size}")

    @property
    def head(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  # an attribute would register it twice
        return self.net.head if self.in_two_steps else self._nothing

    def _first_step(self, ids_BT: Tensor) -> Any:
        net: Any = self.net
        return net.features(ids_BT) if self.in_two_steps else net(ids_BT)

    def features(self, ids_BT: Tensor) -> Tensor:
        """The input of the head, [B, T, W]. Raises `ParamsError` if the user's code fails or returns anything else."""
        if ids_BT.shape[1] > self.context:
            raise ValueError(f"a sequence of {ids_BT.shape[1]} tokens is longer than the model's context of {self.context}; cut it")
        with self.guard():
            x_BTW = self._run(ids_BT)
        return self._checked(x_BTW, ids_BT, "features" if self.in_two_steps else "forward")

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTW = self.features(ids_BT)
        with self.guard():
            return self._checked(self.head(x_BTW), ids_BT, "forward")

    def whole(self, ids_BT: Tensor) -> Tensor:
        """The logits of the user's own `forward`, [B, T, V]; without one, those of `features` and `head`."""
        if type(self.net).forward is nn.Module.forward:
            return self(ids_BT)
        with self.guard():
            logits_BTV = self.net(ids_BT)
        return self._checked(logits_BTV, ids_BT, "forward")

    @property
    def keeps(self) -> str:
        """What decoding caches of earlier tokens, as shown to users."""
        return "all tokens read again" if getattr(self.net, "decode", None) is None else "its own cache"

    def _checked(self, found: Any, ids_BT: Tensor, method: str) -> Tensor:
        batch, length = ids_BT.shape
        wanted = f"[{batch}, {length}, {self.vocab_size if method == 'forward' else 'W'}]"
        where = f"{self.name}.{method}: gave"
        if not isinstance(found, Tensor):
            raise ModelError(f"{where} a {type(found).__name__}, and not a tensor {wanted}")
        if found.ndim != 3 or found.shape[:2] != ids_BT.shape or (method == "forward" and found.shape[2] != self.vocab_size):
            raise ModelError(f"{where} {list(found.shape)} for ids [{batch}, {length}], and not {wanted}")
        if not found.is_floating_point():
            raise ModelError(f"{where} numbers of type {found.dtype}, and not floating-point ones")
        return found

    def as_trained(self, checkpointing: bool, compiled: bool) -> None:
        """Choose how forward and backward passes run: with activation checkpointing of blocks, compiled, or both."""
        self.activation_checkpointing = checkpointing
        if checkpointing:
            for block in self.blocks():
                if "forward" not in vars(block):
                    block.forward = partial(checkpointed, block.forward)
        if compiled:
            self._run = torch.compile(self._first_step, dynamic=False)

    def blocks(self) -> list[nn.Module]:
        """The modules of the `ModuleList` with the most parameters, such as layers in series; empty if there is none."""
        lists = [module for module in self.net.modules() if isinstance(module, nn.ModuleList)]
        return list(max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=[]))

    def flops_per_token(self, attended: float) -> float:
        """Measured on a sequence of 2 * `attended` - 1 tokens, in which causal attention averages `attended` positions."""
        length = round(2 * attended - 1)
        device = next(self.parameters()).device
        was_training = self.training
        try:  # in evaluation mode torch has fused layers, which its counter does not see
            return flops(self.train(), torch.zeros(1, length, dtype=torch.long, device=device)) / length
        finally:
            self.train(was_training)

    def roles(self) -> dict[str, Role]:
        """The role of every parameter. Raises `ParamsError` naming those without one."""
        asked = getattr(self.net, "role_of", None) or (lambda name: None)

        def role_of(name: str) -> str | None:
            with self.guard():
                role = asked(name)
            if role not in (None, *ROLES):
                raise ModelError(f"{self.name}.role_of: gave {role!r} for {name}; a role is one of {listed(ROLES)}, or None")
            return role

        found = roles_by_type(self.net, self.vocab_size, role_of)
        if unknown := [name for name, role in found.items() if role is None]:
            shapes = (f"{name} {list(self.net.get_parameter(name).shape)}" for name in unknown)
            raise ModelError(
                f"{self.name}: no role is known for {listed(shapes)}; say it by a method role_of(name), which gives one of "
                f"{listed(ROLES)}, or None for the others"
            )
        return {f"{self.prefix}{name}": role for name, role in found.items() if role is not None}

    def decoding(self) -> tuple[Callable[[Tensor, bool], Tensor], nn.Module]:
        """A function of the next ids and whether they are the first, which returns their features; and the head for these."""
        decode = getattr(self.net, "decode", None)
        if decode is None:
            return _Recomputed(self).features, self.head
        cache: Any = None

        def step(ids_BT: Tensor, first: bool) -> Tensor:
            nonlocal cache
            with self.guard():
                found = decode(ids_BT, None if first else cache)
            if not (isinstance(found, tuple) and len(found) == 2):
                raise ModelError(f"{self.name}.decode: gave a {type(found).__name__}, and not a pair of logits and cache")
            logits_BTV, cache = found
            return self._checked(logits_BTV, ids_BT, "forward")

        return step, self._nothing


class _Recomputed:
    """Decoding without a cache: all tokens so far are processed again for each new one."""

    def __init__(self, model: Custom) -> None:
        self.model = model
        self.ids_BT = torch.empty(0)

    def features(self, ids_BT: Tensor, first: bool) -> Tensor:
        self.ids_BT = ids_BT if first else torch.cat([self.ids_BT, ids_BT], dim=1)
        return self.model.features(self.ids_BT)[:, -ids_BT.shape[1] :]


def load_custom(architecture: Python, vocab_size: int, context: int) -> Custom:
    """The user's model with fresh weights. Raises `ParamsError` for wrong settings or with the user's error and line."""
    files = _files(architecture)
    guard = partial(shown_as_theirs, files)
    kind = _class(architecture, files)
    arguments = {**dict(zip(SIZES, (vocab_size, context), strict=True)), **architecture.settings}
    _check_arguments(kind, arguments, architecture)
    with guard():
        net = kind(**arguments)
    if not any(True for _ in net.parameters()):
        raise ParamsError(f"{architecture.path}: {architecture.class_} has no parameters to train")
    return Custom(net, architecture.class_, vocab_size, context, guard)


def models_in(architecture: Python) -> list[str]:
    """The names of the model classes that a file defines, in order. Raises `ParamsError` as `load_custom` does."""
    module = _module(architecture, _files(architecture))
    own = (one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__)
    return [one.__name__ for one in own if issubclass(one, nn.Module)]


def model_named(target: str, settings: Mapping[str, Any]) -> Python:
    """The model that `my_model.py` or `my_model.py:MyModel` refers to. Without a class name it is the only model class, or the
    only one that takes `vocab_size` and `context_length`.

    Raises `ParamsError` if there is none or more than one.
    """
    path, _, name = target.partition(".py:")
    architecture = Python(f"{path}.py" if name else target, name, settings=dict(settings))
    if not architecture.file().is_file():  # it may be relative to the current directory, below the project's root
        architecture = replace(architecture, path=str(Path(architecture.path).resolve()))
    if name:
        return architecture
    module, found, file = _module(architecture, _files(architecture)), models_in(architecture), Path(architecture.path).name
    found = [one for one in found if {*SIZES} <= {*inspect.signature(getattr(module, one)).parameters}] or found
    if not found:
        raise ParamsError(f"{file}: has no class that is a torch.nn.Module")
    if len(found) > 1:
        raise ParamsError(f"{file}: has several models, {listed(found)}; name one, as {file}:{found[-1]}")
    return replace(architecture, class_=found[0])


def _files(architecture: Python) -> dict[Path, str]:
    """The user's files, with their names relative to the folder of the first."""
    own_code(architecture)  # raises for a file that is missing or not Python
    return {path.resolve(): name for name, path in beside(architecture.file())[0].items()}


def _class(architecture: Python, files: dict[Path, str]) -> type[nn.Module]:
    name, path = architecture.class_, architecture.path
    kind = getattr(_module(architecture, files), name, None)
    if kind is None:
        names = models_in(architecture)
        raise ParamsError(f"class: {path} has no {name}; its models are {listed(names) or 'none'}{nearest(name, names)}")
    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise ParamsError(f"class: {name} of {path} is no torch.nn.Module")
    return kind


def _check_arguments(kind: type, arguments: dict[str, Any], architecture: Python) -> None:
    """Raise `ParamsError` unless the class can be called with these arguments."""
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = [name for name in signature.parameters if name not in ("args", "kwargs")]
        stray = next((name for name in architecture.settings if name not in names), None)
        hint = nearest(stray, names) if stray else ""
        made = f"{architecture.class_}({listed(f'{name}=...' for name in arguments)})"
        raise ParamsError(f"{architecture.path}: made as {made}, but it takes {signature}: {error}{hint}") from None


def _module(architecture: Python, files: dict[Path, str]) -> ModuleType:
    """The user's file as a module; executed again if it, or a file that it imports from its folder, has changed."""
    file = architecture.file().resolve()
    key = file, digest(own_code(architecture))
    if key in _loaded:
        return _loaded[key]
    for name in _names:  # from other files, or older versions
        sys.modules.pop(name, None)
    spec = importlib.util.spec_from_file_location(f"stacklm_model_{key[1][:12]}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    folder = str(file.parent)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    sys.path.insert(0, folder)
    before = set(sys.modules)
    try:
        with shown_as_theirs(files):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    finally:
        sys.path.remove(folder)
        _names.update(name for name in set(sys.modules) - before if _source(sys.modules[name]) in files)
    if folder not in sys.path:
        sys.path.append(folder)  # for imports inside functions
    _loaded[key] = module
    return module


def _source(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


@contextmanager
def shown_as_theirs(files: dict[Path, str]) -> Iterator[None]:
    """Turn errors raised in one of these files into a `ModelError` with the file's name, the line and the original message."""
    try:
        yield
    except (ParamsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() in files]
        if not frames:
            raise
        last = frames[-1]
        place = f"{files[Path(last.filename).resolve()]}, line {last.lineno}, in {last.name}\n    {last.line}"
        raise ModelError(f"{place}\n{type(error).__name__}: {error}") from error
