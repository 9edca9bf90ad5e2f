"""Run benchmarks and write their output to a page of docs/measurements/.

    python benchmarks/publish.py loss -- python benchmarks/loss.py --threads 2      writes docs/measurements/loss.md

A page may have several commands, each after its own `--`. It names each command, the date and the machine. Text below a line
`## Notes`, written by hand, is kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import torch

from stacklm.files import write_text

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "measurements"
NOTES = "## Notes"


def main(folder: Path = FOLDER) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="name of the page, without .md")
    parser.add_argument("commands", nargs=argparse.REMAINDER, help="commands to run, each after `--`")
    options = parser.parse_args()
    commands = [list(words) for dashes, words in groupby(options.commands, lambda word: word == "--") if not dashes]
    if not commands:
        parser.error("no command: write it after `--`")
    printed = {shlex.join(one): subprocess.run(one, check=True, stdout=subprocess.PIPE, text=True).stdout for one in commands}
    path = folder / f"{options.page}.md"
    write_text(path, page(options.page, printed, path.read_text(encoding="utf-8") if path.exists() else ""))
    print(f"wrote {path}")


def page(name: str, printed: Mapping[str, str], before: str) -> str:
    """The text of the page, from the output of each command; the heading and the notes of the previous page are kept."""
    heading = re.match(r"# .+", before)
    notes = before.partition(f"\n{NOTES}\n")[2]
    day, machine = datetime.now(UTC).date(), f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"
    parts = [heading[0] if heading else f"# {name.capitalize()}"]
    for command, text in printed.items():
        shown = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        parts += [f"Written by `{command}` on {day}: {machine}, torch {torch.__version__}.", f"```text\n{shown}\n```"]
    return "\n\n".join([*parts, *([f"{NOTES}\n\n{notes.strip()}"] if notes else [])]) + "\n"


if __name__ == "__main__":
    main()
