"""Conversations and the packets that carry them, made from a seed and a number: the same ones every time.

A conversation is what the two ends say to each other in turns. Its segments are cut at random, come in another
order, twice, with other bytes where they overlap, or not at all (then the server acknowledges what was not seen).
"""

import functools
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from packets import as_records, hello, with_extension

from .reference import ACK, FIN, RST, SYN, Profile, Segment

SERVER_PORT = 8443
PROXY_PORT = 20000
PROFILE = Profile(
    sni_suffixes=(b".internal.fuzz.consul", b".internal.*.any"),
    alpn=(b"mesh-alpn", b"istio"),
    proxy_ports=(PROXY_PORT,),
)
MESH_NAME = "api.default.dc1.internal.fuzz.consul"

Turns = list[tuple[bool, bytes]]
"""Who says what, in order; True is the client."""
Dice = random.Random


@dataclass(frozen=True)
class Stream:
    """One connection as the classifier will see it."""

    segments: tuple[Segment, ...]
    outbound: bool
    version: int
    """Of IP: 4 or 6."""
    client_isn: int
    server_isn: int
    server_port: int = SERVER_PORT
    kind: str = ""


# ClientHellos.


@functools.cache
def _hellos() -> tuple[bytes, ...]:
    """OpenSSL's, with nothing in them that is another one each time."""
    made = (
        hello(MESH_NAME),
        hello("pay.example.org", ["h2", "http/1.1"]),
        hello(None, ["istio"]),
        hello(None, ["mesh-alpn2", "h2"]),
        hello(),
        hello(MESH_NAME.upper()),
        hello(MESH_NAME + ".org"),
    )
    return tuple(_without_chance(each) for each in made)


def _without_chance(record: bytes) -> bytes:
    """With fixed bytes for the random, the session id and the key share."""
    fixed = Dice(0)
    random_at, share = 11, b"\0\x33\0\x26\0\x24\0\x1d\0\x20"
    record = record[:random_at] + fixed.randbytes(32) + b"\x20" + fixed.randbytes(32) + record[76:]
    at = record.index(share) + len(share)
    return record[:at] + fixed.randbytes(32) + record[at + 32 :]


def _sized(size: int, body: bytes) -> bytes:
    return len(body).to_bytes(size, "big") + body


def _grease(dice: Dice) -> int:
    return dice.randrange(16) * 0x1010 + 0x0A0A


_NAMES = (
    b"a.example",
    b"b.internal.fuzz.consul.example",
    b"x-internal.fuzz.consul",
    b"a.internal.x.any",
    b"a.internal.x.y.any",
    b"a.internal..any",
    b".internal.x.any",
    b"a.internal.any",
)


def _name(dice: Dice) -> bytes:
    kind = dice.randrange(8)
    if kind == 0:
        return MESH_NAME.encode()
    if kind == 1:
        return b"a." * dice.randrange(1, 118) + PROFILE.sni_suffixes[0][1:]
    if kind == 2:
        return b"x" * dice.choice((1, 63, 254, 255, 256, 300))
    if kind == 3:
        return PROFILE.sni_suffixes[0]
    if kind == 4:
        return dice.randbytes(dice.randrange(1, 40))
    return dice.choice(_NAMES)


def _protocols(dice: Dice) -> bytes:
    names = (
        b"h2",
        b"http/1.1",
        b"istio",
        b"mesh-alpn",
        b"mesh-alp",
        struct.pack("!H", _grease(dice)),
    )
    return b"".join(_sized(1, dice.choice(names)) for _ in range(dice.randrange(1, 5)))


def _extension(dice: Dice) -> bytes:
    kind = dice.randrange(12)
    if kind < 3:
        body = 0, _sized(2, b"\0" + _sized(2, _name(dice)))
    elif kind < 5:
        body = 16, _sized(2, _protocols(dice))
    elif kind == 5:
        share = _sized(2, bytes(dice.choice((32, 1184, 1216, 1568))))
        body = 51, _sized(2, b"\x11\xec" + share)
    elif kind == 6:
        ech = b"\0\0\1\0\1" + dice.randbytes(1) + _sized(2, dice.randbytes(32))
        body = 0xFE0D, ech + _sized(2, dice.randbytes(dice.randrange(32, 300)))
    elif kind == 7:
        body = _grease(dice), b""
    elif kind == 8:
        body = 43, _sized(1, struct.pack("!HHH", _grease(dice), 0x0304, 0x0303))
    elif kind == 9:
        body = 21, bytes(dice.randrange(400))
    else:
        body = dice.choice((5, 10, 11, 13, 23, 35)), dice.randbytes(dice.randrange(12))
    return struct.pack("!H", body[0]) + _sized(2, body[1])


