"""What two ends say in, class, hint and flags out: upgrades, PROXY headers, hellos of every form and length."""

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from classifying import Bench, bpffs
from dialogues import (
    CONNECT,
    FTP,
    IMAP,
    LDAP,
    MYSQL_CAPABILITIES,
    MYSQL_CLIENT_SSL,
    MYSQL_GREETING,
    MYSQL_PLAIN,
    MYSQL_SSL_REQUEST,
    POP3,
    POSTGRES_GSS,
    POSTGRES_SSL,
    POSTGRES_START,
    SMTP,
    SMTP_EHLO,
    SMTP_FEATURES,
    SMTP_GREETING,
    WAYS,
    XMPP,
    Way,
    Word,
    client,
    mysql_login,
    proxy_binary,
    proxy_text,
    server,
    sslv2_hello,
)
from packets import ACK, FIN, IPV4, IPV6, RST, Packet, Talk, as_records, hello, with_extension

from tidegate.model import Direction, FlowClass, Hint
from tidegate.observe.abi import FlowFlag
from tidegate.observe.classifier import Classifier, FlowRecord, MeshProfile

MESH_SNI = "api.default.dc1.internal.0a1b.consul"
PROXY_PORT = 20000
PROFILE = MeshProfile(
    name="test",
    sni_suffixes=("internal.0a1b.consul", "internal-v1.*.consul"),
    alpn=("mesh-alpn", "m" * 128),
    proxy_ports=(PROXY_PORT, 20001),
)
MESH = hello(MESH_SNI)
TLS = hello("pay.example.org", ["h2", "http/1.1"])
BARE = hello()
HTTP = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
PRESENT = FlowFlag.PROXY | FlowFlag.SSLV2 | FlowFlag.OVERLAP

SNI, ALPN = 0, 16


def server_names(*names: bytes) -> bytes:
    entries = b"".join(struct.pack("!BH", 0, len(name)) + name for name in names)
    return struct.pack("!H", len(entries)) + entries


def protocols(*names: bytes) -> bytes:
    entries = b"".join(bytes([len(name)]) + name for name in names)
    return struct.pack("!H", len(entries)) + entries


def long_name(length: int) -> bytes:
    """A name of the mesh's of so many bytes."""
    suffix = b".internal.0a1b.consul"
    labels = (b"a" * 63 + b".") * 4
    return labels[-(length - len(suffix)) :] + suffix


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Path]]:
    with bpffs(tmp_path_factory.mktemp("classifier") / "bpf") as pins:
        classifier = Classifier.open(pins)
        try:
            classifier.set_profile(PROFILE)
            yield Bench(classifier), pins
        finally:
            classifier.remove()


@pytest.fixture
def bench(opened: tuple[Bench, Path]) -> Bench:
    opened[0].evict_flows()
    opened[0].begin()
    return opened[0]


def talk_of(version: int, port: int = 8443) -> Talk:
    ours, theirs = IPV4 if version == 4 else IPV6
    return Talk(client=(ours, 40000), server=(theirs, port))


def outcome(bench: Bench) -> FlowRecord:
    """The only flow, of which the edges know the same."""
    (flow,) = bench.flows()
    assert bench.classes() == {flow.flow_class: 1}
    return flow


def play(bench: Bench, talk: Talk, packets: list[Packet]) -> FlowRecord:
    """Every payload byte is counted once, on the edge of the class."""
    bench.play(packets, Direction.OUTBOUND)
    return outcome(bench)


Case = tuple[str, Sequence[Word], FlowClass, Hint | None]

