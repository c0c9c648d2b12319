"""Durations as people write and read them, the same everywhere: files, command line, API, messages.

Written: 250ms, 8s, 10m, 24h, 7d, 1h30m; a bare number is seconds. Units are Go's (and so Consul's) and the day. Pure.
"""

import math
import re

_UNITS_S = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h|d)")
_NUMBER = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_SHOWN = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))

SHAPE = "a duration such as 250ms, 8s, 10m or 24h"


def parse(text: str) -> float | None:
    """Seconds; None for a text that is no duration."""
    if _NUMBER.fullmatch(text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return math.fsum(float(number) * _UNITS_S[unit] for number, unit in parts)


def span(seconds: float) -> str:
    """A duration for a person, its two largest units: 8 s, 3 m 20 s, 24 h, 2 d 3 h."""
    left = round(max(seconds, 0.0))
    parts: list[str] = []
    for unit, size in _SHOWN if left >= 2 * _SHOWN[0][1] else _SHOWN[1:]:
        amount, left = divmod(left, size)
        if amount:
            parts.append(f"{amount} {unit}")
    return " ".join(parts[:2]) or "0 s"


def ago(seconds: float) -> str:
    """How long ago something was, for a person."""
    return "just now" if seconds < 1 else f"{span(seconds)} ago"
