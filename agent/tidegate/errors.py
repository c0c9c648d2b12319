"""What went wrong, told to a person.

Every failure that bad input or a missing condition can cause is a TidegateError: one sentence that says
what was wrong, where, and what would be right. The command line prints it and exits with `exit_code`.
Nothing here performs I/O, so that the pure parts can raise these errors too.
"""

import difflib
from collections.abc import Sequence


class TidegateError(Exception):
    """Base of all errors with a message for a person."""

    exit_code = 1


class InputError(TidegateError):
    """Something that a person wrote is wrong: a file, a field, an annotation, an option.

    `source` is the file or "-" or the command line, `field` the path of the field in it (with a line where
    one is known), `problem` what is wrong with it and `expected` what would be right.
    """

    exit_code = 2

    def __init__(
        self, problem: str, *, source: str = "", field: str = "", expected: str = ""
    ) -> None:
        self.problem = problem
        self.source = source
        self.field = field
        self.expected = expected
        where = ": ".join(part for part in (source, field) if part)
        text = f"{where}: {problem}" if where else problem
        super().__init__(f"{text}; expected {expected}" if expected else text)


class InputErrors(InputError):
    """Several faults in one input, all reported at once, one line each."""

    def __init__(self, faults: "tuple[InputError, ...]") -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))


def nearest(given: str, names: Sequence[str]) -> str:
    """Which names were probably meant, else a few, and how many others there are; of at least one name."""
    shown = difflib.get_close_matches(given, names, n=5, cutoff=0.5) or names[:3]
    left = len(names) - len(shown)
    more = f" (and {left} {'other' if left == 1 else 'others'})" if left else ""
    return f"one of {', '.join(shown)}{more}"
