"""An exported model has the same logits, text and loss in transformers, even if stacklm is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from stacklm.config.evaluate import Evaluate, Sample
from stacklm.config.model import Architecture, Dense, HuggingFace
from stacklm.config.schema import ParamsError
from stacklm.data.tokenizer import Tokenizer
from stacklm.evaluate.generate import continue_text
from stacklm.model.build import build
from stacklm.model.store import load_model, save_model
from stacklm.pipeline.project import Project
from support.custom_models import LLAMA, MODELS
from support.model_variants import TINY, VARIANTS, scattered
from support.tracking_project import VOCAB, prepare_data

transformers = pytest.importorskip("transformers")
CONTEXT = 32
ARCHITECTURES: dict[str, Architecture] = {
    "published": TINY,
    "modern": VARIANTS["modern"],  # factored attention, rotary positions, convolution, tied embeddings, skip connections
    "modern-shared": VARIANTS["modern-shared"],  # one set of keys and values per stack, dense skip connections
    "dynamic-skip": VARIANTS["dynamic-skip"],
    "dense": Dense(d_model=16, n_heads=2, n_layers=2, d_ff=24, conv_size=4),
}
every = pytest.mark.parametrize("name", ARCHITECTURES)
HARD = [
    "",
    "def f(x):\n\treturn x\r\n",
    "  two  spaces ",
    "naïve — 日本語 🙂‍↔️ e\u0301",
    "<|endoftext|> is text",
    "\x00\x7f\u2028",
    "x" * 3000 + " " * 40,
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tokenizer, models as trained, and folders `hf/NAME` of them; what transformers keeps of their code is below it."""
    from stacklm.export.hf import export_hf

    root = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        prepare_data(Project(root, root / ".stacklm"))
        for name, architecture in ARCHITECTURES.items():
            save(root, name, architecture)
            export_hf(root / "hf" / name, root / name, root / "out/tokenizer", "# A card\n")
        yield root


def save(root: Path, name: str, architecture: Architecture) -> None:
    torch.manual_seed(0)
    model = scattered(build(architecture, VOCAB, CONTEXT), 0.1)
    save_model(root / name, model, architecture, VOCAB, CONTEXT, Tokenizer.load(root / "out/tokenizer").digest)


