"""Netlink by hand, in the calling thread's namespace: for messages that no library makes, or that have to be many.

Knows the head of a message (struct nlmsghdr of linux/netlink.h) and its errors; what is in it is its callers' to know.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Self

from tidegate.kernel.errors import KernelError

# linux/netlink.h
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12
_NLM_F_REQUEST = 0x001
_NLM_F_ACK = 0x004
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr"""
_ERROR = struct.Struct("=i")

_BUFFER = 2**18
"""More than the kernel puts into one datagram."""


class Unfinished(Exception):
    """A dump takes longer than it may."""


class Netlink:
    """Questions to a part of the kernel, one at a time. Its methods raise KernelError for what is refused."""

    def __init__(self, protocol: int, what: str) -> None:
        """`what` is what a refusal says cannot be done."""
        self._what = what
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        except OSError as error:
            raise self._refusal(error.errno or 0) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, kind: int, body: bytes) -> bytes | None:
        """Have something told or done; the answer's body, None when there is nothing but that it is done."""
        self._send(kind, _NLM_F_ACK, body)
        answer = None
        while True:
            for found in self._receive():
                if found is None:
                    return answer
                answer = found

    def dump(self, kind: int, body: bytes, seconds: float = float("inf")) -> Iterator[bytes]:
        """The bodies of all answers; Unfinished after so many seconds. No other question while it runs, or after it."""
        until = time.monotonic() + seconds
        self._send(kind, _NLM_F_DUMP, body)
        while True:
            for found in self._receive():
                if found is None:
                    return
                yield found
            if time.monotonic() > until:
                raise Unfinished

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        header = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 0, 0)
        self._socket.send(header + body)

    def _receive(self) -> Iterator[bytes | None]:
        """The bodies in one datagram; None for the end."""
        datagram = self._socket.recv(_BUFFER)
        at = 0
        while at < len(datagram):
            length, kind, *_ = _HEADER.unpack_from(datagram, at)
            body = datagram[at + _HEADER.size : at + length]
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                (number,) = _ERROR.unpack_from(body)
                if number:
                    raise self._refusal(-number)
                yield None
                return
            yield body
            at += (length + 3) & ~3

    def _refusal(self, number: int) -> KernelError:
        return KernelError(f"cannot {self._what}: {os.strerror(number)}", number)
