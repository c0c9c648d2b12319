"""TCP segments made and read by hand, and sockets that send as somebody else.

For who has to see what becomes of the first packet of a connection without opening one: a segment goes out
through a raw socket, or arrives through an interface of one's own (`tun`). Knows the headers of RFC 791, 8200
and 9293, and nothing of what is sent or why.
"""

import ctypes
import errno
import ipaddress
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from tidegate.kernel.errors import KernelError

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
"""Control bits (RFC 9293, 3.1)."""

_TCP = struct.Struct("!HHIIBBHHH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_WINDOW = 65535
_HOPS = 64
_HEADER_BYTES = {4: 20, 6: 40}

# asm-generic/socket.h
_SO_MARK = 36

_MAX_PACKET_BYTES = 65535
_AT_ONCE = 1000
_ICMP_ERRORS = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES)
"""What the kernel makes of them (net/ipv4/icmp.c, icmp_err_convert; net/ipv6/icmp.c)."""

_libc = ctypes.CDLL(None, use_errno=True)


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP segment without options, and between whom it goes. Addresses are text of one family."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    sequence: int
    acknowledged: int = 0
    flags: int


class Sender(msgspec.Struct, frozen=True, kw_only=True):
    """As whom something is sent."""

    uid: int = 0
    gid: int = 0
    mark: int = 0


def pack(segment: Segment) -> bytes:
    """The TCP header with its checksum."""
    source = ipaddress.ip_address(segment.source).packed
    destination = ipaddress.ip_address(segment.destination).packed
    fields = (
        segment.source_port,
        segment.destination_port,
        segment.sequence,
        segment.acknowledged,
        _TCP.size // 4 << 4,
        segment.flags,
        _WINDOW,
    )
    pseudo_header = source + destination + struct.pack("!II", _TCP.size, socket.IPPROTO_TCP)
    checksum = _checksum(pseudo_header + _TCP.pack(*fields, 0, 0))
    return _TCP.pack(*fields, checksum, 0)


def pack_packet(segment: Segment) -> bytes:
    """The whole IP packet."""
    source = ipaddress.ip_address(segment.source)
    destination = ipaddress.ip_address(segment.destination)
    payload = pack(segment)
    if source.version == 6:
        addresses = (source.packed, destination.packed)
        return _IPV6.pack(6 << 28, len(payload), socket.IPPROTO_TCP, _HOPS, *addresses) + payload
    length = _HEADER_BYTES[4] + len(payload)

    def header(checksum: int) -> bytes:
        fields = (0x45, 0, length, 0, 0, _HOPS, socket.IPPROTO_TCP, checksum)
        return _IPV4.pack(*fields, source.packed, destination.packed)

    return header(_checksum(header(0))) + payload


def parse(source: str, destination: str, data: bytes) -> Segment | None:
    """The segment that TCP header `data` begins; None when it is cut short. Checksums are not looked at."""
    if len(data) < _TCP.size:
        return None
    source_port, destination_port, sequence, acknowledged, _, flags, *_ = _TCP.unpack_from(data)
    return Segment(
        source=source,
        source_port=source_port,
        destination=destination,
        destination_port=destination_port,
        sequence=sequence,
        acknowledged=acknowledged,
        flags=flags,
    )


def parse_packet(packet: bytes) -> Segment | None:
    """The segment in an IP packet; None when there is none at its usual place, as after extension headers."""
    version = packet[0] >> 4 if packet else 0
    if len(packet) < _HEADER_BYTES.get(version, len(packet) + 1):
        return None
    if version == 4:
        protocol, start, at, size = packet[9], (packet[0] & 0xF) * 4, 12, 4
    else:
        protocol, start, at, size = packet[6], _HEADER_BYTES[6], 8, 16
    if protocol != socket.IPPROTO_TCP:
        return None
    source = ipaddress.ip_address(packet[at : at + size])
    destination = ipaddress.ip_address(packet[at + size : at + 2 * size])
    return parse(str(source), str(destination), packet[start:])


