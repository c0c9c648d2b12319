"""Field tables: how an object that a person or Consul wrote becomes a frozen struct, and back.

A `Shape` lists the fields of one object once, with Consul's name, the struct's attribute and the
type of the value; decoding, validation, "did you mean" and encoding follow from it. Names match as
in Consul (mapstructure): CamelCase or snake_case, any case, one-element lists for objects.
All faults of an input are collected. Knows nothing of particular kinds.
"""

import difflib
import enum
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from tidegate.errors import InputError, InputErrors
from tidegate.intent.hcl import Block
from tidegate.intent.network_text import as_name, canonical_address
from tidegate.model import DEFAULT_TENANT

NAME_RULE = "1 to 63 of a-z, 0-9 and -, with no - at the start or end"
_WILDCARD_RULE = f'{NAME_RULE}, or "*" alone'
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

MAX_META_PAIRS = 64
MAX_META_KEY = 128
MAX_META_VALUE = 512
"""Consul's limits (agent/structs/config_entry.go, validateConfigEntryMeta)."""

MAX_TEXT_VALUE = 4096

MAX_TOLD = 100
"""How many faults of one input are told at most."""

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
    lenient: bool = False
    """Whether what is not supported, or not known, is kept and no fault: it is from a server, which took it."""

    def inside(self, name: str, line: int = 0) -> "Place":
        shown = as_name(name) or '""'
        return self._replace(
            path=f"{self.path}.{shown}" if self.path else shown, line=line or self.line
        )

    def element(self, index: int, line: int = 0) -> "Place":
        return self._replace(path=f"{self.path}[{index}]", line=line or self.line)

    def of(self, raw: Any, *path: str | int) -> "Place":
        """The place of a field in the object `raw`, which stands here, by Consul's names: where it is, or would be."""
        if not path:
            return self
        first, *rest = path
        if isinstance(first, int):
            items = raw if isinstance(raw, list) else [raw]
            item = items[first] if first < len(items) else None
            return self.element(first, begin_of(item)).of(item, *rest)
        fields = raw[0] if isinstance(raw, list) and len(raw) == 1 else raw
        fields = fields if isinstance(fields, Mapping) else {}
        key = next((key for key in fields if folded(key) == folded(first)), "")
        return self.inside(first, line_of(fields, key)).of(fields.get(key), *rest)

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
        """Raises what was collected: InputError for one fault, InputErrors for more, of which the first are told."""
        if len(self.faults) > MAX_TOLD:
            more = InputError(f"and {len(self.faults) - MAX_TOLD} more faults", source=self.source)
            raise InputErrors((*self.faults[:MAX_TOLD], more))
        if len(self.faults) > 1:
            raise InputErrors(tuple(self.faults))
        if self.faults:
            raise self.faults[0]


def is_name(text: str) -> bool:
    """Whether `text` can name a service: one DNS label (RFC 1123), for its SNI and SPIFFE URI."""
    return _NAME.fullmatch(text) is not None


