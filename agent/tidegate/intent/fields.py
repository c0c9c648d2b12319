"""Field tables: how an object that a person or Consul wrote becomes a frozen struct, and back.

A `Shape` lists the fields of one object once, with Consul's name, the struct's attribute and the
type of the value; decoding, validation, "did you mean" and encoding follow from it. Names match as
in Consul (mapstructure): CamelCase or snake_case, any case, one-element lists for objects.
All faults of an input are collected. Knows nothing of particular kinds.
"""

import difflib
import enum
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from tidegate.errors import InputError, InputErrors
from tidegate.intent.hcl import Block

NAME_RULE = "1 to 63 of a-z, 0-9 and -, with no - at the start or end"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

MAX_META_PAIRS = 64
MAX_META_KEY = 128
MAX_META_VALUE = 512
"""Consul's limits (agent/structs/config_entry.go, validateConfigEntryMeta)."""

MAX_TEXT_VALUE = 4096

T = TypeVar("T")


class FaultOnLine(InputError):
    """A fault that knows its line in the input; 0 if there is none."""

    line = 0


class Place(NamedTuple):
    """Where in an input a value stands, and the list that faults go to."""

    faults: list[InputError]
    source: str
    path: str = ""
    line: int = 0

    def inside(self, name: str, line: int = 0) -> "Place":
        return self._replace(
            path=f"{self.path}.{name}" if self.path else name, line=line or self.line
        )

    def element(self, index: int) -> "Place":
        return self._replace(path=f"{self.path}[{index}]")

    def fault(self, problem: str, expected: str = "") -> None:
        where = [f"line {self.line}"] if self.line else []
        fault = FaultOnLine(
            problem,
            source=self.source,
            field=": ".join([*where, *([self.path] if self.path else [])]),
            expected=expected,
        )
        fault.line = self.line
        self.faults.append(fault)

    def raise_faults(self) -> None:
        """Raises what was collected: InputError for one fault, InputErrors for more."""
        if len(self.faults) > 1:
            raise InputErrors(tuple(self.faults))
        if self.faults:
            raise self.faults[0]


def is_name(text: str) -> bool:
    """Whether `text` can name a service: one DNS label (RFC 1123), for its SNI and SPIFFE URI."""
    return _NAME.fullmatch(text) is not None


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words, the one that was probably meant first: for "expected ..."."""
    words = list(known)
    match = difflib.get_close_matches(folded(word), [folded(known) for known in words], 1, 0.6)
    if match:
        return next(known for known in words if folded(known) == match[0])
    return "one of " + ", ".join(words)


def folded(name: str) -> str:
    """A field name without case and underscores: what two spellings of it have in common."""
    return name.replace("_", "").lower()


class Value(Protocol):
    """The type of a field's value."""

    def decode(self, raw: Any, place: Place) -> Any:
        """The value for the struct. What is wrong goes to `place`; the result is then unused."""

    def encode(self, value: Any) -> Any:
        """The value in Consul's JSON."""


class Text:
    """Any text up to MAX_TEXT_VALUE characters; a number is taken as its digits."""

    def decode(self, raw: Any, place: Place) -> str:
        if isinstance(raw, int | float) and not isinstance(raw, bool):
            raw = str(raw)
        if not isinstance(raw, str):
            place.fault(f"{described(raw)} is not text", "a string in quotes")
        elif len(raw) > MAX_TEXT_VALUE:
            place.fault(f"{len(raw)} characters", f"at most {MAX_TEXT_VALUE}")
        elif not is_unicode(raw):
            place.fault("a lone surrogate in the text", "Unicode text")
        else:
            return raw
        return ""

    def encode(self, value: str) -> str:
        return value


class Name(Text):
    """The name of a service."""

    def decode(self, raw: Any, place: Place) -> str:
        faults = len(place.faults)
        text = super().decode(raw, place)
        if len(place.faults) == faults and not is_name(text):
            place.fault(f"{text!r} is not a service name", NAME_RULE)
        return text


class NameOrWildcard(Name):
    """The name of a service, or "*" for all."""

    def decode(self, raw: Any, place: Place) -> str:
        return "*" if raw == "*" else super().decode(raw, place)


class Flag:
    """A bool, or what Consul takes for one (Go's strconv.ParseBool)."""

    _WORDS: ClassVar = {
        **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
        **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False", ""), False),
    }

    def decode(self, raw: Any, place: Place) -> bool:
        if isinstance(raw, bool):
            return raw
        value = self._WORDS.get(str(raw)) if isinstance(raw, str | int) else None
        if value is None:
            place.fault(f"{described(raw)} is not a bool", "true or false")
        return bool(value)

    def encode(self, value: bool) -> bool:
        return value


