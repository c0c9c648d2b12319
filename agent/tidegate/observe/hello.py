"""What a ClientHello says, exactly: the second reader of bytes that bpf/hello.h only looks at for the class.

Pure. Knows TLS 1.0 to 1.3 and SSL 3.0 (RFC 8446, with the records and messages of RFC 5246 and RFC 6101) over any
number of records, and the SSLv2-compatible hello (RFC 5246 E.2). Whatever the bytes are, the answer is a
ClientHello: what could be read until they ended or contradicted themselves, how much is missing, and the first
fault. A fault that leaves lengths in doubt ends the reading; one that does not is noted and passed over.
"""

from collections.abc import Callable
from typing import Any

import msgspec

RECORD_HEADER = 5
MESSAGE_HEADER = 4

_HANDSHAKE = 22
_CLIENT_HELLO = 1
_RECORD_MAX = 1 << 14
_MESSAGE_MAX = 1 << 17
"""No RFC sets it; larger ones are refused by the classifier too (HELLO_LENGTH_MAX of bpf/hello.h)."""
_HOST_NAME = 0
_HOST_NAME_MAX = 255
"""RFC 1035 2.3.4."""

_SERVER_NAME = 0
_SUPPORTED_GROUPS = 10
_SIGNATURE_ALGORITHMS = 13
_ALPN = 16
_PRE_SHARED_KEY = 41
_SUPPORTED_VERSIONS = 43
_KEY_SHARE = 51
_ENCRYPTED_CLIENT_HELLO = 0xFE0D
_ECH_OUTER = 0

_GREASE = frozenset(high << 8 | high for high in range(0x0A, 0x100, 0x10))
"""RFC 8701 2: values that a client sends so that servers learn to pass over what they do not know."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Where a hello is not what the RFCs allow."""

    offset: int
    """Bytes from the beginning of the input, record headers included."""
    what: str


