"""A model from a user's file: its counts and structure, and the errors for one that cannot be used."""

from __future__ import annotations

import pytest
import torch

from stacklm.config.model import Dense, HuggingFace, Python
from stacklm.config.schema import ParamsError
from stacklm.model.build import build
from stacklm.model.cache import Decoder
from stacklm.model.count import count, roles
from support.custom_models import MODELS, every_model, needs_transformers, written

V, T = 50, 24
LAYER = 2 * (4 * 32 * 32 + 2 * 32 * 64)
GATED = 4 * 32 * 32 // 4 + 3 * 16 * 32
"""Weights of a layer of linear attention, of width 16, with its gated unit."""
LLAMA = 3 * 32 * 32 + 3 * 32 * 64
"""Half as many heads of keys and values as of queries."""
ATTENTION, HEAD = 4 * 32 * (T + 1) // 2, 2 * 32 * V
COUNTED = {
    "gpt": (2 * (LAYER + ATTENTION) + HEAD, {"embedding": 32 * (V + T), "matrix": LAYER, "vector": 2 * (4 * 32 + 6 * 32) + 128}),
    "lstm": (2 * 2 * 8 * 32 * 32 + HEAD, {"matrix": 2 * 8 * 32 * 32, "vector": 2 * 8 * 32 + V, "head": 32 * V}),
    "linear-attention": (2 * (2 * GATED + 2 * 2 * 8 * 8) + 2 * 16 * V, {"matrix": 2 * GATED, "head": 16 * V, "embedding": 16 * V}),
    "llama": (2 * (2 * LLAMA + ATTENTION) + HEAD, {"matrix": 2 * LLAMA, "vector": 5 * 32, "head": 32 * V}),
}


@every_model
def test_operations_and_roles_are_those_counted_by_hand(name):
    counts = count(MODELS[name], V, T)
    forward, parameters = COUNTED[name]
    assert counts.forward_flops_per_token == forward
    assert parameters.items() <= counts.parameters.items()
    assert counts.total == sum(p.numel() for p in build(MODELS[name], V, T).parameters())


def test_a_plain_gpt_costs_what_the_dense_model_of_its_shape_does():
    dense = count(Dense(d_model=32, n_heads=2, n_layers=2, d_ff=64), V, T)
    assert count(MODELS["gpt"], V, T).forward_flops_per_token == dense.forward_flops_per_token


LAYERS = """self.layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.mask = nn.Transformer.generate_square_subsequent_mask(context_length)"""


def test_causal_attention_inside_of_torchs_own_layers_counts_half(tmp_path):
    layer = ("self.head =", f"{LAYERS}\n        self.head =")
    mine = written(
        tmp_path, layer, ("x.cumsum(1)", "self.layer(x, src_mask=self.mask[: x.shape[1], : x.shape[1]], is_causal=True)")
    )
    whole = written(tmp_path, layer, ("x.cumsum(1)", "self.layer(x)"), name="whole.py")
    assert count(mine, V, T).forward_flops_per_token == 2 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 16 * (T + 1) / 2 + 2 * 16 * V
    assert count(whole, V, T).forward_flops_per_token - count(mine, V, T).forward_flops_per_token == 4 * 16 * (T - 1) / 2


