"""Captures: packets out of pcap and pcapng files, as the Ethernet frames that the classifier's programs take.

Reads a stream once, from its beginning to its end, and keeps no more than one packet of it. Knows the two formats, and
the links that IP comes by; nothing of TCP. A packet that the file does not have in full says so: `Packet.cut`. A file
that contradicts itself is an InputError that names the byte, and one that ends in the middle of something an EndsEarly.

Formats: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng; link types: draft-ietf-opsawg-pcaplinktype.
"""

import enum
import struct
from collections.abc import Callable, Iterator
from typing import IO, Literal, assert_never

import msgspec

from tidegate.errors import InputError

MAX_PACKET_BYTES = 1 << 20
"""The longest packet that a capture is believed to have; libpcap's own limit is 256 KB (MAXIMUM_SNAPLEN)."""
MAX_BLOCK_BYTES = 16 << 20
"""The longest block of a pcapng file; Wireshark's limit (MAX_BLOCK_SIZE of wiretap/pcapng.c)."""

_ETHERNET_HEADER = 14
_NOWHERE = bytes(12)
"""Both addresses of an Ethernet header that the capture has none of."""
_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = b"\x08\x00", b"\x86\xdd"


class LinkType(enum.IntEnum):
    """What packets begin with (LINKTYPE_*)."""

    NULL = 0
    ETHERNET = 1
    RAW_BSD = 12
    RAW_OPENBSD = 14
    RAW = 101
    LOOP = 108
    LINUX_SLL = 113
    IPV4 = 228
    IPV6 = 229
    LINUX_SLL2 = 276


class EndsEarly(InputError):
    """A capture ends in the middle of something: it is still being written, or whoever wrote it was killed."""


READABLE = "Ethernet, raw IP, Linux cooked (v1, v2) or BSD loopback"


class Packet(msgspec.Struct, frozen=True):
    """One packet of a capture."""

    link_type: int
    """LinkType, or the number of one that is not read here."""
    data: bytes
    """What the capture has of it."""
    length: int
    """How many bytes it had on the wire."""
    end: int
    """Bytes of the file up to and with this packet."""

    @property
    def cut(self) -> bool:
        """Whether the capture has less than there was on the wire."""
        return len(self.data) < self.length


def packets(stream: IO[bytes], source: str) -> Iterator[Packet]:
    """The packets of a capture, in the order in which they are in it. `source` names it in errors."""
    reader = _Reader(stream, source)
    magic = reader.take(4, "the file's header")
    if magic == _PCAPNG_MAGIC:
        yield from _pcapng_packets(reader)
    elif magic in _PCAP_MAGICS:
        yield from _pcap_packets(reader, _PCAP_MAGICS[magic])
    elif magic[:2] == b"\x1f\x8b":
        raise reader.fault(0, "is compressed", "a capture that gzip -d has been given")
    else:
        raise reader.fault(0, f"is no capture: it begins with {magic.hex(' ')}", "pcap or pcapng")


def as_ethernet(packet: Packet) -> bytes | None:
    """The packet with an Ethernet header in front of its network layer, as it is or made up.

    None when its link type is not read here, or when not even the link's own header is there in full.
    """
    try:
        link_type = LinkType(packet.link_type)
    except ValueError:
        return None
    data = packet.data
    match link_type:
        case LinkType.ETHERNET:
            return data if len(data) >= _ETHERNET_HEADER else None
        case LinkType.RAW | LinkType.RAW_BSD | LinkType.RAW_OPENBSD | LinkType.IPV4 | LinkType.IPV6:
            return _behind(_by_version(data), data)
        case LinkType.NULL | LinkType.LOOP:
            return _behind(_by_family(data[:4]), data[4:])
        case LinkType.LINUX_SLL:
            return _behind(data[14:16], data[16:])
        case LinkType.LINUX_SLL2:
            return _behind(data[0:2], data[20:])
        case _:
            assert_never(link_type)


def _behind(ethertype: bytes, network: bytes) -> bytes | None:
    """A frame of a network layer; None without one."""
    return _NOWHERE + ethertype + network if len(ethertype) == 2 and network else None


def _by_version(network: bytes) -> bytes:
    return {4: _ETHERTYPE_IPV4, 6: _ETHERTYPE_IPV6}.get(network[0] >> 4, b"") if network else b""