def open_raw(destination: str, sender: Sender, *, hops: int) -> socket.socket:
    """A raw TCP socket of the current namespace, connected: it only hears segments from `destination`.

    Nonblocking; it belongs to `sender` for every rule that asks whose a packet is, and what it sends may cross
    `hops` - 1 routers. The kernel's own TCP sees the answers as well. OSError when there is no route.
    """
    return _open(socket.SOCK_RAW, socket.IPPROTO_TCP, destination, 0, sender, hops)


def open_tcp(destination: str, port: int, sender: Sender, *, hops: int) -> socket.socket:
    """A TCP socket of the current namespace that begins to connect; it resets its connection when it is closed.

    The rest as of `open_raw`.
    """
    opened = _open(socket.SOCK_STREAM, socket.IPPROTO_TCP, destination, port, sender, hops)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return opened


def open_udp(destination: str, port: int, sender: Sender, *, hops: int) -> socket.socket:
    """A UDP socket of the current namespace, connected; the rest as of `open_raw`."""
    return _open(socket.SOCK_DGRAM, socket.IPPROTO_UDP, destination, port, sender, hops)


def received(raw: socket.socket) -> Iterator[Segment]:
    """The segments that a socket of `open_raw` has heard until now; of a flood the first thousand."""
    for _ in range(_AT_ONCE):
        try:
            data, (source, *_) = raw.recvfrom(_MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # An ICMP error is told once, and says nothing about segments.
            if error.errno not in _ICMP_ERRORS:
                raise
            continue
        here = raw.getsockname()[0]
        whole = raw.family == socket.AF_INET
        segment = parse_packet(data) if whole else parse(source, here, data)
        if segment is not None:
            yield segment


def answered(udp: socket.socket) -> bool | None:
    """Whether a datagram came back to a socket of `open_udp`: False when the port is closed, None when nothing did."""
    try:
        udp.recv(_MAX_PACKET_BYTES)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _ICMP_ERRORS:
            raise
        return False if error.errno == errno.ECONNREFUSED else None
    return True


def connected(tcp: socket.socket) -> bool | None:
    """Whether a connection of `open_tcp` came about: False when it was refused, None while neither is so."""
    poll = select.poll()
    poll.register(tcp, select.POLLOUT)
    if not poll.poll(0):
        return None
    number = tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number in (0, errno.ECONNREFUSED):
        return number == 0
    return None


@contextmanager
def reserved_port(version: int) -> Iterator[int]:
    """A TCP port of the current namespace that nobody else uses as long as the context, nor answers on."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.bind(("", 0))
        port: int = holder.getsockname()[1]
        yield port


def _open(
    kind: int, protocol: int, destination: str, port: int, sender: Sender, hops: int
) -> socket.socket:
    six = ":" in destination
    with _acting_as(sender):
        opened = socket.socket(socket.AF_INET6 if six else socket.AF_INET, kind, protocol)
    try:
        opened.setblocking(False)
        if six:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)
        else:
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
        if sender.mark:
            opened.setsockopt(socket.SOL_SOCKET, _SO_MARK, sender.mark)
        with suppress(BlockingIOError):
            opened.connect((destination, port))
    except OSError:
        opened.close()
        raise
    return opened


@contextmanager
def _acting_as(sender: Sender) -> Iterator[None]:
    """Sockets opened in here are the sender's: rules ask for the file system ids of who opened one.

    Only the calling thread changes (setfsuid(2)), and keeps its capabilities to the network.
    """
    gid, uid = _libc.setfsgid(sender.gid), _libc.setfsuid(sender.uid)
    try:
        # Neither call tells whether it failed; the next one tells what is.
        if (_libc.setfsgid(-1), _libc.setfsuid(-1)) != (_signed(sender.gid), _signed(sender.uid)):
            problem = f"cannot act as user {sender.uid} and group {sender.gid}"
            raise KernelError(problem, ctypes.get_errno())
        yield
    finally:
        _libc.setfsuid(uid)
        _libc.setfsgid(gid)


def _signed(number: int) -> int:
    """An id as ctypes hands out what the C library returns (int)."""
    return int(ctypes.c_int(number).value)


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
