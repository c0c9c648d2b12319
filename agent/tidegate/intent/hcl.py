"""HCL1 as people write Consul's config entries: text in, nested dictionaries out.

Knows the notation only: assignments, blocks (with labels), lists, objects, heredocs and comments,
with or without newlines between them. Text that lost its newlines on the way through a web page is
read too (`= trueTransparentProxy {`). Knows nothing of config entries; bounds size and nesting.
"""

import bisect
import enum
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tidegate.errors import InputError
from tidegate.intent.network_text import as_name

MAX_TEXT = 512 << 10
"""Longest text that is read, in characters."""

MAX_DEPTH = 32
"""Deepest nesting of blocks, objects and lists."""


class Block(dict[str, Any]):
    """An object that remembers on which line it begins, and each of its keys stands (0: not known)."""

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}

    def put(self, key: str, value: Any, line: int) -> None:
        self[key] = value
        self.lines.setdefault(key, line)


class Item(NamedTuple):
    """One assignment or block, in the order of the text."""

    key: str
    value: Any
    line: int
    is_block: bool


def parse(text: str, source: str) -> Block:
    """The text as one object. A block is an object; a block that is repeated is a list of objects.

    Raises InputError with `source`, line and column, and what was expected there.
    """
    return gather(parse_items(text, source), source)


def parse_items(text: str, source: str) -> tuple[Item, ...]:
    """The assignments and blocks at the top of the text, in order; errors as of `parse`."""
    return tuple(_Parser(text, source).items())


def gather(items: Sequence[Item], source: str, line: int = 0) -> Block:
    """Items as the object that `parse` makes of them, which begins on `line`, or where its first item does.

    Raises InputError for a key set twice.
    """
    block = Block(line or (items[0].line if items else 0))
    repeated: set[str] = set()
    for key, value, line, is_block in items:
        if key not in block:
            block.put(key, value, line)
        elif is_block and key in repeated:
            block[key].append(value)
        elif is_block and isinstance(block[key], Block):
            block[key] = [block[key], value]
            repeated.add(key)
        else:
            raise InputError(
                "is set twice",
                source=source,
                field=f"line {line}: {as_name(key)}",
                expected=f"one value (the first is on line {block.lines[key]})",
            )
    return block


class _Kind(enum.Enum):
    WORD = "a name"
    STRING = "a string"
    NUMBER = "a number"
    ASSIGN = "'='"
    OPEN_BRACE = "'{'"
    CLOSE_BRACE = "'}'"
    OPEN_BRACKET = "'['"
    CLOSE_BRACKET = "']'"
    COMMA = "','"
    END = "the end of the text"


class _Token(NamedTuple):
    kind: _Kind
    value: Any
    offset: int


