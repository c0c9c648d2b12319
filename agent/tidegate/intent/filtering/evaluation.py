"""Whether a filter expression is true of an object in Consul's JSON, as go-bexpr decides.

* A field that JSON leaves out is empty: "", 0, false, no elements. Only a shape can tell; without one a
  missing field is absent.
* Of what is absent (a key that a map lacks, a field of a missing optional object, an index beyond a list)
  ==, in, matches, "is not empty" and "is not nil" are false, their opposites true.
* A selector that leads through a list means any of its elements, unless it gives an index:
  `Sources.Name != web` is true where one source is not web, `not Sources.Name == web` where none is.
* A value is compared as what it is compared with. What cannot be compared is not equal.

Nested `any` and `all` multiply, so what evaluation may cost is bounded.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, assert_never

from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.patterns import compiled
from tidegate.intent.filtering.shapes import (
    ANYTHING,
    Anything,
    ListOf,
    MapOf,
    Record,
    Scalar,
    Shape,
    step_into,
)
from tidegate.intent.filtering.tree import (
    INDEX,
    And,
    Binding,
    Collection,
    Expression,
    Match,
    Not,
    Operator,
    Or,
    Quantifier,
    Selector,
)
from tidegate.intent.filtering.values import parse_flag, parse_float, parse_integer

MAX_STEPS = 200_000
"""Values that may be looked at to filter one list: about a second."""

_TEXT_PER_STEP = 1_000
"""Characters in which other text is looked for in one step."""

_EMPTY = {Scalar.TEXT: "", Scalar.INTEGER: 0, Scalar.FLOAT: 0.0, Scalar.FLAG: False}

_MOST_DIGITS = 10
"""No list has an index with more."""

_OPPOSITES = {
    Operator.NOT_EQUAL: Operator.EQUAL,
    Operator.NOT_IN: Operator.IN,
    Operator.IS_NOT_EMPTY: Operator.IS_EMPTY,
    Operator.IS_NOT_NIL: Operator.IS_NIL,
    Operator.NOT_MATCHES: Operator.MATCHES,
}
"""The operators that say "not", and what they deny."""

_TRUE_OF_ABSENT = (Operator.IS_EMPTY, Operator.IS_NIL)


class Steps:
    """How many values evaluation may still look at, over one object or many."""

    def __init__(self, text: str, limit: int = MAX_STEPS) -> None:
        """`text` is the expression, for the message."""
        self._text = text
        self._left = limit

    def take(self, count: int = 1) -> None:
        """Raises FilterError when not as many are left."""
        self._left -= count
        if self._left < 0:
            problem = "this takes too long for so much data"
            expected = "a shorter expression, or fewer any and all within each other"
            raise FilterError(self._text, 1, problem, expected)


def matches(
    expression: Expression, value: Any, shape: Shape = ANYTHING, steps: Steps | None = None
) -> bool:
    """Whether the expression is true of `value`: dicts, lists, str, int, float, bool and None.

    `shape` is the one that the expression was checked against. Raises FilterError if that takes more than
    `steps` (None: MAX_STEPS).
    """
    steps = steps or Steps(str(expression))
    return _holds(expression, _Scope(_Found(value, shape), {}, steps))


class _Found(NamedTuple):
    """A value in an object, and its shape. None is what JSON leaves out."""

    value: Any
    shape: Shape

    def field(self, name: str, value: Any) -> "_Found":
        return _Found(value, step_into(self.shape, name) or ANYTHING)

    def element(self, value: Any) -> "_Found":
        return _Found(value, self.shape.element if isinstance(self.shape, ListOf) else ANYTHING)


class _Scope(NamedTuple):
    """What selectors begin at: the names that `any` and `all` gave, then the fields of the whole object."""

    root: _Found
    names: Mapping[str, _Found]
    steps: Steps


def _holds(expression: Expression, scope: _Scope) -> bool:
    match expression:
        case Or(operands):
            return any(_holds(operand, scope) for operand in operands)
        case And(operands):
            return all(_holds(operand, scope) for operand in operands)
        case Not(operand):
            return not _holds(operand, scope)
        case Match(selector):
            return any(_is_match(expression, found, scope) for found in _selected(selector, scope))
        case Collection(_, selector):
            return any(_is_so_of(expression, found, scope) for found in _selected(selector, scope))
        case _:
            assert_never(expression)


def _selected(selector: Selector, scope: _Scope) -> Iterator[_Found | None]:
    """All that the selector names: more or less than one thing only through lists; None for what is absent."""
    path = selector.path
    named = scope.names.get(path[0])
    pending = [(scope.root, 0)] if named is None else [(named, 1)]
    while pending:
        reached, depth = pending.pop()
        scope.steps.take()
        found = _filled(reached) if reached.value is None else reached
        if found is None or depth == len(path):
            yield found
            continue
        part = path[depth]
        is_index = INDEX.fullmatch(part) is not None
        match found.value:
            case dict(fields) if part in fields or isinstance(found.shape, Record):
                pending.append((found.field(part, fields.get(part)), depth + 1))
            case list(elements) if (
                is_index and len(part) <= _MOST_DIGITS and int(part) < len(elements)
            ):
                pending.append((found.element(elements[int(part)]), depth + 1))
            case list(elements) if not is_index:
                scope.steps.take(len(elements))
                pending.extend((found.element(each), depth) for each in reversed(elements))
            case None if isinstance(found.shape, ListOf) and not is_index:
                pass
            case _:
                yield None


def _filled(found: _Found) -> _Found | None:
    """What Go has where JSON has nothing: an empty value, nil (still None), or None where there is none."""
    match found.shape:
        case Scalar():
            return found._replace(value=_EMPTY[found.shape])
        case Record(optional=False):
            return found._replace(value={})
        case ListOf() | MapOf():
            return found
        case Record() | Anything():
            return None
        case _:
            assert_never(found.shape)


def _is_match(expression: Match, found: _Found | None, scope: _Scope) -> bool:
    asked = _OPPOSITES.get(expression.operator, expression.operator)
    if found is None:
        answer = asked in _TRUE_OF_ABSENT
    else:
        text = expression.value.text if expression.value else ""
        answer = _answer(asked, found.value, text, scope.steps)
    return answer is (asked is expression.operator)


def _is_so_of(expression: Collection, found: _Found | None, scope: _Scope) -> bool:
    """Whether the inner expression is true of any, or of all, of what `found` has."""
    decisive = expression.quantifier is Quantifier.ANY
    for names in _bindings(expression.binding, found) if found else ():
        scope.steps.take()
        inner = _Scope(scope.root, {**scope.names, **names}, scope.steps)
        if _holds(expression.inner, inner) is decisive:
            return decisive
    return not decisive


def _bindings(binding: Binding, found: _Found) -> Iterator[dict[str, _Found]]:
    """What the names of `any` and `all` stand for, for one element or key after the other."""
    match found.value:
        case list(elements):
            for number, value in enumerate(elements):
                element = found.element(value)
                index = _Found(number, Scalar.INTEGER)
                yield binding.bind(each=element, index=index, value=element)
        case dict(fields):
            for name, value in fields.items():
                key = _Found(name, Scalar.TEXT)
                yield binding.bind(each=key, index=key, value=found.field(name, value))


def _answer(operator: Operator, value: Any, text: str, steps: Steps) -> bool:
    """What an operator that does not say "not" finds of `value`, which is None where it is nil."""
    match operator:
        case Operator.EQUAL:
            return _equal(value, text)
        case Operator.IN:
            return _is_in(text, value, steps)
        case Operator.MATCHES:
            return isinstance(value, str) and _is_found(text, value, steps)
        case Operator.IS_EMPTY:
            return value is None or (isinstance(value, str | list | dict) and not value)
        case Operator.IS_NIL:
            return value is None
        case _:
            raise AssertionError(f"{operator} is asked as its opposite")


def _is_in(text: str, value: Any, steps: Steps) -> bool:
    match value:
        case str():
            steps.take(len(value) // _TEXT_PER_STEP)
            return text in value
        case dict():
            return text in value
        case list():
            steps.take(len(value))
            return any(_equal(element, text) for element in value)
        case _:
            return False


def _is_found(text: str, value: str, steps: Steps) -> bool:
    pattern = compiled(text)
    steps.take(pattern.steps_for(value))
    return pattern.is_in(value)


def _equal(value: Any, text: str) -> bool:
    match value:
        case bool():
            return parse_flag(text) is value
        case int():
            number = parse_integer(text)
            return value == (parse_float(text) if number is None else number)
        case float():
            return value == parse_float(text)
        case str():
            return value == text
        case _:
            return False