def load(folder: Path, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


def tokenizer_of(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def some_ids(length: int = 12) -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@every
def test_logits_and_the_loss_are_those_of_the_model(root: Path, name: str):
    ours, theirs, ids_BT = load_model(root / name)[0].eval(), load(root / "hf" / name).eval(), some_ids()
    labels_BT = ids_BT.clone()
    labels_BT[0, :5] = -100
    found = theirs(ids_BT, labels=labels_BT)
    torch.testing.assert_close(found.logits, ours(ids_BT), rtol=0, atol=1e-5)
    wanted = F.cross_entropy(ours(ids_BT)[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, wanted, rtol=0, atol=1e-5)
    trained = {key for key, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in theirs.named_parameters() if parameter.requires_grad} == trained


@every
def test_generating_with_the_cache_without_it_and_by_beams_gives_the_same(root: Path, name: str):
    model, ids_BT = load(root / "hf" / name), some_ids()
    for way in ({}, {"num_beams": 3}):
        cached, plain = (
            model.generate(ids_BT, max_new_tokens=16, do_sample=False, eos_token_id=None, use_cache=use, **way)
            for use in (True, False)
        )
        assert cached.shape == (2, 28) and torch.equal(cached, plain)


@every
def test_text_goes_on_as_by_stacklm_generate(root: Path, name: str):
    config = Evaluate(sample=Sample(max_new_tokens=12, temperature=0), device="cpu", threads=torch.get_num_threads())
    wanted = "".join(continue_text(config, root / name, root / "out/tokenizer", "def ", "kv"))
    words, model = tokenizer_of(root / "hf" / name), load(root / "hf" / name)
    ids_BT = words("def ", return_tensors="pt")["input_ids"]
    (found,) = words.batch_decode(model.generate(ids_BT, max_new_tokens=12, do_sample=False), skip_special_tokens=True)
    assert found == "def " + wanted


def test_the_tokenizer_has_the_same_ids_behind_an_end_token_and_loses_nothing(root: Path):
    ours, theirs = Tokenizer.load(root / "out/tokenizer"), tokenizer_of(root / "hf/dense")
    for text in HARD:
        ids = theirs(text)["input_ids"]
        assert ids == [ours.end_id, *ours.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (ours.end_id, ours.end_id, CONTEXT)


@pytest.mark.parametrize("name", ["modern", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(root: Path, name: str, side: str):
    model, words = load(root / "hf" / name).eval(), tokenizer_of(root / "hf" / name)
    texts, settings = ["def ", "import os\n"], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = words(texts, padding=True, padding_side=side, return_tensors="pt")
    logits_BTV = model(**batch).logits
    for row, mask_T, ids_T in zip(logits_BTV, batch["attention_mask"].bool(), batch["input_ids"], strict=True):
        torch.testing.assert_close(row[mask_T], model(ids_T[mask_T][None]).logits[0], rtol=0, atol=1e-5)
    if side == "left":
        alone = [model.generate(words(text, return_tensors="pt")["input_ids"], **settings)[0, -8:] for text in texts]
        assert torch.equal(model.generate(**batch, **settings)[:, -8:], torch.stack(alone))


def test_what_would_be_ignored_is_refused(root: Path):
    model, ids_BT = load(root / "hf/dense").eval(), some_ids()
    holes = torch.ones_like(ids_BT).index_fill(1, torch.tensor(4), 0)
    for arguments in (
        {"attention_mask": holes},
        {"attention_mask": holes, "use_cache": True},
        {"position_ids": torch.arange(12)[None]},
        {"output_hidden_states": True},
    ):
        with pytest.raises(ValueError, match=r"attention_mask|padding|takes no"):
            model(ids_BT, **arguments)
    with pytest.raises(ValueError, match="context of 32"):
        model.generate(ids_BT, max_new_tokens=CONTEXT, eos_token_id=None)


def test_generation_resumes_from_a_cache_and_one_of_another_kind_is_refused(root: Path):
    model, ids_BT = load(root / "hf/modern").eval(), some_ids()
    first = model(ids_BT, use_cache=True)
    step = model(some_ids(3), cache=first.cache, use_cache=True)
    torch.testing.assert_close(step.logits, model(torch.cat([ids_BT, some_ids(3)], 1)).logits[:, -3:], rtol=0, atol=1e-5)
    other = transformers.DynamicCache()
    other.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids_BT, cache=other)


def test_tied_embeddings_stay_tied_and_are_saved_once(root: Path):
    names = load_file(root / "hf/modern/model.safetensors").keys()
    assert names == load_file(root / "modern/model.safetensors").keys() and "head.weight" not in names
    model = load(root / "hf/modern")
    assert model.head.weight is model.embedding.weight


def trained(folder: Path, output: Path, checkpointing: bool):
    """Two steps of the Trainer."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    words = tokenizer_of(folder)
    rows = [{"input_ids": words(text)["input_ids"]} for text in ("def f():\n", "import os\n", "x = 1\n", "class A:\n")]
    settings = TrainingArguments(
        str(output), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        activation_checkpointing=checkpointing, disable_tqdm=True, save_strategy="no", logging_steps=1, seed=1,
    )  # fmt: skip
    trainer = Trainer(load(folder), settings, DataCollatorForLanguageModeling(words, mlm=False), rows, processing_class=words)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["published", "dense"])
def test_the_trainer_trains_it_and_what_it_saves_loads(root: Path, tmp_path: Path, name: str):
    pytest.importorskip("accelerate")
    plain, again = (trained(root / "hf" / name, tmp_path / "out", checkpointing) for checkpointing in (False, True))
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 2
    plain.save_model(tmp_path / "saved")
    before, after = plain.model.eval(), load(tmp_path / "saved").eval()
    assert not torch.allclose(after.embedding.weight, load(root / "hf" / name).embedding.weight)
    torch.testing.assert_close(after(some_ids()).logits, before(some_ids()).logits)
    assert tokenizer_of(tmp_path / "saved")("def ")["input_ids"] == tokenizer_of(root / "hf" / name)("def ")["input_ids"]


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("model.safetensors", b"embedding.weight", b"embeddinG.weight"),
        ("config.json", b'"n_heads": 2', b'"n_heads": 4'),  # which fits the same weights
        ("model_dense.py", b"is_causal=True", b"is_causal=False"),
    ],
)
def test_a_folder_that_was_changed_does_not_load(root: Path, tmp_path: Path, file: str, before: bytes, after: bytes):
    shutil.copytree(root / "hf/dense", tmp_path / "hf")
    whole = (tmp_path / "hf" / file).read_bytes()
    assert before in whole
    (tmp_path / "hf" / file).write_bytes(whole.replace(before, after))
    with pytest.raises(ValueError, match=f"{file}: not what SHA256SUMS lists"):
        load(tmp_path / "hf")


def test_weights_that_do_not_fit_do_not_load(root: Path, tmp_path: Path):
    shutil.copytree(root / "hf/dense", tmp_path / "hf")
    (tmp_path / "hf/SHA256SUMS").unlink()
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["other"] = tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight"):
        load(tmp_path / "hf")


def test_an_architecture_of_transformers_is_exported_as_itself(root: Path, tmp_path: Path):
    from stacklm.export.hf import export_hf

    save(root, "llama", HuggingFace("LlamaConfig", settings=LLAMA))
    export_hf(tmp_path / "hf", root / "llama", root / "out/tokenizer", "# A card\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(some_ids()).logits, load_model(root / "llama")[0].eval()(some_ids()), rtol=0, atol=1e-5)
    assert theirs.config.eos_token_id == 0 and not list((tmp_path / "hf").glob("*.py"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_dense_model_is_a_qwen3_which_any_attention_serves(root: Path, tmp_path: Path, tied: bool):
    """vLLM, among others, puts its own attention in the place of transformers' own, by this table."""
    from stacklm.export.hf import export_hf

    name = f"plain-{tied}"
    save(root, name, Dense(d_model=16, n_heads=2, n_layers=3, d_ff=24, ffn="swiglu", tie_embeddings=tied))
    export_hf(tmp_path / "hf", root / name, root / "out/tokenizer", "# A card\n")
    assert not list((tmp_path / "hf").glob("*.py"))
    seen = []

    def attention(module, query, key, value, mask, **settings):
        seen.append((module.layer_idx, settings["scaling"]))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=settings["scaling"])
        return found.transpose(1, 2), None

    transformers.AttentionInterface.register("ours", attention)
    ours, ids_BT = load_model(root / name)[0].eval(), some_ids(CONTEXT)
    for way in ("eager", "sdpa", "ours"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation=way).eval()
        torch.testing.assert_close(theirs(ids_BT).logits, ours(ids_BT), rtol=0, atol=1e-5)
    assert type(theirs).__name__ == "Qwen3ForCausalLM" and seen == [(n, 8**-0.5) for n in range(3)]
    assert tokenizer_of(tmp_path / "hf")("def ")["input_ids"][0] == theirs.generation_config.eos_token_id == 0


def test_code_of_the_user_and_folders_in_use_are_refused(root: Path, tmp_path: Path):
    from stacklm.export.hf import export_hf

    save(root, "gpt", MODELS["gpt"])
    with pytest.raises(ParamsError, match=r"your own code.*gpt\.py"):
        export_hf(tmp_path / "hf", root / "gpt", root / "out/tokenizer", "")
    with pytest.raises(ParamsError, match="not empty"):
        export_hf(root / "hf/dense", root / "dense", root / "out/tokenizer", "")


ALONE = """
import json, sys
sys.modules["stacklm"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
names, ids = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
for name in names:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    text = AutoTokenizer.from_pretrained(name, trust_remote_code=True)("def ")["input_ids"]
    found = [model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=use).tolist() for use in (0, 1)]
    print(json.dumps([model(ids).logits.tolist(), *found, text]))
"""


def test_folders_load_side_by_side_where_stacklm_is_not_installed(root: Path, tmp_path: Path):
    ids_BT, folders = some_ids(), [str(root / "hf" / name) for name in ARCHITECTURES]
    command = [sys.executable, "-I", "-c", ALONE, json.dumps(folders), json.dumps(ids_BT.tolist())]
    done = subprocess.run(
        command, env={**os.environ, "HF_HOME": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for name, line in zip(ARCHITECTURES, done.stdout.splitlines(), strict=True):
        logits, plain, cached, text = json.loads(line)
        ours = load_model(root / name)[0].eval()
        torch.testing.assert_close(torch.tensor(logits), ours(ids_BT).detach(), rtol=0, atol=1e-5)
        assert plain == cached and text[0] == 0
        rows_BT = torch.tensor(plain)
        torch.testing.assert_close(ours(rows_BT[:, :-1])[:, -8:].argmax(-1), rows_BT[:, -8:])
