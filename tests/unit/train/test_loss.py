"""Losses and gradients in chunks equal those of the plain form: all logits, then torch's cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stacklm.config.model import Architecture, Dense, Stack, Stacked
from stacklm.data.batches import IGNORED
from stacklm.model.build import build
from stacklm.train import loss as module
from stacklm.train.loss import Objective, token_losses
from support.rounding import assert_same, rounding

pytestmark = pytest.mark.numerical

VOCAB, CONTEXT, BATCH = 19, 6, 5
STACKS = (Stack(2, 4, 16), Stack(2, 4, 16))
MODELS = {
    "dense": Dense(8, 2, 1, 16),
    "dense, tied": Dense(8, 2, 1, 16, tie_embeddings=True),
    "stacked, bias": Stacked(8, 2, STACKS),
    "stacked, tied": Stacked(8, 2, STACKS, tie_embeddings=True),
}
every_model = pytest.mark.parametrize("architecture", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True, params=[9, 15, 64], ids="{} rows".format)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """30 rows in 4 chunks of which the last has 3, in 2 even ones, and in one."""
    monkeypatch.setattr(module, "ROWS", request.param)
    return request.param


def made(architecture: Architecture, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose gradients are all of some size."""
    torch.manual_seed(0)
    model = build(architecture, VOCAB, CONTEXT).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def plain(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    logits_BTV = model(inputs_BT)
    logits_RV = logits_BTV.flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return F.cross_entropy(logits_RV, targets_BT.flatten(), reduction="sum")


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.requires_grad)


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ignoring", [False, True], ids=["all targets", "ignored targets"])
def test_loss_and_gradients_are_those_of_the_plain_form(architecture, dtype, ignoring) -> None:
    """Times a factor, and added to those of a batch before. An ignored target has none; some chunks have none that counts.

    A gradient sums over all tokens and classes.
    """
    error = rounding(dtype, BATCH * CONTEXT * VOCAB)
    model, reference = made(architecture, dtype), made(architecture, dtype)
    inputs_BT, targets_BT = (ids_BT.clone() for ids_BT in batch())
    if ignoring:
        targets_BT[:, ::2] = targets_BT[2:4] = IGNORED
    for rows in (slice(0, 3), slice(3, 5), slice(0, 5)):
        found = Objective(model)(inputs_BT[rows], targets_BT[rows])
        wanted = plain(reference, inputs_BT[rows], targets_BT[rows])
        torch.testing.assert_close(found, wanted, rtol=error, atol=0)
        (found / 7).backward()
        (wanted / 7).backward()
    wanted = dict(gradients(reference))
    for name, grad in gradients(model):
        assert (grad - wanted[name]).norm() <= error * wanted[name].norm(), name


def test_a_head_that_is_no_product_has_the_same_loss_and_gradients() -> None:
    one, other = made(MODELS["stacked, bias"]), made(MODELS["stacked, bias"])
    other.head = nn.Sequential(nn.Identity(), other.head)
    inputs_BT, targets_BT = (ids_BT.clone() for ids_BT in batch())
    targets_BT[:, ::2] = IGNORED
    losses = [Objective(model)(inputs_BT, targets_BT) for model in (one, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    inputs_BT, targets_BT = batch()
    torch.testing.assert_close(*(token_losses(model, inputs_BT, targets_BT) for model in (one, other)))


@every_model
def test_losses_of_single_tokens_add_up_to_it(architecture) -> None:
    model = made(architecture)
    losses_BT = token_losses(model, *batch())
    assert losses_BT.shape == (BATCH, CONTEXT) and not losses_BT.requires_grad
    assert_same(losses_BT.sum(), Objective(model)(*batch()).detach(), BATCH * CONTEXT * VOCAB)
    wanted = F.cross_entropy(model(batch()[0]).flatten(0, 1), batch()[1].flatten(), reduction="none")
    assert_same(losses_BT.flatten(), wanted.detach(), VOCAB)


class Table(nn.Module):
    """Each token has logits of its own, by `ids` that are the features already."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.head = nn.Linear(len(logits), len(logits[0]), bias=False)
        self.head.weight.data = torch.tensor(logits).T

    def features(self, ids_BT: Tensor) -> Tensor:
        return F.one_hot(ids_BT, self.head.in_features).float()


def test_each_token_has_the_loss_of_its_own_logits() -> None:
    table = Table([[0.0, 0.0, 0.0], [math.log(2), math.log(5), math.log(3)]])
    losses_BT = token_losses(table, torch.tensor([[0, 1], [1, 1]]), torch.tensor([[2, 0], [1, 2]]))
    assert_same(losses_BT, -torch.tensor([[1 / 3, 0.2], [0.5, 0.3]]).log(), 3)


def test_logits_of_any_size_have_finite_losses() -> None:
    table = Table([[1e4, 0.0, -1e4]])
    losses_BT = token_losses(table, torch.tensor([[0, 0, 0]]), torch.tensor([[0, 1, 2]]))
    assert losses_BT.tolist() == [[0, 1e4, 2e4]]
    loss = Objective(table)(torch.tensor([[0, 0, 0]]), torch.tensor([[0, 1, 2]]))
    loss.backward()
    assert loss == 3e4 and table.head.weight.grad.flatten().tolist() == [2, -1, -1]


@pytest.mark.parametrize("target", [-2, -1, VOCAB])
def test_a_target_that_is_no_token_is_an_error(target: int) -> None:
    inputs_BT, targets_BT = batch()
    targets_BT = targets_BT.index_fill(1, torch.tensor([2]), target)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        Objective(made(MODELS["dense"]))(inputs_BT, targets_BT)


def test_a_second_backward_pass_is_refused() -> None:
    loss = Objective(made(MODELS["dense"]))(*batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_model
def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32(architecture) -> None:
    """Compared with the same in float32: no further off than the plain form is, but for chance."""
    errors = {}
    exact = made(architecture)
    Objective(exact)(*batch()).backward()
    for name, objective in {"ours": Objective, "plain": lambda model: partial(plain, model)}.items():
        model = made(architecture)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model)(*batch())
            losses_BT = token_losses(model, *batch())
        loss.backward()
        assert loss.dtype == losses_BT.dtype == model.head.weight.grad.dtype == torch.float32
        assert_same(losses_BT.sum(), loss.detach(), BATCH * CONTEXT * VOCAB)
        pairs = zip(gradients(model), gradients(exact), strict=True)
        errors[name] = max(((grad - right).norm() / max(right.norm(), 1)).item() for (_, grad), (_, right) in pairs)
    assert errors["ours"] < max(2 * errors["plain"], 0.02)
    assert errors["plain"] > 1e-4


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_it_runs_without_data(where: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        model = build(MODELS["stacked, bias"], VOCAB, CONTEXT)
        ids_BT = torch.zeros(BATCH, CONTEXT, dtype=torch.long)
        Objective(model)(ids_BT, ids_BT).backward()
        assert token_losses(model, ids_BT, ids_BT).shape == (BATCH, CONTEXT)
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters() if parameter.requires_grad)


def test_no_tensor_is_as_wide_as_the_vocabulary_and_longer_than_a_chunk(rows: int) -> None:
    class Widest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == VOCAB:
                self.found = max(self.found, len(result))
            return result

    model = made(MODELS["stacked, bias"])
    with Widest() as widest:
        Objective(model)(*batch()).backward()
        token_losses(model, *batch())
    assert widest.found == min(rows, BATCH * CONTEXT)
