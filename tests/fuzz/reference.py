"""What a connection is, by the rules of docs/verdict.md: a second opinion that shares no code with bpf/.

Feed it the segments of one connection in the order in which they pass. It keeps every byte it needs and looks at
the whole beginning again each time: slow, and simple enough to be seen to be right.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tidegate.model import FlowClass, Hint

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

WINDOW = 4096
"""Bytes further ahead of the contiguous beginning than this are not kept; and while nothing has the headers of TLS yet,
none further from where they would begin, because everything from there on may have to be looked at again."""
HINT_BYTES = 1024


class Segment(NamedTuple):
    """One TCP segment. Positions count payload bytes from the beginning of each stream."""

    from_client: bool
    position: int
    payload: bytes = b""
    flags: int = ACK
    acked: int = 0
    """Bytes of the other stream that the sender has, its FIN counting as one."""


class Flag(enum.Flag):
    OVERLAP = enum.auto()
    PROXY = enum.auto()
    SSLV2 = enum.auto()
    CLOSED = enum.auto()
    SYN_SEEN = enum.auto()


@dataclass(frozen=True)
class Profile:
    """How the mesh is recognised."""

    sni_suffixes: tuple[bytes, ...] = ()
    """Labels from a dot on; a label * stands for any one label."""
    alpn: tuple[bytes, ...] = ()
    proxy_ports: tuple[int, ...] = ()


@dataclass
class Stretch:
    """The client's bytes from one position on: of those that overlap, the first seen stay."""

    origin: int
    begin: bytearray = field(default_factory=bytearray)
    """What is contiguous from the origin on."""
    ahead: dict[int, int] = field(default_factory=dict)
    """Bytes behind a hole, by position."""
    conflicts: int = 0
    """Bytes that came again, and were others, while they waited behind a hole."""
    differences: int = 0
    """How often bytes came again and were others, whenever."""

    @property
    def end(self) -> int:
        return self.origin + len(self.begin)

    def add(self, position: int, payload: bytes, limit: int | None = None) -> None:
        """Bytes behind a hole are kept up to the limit, if there is one."""
        start, end = max(position, self.origin), self.end
        payload = payload[start - position :]
        again = payload[: max(end - start, 0)]
        known = self.begin[start - self.origin : start - self.origin + len(again)]
        self.differences += again != known
        if start + len(again) == end and not self.ahead:
            self.begin += payload[len(again) :]
            return
        for at, byte in enumerate(payload[len(again) :], start=start + len(again)):
            waiting = self.ahead.get(at)
            near = at - end < WINDOW and (limit is None or at < limit)
            if waiting is None and (at == end or near):
                self.ahead[at] = byte
            elif waiting not in (None, byte):
                self.differences += 1
                self.conflicts += 1
            while end in self.ahead:
                end += 1
        self._join()

    def _join(self) -> None:
        """What is not behind a hole any more becomes part of the beginning."""
        end = self.end
        while end in self.ahead:
            self.begin.append(self.ahead.pop(end))
            end += 1

    def following(self, origin: int) -> "Stretch":
        """What is known from a later position on."""
        later = Stretch(origin)
        if origin <= self.end:
            later.begin += self.begin[origin - self.origin :]
        later.ahead = {at: byte for at, byte in self.ahead.items() if at >= origin}
        later._join()
        return later


class Look(enum.Enum):
    """What a beginning turned out to be."""

    MORE = enum.auto()
    """It may still become anything."""
    NOT_TLS = enum.auto()
    HEADERS = enum.auto()
    """TLS by its headers; whose, the bytes do not tell yet."""
    OTHER = enum.auto()
    MESH = enum.auto()
    SSLV2 = enum.auto()


