"""The error of a filter expression, which knows the column it is about."""

import unicodedata

from tidegate.errors import InputError

_WIDTH = 72
"""Characters of a long expression that are shown around the column."""


class FilterError(InputError):
    """A filter expression cannot be read, or cannot apply to what is filtered.

    `column` counts the characters of `text` from 1; one past the end is where the expression breaks off.
    """

    def __init__(self, text: str, column: int, problem: str, expected: str = "") -> None:
        self.text = text
        self.column = column
        super().__init__(problem, source="filter", field=f"column {column}", expected=expected)

    @property
    def caret(self) -> str:
        """Two lines for a terminal: the expression, or the part of it around the column, and a caret below."""
        start = max(0, self.column - 1 - _WIDTH // 2)
        end = start + _WIDTH
        before = ("..." if start else "") + _printable(self.text[start : self.column - 1])
        after = _printable(self.text[self.column - 1 : end]) + (
            "..." if end < len(self.text) else ""
        )
        return f"{before}{after}\n{' ' * sum(map(_cells, before))}^"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _cells(char: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
