"""Netlink by hand, in the calling thread's namespace: one client for every part of the kernel that speaks it.

Whoever may change a namespace's network can also send messages to the sockets that somebody has open there. Only what
the kernel says is taken, and only as the answer to what was asked; every listing has a bound in bytes and in time.
Knows messages, errors and attributes as such (linux/netlink.h); what is in them is its callers' to know.
"""

import errno
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, ParamSpec, Self, TypeVar

from tidegate.kernel.errors import KernelError

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NLA_F_NESTED = 1 << 15
NLA_F_NET_BYTEORDER = 1 << 14

MOST_BYTES = 2**24
"""What listings may have where nothing else is said."""
MOST_S = 10.0
"""How long they may take where nothing else is said."""
MOST_VALUE_BYTES = 2**16 - 5
"""How long the value of one attribute may be: its length, head included, has 16 bits."""
HEAD = struct.Struct("=IHHII")
"""struct nlmsghdr"""

_NLM_F_DUMP_INTR = 0x010
_NETLINK_ADD_MEMBERSHIP = 1
_NLA_TYPE_MASK = 0x3FFF
_NLATTR = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
# asm-generic/socket.h
_SO_RCVBUFFORCE = 33
_THE_KERNEL = 0
"""Its port, which no other socket can have."""
_BUFFER = 2**18
"""More than the kernel puts into one datagram: 32 KiB for a part of a dump, or a whole request with an error."""
_TRIES = 16
"""How often a listing is begun again into which a change came."""
_LONGEST_PAUSE_S = 0.016


class Disturbed(KernelError):
    """A change came into a listing."""


class Enough(KernelError):
    """The kernel has more to say than was wanted, in bytes or in time."""


class Message(NamedTuple):
    """One message of a datagram."""

    kind: int
    flags: int
    sequence: int
    body: bytes

    @property
    def error(self) -> int:
        """The error's number (errno), of one that ends an answer; 0 for success."""
        if len(self.body) < _ERROR.size:
            raise _garbled()
        number: int = _ERROR.unpack_from(self.body)[0]
        return -number


class Request(NamedTuple):
    """Something to have done; `flags` are NLM_F_*."""

    kind: int
    body: bytes
    flags: int = 0