class Connection:
    """One connection, from its first segment on."""

    def __init__(self, profile: Profile, server_port: int) -> None:
        self._profile = profile
        self._mesh_port = server_port in profile.proxy_ports
        self._syn_seen = False
        self._joined = False
        """Whether there was payload without a SYN in front."""
        self._client = Stretch(0)
        self._base = 0
        self._furthest = {True: 0, False: 0}
        self._first: dict[bool, int] = {}
        """Where the count of each end begins: at its SYN, if that was of a known connection, or else at its first
        payload."""
        self._spoke_at: int | None = None
        """How far the client was seen when the server first sent payload."""
        self._fin: int | None = None
        self._reset = False
        self._closed = False
        self._over = False
        """A RST came when there was something to decide: what comes late is not looked at."""
        self._settled: FlowClass | None = None
        self._turn: Stretch | None = None
        self._upgraded: Stretch | None = None
        """The turn that began TLS."""
        self._mysql_asked = False
        self._hint: Hint | None = None
        self._proxy = False
        self._has_headers = False
        """Whether the beginning is TLS by its headers."""
        self._sslv2 = False
        self._differed_in_turn = False
        """Whether bytes of a turn, which may lie too far behind a hole to be kept for the beginning, were others."""
        self.must_tell_overlap = False
        """Whether bytes that were being kept for a decision came again and were others."""

    @property
    def flow_class(self) -> FlowClass:
        if not self._syn_seen:
            return FlowClass.UNKNOWN if self._joined else FlowClass.EMPTY
        if self._settled is not None:
            return self._settled
        if self._furthest[True] <= self._base:
            if self._spoke_at is not None and self._spoke_at <= self._base:
                return FlowClass.SERVER_FIRST
            if not self._furthest[True]:
                return FlowClass.EMPTY
        return FlowClass.UNKNOWN

    @property
    def counts(self) -> bool:
        """Whether it is a connection on any edge: without a SYN only payload makes it one."""
        return self._syn_seen or self._joined

    @property
    def hint(self) -> Hint | None:
        shown = (FlowClass.PLAINTEXT, FlowClass.SERVER_FIRST, FlowClass.STARTTLS)
        return self._hint if self.flow_class in shown else None

    @property
    def flags(self) -> Flag:
        """Without OVERLAP."""
        flags = Flag(0)
        if self._syn_seen:
            flags |= Flag.SYN_SEEN
        if self._closed:
            flags |= Flag.CLOSED
        if self._proxy:
            flags |= Flag.PROXY
        if self._sslv2:
            flags |= Flag.SSLV2
        return flags

    @property
    def may_tell_overlap(self) -> bool:
        return self._client.differences > 0 or self._differed_in_turn

    @property
    def hello(self) -> bytes:
        """The client's stream from where its ClientHello begins, as far as it was seen without a gap."""
        if self._upgraded is not None:
            return bytes(self._upgraded.begin)
        return bytes(self._client.begin[self._base :])

    @property
    def bytes_to_server(self) -> int:
        return self._bytes(from_client=True)

    @property
    def bytes_to_client(self) -> int:
        return self._bytes(from_client=False)

    def _bytes(self, *, from_client: bool) -> int:
        return self._furthest[from_client] - self._first.get(from_client, 0)

    def feed(self, segment: Segment) -> None:
        if segment.flags & RST:
            # RFC 1122 4.2.2.12: what it carries is a remark, and not of the stream.
            segment = segment._replace(payload=b"")
        if segment.flags & SYN and segment.from_client and not segment.flags & ACK:
            self._syn_seen = True
        if not self._syn_seen:
            self._join(segment)
        elif segment.from_client:
            self._from_client(segment)
        else:
            self._from_server(segment)
        if self.counts and segment.flags & (FIN | RST if segment.from_client else RST):
            self._closed = True

    def _join(self, segment: Segment) -> None:
        """A connection that is older than its observation."""
        if segment.payload:
            self._joined = True
        self._count(segment)

    def _count(self, segment: Segment) -> bool:
        """Whether the segment goes further than all before it from its end."""
        who, end = segment.from_client, segment.position + len(segment.payload)
        if segment.flags & SYN and self.counts:
            self._first[who] = 0
        if not segment.payload:
            return False
        if who not in self._first:
            self._first[who] = self._furthest[who] = segment.position
        if end <= self._furthest[who]:
            return False
        self._furthest[who] = end
        return True

    def _from_client(self, segment: Segment) -> None:
        end = segment.position + len(segment.payload)
        self._count(segment)
        conflicts = self._client.conflicts
        is_open = self._settled is None and not self._has_headers
        limit = self._base + WINDOW if is_open else None
        self._client.add(segment.position, segment.payload, limit)
        if self._settled is None and self._client.conflicts > conflicts:
            self.must_tell_overlap = True
        for turn in (self._turn, self._upgraded):
            if turn is not None:
                turn.add(segment.position, segment.payload)
                self._differed_in_turn |= turn.differences > 0
        if segment.payload and not self._furthest[True] and not _is_probe(segment):
            # Not one of the bytes is of the stream that the SYN began.
            self._settled = FlowClass.UNKNOWN
        if segment.flags & FIN:
            self._fin = end
        self._decide(reset=bool(segment.flags & RST))

    def _from_server(self, segment: Segment) -> None:
        new = self._count(segment)
        if segment.flags & ACK:
            self._acknowledged(segment.acked)
        if new:
            if self._spoke_at is None:
                self._spoke_at = self._furthest[True]
            if self._settled in (FlowClass.PLAINTEXT, FlowClass.SERVER_FIRST):
                self._turn = Stretch(self._furthest[True])
        self._decide(reset=bool(segment.flags & RST))

    def _acknowledged(self, acked: int) -> None:
        """Rule 6, and what of rule 4 has to do with bytes that will not come any more."""
        unseen = acked > self._client.end and not self._is_fin(acked, self._client.end)
        if unseen and self._settled is None:
            self._settled = FlowClass.UNKNOWN
        if self._turn is not None and acked > self._turn.end:
            self._turn = None

    def _is_fin(self, acked: int, end: int) -> bool:
        return self._fin == end and acked == end + 1

    def _decide(self, *, reset: bool) -> None:
        if self._over:
            return
        self._reset = reset
        if self._settled is None:
            self._settled = self._class_at_base()
        if self._settled in (FlowClass.PLAINTEXT, FlowClass.SERVER_FIRST):
            beginning = bytes(self._client.begin[self._base : self._base + HINT_BYTES])
            if self._hint is None:
                self._hint = hint_of(beginning, self._settled is FlowClass.SERVER_FIRST)
            if self._settled is FlowClass.SERVER_FIRST and not self._mysql_asked:
                self._mysql_asked = mysql_asks_for_tls(beginning)
                if self._mysql_asked:
                    self._turn = self._client.following(self._base + 36)
            self._upgrade()
        self._over = reset and self._settled is not None

    def _upgrade(self) -> None:
        """Rule 4."""
        if self._turn is None:
            return
        match hello_at(bytes(self._turn.begin), None):
            case Look.MORE:
                pass
            case Look.NOT_TLS:
                self._turn = None
            case _:
                self._settled = FlowClass.STARTTLS
                self._upgraded, self._turn = self._turn, None

    def _class_at_base(self) -> FlowClass | None:
        """Rules 2, 3 and 6: the class for good, None while there is none."""
        begin = bytes(self._client.begin)
        header = self._base if self._proxy else proxy_header(begin)
        if header:
            self._base = header
            self._proxy = True
        server_first = self._spoke_at is not None and self._spoke_at <= self._base
        not_tls = FlowClass.SERVER_FIRST if server_first else FlowClass.PLAINTEXT
        tls = FlowClass.STARTTLS if server_first else FlowClass.TLS
        mesh = FlowClass.STARTTLS if server_first else FlowClass.MESH
        if header is None:
            return self._conclude(not_tls)
        look = beginning_of(begin[self._base :], self._profile)
        self._has_headers = look not in (Look.MORE, Look.NOT_TLS)
        match look:
            case Look.MORE:
                return self._conclude(not_tls)
            case Look.NOT_TLS:
                return not_tls
            case Look.SSLV2:
                self._sslv2 = True
                return tls
            case Look.MESH:
                return mesh
            case _ if self._mesh_port or server_first:
                return mesh
            case Look.HEADERS:
                return self._conclude(tls)
            case Look.OTHER:
                return tls

    def _conclude(self, otherwise: FlowClass) -> FlowClass | None:
        """Rule 6: what a FIN or a RST makes of what does not decide by itself."""
        furthest, contiguous = self._furthest[True], self._client.end
        if not furthest:
            return None
        if self._reset:
            # Headers of TLS were seen, whatever is missing behind them.
            certain = otherwise in (FlowClass.TLS, FlowClass.STARTTLS)
            return otherwise if certain or furthest == contiguous else FlowClass.UNKNOWN
        if self._fin is not None and self._fin <= contiguous and furthest == contiguous:
            return otherwise
        return None


