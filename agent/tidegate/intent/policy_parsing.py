"""The values of a policy as people write them: ports, ids, users, marks, what users may reach.

Text in, checked values out; InputError with the value and what would be right. Names of users and groups are looked
up by functions that the caller hands in: they are the machine's, not the text's.
"""

import re
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeAlias

from tidegate.errors import InputError
from tidegate.intent.network_text import canonical_address, check_interface, shown
from tidegate.intent.policy import (
    MAX_ITEMS,
    MAX_MARK,
    MAX_PORT,
    PORT_EXPECTED,
    Family,
    IdRange,
    Mark,
    Mode,
    PortRange,
    Protocol,
    UserPorts,
    check_cgroup,
    check_id,
    check_ids,
    check_mark,
    check_port,
    check_ports,
)

ALL_PORTS: Final = PortRange(1, MAX_PORT)
Lookup: TypeAlias = Callable[[str], int | None]
"""The number of a user or a group, None when there is none of that name."""

_NUMBER = re.compile(r"[0-9]{1,10}")
_PORT_RANGE = re.compile(r"(?P<first>[0-9]{1,6})(?:[-:](?P<last>[0-9]{1,6}))?")
_ID_RANGE = re.compile(r"(?P<first>[0-9]{1,10})(?:[-:](?P<last>[0-9]{1,10}))?")
_MARK_PART = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}")
_MARK_EXPECTED = "value/mask, such as 0x539/0xfff"
_USER_PORTS_EXPECTED = "protocol:ports:users, such as tcp:5432:1000-1009"
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


def no_such_name(name: str) -> int | None:
    """A look-up that knows no names."""
    return None


class Names(NamedTuple):
    """How names of users and groups become numbers."""

    users: Lookup = no_such_name
    groups: Lookup = no_such_name


def parse_bool(text: str) -> bool:
    """What Go's strconv.ParseBool, and so Consul, takes for a boolean."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise InputError(f"{shown(text)} is neither true nor false", expected="true or false")


def parse_port(text: str) -> int:
    """One port."""
    if not _NUMBER.fullmatch(text):
        raise InputError(f"{shown(text)} is not a port", expected=f"1 to {MAX_PORT}")
    check_port(int(text))
    return int(text)


def parse_port_range(text: str) -> PortRange:
    """A port, or a range: 8000-8010 or, as iptables writes it, 8000:8010."""
    match = _PORT_RANGE.fullmatch(text)
    if match is None:
        raise InputError(f"{shown(text)} is not a port", expected=PORT_EXPECTED)
    first = int(match["first"])
    ports = PortRange(first, int(match["last"] or first))
    check_ports(ports, text)
    return ports


def parse_uid(text: str, users: Lookup = no_such_name) -> int:
    """A user's number or name."""
    return _number(text, users, "user")


def parse_gid(text: str, groups: Lookup = no_such_name) -> int:
    """A group's number or name."""
    return _number(text, groups, "group")


def parse_id_range(text: str, users: Lookup = no_such_name) -> IdRange:
    """A user's number or name, or a range of numbers: 1000-1009 or 1000:1009."""
    return _id_range(text, users, "user")


def parse_gid_range(text: str, groups: Lookup = no_such_name) -> IdRange:
    """As `parse_id_range`, of groups."""
    return _id_range(text, groups, "group")


def parse_mark(text: str) -> Mark:
    """A mark with its mask, 0x539/0xfff, or without: all bits count."""
    value, slash, mask = text.partition("/")
    parts = (value, mask) if slash else (value,)
    if not all(_MARK_PART.fullmatch(part) for part in parts):
        raise InputError(f"{shown(text)} is not a packet mark", expected=_MARK_EXPECTED)
    numbers = [int(part, 16 if part[:2] in ("0x", "0X") else 10) for part in parts]
    if max(numbers) > MAX_MARK:
        problem = f"{shown(text)} has more than the 32 bits of a packet mark"
        raise InputError(problem, expected=_MARK_EXPECTED)
    result = Mark(*numbers)
    check_mark(result)
    return result


