"""Connection tracking of the current network namespace, over ctnetlink. Knows nothing of what was tracked."""

import errno
import functools
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import NetlinkError, NFCTSocket
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink.nfctsocket import IPCTNL_MSG_CT_DELETE, NFCTAttrTuple, nfct_msg

from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import NETLINK_NETFILTER, Netlink
from tidegate.kernel.nfnetlink import attribute, attributes_in

DEFAULT_ZONE = 0
"""NF_CT_DEFAULT_ZONE_ID of linux/netfilter/nf_conntrack_zones_common.h"""

# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_compat.h
_SOL_NETLINK = 270
_NLA_F_NESTED = 1 << 15
_NETLINK_ADD_MEMBERSHIP = 1
_NFNLGRP_CONNTRACK_NEW = 1
_NFNL_SUBSYS_CTNETLINK = 1
# asm-generic/socket.h
_SO_RCVBUFFORCE = 33
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr"""
_NFGENMSG = struct.Struct("=BBH")
_OF_ALL = _NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)

# linux/netfilter/nfnetlink_conntrack.h
_GET = _NFNL_SUBSYS_CTNETLINK << 8 | 1
_DELETE = _NFNL_SUBSYS_CTNETLINK << 8 | 2
_GET_STATS = _NFNL_SUBSYS_CTNETLINK << 8 | 5
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

_IPS_DST_NAT = 1 << 5
"""linux/netfilter/nf_conntrack_common.h"""

_EVENT_BYTES = 1 << 16
_EVENTS_SETTING = Path("/proc/sys/net/netfilter/nf_conntrack_events")
_BUFFER_BYTES = 1 << 22
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
                datagram = self._events.recv(_EVENT_BYTES)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost = True
                continue
            if all(address in datagram for address in addresses):
                for message in _messages(datagram):
                    if _original(message) == connection:
                        return _answering(message)
        return None


@contextmanager
def beginnings() -> Iterator[Beginnings]:
    """Listen for the connections that begin in the namespace that the calling thread is in.

    The kernel forgets a connection at once that is refused; this is how to learn where it went. KernelError when it
    may not be listened to.
    """
    with _event_socket() as events:
        yield Beginnings(events)


def _event_socket() -> socket.socket:
    try:
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    except OSError as error:
        raise _deaf(error) from error
    try:
        events.setblocking(False)
        events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        # A socket without an address gets no event: the kernel's own is 0 too (af_netlink.c, do_one_broadcast).
        events.bind((0, 0))
        events.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_CONNTRACK_NEW)
    except OSError as error:
        events.close()
        raise _deaf(error) from error
    return events


def _deaf(error: OSError) -> KernelError:
    problem = f"cannot listen to connection tracking: {error.strerror}"
    return KernelError(problem, error.errno or 0)


def destination_of(connection: Original, zone: int = DEFAULT_ZONE) -> Endpoint | None:
    """Where an open connection really goes: who its answers come from, as tracked in a zone.

    What was dialled, when nothing translates it; None when it is not tracked. KernelError when that cannot be read.
    """
    family = socket.AF_INET6 if ":" in connection.destination else socket.AF_INET
    original = NFCTAttrTuple(
        family=family,
        saddr=connection.source,
        daddr=connection.destination,
        proto=connection.protocol,
        sport=connection.source_port,
        dport=connection.destination_port,
    )
    zoned = {"zone": zone} if zone != DEFAULT_ZONE else {}
    try:
        with _ctnetlink(family, "read a connection from") as conntrack:
            entry, *_ = conntrack.entry("get", tuple_orig=original, **zoned)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return _answering(entry)


def translated(protocol: int, seconds: float) -> Iterator[Translated]:
    """The connections whose destination is translated, of IPPROTO_TCP or IPPROTO_UDP and both address families.

    Takes milliseconds where there are connections: the kernel goes through those of all namespaces. Unfinished when
    there are more than it tells in so many seconds: kernels before 5.15 tell also those that are not translated, and
    other people may have opened many. KernelError when they cannot be read.
    """
    wanted = struct.pack("!I", _IPS_DST_NAT)
    filtered = attribute(_CTA_STATUS, wanted) + attribute(_CTA_STATUS_MASK, wanted)
    with Netlink(NETLINK_NETFILTER, "list the connections of connection tracking") as conntrack:
        if not _count(conntrack):
            return
        for answer in conntrack.dump(_GET, _OF_ALL + filtered, seconds):
            found = _translated(answer)
            if found is not None and found.original.protocol == protocol:
                yield found


def forget(connections: Iterable[Translated]) -> None:
    """Forget these connections, those that are known no more aside. KernelError when it is refused."""
    with Netlink(NETLINK_NETFILTER, "forget a connection of connection tracking") as conntrack:
        for connection in connections:
            try:
                conntrack.ask(_DELETE, connection.key)
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise


def flush(family: int = socket.AF_UNSPEC) -> None:
    """Forget the connections of the namespace that the calling thread is in, of one address family or of all.

    Open connections are taken up again with their next packet, without any translation that they had. KernelError
    when it is refused.
    """
    message = nfct_msg()
    # Without a version the kernel takes no notice of the family (Linux 5.3, ctnetlink_del_conntrack).
    message["version"] = 1
    with _ctnetlink(family, "flush") as conntrack:
        flags = NLM_F_REQUEST | NLM_F_ACK
        list(conntrack.request(message, IPCTNL_MSG_CT_DELETE, msg_flags=flags))


def _tells_beginnings() -> bool:
    try:
        return _EVENTS_SETTING.read_text().strip() != "0"
    except FileNotFoundError:
        # Without connection tracking no connection begins.
        return True


def _messages(datagram: bytes) -> Iterator[Any]:
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, kind, *_ = _HEADER.unpack_from(datagram, at)
        if kind >> 8 == _NFNL_SUBSYS_CTNETLINK:
            message = nfct_msg(datagram[at : at + length])
            message.decode()
            yield message
        at += max(length + 3 & ~3, _HEADER.size)


def _original(message: Any) -> Original | None:
    found = NFCTAttrTuple.from_netlink(message["nfgen_family"], message.get_attr("CTA_TUPLE_ORIG"))
    if found.proto not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return None
    return Original(
        protocol=found.proto,
        source=found.saddr,
        source_port=found.sport,
        destination=found.daddr,
        destination_port=found.dport,
    )


def _count(conntrack: Netlink) -> int:
    """How many connections the namespace has."""
    answer = conntrack.ask(_GET_STATS, _OF_ALL) or b""
    told = dict(attributes_in(answer[_NFGENMSG.size :]))
    return int.from_bytes(told.get(_CTA_STATS_GLOBAL_ENTRIES, b""))


def _translated(answer: bytes) -> Translated | None:
    """What an entry of the kernel's says; None for one that is not translated, or has no ports."""
    entry = dict(attributes_in(answer[_NFGENMSG.size :]))
    status = int.from_bytes(entry.get(_CTA_STATUS, b""))
    original = dict(attributes_in(entry[_CTA_TUPLE_ORIG]))
    reply = dict(attributes_in(entry[_CTA_TUPLE_REPLY]))
    protocol = dict(attributes_in(original[_CTA_TUPLE_PROTO]))
    if not status & _IPS_DST_NAT or _CTA_PROTO_SRC_PORT not in protocol:
        return None
    source, destination = _ends(original)
    # A zone of one direction is part of the tuple; the kernel takes no second one (ctnetlink_parse_tuple_zone).
    of_both = attribute(_CTA_ZONE, entry[_CTA_ZONE]) if _CTA_ZONE in entry else b""
    key = (
        answer[: _NFGENMSG.size]
        + attribute(_CTA_TUPLE_ORIG | _NLA_F_NESTED, entry[_CTA_TUPLE_ORIG])
        + of_both
    )
    answers_from, answers_to = _ends(reply)
    return Translated(
        original=Original(
            protocol=protocol[_CTA_PROTO_NUM][0],
            source=source.address,
            source_port=source.port,
            destination=destination.address,
            destination_port=destination.port,
        ),
        answers_from=answers_from,
        answers_to=answers_to,
        zone=int.from_bytes(entry.get(_CTA_ZONE) or original.get(_CTA_TUPLE_ZONE, b"")),
        key=key,
    )


