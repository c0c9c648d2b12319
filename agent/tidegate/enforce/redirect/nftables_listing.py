"""What is different between two listings of a table by nft(8), in words for people."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tidegate.enforce.redirect.text import shown


class _Part(NamedTuple):
    """An object of a table, or a rule."""

    rows: list[str]
    of: str | None = None
    """The object that it is a part of, by its name for people."""

    @property
    def words(self) -> str:
        return " ".join(self.rows)


def differences(should: str, has: str) -> Iterator[str]:
    """How a listing differs from the one that should be, one sentence for each object and rule."""
    return _compared(_parts(should), _parts(has))


def _compared(should: dict[str, _Part], has: dict[str, _Part]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in _only(should, has))
    yield from (f"{name} is there and should not be" for name in _only(has, should))
    for name, part in should.items():
        if name in has and has[name].words != part.words:
            yield f"{name} is {shown(has[name].words)}, should be {shown(part.words)}"
    if should.keys() == has.keys() and list(should) != list(has):
        yield "the lines are in another order"


def _only(parts: dict[str, _Part], others: dict[str, _Part]) -> Iterator[str]:
    """Names of the parts that the others lack; an object stands for what is in it."""
    for name, part in parts.items():
        if name not in others and (part.of is None or part.of in others):
            yield name


_OBJECT = re.compile(r"\t(?P<kind>[a-z ]+) (?P<name>\S+) \{")
_RULE = re.compile(r"\t\t\S")
"""In a chain, after the row that says what the chain is; what a rule goes on with is indented further."""
_COMMENT = re.compile(r"""(?P<rule>.*?) ?comment "(?P<name>[^"]*)\"""")


def _parts(listing: str) -> dict[str, _Part]:
    """The objects and rules of a table's listing, by names for people, in order."""
    parts: dict[str, _Part] = {}
    seen: Counter[str] = Counter()

    def part(name: str, *rows: str, of: str | None = None) -> list[str]:
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name} (number {seen[name]})"
        parts[numbered] = _Part(list(rows), of)
        return parts[numbered].rows

    where, is_chain = "table", False
    head = last = part(where)
    for row in listing.split("\n")[1:]:
        opened = _OBJECT.fullmatch(row)
        if opened:
            where, is_chain = shown(f"{opened['kind']} {opened['name']}"), opened["kind"] == "chain"
            head = last = part(where)
        elif is_chain and head and _RULE.match(row):
            rule = _COMMENT.fullmatch(row[2:])
            name = f"line {shown(rule['name'])}" if rule else f"rule '{shown(row[2:])}'"
            last = part(f"{name} of {where}", rule["rule"] if rule else row[2:], of=where)
        elif row.strip() not in ("", "}"):
            last.append(row.strip())
    return parts
