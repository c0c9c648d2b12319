"""What a filter expression is: its tree, and the tree as text again.

Texts that mean the same give the same tree: `x contains y` is `y in x`, `not not x` is `x`, a selector may be
written with dots, brackets or as a JSON pointer, and a value is text however it was quoted. Columns are kept
for messages and make no difference between trees.
"""

import enum
import re
import unicodedata
from typing import TypeVar, assert_never

import msgspec

T = TypeVar("T")

IDENTIFIER = re.compile(r"[a-zA-Z][a-zA-Z0-9_/]*")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
INDEX = re.compile(r"[0-9]+")

_POINTER_PUNCTUATION = frozenset("-_.~:|")


class Operator(enum.StrEnum):
    """What a match asks of the value that its selector names."""

    EQUAL = "=="
    NOT_EQUAL = "!="
    IN = "in"
    """Also written `contains`, the other way round."""
    NOT_IN = "not in"
    IS_EMPTY = "is empty"
    IS_NOT_EMPTY = "is not empty"
    IS_NIL = "is nil"
    IS_NOT_NIL = "is not nil"
    MATCHES = "matches"
    """By a regular expression, anywhere in the value."""
    NOT_MATCHES = "not matches"


class Quantifier(enum.StrEnum):
    """Of how many elements of a list or keys of a map something has to be true."""

    ANY = "any"
    ALL = "all"


class Selector(msgspec.Struct, frozen=True, eq=False):
    """Names a value: fields, keys of maps and indexes of lists, from the outside in; never empty.

    Behind a first part that is no identifier all parts fit a JSON pointer: nothing else can begin so.
    `columns` has one for each part, counted from 1.
    """

    path: tuple[str, ...]
    columns: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selector) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __str__(self) -> str:
        first, *rest = self.path
        # Before another "not" the name would be taken for the operator.
        if not IDENTIFIER.fullmatch(first) or self.path == ("not",):
            return '"' + "".join(f"/{_pointer_segment(part)}" for part in self.path) + '"'
        return first + "".join(map(_step, rest))


class Value(msgspec.Struct, frozen=True, eq=False):
    """What is compared with: text, which becomes a number or a bool where the selected value is one."""

    text: str
    column: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text if NUMBER.fullmatch(self.text) else quoted(self.text)


class Binding(msgspec.Struct, frozen=True):
    """The names that the inner expression of `any` and `all` has for an element; "" where there is none.

    `each` is the element of a list but the key of a map (`as x`), `index` the index or key and `value` the
    element (`as i, x`, `as i, _`, `as _, x`). Either `each` is set, or one or both of the others.
    """

    each: str = ""
    index: str = ""
    value: str = ""

    def __str__(self) -> str:
        return self.each or f"{self.index or '_'}, {self.value or '_'}"

    def bind(self, *, each: T, index: T, value: T) -> dict[str, T]:
        """By name, what the names stand for."""
        pairs = ((self.each, each), (self.index, index), (self.value, value))
        return {name: meant for name, meant in pairs if name}


class _Node(msgspec.Struct, frozen=True):
    def __str__(self) -> str:
        """Text that parses to the same tree."""
        return render(self)  # type: ignore[arg-type]


class Match(_Node, frozen=True):
    """One question about one value. `value` is None for the operators that begin with "is"."""

    selector: Selector
    operator: Operator
    value: Value | None = None


class Collection(_Node, frozen=True):
    """Whether `inner` is true of any element, or of all."""

    quantifier: Quantifier
    selector: Selector
    binding: Binding
    inner: "Expression"


class Not(_Node, frozen=True):
    """True where `operand`, which is not a Not itself, is false. Make one with `negated`."""

    operand: "Expression"


class And(_Node, frozen=True):
    """True where all operands are; two or more."""

    operands: tuple["Expression", ...]


class Or(_Node, frozen=True):
    """True where one operand is; two or more."""

    operands: tuple["Expression", ...]


Expression = Match | Collection | Not | And | Or


def negated(expression: Expression) -> Expression:
    """The opposite of `expression`."""
    return expression.operand if isinstance(expression, Not) else Not(expression)


def render(expression: Expression) -> str:
    """The expression as text that parses to the same tree, here and in go-bexpr."""
    match expression:
        case Match(selector, operator, value):
            if value is None:
                return f"{selector} {operator}"
            if operator in (Operator.IN, Operator.NOT_IN):
                return f"{value} {operator} {selector}"
            return f"{selector} {operator} {value}"
        case Collection(quantifier, selector, binding, inner):
            return f"{quantifier} {selector} as {binding} {{ {render(inner)} }}"
        case Not(operand):
            return f"not {_grouped(operand, (And, Or, Collection))}"
        case And(operands):
            return " and ".join(_grouped(each, (And, Or, Collection)) for each in operands)
        case Or(operands):
            return " or ".join(_grouped(each, (Or, Collection)) for each in operands)
        case _:
            assert_never(expression)


def quoted(text: str) -> str:
    """`text` as a string of an expression, in double quotes or, where that spares escapes, in backticks.

    A text that could be read as a JSON pointer is in backticks too: go-bexpr takes the slash from its front
    otherwise.
    """
    simple = all(char.isprintable() for char in text)
    if simple and not re.search(r'["\\]|^/', text):
        return f'"{text}"'
    if simple and "`" not in text:
        return f"`{text}`"
    return '"' + "".join(_ESCAPES.get(char) or _escaped(char) for char in text) + '"'


def is_pointer_segment(text: str) -> bool:
    """Whether `text` can stand between the slashes of a JSON pointer: letters, digits and -_.~:|"""
    return bool(text) and all(
        char in _POINTER_PUNCTUATION or unicodedata.category(char)[0] in "LN" for char in text
    )


_ESCAPES = {'"': r"\x22", "\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def _escaped(char: str) -> str:
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _grouped(expression: Expression, looser: tuple[type, ...]) -> str:
    text = render(expression)
    return f"({text})" if isinstance(expression, looser) else text


def _step(part: str) -> str:
    if IDENTIFIER.fullmatch(part) or INDEX.fullmatch(part):
        return f".{part}"
    return f"[{quoted(part)}]"


def _pointer_segment(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")
