"""How what `observe` and `classify` saw looks: one JSON object, or tables of connections and peers."""

import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tidegate.cli import tables
from tidegate.observe.report import EdgeRow, FlowRow, Report, classes

SHOWN_MAX = 1000
"""Connections, and peers, that a table has; JSON has them all."""


def print_report(out: Console, report: Report, *, as_json: bool) -> None:
    """Prints everything that was seen; what a person should know of it besides goes to standard error."""
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        out.print(tables_of(report, SHOWN_MAX), soft_wrap=not out.is_terminal)
    for note in report.notes:
        print(f"tidegate: {note}", file=sys.stderr)


def tables_of(report: Report, most: int) -> Group:
    """The latest connections, at most so many, the peers likewise, and what was lost."""
    parts: list[RenderableType] = []
    if not report.flows and not report.edges:
        parts.append("no connections")
    else:
        parts += [_flows(report.flows[-most:]), "", _edges(_busiest(report.edges, most)), ""]
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


def _flows(rows: Sequence[FlowRow]) -> Table:
    table = _table("", "client", "server", "class", "hint")
    table.add_column("names", overflow="fold")
    table.add_column("from its SYN", no_wrap=True)
    for title in ("to server", "to client", "packets"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("flags", overflow="fold")
    for row in rows:
        names = [row.sni] if row.sni else []
        table.add_row(
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
    return table


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
