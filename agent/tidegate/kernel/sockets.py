"""TCP sockets of the current network namespace, over sock_diag(7), whoever they belong to."""

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import NETLINK_SOCK_DIAG, Netlink, attributes_in

# linux/sock_diag.h
_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21

# linux/inet_diag.h
_INET_DIAG_SOCKOPT = 22
_TRANSPARENT = 1 << 5
"""Of the first byte of struct inet_diag_sockopt, as machines that put the lowest bit first have it."""
_QUESTION = struct.Struct("=BBBxI")
"""struct inet_diag_req_v2 up to its sockid."""
_SOCKET_ID = struct.Struct("!HH16s16s4s8s")
"""struct inet_diag_sockid; its cookie as it came."""
_ANSWER = struct.Struct("=BBBB48sIIIII")
"""struct inet_diag_msg"""
_NO_COOKIE = b"\xff" * 8
"""INET_DIAG_NOCOOKIE"""

# net/tcp_states.h
_TIME_WAIT = 6
_LISTEN = 10
_ALL_STATES = 0xFFFFFFFF

CANNOT_END = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP)
"""How a kernel answers that has no sock_diag, or is built without CONFIG_INET_DIAG_DESTROY."""


class Listener(msgspec.Struct, frozen=True, order=True):
    """A socket that accepts TCP connections. Its address is :: or 0.0.0.0 for all; IPv4-mapped ones are IPv4."""

    address: str
    port: int
    transparent: bool = False
    """Whether it may have connections to addresses that are not the namespace's (IP_TRANSPARENT)."""


def listeners() -> tuple[Listener, ...]:
    """Who accepts TCP connections in the namespace that the calling thread is in, sorted.

    KernelError when that cannot be listed; Enough when there are more than 16 MiB tell of.
    """
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        with Netlink(NETLINK_SOCK_DIAG, "list the listening sockets") as diagnosis:
            question = _question(family, 1 << _LISTEN, bytes(_SOCKET_ID.size))
            for answer in diagnosis.dump(_SOCK_DIAG_BY_FAMILY, question):
                found.add(_listener(answer))
    return tuple(sorted(found))


class Ender:
    """Ends TCP connections, see `ender`."""

    def __init__(self, diagnosis: Netlink) -> None:
        self._diagnosis = diagnosis

    def end(self, local: tuple[str, int], remote: tuple[str, int]) -> bool:
        """Reset the connection of the socket between these addresses and ports; False when there is none.

        Who reads or writes it gets ECONNABORTED (tcp_diag_destroy); the other end gets an RST. KernelError when it
        is refused: one of CANNOT_END where the kernel cannot do that.
        """
        try:
            return self._end(local, remote)
        except KernelError as error:
            # A socket that is gone, that has another in its place meanwhile, or that is closed.
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False

    def _end(self, local: tuple[str, int], remote: tuple[str, int]) -> bool:
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        wanted = _SOCKET_ID.pack(
            local[1], remote[1], _packed(local[0]), _packed(remote[0]), bytes(4), _NO_COOKIE
        )
        answer = self._diagnosis.ask(_SOCK_DIAG_BY_FAMILY, _question(family, _ALL_STATES, wanted))
        # An IPv6 socket is found by IPv4 addresses too, and told with its own.
        family, state, _, _, found, *_ = _ANSWER.unpack_from(answer)
        # Where there is no such connection the kernel finds who listens on its port (inet_diag_find_one_icsk).
        if state in (_LISTEN, _TIME_WAIT):
            return False
        self._diagnosis.do(_SOCK_DESTROY, _question(family, _ALL_STATES, found))
        return True


@contextmanager
def ender() -> Iterator[Ender]:
    """For ending connections of the namespace that the calling thread is in; its methods in this thread only."""
    with Netlink(NETLINK_SOCK_DIAG, "end a connection") as diagnosis:
        yield Ender(diagnosis)


def _question(family: int, states: int, wanted: bytes) -> bytes:
    return _QUESTION.pack(family, socket.IPPROTO_TCP, 0, states) + wanted


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed.ljust(16, b"\0")


def _listener(answer: bytes) -> Listener:
    family, _, _, _, found, *_ = _ANSWER.unpack_from(answer)
    port, _, address, *_ = _SOCKET_ID.unpack(found)
    own = ipaddress.ip_address(address if family == socket.AF_INET6 else address[:4])
    shown = str(getattr(own, "ipv4_mapped", None) or own)
    options = dict(attributes_in(answer[_ANSWER.size :]))[_INET_DIAG_SOCKOPT]
    return Listener(shown, port, bool(options[0] & _TRANSPARENT))
