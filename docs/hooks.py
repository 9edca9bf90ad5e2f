"""MkDocs hooks: pages from outside docs/, one page of API reference per package, the reports of all experiments that have
records, and links to other files of the repository."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from stacklm.config.schema import ParamsError
from stacklm.pipeline.lab import Files as Experiment
from stacklm.pipeline.project import Project, experiments

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
"""The target of a relative link or image, without the anchor."""


def on_config(config: MkDocsConfig) -> None:
    """List the experiments and the API reference in the navigation."""
    assert config.nav is not None
    generated = {
        "Experiments": [{"Verdicts": "experiments.md"}, *({_title(page): page} for page in _reports())],
        "API reference": [{f"stacklm.{name}": f"reference/{name}.md"} for name in _packages()],
    }
    for entry in config.nav:
        entry.update((name, generated[name]) for name in entry if name in generated)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages, and copies of the repository's files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, modules in _packages().items():
        text = "\n\n".join([f"# stacklm.{name}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"reference/{name}.md", content=text + "\n"))
    verdicts = "\n\n".join(f"{one.name}: {one.verdicts()}" for one in _experiments())
    files.append(File.generated(config, "experiments.md", content=f"# Experiments\n\n```\n{verdicts}\n```\n"))
    for page, folder in _reports().items():
        for path in folder.iterdir():
            if path.suffix in (".md", ".svg"):
                place = page if path.suffix == ".md" else f"{os.path.dirname(page)}/{path.name}"
                files.append(File.generated(config, place, abs_src_path=str(path)))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = (ROOT / _folder(page.src_uri) / target).resolve()
            place = _place(path)
            if place.startswith("repository/") and path.is_file() and place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links that are relative to the repository, so that they also work in the site."""
    here = os.path.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        path = (ROOT / _folder(page.file.src_uri) / match[1]).resolve()
        return f"]({os.path.relpath(_place(path), here or '.')}" if path.exists() else match[0]

    return LINK.sub(rewritten, markdown)


def _packages() -> dict[str, list[str]]:
    """The modules of every package of stacklm, named as they are imported."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "stacklm").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 2 and parts[-1] != "__main__" and (path.parent / "__init__.py").exists():
            found.setdefault(parts[1], []).append(".".join(part for part in parts if part != "__init__"))
    return found


@cache
def _reports() -> dict[str, Path]:
    """The folder of each report, made from the records, by its page: one for an experiment on text, one for a synthetic task
    that has arms in common with it."""
    text, tasks = ([one for one in _experiments() if bool(one.experiment.probe) == task] for task in (False, True))
    for one in text:
        one.write_report()
        for task in tasks:
            if one.experiment.candidates.keys() & task.experiment.candidates.keys():  # most have none, and findings take time
                with suppress(ParamsError):  # too few arms in common
                    one.write_correlation(task)
    found = [folder for one in text for folder in (one.report, *sorted(one.report.parent.glob("correlation-*")))]
    return {f"experiments/{folder.parent.name}/{folder.name}/index.md": folder for folder in found}


@cache
def _experiments() -> list[Experiment]:
    """Those that have records."""
    project = Project.find(ROOT)
    return [one for name in experiments(project) if (one := Experiment(project, name)).recorded]


def _title(page: str) -> str:
    """The experiment's name, and that of the task whose ranks are compared."""
    _, name, report, _ = page.split("/")
    return name if report == "report" else f"{name} and {report.removeprefix('correlation-')}"


def _folder(page: str) -> Path:
    """Where the page's source lies in the repository: links are relative to it."""
    return Path(SOURCES.get(page, f"docs/{page}")).parent


def _place(path: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    name = path.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}")