def _message(dice: Dice, *, repeats: bool = False) -> bytes:
    suites = dice.randbytes(2 * dice.randrange(1, 40))
    body = b"\x03\x03" + dice.randbytes(32) + _sized(1, dice.randbytes(dice.choice((0, 32))))
    body += _sized(2, suites) + b"\x01\0"
    if dice.random() < 0.95:
        extensions = [_extension(dice) for _ in range(dice.randrange(9))]
        if not repeats:
            extensions = list({each[:2]: each for each in extensions}.values())
        body += _sized(2, b"".join(extensions))
    return b"\x01" + _sized(3, body)


def client_hello(dice: Dice, *, repeats: bool = False) -> bytes:
    """A good one; with repeats, extensions may come twice."""
    if dice.random() < 0.4:
        message = dice.choice(_hellos())[5:]
        if dice.random() < 0.2:
            padding = bytes(dice.choice((1200, 1700, 3000)))
            message = with_extension(b"\x16\3\1\0\0" + message, 0xFE00, padding)[5:]
    else:
        message = _message(dice, repeats=repeats)
    kind = dice.randrange(4)
    if kind == 0:
        sizes = [dice.randrange(1, 20) for _ in range(dice.randrange(1, 6))] + [
            dice.randrange(30, 400)
        ]
    elif kind == 1:
        sizes = [dice.randrange(40, 900)]
    else:
        sizes = [1 << 14]
    records = as_records(message, sizes)
    if dice.random() < 0.2:
        records = records[:2] + bytes([dice.randrange(5)]) + records[3:]
    return records


def huge_hello(dice: Dice) -> bytes:
    """Longer than what is kept of a stream."""
    message = with_extension(
        b"\x16\3\1\0\0" + _message(dice), 0x4242, bytes(dice.randrange(4000, 40000))
    )
    return as_records(b"".join(_contents(message)), [dice.randrange(2000, 1 << 14)])


def _contents(records: bytes) -> list[bytes]:
    parts = []
    while records:
        length = int.from_bytes(records[3:5], "big")
        parts.append(records[5 : 5 + length])
        records = records[5 + length :]
    return parts


def sslv2_hello(dice: Dice) -> bytes:
    suites, session = 3 * dice.randrange(1, 12), dice.choice((0, 0, 16))
    challenge = dice.choice((16, 17, 24, 32))
    version = dice.choice((2, 0x300, 0x301, 0x303, 0x304))
    body = b"\1" + struct.pack("!HHHH", version, suites, session, challenge)
    body += dice.randbytes(suites + session + challenge)
    return struct.pack("!H", 0x8000 | len(body)) + body


def mutated(dice: Dice, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = min(int(dice.expovariate(0.04)), len(changed) - 1)
        if dice.random() < 0.2:
            at = dice.randrange(len(changed))
        kind = dice.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at] = dice.choice(
                (0, 1, 2, 3, 0x7F, 0x80, 0xFF, changed[at] + 1 & 255, changed[at] - 1 & 255)
            )
        elif kind == 2:
            del changed[at + 1 :]
        else:
            changed[at:at] = dice.randbytes(dice.randrange(1, 4))
    return bytes(changed)


# What is said in plaintext. Each is the client's first message.


def _http1(dice: Dice) -> bytes:
    method = dice.choice((b"GET", b"HEAD", b"POST", b"PATCH", b"OPTIONS", b"BREW", b"get"))
    path = b"/" + b"p" * dice.choice((0, 5, 100, 990, 1003, 1004, 1005, 1100))
    version = dice.choice((b" HTTP/1.1", b" HTTP/1.0", b" HTTP/1.1", b" HTTP/2.0", b""))
    return method + b" " + path + version + dice.choice((b"\r\n", b"\n")) + b"Host: a\r\n\r\n"


def _h2c(dice: Dice) -> bytes:
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)


