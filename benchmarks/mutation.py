"""Mutation testing on a random sample: find code changes that no quick test detects.

    python benchmarks/mutation.py --sample 100 --minutes 30        (`make mutate`); run again to resume
    python benchmarks/mutation.py --again                          retry the survivors, after new tests

mutmut (https://mutmut.readthedocs.io) makes mutants of the code in `[tool.mutmut]` of pyproject.toml, each with one small change.
To find the tests that reach a function, mutmut would run all of them, and it does not see child processes. So here a mutant is
tried with the tests of its module, `tests/unit/PACKAGE/test_MODULE.py`, and if none of them fails, with the others of the package
that import the module. A survivor is a change that none of them detects: a missing test, or a change without effect. Slow tests
are left out, so a mutant that only they kill counts as a survivor.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from mutmut import __main__ as mutmut
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.utils.format_utils import mangled_name_from_mutant_name

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "measurements" / "mutation.md"
RESULTS = Path("mutants") / "results.jsonl"
LOG = "output.txt"
COLUMNS = ("killed", "survived", "equivalent", "timed out", "not covered")
AGAIN = ("survived", "not covered")
ENDS = {pytest.ExitCode.OK: "survived", pytest.ExitCode.NO_TESTS_COLLECTED: "not covered"}
PACKAGES = ("audit", "data", "model", "pipeline", "train")
QUICK = 90
"""Time limit for the tests of a module in seconds; tests that exceed it without a mutant do not count."""
TOO_SLOW = ("integration/pipeline/test_dvc.py", "integration/train/test_devices.py", "integration/train/test_faults.py")
FIRST_BATCH = "integration/train/test_pretrain.py::test_the_first_batch_is_the_first_of_the_train_split_and_each_is_seen_once"
OWN = {
    "stacklm.pipeline.dvc": ["unit/pipeline/test_stages.py"],
    "stacklm.train.pretrain": [
        FIRST_BATCH,
        "integration/train/test_pretrain.py::test_the_validation_loss_is_that_of_the_first_valid_tokens_of_valid",
        "integration/train/test_pretrain.py::test_too_little_text_for_one_batch_is_refused_with_the_numbers",
    ],
    "stacklm.train.resume": ["unit/train/test_resume.py", "unit/train/test_checkpoint.py"],
    "stacklm.train.trainer": ["unit/train/test_trainer.py", FIRST_BATCH],
    "stacklm.model.layers": ["unit/model/test_layers.py", "unit/model/test_init.py", "unit/model/test_dense.py"],
    "stacklm.model.dense": ["unit/model/test_dense.py", "unit/model/test_init.py"],
    "stacklm.model.stacked": ["unit/model/test_stacked.py", "unit/model/test_init.py"],
    "stacklm.audit.probe": ["unit/audit/test_causality.py"],
    "stacklm.data.formats": ["unit/data/test_formats.py", "unit/data/test_magic.py"],
    "stacklm.data.sources": ["unit/data/test_sources.py", "unit/data/test_paths.py"],
}
"""The tests of modules that have no test file of the same name, or whose file starts many training runs."""
EQUIVALENT: dict[tuple[str, str], str] = {}
"""Survivors without observable effect: the function and the last changed line of the diff, and the reason."""


class Result(NamedTuple):
    """The status of a mutant, the hash of its function, the duration of its tests, and the test that failed."""

    mutant: str
    code: str
    status: str
    seconds: float
    test: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=100, help="maximum number of mutants per package")
    parser.add_argument("--minutes", type=float, default=30, help="time limit (0: only report); mutants tried until then count")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample")
    parser.add_argument("--again", action="store_true", help="retry the survivors of the sample")
    parser.add_argument("--report", type=Path, default=REPORT)
    options = parser.parse_args()
    options.report = options.report.absolute()
    os.chdir(ROOT)
    mutants = make_mutants()
    sample = drawn(mutants, options.sample, options.seed)
    known = results(mutants)
    if options.again:
        to_try = {name: [n for n in names if n in known and known[n].status in AGAIN] for name, names in sample.items()}
    else:
        to_try = {name: [n for n in names if n not in known] for name, names in sample.items()}
    if options.minutes:
        run(to_try, mutants, time.monotonic() + 60 * options.minutes)
    known = results(mutants)
    found = {name: known[name] for names in sample.values() for name in names if name in known}
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(report(found, mutants, options.seed), encoding="utf-8")
    print(f"{len(found)} mutants tried: {dict(Counter(result.status for result in found.values()))}; {options.report}")


def make_mutants() -> dict[str, str]:
    """Copy the project with all mutants, which the environment variable MUTANT_UNDER_TEST enables; return the hash of the function
    of each mutant, by name."""
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.create_mutants(max_children=1)
    made = {}
    for path in mutmut.walk_source_files():
        data = SourceFileMutationData(path=path)
        data.load()
        for name in data.exit_code_by_key:
            made[name] = data.hash_by_function_name.get(mangled_name_from_mutant_name(name).rpartition(".")[2], "")
    return made


def drawn(names: Iterable[str], size: int, seed: int) -> dict[str, list[str]]:
    """A random sample in random order, of the same size for every package."""
    of_package = defaultdict(list)
    for name in sorted(names):
        of_package[package(name)].append(name)
    return {name: random.Random(seed).sample(members, min(size, len(members))) for name, members in of_package.items()}


def results(mutants: dict[str, str]) -> dict[str, Result]:
    """The last result of each mutant whose function has not changed."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [Result(**json.loads(line)) for line in lines]
    return {row.mutant: row for row in rows if mutants.get(row.mutant) == row.code}


