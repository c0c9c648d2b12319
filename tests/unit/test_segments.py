"""Finding TCP segments in frames, and cutting them so that the stream stays what it was."""

import ipaddress
import struct

import pytest

from tidegate.observe.segments import (
    ACK,
    FIN,
    PSH,
    SYN,
    NotTcp,
    Segment,
    largest_segment,
    parse,
    pieces,
)

HOSTS = {4: ("10.1.0.9", "10.2.0.7"), 6: ("fd01::9", "fd02::7")}
MSS_1400 = b"\x01\x02\x04\x05\x78\x01"


def tcp(payload=b"", *, sequence=1000, flags=ACK, options=b"") -> bytes:
    options += bytes(-len(options) % 4)
    offset = (20 + len(options)) // 4 << 4
    header = struct.pack("!HHIIBBHHH", 40000, 8080, sequence, 7, offset, flags, 100, 0, 0)
    return header + options + payload


def ipv4(body, *, protocol=6, fragment=0, options=b"", length=None):
    total = 20 + len(options) + len(body) if length is None else length
    source, destination = (ipaddress.ip_address(host).packed for host in HOSTS[4])
    version = 0x45 + len(options) // 4
    header = struct.pack("!BBHHHBBH", version, 0, total, 1, fragment, 64, protocol, 0)
    return b"\x08\x00" + header + source + destination + options + body


def ipv6(body, *, following=6, length=None):
    source, destination = (ipaddress.ip_address(host).packed for host in HOSTS[6])
    size = len(body) if length is None else length
    return (
        b"\x86\xdd"
        + struct.pack("!IHBB", 6 << 28, size, following, 64)
        + source
        + destination
        + body
    )


def frame(network, *, tags=b""):
    return bytes(12) + tags + network


def segment_of(raw) -> Segment:
    found = parse(raw)
    assert isinstance(found, Segment)
    return found


def stream_of(parts) -> dict[int, int]:
    """Each byte of payload by its sequence number."""
    seen = {}
    for raw in parts:
        one = segment_of(raw)
        assert one.end <= len(raw)
        for index, byte in enumerate(raw[one.payload : one.end]):
            assert seen.setdefault(one.follows(index), byte) == byte
    return seen


@pytest.mark.parametrize("wrap", [ipv4, ipv6])
@pytest.mark.parametrize("tags", [b"", b"\x81\x00\x00\x05", b"\x88\xa8\x00\x05\x81\x00\x00\x06"])
def test_a_segment_is_found_behind_its_headers(wrap, tags):
    raw = frame(wrap(tcp(b"hello", options=MSS_1400)), tags=tags)
    found = segment_of(raw)
    assert raw[found.payload : found.end] == b"hello"
    assert (found.source_port, found.destination_port) == (40000, 8080)
    assert (found.sequence, found.flags, found.length) == (1000, ACK, 5)
    assert largest_segment(raw, found) == 1400


def test_addresses_are_ipv6_or_mapped():
    assert segment_of(frame(ipv4(tcp()))).source == bytes(10) + b"\xff\xff" + bytes([10, 1, 0, 9])
    assert segment_of(frame(ipv6(tcp()))).destination == ipaddress.ip_address(HOSTS[6][1]).packed


def test_ipv4_options_and_padding_behind_the_packet_are_no_payload():
    raw = frame(ipv4(tcp(b"hi"), options=bytes(8)) + bytes(6))
    found = segment_of(raw)
    assert raw[found.payload : found.end] == b"hi"


@pytest.mark.parametrize(
    ("following", "headers"),
    [
        (0, b"\x06\x00" + bytes(6)),
        (60, b"\x06\x01" + bytes(14)),
        (44, b"\x06\x00\x00\x00\x00\x00\x00\x01"),
        (51, b"\x06\x04" + bytes(22)),
        (0, (b"\x00\x00" + bytes(6)) * 7 + b"\x06\x00" + bytes(6)),
    ],
)
def test_extension_headers_are_followed(following, headers):
    raw = frame(ipv6(headers + tcp(b"hi"), following=following))
    found = segment_of(raw)
    assert raw[found.payload : found.end] == b"hi"