class ClientHello(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a hello. Fields that were not reached have their defaults."""

    sslv2: bool = False
    """Whether it is SSLv2-compatible; then there are no extensions."""
    record_version: int | None = None
    """Of the first record, such as 0x0301."""
    legacy_version: int | None = None
    """legacy_version of RFC 8446 4.1.2, which was the version up to TLS 1.2: 0x0303, 0x0300, or 0x0002."""
    supported_versions: tuple[int, ...] = ()
    """Of the extension (RFC 8446 4.2.1), in the client's order, GREASE included."""
    sni: str | None = None
    """The host name (RFC 6066 3): None without the extension, "" where it has none. Of an ECH this is the
    outer one, which everybody may see. What is not printable ASCII is escaped."""
    alpn: tuple[str, ...] | None = None
    """Protocol names (RFC 7301 3.1) in the client's order, escaped likewise; None without the extension."""
    ech: bool = False
    """Encrypted Client Hello (RFC 9849 5), or GREASE of it: nobody on the way can tell them apart."""
    grease: bool = False
    """Whether any value of RFC 8701 was seen."""
    cipher_suites: int | None = None
    """How many, GREASE and signalling values included."""
    missing: int | None = None
    """Bytes of the message that are not there; None while its length is not known."""
    fault: Fault | None = None

    @property
    def complete(self) -> bool:
        return self.missing == 0


class _Cut(Exception):
    """The bytes ended where the hello does not."""


class _Broken(Exception):
    """The rest cannot be read."""

    def __init__(self, offset: int, what: str) -> None:
        self.fault = Fault(offset=offset, what=what)
        super().__init__(what)


def parse(stream: bytes) -> ClientHello:
    """Reads the hello at the beginning of a client's stream, as far as its bytes are there.

    Bytes behind the hello's last record are not looked at. Raises nothing, whatever the bytes are.
    """
    reading = _Reading()
    try:
        if stream and stream[0] & 0x80:
            _sslv2(stream, reading)
        else:
            _tls(stream, reading)
    except _Cut:
        pass
    except _Broken as broken:
        reading.note(broken.fault)
    return ClientHello(**reading.found, fault=reading.fault)


class _Reading:
    """What was found so far."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.fault: Fault | None = None

    def note(self, fault: Fault) -> None:
        if self.fault is None:
            self.fault = fault

    def see(self, values: tuple[int, ...]) -> None:
        if not _GREASE.isdisjoint(values):
            self.found["grease"] = True


class _Message:
    """A handshake message put together from its records, which remembers where each byte came from."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.pieces: list[tuple[int, int]] = []
        """Beginnings of records' contents: in the message, and in the input."""
        self.end_of_input = 0
        self.fault: Fault | None = None
        """Why the records end here, where they do before the input does."""

    @property
    def length(self) -> int | None:
        """Of the whole message with its header, once that is known."""
        if len(self.data) < MESSAGE_HEADER:
            return None
        return MESSAGE_HEADER + int.from_bytes(self.data[1:MESSAGE_HEADER], "big")

    def offset(self, at: int) -> int:
        """Where in the input the byte `at` of the message is."""
        for begins, source in reversed(self.pieces):
            if begins <= at:
                return source + at - begins
        return self.end_of_input


class _Part:
    """A stretch of the message that has to be read from its beginning to its end."""

    def __init__(self, message: _Message, at: int, end: int, name: str) -> None:
        self._message = message
        self._end = end
        self._name = name
        self.at = at

    @property
    def left(self) -> int:
        return self._end - self.at

    def broken(self, what: str, at: int | None = None) -> _Broken:
        return _Broken(self._message.offset(self.at if at is None else at), what)

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise self.broken(f"{self._name} ends in its {what}: {self.left} of {count} bytes")
        data = self._message.data[self.at : self.at + count]
        if len(data) < count:
            raise _Cut
        self.at += count
        return bytes(data)

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "big")

    def list_of(self, size: int, name: str) -> "_Part":
        """The part behind a length of `size` bytes; this part goes on after it."""
        begins = self.at
        length = self.number(size, f"length of the {name}")
        if length > self.left:
            raise self.broken(f"{name} says {length} bytes, {self._name} has {self.left}", begins)
        part = _Part(self._message, self.at, self.at + length, name)
        self.at += length
        return part

    def numbers(self, size: int, name: str, least: int = 1) -> tuple[int, ...]:
        """A list of numbers of two bytes behind a length of `size` bytes."""
        begins = self.at
        part = self.list_of(size, name)
        if part.left % 2 or part.left < 2 * least:
            raise self.broken(f"{name} has {part.left} bytes", begins)
        return part.pairs(name)

    def pairs(self, name: str) -> tuple[int, ...]:
        data = self.take(self.left, name)
        return tuple(data[at] << 8 | data[at + 1] for at in range(0, len(data), 2))

    def end(self) -> None:
        if self.left:
            raise self.broken(f"{self.left} bytes behind the end of {self._name}")


def _tls(stream: bytes, reading: _Reading) -> None:
    message = _Message()
    try:
        _join_records(stream, message, reading)
    except _Broken as broken:
        message.fault = broken.fault
    except _Cut:
        pass
    message.end_of_input = len(stream)
    length = message.length
    if length is not None:
        reading.found["missing"] = max(length - len(message.data), 0)
    end = MESSAGE_HEADER if length is None else length
    try:
        _message(_Part(message, 0, end, "the hello"), reading)
    except _Cut:
        pass
    except _Broken as broken:
        reading.note(broken.fault)
    if message.fault is not None:
        reading.note(message.fault)


def _join_records(stream: bytes, message: _Message, reading: _Reading) -> None:
    """RFC 8446 5.1."""
    at = 0
    while message.length is None or len(message.data) < message.length:
        header = stream[at : at + RECORD_HEADER]
        if header[:1] and header[0] != _HANDSHAKE:
            raise _Broken(at, f"record of type {header[0]}, not {_HANDSHAKE} (RFC 8446 5.1)")
        if header[1:2] and header[1] != 3:
            raise _Broken(at + 1, f"record of version {header[1]}.x, not 3.x (RFC 8446 5.1)")
        if len(header) >= 3:
            if header[2] > 4:
                raise _Broken(at + 2, f"record of version 3.{header[2]} (RFC 8446 5.1)")
            reading.found.setdefault("record_version", header[1] << 8 | header[2])
        if len(header) < RECORD_HEADER:
            raise _Cut
        length = int.from_bytes(header[3:], "big")
        if not 0 < length <= _RECORD_MAX:
            raise _Broken(at + 3, f"record of {length} bytes (RFC 8446 5.1)")
        at += RECORD_HEADER
        message.pieces.append((len(message.data), at))
        message.data += stream[at : at + length]
        if message.length is not None and len(message.data) > message.length:
            beyond = len(message.data) - message.length
            del message.data[message.length :]
            raise _Broken(
                message.offset(message.length - 1) + 1,
                f"at least {beyond} bytes behind the hello in its last record (RFC 8446 5.1)",
            )
        at += length


