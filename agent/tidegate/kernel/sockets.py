"""Sockets of the current network namespace, over sock_diag(7), whoever they belong to."""

import os
import socket

import msgspec
from pyroute2 import DiagSocket, NetlinkError

from tidegate.kernel.errors import KernelError

_LISTEN = 1 << 10
"""TCPF_LISTEN of net/tcp_states.h"""


class Listener(msgspec.Struct, frozen=True, order=True):
    """A socket that accepts TCP connections. Its address is :: or 0.0.0.0 for all."""

    address: str
    port: int


def listeners() -> tuple[Listener, ...]:
    """Who accepts TCP connections in the namespace that the calling thread is in, sorted."""
    found = set()
    try:
        with DiagSocket() as diagnosis:
            for family in (socket.AF_INET, socket.AF_INET6):
                for message in diagnosis.get_sock_stats(family=family, states=_LISTEN):
                    found.add(Listener(message["idiag_src"], message["idiag_sport"]))
    except NetlinkError as error:
        reason = os.strerror(error.code)
        raise KernelError(f"cannot list the listening sockets: {reason}", error.code) from error
    return tuple(sorted(found))