class Netlink:
    """Questions to a part of the kernel, one at a time. Its methods raise KernelError for what is refused."""

    def __init__(
        self, protocol: int, what: str, most: int = MOST_BYTES, seconds: float = MOST_S
    ) -> None:
        """`what` is what a refusal says cannot be done.

        `dump` may tell so many bytes altogether, until so many seconds from now.
        """
        self._what = what
        self._left = most
        self._until = time.monotonic() + seconds
        self._sequence = 0
        try:
            self._socket = connected(protocol)
        except OSError as error:
            raise self._refusal(error.errno) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, kind: int, body: bytes) -> bytes:
        """The body of the one message that is the answer."""
        self._send(kind, 0, body)
        while not (heard := self._heard()):
            pass
        if heard[0].kind == NLMSG_ERROR:
            raise self._refusal(heard[0].error)
        return heard[0].body

    def do(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Have something done; `flags` are NLM_F_*."""
        self._send(kind, NLM_F_ACK | flags, body)
        while True:
            for message in self._heard():
                if message.kind == NLMSG_ERROR:
                    if message.error:
                        raise self._refusal(message.error)
                    return

    def do_all(self, requests: Sequence[Request]) -> None:
        """Have things done, one after the other, in one system call: a process that is killed had all done, or none.

        Also what comes after a refusal is tried. Raises the first refusal.
        """
        first = self._sequence + 1
        parts = []
        for kind, body, flags in requests:
            self._sequence += 1
            body += bytes(-len(body) % 4)
            flags |= NLM_F_REQUEST | NLM_F_ACK
            parts.append(HEAD.pack(HEAD.size + len(body), kind, flags, self._sequence, 0) + body)
        self._transmit(b"".join(parts))
        errors: dict[int, int] = {}
        while len(errors) < len(requests):
            for message in self._received():
                if message.kind == NLMSG_ERROR and message.sequence >= first:
                    errors[message.sequence] = message.error
        for _, error in sorted(errors.items()):
            if error:
                raise self._refusal(error)

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """The bodies of all answers. Disturbed; Enough.

        No other question while it runs, or after it unless it came to its end.
        """
        self._send(kind, NLM_F_DUMP, body)
        while True:
            heard = self._heard()
            if self._left < 0:
                raise self._enough()
            for message in heard:
                if message.flags & _NLM_F_DUMP_INTR:
                    problem = f"cannot {self._what}: they change faster than they can be listed"
                    raise Disturbed(problem, errno.EAGAIN)
                if message.kind in (NLMSG_ERROR, NLMSG_DONE):
                    if message.error:
                        raise self._refusal(message.error)
                    return
                yield message.body
            if time.monotonic() > self._until:
                raise self._enough()

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        head = HEAD.pack(HEAD.size + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0)
        self._transmit(head + body)

    def _transmit(self, datagram: bytes) -> None:
        try:
            self._socket.send(datagram)
        except OSError as error:
            raise self._refusal(error.errno) from error

    def _heard(self) -> list[Message]:
        """What is for this question in the next datagram."""
        return [one for one in self._received() if one.sequence == self._sequence]

    def _received(self) -> list[Message]:
        """What is in the next datagram."""
        try:
            datagram = received(self._socket)
        except OSError as error:
            raise self._refusal(error.errno) from error
        self._left -= len(datagram)
        return list(messages(datagram))

    def _enough(self) -> Enough:
        return Enough(f"cannot {self._what}: there is more than is looked at", errno.E2BIG)

    def _refusal(self, number: int | None) -> KernelError:
        return refusal(self._what, number)


def connected(protocol: int) -> socket.socket:
    """A socket that asks the kernel and hears it alone; to be closed. OSError when there is none.

    What others send to it is refused to them (af_netlink.c, netlink_getsockbyportid), except to the groups that it
    joins, and in the moment between its becoming known and its being connected: so `received` looks at the sender too.
    """
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    try:
        made.connect((_THE_KERNEL, 0))
    except OSError:
        made.close()
        raise
    return made


def received(netlink: socket.socket) -> bytes:
    """The kernel's next datagram; b"" for somebody else's. OSError, BlockingIOError when there is none.

    Does not wait: the kernel has answered by the time that sending returns, and goes on with a dump while it is read.
    """
    datagram, (port, _) = netlink.recvfrom(_BUFFER, socket.MSG_DONTWAIT)
    return datagram if port == _THE_KERNEL else b""


def messages(datagram: bytes) -> Iterator[Message]:
    """What is in a datagram. KernelError when it is cut off, or no messages."""
    at = 0
    while at < len(datagram):
        if len(datagram) - at < HEAD.size:
            raise _garbled()
        length, kind, flags, sequence, _ = HEAD.unpack_from(datagram, at)
        if not HEAD.size <= length <= len(datagram) - at:
            raise _garbled()
        yield Message(kind, flags, sequence, datagram[at + HEAD.size : at + length])
        at += (length + 3) & ~3


def open_monitor(protocol: int, group: int, what: str, buffer: int | None = None) -> socket.socket:
    """A socket that becomes readable with every message to a group; non-blocking, to be closed.

    `received` tells the kernel's messages from those that somebody else sends to the group. ENOBUFS from reading means
    that messages were lost; there is room for so many bytes, where that is said. KernelError when it may not listen.
    """
    try:
        monitor = connected(protocol)
        try:
            monitor.setblocking(False)
            if buffer is not None:
                _make_room(monitor, buffer)
            monitor.setsockopt(SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            monitor.close()
            raise
    except OSError as error:
        raise refusal(f"listen to {what}", error.errno) from error
    return monitor


def _make_room(monitor: socket.socket, wanted: int) -> None:
    try:
        monitor.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, wanted)
    except PermissionError:
        # In a user namespace of one's own there is only what the machine lets everybody have.
        monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def undisturbed(read: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `read` returns; it is called again when it raises Disturbed, so many times."""
    for attempt in range(_TRIES - 1):
        try:
            return read(*args, **kwargs)
        except Disturbed:
            pause(attempt)
    return read(*args, **kwargs)


def pause(attempt: int) -> None:
    """Wait so that two who disturb each other do not meet again; longer, the more attempts (from 0) there were."""
    time.sleep(random.uniform(0, min(0.0005 * 2**attempt, _LONGEST_PAUSE_S)))  # noqa: S311 - no secret


def attributes_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kinds and values, without the bits that say how a value is packed. KernelError when it is cut off."""
    at = 0
    while at + _NLATTR.size <= len(data):
        length, kind = _NLATTR.unpack_from(data, at)
        if not _NLATTR.size <= length <= len(data) - at:
            raise _garbled()
        yield kind & _NLA_TYPE_MASK, data[at + _NLATTR.size : at + length]
        at += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    padding = bytes(-len(value) % 4)
    return _NLATTR.pack(_NLATTR.size + len(value), kind) + value + padding


def text_attribute(kind: int, value: str) -> bytes:
    """One attribute that holds a text, with its closing 0."""
    return attribute(kind, value.encode() + b"\0")


def text_of(value: bytes) -> str:
    """The text that an attribute holds; bytes that are none show as escapes."""
    return value.partition(b"\0")[0].decode(errors="backslashreplace")


def number_of(value: bytes) -> int:
    """The number that an attribute holds in network byte order; 0 for an empty one."""
    return int.from_bytes(value, "big")


def refusal(what: str, number: int | None) -> KernelError:
    """That something cannot be done, with the kernel's reason."""
    return KernelError(f"cannot {what}: {os.strerror(number or 0)}", number or 0)


def _garbled() -> KernelError:
    return KernelError("the kernel says something that is no netlink message", errno.EPROTO)
