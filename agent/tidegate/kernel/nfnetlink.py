"""Netfilter's netlink: questions to one of its subsystems, and transactions, in the calling thread's namespace.

Reading is safe whatever somebody else put there: nothing is printed and parsed again, and every answer has a bound.
A transaction is taken whole or not at all, and may be made to depend on nobody having come before it. Knows the
messages of linux/netlink.h and linux/netfilter/nfnetlink.h; what the subsystems say is theirs to know.
"""

import errno
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, ParamSpec, Self, TypeVar

from tidegate.kernel.errors import KernelError

SUBSYSTEM_IPSET = 6
SUBSYSTEM_NFTABLES = 10
"""NFNL_SUBSYS_*"""

GROUP_NFTABLES = 7
"""NFNLGRP_NFTABLES: every change of a namespace's tables."""

NO_SUBSYSTEM = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT})
"""What is answered for a subsystem that the kernel does not have (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg)."""

MOST_BYTES = 2**24
"""What an answer may have where nothing else is said."""

MOST_VALUE_BYTES = 2**16 - 5
"""How long the value of one attribute may be: its length, head included, has 16 bits."""

NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NLM_F_REQUEST = 0x001
_NLM_F_ACK = 0x004
_NLM_F_DUMP_INTR = 0x010
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLM_F_DUMP = 0x300
_NLMSGERR_ATTR_MSG = 1
_NFNL_MSG_BATCH_BEGIN = 0x10
_NFNL_MSG_BATCH_END = 0x11
_NFNL_BATCH_GENID = 1
# asm-generic/socket.h
_SO_SNDBUFFORCE = 32
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLA_TYPE_MASK = 0x3FFF
_NLMSGHDR = struct.Struct("=IHHII")
_NFGENMSG = struct.Struct("=BBH")
_NLATTR = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_GENERATION = struct.Struct("!I")
_BUFFER = 2**18
"""More than the kernel puts into one answer (NLMSG_GOODSIZE, and 32 KiB for a part of a dump)."""
_TRIES = 16
"""How often a listing is begun again into which a change came."""
_LONGEST_PAUSE_S = 0.016
_ROOM = 2**16
"""How much more than a transaction the buffer of its socket is to hold."""


class Disturbed(Exception):
    """A change came into a listing."""


class Enough(Exception):
    """The kernel has more to say than was wanted."""


class Answer(NamedTuple):
    """One message of the kernel's."""

    family: int
    """NFPROTO_* of linux/netfilter.h"""
    attributes: bytes


class Request(NamedTuple):
    """One message of a transaction."""

    kind: int
    flags: int
    """NLM_F_*, without NLM_F_REQUEST."""
    family: int
    attributes: bytes


class Refusal(NamedTuple):
    """Why a transaction was not taken."""

    request: int | None
    """Which one was refused, counted from 0; None when it was none of them but the transaction as such."""
    errno: int
    """ERESTART when the generation is not the one that was given; nothing was looked at then."""
    said: str
    """What the kernel says to its number; often nothing."""


class Conversation:
    """Questions to one subsystem about one family (0 for all), whose answers may have so many bytes altogether.

    Its methods raise KernelError for what the kernel refuses, Disturbed, and Enough.
    """

    def __init__(self, subsystem: int, family: int, what: str, most: int = MOST_BYTES) -> None:
        """`what` is what a refusal says cannot be read."""
        self._subsystem = subsystem
        self._family = family
        self._what = what
        self._most = most
        self.received = 0
        try:
            self._netlink = _socket()
        except OSError as error:
            raise _refusal(what, error.errno or 0) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._netlink.close()

    def ask(self, kind: int, attributes: bytes) -> list[bytes]:
        """The one answer, as attributes; none when there is no such thing."""
        self._send(kind, 0, attributes)
        return [answer.attributes for answer in self._receive() if answer]

    def dump(self, kind: int, attributes: bytes = b"") -> Iterator[Answer]:
        """All answers; none when there is no such thing."""
        self._send(kind, _NLM_F_DUMP, attributes)
        while True:
            for answer in self._receive():
                if answer is None:
                    return
                yield answer

    def _send(self, kind: int, flags: int, attributes: bytes) -> None:
        length = _NLMSGHDR.size + _NFGENMSG.size + len(attributes)
        kind |= self._subsystem << 8
        header = _NLMSGHDR.pack(length, kind, _NLM_F_REQUEST | flags, 0, 0)
        self._netlink.send(header + _NFGENMSG.pack(self._family, 0, 0) + attributes)

    def _receive(self) -> Iterator[Answer | None]:
        """The messages of one datagram; None for the end of a dump."""
        datagram = self._netlink.recv(_BUFFER)
        self.received += len(datagram)
        if self.received > self._most:
            raise Enough
        at = 0
        while at < len(datagram):
            length, kind, flags, _, _ = _NLMSGHDR.unpack_from(datagram, at)
            if flags & _NLM_F_DUMP_INTR:
                raise Disturbed
            body = at + _NLMSGHDR.size
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                (number,) = _ERROR.unpack_from(datagram, body)
                if number not in (0, -errno.ENOENT):
                    raise _refusal(self._what, -number)
                yield None
                return
            yield Answer(datagram[body], datagram[body + _NFGENMSG.size : at + length])
            at += (length + 3) & ~3