PLAIN, FIRST, UP = FlowClass.PLAINTEXT, FlowClass.SERVER_FIRST, FlowClass.STARTTLS
LIE = b"\x16 is no ClientHello\r\n"
UPGRADES: list[Case] = [
    ("postgres, TLS accepted", [POSTGRES_SSL, server(b"S"), client(TLS)], UP, Hint.POSTGRES),
    (
        "postgres, TLS refused",
        [POSTGRES_SSL, server(b"N"), POSTGRES_START, server(b"R\0\0\0\x08\0\0\0\0")],
        PLAIN,
        Hint.POSTGRES,
    ),
    (
        "postgres, GSS refused, TLS accepted",
        [POSTGRES_GSS, server(b"N"), POSTGRES_SSL, server(b"S"), client(TLS)],
        UP,
        Hint.POSTGRES,
    ),
    (
        "mysql with TLS",
        [MYSQL_GREETING, client(MYSQL_SSL_REQUEST), client(TLS)],
        UP,
        Hint.MYSQL,
    ),
    (
        "mysql with TLS in the segment of the request",
        [MYSQL_GREETING, client(MYSQL_SSL_REQUEST + TLS)],
        UP,
        Hint.MYSQL,
    ),
    (
        "mysql behind a PROXY header",
        [MYSQL_GREETING, client(proxy_text() + MYSQL_SSL_REQUEST + TLS)],
        UP,
        Hint.MYSQL,
    ),
    ("mysql without TLS", [MYSQL_GREETING, client(MYSQL_PLAIN)], FIRST, Hint.MYSQL),
    (
        "mysql, TLS not asked for, a hello all the same",
        [MYSQL_GREETING, client(mysql_login(MYSQL_CAPABILITIES) + TLS)],
        FIRST,
        Hint.MYSQL,
    ),
    (
        "mysql, TLS asked for with the wrong sequence",
        [
            MYSQL_GREETING,
            client(mysql_login(MYSQL_CAPABILITIES | MYSQL_CLIENT_SSL, sequence=2) + TLS),
        ],
        FIRST,
        None,
    ),
    (
        "mysql's request to a server that has said nothing",
        [client(MYSQL_SSL_REQUEST + TLS)],
        PLAIN,
        None,
    ),
    ("smtp", [*SMTP, client(TLS)], UP, None),
    ("smtp, a hello that would be the mesh's", [*SMTP, client(MESH)], UP, None),
    ("smtp without TLS", [SMTP_GREETING, SMTP_EHLO, SMTP_FEATURES], FIRST, None),
    ("smtp, announced and not done", [*SMTP, client(b"QUIT\r\n")], FIRST, None),
    ("imap", [*IMAP, client(TLS)], UP, None),
    ("pop3", [*POP3, client(TLS)], UP, None),
    ("ftp", [*FTP, client(TLS)], UP, None),
    ("ldap", [*LDAP, client(TLS)], UP, None),
    ("xmpp", [*XMPP, client(TLS)], UP, None),
    ("http connect", [*CONNECT, client(TLS)], UP, Hint.HTTP1),
    ("http connect, plaintext through it", [*CONNECT, client(HTTP)], PLAIN, Hint.HTTP1),
    (
        "after many turns",
        [SMTP_GREETING, *[client(b"NOOP\r\n"), server(b"250 OK\r\n")] * 60, client(TLS)],
        UP,
        None,
    ),
    ("a lie", [*SMTP, client(LIE)], FIRST, None),
    ("a lie, then the truth", [*SMTP, client(LIE), server(b"500\r\n"), client(TLS)], UP, None),
    ("a hello that is not first in the turn", [*SMTP, client(b"x" + TLS)], FIRST, None),
    (
        "the server speaks before the headers are whole",
        [*SMTP, client(TLS[:8]), server(b"x"), client(TLS[8:])],
        FIRST,
        None,
    ),
    (
        "the server speaks after the headers were whole",
        [*SMTP, client(TLS[:9]), server(b"x"), client(TLS[9:])],
        UP,
        None,
    ),
    ("a hello over records of one byte", [*SMTP, client(as_records(TLS[5:], [1]))], UP, None),
    ("an SSLv2 hello is no upgrade", [*SMTP, client(sslv2_hello())], FIRST, None),
    ("a PROXY header is no upgrade", [*SMTP, client(proxy_text() + TLS)], FIRST, None),
    ("a hello that nobody was asked for", [client(HTTP), client(TLS)], PLAIN, Hint.HTTP1),
]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("words", "expected", "hint"), [case[1:] for case in UPGRADES], ids=[c[0] for c in UPGRADES]
)
def test_an_upgrade_is_found_at_the_beginning_of_a_turn_of_the_client(
    bench: Bench,
    words: Sequence[Word],
    expected: FlowClass,
    hint: Hint | None,
    way: Way,
    version: int,
) -> None:
    talk = talk_of(version)
    flow = play(bench, talk, way.carry(talk, words))
    assert flow.flow_class is expected
    # An upgrade that overtakes what a hint needs ends the search for it.
    assert flow.hint is hint or (flow.hint is None and expected is UP and way is WAYS["shuffled"])
    (edge,) = bench.edges()
    assert edge.count.bytes_to_server == sum(len(w.data) for w in words if w.from_client)
    assert edge.count.bytes_to_client == sum(len(w.data) for w in words if not w.from_client)
    assert bench.counted() == {}


def test_a_hello_of_which_the_server_has_bytes_that_were_not_seen_is_no_upgrade(
    bench: Bench,
) -> None:
    talk = talk_of(4)
    packets = [*talk.opening(), talk.up(0, HTTP), talk.down(0, b"x", len(HTTP))]
    missed = [talk.up(len(HTTP) + 3, TLS[3:]), talk.down(1, b"", len(HTTP) + len(TLS))]
    flow = play(bench, talk, [*packets, *missed, talk.up(len(HTTP), TLS[:3])])
    assert flow.flow_class is PLAIN


def test_an_upgrade_is_found_where_the_sequence_numbers_wrap(bench: Bench) -> None:
    talk = talk_of(4)
    talk.client_isn = 0xFFFFFFFF - len(HTTP) - 3
    words = [client(HTTP), server(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), client(TLS)]
    flow = play(bench, talk, WAYS["reversed"].carry(talk, words))
    assert flow.flow_class is UP