def _ends(direction: dict[int, bytes]) -> tuple[Endpoint, Endpoint]:
    """Source and destination of one direction of an entry."""
    addresses = dict(attributes_in(direction[_CTA_TUPLE_IP]))
    ports = dict(attributes_in(direction[_CTA_TUPLE_PROTO]))
    source = addresses.get(_CTA_IP_V4_SRC) or addresses[_CTA_IP_V6_SRC]
    destination = addresses.get(_CTA_IP_V4_DST) or addresses[_CTA_IP_V6_DST]
    return (
        Endpoint(_text(source), int.from_bytes(ports[_CTA_PROTO_SRC_PORT])),
        Endpoint(_text(destination), int.from_bytes(ports[_CTA_PROTO_DST_PORT])),
    )


@functools.lru_cache(4096)
def _text(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


def _answering(message: Any) -> Endpoint:
    family = message["nfgen_family"]
    reply = NFCTAttrTuple.from_netlink(family, message.get_attr("CTA_TUPLE_REPLY"))
    return Endpoint(reply.saddr, reply.sport)


@contextmanager
def _ctnetlink(family: int, what: str) -> Iterator[Any]:
    try:
        with NFCTSocket(nfgen_family=family) as conntrack:
            yield conntrack
    except NetlinkError as error:
        reason = os.strerror(error.code)
        raise KernelError(f"cannot {what} connection tracking: {reason}", error.code) from error
