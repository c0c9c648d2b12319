"""What a ClientHello says; whatever the bytes are, there is an answer."""

import random
import struct
from collections.abc import Callable

import pytest

from kernel.packets import as_records, hello, with_extension, without_extensions
from tidegate.observe.hello import ClientHello, parse

PLAIN = hello("pay.example.org", ["h2", "http/1.1"])
BARE = without_extensions(PLAIN)
GREASE = 0x1A1A


def u16(*numbers: int) -> bytes:
    return struct.pack(f"!{len(numbers)}H", *numbers)


def sized(size: int, body: bytes) -> bytes:
    return len(body).to_bytes(size, "big") + body


def made(
    *extensions: tuple[int, bytes],
    version: int = 0x0303,
    session: bytes = b"",
    suites: bytes = b"\x13\x01",
    compression: bytes = b"\0",
    trailing: bytes = b"",
) -> bytes:
    """A hello by hand, in one record; trailing bytes come behind the extensions, inside the message."""
    body = u16(version) + bytes(32) + sized(1, session) + sized(2, suites) + sized(1, compression)
    if extensions:
        body += sized(2, b"".join(u16(kind) + sized(2, data) for kind, data in extensions))
    return as_records(b"\x01" + sized(3, body + trailing), [1 << 14])


def name(host: bytes, kind: int = 0) -> bytes:
    return bytes([kind]) + sized(2, host)


def server_name(*entries: bytes) -> tuple[int, bytes]:
    return 0, sized(2, b"".join(entries))


def alpn(*protocols: bytes) -> tuple[int, bytes]:
    return 16, sized(2, b"".join(sized(1, each) for each in protocols))


def ech(kind: int = 0, payload: bytes = bytes(32)) -> tuple[int, bytes]:
    return 0xFE0D, bytes([kind]) + u16(1, 1) + b"\x07" + sized(2, bytes(32)) + sized(2, payload)


def sslv2(suites: int = 9, session: int = 0, challenge: int = 16, version: int = 0x0301) -> bytes:
    body = b"\x01" + u16(version, suites, session, challenge) + bytes(suites + session + challenge)
    return u16(0x8000 | len(body)) + body


def test_what_openssl_sends_is_read_in_full() -> None:
    read = parse(PLAIN)
    assert read.sni == "pay.example.org"
    assert read.alpn == ("h2", "http/1.1")
    assert read.legacy_version == 0x0303
    assert read.record_version == 0x0301
    assert read.supported_versions[0] == 0x0304
    assert read.cipher_suites
    assert not read.grease
    assert not read.ech
    assert not read.sslv2
    assert read.complete
    assert read.fault is None


def test_a_hello_without_name_and_protocols_has_neither() -> None:
    read = parse(hello())
    assert (read.sni, read.alpn) == (None, None)
    assert read.complete


def test_a_hello_without_extensions_is_whole() -> None:
    read = parse(BARE)
    assert read.complete
    assert read.fault is None
    assert read.supported_versions == ()


@pytest.mark.parametrize("sizes", [[1], [5, 3], [100], [4, 1 << 14], [3, 2, 1, 1000]])
def test_records_may_end_anywhere(sizes: list[int]) -> None:
    assert parse(as_records(PLAIN[5:], sizes)) == parse(PLAIN)


def test_bytes_behind_the_last_record_are_not_looked_at() -> None:
    assert parse(PLAIN + b"\x14\x03\x03\x00\x01\x01garbage") == parse(PLAIN)


def test_a_name_of_255_bytes_is_a_name() -> None:
    host = b".".join([b"a" * 49] * 5) + b".abcde"
    assert len(host) == 255
    read = parse(made(server_name(name(host))))
    assert read.sni == host.decode()
    assert read.fault is None


def test_a_post_quantum_hello_of_several_kilobytes_is_read() -> None:
    share = u16(0x11EC) + sized(2, bytes(1216))
    read = parse(
        with_extension(made(server_name(name(b"a.b")), (51, sized(2, share))), 0x42, bytes(9000))
    )
    assert (read.sni, read.fault, read.complete) == ("a.b", None, True)


def test_names_are_escaped_where_they_are_not_printable() -> None:
    read = parse(made(server_name(name(b"a\\b\x1b[2J\xff")), alpn(b"h\n2", b"\xff")))
    assert read.sni == "a\\\\b\\x1b[2J\\xff"
    assert read.alpn == ("h\\x0a2", "\\xff")


