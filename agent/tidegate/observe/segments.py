"""TCP segments in Ethernet frames, as far as one has to know them to play a capture to the classifier's programs.

Pure. Tells which connection a frame belongs to and where its payload is, and cuts frames that are too large for a
test run, or that a capture has not in full, so that what is left says nothing that the original did not. The programs
read all headers themselves; what is not understood here is theirs to count.
"""

import struct

import msgspec

VLAN_TAGS_MAX = 2
EXTENSION_HEADERS_MAX = 8
"""As many as bpf/packet.h follows."""

_ETHERNET_HEADER = 14
_VLAN_TYPES = (0x8100, 0x88A8)
_IPV4, _IPV6 = 0x0800, 0x86DD
_IPV6_HEADER = 40
_TCP = 6
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION, _MOBILITY = 0, 43, 44, 51, 60, 135
_EXTENSIONS = (_HOP_BY_HOP, _ROUTING, _DESTINATION, _MOBILITY, _AUTHENTICATION)
_MAPPED = bytes(10) + b"\xff\xff"
FIN, SYN, PSH, ACK = 0x01, 0x02, 0x08, 0x10
_OPTION_END, _OPTION_NOTHING, _OPTION_MSS = 0, 1, 2
_SEQUENCES = 1 << 32


class Segment(msgspec.Struct, frozen=True):
    """A TCP segment, and where its parts are in its frame. Offsets and lengths are bytes."""

    source: bytes
    """Address of its sender: 16 bytes, IPv4 mapped."""
    destination: bytes
    source_port: int
    destination_port: int
    network: int
    """Where the IP header is."""
    transport: int
    """Where the TCP header is."""
    payload: int
    """Where the payload begins."""
    end: int
    """Where it ends by the IP header, which may be beyond the frame."""
    sequence: int
    """Of its first payload byte."""
    flags: int

    @property
    def opens(self) -> bool:
        """Whether it is a SYN without ACK."""
        return self.flags & (SYN | ACK) == SYN

    @property
    def length(self) -> int:
        """Bytes of payload that were sent."""
        return self.end - self.payload

    def follows(self, count: int) -> int:
        """The sequence number behind its first bytes of payload."""
        return (self.sequence + count) % _SEQUENCES


class NotTcp(msgspec.Struct, frozen=True):
    """A frame that bears something else, or of whose headers there is too little to tell."""

    known: bool
    """Whether it certainly bears something else."""


def parse(frame: bytes) -> Segment | NotTcp:
    """Finds the TCP segment of an Ethernet frame. Fragments and headers that make no sense are NotTcp, not known."""
    offset = _ETHERNET_HEADER
    (kind,) = struct.unpack_from("!H", frame, 12)
    for _ in range(VLAN_TAGS_MAX):
        if kind not in _VLAN_TYPES or len(frame) < offset + 4:
            break
        (kind,) = struct.unpack_from("!H", frame, offset + 2)
        offset += 4
    if kind == _IPV4:
        return _parse_ipv4(frame, offset)
    if kind == _IPV6:
        return _parse_ipv6(frame, offset)
    return NotTcp(known=kind not in _VLAN_TYPES)


def _parse_ipv4(frame: bytes, at: int) -> Segment | NotTcp:
    if len(frame) < at + 20:
        return NotTcp(known=False)
    header = (frame[at] & 0xF) * 4
    if frame[at] >> 4 != 4 or header < 20:
        return NotTcp(known=False)
    if frame[at + 9] != _TCP:
        return NotTcp(known=True)
    total, fragment = struct.unpack_from("!H2xH", frame, at + 2)
    if fragment & 0x3FFF:
        return NotTcp(known=False)
    # 0 in super-segments of more than 64 KB.
    end = at + total if total else len(frame)
    ends = (_MAPPED + frame[at + 12 : at + 16], _MAPPED + frame[at + 16 : at + 20])
    return _parse_tcp(frame, at, at + header, end, *ends)


