"""Small servers that speak the beginning of a protocol as its RFC has it, up to and after its change to TLS.

Each is a dialect: what the server says first, and what it answers to what it reads. They stand in for mail, directory,
chat and file servers, of which none is small.
"""

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass

DEADLINE_S = 10.0


@dataclass(frozen=True)
class Answer:
    """What is said once what was read matches, and whether TLS begins after it."""

    to: bytes
    """Regular expression."""
    text: bytes
    tls: bool = False


@dataclass(frozen=True)
class Dialect:
    port: int
    greeting: bytes
    answers: tuple[Answer, ...]
    """The first that matches counts."""


_LDAP_STARTTLS = rb"1\.3\.6\.1\.4\.1\.1466\.20037"
_STREAM = (
    b"<?xml version='1.0'?><stream:stream xmlns='jabber:client' from='chat.example' id='1' version='1.0'"
    b" xmlns:stream='http://etherx.jabber.org/streams'>"
)
_STARTTLS = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'>"

DIALECTS = {
    # RFC 3207, RFC 5321
    "smtp": Dialect(
        25,
        b"220 mail.example ESMTP\r\n",
        (
            Answer(rb"EHLO.*\r\n", b"250-mail.example\r\n250-STARTTLS\r\n250 HELP\r\n"),
            Answer(rb"STARTTLS\r\n", b"220 Ready to start TLS\r\n", tls=True),
            Answer(rb"HELP.*\r\n", b"214 See RFC 5321\r\n"),
            Answer(rb"QUIT\r\n", b"221 Bye\r\n"),
        ),
    ),
    # RFC 3501 section 6.2.1
    "imap": Dialect(
        143,
        b"* OK [CAPABILITY IMAP4rev1 STARTTLS] ready\r\n",
        (
            Answer(rb"(\S+) CAPABILITY\r\n", b"* CAPABILITY IMAP4rev1 STARTTLS\r\n\\1 OK done\r\n"),
            Answer(rb"(\S+) STARTTLS\r\n", b"\\1 OK begin TLS\r\n", tls=True),
            Answer(rb"(\S+) LOGOUT\r\n", b"* BYE\r\n\\1 OK done\r\n"),
            Answer(rb"(\S+) .*\r\n", b"\\1 OK done\r\n"),
        ),
    ),
    # RFC 2595 section 4
    "pop3": Dialect(
        110,
        b"+OK ready\r\n",
        (
            Answer(rb"CAPA\r\n", b"+OK\r\nSTLS\r\nUSER\r\n.\r\n"),
            Answer(rb"STLS\r\n", b"+OK begin TLS\r\n", tls=True),
            Answer(rb"QUIT\r\n", b"+OK bye\r\n"),
            Answer(rb".*\r\n", b"-ERR no\r\n"),
        ),
    ),
    # RFC 4217 section 4
    "ftp": Dialect(
        21,
        b"220 files.example\r\n",
        (
            Answer(rb"FEAT\r\n", b"211-Features\r\n AUTH TLS\r\n211 End\r\n"),
            Answer(rb"AUTH (TLS|SSL)\r\n", b"234 Proceed\r\n", tls=True),
            Answer(rb"QUIT\r\n", b"221 Bye\r\n"),
            Answer(rb".*\r\n", b"530 Please log in\r\n"),
        ),
    ),
    # RFC 4511 section 4.14: the request's name is in it as text.
    "ldap": Dialect(
        389,
        b"",
        (
            Answer(
                _LDAP_STARTTLS,
                b"\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\x00\x04\x00\x04\x00",
                tls=True,
            ),
        ),
    ),
    # RFC 6120 section 5
    "xmpp": Dialect(
        5222,
        b"",
        (
            Answer(
                rb"<stream:stream [^>]*>",
                _STREAM
                + b"<stream:features>"
                + _STARTTLS
                + b"<required/></starttls></stream:features>",
            ),
            Answer(
                rb"<starttls [^>]*>",
                b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
                tls=True,
            ),
        ),
    ),
    # RFC 9110 section 9.3.6; what is behind the proxy is TLS.
    "connect": Dialect(
        3128,
        b"",
        (Answer(rb"CONNECT [^\r]*\r\n(.+\r\n)*\r\n", b"HTTP/1.1 200 OK\r\n\r\n", tls=True),),
    ),
}


@contextlib.contextmanager
def speaking(dialect: Dialect, tls: ssl.SSLContext) -> Iterator[None]:
    """A server of a dialect on all addresses of the calling thread's network namespace."""
    listener = socket.create_server(
        ("::", dialect.port), family=socket.AF_INET6, dualstack_ipv6=True
    )
    thread = threading.Thread(target=_accept, args=(listener, dialect, tls))
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def _accept(listener: socket.socket, dialect: Dialect, tls: ssl.SSLContext) -> None:
    """One connection after the other, as the cases come."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        # A client that goes away in the middle is no fault of the server's.
        with contextlib.suppress(OSError):
            _speak(connection, dialect, tls)


def _speak(connection: socket.socket, dialect: Dialect, tls: ssl.SSLContext) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: connection.close())
        connection.settimeout(DEADLINE_S)
        connection.sendall(dialect.greeting)
        said = b""
        while received := connection.recv(4096):
            said += received
            for answer in dialect.answers:
                if match := re.search(answer.to, said):
                    said = said[match.end() :]
                    connection.sendall(
                        match.expand(answer.text) if b"\\1" in answer.text else answer.text
                    )
                    if answer.tls:
                        connection = tls.wrap_socket(connection, server_side=True)
                    break
