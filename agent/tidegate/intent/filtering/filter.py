"""A filter expression that is ready to be used."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tidegate.intent.filtering.checking import check
from tidegate.intent.filtering.evaluation import Steps, matches
from tidegate.intent.filtering.grammar import parse
from tidegate.intent.filtering.shapes import Shape

T = TypeVar("T")


class Filter:
    """An expression that was read, and checked against the shape of what it filters.

    An empty text is an error: whoever takes it for "no filter", as Consul does, asks before.
    """

    def __init__(self, text: str, shape: Shape) -> None:
        """Raises FilterError with the column."""
        self.text = text
        self.expression = parse(text)
        self._shape = shape
        check(self.expression, shape, text)

    def select(self, items: Iterable[T], json_of: Callable[[T], Any]) -> list[T]:
        """The items of which the expression is true, in their order; `json_of` gives an item in Consul's JSON.

        Raises FilterError if that takes more steps, for all of them together, than anybody may ask for.
        """
        steps = Steps(self.text)
        return [
            item for item in items if matches(self.expression, json_of(item), self._shape, steps)
        ]
