"""Netfilter's netlink: questions to one of its subsystems, and transactions, in the calling thread's namespace.

Reading is safe whatever somebody else put there: nothing is printed and parsed again, and every listing has a bound.
A transaction is taken whole or not at all, and may be made to depend on nobody having come before it. Knows the
messages of linux/netfilter/nfnetlink.h; what the subsystems say is theirs to know.
"""

import errno
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tidegate.kernel import netlink, processes
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    HEAD,
    MOST_BYTES,
    MOST_S,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    Message,
    Netlink,
    attribute,
    attributes_in,
    text_of,
)

SUBSYSTEM_CONNTRACK = 1
SUBSYSTEM_IPSET = 6
SUBSYSTEM_NFTABLES = 10
"""NFNL_SUBSYS_*"""

GROUP_CONNTRACK_NEW = 1
GROUP_NFTABLES = 7
"""NFNLGRP_*: connections that begin, and every change of a namespace's tables."""

NO_SUBSYSTEM = frozenset(
    {errno.EAFNOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}
)
"""What is answered for a subsystem that the kernel does not have (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg), or a
family of one."""

NFGENMSG = struct.Struct("=BBH")
"""struct nfgenmsg: family, version, and the subsystem in network byte order where it is not in the message's kind."""

_NFNL_MSG_BATCH_BEGIN = 0x10
_NFNL_MSG_BATCH_END = 0x11
_NFNL_BATCH_GENID = 1
# asm-generic/socket.h
_SO_SNDBUFFORCE = 32
_ERRNO_BYTES = 4
_GENERATION = struct.Struct("!I")
_ROOM = 2**16
"""How much more than a transaction the buffer of its socket is to hold."""
_MOST_SEARCHED_S = 0.2


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
    """Questions to one subsystem about one family (0 for all), as netlink.Netlink has them. Nothing is no refusal.

    Its methods raise KernelError for what the kernel refuses; `dump` also Disturbed and Enough.
    """

    def __init__(
        self,
        subsystem: int,
        family: int,
        what: str,
        most: int = MOST_BYTES,
        seconds: float = MOST_S,
    ) -> None:
        """`what` is what a refusal says cannot be done."""
        self._subsystem = subsystem << 8
        self._head = NFGENMSG.pack(family, 0, 0)
        self._netlink = Netlink(NETLINK_NETFILTER, what, most, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._netlink.__exit__(*exception)

    def ask(self, kind: int, attributes: bytes) -> bytes | None:
        """The one answer, as attributes; None when there is no such thing."""
        try:
            answer = self._netlink.ask(self._subsystem | kind, self._head + attributes)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            return None
        return answer[NFGENMSG.size :]

    def do(self, kind: int, attributes: bytes, flags: int = 0) -> None:
        """Have something done; `flags` are NLM_F_*. What is not there is refused too (ENOENT)."""
        self._netlink.do(self._subsystem | kind, self._head + attributes, flags)

    def dump(self, kind: int, attributes: bytes = b"") -> Iterator[Answer]:
        """All answers; none when there is no such thing."""
        try:
            for body in self._netlink.dump(self._subsystem | kind, self._head + attributes):
                yield Answer(body[0], body[NFGENMSG.size :])
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise


def transact(
    subsystem: int, requests: Sequence[Request], generation: int | None = None
) -> Refusal | None:
    """Have the kernel take all of the requests or none of them; why it took none.

    With a `generation`, only if that is still the number of what the namespace has (NFNL_BATCH_GENID).
    """
    batch = packed(subsystem, requests, generation)
    try:
        with netlink.connected(NETLINK_NETFILTER) as taker:
            taker.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_CAP_ACK, 1)
            taker.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_EXT_ACK, 1)
            _make_room(taker, len(batch))
            taker.send(batch)
            return _outcome(taker, len(requests))
    except OSError as error:
        return Refusal(None, error.errno or 0, "")


