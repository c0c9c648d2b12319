"""ClientHellos that come in chunks: whole ones, cut ones, and many at once."""

import ssl

import pytest

from tidegate.observe import hello, hellos
from tidegate.observe.classifier import HelloChunk
from tidegate.observe.hellos import HelloBook, Names


def hello_of(sni: str | None, alpn=()) -> bytes:
    context = ssl.create_default_context()
    if alpn:
        context.set_alpn_protocols(list(alpn))
    context.check_hostname = sni is not None
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=sni).do_handshake()
    return out.read()


def chunks(data: bytes, size: int, key: bytes = b"a", opened: int = 1) -> list[HelloChunk]:
    return [
        HelloChunk(key=key, opened_ns=opened, position=at, bytes=data[at : at + size])
        for at in range(0, len(data), size)
    ]


@pytest.mark.parametrize("size", [1, 100, 4096])
def test_the_names_of_a_hello_do_not_depend_on_its_chunks(size):
    book = HelloBook()
    book.take(chunks(hello_of("pay.example", ["h2", "http/1.1"]), size))
    assert book.names((b"a", 1)) == Names(sni="pay.example", alpn=("h2", "http/1.1"))


def test_a_hello_in_many_chunks_is_read_a_few_times(monkeypatch):
    read = []
    parse = hello.parse
    monkeypatch.setattr(hello, "parse", lambda data: read.append(len(data)) or parse(data))
    book = HelloBook()
    book.take(chunks(hello_of("pay.example", ["h2"] * 1000), 1))
    assert book.names((b"a", 1)).sni == "pay.example"
    assert len(read) < 50


def test_a_flow_without_a_hello_has_no_names():
    assert HelloBook().names((b"a", 1)) == Names()


def test_hellos_that_come_at_the_same_time_are_kept_apart():
    book = HelloBook()
    first, second = chunks(hello_of("a.example"), 50), chunks(hello_of("b.example"), 50, opened=2)
    for pair in zip(first, second, strict=True):
        book.take(pair)
    assert book.names((b"a", 1)).sni == "a.example"
    assert book.names((b"a", 2)).sni == "b.example"


def test_a_hello_that_ended_early_says_so_and_goes_on_when_the_rest_comes():
    book = HelloBook()
    all_of_it = chunks(hello_of("a.example"), 100)
    book.take(all_of_it[:-1])
    assert "hello_incomplete" in book.names((b"a", 1)).flags
    book.take(all_of_it[-1:])
    assert book.names((b"a", 1)) == Names(sni="a.example")


def test_behind_a_gap_nothing_is_read():
    book = HelloBook()
    data = hello_of("a.example")
    first, _, *rest = chunks(data, 40)
    book.take([first, *rest])
    assert book.names((b"a", 1)).flags == ("hello_incomplete",)


def test_a_hello_that_contradicts_itself_is_flagged():
    data = bytearray(hello_of(None))
    data[5 + 4 + 2 + 32] = 255
    book = HelloBook()
    book.take(chunks(bytes(data), 4096))
    assert "hello_malformed" in book.names((b"a", 1)).flags


def test_only_so_many_hellos_are_waited_for(monkeypatch):
    monkeypatch.setattr(hellos, "MAX_OPEN", 2)
    book = HelloBook()
    data = hello_of("a.example")
    for number in range(3):
        book.take(chunks(data, 100, opened=number)[:1])
    for number in range(3):
        book.take(chunks(data, 100, opened=number)[1:])
    told = [book.names((b"a", number)).flags for number in range(3)]
    assert told == [("hello_incomplete",), (), ()]


def test_names_beyond_a_limit_are_forgotten_oldest_first():
    book = HelloBook(limit=2)
    for number in range(3):
        book.take(chunks(hello_of(f"{number}.example"), 4096, opened=number))
    assert [book.names((b"a", number)).sni for number in range(3)] == [
        None,
        "1.example",
        "2.example",
    ]