def _postgres_startup(dice: Dice) -> bytes:
    body = b"user\0" + b"u" * dice.choice((3, 200)) + b"\0database\0d\0\0"
    return _sized_with_itself(struct.pack("!HH", 3, dice.randrange(3)) + body)


def _sized_with_itself(body: bytes) -> bytes:
    return struct.pack("!I", 4 + len(body)) + body


def _postgres(dice: Dice) -> bytes:
    kind = dice.randrange(4)
    if kind == 0:
        return struct.pack("!II", 8, dice.choice((80877103, 80877104, 80877105)))
    if kind == 1:
        return struct.pack("!IIII", 16, 80877102, 1234, dice.randrange(1 << 32))
    return _postgres_startup(dice)


def _redis(dice: Dice) -> bytes:
    return dice.choice(
        (
            b"*1\r\n$4\r\nPING\r\n",
            b"*12345\r\n$4\r\n",
            b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\nb\r\n",
            b"PING\r\n",
        )
    )


def _kafka(dice: Dice) -> bytes:
    client = dice.choice((b"\xff\xff", b"\0\0", b"\0\x03abc", b"\xff\xfe"))
    api, version = dice.choice(((18, 4), (18, 5), (3, 13), (3, 14), (18, 0), (0, 3)))
    return _sized(
        4,
        struct.pack("!HHI", api, version, dice.randrange(1 << 32))
        + client
        + bytes(dice.randrange(30)),
    )


def _ssh(dice: Dice) -> bytes:
    return dice.choice((b"SSH-2.0-OpenSSH_9.2\r\n", b"SSH-1.99-x\r\n", b"SSH-1.5-x\r\n"))


def _amqp(dice: Dice) -> bytes:
    return b"AMQP" + dice.choice(
        (b"\0\0\x09\1", b"\0\1\0\0", b"\3\1\0\0", b"\2\1\0\0", b"\1\1\0\x0a", b"\1\1\0\0")
    )


def _mongodb(dice: Dice) -> bytes:
    if dice.random() < 0.5:
        body = (
            struct.pack(
                "<iiiI", dice.randrange(1 << 20), 0, 2013, dice.choice((0, 1, 2, 0x10000, 4))
            )
            + b"\0"
            + bytes(40)
        )
    else:
        name = dice.choice((b"admin.$cmd\0", b"other.$cmd\0"))
        body = struct.pack("<iiiI", 1, 0, 2004, 0) + name + bytes(30)
    return struct.pack("<i", 4 + len(body)) + body


def _cassandra(dice: Dice) -> bytes:
    head = bytes([dice.choice((3, 4, 5, 6)), dice.choice((0, 0x10, 0x20)), 0, 1])
    if dice.random() < 0.3:
        return head + b"\5\0\0\0\0"
    body = b"\0\1\0\x0bCQL_VERSION\0\x053.0.0"
    return head + b"\1" + _sized(4, body)


def _line(dice: Dice) -> bytes:
    return bytes(dice.choice(b"abcdefgh PRXYO\x16\x80\r\n") for _ in range(dice.randrange(1, 30)))


PLAIN: tuple[Callable[[Dice], bytes], ...] = (
    _http1, _h2c, _postgres, _redis, _kafka, _ssh, _amqp, _mongodb, _cassandra, _line,
)  # fmt: skip


def plain(dice: Dice) -> bytes:
    data = dice.choice(PLAIN)(dice)
    kind = dice.random()
    if kind < 0.15:
        return mutated(dice, data)
    if kind < 0.25:
        return data[: dice.randrange(1, len(data) + 1)]
    return data


def anything(dice: Dice) -> bytes:
    """A first message of any kind that needs no answer."""
    kind = dice.random()
    if kind < 0.4:
        data = client_hello(dice)
    elif kind < 0.5:
        data = sslv2_hello(dice)
    else:
        return plain(dice)
    return mutated(dice, data) if dice.random() < 0.3 else data


# PROXY protocol.


def proxy_header(dice: Dice) -> bytes:
    kind = dice.randrange(6)
    if kind == 0:
        return b"PROXY UNKNOWN\r\n"
    if kind == 1:
        return b"PROXY TCP4 10.0.0.1 10.0.0.2 4711 443\r\n"
    if kind == 2:
        return b"PROXY " + b"x" * dice.choice((90, 98, 99, 100, 101)) + b"\r\n"
    signature = b"\r\n\r\n\0\r\nQUIT\n" + bytes([dice.choice((0x20, 0x21, 0x21, 0x22))])
    family = bytes([dice.choice((0x00, 0x11, 0x21, 0x12, 0x13))])
    length = dice.choice((0, 12, 36, 216, 600, 4081))
    return signature + family + _sized(2, bytes(dice.randrange(1, 256) for _ in range(length)))


