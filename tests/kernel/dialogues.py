"""What two ends say to each other in turn, as packets cut and ordered in every way that TCP allows."""

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from packets import Packet, Talk


@dataclass(frozen=True)
class Word:
    """What one end says before the other one does."""

    from_client: bool
    data: bytes


def client(data: bytes) -> Word:
    return Word(True, data)


def server(data: bytes) -> Word:
    return Word(False, data)


Order = Callable[[list[Packet]], list[Packet]]
"""What becomes of the packets of one word on their way."""


@dataclass(frozen=True)
class Way:
    """How a word travels: cut into segments of a size, and these in an order."""

    size: int
    order: Order = list

    def carry(self, talk: Talk, words: Sequence[Word]) -> list[Packet]:
        return [*talk.opening(), *self._words(talk, words)]

    def _words(self, talk: Talk, words: Sequence[Word]) -> Iterator[Packet]:
        said, answered = 0, 0
        for word in words:
            if word.from_client:
                yield from self.order(talk.segments(word.data, self.size, said))
                said += len(word.data)
            else:
                yield talk.down(answered, word.data, said)
                answered += len(word.data)


def _twice(packets: list[Packet]) -> list[Packet]:
    return [each for packet in packets for each in (packet, packet)] + packets


def _shuffled(packets: list[Packet]) -> list[Packet]:
    mixed = list(packets)
    random.Random(len(packets)).shuffle(mixed)
    return mixed


WAYS = {
    "whole": Way(1 << 14),
    "bytes": Way(1),
    "reversed": Way(1, lambda packets: packets[::-1]),
    "shuffled": Way(5, _shuffled),
    "retransmitted": Way(7, _twice),
}

# What protocols really say.
SMTP_GREETING = server(b"220 mail.example.org ESMTP Postfix\r\n")
SMTP_EHLO = client(b"EHLO client.example.org\r\n")
SMTP_FEATURES = server(b"250-mail.example.org\r\n250-STARTTLS\r\n250 8BITMIME\r\n")
SMTP = [
    SMTP_GREETING,
    SMTP_EHLO,
    SMTP_FEATURES,
    client(b"STARTTLS\r\n"),
    server(b"220 2.0.0 Ready to start TLS\r\n"),
]
IMAP = [
    server(b"* OK [CAPABILITY IMAP4rev1 STARTTLS] ready\r\n"),
    client(b"a001 STARTTLS\r\n"),
    server(b"a001 OK Begin TLS negotiation now.\r\n"),
]
POP3 = [server(b"+OK POP3 ready\r\n"), client(b"STLS\r\n"), server(b"+OK Begin TLS\r\n")]
FTP = [
    server(b"220 ProFTPD\r\n"),
    client(b"AUTH TLS\r\n"),
    server(b"234 AUTH TLS successful\r\n"),
]
LDAP = [
    client(bytes.fromhex("301d02010177188016") + b"1.3.6.1.4.1.1466.20037"),
    server(bytes.fromhex("300c02010178070a010004000400")),
]
XMPP = [
    client(
        b"<?xml version='1.0'?><stream:stream to='example.org' version='1.0' "
        b"xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"
    ),
    server(
        b"<?xml version='1.0'?><stream:stream id='1' from='example.org' version='1.0'>"
        b"<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>"
    ),
    client(b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
    server(b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"),
]
CONNECT = [
    client(b"CONNECT api.example.org:443 HTTP/1.1\r\nHost: api.example.org:443\r\n\r\n"),
    server(b"HTTP/1.1 200 Connection established\r\n\r\n"),
]
POSTGRES_SSL = client(struct.pack("!II", 8, 80877103))
POSTGRES_GSS = client(struct.pack("!II", 8, 80877104))
POSTGRES_START = client(struct.pack("!II", 41, 3 << 16) + b"user\0postgres\0database\0postgres\0\0")
MYSQL_GREETING = server(
    b"\x4a\0\0\0\x0a8.0.36\0\x08\0\0\0" + b"k" * 8 + b"\0\xff\xff\xff\x02\0\xff\xdf\x15"
    + bytes(10) + b"s" * 12 + b"\0caching_sha2_password\0"
)  # fmt: skip
MYSQL_CLIENT_SSL = 0x800
MYSQL_CAPABILITIES = 0x19FF_A685 & ~MYSQL_CLIENT_SSL


def mysql_login(capabilities: int, rest: bytes = b"", sequence: int = 1) -> bytes:
    """HandshakeResponse41, or without a rest the SSLRequest."""
    body = struct.pack("<IIB", capabilities, 1 << 24, 255) + bytes(23) + rest
    return len(body).to_bytes(3, "little") + bytes([sequence]) + body


MYSQL_SSL_REQUEST = mysql_login(MYSQL_CAPABILITIES | MYSQL_CLIENT_SSL)
MYSQL_PLAIN = mysql_login(
    MYSQL_CAPABILITIES, b"root\0\x20" + b"p" * 32 + b"mysql_native_password\0"
)


def proxy_text(rest: bytes = b"TCP4 192.0.2.1 198.51.100.2 56324 443") -> bytes:
    return b"PROXY " + rest + b"\r\n"


def proxy_binary(
    version: int = 0x21, family: int = 0x11, body: bytes = bytes(12), length: int | None = None
) -> bytes:
    return (
        b"\r\n\r\n\0\r\nQUIT\n"
        + struct.pack("!BBH", version, family, len(body) if length is None else length)
        + body
    )


def sslv2_hello(
    *,
    kind: int = 1,
    version: int = 0x0301,
    ciphers: int = 6,
    session: int = 0,
    challenge: int = 16,
    length: int | None = None,
) -> bytes:
    """RFC 5246 E.2."""
    body = (
        struct.pack("!BHHHH", kind, version, ciphers, session, challenge)
        + b"\x01\x00\x80" * (ciphers // 3)
        + bytes(session)
        + b"\x5a" * challenge
    )
    return struct.pack("!H", 0x8000 | (len(body) if length is None else length)) + body
