"""What was claimed of a model, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Fault(Exception):
    """A claim that does not hold; the message names what is wrong."""


class AuditError(RuntimeError):
    """A model that must not be trained; the message names the faults."""


def claims(text: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Say of a check what holds where it finds no fault."""

    def says(check: Callable[..., str]) -> Callable[..., str]:
        check.claim = text
        return check

    return says


@dataclass(frozen=True)
class Check:
    """One claim of something. `finding` is what was measured, or the fault by its name."""

    name: str
    of: str
    claim: str
    passed: bool
    finding: str


def examine(check: Callable[..., str], *arguments: Any, of: str) -> Check:
    """Carry out a check `of` something: its entry in the certificate, whether it passed or not."""
    try:
        return Check(check.__name__, of, check.claim, True, check(*arguments))
    except Fault as fault:
        return Check(check.__name__, of, check.claim, False, str(fault))


@dataclass(frozen=True)
class Certificate:
    """All checks of one model. `subject` is what it was built from, as plain values."""

    subject: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def faults(self) -> list[str]:
        """Every fault, after the check that found it."""
        return [f"{check.name} of {check.of}: {check.finding}" for check in self.checks if not check.passed]

    def plain(self) -> dict[str, Any]:
        """As it is written to JSON."""
        return {"passed": self.passed, "subject": self.subject, "checks": [vars(check) for check in self.checks]}

    def table(self, title: str) -> str:
        """For people: a line a check with what was measured, or the fault and what was claimed."""
        count = len(self.checks)
        lines = [f"{title}: " + (f"all {count} checks passed" if self.passed else f"{len(self.faults)} of {count} checks FAILED")]
        of = ""
        for check in self.checks:
            if check.of != of:
                of = check.of
                lines.append(f"  {of}")
            lines.append(f"    {'ok   ' if check.passed else 'FAULT'}  {check.name:<9}  {check.finding}")
            if not check.passed:
                lines.append(f"{'':<22}claimed: {check.claim}")
        return "\n".join(lines)
