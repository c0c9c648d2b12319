"""Differential fuzzing: the classifier in the kernel against a reference in pure Python.

`streams` makes conversations from a seed, `reference` says what they are, `differential` plays them to the
programs and compares. Every difference that was ever found is a file in cases/, which tests/kernel replays.
"""

import sys
from pathlib import Path

# The bench and the frames of the kernel tests, which import each other by bare names.
_KERNEL_TESTS = str(Path(__file__).parent.parent / "kernel")
if _KERNEL_TESTS not in sys.path:
    sys.path.append(_KERNEL_TESTS)