def _by_family(header: bytes) -> bytes:
    """The ethertype of an address family, in whichever byte order: none is above 255."""
    if len(header) < 4:
        return b""
    family = max(header)
    if family == 2:
        return _ETHERTYPE_IPV4
    # AF_INET6 of NetBSD and OpenBSD, FreeBSD, macOS, and Linux.
    return _ETHERTYPE_IPV6 if family in (24, 28, 30, 10) else b"\xff\xff"


_Order = Literal["<", ">"]

_PCAP_MAGICS: dict[bytes, _Order] = {
    # Times in microseconds, and in nanoseconds.
    bytes.fromhex("a1b2c3d4"): ">",
    bytes.fromhex("a1b23c4d"): ">",
    bytes.fromhex("d4c3b2a1"): "<",
    bytes.fromhex("4d3cb2a1"): "<",
}
_PCAPNG_MAGIC = bytes.fromhex("0a0d0d0a")
_BYTE_ORDER_MAGICS: dict[bytes, _Order] = {
    bytes.fromhex("1a2b3c4d"): ">",
    bytes.fromhex("4d3c2b1a"): "<",
}


class _Block(enum.IntEnum):
    SECTION_HEADER = 0x0A0D0D0A
    INTERFACE = 1
    OLD_PACKET = 2
    SIMPLE_PACKET = 3
    ENHANCED_PACKET = 6


class _Reader:
    """A stream that knows how far it was read."""

    def __init__(self, stream: IO[bytes], source: str) -> None:
        self._stream = stream
        self._source = source
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        """Exactly so many bytes. InputError when the stream ends before."""
        data = self.take_or_end(size, what)
        if data is None:
            raise EndsEarly(
                f"ends before {what}",
                source=self._source,
                field=f"byte {self.at}",
                expected=f"{size} bytes",
            )
        return data

    def take_or_end(self, size: int, what: str) -> bytes | None:
        """The same, but None when the stream has ended."""
        parts, left = [], size
        while left:
            try:
                part = self._stream.read(left)
            except OSError as error:
                raise self.fault(self.at, f"cannot be read: {error.strerror}", "") from error
            if not part:
                break
            parts.append(part)
            left -= len(part)
        if left == size and size:
            return None
        if left:
            raise EndsEarly(
                f"ends in the middle of {what}",
                source=self._source,
                field=f"byte {self.at + size - left}",
                expected=f"{left} bytes more",
            )
        self.at += size
        return b"".join(parts)

    def fault(self, offset: int, problem: str, expected: str) -> InputError:
        return InputError(problem, source=self._source, field=f"byte {offset}", expected=expected)


def _pcap_packets(reader: _Reader, order: _Order) -> Iterator[Packet]:
    header = reader.take(20, "the file's header")
    (link,) = struct.unpack(order + "16xI", header)
    # The upper bits tell of the frame check sequence.
    link_type = link & 0xFFFF
    if link_type not in set(LinkType):
        raise reader.fault(20, f"has packets of link type {link_type}", READABLE)
    record = struct.Struct(order + "8xII")
    while head := reader.take_or_end(record.size, "a packet's header"):
        captured, length = record.unpack(head)
        if captured > MAX_PACKET_BYTES:
            problem = f"a packet of {captured} bytes"
            raise reader.fault(reader.at - record.size, problem, f"at most {MAX_PACKET_BYTES}")
        data = reader.take(captured, "a packet")
        yield Packet(link_type, data, length, reader.at)


class _Interface(msgspec.Struct, frozen=True):
    link_type: int
    snap_length: int


def _pcapng_packets(reader: _Reader) -> Iterator[Packet]:
    order: _Order = "<"
    interfaces: list[_Interface] = []
    kind_bytes: bytes | None = _PCAPNG_MAGIC
    while kind_bytes:
        start = reader.at - 4
        if kind_bytes == _PCAPNG_MAGIC:
            order, interfaces = _section(reader, start), []
        else:
            (kind,) = struct.unpack(order + "I", kind_bytes)
            body = _body(reader, start, order)
            if kind == _Block.INTERFACE:
                if len(body) < 8:
                    raise reader.fault(start, "an interface without a link type", "")
                interfaces.append(_Interface(*struct.unpack_from(order + "H2xI", body)))
            elif kind in _PACKET_BLOCKS:
                yield _PACKET_BLOCKS[kind](reader, start, order, body, interfaces)
        kind_bytes = reader.take_or_end(4, "a block's header")


