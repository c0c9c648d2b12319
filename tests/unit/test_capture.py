"""Captures in both formats, every link that IP comes by, and files that contradict themselves."""

import io
import struct

import pytest
from captures import block, enhanced, interface, old, pcap, section, simple

from tidegate.errors import InputError
from tidegate.observe.capture import LinkType, Packet, as_ethernet, packets

IPV4 = b"\x45" + bytes(19)
IPV6 = b"\x60" + bytes(39)
FRAME = bytes(12) + b"\x08\x00" + IPV4


def read(raw: bytes) -> list[Packet]:
    return list(packets(io.BytesIO(raw), "x.pcap"))


def fault(raw: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("magic", [0xA1B2C3D4, 0xA1B23C4D])
def test_a_pcap_file_is_read_in_either_byte_order_and_with_either_clock(order, magic):
    found = read(pcap([FRAME, FRAME + b"x"], order=order, magic=magic))
    assert [packet.data for packet in found] == [FRAME, FRAME + b"x"]
    assert {packet.link_type for packet in found} == {LinkType.ETHERNET}
    assert not any(packet.cut for packet in found)


def test_the_end_of_each_packet_in_the_file_is_told():
    raw = pcap([FRAME, FRAME])
    assert [packet.end for packet in read(raw)] == [24 + 16 + 34, len(raw)]
    raw = section() + interface() + enhanced(FRAME)
    assert [packet.end for packet in read(raw)] == [len(raw)]


def test_a_packet_that_is_not_there_in_full_is_told_apart():
    (short,) = read(pcap([FRAME], snap_length=20))
    assert (short.data, short.length, short.cut) == (FRAME[:20], 34, True)
    (short,) = read(section() + interface() + enhanced(FRAME[:20], length=34))
    assert (short.data, short.length, short.cut) == (FRAME[:20], 34, True)
    (short,) = read(section() + interface(snap_length=20) + simple(FRAME[:20], length=34))
    assert (short.data, short.length, short.cut) == (FRAME[:20], 34, True)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_pcapng_file_is_read_with_every_kind_of_packet_block(order):
    raw = (
        section(order)
        + interface(order=order)
        + block(5, bytes(12), order)
        + enhanced(FRAME, order)
        + old(FRAME + b"x", order)
        + simple(FRAME + b"xy", order=order)
    )
    assert [packet.data for packet in read(raw)] == [FRAME, FRAME + b"x", FRAME + b"xy"]


def test_each_packet_of_a_pcapng_file_has_the_link_type_of_its_interface():
    raw = section() + interface(1) + interface(101) + enhanced(IPV4, number=1) + enhanced(FRAME)
    assert [packet.link_type for packet in read(raw)] == [LinkType.RAW, LinkType.ETHERNET]


def test_a_second_section_describes_its_interfaces_anew():
    raw = section() + interface(1) + enhanced(FRAME)
    raw += section(">") + interface(101, ">") + enhanced(IPV4, ">")
    assert [packet.link_type for packet in read(raw)] == [LinkType.ETHERNET, LinkType.RAW]


def test_a_file_without_packets_has_none():
    assert read(pcap([])) == []
    assert read(section()) == []


def test_a_file_that_comes_in_pieces_is_read_to_its_end():
    class Pipe(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    raw = pcap([FRAME] * 3)
    assert len(list(packets(Pipe(raw), "-"))) == 3


@pytest.mark.parametrize(
    ("link_type", "header"),
    [
        (LinkType.RAW, b""),
        (LinkType.RAW_BSD, b""),
        (LinkType.RAW_OPENBSD, b""),
        (LinkType.IPV4, b""),
        (LinkType.NULL, b"\x02\0\0\0"),
        (LinkType.NULL, b"\0\0\0\x02"),
        (LinkType.LOOP, b"\0\0\0\x02"),
        (LinkType.LINUX_SLL, bytes(14) + b"\x08\x00"),
        (LinkType.LINUX_SLL2, b"\x08\x00" + bytes(18)),
    ],
)
def test_every_link_becomes_ethernet(link_type, header):
    packet = Packet(link_type, header + IPV4, len(header + IPV4), 0)
    assert as_ethernet(packet) == FRAME


@pytest.mark.parametrize(
    ("link_type", "header"),
    [
        (LinkType.RAW, b""),
        (LinkType.IPV6, b""),
        (LinkType.NULL, b"\x1e\0\0\0"),
        (LinkType.NULL, b"\0\0\0\x18"),
        (LinkType.LOOP, b"\0\0\0\x1c"),
        (LinkType.LINUX_SLL, bytes(14) + b"\x86\xdd"),
        (LinkType.LINUX_SLL2, b"\x86\xdd" + bytes(18)),
    ],
)
def test_ipv6_comes_by_every_link(link_type, header):
    packet = Packet(link_type, header + IPV6, len(header + IPV6), 0)
    assert as_ethernet(packet) == bytes(12) + b"\x86\xdd" + IPV6


def test_a_vlan_tag_behind_a_cooked_header_stays():
    tag = b"\x00\x05\x08\x00"
    packet = Packet(LinkType.LINUX_SLL, bytes(14) + b"\x81\x00" + tag + IPV4, 40, 0)
    assert as_ethernet(packet) == bytes(12) + b"\x81\x00" + tag + IPV4


@pytest.mark.parametrize(
    "packet",
    [
        Packet(LinkType.ETHERNET, FRAME[:13], 34, 0),
        Packet(LinkType.LINUX_SLL, bytes(15), 36, 0),
        Packet(LinkType.LINUX_SLL2, bytes(20), 40, 0),
        Packet(LinkType.NULL, b"\x02\0\0", 24, 0),
        Packet(LinkType.RAW, b"", 20, 0),
        Packet(105, bytes(60), 60, 0),
    ],
)
def test_what_has_no_network_layer_or_an_unknown_link_becomes_nothing(packet):
    assert as_ethernet(packet) is None


@pytest.mark.parametrize(
    ("raw", "offset", "problem"),
    [
        (b"", 0, "ends before the file's header"),
        (b"PK\x03\x04", 0, "is no capture: it begins with 50 4b 03 04; expected pcap or pcapng"),
        (b"\x1f\x8b\x08\x00", 0, "is compressed"),
        (pcap([])[:20], 20, "ends in the middle of the file's header"),
        (pcap([], link_type=105), 20, "has packets of link type 105; expected Ethernet"),
        (pcap([FRAME]) + b"123", 77, "ends in the middle of a packet's header"),
        (pcap([FRAME])[:-1], 73, "ends in the middle of a packet; expected 1 bytes more"),
        (pcap([]) + struct.pack("<IIII", 0, 0, 1 << 30, 60), 24, "a packet of 1073741824 bytes"),
        (section()[:11], 11, "ends in the middle of a section's header"),
        (block(0x0A0D0D0A, b"what" + bytes(12)), 0, "the byte order magic 77 68 61 74"),
        (section() + b"\x06\0\0\0\x0d\0\0\0", 40, "a block of 13 bytes"),
        (section() + b"\x06\0\0\0\xfc\xff\xff\xff", 40, "a block of 4294967292 bytes"),
        (section() + enhanced(FRAME), 40, "a packet of interface 0"),
        (section() + interface()[:-4] + bytes(4), 40, "a block of 20 bytes that ends as one of 0"),
        (section() + interface() + block(6, bytes(12)), 60, "a packet without its lengths"),
        (
            section() + interface() + block(6, struct.pack("<IIIII", 0, 0, 0, 99, 99)),
            60,
            "a packet of 99 bytes in a block of 32",
        ),
        (section() + simple(FRAME), 40, "a packet before any interface"),
    ],
)
def test_a_broken_file_is_told_in_one_sentence_with_the_byte(raw, offset, problem):
    said = fault(raw)
    assert said.startswith(f"x.pcap: byte {offset}: "), said
    assert problem in said