def test_a_plaintext_flow_is_settled_when_its_client_has_nothing_to_come(bench: Bench) -> None:
    talk = talk_of(4)
    said = [*talk.opening(), talk.up(0, HTTP), talk.down(0, b"bye", len(HTTP))]
    assert not play(bench, talk, said).settled
    bench.play([talk.up(len(HTTP), b"", FIN | ACK)], Direction.OUTBOUND)
    assert not outcome(bench).settled
    bench.play([talk.down(3, b"", len(HTTP) + 1)], Direction.OUTBOUND)
    assert outcome(bench).settled


@pytest.mark.parametrize("from_client", [True, False])
def test_a_plaintext_flow_is_settled_by_a_reset(bench: Bench, from_client: bool) -> None:
    talk = talk_of(4)
    end = talk.up(len(HTTP), b"", RST) if from_client else talk.down(0, b"", len(HTTP), RST)
    assert play(bench, talk, [*talk.opening(), talk.up(0, HTTP), end]).settled


PROXY, SSLV2 = FlowFlag.PROXY, FlowFlag.SSLV2
NONE = FlowFlag(0)
BEGINNINGS: list[tuple[str, Sequence[Word], FlowClass, Hint | None, FlowFlag]] = [
    ("PROXY v1, mesh", [client(proxy_text() + MESH)], FlowClass.MESH, None, PROXY),
    ("PROXY v1, tls", [client(proxy_text() + TLS)], FlowClass.TLS, None, PROXY),
    ("PROXY v1, plaintext", [client(proxy_text() + HTTP)], PLAIN, Hint.HTTP1, PROXY),
    ("PROXY v1, UNKNOWN", [client(proxy_text(b"UNKNOWN") + MESH)], FlowClass.MESH, None, PROXY),
    ("PROXY v1, longest", [client(proxy_text(b"x" * 99) + MESH)], FlowClass.MESH, None, PROXY),
    ("PROXY v1, too long", [client(proxy_text(b"x" * 100) + MESH)], PLAIN, None, NONE),
    ("PROXY v1, no line end", [client(b"PROXY " + b"x" * 101 + MESH)], PLAIN, None, NONE),
    ("PROXY v1, bare LF", [client(b"PROXY TCP4\n" + b"x" * 96 + MESH)], PLAIN, None, NONE),
    ("PROXY v1, misspelt", [client(b"PROXYX TCP4\r\n" + MESH)], PLAIN, None, NONE),
    ("PROXY v1 twice", [client(proxy_text() * 2 + MESH)], PLAIN, None, PROXY),
    (
        "PROXY v1, server first",
        [client(proxy_text()), SMTP_GREETING, SMTP_EHLO],
        FIRST,
        None,
        PROXY,
    ),
    (
        "PROXY v1, server first, then TLS at once",
        [client(proxy_text()), SMTP_GREETING, client(TLS)],
        UP,
        None,
        PROXY,
    ),
    (
        "PROXY v1, the server speaks in the middle of the header",
        [client(proxy_text()[:9]), SMTP_GREETING, client(proxy_text()[9:] + b"EHLO x\r\n")],
        FIRST,
        None,
        PROXY,
    ),
    ("PROXY v1, upgrade", [client(proxy_text()), *SMTP, client(TLS)], UP, None, PROXY),
    ("POST is no PROXY", [client(b"POST / HTTP/1.0\r\n")], PLAIN, Hint.HTTP1, NONE),
    ("PROXY v2, mesh", [client(proxy_binary() + MESH)], FlowClass.MESH, None, PROXY),
    ("PROXY v2, local", [client(proxy_binary(0x20, 0, b"") + TLS)], FlowClass.TLS, None, PROXY),
    (
        "PROXY v2, longest, plaintext",
        [client(proxy_binary(body=b"\x16" * 4080)), client(HTTP)],
        PLAIN,
        Hint.HTTP1,
        PROXY,
    ),
    (
        "PROXY v2, longest, mesh",
        [client(proxy_binary(body=b"\x16" * 4080)), client(MESH)],
        FlowClass.MESH,
        None,
        PROXY,
    ),
    ("PROXY v2, too long", [client(proxy_binary(length=4081) + MESH)], PLAIN, None, NONE),
    ("PROXY v2, version 3", [client(proxy_binary(0x31) + MESH)], PLAIN, None, NONE),
    ("PROXY v2, command 2", [client(proxy_binary(0x22) + MESH)], PLAIN, None, NONE),
    ("PROXY v2, family 4", [client(proxy_binary(0x21, 0x41) + MESH)], PLAIN, None, NONE),
    ("PROXY v2, transport 3", [client(proxy_binary(0x21, 0x13) + MESH)], PLAIN, None, NONE),
    (
        "PROXY v2, shorter than it says",
        [client(proxy_binary(length=20) + MESH)],
        PLAIN,
        None,
        PROXY,
    ),
    ("PROXY v2, signature cut", [client(b"\r\n\r\n\0\r\nQUIT\r" + MESH)], PLAIN, None, NONE),
    ("sslv2 hello", [client(sslv2_hello())], FlowClass.TLS, None, SSLV2),
    ("sslv2 hello of version 2", [client(sslv2_hello(version=2))], FlowClass.TLS, None, SSLV2),
    ("sslv2 hello, session", [client(sslv2_hello(session=16))], FlowClass.TLS, None, SSLV2),
    ("sslv2 hello, challenge", [client(sslv2_hello(challenge=32))], FlowClass.TLS, None, SSLV2),
    (
        "sslv2 hello behind PROXY",
        [client(proxy_text() + sslv2_hello())],
        FlowClass.TLS,
        None,
        SSLV2 | PROXY,
    ),
    ("sslv2, server first", [SMTP_GREETING, client(sslv2_hello())], UP, None, SSLV2),
    ("sslv2, only its header", [client(sslv2_hello()[:11])], FlowClass.TLS, None, SSLV2),
    ("sslv2, other message", [client(sslv2_hello(kind=2))], PLAIN, None, NONE),
    ("sslv2, version 3.5", [client(sslv2_hello(version=0x305))], PLAIN, None, NONE),
    ("sslv2, version 1", [client(sslv2_hello(version=1))], PLAIN, None, NONE),
    ("sslv2, no ciphers", [client(sslv2_hello(ciphers=0))], PLAIN, None, NONE),
    ("sslv2, ciphers of 7 bytes", [client(sslv2_hello(ciphers=7, length=32))], PLAIN, None, NONE),
    ("sslv2, session of 8 bytes", [client(sslv2_hello(session=8))], PLAIN, None, NONE),
    ("sslv2, challenge of 15", [client(sslv2_hello(challenge=15))], PLAIN, None, NONE),
    ("sslv2, challenge of 33", [client(sslv2_hello(challenge=33))], PLAIN, None, NONE),
    ("sslv2, length off by one", [client(sslv2_hello(length=32))], PLAIN, None, NONE),
]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("words", "expected", "hint", "flags"),
    [case[1:] for case in BEGINNINGS],
    ids=[case[0] for case in BEGINNINGS],
)
def test_a_stream_may_begin_with_a_proxy_header_or_an_old_hello(
    bench: Bench,
    words: Sequence[Word],
    expected: FlowClass,
    hint: Hint | None,
    flags: FlowFlag,
    way: Way,
    version: int,
) -> None:
    talk = talk_of(version)
    if len(words[0].data) > 4000:
        way = Way(1400, way.order)
    flow = play(bench, talk, way.carry(talk, words))
    assert (flow.flow_class, flow.hint) == (expected, hint)
    assert flow.flags & PRESENT == flags
    assert bench.counted() == {}


