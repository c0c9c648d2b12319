"""How Go reads values: strings in quotes, whole numbers, floating-point numbers and bools, from text.

As Go's package strconv does it (Unquote, ParseInt with base 0, ParseFloat, ParseBool), by which go-bexpr
turns the value of an expression into the type of what it is compared with.
"""

import re

_FLAGS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}

_INTEGER = re.compile(
    r"[+-]?(?:0[bB](?:_?[01])+|0[oO]?(?:_?[0-7])+|0[xX](?:_?[0-9a-fA-F])+|0|[1-9](?:_?[0-9])*)"
)
_LOWEST, _HIGHEST = -(1 << 63), (1 << 64) - 1

_DIGITS = r"[0-9](?:_?[0-9])*"
_DECIMAL = re.compile(
    rf"[+-]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][+-]?{_DIGITS})?"
)
_SPECIAL = re.compile(r"nan|[+-]?inf(?:inity)?", re.IGNORECASE | re.ASCII)

_MOST_DIGITS = 400
"""More than any number of 64 bits needs, without an exponent. Reading digits takes time that grows by their square."""

_SIMPLE_ESCAPES = {
    "a": b"\a", "b": b"\b", "f": b"\f", "n": b"\n", "r": b"\r", "t": b"\t", "v": b"\v", "\\": b"\\",
}  # fmt: skip
_PLAIN = re.compile(r"[^\\\n]+")
_ESCAPE = re.compile(
    r"\\(?:(?P<simple>[abfnrtv\\])"
    r"|x(?P<byte>[0-9a-fA-F]{2})|(?P<octal>[0-3][0-7]{2})"
    r"|u(?P<short>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8}))"
)
_MAX_RUNE = 0x10FFFF


def parse_flag(text: str) -> bool | None:
    """The bool that `text` says, None if it says none."""
    return _FLAGS.get(text)


def parse_integer(text: str) -> int | None:
    """The whole number that `text` says, None if it says none.

    Within what 64 bits hold, with or without a sign. A leading 0 makes it octal, as in Go.
    """
    if len(text) > _MOST_DIGITS or not _INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("+-")
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] in "01234567_"
    number = int(digits, 8 if octal else 0)
    number = -number if text.startswith("-") else number
    return number if _LOWEST <= number <= _HIGHEST else None


def parse_float(text: str) -> float | None:
    """The floating-point number that `text` says in decimal, None if it says none or one out of range."""
    if len(text) > _MOST_DIGITS:
        return None
    if _SPECIAL.fullmatch(text):
        return float(text)
    if not _DECIMAL.fullmatch(text):
        return None
    number = float(text)
    return number if abs(number) != float("inf") else None


class BadEscape(ValueError):
    """A string in double quotes has something that Go does not allow there, at `offset`."""

    def __init__(self, offset: int, problem: str) -> None:
        self.offset = offset
        self.problem = problem
        super().__init__(problem)


def unquote(inside: str) -> str:
    """What stands between double quotes with its escapes resolved.

    Raises BadEscape for an escape that Go does not have, for the end of a line, and for escapes that make
    bytes which are not UTF-8.
    """
    result = bytearray()
    at = 0
    while at < len(inside):
        if plain := _PLAIN.match(inside, at):
            result += plain[0].encode()
            at = plain.end()
        elif escape := _ESCAPE.match(inside, at):
            result += _resolved(escape, at)
            at = escape.end()
        elif inside[at] == "\n":
            raise BadEscape(at, "a line ends inside a string in double quotes")
        else:
            raise BadEscape(at, f"unknown escape {inside[at : at + 2]}")
    try:
        return result.decode()
    except UnicodeDecodeError:
        raise BadEscape(0, "the escapes in this string make bytes that are not UTF-8") from None


def _resolved(escape: re.Match[str], at: int) -> bytes:
    groups = escape.groupdict()
    if groups["simple"]:
        return _SIMPLE_ESCAPES[groups["simple"]]
    if groups["byte"]:
        return bytes([int(groups["byte"], 16)])
    if groups["octal"]:
        return bytes([int(groups["octal"], 8)])
    rune = int(groups["short"] or groups["long"], 16)
    if rune > _MAX_RUNE or 0xD800 <= rune <= 0xDFFF:
        raise BadEscape(at, f"{escape[0]} is not a character")
    return chr(rune).encode()
