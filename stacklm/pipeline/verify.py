"""One trial of an experiment trained once more, and compared with its record.

On the same kind of processor, with the same versions and the same code, it must give the same bits: weights and scores are
equal or the check fails. Where any of these differs, roundings differ and training carries them on, at most to where another
seed would have led: scores must then agree within `TOLERANCE` standard deviations over seeds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stacklm.code import digest
from stacklm.config.schema import ParamsError, listed
from stacklm.console import table
from stacklm.files import remove, write_json
from stacklm.lab.schedule import Planned, Records
from stacklm.lab.text import measured_sigma
from stacklm.lab.trial import machine
from stacklm.pipeline.code import changed_units, shortened
from stacklm.pipeline.lab import ACCEPTED, Files
from stacklm.pipeline.trials import run_apart

TOLERANCE = 3
"""Standard deviations over seeds."""


@dataclass(frozen=True)
class Verification:
    """A trial's record beside that of the same trial trained again."""

    name: str
    record: Mapping[str, Any]
    again: Mapping[str, Any]
    others: tuple[str, ...]
    """What is different now from when the record was made, in words."""
    sigma: float
    """Relative standard deviation of scores over seeds."""

    @property
    def rows(self) -> list[tuple[str, str, str, bool]]:
        """What is compared, both values, and whether they agree as they have to."""
        if "failed" in self.record or "failed" in self.again:
            then, now = (str(one.get("failed", "whole")) for one in (self.record, self.again))
            return [("training", then, now, "failed" in self.record and "failed" in self.again)]
        scores = [(split, self.record[split]["bits_per_byte"], self.again[split]["bits_per_byte"]) for split in ("valid", "test")]
        within = TOLERANCE * self.sigma if self.others else 0.0
        rows = [(f"{split} bits per byte", repr(then), repr(now), abs(now / then - 1) <= within) for split, then, now in scores]
        if self.others:
            return rows
        names = {"weights": "weights, SHA-256", "groups": "nats by document"}
        same = [(label, self.record.get(name), self.again[name]) for name, label in names.items()]
        return [*rows, *((label, _short(then), _short(now), then == now) for label, then, now in same)]

    @property
    def passed(self) -> bool:
        return all(row[-1] for row in self.rows)

    @property
    def same_weights(self) -> bool:
        return "weights" in self.record and self.record["weights"] == self.again.get("weights")

    def text(self) -> str:
        """What had to agree and why, what was compared, and the outcome."""
        rule = (
            f"within {TOLERANCE * self.sigma:.2%} ({TOLERANCE} standard deviations over seeds), since now {'; '.join(self.others)}"
            if self.others
            else "to the bit: same code, kind of processor and versions"
        )
        rows = [(label, then, now, "yes" if agrees else "NO") for label, then, now, agrees in self.rows]
        outcome = "the record is reproduced" if self.passed else "the record is NOT reproduced"
        outcome += "; the weights are equal to the bit" if self.same_weights else ""
        return f"{self.name}\nmust agree {rule}\n\n{table(('', 'record', 'again', 'agrees'), rows)}\n\n{outcome}"


def verify(files: Files, prefix: str | None) -> Verification:
    """Train the trial whose identity begins with `prefix` once more, in a folder of its own, and compare it with its record.

    Without a prefix it is the one of those judged that takes the fewest operations. Raises `ParamsError` where there is no such
    trial or more than one, and where the tokens are not those of the trial.
    """
    lab, records = files.lab(), files.records()
    done = lab.done(records)
    planned = cheapest(files.name, done, records) if prefix is None else find(files.name, done, records, prefix)
    record, present = records[planned.trial.identity], files.present()
    if present["data"] != lab.data:
        raise ParamsError(f"{files.name}: the tokens here are not those of its trials (SHA-256 {lab.data[:12]}...)")
    work = files.work / "verify" / planned.trial.identity
    remove(work)
    again = run_apart(planned.trial, files.shards, work)
    remove(work)
    changed = changed_units((files.began() or present)["code"], present["code"])
    then, now = record.get("machine", {}), machine()
    others = [f"{name} is {now.get(name)}, then {then.get(name)}" for name in {**then, **now} if then.get(name) != now.get(name)]
    others += [f"the code differs in {shortened(changed)}"] if changed else []
    return Verification(planned.name, record, again, tuple(others), measured_sigma(lab, records)[0])


def accept(files: Files, reason: str) -> Iterator[str]:
    """Let the experiment go on with the present code, once a trial of every arm has given the same weights with it.

    Yields what was found of each. Raises `ParamsError` where its code has not changed, where more than its code has, and where
    weights differ.
    """
    lab, records, before, now = files.lab(), files.records(), files.began(), files.present()
    if not files.changed(now):
        raise ParamsError(f"{files.name}: its code has not changed; there is nothing to accept")
    if others := files.changed({**now, "code": before["code"]}):
        raise ParamsError(f"{files.name}: {others} changed, and not its code alone; trials of both must not be compared")
    first = {
        one.arm.key: one.trial.identity for one in reversed(lab.trials(records)) if "weights" in records.get(one.trial.identity, {})
    }
    for trial in first.values():
        found = verify(files, trial)
        if not found.same_weights:
            raise ParamsError(f"not accepted: other weights than recorded\n{found.text()}")
        yield f"{found.name}: the same weights"
    changed = changed_units(before["code"], now["code"])
    note = {
        "date": time.strftime("%Y-%m-%d"),
        "reason": reason,
        "changed": len(changed),
        "code": digest(now["code"]),
        "trials": [*first.values()],
    }
    write_json(files.origin, {**before, ACCEPTED: [*before.get(ACCEPTED, []), note]})


def cheapest(name: str, done: list[Planned], records: Records) -> Planned:
    """The first of the judged trials that took the fewest operations. Raises `ParamsError` where none has been judged."""
    judged = [one for one in done if one.purpose == "judge" and "flops" in records[one.trial.identity]]
    if not judged:
        raise ParamsError(f"{name}: no trial has been judged yet, so there is none to verify")
    return min(judged, key=lambda one: records[one.trial.identity]["flops"])


def find(name: str, done: list[Planned], records: Records, prefix: str) -> Planned:
    """By its identity, or by the name of its record's file, which differs where settings have been added since."""
    names = {one.trial.identity: (one.trial.identity, records[one.trial.identity].get("identity", "")) for one in done}
    found = {one.trial.identity: one for one in done if any(own.startswith(prefix) for own in names[one.trial.identity])}
    if len(found) != 1:
        what = f"{len(found)} trials begin" if found else "no trial with a record begins"
        known = list(found) or [one.trial.identity for one in done]
        raise ParamsError(f"{name}: {what} with {prefix!r}; {'they are' if found else 'there are'} {listed(known[:6]) or 'none'}")
    return next(iter(found.values()))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value and value["nats"])
    return f"{text[:12]}..."
