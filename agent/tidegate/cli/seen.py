"""How what `observe` and `classify` saw looks: one JSON object, or tables of connections and peers."""

import sys
from collections.abc import Collection, Sequence

import msgspec
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tidegate.cli import tables
from tidegate.observe.report import EdgeRow, FlowRow, Report, classes

SHOWN_MAX = 1000
"""Connections, and peers, that a table has; JSON has them all."""
_GIVE_WAY = ("packets", "from its SYN", "to client", "to server", "hint", "flags")
"""Columns that a table leaves out where it has to fit, the first one first."""
_ANY_WIDTH = 10_000


def print_report(out: Console, report: Report, *, as_json: bool) -> None:
    """Prints everything that was seen; what a person should know of it besides goes to standard error."""
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        told = tables_of(report, SHOWN_MAX)
        # A line that is broken by the terminal has everything; a column that is made to fit has not.
        out.width = max(out.width, _width(out, told))
        out.print(told)
    for note in report.notes:
        print(f"tidegate: {note}", file=sys.stderr)


def tables_of(report: Report, most: int, into: Console | None = None) -> Group:
    """The latest connections, at most so many, the peers likewise, and what was lost.

    As wide as need be, or with what there is room for in a console.
    """
    parts: list[RenderableType] = []
    if not report.flows and not report.edges:
        parts.append("no connections")
    else:
        flows = _flows(report.flows[-most:])
        for number in range(len(_GIVE_WAY) if into else 0):
            if into and _width(into, flows) > into.width:
                flows = _flows(report.flows[-most:], without=_GIVE_WAY[: number + 1])
        parts += [flows, "", _edges(_busiest(report.edges, most)), ""]
        by_class = (f"{each} {number}" for each, number in classes(report.edges).items())
        parts.append(f"connections: {', '.join(by_class) or 'none'}")
    hidden = report.flows_not_listed + max(len(report.flows) - most, 0)
    if hidden:
        parts.append(f"not listed one by one: {hidden} of them; the sums by peer have them all")
    lost = [f"{name} {number}" for name, number in report.counters.items() if number]
    parts.append(
        Text(f"lost or not understood: {', '.join(lost)}", "yellow")
        if lost
        else "nothing was lost, everything was understood"
    )
    return Group(*parts)


def _flows(rows: Sequence[FlowRow], without: Collection[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = [title for title in _FLOW_COLUMNS if title not in without]
    for title in titles:
        if title in _FOLDED:
            table.add_column(title, overflow="fold")
        else:
            justify: JustifyMethod = "right" if title in _NUMBERS else "left"
            table.add_column(title, justify=justify, no_wrap=True)
    for row in rows:
        cells = dict(zip(_FLOW_COLUMNS, _cells(row), strict=True))
        table.add_row(*(cells[title] for title in titles))
    return table


_FLOW_COLUMNS = (
    *("", "client", "server", "class", "hint", "names", "from its SYN"),
    *("to server", "to client", "packets", "flags"),
)
_NUMBERS = frozenset({"to server", "to client", "packets"})
_FOLDED = frozenset({"names", "flags"})


def _cells(row: FlowRow) -> tuple[RenderableType, ...]:
    """What a connection has in each of the columns."""
    names = [row.sni] if row.sni else []
    return (
        row.direction,
        # An address in brackets is no markup.
        Text(row.client),
        Text(row.server),
        Text(row.flow_class, tables.CLASS_STYLES.get(row.flow_class, "")),
        row.hint or "",
        Text(" ".join([*names, *(f"[{name}]" for name in row.alpn)])),
        "yes" if row.syn_seen else "no",
        str(row.bytes_to_server),
        str(row.bytes_to_client),
        str(row.segments),
        ", ".join(row.flags),
    )


def _width(console: Console, what: RenderableType) -> int:
    """How wide it is where nothing has to be made to fit."""
    return Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), what).maximum


def _edges(rows: Sequence[EdgeRow]) -> Table:
    table = _table("", "peer", "server port", "class", "hints")
    for title in ("connections", "to server", "to client"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.direction,
            row.peer,
            str(row.port),
            Text(row.flow_class, tables.CLASS_STYLES.get(row.flow_class, "")),
            ", ".join(row.hints),
            str(row.connections),
            str(row.bytes_to_server),
            str(row.bytes_to_client),
        )
    return table


def _busiest(rows: Sequence[EdgeRow], most: int) -> Sequence[EdgeRow]:
    if len(rows) <= most:
        return rows
    return sorted(rows, key=lambda row: row.connections, reverse=True)[:most]


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table
