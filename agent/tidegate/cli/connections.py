"""The connection that `tidegate redirect explain` is asked about: its options, and what of it a namespace tells."""

import argparse
import functools
import ipaddress
import socket
from collections.abc import Callable
from typing import NamedTuple

from tidegate.cli.namespaces import Target
from tidegate.enforce.redirect.rules import LOOPBACK_INTERFACE, Connection
from tidegate.errors import InputError, InputErrors
from tidegate.intent.policy_parsing import parse_interface
from tidegate.kernel import links, netns, routes
from tidegate.model import Direction
from tidegate.node.users import group_id, user_id

DEFAULT_INTERFACE = "eth0"
ONLY_OF = {Direction.INBOUND: ("forwarded",), Direction.OUTBOUND: ("uid", "gid", "mark", "cgroup")}
"""What explain is told of connections of one direction alone: only they have it, or are asked for it."""
PROTOCOLS = {
    "icmp": 1,
    "igmp": 2,
    "ipip": 4,
    "tcp": 6,
    "udp": 17,
    "dccp": 33,
    "ipv6": 41,
    "gre": 47,
    "esp": 50,
    "ah": 51,
    "icmpv6": 58,
    "ospf": 89,
    "pim": 103,
    "vrrp": 112,
    "l2tp": 115,
    "sctp": 132,
    "udplite": 136,
}
"""IANA's numbers of protocols over IP."""
ID_MAX = 2**32 - 2
"""The greatest user or group id; the one after it stands for none (chown(2))."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Asked(NamedTuple):
    """A connection as the kernel sees it, and what a person should know of how it came to be that one."""

    connection: Connection
    notes: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the direction, the destination, and the options that say more of a connection."""
    parser.add_argument("direction", choices=[direction.value for direction in Direction])
    parser.add_argument(
        "destination", type=_endpoint, metavar="ADDRESS:PORT", help="what the client dials"
    )
    client = parser.add_argument_group("the connection")
    client.add_argument(
        "--from",
        dest="source",
        type=functools.partial(_address, option="--from"),
        metavar="ADDRESS",
        help="of the client",
    )
    client.add_argument(
        "--protocol",
        type=_protocol,
        default="tcp",
        metavar="NAME",
        help="tcp (default), udp or another, such as sctp or 132",
    )
    client.add_argument(
        "--interface",
        type=_interface_name,
        metavar="NAME",
        help="outbound: where it leaves (default: as the routes of a namespace, if one is given, say); inbound: where "
        "it arrives (default: the one with the address, in a namespace); else eth0, and lo for loopback addresses",
    )
    client.add_argument(
        "--uid",
        type=_id_of("user", "--uid", user_id),
        metavar="USER",
        help="outbound: who opens it",
    )
    client.add_argument(
        "--gid",
        type=_id_of("group", "--gid", group_id),
        metavar="GROUP",
        help="outbound: the same, by group",
    )
    client.add_argument("--mark", type=_mark, metavar="MARK", help="outbound: such as 0x1")
    client.add_argument(
        "--cgroup", metavar="PATH", help="outbound: of the process, below the root of cgroup v2"
    )
    client.add_argument(
        "--older", action="store_true", help="it was open before the rules were loaded"
    )
    client.add_argument(
        "--forwarded",
        action="store_true",
        default=None,
        help="inbound: to an address that is not the workload's (default: as a namespace, if one is given, has it)",
    )


def asked(args: argparse.Namespace, where: Target | None) -> Asked:
    """The connection of the options. InputErrors for what no connection of the direction can have."""
    direction = Direction(args.direction)
    _refuse_other_direction(args, direction)
    dialled, port = args.destination
    address, source = _on_the_wire(dialled), args.source and _on_the_wire(args.source)
    if source and source.version != address.version:
        problem = f"{args.source} and {dialled} are of two families"
        raise InputError(problem, field="--from", expected="an address of the destination's family")
    notes = [_difference(dialled, address)] if str(address) != dialled else []
    forwarded = bool(args.forwarded)
    if direction is Direction.INBOUND and where is not None and not forwarded:
        # What the kernel's rules ask, too: whether its routes deliver the address here.
        forwarded = routes.outgoing_interface(where.path, str(address)) != LOOPBACK_INTERFACE
        if forwarded:
            notes.append(f"{address} is no address of {where.name}: such connections are forwarded")
    interface = args.interface
    if interface is None:
        interface = LOOPBACK_INTERFACE if address.is_loopback else DEFAULT_INTERFACE
        if where is not None and not forwarded:
            interface, assumed = _interface_in(where, direction, address)
            notes += assumed
    connection = Connection(
        direction=direction,
        destination=str(address),
        port=port,
        source=str(source or ""),
        interface=interface,
        uid=args.uid,
        gid=args.gid,
        mark=args.mark or 0,
        cgroup=(args.cgroup or "").strip("/"),
        protocol=args.protocol,
        opening=not args.older,
        forwarded=forwarded,
    )
    return Asked(connection, tuple(notes))


