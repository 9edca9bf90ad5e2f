"""The contents of the documentation are valid: commands parse, settings load, links have a target."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stacklm import __version__
from stacklm.cli import variants
from stacklm.config.params import preview
from support import ROOT
from support.command_line import commands as all_commands
from support.command_line import parse
from support.prose import anchors, blocks, commands, links, pages

PAGES = [  # the changelog names commands that are no more
    pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in pages() if path.name != "CHANGELOG.md"
]

MENTIONED = {name for name, _ in all_commands() if " " in name}
"""Such as `lab plan`, which a sentence may name without an argument."""


def arguments(line: str) -> list[str]:
    """A command's words without redirections."""
    words = shlex.split(line.partition(" <")[0].partition(" | ")[0].partition(" > ")[0])
    return [word for word in words[1:] if word != "&"]


def test_the_readme_is_among_the_pages_and_its_commands_are_found():
    assert ROOT / "README.md" in pages()
    assert {"make repro", 'stacklm generate "def " --model stacked'} <= set(commands((ROOT / "README.md").read_text()))


@pytest.mark.parametrize("path", PAGES)
def test_stacklm_commands_are_accepted_by_the_parser(path: Path):
    for line in commands(path.read_text()):
        if line.startswith("stacklm ") and " ".join(words := arguments(line)) not in MENTIONED:
            parse(words)


@pytest.mark.parametrize("path", PAGES)
def test_make_targets_and_scripts_are_there(path: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(path.read_text()):
        words = line.split()
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        script = next((word for word in words if word.startswith(("benchmarks/", "examples/"))), None)
        if words[0] == "python" and script:
            source = (ROOT / script).read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], line


@pytest.mark.parametrize("path", PAGES)
def test_settings_are_accepted(path: Path, tmp_path: Path):
    for block in blocks(path.read_text(), "yaml"):
        shown = YAML(typ="safe").load(block)
        if isinstance(shown, dict) and shown.keys() <= {"data", "tokenizer", "train", "models", "evaluate"}:
            params = YAML(typ="safe").load(ROOT / "params.yaml")
            for section, values in shown.items():
                params[section] = {**params[section], **values}
            with (tmp_path / "params.yaml").open("w") as file:
                YAML().dump(params, file)
            preview(tmp_path / "params.yaml", [])


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_to_files_and_headings(path: Path):
    for target, anchor in links(path.read_text()):
        file = path if not target else path.parent / target
        assert file.exists(), f"{target} in {path.name}"
        assert not anchor or anchor in anchors(file.read_text()), f"{target}#{anchor} in {path.name}"


@pytest.mark.parametrize("path", PAGES)
def test_files_and_modules_that_are_named_exist(path: Path):
    text = path.read_text()
    files = re.findall(r"`((?:stacklm|flows|tests|benchmarks|docs|examples)/[\w./-]+)`", text)
    files += [name.replace(".", "/") for name in re.findall(r"`(stacklm(?:\.\w+)+)`", text)]
    for name in files:
        found = ROOT / name
        assert found.exists() or found.with_suffix(".py").exists() or found.parent.with_suffix(".py").exists(), name


def test_the_readme_shows_the_measured_result():
    measured = (ROOT / "docs/measurements/default.md").read_text()
    shown = re.search(r"<!-- measured -->\n\n(.*?)\n\n!", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None and shown[1] in measured


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    paths = [path for folder in ("stacklm", "flows") for path in (ROOT / folder).rglob("*.py")]
    source = re.sub(r'"\s*f?"', "", "".join(path.read_text() for path in paths))  # strings over several lines are one
    text = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| (?:`` (.*?) ``|`(.*?)`) \|", text, re.MULTILINE)
    assert len(messages) > 20
    for message in map("".join, messages):
        for part in message.split("…"):
            assert part.strip() in source, message


def test_the_counted_variants_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    shown = blocks((ROOT / "docs/measurements/variants.md").read_text(), "text")[0]
    variants(preset="seed-2x64", axis="flops")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


def test_the_citation_is_of_this_version():
    cited = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == __version__
