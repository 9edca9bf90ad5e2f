"""Gated linear attention (after Yang et al. 2023, arXiv:2312.06635), step by step: a matrix per head that decays by itself."""

import torch
from layers import GatedUnit, Scale
from torch import nn


class Recurrence(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.decay = nn.Parameter(torch.linspace(1.0, 4.0, heads * width // heads).view(heads, -1))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, state=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if state is None:
            state = x.new_zeros(len(x), self.heads, q.shape[-1], q.shape[-1])
        keep = self.decay.sigmoid()[None, :, :, None]
        steps = []
        for t in range(x.shape[1]):
            state = keep * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            steps.append(torch.einsum("bhk,bhkd->bhd", q[:, t], state))
        return self.out(torch.stack(steps, dim=1).flatten(2)), state


class Gated(nn.Module):
    def __init__(self, vocab_size, context_length, width=16, heads=2, layers=2, d_ff=32):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.mixers = nn.ModuleList(Recurrence(width, heads) for _ in range(layers))
        self.units = nn.ModuleList(GatedUnit(width, d_ff) for _ in range(layers))
        self.norms = nn.ModuleList(Scale(width) for _ in range(2 * layers))
        self.output = nn.Linear(width, vocab_size)

    def forward(self, ids):
        return self.decode(ids)[0]

    def decode(self, ids, cache=None):
        x, states = self.embed(ids), []
        for i, (mixer, unit) in enumerate(zip(self.mixers, self.units, strict=True)):
            y, state = mixer(self.norms[2 * i](x), cache and cache[i])
            states.append(state)
            x = x + y
            x = x + unit(self.norms[2 * i + 1](x))
        return self.output(x), states

    def role_of(self, name):
        return "vector" if name.endswith("decay") else None
