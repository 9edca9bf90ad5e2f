"""Your own model in one file, with all optional methods: a gated recurrence, h_t = a_t h_{t-1} + (1 - a_t) v_t.

python examples/my_model.py counts and audits it; `stacklm try examples/my_model.py` compares it with a dense decoder.
"""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.norm, self.ffn_norm = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.gates, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.timescales = nn.Parameter(torch.linspace(0, 4, d_model)[None])  # [1, C]: two-dimensional, but a vector
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x, h=None):
        keep, value, gate = self.gates(self.norm(x)).chunk(3, dim=-1)
        keep = torch.sigmoid(keep + self.timescales)
        h, states = torch.zeros_like(x[:, 0]) if h is None else h, []
        for t in range(x.shape[1]):
            h = keep[:, t] * h + (1 - keep[:, t]) * value[:, t]
            states.append(h)
        x = x + self.out(torch.stack(states, dim=1) * torch.sigmoid(gate))
        return x + self.ffn(self.ffn_norm(x)), h


class MyModel(nn.Module):
    def __init__(self, vocab_size, context_length, d_model=64, n_layers=2, d_ff=128):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, d_ff) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, ids):
        return self.decode(ids)[0]

    def decode(self, ids, cache=None):  # optional: the logits of the next tokens, and the cache of all so far
        x, states = self.embedding(ids), []
        for layer, h in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x, h = layer(x, h)
            states.append(h)
        return self.head(x), states

    def role_of(self, name):  # optional: for parameters whose role is not clear from the module type
        return "vector" if name.endswith("timescales") else None


if __name__ == "__main__":
    from stacklm.audit.audit import audit_target
    from stacklm.config.model import Python
    from stacklm.model.count import count

    counts = count(Python(__file__, "MyModel"), vocab_size=64, context=32)
    print(*(f"{number:,} parameters in {role}" for role, number in counts.parameters.items()), sep="\n")
    print(f"{counts.forward_flops_per_token:,} FLOPs per token, forward")
    print(audit_target(__file__, vocab_size=64, context=32, settings=[])[0].table("MyModel"))
