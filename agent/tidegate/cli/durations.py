"""Durations as people write them: 500ms, 8s, 10m, 24h, 7d, 1h30m; a bare number is seconds."""

import argparse
import re

UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")


def parse_duration(text: str) -> float:
    """Seconds; raises argparse.ArgumentTypeError for anything that is not a positive duration."""
    text = text.strip()
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        seconds = float(text)
    elif _WHOLE.fullmatch(text):
        seconds = sum(float(number) * UNITS_S[unit] for number, unit in _PART.findall(text))
    else:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 8s, 10m or 24h")
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not longer than nothing")
    return seconds


def format_duration(seconds: float) -> str:
    """The two largest units that matter: 8 s, 3 m 20 s, 24 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if whole >= size:
            parts.append(f"{whole // size} {unit}")
            whole %= size
    return " ".join(parts[:2])
