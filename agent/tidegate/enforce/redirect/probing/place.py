"""Where probes are made: one family of a network namespace, with a TUN interface that lets packets out and in.

A place has far addresses, in which nobody lives, and can have them lie behind the interface. By which means probes are
made there depends on what the process may do.
"""

import enum
import errno
import ipaddress
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import assert_never

import msgspec

from tidegate.enforce.redirect.families import family_of
from tidegate.enforce.redirect.rules import (
    DNS_ZONE,
    Action,
    ByGroup,
    ByUser,
    Connection,
    Line,
    Rules,
)
from tidegate.intent.policy import MAX_ID, Family, IdRange, Policy
from tidegate.kernel import conntrack, rawtcp, sockets, tun, tunnel
from tidegate.kernel.conntrack import Endpoint, Original
from tidegate.kernel.errors import KernelError
from tidegate.kernel.rawtcp import Segment, Sender
from tidegate.model import Direction

INTERFACE = "tgverify"
"""Name of the interface; it is there only while a verification runs."""


class Means(enum.Enum):
    """How probes are made."""

    SEGMENTS = enum.auto()
    """By hand, as whoever they should come from: CAP_NET_RAW, CAP_NET_ADMIN, CAP_SETUID, CAP_SETGID, and TUN."""
    CONNECTIONS = enum.auto()
    """By connecting as this process's user and group; what arrives comes through a tunnel: CAP_NET_ADMIN alone."""


_TURN_S = 3.0
"""How long to wait for another verification of the same namespace."""
_TURN_POLL_S = 0.02
DOCUMENTATION = {
    Family.IPV4: ("198.51.100.0/24", "192.0.2.0/24", "203.0.113.0/24"),
    Family.IPV6: ("2001:db8::/32", "3fff::/20"),
}
"""Networks in which nobody lives (RFC 5737, 3849, 9637)."""
_USUAL_IDS = (65534, 1000, 0)
_MAX_RANGES = 64
"""After how many ranges of ids a free one is looked for."""
_NO_DEVICE = (
    errno.ENOENT,
    errno.ENODEV,
    errno.ENXIO,
    errno.EPERM,
    errno.EACCES,
    errno.EOPNOTSUPP,
)
_NO_FAMILY = (errno.EACCES, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EADDRNOTAVAIL)


@contextmanager
def opened_device(means: Means) -> Iterator[tun.Device | None]:
    """The interface, when it is this verification's turn; None on a machine that gives none."""
    match means:
        case Means.SEGMENTS:
            make: Callable[[str], AbstractContextManager[tun.Device]] = tun.opened
        case Means.CONNECTIONS:
            make = tunnel.opened
        case _:
            assert_never(means)
    deadline = time.monotonic() + _TURN_S
    with ExitStack() as stack:
        while True:
            try:
                device = stack.enter_context(make(INTERFACE))
            except KernelError as error:
                if error.errno in _NO_DEVICE:
                    yield None
                    return
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_TURN_POLL_S)
            else:
                yield device
                return


