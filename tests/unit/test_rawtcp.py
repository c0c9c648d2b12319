"""Segments made by hand are what TCP would take, and what comes is read whatever it is."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.kernel.rawtcp import SYN, Segment, pack, pack_packet, parse, parse_packet

ADDRESSES = {4: ("198.51.100.7", "10.0.0.1"), 6: ("2001:db8::7", "fd00::1")}


def segment(version=4, **changed):
    source, destination = ADDRESSES[version]
    fields = {
        "source": source,
        "source_port": 40000,
        "destination": destination,
        "destination_port": 8080,
        "sequence": 0x01020304,
        "flags": SYN,
    }
    return Segment(**{**fields, **changed})


def sum_of(data):
    """The one's complement sum that a receiver computes: 0xffff when the checksum is right."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("version", [4, 6])
@given(
    ports=st.tuples(*[st.integers(0, 65535)] * 2),
    numbers=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    flags=st.integers(0, 63),
)
def test_what_is_packed_is_parsed_again(version, ports, numbers, flags):
    made = segment(
        version,
        source_port=ports[0],
        destination_port=ports[1],
        sequence=numbers[0],
        acknowledged=numbers[1],
        flags=flags,
    )
    assert parse_packet(pack_packet(made)) == made
    assert parse(made.source, made.destination, pack(made)) == made


@given(sequence=st.integers(0, 2**32 - 1))
def test_checksums_are_right(sequence):
    packet = pack_packet(segment(4, sequence=sequence))
    assert sum_of(packet[:20]) == 0xFFFF
    assert sum_of(packet[12:20] + struct.pack("!II", 20, 6) + packet[20:]) == 0xFFFF
    packet = pack_packet(segment(6, sequence=sequence))
    assert sum_of(packet[8:40] + struct.pack("!II", 20, 6) + packet[40:]) == 0xFFFF


def test_options_of_ipv4_are_skipped():
    packet = bytearray(pack_packet(segment()))
    packet[0] = 0x46
    assert parse_packet(bytes(packet[:20]) + b"\1\1\1\1" + bytes(packet[20:])) == segment()


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_cut_short_is_no_segment(version):
    packet = pack_packet(segment(version))
    assert all(parse_packet(packet[:length]) is None for length in range(len(packet)))


@given(st.binary(max_size=100))
def test_anything_can_be_read(data):
    parse_packet(data)


def test_other_protocols_are_no_segment():
    packet = bytearray(pack_packet(segment()))
    packet[9] = 17
    assert parse_packet(bytes(packet)) is None
