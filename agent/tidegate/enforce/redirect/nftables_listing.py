"""What is different between two listings of a table by nft(8), in words for people."""

import re
from collections import Counter
from collections.abc import Iterator

from tidegate.enforce.redirect.text import shown


def differences(should: str, has: str) -> Iterator[str]:
    """How a listing differs from the one that should be, one sentence for each object and rule."""
    return _compared(_parts(should), _parts(has))


def _compared(should: dict[str, str], has: dict[str, str]) -> Iterator[str]:
    yield from (f"{part} is missing" for part in should if part not in has)
    yield from (f"{shown(part)} is there and should not be" for part in has if part not in should)
    for part, what in should.items():
        if part in has and has[part] != what:
            yield f"{part} is {shown(has[part])}, should be {shown(what)}"
    if should.keys() == has.keys() and list(should) != list(has):
        yield "the lines are in another order"


_OBJECT = re.compile(r"\t(?P<kind>[a-z ]+) (?P<name>\S+) \{")
_RULE = re.compile(r"\t\t\S")
"""In a chain, after the row that says what the chain is; what a rule goes on with is indented further."""
_COMMENT = re.compile(r"""(?P<rule>.*?) ?comment "(?P<name>[^"]*)\"""")


def _parts(listing: str) -> dict[str, str]:
    """What each object and rule of a table's listing is, by a name for people, in order."""
    parts: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()

    def part(name: str, *rows: str) -> list[str]:
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name} (number {seen[name]})"
        parts[numbered] = list(rows)
        return parts[numbered]

    where, is_chain = "table", False
    head = last = part(where)
    for row in listing.split("\n")[1:]:
        opened = _OBJECT.fullmatch(row)
        if opened:
            where, is_chain = f"{opened['kind']} {opened['name']}", opened["kind"] == "chain"
            head = last = part(where)
        elif is_chain and head and _RULE.match(row):
            rule = _COMMENT.fullmatch(row[2:])
            name = rule["name"] if rule else "without a name"
            last = part(f"line {name} of {where}", rule["rule"] if rule else row[2:])
        elif row.strip() not in ("", "}"):
            last.append(row.strip())
    return {name: " ".join(rows) for name, rows in parts.items()}