def _is_probe(segment: Segment) -> bool:
    """A keep-alive probe: one byte in front of what is to come (RFC 1122 4.2.3.6)."""
    return segment.position == -1 and len(segment.payload) == 1


# Rule 2.

_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FAMILIES = (0x00, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32)


def proxy_header(begin: bytes) -> int | None:
    """Length of the PROXY header in front, 0 without one, None while that is open."""
    if not begin:
        return None
    if begin[: len(b"PROXY ")] == b"PROXY "[: len(begin)]:
        end = begin[:107].find(b"\r\n")
        if end >= 0:
            return end + 2
        return None if len(begin) < 107 else 0
    if begin[: len(_V2_SIGNATURE)] != _V2_SIGNATURE[: len(begin)]:
        return 0
    if len(begin) > 12 and begin[12] not in (0x20, 0x21):
        return 0
    if len(begin) > 13 and begin[13] not in _V2_FAMILIES:
        return 0
    if len(begin) < 16:
        return None
    length = int.from_bytes(begin[14:16], "big")
    if length > 4080:
        return 0
    return 16 + length if len(begin) >= 16 + length else None


# Rule 3.


def beginning_of(data: bytes, profile: Profile) -> Look:
    if not data:
        return Look.MORE
    if data[0] == 0x16:
        return hello_at(data, profile)
    if data[0] & 0x80:
        return sslv2_hello(data)
    return Look.NOT_TLS


