"""Connection tracking of the current network namespace, over ctnetlink. Knows nothing of what was tracked."""

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import NetlinkError, NFCTSocket
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink.nfctsocket import IPCTNL_MSG_CT_DELETE, NFCTAttrTuple, nfct_msg

from tidegate.kernel.errors import KernelError

DEFAULT_ZONE = 0
"""NF_CT_DEFAULT_ZONE_ID of linux/netfilter/nf_conntrack_zones_common.h"""

# linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_compat.h
_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NFNLGRP_CONNTRACK_NEW = 1
_NFNL_SUBSYS_CTNETLINK = 1
# asm-generic/socket.h
_SO_RCVBUFFORCE = 33
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr"""

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
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
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
