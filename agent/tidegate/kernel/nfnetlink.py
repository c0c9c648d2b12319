"""Netfilter's netlink: questions to one of its subsystems, in the calling thread's namespace, and its answers.

Reading is safe whatever somebody else put there: nothing is printed and parsed again, and every answer has a bound.
Knows the messages of linux/netlink.h and linux/netfilter/nfnetlink.h; what the subsystems say is theirs to know.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
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

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NLM_F_REQUEST = 0x001
_NLM_F_DUMP_INTR = 0x010
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLA_TYPE_MASK = 0x3FFF
_NLMSGHDR = struct.Struct("=IHHII")
_NFGENMSG = struct.Struct("=BBH")
_NLATTR = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_BUFFER = 2**18
"""More than the kernel puts into one answer (NLMSG_GOODSIZE, and 32 KiB for a part of a dump)."""
_TRIES = 20
"""How often a listing is begun again into which a change came."""


class Disturbed(Exception):
    """A change came into a listing."""


class Enough(Exception):
    """The kernel has more to say than was wanted."""


class Answer(NamedTuple):
    """One message of the kernel's."""

    family: int
    """NFPROTO_* of linux/netfilter.h"""
    attributes: bytes


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
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)

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


def open_monitor(group: int, what: str) -> socket.socket:
    """A socket that becomes readable with every message to a group; non-blocking, to be closed.

    ENOBUFS from reading means that messages were lost. KernelError when it may not listen.
    """
    netlink = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
    )
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
    for _ in range(_TRIES):
        try:
            return read(*args, **kwargs)
        except Disturbed:
            continue
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