def sslv2_hello(data: bytes) -> Look:
    """Each field is judged when it is complete, the sum of the lengths at the end."""

    def number(at: int, size: int) -> int | None:
        return int.from_bytes(data[at : at + size], "big") if len(data) >= at + size else None

    checks: list[tuple[int, int, Callable[[int], bool]]] = [
        (2, 1, lambda kind: kind == 1),
        (3, 2, lambda version: version == 0x0002 or 0x0300 <= version <= 0x0304),
        (5, 2, lambda ciphers: ciphers > 0 and ciphers % 3 == 0),
        (7, 2, lambda session: session in (0, 16)),
        (9, 2, lambda challenge: 16 <= challenge <= 32),
    ]
    for at, size, holds in checks:
        value = number(at, size)
        if value is None:
            return Look.MORE
        if not holds(value):
            return Look.NOT_TLS
    length = int.from_bytes(data[:2], "big") & 0x7FFF
    parts = sum(int.from_bytes(data[at : at + 2], "big") for at in (5, 7, 9))
    return Look.SSLV2 if 9 + parts == length else Look.NOT_TLS


class _More(Exception):
    pass


class _Contradiction(Exception):
    pass


@dataclass
class _Records:
    """A handshake message as the records at hand carry it."""

    message: bytes = b""
    headers: bool = False
    contradiction: bool = False


def hello_at(data: bytes, profile: Profile | None) -> Look:
    """A TLS ClientHello from its first record on; without a profile only its headers are looked at."""
    records = _records(data)
    if not records.headers:
        return Look.NOT_TLS if records.contradiction else Look.MORE
    if profile is None:
        return Look.HEADERS
    length = int.from_bytes(records.message[1:4], "big")
    try:
        return _names(_Body(records.message[4:], length), profile)
    except _More:
        return Look.OTHER if records.contradiction else Look.HEADERS
    except _Contradiction:
        return Look.OTHER


