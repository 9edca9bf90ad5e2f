"""`stacklm plan`: look, say, and write what was asked for."""

from __future__ import annotations

from pathlib import Path

from stacklm.config.params import preview, set_values
from stacklm.files import read_json
from stacklm.plan.levers import fit
from stacklm.plan.plan import plan
from stacklm.plan.text import describe, verdict


def run(file: Path, assignments: list[str], names: list[str], manifest: Path, budget: int | None, write: bool) -> bool:
    """Print the plan of those models with the settings of `file`, changed by `assignments`; whether it fits `budget` bytes.

    With `write`, the assignments, and those that make it fit, are put into the file.
    """
    found = plan(preview(file, assignments), names, read_json(manifest) if manifest.exists() else None)
    print(describe(found))
    moves, fits = [], True
    if budget:
        moves = fit(lambda more: preview(file, [*assignments, *more]), names, budget)
        print("\n" + verdict(found, moves, budget))
        fits = found.peak <= budget
        if write and moves:
            fits = moves[-1].peak <= budget
    changes = [*assignments, *(assignment for move in moves for assignment in move.assignments)]
    if write and changes:
        set_values(file, changes)
        print(f"\nparams.yaml: set {', '.join(changes)}")
    elif moves:
        print("\nThe same command with --write puts this into params.yaml.")
    return fits
