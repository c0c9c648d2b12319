"""What kind of object a filter expression is about.

A shape says of each field, by its name in Consul's JSON, what it holds. It tells which selectors exist, and
what a field is that JSON leaves out: empty in Go.
"""

import enum
from collections.abc import Mapping
from typing import Any, assert_never

import msgspec

from tidegate.intent.filtering.tree import INDEX


class Scalar(enum.Enum):
    """A single value. What is missing is "", 0 or false."""

    TEXT = "text"
    INTEGER = "a whole number"
    FLOAT = "a number"
    FLAG = "a bool"


class ListOf(msgspec.Struct, frozen=True):
    """A list. What is missing is nil, and empty."""

    element: "Shape"


class MapOf(msgspec.Struct, frozen=True):
    """An object with keys of any name. What is missing is nil, and empty; so is every key that it lacks."""

    value: "Shape"


class Record(msgspec.Struct, frozen=True):
    """An object with certain fields. What is missing has all of them, empty; if `optional`, it is nil."""

    fields: dict[str, "Shape"]
    optional: bool = False


class Anything(msgspec.Struct, frozen=True):
    """Any JSON. Every operator applies; a value that it cannot be asked of is like one that is missing."""


Shape = Scalar | ListOf | MapOf | Record | Anything

ANYTHING = Anything()

_SCALARS: dict[Any, Scalar] = {
    str: Scalar.TEXT,
    int: Scalar.INTEGER,
    float: Scalar.FLOAT,
    bool: Scalar.FLAG,
}


def shape_of(description: Any) -> Shape:
    """A shape from plain Python: str, int, float, bool, `object` for any JSON, `[x]` for a list of x,
    `{str: x}` for a map, `{"Name": x}` for a record, or a msgspec struct, whose names in JSON count.

    Raises TypeError for anything else.
    """
    match description:
        case Scalar() | ListOf() | MapOf() | Record() | Anything():
            return description
        case [element]:
            return ListOf(shape_of(element))
        case Mapping() if tuple(description) == (str,):
            return MapOf(shape_of(description[str]))
        case Mapping() if all(isinstance(name, str) for name in description):
            return Record({name: shape_of(inner) for name, inner in description.items()})
        case type() if description in _SCALARS:
            return _SCALARS[description]
        case type() if description is object:
            return ANYTHING
        case type() if issubclass(description, msgspec.Struct):
            return _from_type(msgspec.inspect.type_info(description), ())
        case _:
            raise TypeError(f"{description!r} does not describe what can be filtered")


def step_into(shape: Shape, part: str) -> Shape | None:
    """The shape of what `part` of a selector names in `shape`; None if there is no such thing."""
    match shape:
        case Record(fields):
            return fields.get(part)
        case MapOf(value):
            return value
        case ListOf(element):
            return element if INDEX.fullmatch(part) else step_into(element, part)
        case Anything():
            return shape
        case Scalar():
            return None
        case _:
            assert_never(shape)


def _from_type(kind: msgspec.inspect.Type, outer: tuple[type, ...]) -> Shape:
    """`outer` are the structs around this type: a struct within itself has no end."""
    match kind:
        case msgspec.inspect.StructType():
            if kind.cls in outer:
                raise TypeError(f"{kind.cls.__name__} contains itself")
            inner = (*outer, kind.cls)
            return Record(
                {field.encode_name: _from_type(field.type, inner) for field in kind.fields}
            )
        case msgspec.inspect.UnionType():
            types = [each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType)]
            if len(types) != 1:
                return ANYTHING
            shape = _from_type(types[0], outer)
            return Record(shape.fields, optional=True) if isinstance(shape, Record) else shape
        case msgspec.inspect.DictType():
            return MapOf(_from_type(kind.value_type, outer))
        case msgspec.inspect.CollectionType():
            return ListOf(_from_type(kind.item_type, outer))
        case msgspec.inspect.BoolType():
            return Scalar.FLAG
        case msgspec.inspect.IntType():
            return Scalar.INTEGER
        case msgspec.inspect.FloatType():
            return Scalar.FLOAT
        case msgspec.inspect.StrType() | msgspec.inspect.EnumType():
            return Scalar.TEXT
        case _:
            return ANYTHING
