"""How answers of the agent look to a person: tables on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tidegate import durations

EXIT_CODES = {"READY": 0, "NOT READY": 1, "UNKNOWN": 2}
VERDICT_STYLES = {"READY": "bold green", "NOT READY": "bold red", "UNKNOWN": "bold yellow"}
CLASS_STYLES = {
    "mesh": "green",
    "tls": "yellow",
    "plaintext": "red",
    "server-first": "red",
    "starttls": "yellow",
    "unknown": "magenta",
    "empty": "dim",
}
EVENT_STYLES = {
    "kept": "bold green",
    "proved": "bold green",
    "rolled-back": "bold red",
    "refused": "bold red",
    "unproved": "bold red",
    "warning": "yellow",
}
PLAIN_WIDTH = 160


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that no line is broken for nobody."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def fitted(out: Console, table: Table) -> Table:
    """The table, its columns closer together where it would not fit otherwise."""
    table.collapse_padding = _measured(table).minimum > out.width
    return table


def print_table(out: Console, table: Table) -> None:
    """Prints a table with every word whole; a terminal that is too narrow for that breaks its lines."""
    for column in table.columns:
        widths = [_measured(cell) for cell in (column.header, *column.cells)]
        column.min_width = max(each.maximum if column.no_wrap else each.minimum for each in widths)
    width = _measured(fitted(out, table)).minimum
    if width > out.width:
        out = Console(highlight=False, width=width)
    out.print(table, crop=False)


def _measured(what: RenderableType) -> Measurement:
    """How wide something is at the least, its words whole, and in one line."""
    endless = Console(width=10_000)
    return Measurement.get(endless, endless.options, what)


def _name(party: dict[str, Any]) -> str:
    return str(party.get("workload") or party.get("address") or "?")


def flows(answer: dict[str, Any], now: float, *, nothing: str = "no flows yet") -> Table:
    """The ledger's edges, service by service; where there are none, that."""
    table = titled("caller", "", "service", "port", "class", "hint")
    table.add_column("path", overflow="fold")
    table.add_column("connections", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("last seen", no_wrap=True)
    for row in answer["flows"]:
        table.add_row(
            _name(row["caller"]),
            "->",
            _name(row["server"]),
            str(row["port"]),
            Text(row["class"], CLASS_STYLES.get(row["class"], "")),
            ", ".join(row["hints"]),
            row["path"] + (", would be denied" if row.get("would_be_denied") else ""),
            str(row["connections"]),
            str(row["bytes_to_server"] + row["bytes_to_client"]),
            durations.ago(now - row["last_seen"]),
        )
    if not answer["flows"]:
        table.add_row(nothing)
    return table


def titled(*titles: str) -> Table:
    """A table whose columns keep their words whole; others, added later, give way in a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def flow_lines(answer: dict[str, Any]) -> Iterator[str]:
    """Each edge as one line, without what changes."""
    for row in answer["flows"]:
        denied = ", would be denied" if row.get("would_be_denied") else ""
        yield (
            f"{_name(row['caller'])} -> {_name(row['server'])}:{row['port']} "
            f"{row['class']}, {row['path']}{denied}"
        )


def clean_share(verdict: dict[str, Any], now: float) -> float:
    """How much of the window, counted back from now, has neither a blocking flow nor a gap: 0 to 1."""
    window_s = verdict["window_s"]
    last = max((reason.get("last_seen") or 0.0 for reason in verdict["reasons"]), default=0.0)
    since_block = (now - last) / window_s if last else 1.0
    return float(max(0.0, min(since_block, verdict["coverage"]["share"], 1.0)))


def print_verdict(out: Console, verdict: dict[str, Any], now: float) -> None:
    """One service: the verdict, every reason with its next step, and what does not block."""
    headline = Text.assemble(
        (verdict["service"], "bold"),
        ": ",
        (verdict["verdict"], VERDICT_STYLES[verdict["verdict"]]),
        f"   mode {verdict['mode']}, window {durations.span(verdict['window_s'])}",
    )
    out.print(headline)
    for reason in verdict["reasons"]:
        out.print(Text(f"  - {reason['message']}"))
        if reason["next_step"]:
            out.print(Text(f"    next: {reason['next_step']}", "cyan"), soft_wrap=True)
    if verdict["callers"]:
        table = titled("  caller")
        table.add_column("address", overflow="fold")
        table.add_column("class", no_wrap=True)
        table.add_column("port", no_wrap=True)
        table.add_column("connections", justify="right", no_wrap=True)
        table.add_column("last seen", overflow="fold")
        table.add_column("", overflow="fold")
        for caller in verdict["callers"]:
            table.add_row(
                f"  {caller['caller']['workload'] or '-'}",
                caller["caller"]["address"],
                Text(caller["class"], CLASS_STYLES.get(caller["class"], "")),
                str(caller["port"]),
                str(caller["connections"]),
                durations.ago(now - caller["last_seen"]),
                caller.get("note", ""),
            )
        print_table(out, table)


def print_event(out: Console, event: dict[str, Any]) -> None:
    """One event of a flip; the guard's heartbeat only where it can be overwritten."""
    if event["event"] == "guarding":
        if out.is_terminal:
            left = durations.span(event["remaining_s"])
            out.print(f"  guarding: {event['message']}, {left} to go   ", end="\r")
        return
    out.print(Text(event["message"], EVENT_STYLES.get(event["event"], "")), soft_wrap=True)
    for proof in event.get("proofs", ()):
        where = "/".join(part for part in (proof["partition"], proof["namespace"]) if part)
        mark, style = ("ok", "green") if proof["holds"] else ("no", "bold red")
        out.print(Text.assemble("  ", (mark, style), f"  {where or 'mesh'}: {proof['message']}"))
    # The last event repeats, for programs, what those before it have told.
    reasons = event.get("reasons", ()) if event["event"] != "rolled-back" else ()
    breakages = event.get("breakages", ()) if event["event"] != "refused" else ()
    for reason in (*reasons, *breakages):
        out.print(Text(f"  - {reason['message']}"))
        if reason["next_step"]:
            out.print(Text(f"    next: {reason['next_step']}", "cyan"), soft_wrap=True)
