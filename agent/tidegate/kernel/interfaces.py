"""What an interface of the calling thread's network namespace is, by its index: linux/sockios.h, linux/if_arp.h."""

import fcntl
import os
import socket
import struct

from tidegate.kernel.errors import KernelError

_SIOCGIFHWADDR = 0x8927
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_IFREQ = struct.Struct("=16sH22x")
"""struct ifreq with the beginning of its ifr_hwaddr."""
_ETHERNET_HEADER = 14


def link_header(ifindex: int) -> int:
    """Bytes before the IP header of a packet there: 14, or 0 where packets have none, as of tun and WireGuard."""
    try:
        name = socket.if_indextoname(ifindex)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            answer = fcntl.ioctl(any_socket, _SIOCGIFHWADDR, _IFREQ.pack(os.fsencode(name), 0))
    except OSError as error:
        raise KernelError(
            f"cannot read interface {ifindex}: {error.strerror}", error.errno or 0
        ) from error
    _, kind = _IFREQ.unpack(answer)
    return _ETHERNET_HEADER if kind in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK) else 0
