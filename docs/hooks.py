"""MkDocs hooks: pages from outside docs/, one page of API reference per package, and links to other files of the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

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
    """List the API reference in the navigation."""
    assert config.nav is not None
    entry = next(item for item in config.nav if "API reference" in item)
    entry["API reference"] = [{f"stacklm.{name}": f"reference/{name}.md"} for name in _packages()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages, and copies of the repository's files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, modules in _packages().items():
        text = "\n\n".join([f"# stacklm.{name}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"reference/{name}.md", content=text + "\n"))
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
        if len(parts) > 2 and parts[-1] != "__main__":
            found.setdefault(parts[1], []).append(".".join(part for part in parts if part != "__init__"))
    return found


def _folder(page: str) -> Path:
    """Where the page's source lies in the repository: links are relative to it."""
    return Path(SOURCES.get(page, f"docs/{page}")).parent


def _place(path: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    name = path.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}")
