"""Regular expressions as Go has them (the syntax of RE2), in time linear in what they search.

Matching is RE2's own, because Python's takes exponential time for patterns such as `(a+)+$`, and a filter
comes from anybody who may list. What RE2 does not have, Go does not have either: backreferences, lookaround.
"""

import functools
from typing import Any

MAX_PATTERNS = 16
"""Most regular expressions in one filter; as many stay compiled."""

_MAX_MEMORY = 512 << 10
"""Bytes that one compiled pattern may use. Where its automaton does not fit RE2 goes on without it, slower."""

_WORK_PER_STEP = 300
"""Bytes searched times instructions of the pattern that take, without an automaton, as long as a step."""


class BadPattern(ValueError):
    """A text is not a regular expression; the message says why."""


class Pattern:
    """A compiled regular expression."""

    def __init__(self, text: str) -> None:
        """Raises BadPattern."""
        # Not at the top: most agents never filter by a pattern, and the library takes 4 MB.
        import re2

        options = re2.Options()
        options.max_mem = _MAX_MEMORY
        options.log_errors = False
        try:
            self._compiled: Any = re2.compile(text.encode(), options)
        except re2.error as error:
            raise BadPattern(error.args[0].decode(errors="replace")) from None
        finally:
            # The library would keep 128 patterns for itself.
            re2.purge()

    def is_in(self, text: str) -> bool:
        """Whether it matches anywhere in `text`."""
        return self._compiled.search(_encoded(text)) is not None

    def steps_for(self, text: str) -> int:
        """What searching `text` takes at worst, in steps of evaluation."""
        size: int = self._compiled.programsize
        return len(_encoded(text)) * size // _WORK_PER_STEP


def _encoded(text: str) -> bytes:
    return text.encode(errors="replace")


@functools.lru_cache(maxsize=MAX_PATTERNS)
def compiled(text: str) -> Pattern:
    """The pattern that `text` is. Raises BadPattern."""
    return Pattern(text)