def packed(subsystem: int, requests: Sequence[Request], generation: int | None = None) -> bytes:
    """The message by which `transact` has the requests taken."""
    expected = b""
    if generation is not None:
        expected = attribute(_NFNL_BATCH_GENID, _GENERATION.pack(generation))
    # Not the end is to be acknowledged but the last request: kernels before 6.10 do not do the former.
    last = len(requests)
    parts = [_frame(_NFNL_MSG_BATCH_BEGIN, subsystem, expected)]
    for sequence, request in enumerate(requests, 1):
        length = HEAD.size + NFGENMSG.size + len(request.attributes)
        kind = subsystem << 8 | request.kind
        flags = NLM_F_REQUEST | request.flags | (NLM_F_ACK if sequence == last else 0)
        parts.append(HEAD.pack(length, kind, flags, sequence, 0))
        parts.append(NFGENMSG.pack(request.family, 0, 0))
        parts.append(request.attributes)
    parts.append(_frame(_NFNL_MSG_BATCH_END, subsystem, b""))
    return b"".join(parts)


def question(subsystem: int, kind: int, family: int, attributes: bytes) -> bytes:
    """The message that asks for all objects of a kind, for who speaks to a socket himself."""
    length = HEAD.size + NFGENMSG.size + len(attributes)
    head = HEAD.pack(length, subsystem << 8 | kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    return head + NFGENMSG.pack(family, 0, 0) + attributes


def _frame(kind: int, subsystem: int, attributes: bytes) -> bytes:
    """The begin or the end of a transaction; of all its messages only these have the number 0."""
    length = HEAD.size + NFGENMSG.size + len(attributes)
    header = HEAD.pack(length, kind, NLM_F_REQUEST, 0, 0)
    return header + NFGENMSG.pack(socket.AF_UNSPEC, 0, socket.htons(subsystem)) + attributes


def _make_room(taker: socket.socket, length: int) -> None:
    wanted = length + _ROOM
    if taker.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= wanted:
        return
    try:
        taker.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, wanted)
    except PermissionError:
        # In a user namespace of one's own there is only what the machine lets everybody have.
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)


def _outcome(taker: socket.socket, last: int) -> Refusal | None:
    """What the kernel answered."""
    taken = False
    while True:
        try:
            datagram = netlink.received(taker)
        except BlockingIOError:
            break
        except OSError as error:
            # More complaints than the socket has room for; the first ones are there.
            if error.errno != errno.ENOBUFS:
                raise
            continue
        for message in netlink.messages(datagram):
            if message.kind != NLMSG_ERROR:
                continue
            if message.error:
                request = message.sequence - 1 if message.sequence else None
                return Refusal(request, message.error, _said(message))
            taken = taken or message.sequence == last
    return None if taken else Refusal(None, errno.ENOBUFS, "")


def _said(message: Message) -> str:
    """What an error says in words (struct nlmsgerr, then attributes when the flags say so)."""
    if not message.flags & netlink.NLM_F_ACK_TLVS or not message.flags & netlink.NLM_F_CAPPED:
        return ""
    attributes = dict(attributes_in(message.body[_ERRNO_BYTES + HEAD.size :]))
    return text_of(attributes.get(netlink.NLMSGERR_ATTR_MSG, b""))


def holder(port: int) -> str | None:
    """Who has a netlink socket of this namespace open, such as "process 71 (nft)"; None when none is found.

    Looks for 0.2 s at most: there may be any number of processes, with any number of open files.
    """
    until = time.monotonic() + _MOST_SEARCHED_S
    sockets = (
        row.split() for row in Path("/proc/thread-self/net/netlink").read_text().splitlines()
    )
    inodes = [row[9] for row in sockets if row[1:3] == [str(NETLINK_NETFILTER), str(port)]]
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            for descriptor in process.glob("fd/*"):
                if time.monotonic() > until:
                    return None
                if str(descriptor.readlink()) == f"socket:[{inodes[0]}]":
                    return processes.named(int(process.name))
        except OSError:
            # It has ended, or closed it.
            continue
    return None
