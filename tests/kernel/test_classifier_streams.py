"""Packets in, class out: the classifier's own code, run by BPF_PROG_TEST_RUN."""

import contextlib
import random
import struct
from collections.abc import Callable, Iterator

import pytest
from classifying import Bench, bpffs
from packets import (
    ACK,
    AUTHENTICATION,
    DESTINATION,
    FIN,
    FRAGMENT,
    HOP_BY_HOP,
    IPV4,
    IPV6,
    ROUTING,
    RST,
    SYN,
    Packet,
    Talk,
    as_records,
    hello,
    ipv4,
    ipv6,
    with_extension,
    without_extensions,
)

from tidegate.errors import InputError
from tidegate.model import Direction, FlowClass
from tidegate.observe.abi import FlowFlag
from tidegate.observe.classifier import Classifier, MeshProfile

MESH_SNI = "api.default.dc1.internal.0a1b.consul"
PROFILE = MeshProfile(name="test", sni_suffixes=("internal.0A1B.consul",), alpn=("mesh-alpn",))
MESH = hello(MESH_SNI)
OWN_TLS = hello("pay.example.org", ["h2", "http/1.1"])
BARE_TLS = hello()
POST_QUANTUM = with_extension(MESH, 0xFE00, bytes(1700))
HUGE_MESH = with_extension(MESH, 0xFE00, bytes(5000))
HUGE_TLS = with_extension(BARE_TLS, 0xFE00, bytes(5000))
HTTP = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
NUL = b"\0"
PUSH = 0x08


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bpffs(tmp_path_factory.mktemp("classifier") / "bpf") as pins:
        classifier = Classifier.open(pins)
        try:
            classifier.set_profile(PROFILE)
            yield Bench(classifier)
        finally:
            classifier.remove()


@pytest.fixture
def bench(opened: Bench) -> Bench:
    opened.begin()
    return opened


def talk_of(version: int, port: int = 40000) -> Talk:
    client, server = IPV4 if version == 4 else IPV6
    return Talk(client=(client, port), server=(server, 8443))


def whole(data: bytes) -> Callable[[Talk], list[Packet]]:
    return lambda talk: [*talk.opening(), talk.up(0, data)]


def cut(data: bytes, size: int) -> Callable[[Talk], list[Packet]]:
    return lambda talk: [*talk.opening(), *talk.segments(data, size)]


def shuffled(data: bytes, size: int, seed: int) -> Callable[[Talk], list[Packet]]:
    def packets(talk: Talk) -> list[Packet]:
        segments = talk.segments(data, size)
        random.Random(seed).shuffle(segments)
        return [*talk.opening(), *segments]

    return packets


def in_records(record: bytes, *sizes: int) -> bytes:
    return as_records(record[5:], sizes)


def broken(record: bytes, at: int, byte: int) -> bytes:
    return record[:at] + bytes([byte]) + record[at + 1 :]


def finished(data: bytes) -> Callable[[Talk], list[Packet]]:
    return lambda talk: [*talk.opening(), talk.up(0, data), talk.up(len(data), b"", FIN | ACK)]


def server_name(name: str) -> bytes:
    return struct.pack("!HBH", len(name) + 3, 0, len(name)) + name.encode()


SMTP = b"220 mail ESMTP\r\n"

