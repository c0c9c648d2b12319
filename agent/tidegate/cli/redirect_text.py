"""How redirection looks to a person: decisions, lines of a list and counters, in words and tables."""

import sys
from collections.abc import Iterable
from typing import assert_never

from rich.table import Table
from rich.text import Text

from tidegate.addresses import endpoint
from tidegate.enforce.redirect.backend import InstalledLine
from tidegate.enforce.redirect.rules import (
    Action,
    ByGroup,
    ByUser,
    Connection,
    Criterion,
    Decision,
    Drop,
    First,
    FromNetwork,
    HandedOver,
    InCgroup,
    Invalid,
    Leave,
    Line,
    Marked,
    Match,
    Not,
    OfFamily,
    OfKnownSocket,
    OfProtocol,
    OfTransparentSocket,
    OnInterface,
    Opening,
    Redirect,
    Rules,
    ToNetwork,
    ToPort,
    ToSelf,
    Tproxy,
    Translate,
    Translated,
    Untracked,
    Zone,
)
from tidegate.intent.policy import Policy
from tidegate.model import Direction

SHOWN = 8
"""Most items of a list, such as excluded ports, that a sentence repeats."""
UNNAMED = "(unnamed rule)"
"""Rules in tidegate's own tables that somebody else added."""


def warn(warning: str) -> None:
    """Tells a person what an answer for programs does not hang on."""
    print(f"WARNING: {warning}", file=sys.stderr)


def connection(asked: Connection) -> str:
    """A connection in one phrase: who opens it, by what, to where."""
    protocol = str(asked.protocol)
    spoken = f"protocol {protocol}" if protocol.isdecimal() else protocol
    words = [asked.direction.value, spoken, endpoint(asked.destination, asked.port)]
    if asked.source:
        words += ["from", asked.source]
    if asked.uid is not None:
        words += ["by user", str(asked.uid)]
    if asked.gid is not None:
        words += ["by group", str(asked.gid)]
    if asked.mark:
        words += ["with mark", hex(asked.mark)]
    if asked.cgroup:
        words += ["in cgroup", asked.cgroup]
    words += ["on", asked.interface]
    return " ".join(words)


def goes(policy: Policy, decision: Action) -> str:
    """What becomes of a connection, as the end of a sentence that begins with it."""
    match decision:
        case Leave():
            return "goes where it was going, not redirected"
        case Redirect(port):
            return f"goes to {_listener(policy, port)}"
        case Tproxy(port):
            return f"goes to {_listener(policy, port)}, with its addresses as they are (tproxy)"
        case Translate(address, port):
            return f"goes to the resolver {endpoint(address, port)}"
        case Zone(number):
            return f"is tracked in zone {number}"
        case Drop():
            return "is dropped"
        case _:
            assert_never(decision)


def decided_by(rules: Rules, asked: Connection, decision: Decision) -> str:
    """Which line says so, and what that line asks for."""
    lines = rules.of(asked.direction)
    for line in lines:
        if line.name == decision.line:
            return f"decided by {line.name}: {condition(line.matches)}"
    if decision.line is not None:
        return f"decided by {decision.line}: the policy does not cover this family"
    if not lines:
        return f"no line decides: the policy redirects nothing {asked.direction}"
    return "no line decides: none of them matches"


def condition(matches: Iterable[Match], shown: int | None = SHOWN) -> str:
    """What a line asks for; `shown` None repeats lists whole."""
    words = [_match(match, shown) for match in matches]
    return ", ".join(words) or "everything that is left"


def action(of_line: Action) -> str:
    """What a line does, in two words."""
    match of_line:
        case Leave():
            return "leave"
        case Redirect(port):
            return f"redirect to port {port}"
        case Tproxy(port):
            return f"tproxy to port {port}"
        case Translate(address, port):
            return f"translate to {endpoint(address, port)}"
        case Zone(number):
            return f"track in zone {number}"
        case Drop():
            return "drop"
        case _:
            assert_never(of_line)


def lines(decided: str | None, of_direction: Iterable[Line]) -> Table:
    """A decision list, with a mark at the line that decided."""
    table = _table("", "line", "when", "then")
    for line in of_direction:
        here = line.name == decided
        row = ("=>" if here else "", line.name, condition(line.matches), action(line.action))
        table.add_row(*(Text(cell, "bold" if here else "") for cell in row))
    return table


def installed(found: Iterable[InstalledLine]) -> Table:
    """What the kernel has, with counters."""
    table = _table("list", "line")
    table.add_column("decided", justify="right", no_wrap=True)
    before = ""
    for line in found:
        shown = "" if line.hook == before else line.hook.value
        before = line.hook.value
        table.add_row(shown, Text(line.name or UNNAMED), str(line.packets))
    return table


def _listener(policy: Policy, port: int) -> str:
    direction = Direction.INBOUND if port == policy.inbound.port else Direction.OUTBOUND
    return f"the sidecar's {direction} listener, port {port}"


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=title != "when", overflow="fold")
    return table


def _match(match: Match, shown: int | None) -> str:
    if isinstance(match, Not):
        return f"not {_criterion(match.criterion, shown)}"
    return _criterion(match, shown)


def _criterion(criterion: Criterion, shown: int | None) -> str:
    match criterion:
        case OfProtocol(protocols):
            return " or ".join(protocol.value for protocol in protocols)
        case Opening():
            return "opening a connection"
        case OfKnownSocket():
            return "of a socket that is there"
        case OfTransparentSocket():
            return "of a transparent socket"
        case HandedOver():
            return "handed over before"
        case Untracked():
            return "of no connection that is tracked"
        case OfFamily(family):
            return family.value
        case ByUser(uids):
            return f"by user {_some(uids, shown)}"
        case ByGroup(gids):
            return f"by group {_some(gids, shown)}"
        case Marked(mark):
            return f"with mark {mark.value:#x}/{mark.mask:#x}"
        case InCgroup(path):
            return f"in cgroup {path}"
        case OnInterface(interfaces):
            return f"on {_some(interfaces, shown)}"
        case ToPort(ports):
            return f"to port {_some(ports, shown)}"
        case ToNetwork(_, networks):
            return f"to {_some(networks, shown)}"
        case FromNetwork(_, networks):
            return f"from {_some(networks, shown)}"
        case ToSelf():
            return "to an address of the workload"
        case Invalid():
            return "unknown to connection tracking"
        case First():
            return "the first of a connection"
        case Translated():
            return "of a connection that is translated already"
        case _:
            assert_never(criterion)


def _some(values: tuple[object, ...], shown: int | None) -> str:
    if shown is None or len(values) <= shown:
        return ", ".join(map(str, values))
    return f"{', '.join(map(str, values[:shown]))} and {len(values) - shown} more"
