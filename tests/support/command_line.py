"""Parsing command lines without running them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from stacklm.cli import app

GROUP: Any = typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Parse the words after `stacklm` with the command's parser. Raises what the parser raises."""
    command: Any = GROUP
    while hasattr(command, "commands"):
        name, *words = words
        if name.startswith("-"):  # such as --install-completion, which would do so
            assert name in {"-h", "--help", *(word for option in command.params for word in option.opts)}, name
            return
        assert name in command.commands, name
        command = command.commands[name]
    command.make_context(name, words).close()


def commands(group: Any = GROUP, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its full name, such as `lab plan`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*names, name))
        else:
            yield " ".join((*names, name)), command