def parse_optional_mark(text: str) -> Mark | None:
    """As `parse_mark`; "none" and "" for no mark."""
    return None if text in ("", "none") else parse_mark(text)


def parse_cgroup(text: str) -> str:
    """A path below the root of cgroup v2; "" for none."""
    if text:
        check_cgroup(text)
    return text


def parse_interface(text: str) -> str:
    """The name of an interface other than the loopback."""
    check_interface(text)
    return text


def parse_family(text: str) -> Family:
    """An address family."""
    try:
        return Family(text)
    except ValueError as error:
        raise InputError(
            f"{shown(text)} is not an address family", expected=_words(Family)
        ) from error


def parse_mode(text: str) -> Mode:
    """A mode of redirection."""
    try:
        return Mode(text)
    except ValueError as error:
        raise InputError(f"{shown(text)} is not a mode", expected=_words(Mode)) from error


def parse_user_ports(text: str, users: Lookup = no_such_name) -> UserPorts:
    """What some users may reach: protocol:ports:users, as in Kuma, such as tcp:5432,6000-6010:1000-1009.

    The protocol is tcp, udp, or * or nothing for both; ports may be * or nothing for all. Both may be left out from the
    left: 80:1002 and 1003. Lists are separated by commas.
    """
    parts = [part.strip() for part in text.split(":")] if text.count(":") <= 2 else []
    if not parts:
        problem = f"{shown(text)} has too many parts"
        raise InputError(problem, expected=_USER_PORTS_EXPECTED)
    protocol, ports, ids = ["*"] * (3 - len(parts)) + parts
    if ids in ("", "*"):
        raise InputError(
            f"{shown(text)} names no user",
            expected=f"{_USER_PORTS_EXPECTED}; for all users, exclude the ports",
        )
    return UserPorts(
        _protocols(protocol),
        (ALL_PORTS,)
        if ports in ("", "*")
        else tuple(parse_port_range(item) for item in _listed(ports)),
        tuple(parse_id_range(item, users) for item in _listed(ids)),
    )


def user_ports_text(item: UserPorts) -> str:
    """What `parse_user_ports` reads."""
    protocol = item.protocols[0] if len(item.protocols) == 1 else "*"
    ports, uids = (",".join(map(str, ranges)) for ranges in (item.ports, item.uids))
    return f"{protocol}:{ports}:{uids}"


def parse_endpoint(text: str) -> tuple[str, int]:
    """An address and a port: 127.0.0.1:8600 or [::1]:8600."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or bracketed != (":" in host):
        expected = "address:port, such as 127.0.0.1:8600 or [::1]:8600"
        raise InputError(f"{shown(text)} is not an address with a port", expected=expected)
    return canonical_address(host.removeprefix("[").removesuffix("]")), parse_port(port)


def _number(text: str, lookup: Lookup, what: str) -> int:
    if _NUMBER.fullmatch(text):
        check_id(int(text))
        return int(text)
    # The system's own look-up takes no such text for a name, and would raise something else.
    number = lookup(text) if text.isprintable() and text and len(text) <= 255 else None
    if number is None:
        problem = f"there is no {what} {shown(text)} here"
        raise InputError(problem, expected=f"a number or the name of a {what}")
    check_id(number)
    return number


def _id_range(text: str, lookup: Lookup, what: str) -> IdRange:
    match = _ID_RANGE.fullmatch(text)
    if match is None:
        number = _number(text, lookup, what)
        return IdRange(number, number)
    first = int(match["first"])
    ids = IdRange(first, int(match["last"] or first))
    check_ids(ids, text)
    return ids


def _protocols(text: str) -> tuple[Protocol, ...]:
    if text in ("", "*"):
        return tuple(Protocol)
    try:
        return (Protocol(text.lower()),)
    except ValueError as error:
        expected = f"{_words(Protocol)}, or * for both"
        raise InputError(f"{shown(text)} is not a protocol", expected=expected) from error


def _listed(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    items = [item for item in items if item]
    if not 1 <= len(items) <= MAX_ITEMS:
        raise InputError(f"a list of {len(items)} items", expected=f"1 to {MAX_ITEMS}")
    return items


def _words(words: Iterable[str]) -> str:
    return " or ".join(words)