def _parse_ipv6(frame: bytes, at: int) -> Segment | NotTcp:
    if len(frame) < at + _IPV6_HEADER or frame[at] >> 4 != 6:
        return NotTcp(known=False)
    length, following = struct.unpack_from("!HB", frame, at + 4)
    end = at + _IPV6_HEADER + length if length else len(frame)
    offset = at + _IPV6_HEADER
    for _ in range(EXTENSION_HEADERS_MAX):
        if following not in (*_EXTENSIONS, _FRAGMENT):
            break
        if len(frame) < offset + 8:
            return NotTcp(known=False)
        kind, following, units = following, frame[offset], frame[offset + 1]
        if kind == _FRAGMENT:
            if frame[offset + 2] or frame[offset + 3] & 0xF9:
                return NotTcp(known=False)
            offset += 8
        elif kind == _AUTHENTICATION:
            offset += (units + 2) * 4
        else:
            offset += (units + 1) * 8
    if following != _TCP:
        return NotTcp(known=following not in (*_EXTENSIONS, _FRAGMENT))
    ends = (frame[at + 8 : at + 24], frame[at + 24 : at + _IPV6_HEADER])
    return _parse_tcp(frame, at, offset, end, *ends)


def _parse_tcp(
    frame: bytes, network: int, at: int, end: int, source: bytes, destination: bytes
) -> Segment | NotTcp:
    if len(frame) < at + 20:
        return NotTcp(known=False)
    source_port, destination_port, sequence = struct.unpack_from("!HHI", frame, at)
    header, flags = (frame[at + 12] >> 4) * 4, frame[at + 13]
    if header < 20 or at + header > min(end, len(frame)):
        return NotTcp(known=False)
    return Segment(
        source=source,
        destination=destination,
        source_port=source_port,
        destination_port=destination_port,
        network=network,
        transport=at,
        payload=at + header,
        end=end,
        sequence=(sequence + bool(flags & SYN)) % _SEQUENCES,
        flags=flags,
    )


def largest_segment(frame: bytes, segment: Segment) -> int | None:
    """The MSS option (RFC 9293 3.2) of a SYN or SYN-ACK; None without one."""
    at = segment.transport + 20
    while at < segment.payload and frame[at] != _OPTION_END:
        if frame[at] == _OPTION_NOTHING:
            at += 1
            continue
        if at + 1 >= segment.payload or frame[at + 1] < 2:
            return None
        if frame[at] == _OPTION_MSS and frame[at + 1] == 4 and at + 4 <= segment.payload:
            return int.from_bytes(frame[at + 2 : at + 4], "big")
        at += frame[at + 1]
    return None


def pieces(frame: bytes, segment: Segment, largest: int) -> list[bytes]:
    """The segment as frames of at most `largest` bytes, with the payload that the frame has.

    Its bytes stay at their places in the stream. Only the first piece has the SYN, only the last the FIN; where
    payload is missing, that last one has nothing else.
    """
    end = min(segment.end, len(frame))
    if end == segment.end and end <= largest:
        return [frame]
    starts = range(segment.payload, max(end, segment.payload + 1), largest - segment.payload)
    cuts = [(start, min(start + starts.step, end)) for start in starts]
    if end < segment.end and segment.flags & FIN:
        cuts.append((segment.end, segment.end))
    made = []
    for start, stop in cuts:
        flags = segment.flags
        if start > segment.payload:
            flags &= ~SYN
        if stop < segment.end:
            flags &= ~(FIN | PSH)
        made.append(_piece(frame, segment, start, stop, flags))
    return made


def _piece(frame: bytes, segment: Segment, start: int, stop: int, flags: int) -> bytes:
    headers = bytearray(frame[: segment.payload])
    length = segment.payload - segment.network + stop - start
    if headers[segment.network] >> 4 == 4:
        struct.pack_into("!H", headers, segment.network + 2, length)
    else:
        struct.pack_into("!H", headers, segment.network + 4, length - _IPV6_HEADER)
    # Of the SYN itself, where there is one.
    sequence = segment.follows(start - segment.payload) - bool(flags & SYN)
    struct.pack_into("!I", headers, segment.transport + 4, sequence % _SEQUENCES)
    headers[segment.transport + 13] = flags
    return bytes(headers) + frame[start:stop]