@pytest.mark.parametrize("words", [[client(proxy_text()[:20])], [client(proxy_binary()[:14])]])
def test_a_proxy_header_that_ends_half_way_is_the_clients_own(
    bench: Bench, words: Sequence[Word]
) -> None:
    talk = talk_of(4)
    assert play(bench, talk, WAYS["whole"].carry(talk, words)).flow_class is FlowClass.UNKNOWN
    bench.play([talk.up(len(words[0].data), b"", FIN | ACK)], Direction.OUTBOUND)
    flow = outcome(bench)
    assert (flow.flow_class, flow.flags & PROXY) == (PLAIN, NONE)


def duplicated(record: bytes, kind: int, first: bytes, second: bytes) -> bytes:
    """The first one comes first."""
    return with_extension(with_extension(record, kind, second), kind, first)


OURS, OTHERS = server_names(MESH_SNI.encode()), server_names(b"x.example")
ECH, GREASE = 0xFE0D, 0x0A0A
MALFORMED = {"hello_malformed": 1}
NAMES: list[tuple[str, FlowClass]] = [
    ("api.default.internal-v1.abc.consul", FlowClass.MESH),
    ("api.internal-v1.a.consul", FlowClass.MESH),
    ("api.internal-v1.*.consul", FlowClass.MESH),
    ("API.INTERNAL-V1.ABC.CONSUL", FlowClass.MESH),
    ("internal-v1.abc.consul", FlowClass.TLS),
    (".internal-v1.abc.consul", FlowClass.TLS),
    ("api.internal-v1..consul", FlowClass.TLS),
    ("api.internal-v1.consul", FlowClass.TLS),
    ("api.internal-v1.abc.def.consul", FlowClass.TLS),
    ("api.xinternal-v1.abc.consul", FlowClass.TLS),
    ("abc.consul", FlowClass.TLS),
    ("a.internal.0a1b.consul", FlowClass.MESH),
    ("a.internal.0a1c.consul", FlowClass.TLS),
]
HELLOS: list[tuple[str, bytes, FlowClass, dict[str, int]]] = [
    ("SNI twice, the mesh's second", duplicated(BARE, SNI, OTHERS, OURS), FlowClass.TLS, MALFORMED),
    ("SNI twice, the mesh's first", duplicated(BARE, SNI, OURS, OTHERS), FlowClass.MESH, {}),
    ("SNI twice, the first empty", duplicated(BARE, SNI, b"", OURS), FlowClass.TLS, MALFORMED),
    (
        "ALPN twice, the mesh's second",
        duplicated(BARE, ALPN, protocols(b"h2"), protocols(b"mesh-alpn")),
        FlowClass.TLS,
        MALFORMED,
    ),
    (
        "ALPN twice, the mesh's first",
        duplicated(BARE, ALPN, protocols(b"mesh-alpn"), protocols(b"h2")),
        FlowClass.MESH,
        {},
    ),
    ("ECH in front of the mesh's name", with_extension(MESH, ECH, bytes(300)), FlowClass.MESH, {}),
    ("ECH with another outer name", with_extension(TLS, ECH, bytes(300)), FlowClass.TLS, {}),
    ("GREASE, empty", with_extension(MESH, GREASE, b""), FlowClass.MESH, {}),
    ("GREASE with a byte", with_extension(TLS, GREASE, b"\0"), FlowClass.TLS, {}),
    (
        "a name of 255 bytes",
        with_extension(BARE, SNI, server_names(long_name(255))),
        FlowClass.MESH,
        {},
    ),
    (
        "a name of 256 bytes",
        with_extension(BARE, SNI, server_names(long_name(256))),
        FlowClass.TLS,
        {},
    ),
    (
        "a protocol of 128 bytes",
        with_extension(BARE, ALPN, protocols(b"m" * 128)),
        FlowClass.MESH,
        {},
    ),
    (
        "a protocol of 255 bytes",
        with_extension(BARE, ALPN, protocols(b"m" * 255)),
        FlowClass.TLS,
        {},
    ),
    (
        "the mesh's protocol behind one of 255 bytes",
        with_extension(BARE, ALPN, protocols(b"m" * 255, b"mesh-alpn")),
        FlowClass.MESH,
        {},
    ),
    ("SNI list cut", with_extension(BARE, SNI, OURS[:-1]), FlowClass.TLS, MALFORMED),
    ("SNI list of nothing", with_extension(BARE, SNI, b"\0\0"), FlowClass.TLS, MALFORMED),
    ("SNI with half a length", with_extension(BARE, SNI, b"\0"), FlowClass.TLS, MALFORMED),
    (
        "SNI entry longer than its list",
        with_extension(BARE, SNI, b"\0\x04\0\0\x09x"),
        FlowClass.TLS,
        MALFORMED,
    ),
    (
        "SNI entry of another type",
        with_extension(BARE, SNI, b"\0\x04\x01\0\x01x"),
        FlowClass.TLS,
        {},
    ),
    ("ALPN list cut", with_extension(BARE, ALPN, protocols(b"h2")[:-1]), FlowClass.TLS, MALFORMED),
    (
        "ALPN entry longer than its list",
        with_extension(BARE, ALPN, b"\0\x02\x09x"),
        FlowClass.TLS,
        MALFORMED,
    ),
    (
        "ALPN with an empty name",
        with_extension(BARE, ALPN, b"\0\x03\0\x01x"),
        FlowClass.TLS,
        MALFORMED,
    ),
]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("data", "expected", "counted"), [case[1:] for case in HELLOS], ids=[case[0] for case in HELLOS]
)
def test_a_hello_is_the_meshs_only_where_it_says_so_once(
    bench: Bench, data: bytes, expected: FlowClass, counted: dict[str, int], way: Way, version: int
) -> None:
    talk = talk_of(version)
    flow = play(bench, talk, way.carry(talk, [client(data)]))
    assert (flow.flow_class, flow.settled) == (expected, True)
    assert bench.counted() == counted


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_a_label_of_a_suffix_can_stand_for_any_one_label(
    bench: Bench, name: str, expected: FlowClass
) -> None:
    talk = talk_of(4)
    data = with_extension(BARE, SNI, server_names(name.encode()))
    assert play(bench, talk, WAYS["whole"].carry(talk, [client(data)])).flow_class is expected