# Conversations.


def _reply(dice: Dice) -> bytes:
    return dice.randbytes(dice.randrange(1, 60))


def _tls_conversation(dice: Dice) -> Turns:
    return [(True, client_hello(dice)), (False, _reply(dice)), (True, dice.randbytes(80))]


def _broken_tls(dice: Dice) -> Turns:
    data = client_hello(dice, repeats=True)
    return [(True, mutated(dice, data) if dice.random() < 0.8 else data), (False, _reply(dice))]


def _huge_tls(dice: Dice) -> Turns:
    return [(True, huge_hello(dice)), (False, _reply(dice))]


def _sslv2(dice: Dice) -> Turns:
    data = sslv2_hello(dice)
    return [(True, mutated(dice, data) if dice.random() < 0.5 else data), (False, _reply(dice))]


def _plaintext(dice: Dice) -> Turns:
    turns = [(True, plain(dice))]
    for _ in range(dice.randrange(4)):
        turns += [(False, _reply(dice)), (True, dice.choice((plain, _line))(dice))]
    return turns


def _noise(dice: Dice) -> Turns:
    first = bytes([dice.choice((0x16, 0x80, 0x0D, 0x50, dice.randrange(256)))])
    return [(True, first + dice.randbytes(dice.randrange(50))), (False, _reply(dice))]


def _server_first(dice: Dice) -> Turns:
    return [
        (False, _reply(dice)),
        (True, anything(dice)),
        (False, _reply(dice)),
        (True, _line(dice)),
    ]


_MYSQL_GREETING = _sized(1, bytes(70)) + b"\0\0"


def _mysql(dice: Dice) -> Turns:
    capabilities = dice.choice((0x0A00, 0x0200, 0x0800, 0x0FFF))
    login = struct.pack("<IIB", capabilities, 1 << 24, 45) + bytes(23)
    if dice.random() < 0.6:
        request = b"\x20\0\0\1" + login
        rest = dice.choice((client_hello, _line))(dice)
        if dice.random() < 0.5:
            return [(False, _MYSQL_GREETING), (True, request + rest), (False, _reply(dice))]
        return [(False, _MYSQL_GREETING), (True, request), (True, rest), (False, _reply(dice))]
    login += b"user\0" + bytes(20)
    return [(False, _MYSQL_GREETING), (True, len(login).to_bytes(3, "little") + b"\1" + login)]


_POSTGRES_SSL = struct.pack("!II", 8, 80877103)
_POSTGRES_GSS = struct.pack("!II", 8, 80877104)
_LDAP_EXTENDED = b"\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037"
_LDAP_DONE = b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\0\x04\0\x04\0"

