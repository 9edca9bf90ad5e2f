"""Run a benchmark and keep what it prints as a page of docs/measurements/.

    python benchmarks/publish.py loss -- python benchmarks/loss.py --threads 2      writes docs/measurements/loss.md

The page names the command, the day and the machine. Text that people wrote below a line `## Notes` stays.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from stacklm.files import write_text

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "measurements"
NOTES = "## Notes"


def main(folder: Path = FOLDER) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="the page's name without .md")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after `--`")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: write it after `--`")
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    path = folder / f"{options.page}.md"
    write_text(path, page(options.page, command, printed, path.read_text(encoding="utf-8") if path.exists() else ""))
    print(f"wrote {path}")


def page(name: str, command: list[str], printed: str, before: str) -> str:
    """The text of the page; the heading and the notes of the page before are kept."""
    heading = re.match(r"# .+", before)
    notes = before.partition(f"\n{NOTES}\n")[2]
    day, machine = datetime.now(UTC).date(), f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"
    shown = "\n".join(line.rstrip() for line in printed.strip().splitlines())
    parts = [
        heading[0] if heading else f"# {name.capitalize()}",
        f"Written by `{shlex.join(command)}` on {day}: {machine}, torch {torch.__version__}.",
        f"```text\n{shown}\n```",
        *([f"{NOTES}\n\n{notes.strip()}"] if notes else []),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