@pytest.mark.parametrize(
    ("port", "data", "expected"),
    [
        (PROXY_PORT, TLS, FlowClass.MESH),
        (20001, BARE, FlowClass.MESH),
        (20002, TLS, FlowClass.TLS),
        (PROXY_PORT, HTTP, PLAIN),
        (PROXY_PORT, sslv2_hello(), FlowClass.TLS),
    ],
)
@pytest.mark.parametrize("direction", Direction)
def test_every_hello_to_a_port_of_the_meshs_proxies_is_the_meshs(
    bench: Bench, port: int, data: bytes, expected: FlowClass, direction: Direction
) -> None:
    bench.begin(service_ports=(port,))
    talk = talk_of(4, port)
    bench.play([*talk.opening(), talk.up(0, data)], direction)
    assert outcome(bench).flow_class is expected


def in_pairs(packets: list[Packet]) -> list[Packet]:
    """Each second segment overtakes the one before it."""
    return [each for at in range(0, len(packets), 2) for each in packets[at : at + 2][::-1]]


LONG = Way(1448)
REORDERED = Way(1448, in_pairs)


def long_hello(record: bytes, extra: int, size: int) -> bytes:
    """The hello with so many bytes more in front of its names, in records of a size."""
    rest, message = with_extension(record, 0xFE00, bytes(extra)), b""
    while rest:
        end = 5 + int.from_bytes(rest[3:5], "big")
        message, rest = message + rest[5:end], rest[end:]
    return as_records(message, [size])


