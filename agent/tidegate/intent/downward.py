"""Annotations and labels as Kubernetes writes them into files of a pod (the downward API): name="value", one a line.

Values are Go's quoted strings (kubernetes pkg/fieldpath, FormatMap: %q), so that one of several lines is one line.
"""

import re
from collections.abc import Callable
from typing import Final

from tidegate.errors import InputError
from tidegate.intent.hcl import LETTER_ESCAPES
from tidegate.intent.network_text import shown

_LINE: Final = re.compile(r'(?P<name>[^=\s"]+)="(?P<value>(?:[^"\\]|\\.)*)"')
_ESCAPE: Final = re.compile(
    r"\\(?:x(?P<byte>[0-9a-f]{2})|u(?P<short>[0-9a-f]{4})|U(?P<long>[0-9a-f]{8})|(?P<letter>.))"
)
_EXPECTED: Final = 'name="value", as the downward API writes it'


def parse(text: str, source: str) -> dict[str, str]:
    """The annotations or labels of a file. InputError with the line that is none."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            problem = f"{shown(line)} is no annotation or label"
            raise InputError(problem, source=source, field=f"line {number}", expected=_EXPECTED)
        found[match["name"]] = _unquoted(match["value"], _fault(source, number))
    return found


def _unquoted(text: str, fault: Callable[[str], InputError]) -> str:
    def meant(escape: re.Match[str]) -> str:
        if escape["byte"]:
            # Bytes that are no UTF-8; what is made of them can be no value that anybody means.
            return "\N{REPLACEMENT CHARACTER}"
        code = escape["short"] or escape["long"]
        if code:
            if int(code, 16) > 0x10FFFF:
                raise fault(escape[0])
            return chr(int(code, 16))
        if escape["letter"] not in LETTER_ESCAPES:
            raise fault(escape[0])
        return LETTER_ESCAPES[escape["letter"]]

    return _ESCAPE.sub(meant, text)


def _fault(source: str, number: int) -> Callable[[str], InputError]:
    def fault(escape: str) -> InputError:
        problem = f"{shown(escape)} stands for nothing"
        return InputError(problem, source=source, field=f"line {number}", expected=_EXPECTED)

    return fault