def _section(reader: _Reader, start: int) -> _Order:
    """Reads a section header behind its type, which is the same in both byte orders."""
    head = reader.take(8, "a section's header")
    order = _BYTE_ORDER_MAGICS.get(head[4:])
    if order is None:
        problem = f"a section with the byte order magic {head[4:].hex(' ')}"
        raise reader.fault(start, problem, "1a 2b 3c 4d or its reverse")
    length = _length(reader, start, order, head[:4], least=28)
    rest = reader.take(length - 12, "a section's header")
    _check_trailer(reader, start, order, length, rest[-4:])
    (major,) = struct.unpack_from(order + "H", rest)
    if major != 1:
        raise reader.fault(start, f"is of version {major} of pcapng", "version 1")
    return order


def _body(reader: _Reader, start: int, order: _Order) -> bytes:
    """What a block has between its two lengths."""
    length = _length(reader, start, order, reader.take(4, "a block's header"), least=12)
    rest = reader.take(length - 8, "a block")
    _check_trailer(reader, start, order, length, rest[-4:])
    return rest[:-4]


def _length(reader: _Reader, start: int, order: _Order, raw: bytes, *, least: int) -> int:
    (length,) = struct.unpack(order + "I", raw)
    if not least <= length <= MAX_BLOCK_BYTES or length % 4:
        raise reader.fault(
            start,
            f"a block of {length} bytes",
            f"a multiple of 4 from {least} to {MAX_BLOCK_BYTES}",
        )
    return int(length)


def _check_trailer(reader: _Reader, start: int, order: _Order, length: int, raw: bytes) -> None:
    (again,) = struct.unpack(order + "I", raw)
    if again != length:
        raise reader.fault(start, f"a block of {length} bytes that ends as one of {again}", "")


def _enhanced_packet(
    reader: _Reader, start: int, order: _Order, body: bytes, interfaces: list[_Interface]
) -> Packet:
    return _described(reader, start, order + "I8xII", body, interfaces)


def _old_packet(
    reader: _Reader, start: int, order: _Order, body: bytes, interfaces: list[_Interface]
) -> Packet:
    return _described(reader, start, order + "H10xII", body, interfaces)


def _described(
    reader: _Reader, start: int, layout: str, body: bytes, interfaces: list[_Interface]
) -> Packet:
    """A packet of a block that names its interface and both its lengths."""
    head = struct.Struct(layout)
    if len(body) < head.size:
        raise reader.fault(start, "a packet without its lengths", "")
    number, captured, length = head.unpack_from(body)
    if number >= len(interfaces):
        problem = f"a packet of interface {number}"
        raise reader.fault(start, problem, "the number of one that was described before")
    if captured > len(body) - head.size:
        problem = f"a packet of {captured} bytes in a block of {len(body) + 12}"
        raise reader.fault(start, problem, "one that fits")
    data = body[head.size : head.size + captured]
    return Packet(interfaces[number].link_type, data, length, reader.at)


def _simple_packet(
    reader: _Reader, start: int, order: _Order, body: bytes, interfaces: list[_Interface]
) -> Packet:
    """A packet of the first interface, as long as that one's limit lets it be."""
    if not interfaces:
        raise reader.fault(start, "a packet before any interface", "")
    if len(body) < 4:
        raise reader.fault(start, "a packet without its length", "")
    (length,) = struct.unpack_from(order + "I", body)
    captured = min(length, interfaces[0].snap_length or length)
    if captured > len(body) - 4:
        problem = f"a packet of {captured} bytes in a block of {len(body) + 12}"
        raise reader.fault(start, problem, "one that fits")
    return Packet(interfaces[0].link_type, body[4 : 4 + captured], length, reader.at)


_PACKET_BLOCKS: dict[int, Callable[[_Reader, int, _Order, bytes, list[_Interface]], Packet]] = {
    _Block.ENHANCED_PACKET: _enhanced_packet,
    _Block.OLD_PACKET: _old_packet,
    _Block.SIMPLE_PACKET: _simple_packet,
}
