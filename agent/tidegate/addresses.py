"""Addresses as people and programs read them, the same everywhere. Pure."""

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from tidegate.errors import InputError


class Endpoint(NamedTuple):
    """An IP address, such as 0.0.0.0 or ::, and a TCP port."""

    address: str
    port: int

    @classmethod
    def of(cls, text: str) -> "Endpoint":
        """What `str` gives: 0.0.0.0:20200, [::]:20200. InputError for anything else."""
        address, _, port = text.rpartition(":")
        try:
            found = cls(str(ipaddress.ip_address(address.strip("[]"))), int(port))
        except ValueError:
            found = None
        if found is None or str(found) != text or not 0 < found.port < 1 << 16:
            raise InputError(
                f"{text!r} is no address with a port",
                expected="such as 0.0.0.0:20200 or [::]:20200",
            )
        return found

    def __str__(self) -> str:
        return endpoint(self.address, self.port)


def endpoint(address: str, port: int) -> str:
    """An address and a port as they are written together: 10.1.2.3:443, [fd00::1]:443."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def canonical(address: str) -> str:
    """Canonical text of an address, IPv4-mapped IPv6 as IPv4; text that is no address stays as
    it is."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def is_within(address: str, networks: Sequence[str]) -> bool:
    """Whether an address lies in one of the networks (canonical, as 10.0.0.0/8)."""
    if not networks:
        return False
    parsed = ipaddress.ip_address(canonical(address))
    return any(parsed in ipaddress.ip_network(network) for network in networks)
