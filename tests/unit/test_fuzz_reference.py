"""The reference that the classifier is compared with says what it should, and the streams are what they are named."""

import struct

import pytest

from fuzz import streams
from fuzz.reference import ACK, FIN, RST, SYN, Connection, Flag, Profile, Segment
from kernel.packets import as_records, hello, with_extension
from tidegate.model import FlowClass, Hint

PORT = 8443
PROFILE = Profile(sni_suffixes=(b".internal.*.consul",), alpn=(b"istio",))
MESH = hello("api.default.dc1.internal.0a1b.consul")
TLS = hello("pay.example.org", ["h2"])
HTTP = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
V1 = b"PROXY TCP4 10.0.0.1 10.0.0.2 4711 443\r\n"
V2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12)
SSLV2 = b"\x80\x1c\x01\x03\x01\0\x03\0\0\0\x10" + bytes(19)
MYSQL = b"\x20\0\0\1" + struct.pack("<IIB", 0x0A00, 1 << 24, 45) + bytes(23)
POSTGRES_SSL = struct.pack("!II", 8, 80877103)


def talk(*said: tuple[str, bytes]) -> list[Segment]:
    """Everything said in whole segments, in this order, each end acknowledging all that the other sent."""
    at = {"client": 0, "server": 0}
    segments = [Segment(True, 0, b"", SYN), Segment(False, 0, b"", SYN | ACK)]
    for who, data in said:
        other = at["server" if who == "client" else "client"]
        segments.append(Segment(who == "client", at[who], data, ACK, other))
        at[who] += len(data)
    return segments


def heard(segments: list[Segment], profile: Profile = PROFILE) -> Connection:
    connection = Connection(profile, PORT)
    for segment in segments:
        connection.feed(segment)
    return connection


def client(data: bytes) -> tuple[str, bytes]:
    return "client", data


def server(data: bytes) -> tuple[str, bytes]:
    return "server", data