def _message(part: _Part, reading: _Reading) -> None:
    """RFC 8446 4 and 4.1.2."""
    kind = part.number(1, "type")
    if kind != _CLIENT_HELLO:
        raise part.broken(f"handshake message of type {kind}, not {_CLIENT_HELLO} (RFC 8446 4)", 0)
    length = part.number(3, "length")
    if length > _MESSAGE_MAX:
        raise part.broken(f"hello of {length} bytes, at most {_MESSAGE_MAX} are read", 1)
    legacy = part.number(2, "version")
    reading.found["legacy_version"] = legacy
    if legacy >> 8 != 3:
        raise part.broken(f"hello of version {legacy:#06x} (RFC 8446 4.1.2)", MESSAGE_HEADER)
    part.take(32, "random")
    begins = part.at
    session = part.list_of(1, "session id")
    if session.left > 32:
        raise part.broken(
            f"session id of {session.left} bytes, at most 32 (RFC 8446 4.1.2)", begins
        )
    suites = part.numbers(2, "cipher suites")
    reading.found["cipher_suites"] = len(suites)
    reading.see(suites)
    begins = part.at
    compression = part.list_of(1, "compression methods")
    if not compression.left:
        raise part.broken("no compression method (RFC 8446 4.1.2)", begins)
    if not part.left:
        # RFC 5246 7.4.1.2: before TLS 1.3 a hello may have no extensions.
        return
    extensions = part.list_of(2, "extensions")
    part.end()
    _extensions(extensions, reading)


def _extensions(part: _Part, reading: _Reading) -> None:
    """RFC 8446 4.2."""
    seen: set[int] = set()
    while part.left:
        begins = part.at
        kind = part.number(2, "type of an extension")
        body = part.list_of(2, f"extension {kind}")
        reading.see((kind,))
        if kind in seen:
            fault = part.broken(f"extension {kind} twice (RFC 8446 4.2)", begins).fault
            reading.note(fault)
            continue
        if _PRE_SHARED_KEY in seen:
            what = f"extension {kind} behind pre_shared_key, which has to be the last (RFC 8446 4.2.11)"
            reading.note(part.broken(what, begins).fault)
        seen.add(kind)
        reader = _EXTENSIONS.get(kind)
        if reader is None:
            continue
        try:
            reader(body, reading)
            body.end()
        except _Broken as broken:
            # The length of the extension itself is good: the next one begins where it says.
            reading.note(broken.fault)


def _server_name(body: _Part, reading: _Reading) -> None:
    """RFC 6066 3."""
    reading.found["sni"] = ""
    begins = body.at
    names = body.list_of(2, "list of server names")
    if not names.left:
        raise body.broken("no name in server_name (RFC 6066 3)", begins)
    seen: set[int] = set()
    while names.left:
        begins = names.at
        kind = names.number(1, "type")
        name = names.list_of(2, "server name")
        if kind in seen:
            raise names.broken(f"two server names of type {kind} (RFC 6066 3)", begins)
        seen.add(kind)
        if not name.left:
            raise names.broken("server name of no bytes (RFC 6066 3)", begins)
        text = name.take(name.left, "bytes")
        if kind != _HOST_NAME:
            continue
        reading.found["sni"] = _escaped(text)
        if len(text) > _HOST_NAME_MAX:
            what = f"host name of {len(text)} bytes, at most {_HOST_NAME_MAX} (RFC 1035 2.3.4)"
            raise names.broken(what, begins)
        if not text.isascii():
            raise names.broken("host name that is not ASCII (RFC 6066 3)", begins)


def _alpn(body: _Part, reading: _Reading) -> None:
    """RFC 7301 3.1."""
    found: list[str] = []
    reading.found["alpn"] = ()
    begins = body.at
    names = body.list_of(2, "list of protocol names")
    if not names.left:
        raise body.broken("no protocol name in ALPN (RFC 7301 3.1)", begins)
    while names.left:
        begins = names.at
        name = names.list_of(1, "protocol name")
        if not name.left:
            raise names.broken("protocol name of no bytes (RFC 7301 3.1)", begins)
        text = name.take(name.left, "bytes")
        if len(text) == 2:
            reading.see((text[0] << 8 | text[1],))
        found.append(_escaped(text))
        reading.found["alpn"] = tuple(found)