@pytest.mark.parametrize("way", [LONG, REORDERED], ids=["in order", "reordered"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (with_extension(MESH, 0xFE00, bytes(5000)), FlowClass.MESH),
        (with_extension(TLS, 0xFE00, bytes(5000)), FlowClass.TLS),
        (long_hello(MESH, 20_000, 16_000), FlowClass.MESH),
        (long_hello(BARE, 20_000, 999), FlowClass.TLS),
        (long_hello(MESH, 60_000, 16_384), FlowClass.MESH),
        (long_hello(MESH, 20_000, 1), FlowClass.MESH),
    ],
    ids=["5 KB mesh", "5 KB tls", "20 KB mesh", "20 KB tls", "60 KB mesh", "20 KB, tiny records"],
)
def test_a_hello_is_followed_to_its_end_however_long_it_is(
    bench: Bench, data: bytes, expected: FlowClass, way: Way
) -> None:
    talk = talk_of(4)
    flow = play(bench, talk, way.carry(talk, [client(data)]))
    assert (flow.flow_class, flow.settled) == (expected, True)
    assert bench.counted() == {}


def test_what_is_too_far_ahead_of_a_hole_is_taken_when_it_comes_again(bench: Bench) -> None:
    talk = talk_of(4)
    data = with_extension(MESH, 0xFE00, bytes(9000))
    segments = talk.segments(data, 1000)
    packets = [*talk.opening(), *segments[1:], segments[0]]
    assert play(bench, talk, packets).flow_class is FlowClass.UNKNOWN
    bench.play(segments, Direction.OUTBOUND)
    assert outcome(bench).flow_class is FlowClass.MESH


KAFKA = struct.pack("!ihhih", 30, 18, 3, 1, 9) + b"rdkafka\0\0" + bytes(11)
MONGODB = struct.pack("<iiiiI", 60, 1, 0, 2013, 0) + b"\0" + bytes(39)
MONGODB_OLD = struct.pack("<iiiiI", 58, 1, 0, 2004, 0) + b"admin.$cmd\0" + bytes(27)
CQL = b"\0\x01\0\x0bCQL_VERSION\0\x053.0.0"
CASSANDRA = b"\x04\0\0\0\x01" + struct.pack("!I", len(CQL)) + CQL


def changed(data: bytes, at: int, *values: int) -> bytes:
    return data[:at] + bytes(values) + data[at + len(values) :]