CASES: list[tuple[str, list[Segment], FlowClass, Hint | None, Flag]] = [
    ("mesh", talk(client(MESH)), FlowClass.MESH, None, Flag(0)),
    ("tls", talk(client(TLS)), FlowClass.TLS, None, Flag(0)),
    (
        "mesh far back",
        talk(client(with_extension(MESH, 0xFE00, bytes(9000)))),
        FlowClass.MESH,
        None,
        Flag(0),
    ),
    (
        "name twice",
        talk(client(with_extension(with_extension(TLS, 0, b""), 9, b""))),
        FlowClass.TLS,
        None,
        Flag(0),
    ),
    ("http", talk(client(HTTP)), FlowClass.PLAINTEXT, Hint.HTTP1, Flag(0)),
    ("sslv2", talk(client(SSLV2)), FlowClass.TLS, None, Flag.SSLV2),
    ("almost sslv2", talk(client(b"\x80\x1d" + SSLV2[2:])), FlowClass.PLAINTEXT, None, Flag(0)),
    ("proxy, http", talk(client(V1 + HTTP)), FlowClass.PLAINTEXT, Hint.HTTP1, Flag.PROXY),
    ("proxy, mesh", talk(client(V2), client(MESH)), FlowClass.MESH, None, Flag.PROXY),
    ("proxy and no more", talk(client(V2)), FlowClass.UNKNOWN, None, Flag.PROXY),
    ("proxy twice", talk(client(V1 + V2)), FlowClass.PLAINTEXT, None, Flag.PROXY),
    (
        "proxy, greeting",
        talk(client(V1), server(b"220"), client(TLS)),
        FlowClass.STARTTLS,
        None,
        Flag.PROXY,
    ),
    ("no proxy", talk(client(b"PROXY " + b"x" * 100)), FlowClass.UNKNOWN, None, Flag(0)),
    ("no proxy at all", talk(client(b"PROXY " + b"x" * 101)), FlowClass.PLAINTEXT, None, Flag(0)),
    ("greeting", talk(server(b"220")), FlowClass.SERVER_FIRST, None, Flag(0)),
    (
        "greeting, ssh",
        talk(server(b"SSH-2.0-x\r\n"), client(b"SSH-2.0-y\r\n")),
        FlowClass.SERVER_FIRST,
        Hint.SSH,
        Flag(0),
    ),
    ("greeting, tls", talk(server(b"220"), client(TLS)), FlowClass.STARTTLS, None, Flag(0)),
    (
        "smtp",
        talk(server(b"220"), client(b"STARTTLS\r\n"), server(b"220"), client(TLS)),
        FlowClass.STARTTLS,
        None,
        Flag(0),
    ),
    (
        "postgres",
        talk(client(POSTGRES_SSL), server(b"S"), client(TLS)),
        FlowClass.STARTTLS,
        Hint.POSTGRES,
        Flag(0),
    ),
    (
        "postgres, no",
        talk(client(POSTGRES_SSL), server(b"N"), client(b"\0\0\0\x09\0\3\0\0u")),
        FlowClass.PLAINTEXT,
        Hint.POSTGRES,
        Flag(0),
    ),
    (
        "tls without a turn",
        talk(client(POSTGRES_SSL), client(TLS)),
        FlowClass.PLAINTEXT,
        Hint.POSTGRES,
        Flag(0),
    ),
    (
        "turn missed",
        talk(client(b"a"), server(b"b"), client(b"c"), client(TLS)),
        FlowClass.PLAINTEXT,
        None,
        Flag(0),
    ),
    (
        "next turn",
        talk(client(b"a"), server(b"b"), client(b"c"), server(b"d"), client(TLS)),
        FlowClass.STARTTLS,
        None,
        Flag(0),
    ),
    (
        "mysql",
        talk(server(b"greeting"), client(MYSQL + TLS)),
        FlowClass.STARTTLS,
        Hint.MYSQL,
        Flag(0),
    ),
    (
        "mysql by the server's turn",
        talk(server(b"greeting"), client(MYSQL), client(TLS)),
        FlowClass.STARTTLS,
        Hint.MYSQL,
        Flag(0),
    ),
    (
        "bytes missed",
        [*talk(), Segment(True, 5, HTTP), Segment(False, 0, b"", ACK, 9)],
        FlowClass.UNKNOWN,
        None,
        Flag(0),
    ),
    ("no SYN", [Segment(True, 0, MESH)], FlowClass.UNKNOWN, None, Flag(0)),
    ("silent", talk(), FlowClass.EMPTY, None, Flag(0)),
    (
        "closed early",
        [*talk(client(MESH[:4])), Segment(True, 4, b"", FIN | ACK)],
        FlowClass.PLAINTEXT,
        None,
        Flag(0),
    ),
    (
        "closed in a hello",
        [*talk(client(MESH[:60])), Segment(True, 60, b"", FIN | ACK)],
        FlowClass.TLS,
        None,
        Flag(0),
    ),
    (
        "reset with a hole",
        [*talk(), Segment(True, 3, MESH[3:60]), Segment(False, 0, b"", RST)],
        FlowClass.UNKNOWN,
        None,
        Flag(0),
    ),
    (
        "h2c",
        talk(client(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")),
        FlowClass.PLAINTEXT,
        Hint.H2C,
        Flag(0),
    ),
    ("redis", talk(client(b"*1\r\n$4\r\nPING\r\n")), FlowClass.PLAINTEXT, Hint.REDIS, Flag(0)),
    (
        "kafka",
        talk(client(struct.pack("!IHHIh", 11, 18, 3, 7, -1))),
        FlowClass.PLAINTEXT,
        Hint.KAFKA,
        Flag(0),
    ),
    ("amqp", talk(client(b"AMQP\0\0\x09\1")), FlowClass.PLAINTEXT, Hint.AMQP, Flag(0)),
    (
        "mongodb",
        talk(client(struct.pack("<iiiiI", 30, 1, 0, 2013, 0))),
        FlowClass.PLAINTEXT,
        Hint.MONGODB,
        Flag(0),
    ),
    (
        "cassandra",
        talk(client(b"\4\0\0\0\5\0\0\0\0")),
        FlowClass.PLAINTEXT,
        Hint.CASSANDRA,
        Flag(0),
    ),
]


@pytest.mark.parametrize(
    ("segments", "flow_class", "hint", "flags"),
    [each[1:] for each in CASES],
    ids=[each[0] for each in CASES],
)
def test_a_conversation_is_what_the_rules_say(
    segments: list[Segment], flow_class: FlowClass, hint: Hint | None, flags: Flag
) -> None:
    connection = heard(segments)
    found = connection.flags & ~(Flag.SYN_SEEN | Flag.CLOSED)
    assert (connection.flow_class, connection.hint, found) == (flow_class, hint, flags)


@pytest.mark.parametrize(
    "data", [MESH, TLS, as_records(MESH[5:], [9]), HTTP, SSLV2, V1 + MESH, V2 + HTTP]
)
def test_it_makes_no_difference_where_segments_end_and_in_which_order_they_come(
    data: bytes,
) -> None:
    whole = heard(talk(client(data)))
    single = [Segment(True, at, data[at : at + 1]) for at in range(len(data))]
    for pieces in (single, single[::-1]):
        parts = heard([*talk(), *pieces])
        assert (parts.flow_class, parts.hint, parts.flags, parts.bytes_to_server) == (
            whole.flow_class,
            whole.hint,
            whole.flags,
            len(data),
        )


def test_of_overlapping_bytes_the_first_stay() -> None:
    segments = [*talk(), Segment(True, 5, HTTP[5:]), Segment(True, 0, HTTP[:5] + b"x" * 20)]
    connection = heard(segments)
    assert (connection.hint, connection.must_tell_overlap) == (Hint.HTTP1, True)


def test_bytes_too_far_ahead_are_not_kept() -> None:
    far = b"\x16\3\1" + bytes(6000)
    connection = heard([*talk(), Segment(True, 4096, far[4096:]), Segment(True, 0, MESH[:100])])
    assert connection.flow_class is FlowClass.UNKNOWN
    connection.feed(Segment(False, 0, b"", ACK, len(far)))
    connection.feed(Segment(True, 100, MESH[100:]))
    assert connection.flow_class is FlowClass.UNKNOWN


def test_a_proxy_port_makes_every_tls_hello_the_mesh_s() -> None:
    assert heard(talk(client(TLS[:11])), Profile(proxy_ports=(PORT,))).flow_class is FlowClass.MESH


def test_a_label_of_a_star_is_any_one_label() -> None:
    names = {
        "a.internal.x.consul": FlowClass.MESH,
        "a.internal.x.y.consul": FlowClass.TLS,
        "a.internal.consul": FlowClass.TLS,
        "internal.x.consul": FlowClass.TLS,
    }
    assert {name: heard(talk(client(hello(name)))).flow_class for name in names} == names


def test_a_stream_is_the_same_each_time() -> None:
    assert [streams.make(7, number) for number in range(50)] == [
        streams.make(7, number) for number in range(50)
    ]


@pytest.mark.parametrize("kind", streams.KINDS)
def test_streams_of_every_kind_come_to_more_than_one_end(kind: str) -> None:
    ends = set()
    for number in range(150):
        connection = Connection(streams.PROFILE, streams.SERVER_PORT)
        for segment in streams.make(1, number, (kind,)).segments:
            connection.feed(segment)
        ends.add(connection.flow_class)
    assert ends >= EXPECTED[kind]


EXPECTED = {
    "tls": {FlowClass.MESH, FlowClass.TLS, FlowClass.UNKNOWN},
    "broken-tls": {FlowClass.MESH, FlowClass.TLS, FlowClass.PLAINTEXT, FlowClass.UNKNOWN},
    "huge-tls": {FlowClass.MESH, FlowClass.TLS, FlowClass.UNKNOWN},
    "sslv2": {FlowClass.TLS, FlowClass.PLAINTEXT},
    "plaintext": {FlowClass.PLAINTEXT},
    "noise": {FlowClass.PLAINTEXT, FlowClass.UNKNOWN},
    "server-first": {FlowClass.SERVER_FIRST, FlowClass.STARTTLS},
    "mysql": {FlowClass.SERVER_FIRST, FlowClass.STARTTLS},
    "upgrade": {FlowClass.PLAINTEXT, FlowClass.SERVER_FIRST, FlowClass.STARTTLS},
    "proxy": {FlowClass.MESH, FlowClass.TLS, FlowClass.PLAINTEXT, FlowClass.STARTTLS},
    "silent": {FlowClass.EMPTY},
}