def test_an_empty_server_name_is_not_an_absent_one() -> None:
    read = parse(made((0, b"")))
    assert read.sni == ""
    assert read.fault is not None


@pytest.mark.parametrize(
    "record",
    [
        made(suites=u16(GREASE, 0x1301)),
        made((GREASE, b"")),
        made((43, sized(1, u16(GREASE, 0x0304)))),
        made((10, sized(2, u16(GREASE, 29)))),
        made((13, sized(2, u16(GREASE)))),
        made((51, sized(2, u16(GREASE) + sized(2, b"\0")))),
        made(alpn(b"\x8a\x8a", b"h2")),
    ],
    ids=["suite", "extension", "version", "group", "signature", "share", "alpn"],
)
def test_grease_is_seen_wherever_it_is(record: bytes) -> None:
    read = parse(record)
    assert read.grease
    assert read.fault is None


def test_ech_is_flagged_and_the_outer_name_told() -> None:
    read = parse(made(server_name(name(b"public.example")), ech()))
    assert (read.ech, read.sni, read.fault) == (True, "public.example", None)


FAULTS: list[tuple[str, bytes, int, str]] = [
    ("not a hello", b"GET / HTTP/1.1", 0, "record of type 71"),
    ("record version", b"\x16\x02\x00", 1, "version 2.x"),
    ("record minor", b"\x16\x03\x05", 2, "version 3.5"),
    ("empty record", b"\x16\x03\x01\0\0", 3, "record of 0 bytes"),
    ("long record", b"\x16\x03\x01\x40\x01", 3, "record of 16385 bytes"),
    ("server hello", PLAIN[:5] + b"\x02" + PLAIN[6:], 5, "message of type 2"),
    ("another record inside", as_records(PLAIN[5:], [100])[:105] + b"\x17\x03\x03", 105, "type 23"),
    ("huge", b"\x16\x03\x01\x00\x04\x01\x02\x00\x01", 6, "131073 bytes"),
    ("version", made(version=0x0203), 9, "version 0x0203"),
    ("session id", made(session=bytes(33)), 43, "33 bytes, at most 32"),
    ("no suites", made(suites=b""), 44, "cipher suites has 0 bytes"),
    ("odd suites", made(suites=b"\x13\x01\x02"), 44, "cipher suites has 3 bytes"),
    ("no compression", made(compression=b""), 48, "no compression"),
    ("behind the extensions", made((5, b""), trailing=b"\0\0"), 56, "2 bytes behind the end"),
    ("extensions too long", made(trailing=b"\0\x09\0\0"), 50, "extensions says 9 bytes"),
    ("extension cut", made(trailing=b"\0\x03\0\x05\0"), 54, "length of the extension 5: 1 of 2"),
    ("extension too long", made(trailing=b"\0\x04\0\x05\0\x01"), 54, "says 1 bytes"),
    ("twice", made((5, b""), (5, b"")), 56, "extension 5 twice"),
    ("psk not last", made((41, b""), (5, b"")), 56, "behind pre_shared_key"),
    ("name list", made((0, b"\0\x09" + name(b"a"))), 56, "server names says 9 bytes"),
    ("behind the names", made((0, sized(2, name(b"a")) + b"\0")), 62, "1 bytes behind the end"),
    ("no name", made((0, sized(2, b""))), 56, "no name"),
    ("name of nothing", made(server_name(name(b""))), 58, "no bytes"),
    ("two names", made(server_name(name(b"a"), name(b"b"))), 62, "two server names"),
    ("long name", made(server_name(name(b"a" * 256))), 58, "host name of 256 bytes"),
    ("foreign name", made(server_name(name(b"\xc3\xa4"))), 58, "not ASCII"),
    ("protocol list", made((16, b"\0\x05\x02h2")), 56, "protocol names says 5 bytes"),
    ("no protocol", made((16, sized(2, b""))), 56, "no protocol name"),
    ("protocol of nothing", made(alpn(b"h2", b"")), 61, "no bytes"),
    ("protocol too long", made((16, b"\0\x03\x05h2")), 58, "protocol name says 5 bytes"),
    ("odd versions", made((43, sized(1, b"\x03\x04\x03"))), 56, "versions has 3 bytes"),
    ("share of nothing", made((51, sized(2, u16(29, 0)))), 60, "no bytes"),
    ("inner ech", made(ech(kind=1)), 56, "ECH of type 1"),
    ("ech without payload", made(ech(payload=b"")), 96, "without payload"),
    ("sslv2 type", b"\x80\x2e\x02", 2, "type 2"),
    ("sslv2 version", sslv2(version=0x0400), 3, "version 0x0400"),
    ("sslv2 suites", sslv2(suites=8), 5, "8 bytes"),
    ("sslv2 session", sslv2(session=7), 7, "7 bytes"),
    ("sslv2 challenge", sslv2(challenge=33), 9, "33 bytes"),
    ("sslv2 length", b"\x80\x2f" + sslv2()[2:], 0, "says 47 bytes"),
]