Answer = tuple[str, bytes, Hint | None]
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
HINTS: list[Answer] = [
    *[(method, f"{method} /x HTTP/1.1\r\nHost: y\r\n".encode(), Hint.HTTP1) for method in METHODS],
    ("http 1.0 without CR", b"GET / HTTP/1.0\n", Hint.HTTP1),
    ("http, line of 1024 bytes", b"GET /" + b"x" * 1008 + b" HTTP/1.1\r\n", Hint.HTTP1),
    ("http, line of 1025 bytes", b"GET /" + b"x" * 1009 + b" HTTP/1.1\r\n" + b"y" * 9, None),
    ("http 1.2", b"GET / HTTP/1.2\r\nx", None),
    ("http 0.9", b"GET /index.html\r\nHTTP/1.1\r\n", None),
    ("http, other method", b"BREW / HTTP/1.1\r\n", None),
    ("http, lower case", b"get / HTTP/1.1\r\n", None),
    ("http, no space", b"GETX / HTTP/1.1\r\n", None),
    ("http, no end of line", b"GET / HTTP/1.1", None),
    ("h2c", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), Hint.H2C),
    ("h2c cut", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", None),
    ("h2c almost", b"PRI * HTTP/2.0\r\n\r\nSN\r\n\r\n", None),
    ("postgres SSLRequest", POSTGRES_SSL.data, Hint.POSTGRES),
    ("postgres GSSENCRequest", POSTGRES_GSS.data, Hint.POSTGRES),
    ("postgres CancelRequest", struct.pack("!IIII", 16, 80877102, 1, 2), Hint.POSTGRES),
    ("postgres startup", POSTGRES_START.data, Hint.POSTGRES),
    ("postgres 3.2", changed(POSTGRES_START.data, 7, 2), Hint.POSTGRES),
    ("postgres 3.3", changed(POSTGRES_START.data, 7, 3), None),
    ("postgres 2.0", changed(POSTGRES_START.data, 5, 2), None),
    ("postgres, SSLRequest of 9", changed(POSTGRES_SSL.data, 3, 9), None),
    ("postgres, longest", struct.pack("!II", 10000, 3 << 16) + b"database\0x\0", Hint.POSTGRES),
    ("postgres, too long", struct.pack("!II", 10001, 3 << 16) + b"database\0x\0", None),
    ("postgres, no name", changed(POSTGRES_START.data, 8, ord("U")), None),
    ("postgres, 8 bytes of startup", POSTGRES_START.data[:8], None),
    ("redis", b"*2\r\n$4\r\nLLEN\r\n$6\r\nmylist\r\n", Hint.REDIS),
    ("redis, most digits", b"*9999\r\n$123456789\r\n", Hint.REDIS),
    ("redis, five digits", b"*10000\r\n$4\r\nLLEN\r\n", None),
    ("redis, ten digits", b"*1\r\n$1234567890\r\n", None),
    ("redis, no digits", b"*\r\n$4\r\nPING\r\n", None),
    ("redis, inline", b"PING\r\n", None),
    ("redis, bare LF", b"*1\n$4\nPING\n", None),
    ("redis, integer", b"*1\r\n:4\r\n", None),
    ("kafka ApiVersions", KAFKA, Hint.KAFKA),
    ("kafka ApiVersions 4", changed(KAFKA, 7, 4), Hint.KAFKA),
    ("kafka ApiVersions 5", changed(KAFKA, 7, 5), None),
    ("kafka Metadata 13", changed(KAFKA, 5, 3, 0, 13), Hint.KAFKA),
    ("kafka Metadata 14", changed(KAFKA, 5, 3, 0, 14), None),
    ("kafka Produce", changed(KAFKA, 5, 0), None),
    ("kafka, no client id", changed(KAFKA, 12, 0xFF, 0xFF), Hint.KAFKA),
    ("kafka, client id of -2", changed(KAFKA, 12, 0xFF, 0xFE), None),
    ("kafka, client id longer than all", changed(KAFKA, 12, 0, 21), None),
    ("kafka, 1 MB", changed(KAFKA, 1, 0x10), None),
    ("kafka, size 10", changed(KAFKA, 3, 10), None),
    ("ssh", b"SSH-2.0-OpenSSH_9.2p1\r\n", Hint.SSH),
    ("ssh 1.99", b"SSH-1.99-x\r\n", Hint.SSH),
    ("ssh 1.5", b"SSH-1.5-x\r\n", None),
    ("amqp 0-9-1", b"AMQP\0\0\x09\x01", Hint.AMQP),
    ("amqp 1.0", b"AMQP\0\x01\0\0", Hint.AMQP),
    ("amqp 1.0, TLS", b"AMQP\x02\x01\0\0", Hint.AMQP),
    ("amqp 1.0, SASL", b"AMQP\x03\x01\0\0", Hint.AMQP),
    ("amqp 0-10", b"AMQP\x01\x01\0\x0a", Hint.AMQP),
    ("amqp 1.1", b"AMQP\0\x01\x01\0", None),
    ("mongodb", MONGODB, Hint.MONGODB),
    ("mongodb, flags", changed(MONGODB, 16, 3, 0, 1), Hint.MONGODB),
    ("mongodb, other flags", changed(MONGODB, 16, 4), None),
    ("mongodb, an answer", changed(MONGODB, 8, 1), None),
    ("mongodb, too short", changed(MONGODB, 0, 20), None),
    ("mongodb, too long", changed(MONGODB, 0, 0x01, 0x6C, 0xDC, 0x02), None),
    ("mongodb, OP_QUERY", MONGODB_OLD, Hint.MONGODB),
    ("mongodb, OP_QUERY elsewhere", changed(MONGODB_OLD, 20, ord("b")), None),
    ("mongodb, length that begins like TLS", changed(MONGODB, 0, 0x16, 3), Hint.MONGODB),
    ("mongodb, length that begins like SSLv2", changed(MONGODB, 0, 0x85), Hint.MONGODB),
    ("cassandra STARTUP", CASSANDRA, Hint.CASSANDRA),
    ("cassandra OPTIONS", b"\x05\0\0\0\x05\0\0\0\0", Hint.CASSANDRA),
    ("cassandra, beta flag", b"\x05\x10\0\0\x05\0\0\0\0", Hint.CASSANDRA),
    ("cassandra, unknown flag", b"\x05\x20\0\0\x05\0\0\0\0" + bytes(20), None),
    ("cassandra 6", changed(CASSANDRA, 0, 6), None),
    ("cassandra, an answer", changed(CASSANDRA, 0, 0x84), None),
    ("cassandra, OPTIONS with a body", b"\x04\0\0\0\x05\0\0\0\x01x" + bytes(20), None),
    ("cassandra, other key first", CASSANDRA.replace(b"CQL_VERSION", b"CQL_VERSIOM"), None),
    ("mysql's login to a silent server", MYSQL_PLAIN, None),
    ("nothing known", b"\x01\x02\x03\x04" * 20, None),
]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("data", "hint"), [case[1:] for case in HINTS], ids=[case[0] for case in HINTS]
)
def test_a_hint_is_given_where_the_first_bytes_leave_no_doubt(
    bench: Bench, data: bytes, hint: Hint | None, way: Way, version: int
) -> None:
    talk = talk_of(version)
    flow = play(bench, talk, way.carry(talk, [client(data)]))
    assert (flow.flow_class, flow.hint) == (PLAIN, hint)
    assert bench.counted() == {}


