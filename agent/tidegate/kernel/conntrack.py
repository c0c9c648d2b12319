"""Connection tracking of the current network namespace, over ctnetlink. Knows nothing of what was tracked."""

import errno
import functools
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tidegate.kernel import netlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    NETLINK_NETFILTER,
    NLA_F_NESTED,
    Netlink,
    attribute,
    attributes_in,
    number_of,
)
from tidegate.kernel.nfnetlink import GROUP_CONNTRACK_NEW, NFGENMSG, SUBSYSTEM_CONNTRACK

DEFAULT_ZONE = 0
"""NF_CT_DEFAULT_ZONE_ID of linux/netfilter/nf_conntrack_zones_common.h"""

_OF_ALL = NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)

# linux/netfilter/nfnetlink_conntrack.h
_GET = SUBSYSTEM_CONNTRACK << 8 | 1
_DELETE = SUBSYSTEM_CONNTRACK << 8 | 2
_GET_STATS = SUBSYSTEM_CONNTRACK << 8 | 5
_CTA_STATS_GLOBAL_ENTRIES = 1
_CTA_TUPLE_ORIG = 1
_CTA_TUPLE_REPLY = 2
_CTA_STATUS = 3
_CTA_ZONE = 18
_CTA_STATUS_MASK = 26
_CTA_TUPLE_IP = 1
_CTA_TUPLE_PROTO = 2
_CTA_TUPLE_ZONE = 3
_CTA_IP_V4_SRC = 1
_CTA_IP_V4_DST = 2
_CTA_IP_V6_SRC = 3
_CTA_IP_V6_DST = 4
_CTA_PROTO_NUM = 1
_CTA_PROTO_SRC_PORT = 2
_CTA_PROTO_DST_PORT = 3
_CTA_IP: dict[int, tuple[int, int]] = {
    socket.AF_INET: (_CTA_IP_V4_SRC, _CTA_IP_V4_DST),
    socket.AF_INET6: (_CTA_IP_V6_SRC, _CTA_IP_V6_DST),
}
_SHORT = struct.Struct("!H")

_IPS_DST_NAT = 1 << 5
"""linux/netfilter/nf_conntrack_common.h"""

_EVENTS_SETTING = Path("/proc/sys/net/netfilter/nf_conntrack_events")
_BUFFER_BYTES = 1 << 22
_MOST_BYTES = 2**30
"""More than a listing tells in the seconds that it has; nothing of it is kept."""
_MAX_EVENTS = 20_000
"""How many events one question reads at most, in a namespace that opens connections all the time."""


class Original(msgspec.Struct, frozen=True, kw_only=True):
    """A connection as its first packet was, before any translation. Addresses are text of one family."""

    protocol: int
    """IPPROTO_TCP or IPPROTO_UDP."""
    source: str
    source_port: int
    destination: str
    destination_port: int


class Endpoint(msgspec.Struct, frozen=True):
    """Address and port at which packets arrive."""

    address: str
    port: int