class Place:
    """One family of the namespace, and what probes of it need."""

    def __init__(
        self,
        means: Means,
        family: Family,
        policy: Policy,
        rules: Rules,
        own: tuple[str, ...],
        beginnings: conntrack.Beginnings,
        device: tun.Device | None,
    ) -> None:
        self.means = means
        self.family = family
        self.policy = policy
        self.rules = rules
        self.concerned = family in rules.families
        near = someone(DOCUMENTATION[family][0])
        self.device = device if device is not None and _joins(device, near) else None
        others = (someone(network) for network in DOCUMENTATION[family])
        self.far = tuple(address for address in others if address != near)
        """Addresses that can be had to lie behind the interface."""
        self.addresses = tuple(address for address in own if family_of(address) is family)
        """The workload's own."""
        self.app = self._somebody(rules.of(Direction.OUTBOUND))
        """As whom the application's connections are tried."""
        self.untried: list[tuple[str, str]] = []
        """Exclusions that could not be tried, each with the reason."""
        self._near = near
        self._listeners = [
            listener
            for listener in sockets.listeners()
            if not ipaddress.ip_address(listener.address).is_loopback
        ]
        self._beginnings = beginnings
        self._routed: set[str] = set()

    def _somebody(self, lines: Sequence[Line]) -> Sender:
        match self.means:
            case Means.SEGMENTS:
                return _somebody(lines)
            case Means.CONNECTIONS:
                return Sender(uid=os.geteuid(), gid=os.getegid())
            case _:
                assert_never(self.means)

    def can_send_as(self, sender: Sender) -> bool:
        """Whether probes can come from somebody."""
        if self.means is Means.SEGMENTS:
            return True
        return (sender.uid, sender.gid) == (self.app.uid, self.app.gid)

    def listens(self, port: int) -> bool:
        """Whether somebody accepts connections from outside to a port."""
        return any(listener.port == port for listener in self._listeners)

    def is_transparent(self, port: int) -> bool:
        """Whether somebody listens there who takes connections to any address."""
        return any(
            listener.transparent
            for listener in self._listeners
            if listener.port == port and self._is_of_family(listener.address)
        )

    def services(self) -> tuple[Endpoint, ...]:
        """Where others than the sidecar accept connections from outside, by port: an address of the workload each."""
        own = (self.policy.inbound.port, self.policy.outbound.port)
        at = {
            listener.port: listener.address
            for listener in self._listeners
            if listener.port not in own and self._is_of_family(listener.address)
        }
        return tuple(
            Endpoint(address if address in self.addresses else self.addresses[0], port)
            for port, address in sorted(at.items())
            if self.addresses
        )

    def _is_of_family(self, address: str) -> bool:
        # Who listens on all IPv6 addresses mostly gets IPv4 connections too.
        return family_of(address) is self.family or address == "::"

    def owns(self, address: str) -> bool:
        """Whether an address is one of this namespace."""
        parsed = ipaddress.ip_address(address)
        return parsed.is_loopback or address in (self._near, *self.addresses)

    def put_behind(self, address: str) -> None:
        """Have what goes to an address come out of the interface."""
        if self.device is not None and address not in self._routed:
            self.device.add_route(address)
            self._routed.add(address)

    def can_have_behind(self, address: str) -> bool:
        """`put_behind`, unless the workload has a route to this very address."""
        try:
            self.put_behind(address)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def packets(self) -> Iterator[bytes]:
        """The packets that came out of the interface since the last call, of this or of `came_out`."""
        if self.device is not None:
            yield from self.device.packets()

    def came_out(self) -> Iterator[Segment]:
        """The segments among them."""
        for packet in self.packets():
            segment = rawtcp.parse_packet(packet)
            if segment is not None:
                yield segment

    def landed(self, original: Original) -> Endpoint | None:
        """Where a connection went that has just begun; None when it is not tracked."""
        found = self._beginnings.destination_of(original)
        if found is None and not self._beginnings.complete:
            zones = (conntrack.DEFAULT_ZONE, DNS_ZONE)
            tracked = (conntrack.destination_of(original, zone) for zone in zones)
            found = next((endpoint for endpoint in tracked if endpoint is not None), None)
        return found

    @property
    def hears(self) -> bool:
        """Whether what the namespace sends to the interface can be seen."""
        return self.device is not None and self.device.hears

    @property
    def knows(self) -> bool:
        """Whether what `landed` does not know of is not tracked."""
        return self._beginnings.complete

    def would_see(self, target: "Target") -> bool:
        """Whether a probe that leaves the namespace is seen as it comes out."""
        return target.stays and self.hears

    def is_untouched(self, landed: Endpoint | None, target: "Target") -> bool:
        """Whether a probe is on its way to where it was sent."""
        return landed == target.dialled or (landed is None and self.knows)


def _joins(device: tun.Device, address: str) -> bool:
    """Give the interface an address; False when the namespace does not have this family."""
    try:
        device.add_address(address)
    except KernelError as error:
        if error.errno not in _NO_FAMILY:
            raise
        return False
    return True


class Target(msgspec.Struct, frozen=True):
    """What a probe dials, and what should become of it."""

    connection: Connection
    action: Action

    @property
    def dialled(self) -> Endpoint:
        return Endpoint(self.connection.destination, self.connection.port)

    @property
    def stays(self) -> bool:
        """Whether it ends here even when nothing redirects it."""
        return self.connection.interface == INTERFACE


def someone(network: str) -> str:
    """An address of the network by chance, neither its first nor its last where it has others."""
    parsed = ipaddress.ip_network(network)
    others = max(parsed.num_addresses - 2, 1)
    return str(parsed[min(1 + secrets.randbelow(others), parsed.num_addresses - 1)])


def _somebody(lines: Sequence[Line]) -> Sender:
    """A user and a group of whom no line speaks."""
    matches = [match for line in lines for match in line.matches]
    uids = [ids for match in matches if isinstance(match, ByUser) for ids in match.uids]
    gids = [ids for match in matches if isinstance(match, ByGroup) for ids in match.gids]
    return Sender(uid=_unnamed(uids), gid=_unnamed(gids))


def _unnamed(ranges: Sequence[IdRange]) -> int:
    """An id in none of the ranges; a usual one when they have all."""
    candidates = (*_USUAL_IDS, *(ids.last + 1 for ids in ranges[:_MAX_RANGES]))
    free = (number for number in candidates if not any(number in ids for ids in ranges))
    return next((number for number in free if number <= MAX_ID), _USUAL_IDS[0])
