"""Whether a filter expression can apply to what it filters: selectors, operators and values.

By go-bexpr's rules: what a shape does not have is refused before anything is filtered, and so is an operator
that a field does not take, or a value that is no number where the field is one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, assert_never

from tidegate.intent.fields import described, nearest
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.shapes import (
    Anything,
    ListOf,
    MapOf,
    Record,
    Scalar,
    Shape,
    step_into,
)
from tidegate.intent.filtering.tree import (
    And,
    Binding,
    Collection,
    Expression,
    Match,
    Not,
    Operator,
    Or,
    Selector,
)
from tidegate.intent.filtering.values import parse_flag, parse_float, parse_integer

_EQUALITY = (Operator.EQUAL, Operator.NOT_EQUAL)
_MEMBERSHIP = (Operator.IN, Operator.NOT_IN)
_EMPTINESS = (Operator.IS_EMPTY, Operator.IS_NOT_EMPTY)
_NIL = (Operator.IS_NIL, Operator.IS_NOT_NIL)
_PATTERN = (Operator.MATCHES, Operator.NOT_MATCHES)


def check(expression: Expression, shape: Shape, text: str) -> None:
    """Raises FilterError unless every selector names something in `shape` that its operator applies to.

    `text` is what the expression was parsed from, for the message.
    """
    _Checker(text, shape).check(expression, {})


class _Checker:
    def __init__(self, text: str, shape: Shape) -> None:
        self._text = text
        self._shape = shape

    def check(self, expression: Expression, names: Mapping[str, Shape]) -> None:
        """`names` has the shapes of what enclosing `any` and `all` have named."""
        match expression:
            case Match():
                self._check_match(expression, self._selected(expression.selector, names))
            case Collection(_, selector, binding, inner):
                bound = self._bound(selector, binding, self._selected(selector, names))
                self.check(inner, {**names, **bound})
            case Not(operand):
                self.check(operand, names)
            case And(operands) | Or(operands):
                for operand in operands:
                    self.check(operand, names)
            case _:
                assert_never(expression)

    def _selected(self, selector: Selector, names: Mapping[str, Shape]) -> Shape:
        """The shape of what the selector names; a name goes before a field."""
        first, *rest = selector.path
        shape = names.get(first) or step_into(self._shape, first)
        if shape is None:
            raise self._unknown_part(selector, 0, self._shape, names)
        for depth, part in enumerate(rest, 1):
            inner = step_into(shape, part)
            if inner is None:
                raise self._unknown_part(selector, depth, shape, ())
            shape = inner
        return shape

    def _bound(self, selector: Selector, binding: Binding, shape: Shape) -> dict[str, Shape]:
        match shape:
            case ListOf(element):
                return binding.bind(each=element, index=Scalar.INTEGER, value=element)
            case MapOf(value):
                return binding.bind(each=Scalar.TEXT, index=Scalar.TEXT, value=value)
            case Anything():
                return binding.bind(each=shape, index=shape, value=shape)
            case Scalar() | Record():
                problem = f"{_dotted(selector.path)} is {_kind_of(shape)}"
                raise self._fault(selector.columns[-1], problem, "a list or a map")
            case _:
                assert_never(shape)

    def _check_match(self, match: Match, shape: Shape) -> None:
        selector, operator, value = match.selector, match.operator, match.value
        operators = _operators_of(shape)
        if operator not in operators:
            named = f"{_dotted(selector.path)} is {_kind_of(shape)}"
            problem = f'{named}, which does not take "{operator}"'
            raise self._fault(selector.columns[-1], problem, ", ".join(operators))
        compared = shape.element if isinstance(shape, ListOf) else shape
        if value is None or not isinstance(compared, Scalar) or compared is Scalar.TEXT:
            return
        wanted = _READERS[compared]
        if wanted.read(value.text) is None:
            problem = (
                f"{described(value.text)} is not {compared.value}, as {_dotted(selector.path)} is"
            )
            raise self._fault(value.column, problem, wanted.example)

    def _unknown_part(
        self, selector: Selector, depth: int, shape: Shape, names: Iterable[str]
    ) -> FilterError:
        while isinstance(shape, ListOf):
            shape = shape.element
        column, part, before = selector.columns[depth], selector.path[depth], selector.path[:depth]
        if isinstance(shape, Record):
            where = f"of {_dotted(before)}" if before else "here"
            known = nearest(part, (*names, *shape.fields))
            return self._fault(column, f"{described(part)} is not a field {where}", known)
        what = _dotted(before) if before else "what is filtered"
        return self._fault(column, f"{what} is {_kind_of(shape)}, which has no fields", "no field")

    def _fault(self, column: int, problem: str, expected: str) -> FilterError:
        return FilterError(self._text, column, problem, expected)


class _Reader(NamedTuple):
    """How the text of a value becomes a scalar (None: it is none), and what such a text looks like."""

    read: Callable[[str], int | float | None]
    example: str


_READERS = {
    Scalar.INTEGER: _Reader(parse_integer, "digits"),
    Scalar.FLOAT: _Reader(parse_float, "a number such as 1.5"),
    Scalar.FLAG: _Reader(parse_flag, "true or false"),
}


def _operators_of(shape: Shape) -> tuple[Operator, ...]:
    match shape:
        case Scalar.TEXT:
            return (*_EQUALITY, *_MEMBERSHIP, *_PATTERN, *_EMPTINESS)
        case Scalar():
            return _EQUALITY
        case ListOf(Scalar() | Anything()) | MapOf():
            return (*_MEMBERSHIP, *_EMPTINESS, *_NIL)
        case ListOf():
            return (*_EMPTINESS, *_NIL)
        case Record():
            return _NIL
        case Anything():
            return tuple(Operator)
        case _:
            assert_never(shape)


def _kind_of(shape: Shape) -> str:
    match shape:
        case Scalar():
            return shape.value
        case ListOf():
            return "a list"
        case MapOf():
            return "a map"
        case Record():
            return "an object"
        case Anything():
            return "any JSON"
        case _:
            assert_never(shape)


def _dotted(path: tuple[str, ...]) -> str:
    text = ".".join(path)
    return text if len(text) <= 60 else text[:57] + "..."