CASES: list[tuple[str, Callable[[Talk], list[Packet]], FlowClass]] = [
    ("mesh SNI", whole(MESH), FlowClass.MESH),
    ("mesh SNI in upper case", whole(hello(MESH_SNI.upper())), FlowClass.MESH),
    ("mesh ALPN", whole(hello("x.example", ["h2", "mesh-alpn"])), FlowClass.MESH),
    ("mesh ALPN without SNI", whole(hello(None, ["mesh-alpn"])), FlowClass.MESH),
    ("other SNI and ALPN", whole(OWN_TLS), FlowClass.TLS),
    (
        "SNI that ends alike but not at a label",
        whole(hello("x-internal.0a1b.consul")),
        FlowClass.TLS,
    ),
    ("SNI that is the suffix itself", whole(hello("internal.0a1b.consul")), FlowClass.TLS),
    ("SNI that has the suffix in the middle", whole(hello(MESH_SNI + ".org")), FlowClass.TLS),
    ("ALPN that begins like the mesh's", whole(hello(None, ["mesh-alpn2"])), FlowClass.TLS),
    ("ALPN that ends like the mesh's", whole(hello(None, ["x-mesh-alpn"])), FlowClass.TLS),
    (
        "SNI with nothing in front of the suffix",
        whole(with_extension(BARE_TLS, 0, server_name(".internal.0a1b.consul"))),
        FlowClass.TLS,
    ),
    ("no SNI, no ALPN", whole(BARE_TLS), FlowClass.TLS),
    ("no extensions at all", whole(without_extensions(BARE_TLS)), FlowClass.TLS),
    ("SSL 3.0 record version", whole(broken(MESH, 2, 0)), FlowClass.MESH),
    ("mesh, one byte per segment", cut(MESH, 1), FlowClass.MESH),
    ("tls, one byte per segment", cut(OWN_TLS, 1), FlowClass.TLS),
    ("mesh, segments of 63 bytes", cut(MESH, 63), FlowClass.MESH),
    ("2 KB hello in one super-segment", whole(POST_QUANTUM), FlowClass.MESH),
    ("2 KB hello in five segments", cut(POST_QUANTUM, 450), FlowClass.MESH),
    ("2 KB hello in five segments, in any order", shuffled(POST_QUANTUM, 450, 1), FlowClass.MESH),
    ("one byte per segment, in any order", shuffled(MESH, 1, 2), FlowClass.MESH),
    ("tls, seven bytes per segment, in any order", shuffled(OWN_TLS, 7, 3), FlowClass.TLS),
    ("hello over records of 100 bytes", whole(in_records(MESH, 100)), FlowClass.MESH),
    ("hello over records of one byte", whole(in_records(MESH, 1)), FlowClass.MESH),
    ("tls over records, one byte per segment", cut(in_records(OWN_TLS, 5, 3), 1), FlowClass.TLS),
    (
        "hello larger than the buffer, name in reach",
        cut(with_extension(HUGE_TLS, 0, server_name(MESH_SNI)), 1400),
        FlowClass.MESH,
    ),
    ("hello larger than the buffer, name beyond", cut(HUGE_MESH, 1400), FlowClass.MESH),
    (
        "retransmitted segments",
        lambda t: [*t.opening(), *[p for p in t.segments(MESH, 100) for _ in "ab"]],
        FlowClass.MESH,
    ),
    (
        "overlapping segments",
        lambda t: [
            *t.opening(),
            *[
                t.up(max(0, at - 50), MESH[max(0, at - 50) : at + 100])
                for at in range(0, len(MESH), 100)
            ],
        ],
        FlowClass.MESH,
    ),
    (
        "overlap with other bytes: the first stay",
        lambda t: [*t.opening(), t.up(10, MESH[10:]), t.up(0, MESH[:10] + bytes(len(MESH) - 10))],
        FlowClass.MESH,
    ),
    (
        "overlap at the front: the first stay",
        lambda t: [
            *t.opening(),
            t.up(0, MESH[:300]),
            t.up(200, HTTP + MESH[200 + len(HTTP) : 290]),
            t.up(290, NUL * 10 + MESH[300:]),
        ],
        FlowClass.MESH,
    ),
    (
        "overlap from before the start",
        lambda t: [*t.opening(), t.up(-3, b"xyz" + MESH)],
        FlowClass.MESH,
    ),
    ("http", whole(HTTP), FlowClass.PLAINTEXT),
    ("http, one byte per segment", cut(HTTP, 1), FlowClass.PLAINTEXT),
    ("a single byte", whole(b"x"), FlowClass.PLAINTEXT),
    (
        "record type of TLS, another version",
        whole(b"\x16\x02\x00\x02\x00\x01\x00\x01\xfc"),
        FlowClass.PLAINTEXT,
    ),
    (
        "record type and version of TLS, empty record",
        whole(b"\x16\x03\x01\x00\x00"),
        FlowClass.PLAINTEXT,
    ),
    ("record longer than TLS allows", whole(b"\x16\x03\x01\x40\x01\x01"), FlowClass.PLAINTEXT),
    ("record of a ServerHello", whole(broken(MESH, 5, 2)), FlowClass.PLAINTEXT),
    ("alert record", whole(b"\x15\x03\x01\x00\x02\x02\x28"), FlowClass.PLAINTEXT),
    (
        "hello too short to be one",
        whole(b"\x16\x03\x01\x00\x20\x01\x00\x00\x1c" + bytes(28)),
        FlowClass.PLAINTEXT,
    ),
    ("record longer than its hello", whole(broken(MESH, 8, MESH[8] - 1)), FlowClass.PLAINTEXT),
    ("good headers, inconsistent body", whole(broken(MESH, 43, 0xFF)), FlowClass.TLS),
    (
        "good headers, then another record type",
        whole(MESH[:3] + b"\x00\x20" + MESH[5:37] + HTTP),
        FlowClass.TLS,
    ),
    ("SSLv2-like hello", whole(b"\x80\x2e\x01\x03\x01" + bytes(40)), FlowClass.PLAINTEXT),
    (
        "Fast Open: the hello in the SYN",
        lambda t: [t.syn(MESH), t.syn_ack(len(MESH))],
        FlowClass.MESH,
    ),
    (
        "Fast Open: half of the hello in the SYN",
        lambda t: [t.syn(MESH[:200]), t.syn_ack(200), t.up(200, MESH[200:])],
        FlowClass.MESH,
    ),
    (
        "Fast Open refused: the hello comes again",
        lambda t: [t.syn(MESH[:200]), t.syn_ack(), t.up(0, MESH)],
        FlowClass.MESH,
    ),
    (
        "server speaks first, then plaintext",
        lambda t: [*t.opening(), t.down(0, SMTP), t.up(0, b"EHLO x\r\n", ACK)],
        FlowClass.SERVER_FIRST,
    ),
    (
        "server speaks first, client says nothing",
        lambda t: [*t.opening(), t.down(0, SMTP)],
        FlowClass.SERVER_FIRST,
    ),
    (
        "server speaks first, client only closes",
        lambda t: [*t.opening(), t.down(0, SMTP), t.up(0, b"", FIN | ACK)],
        FlowClass.SERVER_FIRST,
    ),
    (
        "server speaks first, then TLS",
        lambda t: [*t.opening(), t.down(0, SMTP), t.up(0, OWN_TLS)],
        FlowClass.STARTTLS,
    ),
    (
        "server speaks first, then TLS in pieces",
        lambda t: [*t.opening(), t.down(0, SMTP), *t.segments(MESH, 9)],
        FlowClass.STARTTLS,
    ),
    (
        "server answers after the client closed",
        lambda t: [*t.opening(), t.up(0, b"", FIN | ACK), t.down(0, SMTP, 1)],
        FlowClass.SERVER_FIRST,
    ),
    (
        "server answers in the middle of a hello",
        lambda t: [*t.opening(), t.up(0, MESH[:50]), t.down(0, SMTP, 50), t.up(50, MESH[50:])],
        FlowClass.MESH,
    ),
    ("no SYN seen, client speaks", lambda t: [t.up(0, MESH)], FlowClass.UNKNOWN),
    ("no SYN seen, server speaks", lambda t: [t.down(9, HTTP), t.up(4, HTTP)], FlowClass.UNKNOWN),
    ("SYN not seen but SYN-ACK", lambda t: [t.syn_ack(), t.up(0, MESH)], FlowClass.UNKNOWN),
    ("opened and silent", lambda t: t.opening(), FlowClass.EMPTY),
    ("refused", lambda t: [t.syn(), t.down(0, b"", 0, RST | ACK)], FlowClass.EMPTY),
    (
        "opened and closed",
        lambda t: [
            *t.opening(),
            t.up(0, b"", FIN | ACK),
            t.down(0, b"", 1, FIN | ACK),
            t.up(1, b""),
        ],
        FlowClass.EMPTY,
    ),
    ("opened and reset", lambda t: [*t.opening(), t.up(0, b"", RST)], FlowClass.EMPTY),
    (
        "SYN retransmitted",
        lambda t: [t.syn(), t.syn(), t.syn_ack(), t.syn(), t.up(0, HTTP)],
        FlowClass.PLAINTEXT,
    ),
    ("closed before the record header was whole", finished(b"\x16\x03\x01"), FlowClass.PLAINTEXT),
    (
        "closed with the FIN on the data",
        lambda t: [*t.opening(), t.up(0, b"\x16\x03", FIN | ACK)],
        FlowClass.PLAINTEXT,
    ),
    ("closed after the headers were whole", finished(MESH[:60]), FlowClass.TLS),
    (
        "reset by the server in mid-hello",
        lambda t: [*t.opening(), t.up(0, MESH[:60]), t.down(0, b"", 60, RST | ACK)],
        FlowClass.TLS,
    ),
    (
        "closed with bytes missing",
        lambda t: [*t.opening(), t.up(3, MESH[3:60]), t.up(60, b"", FIN | ACK)],
        FlowClass.UNKNOWN,
    ),
    (
        "closed, and the missing bytes come late",
        lambda t: [*t.opening(), t.up(3, MESH[3:60]), t.up(60, b"", FIN | ACK), t.up(0, MESH[:3])],
        FlowClass.TLS,
    ),
    (
        "reset with bytes missing",
        lambda t: [*t.opening(), t.up(0, MESH[:3]), t.up(9, MESH[9:60]), t.up(60, b"", RST)],
        FlowClass.UNKNOWN,
    ),
    (
        "FIN before the data",
        lambda t: [*t.opening(), t.up(30, MESH[30:], FIN | ACK), t.up(0, MESH[:30])],
        FlowClass.MESH,
    ),
    (
        "the server has bytes that were not seen",
        lambda t: [*t.opening(), t.up(9, MESH[9:]), t.down(0, b"", len(MESH)), t.up(0, MESH)],
        FlowClass.UNKNOWN,
    ),
    (
        "both ends open at once",
        lambda t: [t.syn(), t.down(-1, b"", 0, SYN), t.syn_ack(), t.up(0, MESH)],
        FlowClass.MESH,
    ),
]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("packets", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_stream_has_the_class_of_its_beginning(
    bench: Bench,
    packets: Callable[[Talk], list[Packet]],
    expected: FlowClass,
    direction: Direction,
    version: int,
) -> None:
    talk = talk_of(version)
    if direction is Direction.INBOUND:
        bench.begin(service_ports=(8443,))
    bench.play(packets(talk), direction)
    assert bench.classes() == {expected: 1}
    (edge,) = [edge for edge in bench.edges() if edge.count.connections]
    peer = talk.server if direction is Direction.OUTBOUND else talk.client
    assert (edge.key.direction, edge.key.peer, edge.key.port) == (direction, peer[0], 8443)


def vlan(talk: Talk) -> None:
    talk.tags = [(0x8100, 7)]


def two_vlans(talk: Talk) -> None:
    talk.tags = [(0x88A8, 7), (0x8100, 8)]


def tcp_options(talk: Talk) -> None:
    talk.options = b"\x01\x01\x08\x0a" + bytes(8) + b"\x01" * 28


def ip_options(talk: Talk) -> None:
    talk.network = lambda s, d, segment: ipv4(s, d, segment, options=b"\x01" * 40)


def extension_headers(talk: Talk) -> None:
    talk.network = lambda s, d, segment: ipv6(
        s,
        d,
        segment,
        [
            (HOP_BY_HOP, b"\x00" + bytes(6)),
            (DESTINATION, b"\x01" + bytes(14)),
            (ROUTING, b"\x00" + bytes(6)),
            (AUTHENTICATION, b"\x04" + bytes(22)),
            (FRAGMENT, bytes(7)),
        ],
    )


def padded(talk: Talk) -> None:
    family = ipv4 if "." in talk.client[0] else ipv6
    talk.network = lambda s, d, segment: family(s, d, segment) + b"GET padding"


def big_tcp(talk: Talk) -> None:
    at = 4 if "." in talk.client[0] else 6

    def without_length(source: str, destination: str, segment: bytes) -> bytes:
        packet = (ipv4 if at == 4 else ipv6)(source, destination, segment)
        return packet[:at] + b"\0\0" + packet[at + 2 :]

    talk.network = without_length


@pytest.mark.parametrize(
    ("version", "wrap"),
    [
        (4, vlan),
        (6, vlan),
        (4, two_vlans),
        (6, two_vlans),
        (4, tcp_options),
        (6, tcp_options),
        (4, ip_options),
        (6, extension_headers),
        (4, padded),
        (6, padded),
        (4, big_tcp),
        (6, big_tcp),
    ],
)
def test_headers_of_every_kind_are_read(
    bench: Bench, version: int, wrap: Callable[[Talk], None]
) -> None:
    talk = talk_of(version)
    wrap(talk)
    data = [*talk.segments(MESH, 200), talk.down(0, b"x" * 30, len(MESH))]
    bench.play([*talk.opening(), *data], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert edge.key.flow_class is FlowClass.MESH
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (len(MESH), 30)
    assert bench.counted() == {}


def fragmented(version: int, offset: int, more: bool) -> Talk:
    talk = talk_of(version)
    if version == 4:
        talk.network = lambda s, d, g: ipv4(s, d, g, fragment=offset | more << 13)
    else:
        body = b"\0" + struct.pack("!HI", offset << 3 | more, 1)
        talk.network = lambda s, d, g: ipv6(s, d, g, [(FRAGMENT, body)])
    return talk


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("offset", "more"), [(0, True), (100, True), (100, False)])
def test_fragments_are_counted_and_never_read_as_segments(
    bench: Bench, version: int, offset: int, more: bool
) -> None:
    bench.play(fragmented(version, offset, more).opening(), Direction.OUTBOUND)
    assert bench.edges() == []
    assert bench.counted() == {"tcp_fragment": 3}


def without_network(talk: Talk, packet: bytes) -> list[Packet]:
    talk.network = lambda s, d, segment: packet
    return [talk.syn()]


@pytest.mark.parametrize(
    ("packets", "counted"),
    [
        (lambda t: without_network(t, b"\x08\x06" + bytes(28)), "not_ip"),
        (lambda t: without_network(t, ipv6("::1", "::2", bytes(8), next_header=17)), "not_tcp"),
        (lambda t: without_network(t, ipv4(*IPV4, bytes(19))), "bad_headers"),
        (lambda t: without_network(t, ipv4(*IPV4, bytes(20))), "bad_headers"),
        (lambda t: without_network(t, b"\x08\x00" + b"\x44" + bytes(30)), "bad_headers"),
        (lambda t: without_network(t, ipv4(*IPV4, bytes(40))[:-10]), "bad_headers"),
        (lambda t: without_network(t, ipv6(*IPV6, bytes(40))[:-10]), "bad_headers"),
        (
            lambda t: without_network(t, ipv6(*IPV6, bytes(20), [(HOP_BY_HOP, bytes(7))] * 9)),
            "too_many_headers",
        ),
        (lambda t: without_network(t, b"\x81\x00\0\1" * 3 + b"\x08\x00"), "too_many_headers"),
    ],
    ids=["arp", "udp", "short", "no-offset", "short-ip", "cut-v4", "cut-v6", "chain", "tags"],
)
def test_what_is_not_a_whole_segment_is_counted_by_its_kind(
    bench: Bench, packets: Callable[[Talk], list[Packet]], counted: str
) -> None:
    bench.play(packets(talk_of(4)), Direction.OUTBOUND)
    assert bench.edges() == []
    assert bench.counted() == {counted: 1}


@pytest.mark.parametrize("version", [4, 6])
def test_bytes_are_counted_once_by_stream_position(bench: Bench, version: int) -> None:
    talk = talk_of(version)
    answer = b"a" * 3000
    bench.play(
        [
            *talk.opening(),
            talk.up(0, HTTP),
            talk.up(0, HTTP),
            talk.down(0, answer, len(HTTP)),
            talk.down(100, answer[100:200], len(HTTP)),
            talk.up(len(HTTP) + 10, b"later"),
            talk.up(len(HTTP), b"sooner----"),
            talk.up(len(HTTP) + 15, b"", FIN | ACK),
            talk.down(len(answer), b"", len(HTTP) + 16, FIN | ACK),
            talk.up(len(HTTP) + 16, b""),
            talk.down(len(answer) + 1, b"", len(HTTP) + 16),
        ],
        Direction.OUTBOUND,
    )
    (edge,) = bench.edges()
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (
        len(HTTP) + 15,
        len(answer),
    )


@pytest.mark.parametrize("isn", [0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFF00, 0x7FFFFFF0])
def test_sequence_numbers_may_wrap_anywhere(bench: Bench, isn: int) -> None:
    talk = talk_of(4)
    talk.client_isn = talk.server_isn = isn
    data = [*talk.segments(MESH, 100), talk.down(0, b"y" * 400, len(MESH))]
    bench.play([*talk.opening(), *data], Direction.INBOUND)
    (edge,) = bench.edges()
    assert edge.key.flow_class is FlowClass.MESH
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (len(MESH), 400)


def test_a_sequence_number_out_of_any_window_counts_no_bytes(bench: Bench) -> None:
    talk = talk_of(4)
    bench.play(
        [*talk.opening(), talk.up(0, HTTP), talk.up(1 << 30 | 1 << 29, HTTP)], Direction.OUTBOUND
    )
    (edge,) = bench.edges()
    assert edge.count.bytes_to_server == len(HTTP)
    assert bench.counted() == {"out_of_window": 1}


def test_a_new_connection_on_an_old_tuple_is_a_connection_of_its_own(bench: Bench) -> None:
    first, second, third = talk_of(4), talk_of(4), talk_of(4)
    second.client_isn += 70_000
    third.client_isn += 140_000
    bench.play(
        [
            *whole(HTTP)(first),
            *second.opening(),
            second.up(0, MESH[:100]),
            *whole(MESH)(third),
        ],
        Direction.OUTBOUND,
    )
    assert bench.classes() == {FlowClass.PLAINTEXT: 1, FlowClass.TLS: 1, FlowClass.MESH: 1}
    assert bench.counted() == {}


def test_what_is_told_about_one_edge_is_the_sum_of_its_connections(bench: Bench) -> None:
    for port in range(50_000, 50_020):
        bench.play(whole(HTTP)(talk_of(6, port)), Direction.INBOUND)
    (edge,) = bench.edges()
    assert edge.count.connections == 20
    assert edge.count.bytes_to_server == 20 * len(HTTP)
    assert edge.count.first_seen <= edge.count.last_seen


def test_bytes_move_to_the_class_that_a_connection_turns_into(bench: Bench) -> None:
    talk = talk_of(4)
    bench.play([*talk.opening(), talk.down(0, SMTP)], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert (edge.key.flow_class, edge.count.bytes_to_client) == (
        FlowClass.SERVER_FIRST,
        len(SMTP),
    )
    bench.play([talk.up(0, OWN_TLS), talk.down(len(SMTP), b"abc")], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert edge.key.flow_class is FlowClass.STARTTLS
    assert edge.count.bytes_to_server == len(OWN_TLS)
    assert edge.count.bytes_to_client == len(SMTP) + 3


@pytest.mark.parametrize(
    ("service_ports", "local_port", "peer_port", "direction"),
    [
        ((9999,), 9999, 80, Direction.INBOUND),
        ((), 80, 50_000, Direction.INBOUND),
        ((8080,), 50_000, 80, Direction.OUTBOUND),
    ],
)
def test_without_a_syn_the_service_port_tells_the_direction_or_else_the_smaller(
    bench: Bench,
    service_ports: tuple[int, ...],
    local_port: int,
    peer_port: int,
    direction: Direction,
) -> None:
    bench.begin(service_ports)
    talk = Talk(client=(IPV4[0], local_port), server=(IPV4[1], peer_port))
    bench.play([talk.up(0, b"x")], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert edge.key.direction is direction
    assert edge.key.port == (local_port if direction is Direction.INBOUND else peer_port)
    assert bench.counted() == {"joined_midstream": 1}


def test_the_profile_can_change_at_run_time(bench: Bench) -> None:
    bench.classifier.set_profile(MeshProfile(name="other", alpn=("h2",)))
    try:
        bench.play(whole(MESH)(talk_of(4)), Direction.OUTBOUND)
        bench.play(whole(OWN_TLS)(talk_of(6)), Direction.OUTBOUND)
    finally:
        bench.classifier.set_profile(PROFILE)
    assert bench.classes() == {FlowClass.TLS: 1, FlowClass.MESH: 1}
    assert {edge.key.flow_class: edge.key.peer for edge in bench.edges()} == {
        FlowClass.TLS: IPV4[1],
        FlowClass.MESH: IPV6[1],
    }


@pytest.mark.parametrize(
    ("packets", "counter"),
    [
        (whole(broken(MESH, 43, 0xFF)), "hello_malformed"),
        (
            lambda t: [*t.opening(), t.up(9, MESH[9:]), t.down(0, b"", len(MESH))],
            "bytes_missed",
        ),
    ],
)
def test_a_class_that_is_second_best_shows_in_a_counter(
    bench: Bench, packets: Callable[[Talk], list[Packet]], counter: str
) -> None:
    bench.play(packets(talk_of(4)), Direction.OUTBOUND)
    assert bench.counted() == {counter: 1}


def test_streams_cut_and_mixed_at_random_have_the_class_of_the_whole(bench: Bench) -> None:
    dice = random.Random(20)
    streams = [MESH, OWN_TLS, BARE_TLS, POST_QUANTUM, in_records(POST_QUANTUM, 333), HTTP]
    kinds = [FlowClass.MESH, FlowClass.TLS, FlowClass.TLS, FlowClass.MESH, FlowClass.MESH]
    kinds.append(FlowClass.PLAINTEXT)
    expected = dict.fromkeys(FlowClass, 0)
    waiting = []
    for port in range(30_000, 30_120):
        stream, kind = dice.choice(list(zip(streams, kinds, strict=True)))
        talk = talk_of(dice.choice((4, 6)), port)
        segments = []
        for _ in range(dice.randrange(1, 12)):
            start = dice.randrange(len(stream))
            segments.append(talk.up(start, stream[start : start + dice.randrange(1, 700)]))
        segments += talk.segments(stream, dice.randrange(1, 900))
        dice.shuffle(segments)
        waiting.append([*talk.opening(), *segments][::-1])
        expected[kind] += 1
    while waiting:
        talking = dice.choice(waiting)
        bench.play([talking.pop()], Direction.OUTBOUND)
        waiting = [talking for talking in waiting if talking]
    assert bench.classes() == {kind: number for kind, number in expected.items() if number}
    assert bench.counted() == {}
    assert all(flow.settled or flow.flow_class is FlowClass.PLAINTEXT for flow in bench.flows())


@pytest.mark.parametrize("length", [1, 5, 11, 100])
def test_a_hello_that_stalls_is_unknown_until_it_goes_on(bench: Bench, length: int) -> None:
    talk = talk_of(4)
    bench.play([*talk.opening(), talk.up(0, MESH[:length])], Direction.INBOUND)
    assert bench.classes() == {FlowClass.UNKNOWN: 1}
    bench.play([talk.up(length, MESH[length:])], Direction.INBOUND)
    assert bench.classes() == {FlowClass.MESH: 1}


def test_a_prefix_that_had_to_make_room_leaves_its_flow_unknown(bench: Bench) -> None:
    first = talk_of(4, 1000)
    bench.play([*first.opening(), first.up(0, MESH[:50])], Direction.OUTBOUND)
    for port in range(2000, 2000 + 4096):
        talk = talk_of(4, port)
        bench.play([talk.syn(), talk.up(0, MESH[:50])], Direction.OUTBOUND)
    bench.play([first.up(50, MESH[50:])], Direction.OUTBOUND)
    assert bench.classes() == {FlowClass.UNKNOWN: 1 + 4096}
    assert bench.counted() == {"prefix_evicted": 1}


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        (MeshProfile(name="long", alpn=("x" * 129,)), "profile long: alpn: .* has 129 bytes"),
        (MeshProfile(name="none", alpn=("",)), "profile none: alpn: '' has 0 bytes"),
        (MeshProfile(name="many", sni_suffixes=("a",) * 9), "sni_suffixes: 9 names"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_and_the_old_one_stays(
    bench: Bench, profile: MeshProfile, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        bench.classifier.set_profile(profile)
    bench.play(whole(MESH)(talk_of(4)), Direction.OUTBOUND)
    assert bench.classes() == {FlowClass.MESH: 1}


def test_a_prefix_of_an_evicted_flow_is_not_taken_for_that_of_the_next(bench: Bench) -> None:
    first, second = talk_of(4), talk_of(4)
    second.client_isn += 70_000
    bench.play([*first.opening(), first.up(0, OWN_TLS[:50])], Direction.OUTBOUND)
    bench.evict_flows()
    bench.play([*second.opening(), *second.segments(MESH, 100)], Direction.OUTBOUND)
    assert bench.classes() == {FlowClass.UNKNOWN: 1, FlowClass.MESH: 1}
    assert bench.counted() == {}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("behind", [2, 100, 70_000, 1 << 30])
def test_payload_of_another_stream_than_the_syns_is_never_taken_for_no_payload(
    bench: Bench, version: int, behind: int
) -> None:
    """Of two SYNs on one tuple, the classifier cannot know which one the server took."""
    talk = talk_of(version)
    talk.client_isn = 1 << 31
    bench.play([*talk.opening(), talk.up(-behind, b"x")], Direction.INBOUND)
    assert bench.classes() == {FlowClass.UNKNOWN: 1}
    bench.play([talk.up(0, MESH)], Direction.INBOUND)
    assert bench.classes() == {FlowClass.UNKNOWN: 1}


def test_payload_beyond_any_window_is_never_taken_for_no_payload(bench: Bench) -> None:
    talk = talk_of(4)
    bench.play([*talk.opening(), talk.up(3 << 29, HTTP)], Direction.INBOUND)
    assert bench.classes() == {FlowClass.UNKNOWN: 1}
    assert bench.counted() == {"out_of_window": 1}


REMARK = b"go away"


@pytest.mark.parametrize("from_client", [True, False])
def test_what_a_reset_carries_is_not_of_the_stream(bench: Bench, from_client: bool) -> None:
    talk, unknown = talk_of(4), talk_of(4, 40_001)

    def reset(talk: Talk) -> Packet:
        if from_client:
            return talk.up(0, REMARK, RST)
        return talk.down(0, REMARK, flags=RST | ACK)

    bench.play([talk.syn(), reset(talk), reset(unknown)], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert (edge.key.flow_class, edge.count.connections) == (FlowClass.EMPTY, 1)
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (0, 0)


def test_a_syn_with_a_reset_opens_nothing_and_ends_nothing(bench: Bench) -> None:
    talk = talk_of(4)
    nonsense = Talk(talk.client, talk.server, client_isn=70_000)
    bench.play(
        [*talk.opening(), nonsense.up(-1, b"", SYN | RST), talk.up(0, MESH)], Direction.INBOUND
    )
    assert bench.classes() == {FlowClass.MESH: 1}


@pytest.mark.parametrize(
    ("late", "expected"),
    [(MESH, FlowClass.MESH), (HTTP, FlowClass.PLAINTEXT), (MESH[:4], FlowClass.UNKNOWN)],
)
def test_a_reset_that_overtakes_the_first_bytes_does_not_hide_them(
    bench: Bench, late: bytes, expected: FlowClass
) -> None:
    talk = talk_of(4)
    reset = talk.up(len(late), b"", RST)
    bench.play([*talk.opening(), reset, talk.up(0, late)], Direction.INBOUND)
    assert bench.classes() == {expected: 1}


@pytest.mark.parametrize("flags", [FIN | ACK, FIN | ACK | PUSH], ids=["fin", "fin-push"])
@pytest.mark.parametrize(
    ("data", "expected"), [(MESH, FlowClass.MESH), (HTTP, FlowClass.PLAINTEXT)]
)
def test_the_first_bytes_may_come_with_the_fin(
    bench: Bench, data: bytes, expected: FlowClass, flags: int
) -> None:
    talk = talk_of(6)
    bench.play([*talk.opening(), talk.up(0, data, flags)], Direction.INBOUND)
    assert bench.classes() == {expected: 1}
    assert bench.edges()[0].count.bytes_to_server == len(data)


def test_a_client_that_gave_up_may_be_called_on_the_same_ports(bench: Bench) -> None:
    """Not both ends opening at once: the first connection is over."""
    talk = talk_of(4)
    back = Talk(client=talk.server, server=talk.client, client_isn=9)
    bench.play([talk.syn(), talk.up(0, b"", RST)], Direction.OUTBOUND)
    bench.play([*back.opening(), back.up(0, HTTP)], Direction.INBOUND)
    assert {(edge.key.direction, edge.key.flow_class) for edge in bench.edges()} == {
        (Direction.OUTBOUND, FlowClass.EMPTY),
        (Direction.INBOUND, FlowClass.PLAINTEXT),
    }


@pytest.mark.parametrize("data", [MESH, HTTP, b""], ids=["mesh", "http", "nothing"])
@pytest.mark.parametrize("end", [FIN | ACK, RST], ids=["fin", "rst"])
@pytest.mark.parametrize("from_client", [True, False])
def test_a_connection_is_closed_by_a_reset_or_by_its_client(
    bench: Bench, data: bytes, end: int, from_client: bool
) -> None:
    talk = talk_of(4)
    bench.play([*talk.opening(), *([talk.up(0, data)] if data else [])], Direction.OUTBOUND)
    assert not bench.flows()[0].flags & FlowFlag.CLOSED
    last = talk.up(len(data), b"", end) if from_client else talk.down(0, b"", len(data), end)
    bench.play([last], Direction.OUTBOUND)
    closed = bool(bench.flows()[0].flags & FlowFlag.CLOSED)
    assert closed == (from_client or end == RST)


# Reports


@pytest.fixture(scope="module")
def reporting() -> Iterator[Bench]:
    with contextlib.closing(Classifier.private(report=True)) as classifier:
        classifier.set_profile(PROFILE)
        yield Bench(classifier)


PROXY = b"PROXY TCP4 10.0.0.1 10.0.0.2 4711 443\r\n"
SSLV2 = b"\x80\x1c\x01\x03\x01\0\x03\0\0\0\x10" + bytes(19)


@pytest.mark.parametrize(
    ("before", "data", "expected"),
    [
        (b"", MESH, FlowClass.MESH),
        (b"", OWN_TLS, FlowClass.TLS),
        (b"", HUGE_MESH, FlowClass.MESH),
        (b"", in_records(HUGE_MESH, 1, 700), FlowClass.MESH),
        (b"", in_records(OWN_TLS, 1), FlowClass.TLS),
        (b"", SSLV2, FlowClass.TLS),
        (PROXY, HUGE_MESH, FlowClass.MESH),
    ],
    ids=["mesh", "tls", "huge", "huge in records", "records of a byte", "sslv2", "behind proxy"],
)
@pytest.mark.parametrize("size", [3000, 333, 1], ids=lambda size: f"by {size}")
@pytest.mark.parametrize("mixed", [False, True], ids=["in order", "mixed"])
def test_parts_of_a_reported_hello_follow_each_other_without_a_gap(
    reporting: Bench, before: bytes, data: bytes, expected: FlowClass, size: int, mixed: bool
) -> None:
    reporting.begin()
    reporting.classifier.hellos()
    talk = talk_of(4)
    segments = talk.segments(before + data + NUL * 50, size)
    if mixed:
        near = random.Random(size)
        segments = [one for _, one in sorted(
            (number + near.random() * 1000 / size, one) for number, one in enumerate(segments)
        )]  # fmt: skip
    reporting.play([*talk.opening(), *segments], Direction.INBOUND)
    assert reporting.classes() == {expected: 1}
    hello = b""
    while chunks := reporting.classifier.hellos():
        for chunk in chunks:
            assert chunk.position == len(hello)
            hello += chunk.bytes
    assert hello == data
    assert reporting.counted() == {}