def transact(
    subsystem: int, requests: Sequence[Request], generation: int | None = None
) -> Refusal | None:
    """Have the kernel take all of the requests or none of them; why it took none.

    With a `generation`, only if that is still the number of what the namespace has (NFNL_BATCH_GENID).
    """
    expected = b""
    if generation is not None:
        expected = attribute(_NFNL_BATCH_GENID, _GENERATION.pack(generation))
    # Not the end is to be acknowledged but the last request: kernels before 6.10 do not do the former.
    last = len(requests)
    parts = [_frame(_NFNL_MSG_BATCH_BEGIN, subsystem, expected)]
    for sequence, request in enumerate(requests, 1):
        length = _NLMSGHDR.size + _NFGENMSG.size + len(request.attributes)
        kind = subsystem << 8 | request.kind
        flags = _NLM_F_REQUEST | request.flags | (_NLM_F_ACK if sequence == last else 0)
        parts.append(_NLMSGHDR.pack(length, kind, flags, sequence, 0))
        parts.append(_NFGENMSG.pack(request.family, 0, 0))
        parts.append(request.attributes)
    parts.append(_frame(_NFNL_MSG_BATCH_END, subsystem, b""))
    batch = b"".join(parts)
    try:
        with _socket() as netlink:
            netlink.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            netlink.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            _make_room(netlink, len(batch))
            netlink.send(batch)
            return _outcome(netlink, last)
    except OSError as error:
        return Refusal(None, error.errno or 0, "")


def _socket(flags: int = 0) -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | flags, _NETLINK_NETFILTER)


def _frame(kind: int, subsystem: int, attributes: bytes) -> bytes:
    """The begin or the end of a transaction; of all its messages only these have the number 0."""
    length = _NLMSGHDR.size + _NFGENMSG.size + len(attributes)
    header = _NLMSGHDR.pack(length, kind, _NLM_F_REQUEST, 0, 0)
    return header + _NFGENMSG.pack(socket.AF_UNSPEC, 0, socket.htons(subsystem)) + attributes


def _make_room(netlink: socket.socket, length: int) -> None:
    wanted = length + _ROOM
    if netlink.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= wanted:
        return
    try:
        netlink.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, wanted)
    except PermissionError:
        # In a user namespace of one's own there is only what the machine lets everybody have.
        netlink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)


def _outcome(netlink: socket.socket, last: int) -> Refusal | None:
    """What the kernel answered: it has done so by the time that sending returns."""
    taken = False
    for _ in range(last + 1):
        try:
            datagram = netlink.recv(_BUFFER, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        except OSError as error:
            # More complaints than the socket has room for; the first ones are there.
            if error.errno != errno.ENOBUFS:
                raise
            continue
        _, kind, flags, sequence, _ = _NLMSGHDR.unpack_from(datagram)
        if kind != _NLMSG_ERROR:
            continue
        (number,) = _ERROR.unpack_from(datagram, _NLMSGHDR.size)
        if number:
            return Refusal(sequence - 1 if sequence else None, -number, _said(datagram, flags))
        taken = taken or sequence == last
    return None if taken else Refusal(None, errno.ENOBUFS, "")


def _said(datagram: bytes, flags: int) -> str:
    """What an error says in words (struct nlmsgerr, then attributes when the flags say so)."""
    if not flags & _NLM_F_ACK_TLVS or not flags & _NLM_F_CAPPED:
        return ""
    attributes = datagram[_NLMSGHDR.size + _ERROR.size + _NLMSGHDR.size :]
    return text_of(dict(attributes_in(attributes)).get(_NLMSGERR_ATTR_MSG, b""))


def holder(port: int) -> str | None:
    """Who has a netlink socket of this namespace open, such as "process 71 (nft)"; None when none is found."""
    sockets = (
        row.split() for row in Path("/proc/thread-self/net/netlink").read_text().splitlines()
    )
    inodes = [row[9] for row in sockets if row[1:3] == [str(_NETLINK_NETFILTER), str(port)]]
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            if any(str(fd.readlink()) == f"socket:[{inodes[0]}]" for fd in process.glob("fd/*")):
                name = (process / "comm").read_bytes()[:-1].decode(errors="replace")
                clean = "".join(one if one.isprintable() else "?" for one in name)
                return f"process {process.name} ({clean})"
        except OSError:
            # It has ended, or closed it.
            continue
    return None


def pause(attempt: int) -> None:
    """Wait so that two who disturb each other do not meet again; longer, the more attempts (from 0) there were."""
    time.sleep(random.uniform(0, min(0.0005 * 2**attempt, _LONGEST_PAUSE_S)))  # noqa: S311 - no secret


def open_monitor(group: int, what: str) -> socket.socket:
    """A socket that becomes readable with every message to a group; non-blocking, to be closed.

    ENOBUFS from reading means that messages were lost. KernelError when it may not listen.
    """
    try:
        netlink = _socket(socket.SOCK_NONBLOCK)
    except OSError as error:
        raise _refusal(what, error.errno or 0) from error
    try:
        # A socket without an address gets nothing: the kernel's own is 0 too (af_netlink.c, do_one_broadcast).
        netlink.bind((0, 0))
        netlink.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    except OSError as error:
        netlink.close()
        raise _refusal(what, error.errno or 0) from error
    return netlink


_P = ParamSpec("_P")
_T = TypeVar("_T")


def undisturbed(what: str, read: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `read` returns; it is called again when it raises Disturbed, so many times. KernelError after that."""
    for attempt in range(_TRIES):
        try:
            return read(*args, **kwargs)
        except Disturbed:
            pause(attempt)
    raise KernelError(f"{what} change faster than they can be read", errno.EAGAIN)


def attributes_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kinds and values, without the bits that say how a value is packed."""
    at = 0
    while at + _NLATTR.size <= len(data):
        length, kind = _NLATTR.unpack_from(data, at)
        if length < _NLATTR.size:
            raise KernelError("a netlink attribute is shorter than its head", errno.EPROTO)
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


def _refusal(what: str, number: int) -> KernelError:
    return KernelError(f"cannot read {what}: {os.strerror(number)}", number)
