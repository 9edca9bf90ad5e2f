"""Repeating one trial of an experiment and comparing it with its record.

On the same kind of processor, with the same versions and code, weights and scores must be bit-identical. If any of these
differs, rounding differs, and training amplifies it, at most to the effect of another seed: scores must then agree within
`TOLERANCE` standard deviations over seeds.
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
    """A trial's record and that of its repetition."""

    name: str
    record: Mapping[str, Any]
    again: Mapping[str, Any]
    others: tuple[str, ...]
    """The differences between now and the time of the record, in words."""
    sigma: float
    """Relative standard deviation of scores over seeds."""

    @property
    def rows(self) -> list[tuple[str, str, str, bool]]:
        """What is compared, both values, and whether they agree as required."""
        if "failed" in self.record or "failed" in self.again:
            then, now = (str(one.get("failed", "completed")) for one in (self.record, self.again))
            return [("training", then, now, "failed" in self.record and "failed" in self.again)]
        scores = [(split, self.record[split]["bits_per_byte"], self.again[split]["bits_per_byte"]) for split in ("valid", "test")]
        within = TOLERANCE * self.sigma if self.others else 0.0
        rows = [(f"{split} bits per byte", repr(then), repr(now), abs(now / then - 1) <= within) for split, then, now in scores]
        if self.others:
            return rows
        names = {"weights": "weights, SHA-256", "groups": "nats per group of documents"}
        same = [(label, self.record.get(name), self.again[name]) for name, label in names.items()]
        return [*rows, *((label, _short(then), _short(now), then == now) for label, then, now in same)]

    @property
    def passed(self) -> bool:
        return all(row[-1] for row in self.rows)

    @property
    def same_weights(self) -> bool:
        return "weights" in self.record and self.record["weights"] == self.again.get("weights")

    def text(self) -> str:
        """The verification as text: what must agree and why, what was compared, and the outcome."""
        rule = (
            f"within {TOLERANCE * self.sigma:.2%} ({TOLERANCE} standard deviations over seeds), since {'; '.join(self.others)}"
            if self.others
            else "bit for bit: same code, kind of processor and versions"
        )
        rows = [(label, then, now, "yes" if agrees else "NO") for label, then, now, agrees in self.rows]
        outcome = "the record is reproduced" if self.passed else "the record is NOT reproduced"
        outcome += "; the weights are bit-identical" if self.same_weights else ""
        return f"{self.name}\nmust agree {rule}\n\n{table(('', 'record', 'repeated', 'agrees'), rows)}\n\n{outcome}"


def verify(files: Files, prefix: str | None) -> Verification:
    """Repeat the trial whose identity starts with `prefix` in a separate folder, and compare the result with its record.

    Without a prefix it is the judged trial with the fewest FLOPs. Raises `ParamsError` if there is no such trial or more than
    one, and if the tokens differ from those of the trial.
    """
    lab, records = files.lab(), files.records()
    done = lab.done(records)
    planned = cheapest(files.name, done, records) if prefix is None else find(files.name, done, records, prefix)
    record, present = records[planned.trial.identity], files.present()
    if present["data"] != lab.data:
        raise ParamsError(f"{files.name}: the token shards here differ from those of its trials (SHA-256 {lab.data[:12]}...)")
    work = files.work / "verify" / planned.trial.identity
    remove(work)
    again = run_apart(planned.trial, files.shards, work)
    remove(work)
    changed = changed_units((files.began() or present)["code"], present["code"])
    then, now = record.get("machine", {}), machine()
    others = [f"{name} is now {now.get(name)}, was {then.get(name)}" for name in {**then, **now} if then.get(name) != now.get(name)]
    others += [f"the code differs in {shortened(changed)}"] if changed else []
    return Verification(planned.name, record, again, tuple(others), measured_sigma(lab, records)[0])


def accept(files: Files, reason: str) -> Iterator[str]:
    """Allow the experiment to continue with the current code, after one trial of every arm has given the same weights with it.

    Yields the result of each. Raises `ParamsError` if its code has not changed, if something else has changed too, and if
    weights differ.
    """
    lab, records, before, now = files.lab(), files.records(), files.began(), files.present()
    if not files.changed(now):
        raise ParamsError(f"{files.name}: its code has not changed; there is nothing to accept")
    if others := files.changed({**now, "code": before["code"]}):
        raise ParamsError(f"{files.name}: {others} changed, not only its code; earlier and later trials must not be compared")
    first = {
        one.arm.key: one.trial.identity for one in reversed(lab.trials(records)) if "weights" in records.get(one.trial.identity, {})
    }
    for trial in first.values():
        found = verify(files, trial)
        if not found.same_weights:
            raise ParamsError(f"not accepted: the weights differ from the record\n{found.text()}")
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
    """The judged trial with the fewest FLOPs, the first of equals. Raises `ParamsError` if none has been judged."""
    judged = [one for one in done if one.purpose == "judge" and "flops" in records[one.trial.identity]]
    if not judged:
        raise ParamsError(f"{name}: no trial has been judged yet, so there is none to verify")
    return min(judged, key=lambda one: records[one.trial.identity]["flops"])


def find(name: str, done: list[Planned], records: Records, prefix: str) -> Planned:
    """The trial whose identity or record file's name starts with `prefix`; these differ if settings have been added since.

    Raises `ParamsError` unless there is exactly one.
    """
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