class Number:
    """A whole number within bounds, also as digits in a string."""

    def __init__(self, lowest: int, highest: int) -> None:
        self._lowest = lowest
        self._highest = highest

    def decode(self, raw: Any, place: Place) -> int:
        expected = f"a whole number from {self._lowest} to {self._highest}"
        if isinstance(raw, str) and re.fullmatch(r"[0-9]{1,20}", raw):
            raw = int(raw)
        if isinstance(raw, float) and raw.is_integer():
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int):
            place.fault(f"{described(raw)} is not a whole number", expected)
        elif not self._lowest <= raw <= self._highest:
            place.fault(f"{described(raw)} is out of range", expected)
        else:
            return raw
        return self._lowest

    def encode(self, value: int) -> int:
        return value


class Choice:
    """One of some words: the values of an enum; "" is None where the enum has no "" of its own."""

    def __init__(self, words: type[enum.StrEnum], message: str) -> None:
        self._words = words
        self._message = message

    def decode(self, raw: Any, place: Place) -> enum.StrEnum | None:
        if raw == "":
            return None
        try:
            return self._words(raw)
        except ValueError:
            place.fault(self._message.format(raw if isinstance(raw, str) else described(raw)))
            return None

    def encode(self, value: enum.StrEnum | None) -> str:
        return "" if value is None else str(value)


class Word:
    """One of some words, in any case, stored as listed; "" where nothing is said."""

    def __init__(self, words: tuple[str, ...], *, later: tuple[str, ...] = ()) -> None:
        self._words = words
        self._later = later

    def decode(self, raw: Any, place: Place) -> str:
        text = raw if isinstance(raw, str) else described(raw)
        for word in ("", *self._words):
            if text.lower() == word.lower():
                return word
        if text in self._later:
            place.fault(f"{text!r} is not supported yet", nearest(text, self._words))
        else:
            place.fault(f"{text!r} is not known here", nearest(text, self._words))
        return ""

    def encode(self, value: str) -> str:
        return value


class Words:
    """A list of words out of a set."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._word = Word(words)

    def decode(self, raw: Any, place: Place) -> tuple[str, ...]:
        if not isinstance(raw, list):
            place.fault(f"{described(raw)} is not a list", "a list of strings")
            return ()
        return tuple(
            self._word.decode(item, place.element(index)) for index, item in enumerate(raw)
        )

    def encode(self, value: tuple[str, ...]) -> list[str]:
        return list(value)


class TextMap:
    """Meta: text to text, within Consul's limits."""

    def decode(self, raw: Any, place: Place) -> dict[str, str]:
        fields = as_object(raw, place)
        if len(fields) > MAX_META_PAIRS:
            place.fault(f"{len(fields)} pairs", f"at most {MAX_META_PAIRS}")
        result = {}
        for key, value in fields.items():
            inner = place.inside(key[:MAX_META_KEY], line_of(fields, key))
            result[key] = Text().decode(value, inner)
            if not key or len(key) > MAX_META_KEY or not is_unicode(key):
                inner.fault("a bad key", f"1 to {MAX_META_KEY} characters")
            if len(result[key]) > MAX_META_VALUE:
                inner.fault("a value that is too long", f"at most {MAX_META_VALUE} characters")
        return result

    def encode(self, value: Mapping[str, str]) -> dict[str, str]:
        return dict(value)


class Opaque:
    """An object whose inside is not looked at, only that it can be written as JSON again."""

    def decode(self, raw: Any, place: Place) -> dict[str, Any]:
        fields = as_object(raw, place)
        try:
            plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(fields))
        except (ValueError, msgspec.MsgspecError):
            place.fault("a value that JSON cannot hold", "text, numbers, bools, lists, objects")
            return {}
        return plain

    def encode(self, value: dict[str, Any]) -> dict[str, Any]:
        return value


class OnlyDefault:
    """The name of a namespace or partition: only "default" exists so far."""

    def decode(self, raw: Any, place: Place) -> None:
        if raw not in ("", "default", None):
            place.fault(f"{described(raw)} is not supported yet", '"default" or nothing')

    def encode(self, value: None) -> None:
        raise AssertionError("never stored")


class OnlyName:
    """The name of an entry of which there is only one."""

    def __init__(self, name: str) -> None:
        self._name = name

    def decode(self, raw: Any, place: Place) -> None:
        if raw not in ("", self._name):
            place.fault(f"invalid name ({described(raw)})", f'"{self._name}"')

    def encode(self, value: None) -> None:
        raise AssertionError("never stored")