@pytest.mark.parametrize(
    ("stream", "offset", "words"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS]
)
def test_the_first_fault_is_told_with_its_place(stream: bytes, offset: int, words: str) -> None:
    fault = parse(stream).fault
    assert fault is not None
    assert words in fault.what
    assert fault.offset == offset


def test_a_record_that_goes_on_behind_the_hello_is_a_fault() -> None:
    message = PLAIN[5:]
    fault = parse(as_records(message + b"\x01", [1 << 14])).fault
    assert fault is not None
    assert fault.offset == len(PLAIN)
    assert "behind the hello" in fault.what


def test_a_fault_in_one_extension_does_not_hide_the_next() -> None:
    read = parse(made(alpn(b""), server_name(name(b"a.example"))))
    assert read.sni == "a.example"
    assert read.fault is not None
    assert "protocol name" in read.fault.what


def test_of_a_repeated_extension_the_first_is_told() -> None:
    assert parse(made(server_name(name(b"a")), server_name(name(b"b")))).sni == "a"


def test_an_offset_counts_the_headers_of_all_records() -> None:
    whole = made((5, b""), (5, b""))
    split = as_records(whole[5:], [10])
    fault = parse(split).fault
    assert fault is not None
    assert fault.offset == 56 + 5 * ((56 - 5) // 10)


def test_the_sslv2_compatible_hello_is_read() -> None:
    read = parse(sslv2(suites=9, session=16, challenge=32))
    assert read == ClientHello(sslv2=True, legacy_version=0x0301, cipher_suites=3, missing=0)


@pytest.mark.parametrize(
    "stream",
    [
        PLAIN,
        BARE,
        as_records(PLAIN[5:], [7]),
        made((GREASE, b""), server_name(name(b"a.b")), alpn(b"h2"), ech()),
        sslv2(),
    ],
    ids=["openssl", "bare", "records", "grease", "sslv2"],
)
def test_a_hello_cut_anywhere_is_only_incomplete(stream: bytes) -> None:
    whole = parse(stream)
    missing = None
    for length in range(len(stream)):
        cut = parse(stream[:length])
        assert not cut.complete
        assert cut.fault is None
        assert cut.sni in (None, "", whole.sni)
        assert (cut.alpn or ()) == (whole.alpn or ())[: len(cut.alpn or ())]
        assert missing is None or cut.missing is not None
        assert missing is None or cut.missing <= missing
        missing = cut.missing
    assert whole.complete


def test_what_is_missing_is_counted_in_bytes_of_the_message() -> None:
    assert parse(PLAIN[:8]).missing is None
    assert parse(PLAIN[:-3]).missing == 3
    assert parse(sslv2()[:-3]).missing == 3


def flipped(dice: random.Random, stream: bytes) -> bytes:
    changed = bytearray(stream)
    for _ in range(dice.randrange(1, 6)):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut_out(dice: random.Random, stream: bytes) -> bytes:
    at = dice.randrange(len(stream))
    return stream[:at] + stream[at + dice.randrange(1, 20) :]


def noise(dice: random.Random, stream: bytes) -> bytes:
    return dice.randbytes(dice.randrange(len(stream)))


def noise_behind_headers(dice: random.Random, stream: bytes) -> bytes:
    return stream[:9] + dice.randbytes(len(stream) - 9)


@pytest.mark.parametrize("change", [flipped, cut_out, noise, noise_behind_headers])
def test_no_bytes_make_it_raise(change: Callable[[random.Random, bytes], bytes]) -> None:
    dice = random.Random(change.__name__)
    for _ in range(3000):
        stream = change(dice, dice.choice([PLAIN, as_records(PLAIN[5:], [33]), sslv2()]))
        read = parse(stream)
        assert read.fault is None or 0 <= read.fault.offset <= len(stream)
