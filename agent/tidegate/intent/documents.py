"""Text in HCL, JSON or YAML to objects, one per config entry, with the line of each key.

Knows where one entry ends and the next begins (a second `Kind` in HCL, an element of a list in JSON or YAML,
a YAML document), and bounds size and nesting. Knows nothing of what the fields mean.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tidegate.errors import InputError
from tidegate.intent import hcl, json_text
from tidegate.intent.hcl import MAX_DEPTH, MAX_TEXT, Block
from tidegate.intent.network_text import as_name

_COMMENT_OR_BLANK = re.compile(r"\s*(?:#.*)?$")
_YAML_START = re.compile(r"""---|%YAML|-\s|["']?[A-Za-z_][\w./-]*["']?\s*:(?:\s|$)""")
_YAML_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_YAML_FLOAT = re.compile(r"[-+]?(?:\d{1,18}\.\d{0,18}|\d{0,18}\.\d{1,18})(?:[eE][-+]?\d{1,3})?")
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What is not printable in YAML (YAML 1.2, 5.1), as libyaml has it."""

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
    return _objects(json_text.parse(text, source), source)


def _objects(value: Any, source: str) -> tuple[Block, ...]:
    """The objects that a value is or, as a list, holds."""
    entries = value if isinstance(value, list) else [value]
    for index, entry in enumerate(entries):
        if not isinstance(entry, Block):
            raise InputError(
                "is not an object", source=source, field=f"[{index}]", expected="{...}"
            )
    return tuple(entries)


def _too_deep(source: str, field: str) -> InputError:
    return InputError(
        "is nested too deeply", source=source, field=field, expected=f"at most {MAX_DEPTH} levels"
    )


_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it: thirty times as fast, which a file of the largest size needs."""


class _YamlReader:
    """Builds objects from YAML events: no tags, no aliases, numbers and words as in YAML 1.2."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._text = text
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=_YAML_LOADER)

    def documents(self) -> Iterator[Block]:
        while not isinstance(event := self._next(), yaml.StreamEndEvent):
            if isinstance(event, yaml.StreamStartEvent | yaml.DocumentEndEvent):
                continue
            start = self._next()
            value = self._value(start, 0)
            if isinstance(value, Block):
                yield value
            elif isinstance(value, list):
                yield from _objects(value, self._source)
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
            refused = _NOT_YAML.search(self._text)
            line = self._text.count("\n", 0, refused.start()) + 1 if refused else 0
            raise InputError(
                f"the character {refused.group()!r}" if refused else "is not YAML",
                source=self._source,
                field=f"line {line}" if refused else "",
                expected="text that YAML allows",
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
        return self._mapping(depth, _line(event))

    def _mapping(self, depth: int, line: int) -> Block:
        block = Block(line)
        while not isinstance(key := self._next(), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise self._error(key, "a key that is not a name", "a field name")
            if key.value in block:
                raise InputError(
                    "is set twice",
                    source=self._source,
                    field=f"line {_line(key)}: {as_name(key.value)}",
                    expected=f"one value (the first is on line {block.lines[key.value]})",
                )
            value = self._value(self._next(), depth + 1)
            block.put(key.value, value, _line(key))
        return block

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        if event.tag is not None:
            raise self._error(event, f"the tag {as_name(event.tag)}", "a plain value")
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
