"""Human-readable numbers: at most three significant digits, a prefix, a unit."""

from __future__ import annotations

import math

_COUNTS = ("", "k", "M", "B", "T")
_QUANTITIES = ("", "k", "M", "G", "T", "P", "E", "Z")


def count(value: float) -> str:
    """Format a count, such as parameters or tokens: 1.23 M, 4.5 B."""
    return _scaled(value, _COUNTS).strip()


def quantity(value: float, unit: str) -> str:
    """Format a measured quantity with SI prefixes: 45.6 MFLOP, 812 MB."""
    return f"{_scaled(value, _QUANTITIES)}{unit}".strip()


def plural(number: int, noun: str) -> str:
    """Format a number of things: 1 seed, 2 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: 4.2 s, 1 min 32 s, 3 h 5 min, 2 d 4 h."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def interval(low: float, high: float, form: str = "+.2%") -> str:
    """Format both ends of an interval, such as `-1.13% to +0.31%`."""
    return f"{low:{form}} to {high:{form}}"


def signed(value: float, digits: int) -> str:
    """Format a difference with its sign (a Unicode minus); zero has none."""
    return _sign(f"{value:+.{digits}f}")


def percent(share: float) -> str:
    """Format a relative difference: +3.2%, −0.4%, 0%; those below 0.05% other than 0 as `under 0.1%`."""
    if share == 0:
        return "0%"
    if abs(share) < 0.0005:
        return "under 0.1%"
    return _sign(f"{share:+.1%}" if abs(share) < 0.9995 else f"{share:+.0%}")


def _sign(text: str) -> str:
    return text.lstrip("+-") if not text.strip("+-0.%") else text.replace("-", "\N{MINUS SIGN}")


def _scaled(value: float, prefixes: tuple[str, ...]) -> str:
    """Format a value of at least 0 with three significant digits, a space and its prefix."""
    rounded = float(f"{value:.3g}")  # before the prefix is chosen: 999,900 becomes 1 M, not 1000 k
    step = 0 if rounded < 1 else min(math.floor(math.log10(rounded)) // 3, len(prefixes) - 1)
    scaled = rounded / 1000**step
    return f"{scaled:.0f} {prefixes[step]}" if scaled >= 1000 else f"{scaled:.3g} {prefixes[step]}"