MYSQL_HINTS: list[Answer] = [
    ("login", MYSQL_PLAIN, Hint.MYSQL),
    ("protocol 3.20", changed(MYSQL_PLAIN, 4, 0, 0), None),
    ("sequence 0", changed(MYSQL_PLAIN, 3, 0), None),
    ("31 bytes", changed(MYSQL_PLAIN, 0, 31), None),
    ("filler", changed(MYSQL_PLAIN, 31, 1), None),
    ("http", HTTP, Hint.HTTP1),
]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("data", "hint"), [case[1:] for case in MYSQL_HINTS], ids=[case[0] for case in MYSQL_HINTS]
)
def test_mysql_is_known_where_the_server_spoke_first(
    bench: Bench, data: bytes, hint: Hint | None, way: Way
) -> None:
    talk = talk_of(4)
    flow = play(bench, talk, way.carry(talk, [MYSQL_GREETING, client(data)]))
    assert (flow.flow_class, flow.hint) == (FIRST, hint)


def test_a_hint_whose_prefix_had_to_make_room_is_lost_and_the_class_stays(bench: Bench) -> None:
    first = talk_of(4)
    bench.play([*first.opening(), first.up(0, HTTP[:10])], Direction.OUTBOUND)
    for port in range(2000, 2000 + 4096):
        talk = Talk(client=(IPV4[0], port), server=(IPV4[1], 8443))
        bench.play([talk.syn(), talk.up(0, MESH[:50])], Direction.OUTBOUND)
    bench.play([first.up(10, HTTP[10:])], Direction.OUTBOUND)
    assert bench.classes() == {PLAIN: 1, FlowClass.UNKNOWN: 4096}
    assert bench.counted() == {"hint_lost": 1}


def test_a_hint_whose_bytes_the_server_has_unseen_is_lost_and_the_class_stays(
    bench: Bench,
) -> None:
    talk = talk_of(4)
    packets = [*talk.opening(), talk.up(0, HTTP[:5]), talk.up(9, HTTP[9:])]
    flow = play(bench, talk, [*packets, talk.down(0, b"", len(HTTP)), talk.up(5, HTTP[5:9])])
    assert (flow.flow_class, flow.hint) == (PLAIN, None)
    assert bench.counted() == {"hint_lost": 1}


@pytest.mark.parametrize(
    ("packets", "expected", "overlap"),
    [
        (lambda t: [t.up(0, MESH[:99]), t.up(9, HTTP), t.up(99, MESH[99:])], FlowClass.MESH, True),
        (lambda t: [t.up(9, HTTP), t.up(9, MESH[9:]), t.up(0, MESH[:9])], FlowClass.TLS, True),
        (lambda t: [t.up(9, MESH[9:]), t.up(0, MESH[:9] + HTTP)], FlowClass.MESH, True),
        (lambda t: [t.up(9, MESH[9:90]), t.up(0, MESH), t.up(0, MESH)], FlowClass.MESH, False),
        (
            lambda t: [t.up(0, b"GET "), t.up(0, b"PUT / HTTP/1.1\r\n")],
            PLAIN,
            True,
        ),
        (
            lambda t: [
                t.up(0, b"HELO\n"), t.down(0, b"ok\n", 5), t.up(5, TLS[:4]),
                t.up(5, b"QUIT"), t.up(9, TLS[4:]),
            ],
            UP,
            True,
        ),
    ],
    ids=["behind", "ahead", "at the front", "the same", "hint", "turn"],
)  # fmt: skip
def test_of_bytes_that_come_twice_and_differ_the_first_stay_and_the_flow_is_flagged(
    bench: Bench, packets: Callable[[Talk], list[Packet]], expected: FlowClass, overlap: bool
) -> None:
    talk = talk_of(4)
    flow = play(bench, talk, [*talk.opening(), *packets(talk)])
    assert flow.flow_class is expected
    assert bool(flow.flags & FlowFlag.OVERLAP) is overlap