def _refuse_other_direction(args: argparse.Namespace, direction: Direction) -> None:
    """InputErrors for what is never asked of connections of the direction."""
    other = next(one for one in Direction if one != direction)
    faults = tuple(
        InputError(
            f"is told only of an {other} connection",
            field=f"--{option}",
            expected=f"{other}, or nothing",
        )
        for option in ONLY_OF[other]
        if getattr(args, option) is not None
    )
    if faults:
        raise InputErrors(faults)


def _interface_in(
    where: Target, direction: Direction, address: Address
) -> tuple[str, tuple[str, ...]]:
    """Where a connection leaves or arrives in a namespace, and a note when that is a guess."""
    match direction:
        case Direction.OUTBOUND:
            found = routes.outgoing_interface(where.path, str(address))
            lacks = f"{where.name} has no route to {address}"
        case Direction.INBOUND:
            found = _interface_with(where.path, address)
            lacks = f"no interface of {where.name} has the global address {address}"
    if found is not None:
        return found, ()
    return DEFAULT_INTERFACE, (f"{lacks}; {DEFAULT_INTERFACE} is assumed",)


def _interface_with(netns_path: str, address: Address) -> str | None:
    """The interface that has a global address; None when none has."""
    if address.is_loopback:
        return LOOPBACK_INTERFACE
    names = (name for _, name in netns.run_in(netns_path, socket.if_nameindex))
    return next((one for one in names if str(address) in links.addresses(netns_path, one)), None)


def _on_the_wire(text: str) -> Address:
    """The address that packets bear: IPv4 for a mapped one, and loopback for whoever dials the unspecified one.

    So do tcp_v4_connect and tcp_v6_connect (net/ipv4/tcp_ipv4.c, net/ipv6/tcp_ipv6.c).
    """
    dialled = ipaddress.ip_address(text)
    address: Address = getattr(dialled, "ipv4_mapped", None) or dialled
    if not address.is_unspecified:
        return address
    return ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")


def _difference(dialled: str, address: Address) -> str:
    why = "loopback is what dialling it means" if address.is_loopback else ""
    if ipaddress.ip_address(dialled).version != address.version:
        why = "the IPv4 lines decide"
    return f"{dialled} is {address} on the wire: {why}"


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    bracketed = address.startswith("[") and address.endswith("]")
    if ":" in address and not bracketed:
        raise InputError("is not ADDRESS:PORT", source=text, expected="IPv6 as in [fd00::1]:443")
    if not address or not (port.isascii() and port.isdecimal()):
        raise InputError("is not ADDRESS:PORT", source=text, expected="such as 10.1.2.3:443")
    if bracketed and ":" not in address:
        plain = f"{address[1:-1]}:{port}"
        raise InputError("brackets are for IPv6", source=text, expected=plain)
    if not 0 < int(port) <= 65535:
        raise InputError(f"there is no port {port}", source=text, expected="1 to 65535")
    return _address(address[1:-1] if bracketed else address), int(port)


def _address(text: str, option: str = "") -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        is_name = ":" not in text and any(letter.isalpha() for letter in text)
        raise InputError(
            "names are not looked up" if is_name else "is not an IP address",
            source=option,
            field=text,
            expected="an address" if is_name else "such as 10.1.2.3 or fd00::1",
        ) from error
    if "%" in text:
        plain, _, interface = text.partition("%")
        expected = f"{plain}, and --interface {interface}"
        raise InputError("names an interface", source=option, field=text, expected=expected)
    mapped = getattr(address, "ipv4_mapped", None)
    return f"::ffff:{mapped}" if mapped else str(address)


def _interface_name(text: str) -> str:
    if text == LOOPBACK_INTERFACE:
        return text
    try:
        return parse_interface(text)
    except InputError as error:
        raise InputError(error.problem, field="--interface", expected=error.expected) from error


def _id_of(kind: str, option: str, number_of: Callable[[str], int | None]) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else number_of(text)
        if number is None:
            problem = f"there is no {kind} {text!r} here"
            raise InputError(problem, field=option, expected=f"a number or the name of a {kind}")
        if number > ID_MAX:
            raise InputError(f"{text} is no {kind} id", field=option, expected=f"0 to {ID_MAX}")
        return number

    return parse


def _protocol(text: str) -> str:
    """The name of a protocol, as policies write it; its number when none is known."""
    name = text.lower()
    if name in PROTOCOLS:
        return name
    if not (name.isascii() and name.isdecimal() and int(name) <= 255):
        expected = f"one of {', '.join(PROTOCOLS)}, or a number to 255"
        raise InputError(f"{text!r} is no protocol", field="--protocol", expected=expected)
    names = (known for known, number in PROTOCOLS.items() if number == int(name))
    return next(names, str(int(name)))


def _mark(text: str) -> int:
    try:
        mark = int(text, 0)
    except ValueError:
        mark = -1
    if not 0 <= mark < 2**32:
        problem = f"{text!r} is not a packet mark"
        raise InputError(problem, field="--mark", expected="such as 0x1 or 17")
    return mark