def run(to_try: dict[str, list[str]], mutants: dict[str, str], end: float) -> None:
    """Try mutants one at a time until the monotonic clock shows `end`; all packages get equal time in total."""
    preload()
    spent = dict.fromkeys(to_try, 0.0)
    for result in results(mutants).values():
        spent[package(result.mutant)] += result.seconds
    while (left := [name for name in spent if to_try[name]]) and time.monotonic() < end:
        turn, started = min(left, key=spent.__getitem__), time.monotonic()
        name = to_try[turn].pop(0)
        status, test = judged(name)
        seconds = time.monotonic() - started
        spent[turn] += seconds
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(Result(name, mutants[name], status, round(seconds, 1), test)._asdict()) + "\n")
        print(f"{status} {name} {seconds:.0f} s {test}", flush=True)


def judged(mutant: str) -> tuple[str, str]:
    """The status of a mutant, and the test that killed it, which must pass without the mutant."""
    status = "not covered"
    for tests in judges(module(mutant)):
        found, test = tested(mutant, tests)
        if found == "killed" and clean((test,) if test else tests) != "survived":
            sys.exit(f"{test or ' '.join(tests)} fails without a mutant; see mutants/{LOG}")
        if found == "killed" or (found == "timed out" and clean(tests) == "survived"):
            return found, test
        if found == "survived":
            status = found
    return status, ""


@cache
def clean(tests: tuple[str, ...]) -> str:
    """The status of the unchanged code."""
    return tested("", tests)[0]


def preload() -> None:
    """Import the mutants and their tests, which each run inherits by `fork`."""
    sys.path.insert(0, str(Path("mutants").absolute()))
    os.environ["MUTANT_UNDER_TEST"] = ""
    import torch

    torch.set_num_threads(1)
    os.chdir("mutants")
    tests = [f"tests/{file}" for package in PACKAGES for file in sorted(test_files(package))]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-qq", "-n", "0", "-p", "no:cacheprovider", *tests])
    os.chdir(ROOT)


