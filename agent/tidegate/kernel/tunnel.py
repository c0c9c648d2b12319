"""An interface of a network namespace whose other end is a UDP socket of this process (VXLAN, RFC 7348).

What is wrapped and sent to it over the loopback interface arrives on it as a packet, as if from outside. Unlike TUN
(tun.py) this needs no device file, and no capability but CAP_NET_ADMIN. It outlives its process: where that was
killed, the next `opened` of this name takes it away.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tidegate.kernel import rtnetlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    attribute,
    attributes_in,
    text_attribute,
    text_of,
)
from tidegate.kernel.tun import AT_ONCE, MAX_PACKET_BYTES, Device

_LOOPBACK = "127.0.0.1"
_NETWORK = 7
"""VXLAN network identifier: whatever, since nobody else uses the port."""
_VXLAN = struct.Struct("!BxxxI")
"""Flags, and the network in the upper 24 bits (RFC 7348, 5)"""
_HAS_NETWORK = 0x08
_ETHERNET = struct.Struct("!6s6sH")
"""Destination, source, type of what follows"""
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
"""By IP version"""
_INSIDE, _OUTSIDE = b"\x02tgv\0\1", b"\x02tgv\0\2"
"""Ethernet addresses, locally administered, of the interface and of whoever sends to it."""
_ANY = bytes(6)
"""Where frames to an address go that nobody is known to have (Documentation/networking/vxlan.rst)."""

# linux/rtnetlink.h
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_SETLINK, _RTM_NEWNEIGH = 16, 17, 18, 19, 28
_IFINFOMSG = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change"""
# linux/if_link.h
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_AF_SPEC = 1, 3, 18, 26
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VXLAN_ID, _IFLA_VXLAN_LEARNING, _IFLA_VXLAN_PORT, _IFLA_VXLAN_LOCALBYPASS = 1, 7, 15, 31
_IFLA_INET6_ADDR_GEN_MODE = 8
_IN6_ADDR_GEN_MODE_NONE = 1
# linux/if.h
_IFF_UP, _IFF_NOARP = 0x1, 0x80
# linux/neighbour.h
_NDMSG = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, index, state, flags, type"""
_NDA_DST, _NDA_LLADDR, _NDA_PORT = 1, 2, 6
_NUD_NOARP, _NUD_PERMANENT, _NTF_SELF = 0x40, 0x80, 0x02

_KIND = "vxlan"


class Tunnel(Device):
    """See `opened`."""

    def __init__(
        self, name: str, index: int, netlink: Any, end: socket.socket, port: int, *, hears: bool
    ) -> None:
        """Packets for the interface go to `port`."""
        super().__init__(name, index, netlink)
        self.hears = hears
        self._end = end
        self._port = port

    def fileno(self) -> int:
        return self._end.fileno()

    def packets(self) -> Iterator[bytes]:
        for _ in range(AT_ONCE):
            try:
                wrapped = self._end.recv(MAX_PACKET_BYTES)
            except BlockingIOError:
                return
            frame = wrapped[_VXLAN.size :]
            if len(frame) > _ETHERNET.size:
                *_, ethertype = _ETHERNET.unpack_from(frame)
                if ethertype in _ETHERTYPES.values():
                    yield frame[_ETHERNET.size :]

    def write(self, packet: bytes) -> None:
        header = _ETHERNET.pack(_INSIDE, _OUTSIDE, _ETHERTYPES[packet[0] >> 4])
        wrapped = _VXLAN.pack(_HAS_NETWORK, _NETWORK << 8) + header + packet
        self._end.sendto(wrapped, (_LOOPBACK, self._port))


@contextmanager
def opened(name: str) -> Iterator[Tunnel]:
    """A new interface of the current namespace, up and without addresses; a tunnel of this name goes first.

    KernelError with EOPNOTSUPP when the kernel has no VXLAN, with EPERM without CAP_NET_ADMIN, with EEXIST when there
    is an interface of another kind.
    """
    what = f"make interface {name}"
    with (
        Netlink(NETLINK_ROUTE, what) as kernel,
        rtnetlink.opened(what) as netlink,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end,
    ):
        end.bind((_LOOPBACK, 0))
        end.setblocking(False)
        _delete(kernel, name)
        port = _free_port()
        kernel.do(_RTM_NEWLINK, _described(name, port), NLM_F_CREATE | NLM_F_EXCL)
        try:
            index = socket.if_nametoindex(name)
            kernel.do(_RTM_NEWNEIGH, _way_back(index, end), NLM_F_CREATE | NLM_F_APPEND)
            with suppress(KernelError):
                # In a kernel without IPv6 there is nothing to keep quiet.
                kernel.do(_RTM_SETLINK, _link(index) + _without_own_addresses())
            # No address that somebody has is asked for here: whatever comes is for the other end.
            kernel.do(_RTM_SETLINK, _link(index, _IFF_UP | _IFF_NOARP))
            hears = _has_way_back(kernel, index)
            yield Tunnel(name, index, netlink, end, port, hears=hears)
        finally:
            _delete(kernel, name)


def _described(name: str, port: int) -> bytes:
    data = attribute(_IFLA_VXLAN_ID, _NETWORK.to_bytes(4, "little"))
    data += attribute(_IFLA_VXLAN_PORT, port.to_bytes(2, "big"))
    data += attribute(_IFLA_VXLAN_LEARNING, b"\0")
    # Else what is for this machine itself goes to another tunnel of it, and never to a socket. Before Linux 6.5 it
    # always does, and the kernel passes over this (drivers/net/vxlan/vxlan_core.c, encap_bypass_if_local).
    data += attribute(_IFLA_VXLAN_LOCALBYPASS, b"\0")
    info = text_attribute(_IFLA_INFO_KIND, _KIND) + attribute(_IFLA_INFO_DATA, data)
    return (
        _link()
        + text_attribute(_IFLA_IFNAME, name)
        + attribute(_IFLA_ADDRESS, _INSIDE)
        + attribute(_IFLA_LINKINFO, info)
    )


def _way_back(index: int, end: socket.socket) -> bytes:
    """That everything which the namespace sends to the interface comes to a socket."""
    address, port = end.getsockname()
    return (
        _NDMSG.pack(socket.AF_BRIDGE, index, _NUD_PERMANENT | _NUD_NOARP, _NTF_SELF, 0)
        + attribute(_NDA_LLADDR, _ANY)
        + attribute(_NDA_DST, socket.inet_aton(address))
        + attribute(_NDA_PORT, port.to_bytes(2, "big"))
    )


def _has_way_back(kernel: Netlink, index: int) -> bool:
    data = _info(kernel.ask(_RTM_GETLINK, _link(index))).get(_IFLA_INFO_DATA, b"")
    return dict(attributes_in(data)).get(_IFLA_VXLAN_LOCALBYPASS) == b"\0"


def _info(link: bytes) -> dict[int, bytes]:
    """What kind of interface it is."""
    attributes = dict(attributes_in(link[_IFINFOMSG.size :]))
    return dict(attributes_in(attributes.get(_IFLA_LINKINFO, b"")))


def _without_own_addresses() -> bytes:
    """No link-local IPv6 address, and so nothing that the kernel says by itself."""
    mode = attribute(_IFLA_INET6_ADDR_GEN_MODE, bytes([_IN6_ADDR_GEN_MODE_NONE]))
    return attribute(_IFLA_AF_SPEC, attribute(socket.AF_INET6, mode))


def _link(index: int = 0, flags: int = 0) -> bytes:
    return _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, flags, flags)


def _delete(kernel: Netlink, name: str) -> None:
    """Take a tunnel of this name away, if there is one."""
    try:
        found = kernel.ask(_RTM_GETLINK, _link() + text_attribute(_IFLA_IFNAME, name))
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
        return
    if text_of(_info(found).get(_IFLA_INFO_KIND, b"")) == _KIND:
        _, _, index, _, _ = _IFINFOMSG.unpack_from(found)
        kernel.do(_RTM_DELLINK, _link(index))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port