def nearest(word: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """What to write instead of `word`, for "expected ...": the known word that was probably meant, or all of them.

    `others` are known words too that nobody is told of who did not come close to one.
    """
    words = list(known)
    candidates = {folded(one): one for one in (*others, *words)}
    match = difflib.get_close_matches(folded(word), candidates, 1, 0.6)
    if match:
        return candidates[match[0]]
    if not words:
        return "nothing"
    return words[0] if len(words) == 1 else "one of " + ", ".join(words)


def folded(name: str) -> str:
    """A field name without case and underscores: what two spellings of it have in common."""
    return name.replace("_", "").lower()


class Value(Protocol):
    """The type of a field's value."""

    @property
    def holds(self) -> Any:
        """What Consul's JSON has there, in the plain Python that filtering.shapes.shape_of takes."""

    def decode(self, raw: Any, place: Place) -> Any:
        """The value for the struct. What is wrong goes to `place`; the result is then unused."""

    def encode(self, value: Any) -> Any:
        """The value in Consul's JSON."""


class Text:
    """Any text up to MAX_TEXT_VALUE characters; a number is taken as its digits."""

    holds: ClassVar = str

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

    _what = "a service name"
    _rule = NAME_RULE

    def decode(self, raw: Any, place: Place) -> str:
        faults = len(place.faults)
        text = super().decode(raw, place)
        # Consul has services of other names too, but a / would tell of another namespace.
        right = "/" not in text if place.lenient else is_name(text)
        if len(place.faults) == faults and not right:
            place.fault(f"{described(text)} is not {self._what}", self._rule)
        return text


class NameOrWildcard(Name):
    """The name of a service, or "*" for all."""

    _rule = _WILDCARD_RULE

    def decode(self, raw: Any, place: Place) -> str:
        return "*" if raw == "*" else super().decode(raw, place)


class Flag:
    """A bool, or what Consul takes for one (Go's strconv.ParseBool)."""

    holds: ClassVar = bool

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

    holds: ClassVar = int

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

    holds: ClassVar = str

    def __init__(self, words: type[enum.StrEnum], message: str) -> None:
        self._words = words
        self._message = message

    def decode(self, raw: Any, place: Place) -> enum.StrEnum | None:
        if raw == "":
            return None
        try:
            return self._words(raw)
        except ValueError:
            shown = as_name(raw) if isinstance(raw, str) else described(raw)
            place.fault(self._message.format(shown))
            return None

    def encode(self, value: enum.StrEnum | None) -> str:
        return "" if value is None else str(value)


class Word:
    """One of some words, in any case, stored as listed; "" where nothing is said."""

    holds: ClassVar = str

    def __init__(self, words: tuple[str, ...], *, refused: Mapping[str, str] | None = None) -> None:
        self._words = words
        self._refused = refused or {}

    def decode(self, raw: Any, place: Place) -> str:
        text = raw if isinstance(raw, str) else described(raw)
        for word in ("", *self._words):
            if text.lower() == word.lower():
                return word
        if place.lenient:
            return text
        if text in self._refused:
            place.fault(
                f"{text!r} is not supported: {self._refused[text]}", nearest(text, self._words)
            )
        else:
            place.fault(f"{text!r} is not known here", nearest(text, self._words))
        return ""

    def encode(self, value: str) -> str:
        return value


class ListOf(Generic[T]):
    """A list of values; a single one (an HCL block that is not repeated) is a list of one."""

    def __init__(self, item: "Value") -> None:
        self._item = item

    @property
    def holds(self) -> Any:
        return [self._item.holds]

    def decode(self, raw: Any, place: Place) -> tuple[T, ...]:
        if raw == "":
            return ()
        items = raw if isinstance(raw, list) else [raw]
        return tuple(
            self._item.decode(item, place.element(index, begin_of(item)))
            for index, item in enumerate(items)
        )

    def encode(self, value: tuple[T, ...]) -> list[Any]:
        return [self._item.encode(item) for item in value]


class MapOf:
    """An object with names of the writer's choice, and values of one type."""

    def __init__(self, item: "Value") -> None:
        self._item = item

    @property
    def holds(self) -> Any:
        return {str: self._item.holds}

    def decode(self, raw: Any, place: Place) -> dict[str, Any]:
        fields = as_object(raw, place)
        return {
            key: self._item.decode(value, place.inside(key, line_of(fields, key)))
            for key, value in fields.items()
        }

    def encode(self, value: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._item.encode(inner) for key, inner in value.items()}


class MaybeEmpty:
    """A value that may be "", which says nothing."""

    def __init__(self, value: "Value") -> None:
        self._value = value

    @property
    def holds(self) -> Any:
        return self._value.holds

    def decode(self, raw: Any, place: Place) -> Any:
        return "" if raw == "" else self._value.decode(raw, place)

    def encode(self, value: Any) -> Any:
        return value


class TextMap:
    """Meta: text to text, within Consul's limits."""

    holds: ClassVar = {str: str}

    def decode(self, raw: Any, place: Place) -> dict[str, str]:
        fields = as_object(raw, place)
        if len(fields) > MAX_META_PAIRS:
            place.fault(f"{len(fields)} pairs", f"at most {MAX_META_PAIRS}")
        result = {}
        for key, value in fields.items():
            inner = place.inside(key, line_of(fields, key))
            result[key] = Text().decode(value, inner)
            if not key or len(key) > MAX_META_KEY or not is_unicode(key):
                inner.fault("a bad key", f"1 to {MAX_META_KEY} characters")
            if len(result[key]) > MAX_META_VALUE:
                inner.fault("a value that is too long", f"at most {MAX_META_VALUE} characters")
        return result

    def encode(self, value: Mapping[str, str]) -> dict[str, str]:
        return dict(value)


class Opaque:
    """An object whose inside is not looked at, only that it can be written as JSON again.

    `refused` are names in it that would promise what nobody does, with the reason.
    """

    holds: ClassVar = object

    def __init__(self, refused: Mapping[str, str] | None = None) -> None:
        self._refused = refused or {}

    def decode(self, raw: Any, place: Place) -> dict[str, Any]:
        fields = as_object(raw, place)
        for key, inner in fields.items():
            if key in self._refused and not says_nothing(inner) and not place.lenient:
                at = place.inside(key, line_of(fields, key))
                at.fault(f"is not supported: {self._refused[key]}", "it left out")
        plain = self.plain(fields, place)
        return plain if isinstance(plain, dict) else {}

    def plain(self, raw: Any, place: Place) -> Any:
        """The value as JSON can hold it."""
        try:
            return msgspec.json.decode(msgspec.json.encode(raw))
        except (ValueError, msgspec.MsgspecError):
            place.fault("a value that JSON cannot hold", "text, numbers, bools, lists, objects")
            return None

    def encode(self, value: dict[str, Any]) -> dict[str, Any]:
        return value


class Duration:
    """A length of time as Go writes it, or nanoseconds; kept as it is written."""

    holds: ClassVar = object

    _TEXT: ClassVar = re.compile(r"[+-]?(?:0|(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h))+")

    def decode(self, raw: Any, place: Place) -> Any:
        is_number = isinstance(raw, int) and not isinstance(raw, bool)
        if is_number or (isinstance(raw, str) and self._TEXT.fullmatch(raw)):
            return raw
        place.fault(f"{described(raw)} is not a duration", 'one such as "10s"')
        return ""

    def encode(self, value: Any) -> Any:
        return value


class Address(Text):
    """An IP address in canonical form; "" says nothing."""

    def decode(self, raw: Any, place: Place) -> str:
        faults = len(place.faults)
        text = super().decode(raw, place)
        if not text or len(place.faults) > faults:
            return text
        try:
            return canonical_address(text)
        except InputError as error:
            place.fault(error.problem, error.expected)
            return ""


class Tenant(Name):
    """The name of a namespace or partition; "" is the default one."""

    _what = "a name of a namespace or partition"

    def decode(self, raw: Any, place: Place) -> str:
        return DEFAULT_TENANT if raw == "" else super().decode(raw, place)


class TenantOrWildcard(Tenant):
    """The name of a namespace, or "*" for all."""

    _rule = _WILDCARD_RULE

    def decode(self, raw: Any, place: Place) -> str:
        return "*" if raw == "*" else super().decode(raw, place)


class OnlyDefault:
    """The namespace of what holds for a whole partition."""

    holds: ClassVar = str

    def decode(self, raw: Any, place: Place) -> str:
        if raw not in ("", DEFAULT_TENANT):
            place.fault(
                f"{described(raw)} is not possible for what holds for a whole partition",
                f'"{DEFAULT_TENANT}" or nothing',
            )
        return DEFAULT_TENANT

    def encode(self, value: str) -> str:
        return value


class OnlyName:
    """The name of an entry of which there is only one."""

    holds: ClassVar = str

    def __init__(self, name: str) -> None:
        self._name = name

    def decode(self, raw: Any, place: Place) -> None:
        if raw not in ("", self._name):
            place.fault(f"invalid name ({described(raw)})", f'"{self._name}"')

    def encode(self, value: None) -> None:
        raise AssertionError("never stored")


KEPT = "rest"
"""Attribute of a struct that holds what tidegate only keeps: from Consul's name to the value in Consul's JSON."""


class Field(NamedTuple):
    """One field: Consul's name, the struct's attribute ("" when not stored, KEPT when only kept), its type.

    `always` fields are written even when they say nothing; those that are only kept are objects.
    """

    name: str
    attribute: str
    value: Value
    always: bool = False


class Shape(Generic[T]):
    """The fields of one object.

    `required` fields have to say something; what would be right goes with each. `refused` are names that Consul
    knows, with why tidegate cannot take what they say: kept silently, they would promise what nobody does.
    `derived` names are Consul's own bookkeeping: accepted, and computed, not read.
    """

    def __init__(
        self,
        make: Callable[..., T],
        fields: tuple[Field, ...],
        *,
        required: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        derived: tuple[str, ...] = (),
    ) -> None:
        self._make = make
        self._required = required or {}
        self._fields = fields
        self._by_name = {folded(field.name): field for field in fields}
        self._refused = {folded(name): (name, why) for name, why in (refused or {}).items()}
        self._derived = {folded(name) for name in derived}

    @property
    def holds(self) -> dict[str, Any]:
        """As Value.holds. What only a Consul server may have can hold anything."""
        others = {name: object for name, _ in self._refused.values()}
        return others | {field.name: field.value.holds for field in self._fields}

    def decode(self, raw: Any, place: Place) -> T:
        """The struct; what is wrong goes to `place`, and the result is then unused."""
        values: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        faults = len(place.faults)
        fields = as_object(raw, place)
        for key, inner in fields.items():
            name = folded(key)
            field = self._by_name.get(name)
            known = field.name if field else self._refused.get(name, (key, ""))[0]
            at = place.inside(known, line_of(fields, key))
            if name in spelled:
                at.fault(
                    f"is set twice, as {as_name(spelled[name])} and as {as_name(key)}", "one value"
                )
            spelled[name] = key
            if inner is None:
                continue
            if field is None:
                self._read_other(key, inner, at, rest)
                continue
            value = field.value.decode(inner, at)
            if field.attribute == KEPT:
                _keep(rest, field.name, field.value.encode(value))
            elif field.attribute:
                values[field.attribute] = value
        if len(place.faults) == faults and not place.lenient:
            self._check_required(fields, place)
        return self._make(**values, **({KEPT: rest} if rest else {}))

    def _check_required(self, fields: Mapping[str, Any], place: Place) -> None:
        said = {folded(key) for key, inner in fields.items() if inner not in (None, "")}
        for name, expected in self._required.items():
            if folded(name) not in said:
                place.inside(name).fault("is missing", expected)

    def _read_other(self, key: str, raw: Any, place: Place, rest: dict[str, Any]) -> None:
        """A field that is not in the table."""
        name, why = self._refused.get(folded(key), (key, ""))
        if folded(key) in self._derived or (why and says_nothing(raw)):
            return
        if place.lenient:
            _keep(rest, name, Opaque().plain(raw, place))
        elif why:
            place.fault(f"is not supported: {why}", "it left out")
        else:
            known = (one.name for one in self._fields)
            others = (name for name, _ in self._refused.values())
            # Looking for what was meant takes long, and nobody is told that much.
            told = len(place.faults) < MAX_TOLD
            place.fault("is not a field here", nearest(key, known, others) if told else "")

    def encode(self, value: T) -> dict[str, Any]:
        """Consul's JSON object, in the order of the table, without what says nothing."""
        rest = dict(getattr(value, KEPT, {}))
        result = {}
        for field in self._fields:
            if not field.attribute:
                continue
            if field.attribute == KEPT:
                inner = rest.pop(field.name, {})
                said = inner != {}
            else:
                inner = field.value.encode(getattr(value, field.attribute))
                said = bool(inner)
            if field.always or said:
                result[field.name] = inner
        return result | rest


def _keep(rest: dict[str, Any], name: str, value: Any) -> None:
    """Keeps what says something: Consul leaves out empty text, objects and lists, and false, but no 0."""
    if not (value is None or value is False or value in ("", {}, [])):
        rest[name] = value


class Record:
    """An object that is only kept: a dictionary of what it says, by Consul's names."""

    def __init__(
        self, *fields: tuple[str, Value], refused: Mapping[str, str] | None = None
    ) -> None:
        table = tuple(Field(name, KEPT, value) for name, value in fields)
        self._shape: Shape[dict[str, Any]] = Shape(_record, table, refused=refused)

    @property
    def holds(self) -> Any:
        return self._shape.holds

    def decode(self, raw: Any, place: Place) -> dict[str, Any]:
        return self._shape.decode(raw, place)

    def encode(self, value: dict[str, Any]) -> dict[str, Any]:
        return value


def _record(rest: dict[str, Any] | None = None) -> dict[str, Any]:
    return rest or {}


class Object(Generic[T]):
    """A nested object; None where it is missing."""

    def __init__(self, shape: Shape[T]) -> None:
        self._shape = shape

    @property
    def holds(self) -> Any:
        return self._shape.holds

    def decode(self, raw: Any, place: Place) -> T:
        return self._shape.decode(raw, place)

    def encode(self, value: T | None) -> dict[str, Any]:
        return {} if value is None else self._shape.encode(value)


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


def begin_of(raw: Any) -> int:
    """The line on which an object begins, 0 if not known or no object."""
    return raw.line if isinstance(raw, Block) else 0


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