def tested(mutant: str, tests: tuple[str, ...]) -> tuple[str, str]:
    """The status of a mutant after these tests, and the test that failed; they are stopped after `QUICK` seconds."""
    started = time.monotonic()
    if not (child := os.fork()):
        os.setsid()
        os.environ["MUTANT_UNDER_TEST"] = mutant
        os.chdir("mutants")
        output = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os._exit(pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", *tests]))
    while time.monotonic() < started + QUICK:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            said = Path("mutants", LOG).read_text(errors="replace")
            failed = re.search(r"^(?:FAILED|ERROR) (.+?::.+?)(?: - |$)", said, re.MULTILINE)
            return ENDS.get(os.waitstatus_to_exitcode(code), "killed"), failed[1] if failed else ""
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timed out", ""


@cache
def judges(module: str) -> tuple[tuple[str, ...], ...]:
    """The tests of a module, then the others of its package that import it."""
    files = test_files(package(module))
    own = OWN.get(module) or [file for file in files if Path(file).name == f"test_{module.rpartition('.')[2]}.py"]
    skipped = {test.partition("::")[0] for tests in OWN.values() for test in tests if "::" in test} | set(own)
    others = [file for file in sorted(files) if file not in skipped and module in imported(files[file])]
    own = [test for test in own if test.partition("::")[0] in files]
    return tuple(tuple(f"tests/{test}" for test in tests) for tests in (own, others) if tests)


def test_files(package: str) -> dict[str, Path]:
    """The test files of a package, by path relative to `tests/`."""
    paths = [path for tier in ("unit", "integration") for path in Path("tests", tier, package).glob("test_*.py")]
    return {name: path for path in paths if (name := path.relative_to("tests").as_posix()) not in TOO_SLOW}


def imported(path: Path) -> set[str]:
    """The modules that a file's import statements name."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes} | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


def report(found: dict[str, Result], made: Iterable[str], seed: int) -> str:
    tried = {name: result.status for name, result in found.items()}
    diffs = {name: diff(name) for name, column in tried.items() if column == "survived"}
    reasons = {name: EQUIVALENT[key] for name, (key, _) in diffs.items() if key in EQUIVALENT}
    tried |= dict.fromkeys(reasons, "equivalent")
    cells = Counter((package(name), column) for name, column in tried.items())
    total, uncovered = Counter(map(package, made)), Counter(function(name) for name in tried if tried[name] == "not covered")
    rows = [[f"`{name}`", f"{total[name]:,}"] + [f"{cells[name, column]}" for column in COLUMNS] for name in sorted(total)]
    minutes = sum(result.seconds for result in found.values()) / 60
    return "\n".join(
        [
            "# Mutation testing",
            "",
            f"Written by `python benchmarks/mutation.py --seed {seed}` on {date.today()}:",
            f"{len(tried)} of {total.total():,} mutants at random, as long of each package. Their tests ran for {minutes:.0f}",
            "minutes, one process at a time.",
            "",
            f"| package | mutants | {' | '.join(COLUMNS)} |",
            "|---" * (2 + len(COLUMNS)) + "|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "A survivor is a change that no quick test of the package noticed: a missing test, or a change that makes no",
            "difference. A mutant of a module that no such test imports is not covered. Messages are not changed, and slow tests",
            "are not run.",
            "",
            "## Survivors",
            "",
            *(f"```diff\n{text}\n```\n" for name, (_, text) in sorted(diffs.items()) if name not in reasons),
            "## Equivalent",
            "",
            *(f"```diff\n{diffs[name][1]}\n```\n\n{reason}\n" for name, reason in sorted(reasons.items())),
            "## Not covered",
            "",
            *(f"- `{name}`: {count}" for name, count in sorted(uncovered.items())),
            "",
        ]
    )


def package(name: str) -> str:
    return name.split(".")[1]


def module(mutant: str) -> str:
    return mutant.rpartition(".")[0]


def function(mutant: str) -> str:
    """The name of the mutant's function in the code, such as `stacklm.data.batches.TrainBatches.batch`."""
    mangled = mangled_name_from_mutant_name(mutant).rpartition(".")[2]
    return f"{module(mutant)}.{mangled.removeprefix('x_').removeprefix('xǁ').replace('ǁ', '.')}"


def diff(name: str) -> tuple[tuple[str, str], str]:
    """The key of a mutant in `EQUIVALENT`, and its changed lines below the function's name."""
    lines = [line for line in get_diff_for_mutant(name).splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return (function(name), f"{lines[-1][0]} {lines[-1][1:].strip()}"), "\n".join([f"# {function(name)}", *lines])


if __name__ == "__main__":
    main()
