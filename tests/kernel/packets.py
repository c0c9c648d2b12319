"""Frames made by hand, and ClientHellos made by OpenSSL, for what is tested packet by packet."""

import ipaddress
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION = 0, 43, 44, 51, 60
TCP = 6

IPV4 = ("10.1.0.9", "10.2.0.7")
IPV6 = ("fd01::9", "fd02::7")


@dataclass(frozen=True)
class Packet:
    from_client: bool
    frame: bytes


Network = Callable[[str, str, bytes], bytes]
"""From source, destination and TCP segment to an IP packet with its ethertype in front."""


def ipv4(
    source: str, destination: str, segment: bytes, options: bytes = b"", fragment: int = 0
) -> bytes:
    header = struct.pack(
        "!BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        0,
        20 + len(options) + len(segment),
        1,
        fragment,
        64,
        TCP,
        0,
        ipaddress.ip_address(source).packed,
        ipaddress.ip_address(destination).packed,
    )
    return b"\x08\x00" + header + options + segment


def ipv6(
    source: str,
    destination: str,
    segment: bytes,
    extensions: Sequence[tuple[int, bytes]] = (),
    next_header: int = TCP,
) -> bytes:
    """extensions: kind and everything of each extension header but its first byte."""
    kinds = [kind for kind, _ in extensions] + [next_header]
    chain = b"".join(
        bytes([following]) + rest
        for following, (_, rest) in zip(kinds[1:], extensions, strict=True)
    )
    header = struct.pack(
        "!IHBB16s16s",
        6 << 28,
        len(chain) + len(segment),
        kinds[0],
        64,
        ipaddress.ip_address(source).packed,
        ipaddress.ip_address(destination).packed,
    )
    return b"\x86\xdd" + header + chain + segment


def ip(source: str, destination: str, segment: bytes) -> bytes:
    return (ipv6 if ":" in source else ipv4)(source, destination, segment)


def tcp(
    source: int, destination: int, sequence: int, acknowledged: int, flags: int, payload: bytes,
    options: bytes = b"",
) -> bytes:  # fmt: skip
    return (
        struct.pack(
            "!HHIIBBHHH",
            source,
            destination,
            sequence & 0xFFFFFFFF,
            acknowledged & 0xFFFFFFFF,
            (5 + len(options) // 4) << 4,
            flags,
            65535,
            0,
            0,
        )
        + options
        + payload
    )


@dataclass
class Talk:
    """One connection; its methods make its packets, by position in either stream."""

    client: tuple[str, int]
    server: tuple[str, int]
    client_isn: int = 1000
    server_isn: int = 5_000_000
    network: Network = ip
    tags: Sequence[tuple[int, int]] = ()
    """VLAN tags in the packet: protocol and tag."""
    options: bytes = field(default=b"")

    def syn(self, data: bytes = b"") -> Packet:
        return self._packet(True, self.client_isn, 0, SYN, data)

    def syn_ack(self, acked: int = 0) -> Packet:
        return self._packet(False, self.server_isn, self.client_isn + 1 + acked, SYN | ACK, b"")

    def up(self, position: int, data: bytes, flags: int = ACK) -> Packet:
        """From the client to the server."""
        return self._packet(True, self.client_isn + 1 + position, self.server_isn + 1, flags, data)

    def down(self, position: int, data: bytes, acked: int = 0, flags: int = ACK) -> Packet:
        """From the server to the client, which has sent `acked` bytes that came."""
        return self._packet(
            False,
            self.server_isn + 1 + position,
            self.client_isn + 1 + acked,
            flags,
            data,
        )

    def opening(self) -> list[Packet]:
        return [self.syn(), self.syn_ack(), self.up(0, b"")]

    def segments(self, data: bytes, size: int, start: int = 0) -> list[Packet]:
        return [self.up(start + at, data[at : at + size]) for at in range(0, len(data), size)]

    def _packet(
        self, from_client: bool, sequence: int, acknowledged: int, flags: int, data: bytes
    ) -> Packet:
        source, destination = self.client, self.server
        if not from_client:
            source, destination = destination, source
        segment = tcp(source[1], destination[1], sequence, acknowledged, flags, data, self.options)
        packet = self.network(source[0], destination[0], segment)
        for protocol, tag in reversed(self.tags):
            packet = struct.pack("!HH", protocol, tag) + packet
        return Packet(from_client, b"\x02\0\0\0\0\1\x02\0\0\0\0\2" + packet)


def hello(sni: str | None = None, alpn: Sequence[str] = ()) -> bytes:
    """The ClientHello of OpenSSL, in one TLS record."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    out = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=sni)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return out.read()
    raise AssertionError("a handshake with nobody came to an end")


def with_extension(record: bytes, kind: int, body: bytes) -> bytes:
    """A hello with one more extension, in front of all others."""
    message = record[9:]
    at = 2 + 32
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2], "big")
    at += 1 + message[at]
    extensions = struct.pack("!HH", kind, len(body)) + body + message[at + 2 :]
    message = message[:at] + struct.pack("!H", len(extensions)) + extensions
    return as_records(b"\x01" + len(message).to_bytes(3, "big") + message, [1 << 14])


def without_extensions(record: bytes) -> bytes:
    """The hello of a client that knows no extensions at all."""
    message = record[9:]
    at = 2 + 32
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2], "big")
    at += 1 + message[at]
    return as_records(b"\x01" + at.to_bytes(3, "big") + message[:at], [1 << 14])


def as_records(message: bytes, sizes: Sequence[int]) -> bytes:
    """A handshake message in TLS records of these sizes, the last size again and again."""
    records, at = [], 0
    for number in range(len(message)):
        size = sizes[min(number, len(sizes) - 1)]
        part = message[at : at + size]
        if not part:
            break
        records.append(b"\x16\x03\x01" + struct.pack("!H", len(part)) + part)
        at += size
    return b"".join(records)
