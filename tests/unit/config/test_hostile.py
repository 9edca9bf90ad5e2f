"""Invalid settings are refused when they are read, with their key; accepted settings work."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from stacklm import cli
from stacklm.config.params import load, parse, preview, set_values
from stacklm.config.schema import ParamsError, plain
from support import ROOT
from support.checkout import TINY_PARAMS
from support.settings import changed, refusal

TREE = plain(parse(YAML(typ="safe", pure=True).load(TINY_PARAMS)))
"""Every setting, defaults filled in."""
DENSE = TREE["models"]["dense"]


def scalars(tree: object, kind: type, key: str = "") -> list[str]:
    """The keys of all values of that type in nested mappings and lists."""
    if not isinstance(tree, (dict, list)):
        return [key] if type(tree) is kind else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [found for name, item in items for found in scalars(item, kind, f"{key}.{name}".lstrip("."))]


def shown(key: str) -> str:
    """As messages write it: places in lists in brackets."""
    return re.sub(r"\.(\d+)", r"[\1]", key)


@pytest.mark.parametrize(
    "value",
    [float("inf"), -float("inf"), float("nan"), 1e39, 1e-310, 1e-40, 10**400, -(10**400), True, "1", "1e3", [1.0], {}, -1.0],
    ids=lambda value: repr(value)[:12],
)
def test_no_float_is_infinite_or_lost_in_float32(value):
    keys = [key for key in scalars(TREE, float) if not (value == -1.0 and key.endswith("beta2_decay"))]
    assert len(keys) > 15
    for key in keys:
        message = refusal(changed(TREE, key, value))
        assert key in message and len(message) < 400


@pytest.mark.parametrize(
    "value",
    [2**63, 2**64, 10**400, 2**20_000, -1, -(2**63), 1e3, 1.5, float("inf"), True, "3", "\u0661", [3], {"a": 3}],
    ids=lambda value: (
        ascii(value)[:12] if not isinstance(value, int) or value.bit_length() < 2000 else f"bits {value.bit_length()}"
    ),
)
def test_no_whole_number_is_beyond_64_bits_or_of_another_type(value):
    keys = scalars(TREE, int)
    assert len(keys) > 25
    for key in keys:
        message = refusal(changed(TREE, key, value))
        assert shown(key) in message and len(message) < 400


def test_a_float_for_a_whole_number_is_told_how_to_write_it():
    message = refusal(changed(TREE, "train.max_steps", 1e3))
    assert "train.max_steps: expected a whole number, got 1000.0 (float); write 1000" in message


def test_minus_zero_is_zero():
    tree = changed(TREE, "evaluate.sample.temperature", -0.0)
    assert repr(parse(tree).evaluate.sample.temperature) == "0.0"


@pytest.mark.parametrize("value", ["a\0b", "\ud800", 7, None, True, ["a"], {"a": "b"}], ids=ascii)
def test_no_text_is_of_another_type_or_cannot_be_written(value):
    for key in scalars(TREE, str):
        optional = value is None and key == "data.source.kind"
        message = refusal(changed(TREE, key, value))
        assert optional or shown(key) in message


@pytest.mark.parametrize("kind", [["dense"], {}, {"a": 1}, None, True, 7, float("nan")], ids=repr)
def test_a_kind_is_one_of_the_known_ones(kind):
    for key in (
        "data.source.kind",
        "models.dense.architecture.kind",
        "models.dense.optimizer.kind",
        "models.stacked.architecture.attention.kind",
    ):
        assert key in refusal(changed(TREE, key, kind))


@pytest.mark.parametrize("section", ["data", "tokenizer", "train", "models", "evaluate"])
def test_every_section_that_the_stages_read_is_there(section):
    without = {name: value for name, value in TREE.items() if name != section}
    message = refusal(without)
    assert f"{section}: missing" in message
    assert ("write {} for its defaults" in message) == (section == "evaluate")
    for value in (None, [], "x", 3):
        assert f"{section}: expected a mapping" in refusal({**TREE, section: value})
    parse({**TREE, "evaluate": {}})


BAD_NAMES = """
7 7up null Null ~ true TRUE false yes No on OFF y n nan .nan .inf inf 1e3 0x10 1_000 2024-01-01
-x _x .x x.y a/b a\\b con CON Nul aux prn com1 LPT9 a:b a@b ${x}
"""


@pytest.mark.parametrize(
    "name",
    [*BAD_NAMES.split(), "", " ", "a b", "a\n", "caf\xe9", "x" * 65, "x" * 230, "x" * 10_000],
    ids=lambda name: ascii(name[:20]),
)
def test_a_name_of_a_model_is_the_same_to_yaml_files_and_stages(name, tmp_path):
    message = refusal({**TREE, "models": {name: DENSE}})
    assert f"models.{name[:60]}" in message and len(message) < 400


@pytest.mark.parametrize("name", ["7", "null", "~", "1e3", "2024-01-01", "true", "0x10", ".inf", "[1]"])
def test_a_name_of_a_model_that_yaml_does_not_read_as_a_text_is_refused(name, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(TINY_PARAMS.replace("  dense:", f"  {name}:"))
    with pytest.raises(ParamsError, match="models"):
        load(file)


def test_names_that_differ_by_case_are_refused_and_long_ones_fit_into_file_names(tmp_path):
    assert "equals dense but for case" in refusal({**TREE, "models": {"dense": DENSE, "Dense": DENSE}})
    name = "x" * 64
    parse({**TREE, "models": {name: DENSE, "none": DENSE, "A1-_": DENSE}})
    (tmp_path / f".pretrain@{name}-{'0' * 64}.checkpoint.safetensors.{2**32}.tmp").touch()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("models.dense.optimizer.eps", 1e-30, ">= 1e-20"),
        ("models.dense.optimizer.peak_lr", 1e6, "<= 100"),
        ("models.dense.optimizer.weight_decay", 1e4, "change their sign"),
        ("models.dense.architecture.n_layers", 10**6, "<= 1024"),
        ("models.stacked.architecture.tokens_per_extra_stack", 1, "4096 stacks in series at train.context_length 4096, above 1024"),
        ("models.stacked.architecture.stacks.0.layers", 2**60, "<= 65536"),
        ("train.context_length", 2**40, "<= "),
        ("train.max_steps", 2**62, "<= 1000000000"),
        ("train.global_batch_size", 2**40, "<= "),
        ("tokenizer.vocab_size", 2**31, "<= "),
        ("tokenizer.special_tokens", ["<|endoftext|>", ""], "empty"),
        ("data.source", {"kind": "files", "paths": [""]}, "empty"),
    ],
)
def test_sizes_and_rates_that_no_run_can_have_are_refused(key, value, words):
    message = refusal(changed(changed(TREE, "train.context_length", 4096), key, value))
    assert words in message and key.split(".")[2 if key.startswith("models") else 1] in message


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
FILES = {
    "empty": b"",
    "comments only": b"# nothing\n",
    "a list": b"- a\n",
    "a text": b"text",
    "a tab": TINY_PARAMS.replace("  max_steps", "\tmax_steps").encode(),
    "a duplicate key": TINY_PARAMS.replace("  max_steps: 12", "  max_steps: 12\n  max_steps: 13").encode(),
    "a duplicate section": TINY_PARAMS.encode() + b"evaluate: {}\n",
    "not UTF-8": TINY_PARAMS.encode() + "# caf\xe9\n".encode("latin-1"),
    "UTF-16": TINY_PARAMS.encode("utf-16"),
    "NUL": TINY_PARAMS.encode() + b"\0",
    "a nesting of 500": TINY_PARAMS.encode() + b"x: " + b"[" * 500 + b"]" * 500,
    "a nesting of 50,000": TINY_PARAMS.encode() + b"x: " + b"{a: " * 50_000,
    "a bomb of aliases": BOMB.encode(),
    "a list that holds itself": b"data: &a [*a]",
    "a merge key": b"data: &a {}\ntrain: {<<: *a}",
    "a tag": TINY_PARAMS.encode() + b"x: !!python/object/apply:os.system [exit]",
    "several documents": TINY_PARAMS.encode() + b"---\na: 1\n",
    "a directive": b"%YAML 1.1\n---\n" + TINY_PARAMS.encode(),
    "a number of 5,000 digits": TINY_PARAMS.replace("max_steps: 12", "max_steps: " + "9" * 5000).encode(),
    "a key of 5,000 digits": TINY_PARAMS.encode() + b"0x" + b"f" * 5000 + b": 1\n",
    "a date that is none": TINY_PARAMS.replace("max_steps: 12", "max_steps: 2024-13-45").encode(),
    "a list as a key": TINY_PARAMS.encode() + b"? [a]\n: 1\n",
    "2 MB": TINY_PARAMS.encode() + b"#" * 2_000_000,
    "a folder": None,
    "absent": None,
    "unreadable": TINY_PARAMS.encode(),
    "a loop of links": None,
}


@pytest.mark.parametrize("what", FILES)
def test_a_broken_file_has_the_same_message_with_and_without_assignments(what, tmp_path):
    file = tmp_path / "params.yaml"
    if what == "a folder":
        file.mkdir()
    elif what == "a loop of links":
        file.symlink_to(file)
    elif what != "absent":
        file.write_bytes(FILES[what])
    if what == "unreadable":
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("this user may read every file")
    said = []
    for attempt in (lambda: load(file), lambda: preview(file, ["train.max_steps=13"]), lambda: preview(file, [])):
        with pytest.raises(ParamsError) as caught:
            attempt()
        said.append(str(caught.value))
    assert said[0] == said[1] == said[2]
    assert "params.yaml" in said[0] and len(said[0]) < 1000


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("train.max_steps", "key=value"),
        ("=3", "key=value"),
        ("train..max_steps=3", "key=value"),
        ("train.max_steps.=3", "key=value"),
        ("train.max_steps.x=3", "`train.max_steps` is 12, which has no keys"),
        ("train=3", "train: expected a mapping"),
        ("train.max_steps=", "train.max_steps: expected a whole number, got None"),
        ("train.max_steps=\t", "not valid YAML"),
        ("train.max_steps=!!int 3", "tags"),
        ("train.max_steps=*a", "aliases"),
        ("train.max_steps=" + "[" * 3000, "nested more than"),
        ("train.max_steps=" + "9" * 5000, "not valid YAML"),
        ("train.max_steps=\0", "not valid YAML"),
        ("evaluate.sample.prompt=\udcff", "evaluate.sample.prompt"),
        ("train.\udcff=3", "train"),
        ("models.stacked.architecture.stacks.x.d_ff=3", "`x` is not an index of a list of 1"),
        ("models.stacked.architecture.stacks.-1.d_ff=3", "`-1` is not an index"),
        ("models.stacked.architecture.stacks.²=3", "`²` is not an index"),
        ("models.7.architecture.kind=dense", "models.7"),
        ("evaluat.batch_size=3", "did you mean `evaluate`?"),
        ("train.stepz=3", "did you mean `max_steps`?"),
        ("train.max_steps=0", ">= 1"),
        ("train.max_steps=[1", "not valid YAML"),
        ("models.stacked.architecture.stacks.9.d_ff=3", "not an index"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_an_assignment_that_cannot_be_made_says_why_and_changes_nothing(assignment, words, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(TINY_PARAMS)
    with pytest.raises(ParamsError) as caught:
        set_values(file, ["train.eval_every=7", assignment])
    assert words in str(caught.value)
    assert file.read_text() == TINY_PARAMS


COMMANDS = ["params", "status", "plan", "audit", "variants", "generate def", "report", "ui", "sync", "dvc-yaml"]
COMMANDS += ["run-flow pretrain", "stage inputs", "plan --set train.max_steps=13", "run-flow pretrain --set train.max_steps=13"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_settings_that_cannot_work_at_once(command, tmp_path, monkeypatch, capsys):
    """The last section is the one that was read latest: it stopped the pipeline only after training."""
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    file = tmp_path / "params.yaml"
    file.write_text(TINY_PARAMS.replace("tokens: 8", "tokens: 8, temperature: 1e-310"))
    before = file.read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stacklm", *command.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "params.yaml: evaluate.sample.temperature: 1e-310 is not allowed" in said and "Traceback" not in said
    assert file.read_bytes() == before
    assert not (tmp_path / ".stacklm").exists() or command == "stage inputs"


def test_training_alone_refuses_them_as_well(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(TINY_PARAMS[: TINY_PARAMS.index("evaluate:")])
    command = [sys.executable, "-m", "stacklm.train", "--params", str(file), "--model", "dense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "params.yaml: evaluate: missing; write {} for its defaults" in done.stderr
    assert "Traceback" not in done.stderr