def _records(data: bytes) -> _Records:
    found = _Records()
    at = 0
    while at < len(data):
        header = data[at : at + 5]
        good = (lambda b: b == 22, lambda b: b == 3, lambda b: b <= 4, lambda b: b <= 0x40)
        if not all(holds(byte) for holds, byte in zip(good, header, strict=False)):
            found.contradiction = True
            return found
        if len(header) < 5:
            return found
        length = int.from_bytes(header[3:], "big")
        left = _left(found.message)
        if not 0 < length <= 1 << 14 or (left is not None and length > left):
            found.contradiction = True
            return found
        content = data[at + 5 : at + 5 + length]
        before = len(found.message)
        found.message += content
        if found.message and found.message[0] != 1:
            found.contradiction = True
            return found
        if not found.headers and len(found.message) >= 4:
            size = int.from_bytes(found.message[1:4], "big")
            if not 41 <= size <= 1 << 17 or before + length > 4 + size:
                found.contradiction = True
                return found
            found.headers = True
        if _left(found.message) == 0:
            return found
        at += 5 + length
    return found


def _left(message: bytes) -> int | None:
    if len(message) < 4:
        return None
    return 4 + int.from_bytes(message[1:4], "big") - len(message)


class _Body:
    """A message's body, read field by field within bounds that become tighter in an extension."""

    def __init__(self, data: bytes, length: int) -> None:
        self._data = data
        self._length = length
        self.at = 0
        self.end = length

    @property
    def left(self) -> int:
        return self.end - self.at

    def take(self, count: int) -> bytes:
        if count > self.left:
            # It is certain when the byte that should belong to the field turns out not to.
            over = len(self._data) > self.end or len(self._data) == self._length
            raise _Contradiction if over else _More
        if self.at + count > len(self._data):
            raise _More
        data = self._data[self.at : self.at + count]
        self.at += count
        return data

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")


def _require(holds: bool) -> None:
    if not holds:
        raise _Contradiction


def _names(body: _Body, profile: Profile) -> Look:
    """RFC 8446 4.1.2, as far as the names."""
    _require(body.number(2) >> 8 == 3)
    body.take(32)
    session = body.number(1)
    _require(session <= 32)
    body.take(session)
    ciphers = body.number(2)
    _require(ciphers > 0 and ciphers % 2 == 0)
    body.take(ciphers)
    compression = body.number(1)
    _require(compression > 0)
    body.take(compression)
    if not body.left:
        return Look.OTHER
    _require(body.number(2) == body.left)
    message_end, seen = body.end, set()
    while body.left:
        kind = body.number(2)
        length = body.number(2)
        _require(length <= body.left)
        if kind in (0, 16):
            _require(kind not in seen)
            seen.add(kind)
        body.end = body.at + length
        if length and kind == 0 and _is_mesh_name(body, profile):
            return Look.MESH
        if length and kind == 16 and _has_mesh_protocol(body, profile):
            return Look.MESH
        if seen == {0, 16}:
            return Look.OTHER
        body.take(body.left)
        body.end = message_end
    return Look.OTHER


def _is_mesh_name(body: _Body, profile: Profile) -> bool:
    """RFC 6066 3: the first name decides."""
    _require(body.number(2) == body.left)
    if body.number(1) != 0:
        return False
    length = body.number(2)
    _require(0 < length <= body.left)
    if length > 255:
        return False
    name = body.take(length).lower()
    return any(_ends_with(name, suffix.lower()) for suffix in profile.sni_suffixes)


def _ends_with(name: bytes, suffix: bytes) -> bool:
    wanted = suffix.split(b".")[1:]
    labels = name.split(b".")
    front, tail = labels[: -len(wanted)], labels[-len(wanted) :]
    return b".".join(front) != b"" and all(
        label == want or (want == b"*" and label) for label, want in zip(tail, wanted, strict=True)
    )


def _has_mesh_protocol(body: _Body, profile: Profile) -> bool:
    """RFC 7301 3.1."""
    _require(body.number(2) == body.left)
    while True:
        length = body.number(1)
        _require(0 < length <= body.left)
        if body.take(length) in profile.alpn:
            return True
        if not body.left:
            return False


# Rule 4.


def mysql_asks_for_tls(data: bytes) -> bool:
    """An SSLRequest: 32 bytes with CLIENT_PROTOCOL_41 and CLIENT_SSL."""
    if data[:4] != b"\x20\0\0\x01" or len(data) < 8:
        return False
    capabilities = int.from_bytes(data[4:8], "little")
    return capabilities & 0x200 != 0 and capabilities & 0x800 != 0