_BLANK = re.compile(r"(?:[ \t\r\n\ufeff]+|#[^\n]*|//[^\n]*)+")
_WORD = re.compile(r"[^\W\d][\w.-]*")
_NUMBER = re.compile(
    r"(?P<hex>-?0[xX][0-9a-fA-F]+)|(?P<float>-?\d+(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+))|(?P<int>-?\d+)"
)
_HEREDOC = re.compile(r"<<(?P<indented>-?)(?P<mark>[A-Za-z_]\w*)[ \t]*\r?\n")
_PLAIN_STRING = re.compile(r'[^"\\\n\r]*')
_BOOL = re.compile(r"(?:true|false)(?=[A-Z]|$)")
"""A bool, or one that is glued to the CamelCase name of the next field."""
_PUNCTUATION = {
    "=": _Kind.ASSIGN,
    "{": _Kind.OPEN_BRACE,
    "}": _Kind.CLOSE_BRACE,
    "[": _Kind.OPEN_BRACKET,
    "]": _Kind.CLOSE_BRACKET,
    ",": _Kind.COMMA,
}
LETTER_ESCAPES = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\\": "\\",
    '"': '"',
}
"""What letters mean behind a backslash (strconv.Quote of Go, which HCL and Kubernetes write by)."""
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_OCTAL_ESCAPE = re.compile(r"[0-7]{3}")


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._at = 0
        self._token = _Token(_Kind.END, None, 0)
        if len(text) > MAX_TEXT:
            raise InputError(
                f"{len(text)} characters", source=source, expected=f"at most {MAX_TEXT} characters"
            )
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._advance()

    # Grammar.

    def items(self) -> Iterator[Item]:
        """The items up to the end of the text."""
        while self._token.kind is not _Kind.END:
            yield self._item(0)

    def _item(self, depth: int) -> Item:
        key = self._token
        if key.kind not in (_Kind.WORD, _Kind.STRING):
            raise self._unexpected("the name of a field or a block")
        self._advance()
        line = self._line(key.offset)
        match self._token.kind:
            case _Kind.ASSIGN:
                self._advance()
                return Item(key.value, self._value(depth + 1), line, is_block=False)
            case _Kind.OPEN_BRACE:
                return Item(key.value, self._object(depth + 1), line, is_block=True)
            case _Kind.WORD | _Kind.STRING:
                label = self._item_of_label(depth + 1)
                return Item(key.value, gather([label], self._source), line, is_block=True)
        raise self._unexpected(f"'=' or '{{' after {key.value!r}")

    def _item_of_label(self, depth: int) -> Item:
        self._check_depth(depth)
        label = self._item(depth)
        if not label.is_block:
            raise self._unexpected(f"a block after the label {label.key!r}")
        return label

    def _value(self, depth: int) -> Any:
        token = self._token
        match token.kind:
            case _Kind.STRING | _Kind.NUMBER:
                self._advance()
                return token.value
            case _Kind.WORD if match := _BOOL.match(token.value):
                self._at = token.offset + match.end()
                self._advance()
                return match.group() == "true"
            case _Kind.WORD:
                raise self._error(
                    f"{token.value!r} is not a value",
                    f'true, false or a string in quotes: "{token.value}"',
                )
            case _Kind.OPEN_BRACE:
                return self._object(depth)
            case _Kind.OPEN_BRACKET:
                return self._list(depth)
        raise self._unexpected("a value")

    def _object(self, depth: int) -> Block:
        self._check_depth(depth)
        opened = self._token
        self._advance()
        items: list[Item] = []
        while self._token.kind is not _Kind.CLOSE_BRACE:
            if self._token.kind is _Kind.END:
                raise self._unexpected(f"'}}' for the '{{' on line {self._line(opened.offset)}")
            items.append(self._item(depth))
            if self._token.kind is _Kind.COMMA:
                self._advance()
        self._advance()
        return gather(items, self._source, self._line(opened.offset))

    def _list(self, depth: int) -> list[Any]:
        self._check_depth(depth)
        opened = self._token
        values: list[Any] = []
        self._advance()
        while not self._closes_list():
            values.append(self._value(depth + 1))
            if self._token.kind is _Kind.COMMA:
                self._advance()
            elif not self._closes_list():
                line = self._line(opened.offset)
                raise self._unexpected(f"',' or ']' for the '[' on line {line}")
        self._advance()
        return values

    def _closes_list(self) -> bool:
        return self._token.kind is _Kind.CLOSE_BRACKET

    def _check_depth(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error("is nested too deeply", f"at most {MAX_DEPTH} levels")

    # Tokens.

    def _advance(self) -> None:
        """Reads the next token."""
        self._skip_blank()
        text, at = self._text, self._at
        if at == len(text):
            self._token = _Token(_Kind.END, None, at)
            return
        char = text[at]
        if char in _PUNCTUATION:
            self._at += 1
            self._token = _Token(_PUNCTUATION[char], char, at)
        elif char == '"':
            self._token = _Token(_Kind.STRING, self._string(), at)
        elif char == "<":
            self._token = _Token(_Kind.STRING, self._heredoc(), at)
        elif number := _NUMBER.match(text, at):
            self._at = number.end()
            self._token = _Token(_Kind.NUMBER, self._number(number), at)
        elif word := _WORD.match(text, at):
            self._at = word.end()
            self._token = _Token(_Kind.WORD, word.group(), at)
        else:
            raise self._error(f"the character {char!r}", "a name, a value or a comment", at)

    def _skip_blank(self) -> None:
        while True:
            if blank := _BLANK.match(self._text, self._at):
                self._at = blank.end()
            if not self._text.startswith("/*", self._at):
                return
            end = self._text.find("*/", self._at + 2)
            if end < 0:
                raise self._error("a comment that does not end", "'*/'", self._at)
            self._at = end + 2

    def _number(self, match: re.Match[str]) -> int | float:
        digits = match.group()
        if len(digits) > 32:
            raise self._error("a number that is too long", "at most 32 digits", match.start())
        if match["hex"]:
            return int(digits, 16)
        return float(digits) if match["float"] else int(digits)

    def _string(self) -> str:
        start = self._at
        parts: list[str] = []
        self._at += 1
        while True:
            plain = _PLAIN_STRING.match(self._text, self._at)
            assert plain is not None  # noqa: S101 - the pattern matches the empty string
            parts.append(plain.group())
            self._at = plain.end()
            if self._text.startswith('"', self._at):
                self._at += 1
                return "".join(parts)
            if not self._text.startswith("\\", self._at):
                raise self._error("a string that does not end on its line", "'\"'", start)
            parts.append(self._escape())

    def _escape(self) -> str:
        at = self._at
        letter = self._text[at + 1 : at + 2]
        if letter in LETTER_ESCAPES:
            self._at += 2
            return LETTER_ESCAPES[letter]
        if octal := _OCTAL_ESCAPE.match(self._text, at + 1):
            self._at = octal.end()
            return self._character(int(octal.group(), 8), at)
        digits = self._text[at + 2 : at + 2 + _HEX_ESCAPES.get(letter, 0)]
        if not digits or not re.fullmatch(rf"[0-9a-fA-F]{{{_HEX_ESCAPES[letter]}}}", digits):
            raise self._error(
                f"the escape {self._text[at : at + 2]!r}", r"one like \n, \", \\ or \u00e9", at
            )
        self._at += 2 + len(digits)
        return self._character(int(digits, 16), at)

    def _character(self, code: int, at: int) -> str:
        if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self._error(f"the character number {code:#x}", "a Unicode character", at)
        return chr(code)

    def _heredoc(self) -> str:
        start = self._at
        opening = _HEREDOC.match(self._text, start)
        if opening is None:
            raise self._error("the character '<'", "a value or a heredoc such as <<EOF", start)
        end = re.compile(rf"^[ \t]*{opening['mark']}[ \t]*\r?$", re.MULTILINE)
        closing = end.search(self._text, opening.end())
        if closing is None:
            raise self._error(
                "a heredoc that does not end", f"a line with {opening['mark']} alone", start
            )
        self._at = closing.end()
        body = self._text[opening.end() : closing.start()]
        return _without_indent(body) if opening["indented"] else body

    # Errors.

    def _line(self, offset: int) -> int:
        return bisect.bisect_left(self._newlines, offset) + 1

    def _unexpected(self, expected: str) -> InputError:
        found = self._token.kind
        shown = repr(self._token.value) if found in (_Kind.WORD, _Kind.STRING) else found.value
        return self._error(f"found {shown}", expected)

    def _error(self, problem: str, expected: str, offset: int | None = None) -> InputError:
        at = self._token.offset if offset is None else offset
        column = at - (self._text.rfind("\n", 0, at) + 1) + 1
        return InputError(
            problem,
            source=self._source,
            field=f"line {self._line(at)}, column {column}",
            expected=expected,
        )


def _without_indent(body: str) -> str:
    lines = body.splitlines(keepends=True)
    indents = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
    width = min(indents, default=0)
    return "".join(line[width:] if line.strip() else line.lstrip(" \t") for line in lines)
