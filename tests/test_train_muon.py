from __future__ import annotations

import pytest
import torch

from stacklm.train.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 16, 16), (2, 3, 4, 24)])
def test_the_update_is_torchs_of_every_matrix_by_itself(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `torch.optim.Muon`, which knows two dimensions, after three steps, without its rounding to bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    torch.manual_seed(0)
    packed = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    slices = [matrix.clone().requires_grad_() for matrix in packed.detach().reshape(-1, *shape[-2:])]
    group = {"role": "matrix", "params": [packed], "lr": 0.02, "weight_decay": 0.1}
    ours = Muon([group], momentum=0.9, ns_steps=4, betas=(0.9, 0.95), eps=1e-8)
    theirs = torch.optim.Muon(slices, lr=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        packed.grad = torch.randn_like(packed)
        for matrix, gradient in zip(slices, packed.grad.reshape(-1, *shape[-2:]), strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(packed.detach().reshape(-1, *shape[-2:]), torch.stack(slices).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 8), (5, 8, 24)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    found = orthogonal(x.to(dtype), steps=5)
    assert found.dtype == dtype
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    inner = left.mT @ found.float() @ right.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_what_is_no_matrix_is_left_to_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    settings = {"betas": (0.8, 0.9), "eps": 1e-6}
    group = {"role": "vector", "params": [ours], "lr": 0.1, "weight_decay": 0.0}
    optimizers = Muon([group], 0.95, 5, **settings), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, fused=True, **settings)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(3, 4)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)
