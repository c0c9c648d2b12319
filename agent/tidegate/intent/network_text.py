"""Addresses, networks and interface names as people write them, and their canonical form.

Each function raises InputError with the value and what would be right; the caller adds where it stands.
"""

import ipaddress

from tidegate.errors import InputError

MAX_INTERFACE = 15
"""Longest name of an interface in bytes, without the closing 0 (linux/if.h, IFNAMSIZ)."""

LOOPBACK_INTERFACE = "lo"
_MAPPED_PREFIX = 96
"""Length of ::ffff:0:0/96, which holds the IPv4-mapped addresses (RFC 4291, 2.5.5.2)."""
_SHOWN = 60
"""Most characters of a faulty value that a message repeats."""
_FORBIDDEN_IN_INTERFACE = frozenset("/:'\"\\*+")
"""What the kernel refuses (dev_valid_name in net/core/dev.c), what needs quoting in rules, and what means a
pattern to nftables or to iptables."""


def canonical_network(text: str) -> str:
    """An address or a network in canonical form, always with a prefix; host bits are cleared.

    IPv4-mapped IPv6 networks become IPv4: that is what such connections are on the wire. A mapped address whose prefix
    is shorter than that of all mapped ones is refused: somebody meant the prefix of IPv4.
    """
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        problem = f"{shown(text)} is not an address or a network"
        raise InputError(problem, expected="such as 10.0.0.0/8, 10.1.2.3 or fd00::/8") from error
    _refuse_zone(text)
    mapped = ipaddress.IPv6Interface(text).ip.ipv4_mapped if network.version == 6 else None
    if mapped is None:
        return str(network)
    if network.prefixlen < _MAPPED_PREFIX:
        raise _too_wide(text, mapped, network.prefixlen)
    prefix = network.prefixlen - _MAPPED_PREFIX
    return str(ipaddress.ip_network((mapped, prefix), strict=False))


def canonical_address(text: str) -> str:
    """One address, without prefix or zone, in canonical form; an IPv4-mapped one becomes IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        problem = f"{shown(text)} is not an address"
        raise InputError(problem, expected="such as 10.1.2.3 or fd00::1") from error
    _refuse_zone(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(address if mapped is None else mapped)


def check_interface(name: str) -> None:
    """That an interface may be called so, and that rules may name it."""
    if name == LOOPBACK_INTERFACE:
        raise InputError(
            "'lo' is never redirected, so it can neither be included nor excluded",
            expected="interfaces to other machines, such as eth0",
        )
    good = all("!" <= char <= "~" and char not in _FORBIDDEN_IN_INTERFACE for char in name)
    if not good or name in (".", "..") or not 1 <= len(name) <= MAX_INTERFACE:
        raise InputError(
            f"{shown(name)} is not the name of an interface",
            expected=f"1 to {MAX_INTERFACE} ASCII characters without white space, quotes, / : * +",
        )


def shown(text: str) -> str:
    """A value as a message repeats it: quoted, and not in full if it is long."""
    return repr(clipped(text))


def clipped(text: str) -> str:
    """The beginning of a text, marked when something is missing."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def as_name(text: str) -> str:
    """A name as a message says where something is: on one line, and not in full if it is long."""
    return clipped(text) if text.isprintable() else shown(text)


def _too_wide(text: str, mapped: ipaddress.IPv4Address, prefix: int) -> InputError:
    problem = f"{shown(text)} is an IPv4 address in IPv6 with a prefix below {_MAPPED_PREFIX}"
    if prefix <= mapped.max_prefixlen:
        expected = str(ipaddress.ip_network((mapped, prefix), strict=False))
    else:
        expected = "IPv4 with a prefix of 0 to 32, such as 10.0.0.0/8"
    return InputError(problem, expected=expected)


def _refuse_zone(text: str) -> None:
    if "%" in text:
        raise InputError(f"{shown(text)} names an interface", expected=text.partition("%")[0])
