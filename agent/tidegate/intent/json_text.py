"""JSON as RFC 8259 has it: text in, nested dictionaries out that know the line of each key.

Bounds nesting and the length of numbers, refuses a key that is set twice. What Python's own reader
leaves out, and messages need, are the places. Knows nothing of config entries.
"""

import bisect
import json
import math
import re
from typing import Any, Final

from tidegate.errors import InputError
from tidegate.intent.hcl import MAX_DEPTH, Block
from tidegate.intent.network_text import as_name

_BLANK: Final = re.compile(r"[ \t\r\n]*")
_NUMBER: Final = re.compile(
    r"(?P<whole>-?(?:0|[1-9][0-9]*))(?P<fraction>\.[0-9]+)?(?P<exponent>[eE][-+]?[0-9]+)?"
)
_WORDS: Final = {"true": True, "false": False, "null": None}
_WORD: Final = re.compile(r"[A-Za-z_][\w-]*")
_STRINGS: Final = json.JSONDecoder()
"""Reads a string, where one begins."""

_MAX_DIGITS: Final = 32
_AT: Final = re.compile(r"( starting)? at$")
"""The end of some of the messages about strings, which go on with a place."""


def parse(text: str, source: str) -> Any:
    """The value in the text. Raises InputError with `source`, line and column, and what was expected there."""
    return _Reader(text, source).whole()


class _Reader:
    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]

    def whole(self) -> Any:
        self._at = len(self._text) - len(self._text.lstrip("\ufeff"))
        value = self._value(0)
        if self._skip_blank():
            raise self._unexpected("the end of the text")
        return value

    def _value(self, depth: int) -> Any:
        char = self._skip_blank()
        if char in ("{", "["):
            if depth >= MAX_DEPTH:
                raise self._error("is nested too deeply", f"at most {MAX_DEPTH} levels")
            return self._object(depth + 1) if char == "{" else self._list(depth + 1)
        if char == '"':
            return self._string()
        if number := _NUMBER.match(self._text, self._at):
            return self._number(number)
        if (word := _WORD.match(self._text, self._at)) and word.group() in _WORDS:
            self._at = word.end()
            return _WORDS[word.group()]
        raise self._unexpected("a value")

    def _object(self, depth: int) -> Block:
        opened = self._line()
        block = Block(opened)
        self._at += 1
        if self._skip_blank() == "}":
            self._at += 1
            return block
        while True:
            if self._skip_blank() != '"':
                raise self._unexpected('a name in quotes, such as "Kind"')
            line, key = self._line(), self._string()
            if key in block:
                raise InputError(
                    "is set twice",
                    source=self._source,
                    field=f"line {line}: {as_name(key)}",
                    expected=f"one value (the first is on line {block.lines[key]})",
                )
            if self._skip_blank() != ":":
                raise self._unexpected(f"':' after {json.dumps(key)}")
            self._at += 1
            block.put(key, self._value(depth), line)
            if self._ends("}", opened):
                return block

    def _list(self, depth: int) -> list[Any]:
        opened = self._line()
        values: list[Any] = []
        self._at += 1
        if self._skip_blank() == "]":
            self._at += 1
            return values
        while True:
            values.append(self._value(depth))
            if self._ends("]", opened):
                return values

    def _ends(self, close: str, opened: int) -> bool:
        """Reads what follows a value: whether that is `close` and not a comma."""
        char = self._skip_blank()
        if char not in (close, ","):
            raise self._unexpected(f"',' or '{close}' for the '{_OPENS[close]}' on line {opened}")
        self._at += 1
        return char == close

    def _string(self) -> str:
        try:
            text, self._at = _STRINGS.raw_decode(self._text, self._at)
        except json.JSONDecodeError as error:
            self._at = error.pos
            problem = _AT.sub("", error.msg[:1].lower() + error.msg[1:])
            raise self._error(problem, "JSON") from error
        return str(text)

    def _number(self, match: re.Match[str]) -> int | float:
        if len(match.group()) > _MAX_DIGITS:
            raise self._error("a number that is too long", f"at most {_MAX_DIGITS} digits")
        value: int | float = int(match["whole"])
        if match["fraction"] or match["exponent"]:
            value = float(match.group())
        if math.isinf(value):
            raise self._error("a number that is too large", "a number up to 1.8e308")
        self._at = match.end()
        return value

    def _skip_blank(self) -> str:
        """Goes to the next character that means something, and tells it: "" at the end."""
        blank = _BLANK.match(self._text, self._at)
        self._at = blank.end() if blank else self._at
        return self._text[self._at : self._at + 1]

    def _line(self) -> int:
        return bisect.bisect_left(self._newlines, self._at) + 1

    def _unexpected(self, expected: str) -> InputError:
        word = _WORD.match(self._text, self._at)
        found = word.group()[:40] if word else self._text[self._at : self._at + 1]
        return self._error(f"found {found!r}" if found else "found the end of the text", expected)

    def _error(self, problem: str, expected: str) -> InputError:
        column = self._at - (self._text.rfind("\n", 0, self._at) + 1) + 1
        return InputError(
            problem,
            source=self._source,
            field=f"line {self._line()}, column {column}",
            expected=expected,
        )


_OPENS: Final = {"}": "{", "]": "["}