# What is said before TLS begins. In turns, by whom is told by the first: the server, or the client.
_SERVER_BEGINS: tuple[tuple[bytes, ...], ...] = (
    (b"220 mail\r\n", b"EHLO a\r\n", b"250 STARTTLS\r\n", b"STARTTLS\r\n", b"220 go\r\n"),
    (b"* OK\r\n", b"a STARTTLS\r\n", b"a OK\r\n"),
    (b"+OK\r\n", b"STLS\r\n", b"+OK\r\n"),
    (b"220 ftp\r\n", b"AUTH TLS\r\n", b"234 go\r\n"),
)
_CLIENT_BEGINS: tuple[tuple[bytes, ...], ...] = (
    (_LDAP_EXTENDED, _LDAP_DONE),
    (b"<stream:stream to='a'>", b"<features/>", b"<starttls/>", b"<proceed/>"),
    (_POSTGRES_SSL, b"S"),
    (_POSTGRES_GSS, b"N", _POSTGRES_SSL, b"S"),
    (b"CONNECT a:443 HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
)
_UPGRADES: tuple[Turns, ...] = tuple(
    [((number % 2 == 0) == client_begins, said) for number, said in enumerate(dialogue)]
    for dialogues, client_begins in ((_SERVER_BEGINS, False), (_CLIENT_BEGINS, True))
    for dialogue in dialogues
)


def _upgrade(dice: Dice) -> Turns:
    turns = list(dice.choice(_UPGRADES))
    if dice.random() < 0.2:
        turns[dice.randrange(len(turns)) :] = []
    data = client_hello(dice) if dice.random() < 0.8 else anything(dice)
    if dice.random() < 0.2:
        data = mutated(dice, data)
    turns += [(True, data), (False, _reply(dice))]
    if dice.random() < 0.3:
        turns += [(True, anything(dice)), (False, _reply(dice))]
    return turns


def _proxied(dice: Dice) -> Turns:
    header = proxy_header(dice)
    if dice.random() < 0.25:
        header = mutated(dice, header)
    turns = dice.choice(
        (_tls_conversation, _plaintext, _server_first, _upgrade, _mysql, _sslv2, _noise)
    )(dice)
    if turns[0][0] and dice.random() < 0.5:
        return [(True, header + turns[0][1]), *turns[1:]]
    return [(True, header), *turns]


def _silent(dice: Dice) -> Turns:
    return []


@dataclass(frozen=True)
class Kind:
    """One kind of conversation, and how often it is made."""

    converse: Callable[[Dice], Turns]
    weight: int


KINDS: dict[str, Kind] = {
    "tls": Kind(_tls_conversation, 20),
    "broken-tls": Kind(_broken_tls, 15),
    "huge-tls": Kind(_huge_tls, 1),
    "sslv2": Kind(_sslv2, 5),
    "plaintext": Kind(_plaintext, 15),
    "noise": Kind(_noise, 5),
    "server-first": Kind(_server_first, 8),
    "mysql": Kind(_mysql, 5),
    "upgrade": Kind(_upgrade, 12),
    "proxy": Kind(_proxied, 10),
    "silent": Kind(_silent, 1),
}


# From conversations to segments.


def _sizes(dice: Dice, length: int) -> list[int]:
    kind = dice.randrange(8)
    if kind == 0 and length <= 400:
        return [1]
    if kind == 1:
        return [1] * dice.randrange(1, 30) + [dice.randrange(100, 1400)]
    if kind == 2:
        return [dice.randrange(1, 50) for _ in range(12)] + [dice.randrange(200, 1400)]
    if kind == 3:
        return [dice.randrange(max(20, length // 25), 1401)] if length < 35000 else [1400]
    return [dice.choice((1400, 2800, 3000))]


def _cut(dice: Dice, start: int, data: bytes) -> list[Segment]:
    sizes, segments, at, number = _sizes(dice, len(data)), [], 0, 0
    while at < len(data):
        size = sizes[min(number, len(sizes) - 1)]
        segments.append(Segment(True, start + at, data[at : at + size]))
        at, number = at + size, number + 1
    return segments


def _disturb(dice: Dice, start: int, data: bytes, segments: list[Segment]) -> list[Segment]:
    """What a network does to a message of the client."""
    segments = list(segments)
    if dice.random() < 0.25:
        # Retransmissions, cut in another way.
        for _ in range(dice.randrange(1, 4)):
            at = dice.randrange(len(data))
            again = Segment(True, start + at, data[at : at + dice.randrange(1, 300)])
            segments.insert(dice.randrange(len(segments) + 1), again)
    if dice.random() < 0.15:
        # Somebody sends other bytes for the same positions.
        for _ in range(dice.randrange(1, 3)):
            at = dice.randrange(len(data))
            length = min(dice.randrange(1, 100), len(data) - at)
            forged = Segment(True, start + at, dice.randbytes(length))
            segments.insert(dice.randrange(len(segments) + 1), forged)
    if dice.random() < 0.25:
        reach = dice.choice((2, 4, 1000))
        order = sorted(range(len(segments)), key=lambda number: number + dice.random() * reach)
        segments = [segments[number] for number in order]
    if dice.random() < 0.08:
        for _ in range(dice.randrange(1, 3)):
            if segments:
                del segments[dice.randrange(len(segments))]
    return segments


def _segments(dice: Dice, turns: Turns) -> list[Segment]:
    said = {True: 0, False: 0}
    segments: list[Segment] = []
    fast_open = 0
    if turns and turns[0][0] and dice.random() < 0.05:
        fast_open = dice.randrange(1, len(turns[0][1]) + 1)
        data = turns[0][1][: min(fast_open, 1300)]
        fast_open = len(data)
        segments.append(Segment(True, 0, data, SYN))
        taken = fast_open if dice.random() < 0.5 else 0
        segments.append(Segment(False, 0, b"", SYN | ACK, taken))
        if taken:
            turns = [(True, turns[0][1][taken:]), *turns[1:]]
            said[True] = taken
    else:
        segments.append(Segment(True, 0, b"", SYN))
        segments.append(Segment(False, 0, b"", SYN | ACK))
        if dice.random() < 0.1:
            segments.insert(dice.randrange(1, 3), Segment(True, 0, b"", SYN))
    segments.append(Segment(True, 0, b""))
    if dice.random() < 0.03:
        # A keep-alive probe: a byte that was there already (RFC 1122 4.2.3.6).
        segments.append(Segment(True, -1, b"\0"))
    if dice.random() < 0.02:
        # Bytes of a stream that another SYN began.
        length = dice.randrange(1, 30)
        segments.append(Segment(True, -length - dice.choice((0, 1, 100_000)), bytes(length)))
    for from_client, data in turns:
        if not data:
            continue
        start = said[from_client]
        said[from_client] += len(data)
        if from_client:
            pieces = _disturb(dice, start, data, _cut(dice, start, data))
            if len(pieces) > 1 and dice.random() < 0.1:
                # The server does not wait for the end of it.
                word = _reply(dice)
                at = dice.randrange(1, len(pieces))
                pieces.insert(at, Segment(False, said[False], word, ACK, start))
                said[False] += len(word)
            segments += pieces
            if dice.random() < 0.2:
                segments.append(Segment(False, said[False], b"", ACK, said[True]))
        else:
            size = dice.choice((1, 7, 1400))
            pieces = [
                Segment(False, start + at, data[at : at + size], ACK, said[True])
                for at in range(0, len(data), size)
            ]
            if dice.random() < 0.1:
                dice.shuffle(pieces)
            if dice.random() < 0.1:
                pieces.append(dice.choice(pieces))
            segments += pieces
    return segments


def _end(dice: Dice, segments: list[Segment]) -> list[Segment]:
    """The connection ends, or is cut, or goes on."""
    kind = dice.random()
    if kind < 0.3:
        return segments
    if kind < 0.5:
        segments = segments[: dice.randrange(1, len(segments) + 1)]
    sent = max((s.position + len(s.payload) for s in segments if s.from_client), default=0)
    got = max((s.position + len(s.payload) for s in segments if not s.from_client), default=0)
    ending = dice.randrange(5)
    if ending == 0:
        return segments
    if ending == 1:
        from_client = dice.random() < 0.5
        remark = dice.choice((b"", b"", b"go away"))
        reset = Segment(from_client, sent if from_client else got, remark, RST)
        # It overtakes what was sent before it.
        at = dice.choice((len(segments), dice.randrange(1, len(segments) + 1)))
        return [*segments[:at], reset, *segments[at:]]
    if ending == 2 and len(segments) > 3:
        # The FIN overtakes what was sent before it.
        at = dice.randrange(3, len(segments) + 1)
        return [*segments[:at], Segment(True, sent, b"", FIN | ACK, got), *segments[at:]]
    last = dice.choice((b"", b"", _line(dice)))
    segments = [*segments, Segment(True, sent, last, FIN | ACK, got)]
    sent += len(last)
    if ending == 3:
        segments.append(Segment(False, got, b"", FIN | ACK, sent + 1))
    return segments


def make(seed: int, number: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Stream:
    """The stream of this number."""
    dice = Dice(seed << 32 | number)
    (kind,) = dice.choices(kinds, [KINDS[name].weight for name in kinds])
    turns = KINDS[kind].converse(dice)
    segments = _end(dice, _segments(dice, turns))
    if dice.random() < 0.02:
        del segments[: min(3, len(segments) - 1)]
    edge = (0xFFFFFFFF, 0xFFFFFF00, 0x7FFFFFF0, 0, dice.randrange(1 << 32))
    return Stream(
        segments=tuple(segments),
        outbound=dice.random() < 0.5,
        version=dice.choice((4, 6)),
        client_isn=dice.choice(edge),
        server_isn=dice.choice(edge),
        server_port=PROXY_PORT if dice.random() < 0.05 else SERVER_PORT,
        kind=kind,
    )