def _supported_versions(body: _Part, reading: _Reading) -> None:
    """RFC 8446 4.2.1."""
    versions = body.numbers(1, "list of versions")
    reading.found["supported_versions"] = versions
    reading.see(versions)


def _supported_groups(body: _Part, reading: _Reading) -> None:
    """RFC 8446 4.2.7."""
    reading.see(body.numbers(2, "list of groups"))


def _signature_algorithms(body: _Part, reading: _Reading) -> None:
    """RFC 8446 4.2.3."""
    reading.see(body.numbers(2, "list of signature algorithms"))


def _key_share(body: _Part, reading: _Reading) -> None:
    """RFC 8446 4.2.8; the list is empty where the client wants to be told the group."""
    shares = body.list_of(2, "list of key shares")
    while shares.left:
        reading.see((shares.number(2, "group"),))
        begins = shares.at
        key = shares.list_of(2, "key share")
        if not key.left:
            raise shares.broken("key share of no bytes (RFC 8446 4.2.8)", begins)


def _encrypted_client_hello(body: _Part, reading: _Reading) -> None:
    """RFC 9849 5."""
    reading.found["ech"] = True
    begins = body.at
    kind = body.number(1, "type")
    if kind != _ECH_OUTER:
        raise body.broken(f"ECH of type {kind} in the open, not {_ECH_OUTER} (RFC 9849 5)", begins)
    body.take(2 + 2 + 1, "cipher suite and configuration")
    body.list_of(2, "encapsulated key")
    begins = body.at
    payload = body.list_of(2, "payload")
    if not payload.left:
        raise body.broken("ECH without payload (RFC 9849 5)", begins)


_EXTENSIONS: dict[int, Callable[[_Part, _Reading], None]] = {
    _SERVER_NAME: _server_name,
    _ALPN: _alpn,
    _SUPPORTED_VERSIONS: _supported_versions,
    _SUPPORTED_GROUPS: _supported_groups,
    _SIGNATURE_ALGORITHMS: _signature_algorithms,
    _KEY_SHARE: _key_share,
    _ENCRYPTED_CLIENT_HELLO: _encrypted_client_hello,
}


def _sslv2(stream: bytes, reading: _Reading) -> None:
    """RFC 5246 E.2."""
    reading.found["sslv2"] = True
    if len(stream) < 2:
        raise _Cut
    length = (stream[0] & 0x7F) << 8 | stream[1]
    reading.found["missing"] = max(2 + length - len(stream), 0)

    def number(at: int, size: int) -> int:
        if len(stream) < at + size:
            raise _Cut
        return int.from_bytes(stream[at : at + size], "big")

    if number(2, 1) != _CLIENT_HELLO:
        raise _Broken(2, f"SSLv2 message of type {stream[2]}, not {_CLIENT_HELLO} (RFC 5246 E.2)")
    version = number(3, 2)
    reading.found["legacy_version"] = version
    if version != 0x0002 and not 0x0300 <= version <= 0x0304:
        raise _Broken(3, f"hello of version {version:#06x} (RFC 5246 E.2)")
    ciphers = number(5, 2)
    if not ciphers or ciphers % 3:
        raise _Broken(5, f"cipher specs have {ciphers} bytes (RFC 5246 E.2)")
    reading.found["cipher_suites"] = ciphers // 3
    session = number(7, 2)
    if session not in (0, 16):
        raise _Broken(7, f"session id of {session} bytes, not 0 or 16 (RFC 5246 E.2)")
    challenge = number(9, 2)
    if not 16 <= challenge <= 32:
        raise _Broken(9, f"challenge of {challenge} bytes, not 16 to 32 (RFC 5246 E.2)")
    if 9 + ciphers + session + challenge != length:
        parts = f"{9 + ciphers + session + challenge} bytes of its parts"
        raise _Broken(0, f"hello says {length} bytes and has {parts} (RFC 5246 E.2)")


def _escaped(text: bytes) -> str:
    """Printable ASCII as it is, a backslash doubled, everything else as \\xNN."""
    return "".join(
        "\\\\" if byte == 0x5C else chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}"
        for byte in text
    )