@pytest.mark.parametrize(
    ("network", "known"),
    [
        (b"\x08\x06" + bytes(28), True),
        (ipv4(bytes(8), protocol=17), True),
        (ipv6(bytes(8), following=58), True),
        (ipv6(b"\x11\x00" + bytes(14), following=0), True),
        (ipv4(tcp(b"hi"), fragment=0x2000), False),
        (ipv6(b"\x06\x00\x00\x01\x00\x00\x00\x01" + tcp(), following=44), False),
        (ipv6((b"\x00\x00" + bytes(6)) * 9 + tcp(), following=0), False),
        (ipv4(tcp())[:10], False),
        (ipv4(tcp()[:19]), False),
        (ipv6(tcp())[:30], False),
        (ipv4(tcp()[:12] + b"\x40" + tcp()[13:]), False),
        (ipv4(tcp(), length=30), False),
        (b"\x08\x00\x65" + ipv4(tcp())[3:], False),
    ],
)
def test_what_is_no_segment_says_whether_that_is_certain(network, known):
    assert parse(frame(network)) == NotTcp(known=known)


def test_a_syn_takes_one_sequence_number():
    found = segment_of(frame(ipv4(tcp(b"fast", flags=SYN, sequence=2**32 - 1))))
    assert (found.opens, found.sequence, found.follows(4)) == (True, 0, 4)
    assert not segment_of(frame(ipv4(tcp(flags=SYN | ACK)))).opens


@pytest.mark.parametrize(
    "options",
    [b"", b"\x01\x01\x02\x04", b"\x02\x03\x05", b"\x03\x00\x00\x00", b"\x00\x02\x04\x05\x78"],
)
def test_options_without_a_segment_size_have_none(options):
    raw = frame(ipv4(tcp(options=options)))
    assert largest_segment(raw, segment_of(raw)) is None


def test_a_frame_that_fits_is_left_as_it_is():
    raw = frame(ipv4(tcp(b"x" * 100)))
    assert pieces(raw, segment_of(raw), len(raw)) == [raw]


@pytest.mark.parametrize("wrap", [ipv4, ipv6])
def test_pieces_carry_the_same_stream(wrap):
    payload = bytes(range(256)) * 40
    raw = frame(wrap(tcp(payload, sequence=2**32 - 5000, flags=ACK | PSH | FIN)))
    cut = pieces(raw, segment_of(raw), 1500)
    assert all(len(part) <= 1500 for part in cut)
    assert stream_of(cut) == {(2**32 - 5000 + at) % 2**32: byte for at, byte in enumerate(payload)}
    assert [segment_of(part).flags for part in cut[:-1]] == [ACK] * (len(cut) - 1)
    assert segment_of(cut[-1]).flags == ACK | PSH | FIN


def test_the_first_piece_of_a_syn_with_data_is_the_syn():
    raw = frame(ipv4(tcp(b"x" * 4000, flags=SYN, sequence=500)))
    first, *others = pieces(raw, segment_of(raw), 1500)
    assert segment_of(first).opens
    assert segment_of(first).sequence == 501
    assert not any(segment_of(part).flags & SYN for part in others)
    assert len(stream_of([first, *others])) == 4000


def test_a_super_segment_whose_length_is_not_told_ends_with_its_frame():
    raw = frame(ipv4(tcp(b"x" * 70000), length=0))
    assert len(stream_of(pieces(raw, segment_of(raw), 3000))) == 70000


@pytest.mark.parametrize("wrap", [ipv4, ipv6])
def test_what_a_capture_cut_off_is_left_out_and_nothing_is_made_up(wrap):
    raw = frame(wrap(tcp(b"GET / HTTP/1.1\r\n", flags=ACK | PSH)))
    (part,) = pieces(raw[:-6], segment_of(raw[:-6]), 1500)
    assert bytes(stream_of([part]).values()) == b"GET / HTTP"
    assert segment_of(part).flags == ACK


def test_the_end_of_a_stream_that_was_cut_off_stays_where_it_was():
    raw = frame(ipv4(tcp(b"x" * 100, flags=ACK | FIN)))
    first, last = pieces(raw[:-60], segment_of(raw[:-60]), 1500)
    assert (segment_of(first).flags, segment_of(first).length) == (ACK, 40)
    assert (segment_of(last).flags, segment_of(last).length) == (ACK | FIN, 0)
    assert segment_of(last).sequence == 1100


def test_a_segment_of_which_only_the_headers_were_captured_is_empty():
    raw = frame(ipv4(tcp(b"x" * 100)))[:54]
    (part,) = pieces(raw, segment_of(raw), 1500)
    assert segment_of(part).length == 0
