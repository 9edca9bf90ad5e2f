"""The audit of models from a file: sound ones of any kind pass, and faults of others are named."""

from __future__ import annotations

import json

import pytest

from stacklm.audit.audit import audit_target, certify
from stacklm.config.model import HuggingFace
from stacklm.config.schema import ParamsError
from stacklm.model.build import ModelConfig
from support.audit_faults import CONTEXT, TRAIN, VOCAB
from support.custom_models import FOLDER, LLAMA, MODELS, every_model, needs_transformers, written


@every_model
def test_sound_models_are_certified(name):
    found = certify(ModelConfig(MODELS[name], VOCAB, CONTEXT), TRAIN)
    assert found.faults == []
    checks = {check.name: check.finding for check in found.checks}
    assert checks["rebuilt"] == f"2 sequences of {CONTEXT} tokens"
    assert ("forward" in checks) == (name == "lstm")
    assert checks["cached"].startswith("all tokens read again" if name == "gpt" else "its own cache")
    assert checks["gradients"] == "45 of 45 earlier inputs reached, no later one"


def test_dropout_of_any_kind_does_not_hide_or_feign_a_leak(tmp_path):
    drops = "F.dropout(x, 0.3, self.training)"
    sound = written(tmp_path, ("x.cumsum(1)", f"{drops}.cumsum(1)"))
    found = certify(ModelConfig(sound, VOCAB, CONTEXT), TRAIN)
    assert found.faults == []
    assert {check.name: check.finding for check in found.checks}["modes"].startswith("training draws, as for dropout")
    leaks = written(tmp_path, ("x.cumsum(1)", f"{drops}.cumsum(1) + (x.mean(1, True) if self.training else 0)"), name="leaks.py")
    assert "pairs of briefly trained weights: no mask" in certify(ModelConfig(leaks, VOCAB, CONTEXT), TRAIN).faults[0]


INIT = "super().__init__()\n"
KEEPS = "        y = x.cumsum(1) + getattr(self, 'last', 0)\n        self.last = 0.1 * x[-1, -1].detach()\n        return y"
LOOK = "class Look(nn.Module):\n    def forward(self, x):\n        return x + x.roll(-1, 1)\n\n\n"
WEIGHTS = "of briefly trained weights"
ENTRY = "in both modes; the first module to let them in is"
FAULTS = {
    "not causal": (
        [("x.cumsum(1)", "F.scaled_dot_product_attention(x, x, x)")],
        f"pairs {WEIGHTS}: no mask, or a normalisation over time: every position sees all later tokens; {ENTRY} Mine",
    ),
    "in a module": (
        [("class Mine", f"{LOOK}class Mine"), (INIT, f"{INIT}        self.look = Look()\n"), ("x.cumsum", "self.look(x).cumsum")],
        f"pairs {WEIGHTS}: off by 1: positions see 1 tokens ahead, as with a wrongly padded convolution or too wide a mask; "
        f"{ENTRY} `look` (Look)",
    ),
    "gradients between batches": (
        [("        return x.cumsum(1)", KEEPS.replace(".detach()", ""))],
        f"steps {WEIGHTS}: state between batches: gradients of one batch lead back into the batch before",
    ),
    "state between batches": ([("        return x.cumsum(1)", KEEPS)], f"repeats {WEIGHTS}: state between calls: "),
    "rows mix": ([("x.cumsum(1)", "x.cumsum(1) + x.mean(0)")], f"rows {WEIGHTS}: batch rows mix: "),
    "drawn and not kept": (
        [(INIT, f"{INIT}        self.noise = torch.randn(width)\n"), ("x.cumsum(1)", "x.cumsum(1) * self.noise")],
        f"rebuilt {WEIGHTS}: holds more than its parameters and buffers: ",
    ),
    "two answers": (
        [("    def mix", "    def features(self, ids):\n        return self.embed(ids)\n\n    def mix")],
        f"forward {WEIGHTS}: two answers: ",
    ),
    "a cache that is wrong": (
        [("    def mix", "    def decode(self, ids, cache=None):\n        return self(ids), cache\n\n    def mix")],
        f"cached {WEIGHTS}: cached decoding differs: with its own cache, ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_told(tmp_path, fault):
    changes, told = FAULTS[fault]
    faults = certify(ModelConfig(written(tmp_path, *changes), VOCAB, CONTEXT), TRAIN).faults
    assert any(one.startswith(told) for one in faults), faults


def test_a_model_without_a_lookup_of_tokens_is_audited_but_for_gradients(tmp_path):
    product = written(tmp_path, ("self.embed(ids)", "F.one_hot(ids, len(self.embed.weight)).float() @ self.embed.weight"))
    found = certify(ModelConfig(product, VOCAB, CONTEXT), TRAIN)
    assert found.faults == []
    assert {check.name: check.finding for check in found.checks}["gradients"].startswith("not to be told")


def test_files_are_named_on_the_command_line_with_or_without_their_class(tmp_path):
    found, name = audit_target(f"{FOLDER}/gpt.py", VOCAB, CONTEXT, ["d_model=16", "n_layers=1"])
    assert (found.passed, name) == (True, "gpt")
    assert found.subject["architecture"]["class"] == "GPT"
    assert found.subject["architecture"]["settings"] == {"d_model": 16, "n_layers": 1}
    with pytest.raises(ParamsError, match=r"has no Gatd; its models are .*Gated"):
        audit_target(f"{FOLDER}/linear_attention.py:Gatd", VOCAB, CONTEXT, [])
    with pytest.raises(ParamsError, match=r"layers\.py: has several models, Scale, GatedUnit; name one, as layers\.py:GatedUnit"):
        audit_target(f"{FOLDER}/layers.py", VOCAB, CONTEXT, [])


@needs_transformers
def test_a_model_of_the_hub_is_audited_with_its_weights_and_none_of_its_code(tmp_path):
    import transformers

    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 40}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}, **sizes))
    model.save_pretrained(tmp_path / "tiny")
    found, name = audit_target(f"hf:{tmp_path / 'tiny'}", 512, CONTEXT, [])
    assert (found.faults, name) == ([], "tiny")
    assert (found.subject["vocab_size"], found.subject["context_length"]) == (VOCAB, CONTEXT)
    code = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.C"}
    (tmp_path / "tiny/config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (tmp_path / "tiny/own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ParamsError, match="trust_remote_code"):
        audit_target(f"hf:{tmp_path / 'tiny'}", 512, CONTEXT, [])


@needs_transformers
def test_any_architecture_of_transformers_may_be_named():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    assert certify(ModelConfig(HuggingFace("MambaConfig", settings=tiny), VOCAB, CONTEXT), TRAIN).faults == []