# Rule 5: each answers from the bytes at hand, True only where it is certain.

_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH")


def _http1(data: bytes) -> bool:
    line, newline, _ = data.partition(b"\n")
    method, space, _ = line.partition(b" ")
    line = line.removesuffix(b"\r")
    return (
        bool(newline and space)
        and method in _METHODS
        and line.endswith((b" HTTP/1.0", b" HTTP/1.1"))
    )


def _h2c(data: bytes) -> bool:
    return data.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


def _postgres(data: bytes) -> bool:
    if len(data) < 8:
        return False
    length, code = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
    if length == 8:
        return code in (80877103, 80877104)
    if length == 16 and code == 80877102:
        return True
    startup = code >> 16 == 3 and code & 0xFFFF <= 2 and 8 < length <= 10000
    return startup and data[8:9].islower()


def _mysql(data: bytes) -> bool:
    if len(data) < 32 or data[3] != 1:
        return False
    length, capabilities = (
        int.from_bytes(data[:3], "little"),
        int.from_bytes(data[4:8], "little"),
    )
    return length >= 32 and capabilities & 0x200 != 0 and not any(data[13:32])


def _redis(data: bytes) -> bool:
    if data[:1] != b"*":
        return False
    count, newline, rest = data[1:].partition(b"\r\n")
    if not newline or not _digits(count, 4) or rest[:1] != b"$":
        return False
    length, newline, _ = rest[1:].partition(b"\r\n")
    return bool(newline) and _digits(length, 9)


def _digits(text: bytes, most: int) -> bool:
    return 1 <= len(text) <= most and text.isdigit()


def _kafka(data: bytes) -> bool:
    if len(data) < 14:
        return False
    size, api, version = (int.from_bytes(data[a:b], "big") for a, b in ((0, 4), (4, 6), (6, 8)))
    client = int.from_bytes(data[12:14], "big", signed=True)
    known = (api == 18 and version <= 4) or (api == 3 and version <= 13)
    return known and 10 < size < 1 << 20 and -1 <= client <= 255 and 10 + max(client, 0) <= size


def _ssh(data: bytes) -> bool:
    return data.startswith((b"SSH-2.0-", b"SSH-1.99-"))


def _amqp(data: bytes) -> bool:
    if data[:4] != b"AMQP" or len(data) < 8:
        return False
    version = tuple(data[4:8])
    return version in ((0, 0, 9, 1), (1, 1, 0, 10)) or (
        version[0] in (0, 2, 3) and version[1:] == (1, 0, 0)
    )


def _mongodb(data: bytes) -> bool:
    if len(data) < 20:
        return False
    length, reply, opcode, flags = (
        int.from_bytes(data[at : at + 4], "little", signed=True) for at in (0, 8, 12, 16)
    )
    if not 21 <= length <= 48_000_000 or reply != 0:
        return False
    if opcode == 2013:
        return flags & 0xFFFFFFFF & ~0x10003 == 0
    return opcode == 2004 and data[20:31] == b"admin.$cmd\0"


def _cassandra(data: bytes) -> bool:
    if len(data) < 9 or data[0] not in (3, 4, 5) or data[1] & ~0x1F:
        return False
    opcode, length = data[4], int.from_bytes(data[5:9], "big")
    if opcode == 5:
        return length == 0
    first_key = data[11:24] == b"\x00\x0bCQL_VERSION"
    return opcode == 1 and 22 <= length <= 1024 and first_key


_HINTS: Sequence[tuple[Hint, Callable[[bytes], bool]]] = (
    (Hint.HTTP1, _http1),
    (Hint.H2C, _h2c),
    (Hint.POSTGRES, _postgres),
    (Hint.REDIS, _redis),
    (Hint.KAFKA, _kafka),
    (Hint.SSH, _ssh),
    (Hint.AMQP, _amqp),
    (Hint.MONGODB, _mongodb),
    (Hint.CASSANDRA, _cassandra),
)


def hint_of(data: bytes, server_first: bool) -> Hint | None:
    for hint, speaks in _HINTS:
        if speaks(data):
            return hint
    return Hint.MYSQL if server_first and _mysql(data) else None