class Translated(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that goes to another address or port than was dialled."""

    original: Original
    answers_from: Endpoint
    """Where it goes."""
    answers_to: Endpoint
    zone: int
    """In which its original direction is tracked."""
    key: bytes
    """What its entry is found by, for `forget`."""


class Beginnings:
    """The connections that begin while somebody listens, see `beginnings`."""

    def __init__(self, events: socket.socket) -> None:
        self._events = events
        self._lost = False

    @property
    def complete(self) -> bool:
        """Whether every beginning was heard.

        False where the kernel tells none (net.netfilter.nf_conntrack_events is 0), and after there were more at a
        time than there was room for.
        """
        return not self._lost and _tells_beginnings()

    def destination_of(self, connection: Original) -> Endpoint | None:
        """As the function of this name, but also for a connection that has ended since, in whatever zone.

        Forgets the connections that began before it. When not all are heard, None may be a lack of knowledge.
        """
        addresses = [
            ipaddress.ip_address(address).packed
            for address in (connection.source, connection.destination)
        ]
        for _ in range(_MAX_EVENTS):
            try:
                datagram = netlink.received(self._events)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise _refusal(error) from error
                self._lost = True
                continue
            if all(address in datagram for address in addresses):
                for message in netlink.messages(datagram):
                    entry = _entry(message.body)
                    if _original(entry) == connection:
                        return _answers_from(entry)
        self._lost = True
        return None


@contextmanager
def beginnings() -> Iterator[Beginnings]:
    """Listen for the connections that begin in the namespace that the calling thread is in.

    The kernel forgets a connection at once that is refused; this is how to learn where it went. KernelError when it
    may not be listened to.
    """
    with netlink.open_monitor(
        NETLINK_NETFILTER, GROUP_CONNTRACK_NEW, "connection tracking", _BUFFER_BYTES
    ) as events:
        yield Beginnings(events)


def destination_of(connection: Original, zone: int = DEFAULT_ZONE) -> Endpoint | None:
    """Where an open connection really goes: who its answers come from, as tracked in a zone.

    What was dialled, when nothing translates it; None when it is not tracked. KernelError when that cannot be read.
    """
    asked = _tuple(connection) + attribute(_CTA_ZONE, _SHORT.pack(zone))
    entry = _found(_family(connection), asked)
    return None if entry is None else _answers_from(entry)


def original_of(protocol: int, server: Endpoint, client: Endpoint) -> Original | None:
    """What was dialled of the connection whose answers go from `server` to `client`, as tracked in the default zone.

    Of a redirected connection these are the ends that the socket which accepted it has. None when it is not tracked.
    KernelError when that cannot be read.
    """
    answers = Original(
        protocol=protocol,
        source=server.address,
        source_port=server.port,
        destination=client.address,
        destination_port=client.port,
    )
    entry = _found(_family(answers), _tuple(answers, _CTA_TUPLE_REPLY))
    return None if entry is None else _original(entry)


def translated(protocol: int, seconds: float) -> Iterator[Translated]:
    """The connections whose destination is translated, of IPPROTO_TCP or IPPROTO_UDP and both address families.

    Takes milliseconds where there are connections: the kernel goes through those of all namespaces. Enough when there
    are more than it tells in so many seconds. KernelError when they cannot be read.
    """
    wanted = struct.pack("!I", _IPS_DST_NAT)
    filtered = attribute(_CTA_STATUS, wanted) + attribute(_CTA_STATUS_MASK, wanted)
    what = "list the connections of connection tracking"
    with Netlink(NETLINK_NETFILTER, what, _MOST_BYTES, seconds) as conntrack:
        if not _count(conntrack):
            return
        for answer in conntrack.dump(_GET, _OF_ALL + filtered):
            entry = _entry(answer)
            original = _original(entry)
            if original is not None and original.protocol == protocol:
                yield _translated(answer[: NFGENMSG.size], entry, original)


def forget(connections: Iterable[Translated]) -> None:
    """Forget these connections, those that are known no more aside. KernelError when it is refused."""
    with Netlink(NETLINK_NETFILTER, "forget a connection of connection tracking") as conntrack:
        for connection in connections:
            try:
                conntrack.do(_DELETE, connection.key)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise


def flush(family: int = socket.AF_UNSPEC) -> None:
    """Forget the connections of the namespace that the calling thread is in, of one address family or of all.

    Open connections are taken up again with their next packet, without any translation that they had. KernelError
    when it is refused.
    """
    # Without a version the kernel takes no notice of the family (ctnetlink_del_conntrack).
    with Netlink(NETLINK_NETFILTER, "flush connection tracking") as conntrack:
        conntrack.do(_DELETE, NFGENMSG.pack(family, 1, 0))


def _tells_beginnings() -> bool:
    try:
        return _EVENTS_SETTING.read_text().strip() != "0"
    except FileNotFoundError:
        # Without connection tracking no connection begins.
        return True


def _count(conntrack: Netlink) -> int:
    """How many connections the namespace has."""
    told = _entry(conntrack.ask(_GET_STATS, _OF_ALL))
    return number_of(told.get(_CTA_STATS_GLOBAL_ENTRIES, b""))


def _of(family: int) -> bytes:
    return NFGENMSG.pack(family, 0, 0)


def _found(family: int, asked: bytes) -> dict[int, bytes] | None:
    """The entry of a connection; None when there is none."""
    with Netlink(NETLINK_NETFILTER, "read a connection from connection tracking") as conntrack:
        try:
            return _entry(conntrack.ask(_GET, _of(family) + asked))
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return None


def _family(connection: Original) -> int:
    return socket.AF_INET6 if ":" in connection.destination else socket.AF_INET


def _entry(body: bytes) -> dict[int, bytes]:
    """What a message says behind its struct nfgenmsg."""
    return dict(attributes_in(body[NFGENMSG.size :]))


def _tuple(connection: Original, direction: int = _CTA_TUPLE_ORIG) -> bytes:
    """A connection as what it is found by: by its first packet, or by the packets that answer."""
    source, destination = _CTA_IP[_family(connection)]
    addresses = attribute(source, ipaddress.ip_address(connection.source).packed)
    addresses += attribute(destination, ipaddress.ip_address(connection.destination).packed)
    ports = attribute(_CTA_PROTO_NUM, bytes([connection.protocol]))
    ports += attribute(_CTA_PROTO_SRC_PORT, _SHORT.pack(connection.source_port))
    ports += attribute(_CTA_PROTO_DST_PORT, _SHORT.pack(connection.destination_port))
    return attribute(
        direction | NLA_F_NESTED,
        attribute(_CTA_TUPLE_IP | NLA_F_NESTED, addresses)
        + attribute(_CTA_TUPLE_PROTO | NLA_F_NESTED, ports),
    )


def _original(entry: dict[int, bytes]) -> Original | None:
    """None for an entry that has no ports."""
    original = dict(attributes_in(entry[_CTA_TUPLE_ORIG]))
    protocol = dict(attributes_in(original[_CTA_TUPLE_PROTO]))
    if _CTA_PROTO_SRC_PORT not in protocol:
        return None
    source, destination = _ends(original)
    return Original(
        protocol=protocol[_CTA_PROTO_NUM][0],
        source=source.address,
        source_port=source.port,
        destination=destination.address,
        destination_port=destination.port,
    )


def _answers_from(entry: dict[int, bytes]) -> Endpoint:
    source, _ = _ends(dict(attributes_in(entry[_CTA_TUPLE_REPLY])))
    return source


def _translated(head: bytes, entry: dict[int, bytes], original: Original) -> Translated:
    # A zone of one direction is part of the tuple; the kernel takes no second one (ctnetlink_parse_tuple_zone).
    of_both = attribute(_CTA_ZONE, entry[_CTA_ZONE]) if _CTA_ZONE in entry else b""
    found_by = attribute(_CTA_TUPLE_ORIG | NLA_F_NESTED, entry[_CTA_TUPLE_ORIG])
    answers_from, answers_to = _ends(dict(attributes_in(entry[_CTA_TUPLE_REPLY])))
    of_original = dict(attributes_in(entry[_CTA_TUPLE_ORIG])).get(_CTA_TUPLE_ZONE, b"")
    return Translated(
        original=original,
        answers_from=answers_from,
        answers_to=answers_to,
        zone=number_of(entry.get(_CTA_ZONE) or of_original),
        key=head + found_by + of_both,
    )


def _ends(direction: dict[int, bytes]) -> tuple[Endpoint, Endpoint]:
    """Source and destination of one direction of an entry."""
    addresses = dict(attributes_in(direction[_CTA_TUPLE_IP]))
    ports = dict(attributes_in(direction[_CTA_TUPLE_PROTO]))
    source = addresses.get(_CTA_IP_V4_SRC) or addresses[_CTA_IP_V6_SRC]
    destination = addresses.get(_CTA_IP_V4_DST) or addresses[_CTA_IP_V6_DST]
    return (
        Endpoint(_text(source), number_of(ports[_CTA_PROTO_SRC_PORT])),
        Endpoint(_text(destination), number_of(ports[_CTA_PROTO_DST_PORT])),
    )


@functools.lru_cache(4096)
def _text(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


def _refusal(error: OSError) -> KernelError:
    return netlink.refusal("listen to connection tracking", error.errno)
