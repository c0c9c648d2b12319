"""An interface of a network namespace whose other end is this process (TUN, linux/if_tun.h).

What the namespace routes to it can be read here, and what is written here arrives on it, as IP packets. It
lives as long as its descriptor: it goes with its addresses and routes when it is closed, and when this process
is killed.
"""

import abc
import errno
import fcntl
import ipaddress
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyroute2 import NetlinkError

from tidegate.kernel import rtnetlink
from tidegate.kernel.errors import KernelError

DEVICE = "/dev/net/tun"

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_IFF_TUN_EXCL = 0x8000
_IFREQ = struct.Struct("16sH22x")
"""struct ifreq of linux/if.h, with ifr_flags"""

# linux/if_addr.h
_IFA_F_NODAD = 0x02

# linux/rtnetlink.h
_RTN_LOCAL = 2

MAX_PACKET_BYTES = 65535
AT_ONCE = 1000
"""Most packets that one reading of a device hands out."""
_DEADLINE_S = 1.0
_POLL_S = 0.001

_QUIET = (("disable_ipv6", "0"), ("addr_gen_mode", "1"), ("accept_ra", "0"))
"""Below net/ipv6/conf: IPv6, but no link-local address, and so nothing that the kernel says by itself."""


class Device(abc.ABC):
    """An interface of a namespace whose other end is in this process's hands."""

    hears: bool
    """Whether `packets` has what the namespace sends."""

    def __init__(self, name: str, index: int, netlink: Any) -> None:
        """`netlink` is an IPRoute of the namespace."""
        self.name = name
        self._index = index
        self._netlink = netlink

    @abc.abstractmethod
    def fileno(self) -> int:
        """A descriptor that can be polled for packets."""

    @abc.abstractmethod
    def packets(self) -> Iterator[bytes]:
        """The packets that the namespace has sent this way until now; of a flood the first thousand."""

    @abc.abstractmethod
    def write(self, packet: bytes) -> None:
        """Let a packet arrive on the interface."""

    def add_address(self, address: str) -> None:
        """Give the interface an address, alone in its network, and wait until it can be used."""
        parsed = ipaddress.ip_address(address)
        with _explained(f"give {self.name} the address {address}"):
            flags = {"flags": _IFA_F_NODAD} if parsed.version == 6 else {}
            self._netlink.addr(
                "add", index=self._index, address=address, prefixlen=parsed.max_prefixlen, **flags
            )
            self._wait_until_local(address)

    def _wait_until_local(self, address: str) -> None:
        # The kernel makes an IPv6 address its own later, in a work queue (net/ipv6/addrconf.c, addrconf_dad_work).
        deadline = time.monotonic() + _DEADLINE_S
        while not self._is_local(address):
            if time.monotonic() > deadline:
                reason = os.strerror(errno.ETIMEDOUT)
                raise KernelError(f"{address} does not become usable: {reason}", errno.ETIMEDOUT)
            time.sleep(_POLL_S)

    def _is_local(self, address: str) -> bool:
        try:
            (route,) = self._netlink.route("get", dst=address)
        except NetlinkError as error:
            if error.code == errno.ENETUNREACH:
                return False
            raise
        return bool(route["type"] == _RTN_LOCAL)

    def add_route(self, destination: str) -> None:
        """Have the namespace send what goes to one address this way."""
        parsed = ipaddress.ip_address(destination)
        with _explained(f"route {destination} to {self.name}"):
            self._netlink.route("add", dst=f"{parsed}/{parsed.max_prefixlen}", oif=self._index)


class Tun(Device):
    """See `opened`."""

    hears = True

    def __init__(self, name: str, descriptor: int, index: int, netlink: Any) -> None:
        super().__init__(name, index, netlink)
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def packets(self) -> Iterator[bytes]:
        for _ in range(AT_ONCE):
            try:
                yield os.read(self._descriptor, MAX_PACKET_BYTES)
            except BlockingIOError:
                return

    def write(self, packet: bytes) -> None:
        os.write(self._descriptor, packet)


@contextmanager
def opened(name: str) -> Iterator[Tun]:
    """A new interface of the current namespace, up and without addresses.

    KernelError with EBUSY when there is one of this name, with ENOENT, ENODEV or EPERM when this machine has no
    TUN or does not give it.
    """
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise KernelError(f"cannot open {DEVICE}: {reason}", error.errno or 0) from error
    try:
        _name(descriptor, name)
        with rtnetlink.opened(f"bring interface {name} up") as netlink:
            (index,) = netlink.link_lookup(ifname=name)
            _set_quiet(name)
            netlink.link("set", index=index, state="up")
            yield Tun(name, descriptor, index, netlink)
    finally:
        os.close(descriptor)


def _name(descriptor: int, name: str) -> None:
    request = _IFREQ.pack(name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_TUN_EXCL)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise KernelError(f"cannot make interface {name}: {reason}", error.errno or 0) from error


def _set_quiet(name: str) -> None:
    settings = Path("/proc/sys/net/ipv6/conf", name)
    if not settings.exists():
        # A kernel without IPv6.
        return
    for setting, value in _QUIET:
        try:
            (settings / setting).write_text(value)
        except OSError as error:
            problem = f"cannot set {setting} of {name}: {error.strerror}"
            raise KernelError(problem, error.errno or errno.EIO) from error


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise KernelError(f"cannot {what}: {os.strerror(error.code)}", error.code) from error