class Field(NamedTuple):
    """One field: Consul's name, the struct's attribute ("" when not stored), its type.

    `always` fields are written even when they say nothing.
    """

    name: str
    attribute: str
    value: Value
    always: bool = False


class Shape(Generic[T]):
    """The fields of one object, and the names in it that Consul knows and tidegate does not yet.

    `derived` names are Consul's own bookkeeping: accepted in input, and computed, not read.
    """

    def __init__(
        self,
        make: type[T],
        fields: tuple[Field, ...],
        *,
        later: tuple[str, ...] = (),
        derived: tuple[str, ...] = (),
    ) -> None:
        self._make = make
        self._fields = fields
        self._by_name = {folded(field.name): field for field in fields}
        self._later = {folded(name): name for name in later}
        self._derived = {folded(name) for name in derived}

    def decode(self, raw: Any, place: Place) -> T:
        """The struct; what is wrong goes to `place`, and the result is then unused."""
        values: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        fields = as_object(raw, place)
        for key, inner in fields.items():
            name = folded(key)
            at = place.inside(
                self._by_name[name].name if name in self._by_name else key[:MAX_META_KEY],
                line_of(fields, key),
            )
            if name in spelled:
                at.fault(f"is set twice, as {spelled[name]} and as {key}", "one value")
            spelled[name] = key
            if name in self._by_name:
                field = self._by_name[name]
                if inner is not None:
                    value = field.value.decode(inner, at)
                    if field.attribute:
                        values[field.attribute] = value
            elif name in self._later:
                if not says_nothing(inner):
                    at.fault(f"{self._later[name]} is not supported yet", "the entry without it")
            elif name not in self._derived:
                at.fault(
                    "is not a field here", nearest(key, (field.name for field in self._fields))
                )
        return self._make(**values)

    def encode(self, value: T) -> dict[str, Any]:
        """Consul's JSON object, in the order of the table, without what says nothing."""
        result = {}
        for field in self._fields:
            if not field.attribute:
                continue
            inner = field.value.encode(getattr(value, field.attribute))
            if field.always or inner:
                result[field.name] = inner
        return result


class Object(Generic[T]):
    """A nested object; None where it is missing."""

    def __init__(self, shape: Shape[T]) -> None:
        self._shape = shape

    def decode(self, raw: Any, place: Place) -> T:
        return self._shape.decode(raw, place)

    def encode(self, value: T | None) -> dict[str, Any]:
        return {} if value is None else self._shape.encode(value)


class Objects(Generic[T]):
    """A list of objects; a single one (an HCL block that is not repeated) is a list of one."""

    def __init__(self, shape: Shape[T]) -> None:
        self._shape = shape

    def decode(self, raw: Any, place: Place) -> tuple[T, ...]:
        if isinstance(raw, Mapping):
            raw = [raw]
        if not isinstance(raw, list):
            place.fault(f"{described(raw)} is not a list", "a list of objects")
            return ()
        return tuple(
            self._shape.decode(item, place.element(index)) for index, item in enumerate(raw)
        )

    def encode(self, value: tuple[T, ...]) -> list[dict[str, Any]]:
        return [self._shape.encode(item) for item in value]


def as_object(raw: Any, place: Place, expected: str = "fields in { }") -> Mapping[str, Any]:
    """`raw` as an object: itself, or the only element of a list; anything else is a fault."""
    if isinstance(raw, list) and len(raw) == 1:
        raw = raw[0]
    if isinstance(raw, list) and not raw:
        return {}
    if isinstance(raw, Mapping):
        return raw
    place.fault(f"{described(raw)} is not an object", expected)
    return {}


def line_of(fields: Mapping[str, Any], key: str) -> int:
    """The line on which `key` stands, 0 if not known."""
    return fields.lines.get(key, 0) if isinstance(fields, Block) else 0


def says_nothing(raw: Any) -> bool:
    """Whether a value is empty all through: what Consul writes for a field that nobody set."""
    if isinstance(raw, Mapping):
        return all(says_nothing(inner) for inner in raw.values())
    if isinstance(raw, list):
        return not raw
    return raw in (None, "", 0, False)


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8 (JSON escapes can smuggle lone surrogates in)."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def described(raw: Any) -> str:
    """A value as an error message shows it: short, on one line."""
    match raw:
        case Mapping():
            return "an object"
        case list():
            return "a list"
        case None:
            return "null"
        case bool():
            return "true" if raw else "false"
        case _:
            text = repr(raw)
            return text if len(text) <= 80 else text[:77] + "..."
