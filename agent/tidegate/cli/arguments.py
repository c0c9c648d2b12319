"""Types of command line arguments that several commands take."""

import argparse

from tidegate import durations


def duration(text: str) -> float:
    """Seconds, more than 0; raises argparse.ArgumentTypeError for anything else."""
    seconds = durations.parse(text.strip())
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is not {durations.SHAPE}")
    return seconds
