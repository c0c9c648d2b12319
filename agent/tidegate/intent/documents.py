"""Text in HCL, JSON or YAML to objects, one per config entry, with the line of each key if known.

Knows where one entry ends and the next begins (a second `Kind` in HCL, an element of a JSON array,
a YAML document), and bounds size and nesting. Knows nothing of what the fields mean.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from tidegate.errors import InputError
from tidegate.intent import hcl
from tidegate.intent.hcl import MAX_DEPTH, MAX_TEXT, Block

_COMMENT_OR_BLANK = re.compile(r"\s*(?:#.*)?$")
_AT = re.compile(r"( starting)? at$")
"""The end of some of json's messages, which go on with a place."""
_YAML_START = re.compile(r"""---|%YAML|["']?[A-Za-z_][\w./-]*["']?\s*:(?:\s|$)""")
_YAML_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_YAML_FLOAT = re.compile(r"[-+]?(?:\d{1,18}\.\d{0,18}|\d{0,18}\.\d{1,18})(?:[eE][-+]?\d{1,3})?")
_YAML_WORDS = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}


def read_documents(text: str, source: str) -> tuple[Block, ...]:
    """Every object in the text. Raises InputError with source, line and column."""
    if len(text) > MAX_TEXT:
        raise InputError(
            f"{len(text)} characters", source=source, expected=f"at most {MAX_TEXT} characters"
        )
    if text.lstrip("\ufeff \t\r\n").startswith(("{", "[")):
        return _read_json(text, source)
    if _looks_like_yaml(text):
        return tuple(_YamlReader(text, source).documents())
    return _read_hcl(text, source)


def _looks_like_yaml(text: str) -> bool:
    for line in text.splitlines():
        if not _COMMENT_OR_BLANK.match(line):
            return _YAML_START.match(line) is not None
    return False


def _read_hcl(text: str, source: str) -> tuple[Block, ...]:
    groups: list[list[hcl.Item]] = []
    kinds = 0
    for item in hcl.parse_items(text, source):
        starts_entry = item.key.lower() == "kind"
        if not groups or (starts_entry and kinds == len(groups)):
            groups.append([])
        kinds += starts_entry
        groups[-1].append(item)
    return tuple(hcl.gather(group, source) for group in groups)


def _read_json(text: str, source: str) -> tuple[Block, ...]:
    def block(pairs: list[tuple[str, Any]]) -> Block:
        result = Block()
        for key, value in pairs:
            if key in result:
                raise InputError("is set twice", source=source, field=key, expected="one value")
            result.put(key, value, 0)
        return result

    def constant(word: str) -> NoReturn:
        raise InputError(f"{word} is not JSON", source=source, expected="a number")

    try:
        value = json.loads(
            text.removeprefix("\ufeff"), object_pairs_hook=block, parse_constant=constant
        )
    except json.JSONDecodeError as error:
        raise InputError(
            _AT.sub("", error.msg[:1].lower() + error.msg[1:]),
            source=source,
            field=f"line {error.lineno}, column {error.colno}",
            expected="JSON",
        ) from error
    except ValueError as error:
        raise InputError(
            "a number that is too long", source=source, expected="at most 4300 digits"
        ) from error
    except RecursionError as error:
        raise _too_deep(source, "") from error
    _check_depth(value, source)
    entries = value if isinstance(value, list) else [value]
    for index, entry in enumerate(entries):
        if not isinstance(entry, Block):
            raise InputError(
                "is not an object", source=source, field=f"[{index}]", expected="{...}"
            )
    return tuple(entries)


def _check_depth(value: Any, source: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 2):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep(source, "")


def _too_deep(source: str, field: str) -> InputError:
    return InputError(
        "is nested too deeply", source=source, field=field, expected=f"at most {MAX_DEPTH} levels"
    )


class _YamlReader:
    """Builds objects from YAML events: no tags, no aliases, numbers and words as in YAML 1.2."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=yaml.SafeLoader)

    def documents(self) -> Iterator[Block]:
        while not isinstance(event := self._next(), yaml.StreamEndEvent):
            if isinstance(event, yaml.StreamStartEvent | yaml.DocumentEndEvent):
                continue
            start = self._next()
            value = self._value(start, 0)
            if isinstance(value, Block):
                yield value
            elif value is not None:
                raise self._error(
                    start, "is not a mapping", "fields such as `kind: ServiceDefaults`"
                )

    def _next(self) -> yaml.Event:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise InputError(
                error.problem or "is not YAML", source=self._source, field=where, expected="YAML"
            ) from error
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(
                "a character that YAML does not allow", source=self._source, expected="plain text"
            ) from error

    def _value(self, event: yaml.Event, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _too_deep(self._source, _place(event))
        if isinstance(event, yaml.AliasEvent):
            raise self._error(event, "an alias", "the value itself")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            values = []
            while not isinstance(inner := self._next(), yaml.SequenceEndEvent):
                values.append(self._value(inner, depth + 1))
            return values
        return self._mapping(depth)

    def _mapping(self, depth: int) -> Block:
        block = Block()
        while not isinstance(key := self._next(), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise self._error(key, "a key that is not a name", "a field name")
            if key.value in block:
                raise self._error(key, f"{key.value} is set twice", "one value")
            value = self._value(self._next(), depth + 1)
            block.put(key.value, value, _line(key))
        return block

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        if event.tag is not None:
            raise self._error(event, f"the tag {event.tag}", "a plain value")
        text = event.value
        if not event.implicit[0]:
            return text
        if text in _YAML_WORDS:
            return _YAML_WORDS[text]
        if _YAML_INT.fullmatch(text):
            return int(text)
        return float(text) if _YAML_FLOAT.fullmatch(text) else text

    def _error(self, event: yaml.Event, problem: str, expected: str) -> InputError:
        return InputError(problem, source=self._source, field=_place(event), expected=expected)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _place(event: yaml.Event) -> str:
    column = event.start_mark.column + 1 if event.start_mark else 0
    return f"line {_line(event)}, column {column}"
