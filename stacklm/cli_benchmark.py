"""`stacklm benchmark`: a trained model on published benchmarks, or on questions of your own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stacklm.cli_text import find_trained
from stacklm.cli_types import BenchmarkedModel

if TYPE_CHECKING:
    from stacklm.config.evaluate import Evaluate


def benchmark(
    model: BenchmarkedModel = None,
    blimp: Annotated[Path | None, typer.Option(help="JSON lines with sentence_good, sentence_bad and UID.")] = None,
    lambada: Annotated[Path | None, typer.Option(help="JSON lines with text, of which the last word is to be said.")] = None,
    wikitext: Annotated[Path | None, typer.Option(help="A file of WikiText, such as wiki.test.raw.")] = None,
    multiple_choice: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with context, choices and answer; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items at most, of blimp of each set. By default all.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a model's folder; by default the folder tokenizer two above.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures, sets of blimp included, as JSON.")] = False,
) -> None:
    """Score a trained model on benchmarks in local files, by default on those of `evaluate.benchmarks` in params.yaml."""
    from dataclasses import replace

    from stacklm.config.evaluate import Benchmark
    from stacklm.config.schema import ParamsError, read
    from stacklm.evaluate.benchmarks import Scorer, run_benchmarks
    from stacklm.files import project_root
    from stacklm.report.benchmarks import over_seeds
    from stacklm.report.tables import benchmark_text

    one_each = {"blimp": blimp, "lambada": lambada, "wikitext": wikitext}
    files: list[dict[str, Any]] = [{"kind": kind, "path": str(path.resolve())} for kind, path in one_each.items() if path]
    for path in multiple_choice or []:
        files.append({"kind": "multiple_choice", "path": str(path.resolve()), "name": path.name.split(".")[0]})
    config, name, trained, words = _find(model, tokenizer)
    if files:
        config = replace(config, benchmarks=tuple(read(Benchmark, one, "benchmark") for one in files))
    if not config.benchmarks:
        raise ParamsError("no benchmark: name a file, such as --blimp blimp.jsonl, or list some in evaluate.benchmarks")
    os.chdir(project_root() or Path.cwd())  # from where paths in params.yaml start
    scorer = Scorer.load(config, trained, words)
    figures = run_benchmarks(scorer, [replace(one, limit=limit or one.limit) for one in config.benchmarks])
    print(json.dumps(figures, indent=2) if as_json else benchmark_text({name: over_seeds([figures])}))


def _find(model: str | None, tokenizer: Path | None) -> tuple[Evaluate, str, Path, Path]:
    """Settings, name, folder and tokenizer of a model by its name in the project, or by its folder."""
    from stacklm.config.evaluate import Evaluate
    from stacklm.config.params import PARAMS_FILE, load
    from stacklm.files import project_root

    folder = Path(model or "")
    if not model or not folder.is_dir():
        return find_trained(model)
    root, folder = project_root(), folder.resolve()
    config = load(root / PARAMS_FILE).evaluate if root else Evaluate()
    return config, folder.name, folder, (tokenizer or folder.parents[1] / "tokenizer").resolve()
