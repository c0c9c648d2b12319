"""Captures made by hand: pcap and pcapng files of packets, in both byte orders."""

import struct
from collections.abc import Iterable

ETHERNET = 1


def pcap(
    packets: Iterable[bytes],
    *,
    link_type: int = ETHERNET,
    order: str = "<",
    magic: int = 0xA1B2C3D4,
    snap_length: int = 262_144,
) -> bytes:
    """A pcap file; of each packet it has at most `snap_length` bytes."""
    out = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, snap_length, link_type)]
    for second, packet in enumerate(packets):
        kept = packet[:snap_length]
        out += [struct.pack(order + "IIII", second, 0, len(kept), len(packet)), kept]
    return b"".join(out)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """One block of a pcapng file."""
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + length + body + length


def section(order: str = "<") -> bytes:
    """The header of a pcapng section, with an option."""
    options = struct.pack(order + "HH4sHH", 4, 4, b"test", 0, 0)
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1) + options, order)


def interface(link_type: int = ETHERNET, order: str = "<", snap_length: int = 0) -> bytes:
    return block(1, struct.pack(order + "HHI", link_type, 0, snap_length), order)


def enhanced(packet: bytes, order: str = "<", number: int = 0, length: int | None = None) -> bytes:
    sizes = (len(packet), len(packet) if length is None else length)
    return block(6, struct.pack(order + "IIIII", number, 0, 0, *sizes) + packet, order)


def old(packet: bytes, order: str = "<", number: int = 0) -> bytes:
    sizes = (len(packet), len(packet))
    return block(2, struct.pack(order + "HHIIII", number, 0, 0, 0, *sizes) + packet, order)


def simple(packet: bytes, length: int | None = None, order: str = "<") -> bytes:
    size = len(packet) if length is None else length
    return block(3, struct.pack(order + "I", size) + packet, order)
