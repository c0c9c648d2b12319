"""Which of the ledger's edges `tidegate flows` shows: its options, and the answer of an agent with only those."""

import argparse
import datetime
import ipaddress
import time
from typing import Any

from tidegate import durations
from tidegate.model import FlowClass, Hint

_WHEN = f"{durations.SHAPE} ago, or a local time such as 14:30 or 2026-01-31T14:30"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose edges; each option that is given narrows the choice."""
    group = parser.add_argument_group("which flows (all that is given must be so)")
    group.add_argument(
        "--class",
        dest="classes",
        action="append",
        choices=[each.value for each in FlowClass],
        metavar="CLASS",
        help=f"of this class, or of one of several: {', '.join(FlowClass)}",
    )
    group.add_argument(
        "--hint",
        dest="hints",
        action="append",
        choices=[each.value for each in Hint],
        metavar="NAME",
        help=f"in which this protocol was recognised, or one of several: {', '.join(Hint)}",
    )
    group.add_argument(
        "--port", dest="ports", action="append", type=_port, metavar="PORT", help="to this port"
    )
    group.add_argument(
        "--peer",
        type=_party,
        metavar="NAME",
        help="with this workload, service or address at either end",
    )
    group.add_argument(
        "--caller",
        type=_party,
        metavar="NAME",
        help="opened by this workload, service or address",
    )


def since(text: str) -> float:
    """Unix time of what --since is given. Raises argparse.ArgumentTypeError for what is no time, or not over yet."""
    now = time.time()
    text = text.strip()
    if ago := durations.parse(text):
        return now - ago
    try:
        at = _at(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {_WHEN}") from None
    if at >= now:
        raise argparse.ArgumentTypeError(f"{text} is still to come")
    return at


def is_given(args: argparse.Namespace) -> bool:
    """Whether any edge may be left out."""
    return any((args.classes, args.hints, args.ports, args.peer, args.caller))


def chosen(answer: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The answer with those of its flows that the options choose."""
    return {**answer, "flows": [row for row in answer["flows"] if _is_chosen(row, args)]}


def _is_chosen(row: dict[str, Any], args: argparse.Namespace) -> bool:
    return (
        (not args.classes or row["class"] in args.classes)
        and (not args.hints or not set(args.hints).isdisjoint(row["hints"]))
        and (not args.ports or row["port"] in args.ports)
        and (not args.peer or args.peer in {*_names(row["caller"]), *_names(row["server"])})
        and (not args.caller or args.caller in _names(row["caller"]))
    )


def _names(party: dict[str, Any]) -> tuple[str, ...]:
    return (party["workload"], party["service"], *party["addresses"])


def _party(text: str) -> str:
    """A name as it is, an address as the ledger writes it."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def _at(text: str) -> float:
    """Unix time of a date, a date and time, or a time of today; local where it names no zone."""
    try:
        clock = datetime.time.fromisoformat(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text).timestamp()
    today = datetime.datetime.now().date()
    return datetime.datetime.combine(today, clock).timestamp()