def test_a_model_that_reads_values_is_counted_by_running_it(tmp_path):
    mine = written(
        tmp_path,
        ("return x.cumsum(1)", "return self.rnn(x)[0] if x.mean().item() < 1e9 else x"),
        ("self.head =", "self.rnn = nn.LSTM(16, 16, batch_first=True)\n        self.head ="),
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert count(mine, V, T).forward_flops_per_token == 2 * 8 * 16 * 16 + 2 * 16 * V
    assert torch.equal(before, torch.get_rng_state())


def test_a_parameter_without_a_role_is_named_and_role_of_gives_it_one(tmp_path):
    mixing = (
        "self.head =",
        "self.gate = nn.ParameterDict({'a': torch.ones(width, width), 'b': torch.ones(width)})\n        self.head =",
    )
    with pytest.raises(ParamsError, match=r"Mine: no role is known for gate\.a \[16, 16\]; say it by a method role_of\(name\)"):
        count(written(tmp_path, mixing), V, T)
    method = ("    def mix", "    def role_of(self, name):\n        return 'matrix' if name == 'gate.a' else None\n\n    def mix")
    found = roles(build(written(tmp_path, mixing, method), V, T))
    assert (found["net.gate.a"], found["net.gate.b"], found["net.head.weight"]) == ("matrix", "vector", "head")
    with pytest.raises(
        ParamsError, match=r"Mine\.role_of: gave 'weight' for gate\.a; a role is one of embedding, matrix, vector, head"
    ):
        count(written(tmp_path, mixing, (method[0], method[1].replace("'matrix'", "'weight'"))), V, T)


LINE = r"mine\.py, line {}, in {}\n    {}.*\n{}"
FAULTS = {
    "missing": (("(self.mix", "(self.mux"), LINE.format(16, "forward", r"return self\.head\(self\.mux", "AttributeError: .*'mux'")),
    "deeper": (("x.cumsum(1)", "x @ x"), LINE.format(13, "mix", "return x @ x", "RuntimeError: .*size")),
    "last": (("self.embed(ids)))", "self.embed(ids)))[:, -1]"), r"gave \[2, 50\] for ids \[2, 24\], and not \[2, 24, 50\]"),
    "pair": (("self.embed(ids)))", "self.embed(ids))), None"), r"Mine\.forward: gave a tuple, and not a tensor \[2, 24, 50\]"),
    "whole": (("self.embed(ids)))", "self.embed(ids))).long()"), r"Mine\.forward: gave numbers of type torch\.int64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_of_a_forward_pass_are_shown_with_the_users_line(tmp_path, fault):
    change, message = FAULTS[fault]
    model = build(written(tmp_path, change), V, T)
    with pytest.raises(ParamsError, match=message):
        model(torch.zeros(2, T, dtype=torch.long))


NOTHING = ("width=16", "width=16")
MADE = r"made as Mine\(vocab_size=\.\.\., context_length=\.\.\.\), but it takes \(width, .*: missing"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (("vocab_size, context_length, width", "width, context_length, size"), {}, MADE),
        (NOTHING, {"widht": 8}, r"unexpected keyword argument 'widht' \(did you mean `width`\?\)"),
        (("torch\n", "torch\nimport nowhere\n"), {}, LINE.format(2, "<module>", "import nowhere", "ModuleNotFoundError")),
        (("super().__init__()", "super().__init__("), {}, r"mine\.py, line \d+: "),
        (NOTHING, {"width": -1}, LINE.format(9, "__init__", r"self\.embed = nn\.Embedding", "RuntimeError")),
        (("nn.Module", "object"), {}, r"class: Mine of .*mine\.py is no torch\.nn\.Module"),
        (("class Mine", "class Mina"), {}, r"class: .*mine\.py has no Mine; its models are Mina \(did you mean `Mina`\?\)"),
    ],
)
def test_a_file_or_class_that_cannot_be_used_is_refused_with_what_was_seen(tmp_path, change, settings, message):
    with pytest.raises(ParamsError, match=message):
        build(written(tmp_path, change, **settings), V, T)


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    written(tmp_path)
    with pytest.raises(ParamsError, match=r"no file .*mime\.py in .* \(did you mean `mine\.py`\?\)"):
        build(Python(str(tmp_path / "mime.py"), "Mine"), V, T)


def test_a_changed_file_is_executed_again_and_so_is_what_it_imports(tmp_path):
    (tmp_path / "parts.py").write_text("SIZE = 8\n")
    mine = written(tmp_path, ("import torch\n", "import torch\nfrom parts import SIZE\n"), ("width=16", "width=SIZE"))
    assert build(mine, V, T).net.embed.weight.shape == (V, 8)
    (tmp_path / "parts.py").write_text("SIZE = 12\n")
    assert build(mine, V, T).net.embed.weight.shape == (V, 12)


@every_model
def test_decoding_gives_the_logits_of_the_whole_sequence(name):
    torch.manual_seed(0)
    model = build(MODELS[name], V, T).eval()
    ids_BT = torch.randint(V, (2, T))
    decoder = Decoder(model, T)
    with torch.no_grad():
        for _ in range(2):
            decoder.reset()
            pieces = [decoder.head(decoder.features(piece)) for piece in ids_BT.split([5, 1, 3, T - 9], dim=1)]
            assert torch.allclose(torch.cat(pieces, dim=1), model(ids_BT), atol=1e-5)


@needs_transformers
def test_settings_of_transformers_that_make_no_model_are_refused():
    with pytest.raises(ParamsError, match=r"transformers has no configuration LamaConfig \(did you mean `.*LlamaConfig`\?\)"):
        build(HuggingFace("LamaConfig"), V, T)
    with pytest.raises(ParamsError, match=r"settings: no LlamaConfig can be made of them"):
        build(HuggingFace("LlamaConfig", settings={"hidden_size": 30, "num_attention_heads": 4}), V, T)
