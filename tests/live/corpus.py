"""The corpus: real clients, what each is told to do, and what its connection is.

One list for everybody who looks: the live classifier, tshark, and `tidegate classify` on the capture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from place import Place
from servers import (
    CLOSED,
    HTTP,
    HTTP_PROXIED,
    HTTPS,
    HTTPS_PROXIED,
    MESH_HTTP1,
    MESH_HTTP2,
    MESH_SNI,
    MESH_TCP,
    MYSQL,
    NO_ALPN,
    POSTGRES,
    POSTGRES_PLAIN,
    REDIS,
    REDIS_TLS,
    SSH,
    TLS,
    TLS12,
)
from speakers import DIALECTS

from tidegate.model import FlowClass, Hint

RAW = str(Path(__file__).parent / "raw.py")
NAME = "server.example"


@dataclass(frozen=True)
class Seen:
    """What one connection is."""

    flow_class: FlowClass
    hint: Hint | None = None
    sni: str | None = None
    alpn: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    """Of PROXY and SSLV2, in lower case."""


@dataclass(frozen=True)
class Case:
    """One client and its connections, in the order in which it opens them."""

    name: str
    command: Callable[[Place], list[str]]
    seen: tuple[Seen, ...]
    status: frozenset[int] = frozenset({0})
    """Exit statuses of a client that got as far as it should."""
    environment: Mapping[str, str] = field(default_factory=dict)
    says: str = ""
    """What the client's output has when it was served."""
    needs: str = ""
    """A program of the machine's that is not fetched; without it the case is left out."""
    either: FlowClass | None = None
    """The other right class where both ends speak at once, and the wire decides who was first."""


def _s_client(*options: str, port: int = TLS) -> Callable[[Place], list[str]]:
    return lambda place: [
        *(place.packages.program("openssl"), "s_client", "-connect", f"{place.ipv4}:{port}"),
        *options,
    ]


def _curl(url: str, *options: str, version: int = 4) -> Callable[[Place], list[str]]:
    """In a URL, HOST is the servers' address."""

    def command(place: Place) -> list[str]:
        host = place.ipv4 if version == 4 else f"[{place.ipv6}]"
        # --noproxy, --disable: whatever the machine has set up is not for here.
        common = ("--disable", "--silent", "--show-error", "--insecure", "--max-time", "20")
        resolve = f"{NAME}:{HTTPS}:{place.ipv4}"
        return [
            *(place.packages.program("curl"), *common, "--resolve", resolve, *options),
            url.replace("HOST", host),
        ]

    return command


def _raw(port: int, *segments: bytes) -> Callable[[Place], list[str]]:
    texts = [segment.hex() for segment in segments]
    return lambda place: ["/usr/bin/python3", RAW, place.ipv4, str(port), *texts]


def _psql(mode: str, port: int = POSTGRES) -> Callable[[Place], list[str]]:
    return lambda place: [
        str(place.packages.path("/usr/lib/postgresql/15/bin/psql")),
        "--no-psqlrc",
        f"host={NAME} hostaddr={place.ipv4} port={port} user=app dbname=postgres sslmode={mode}",
        "--command=select 'served'",
    ]


def _mariadb(*options: str) -> Callable[[Place], list[str]]:
    return lambda place: [
        *(place.packages.program("mariadb"), "--no-defaults", "--protocol=tcp", "--user=app"),
        *(f"--host={place.ipv4}", f"--port={MYSQL}", *options, "--execute=select 'served'"),
    ]


def _redis(port: int, *options: str) -> Callable[[Place], list[str]]:
    return lambda place: [
        *(place.packages.program("redis-cli"), "-h", place.ipv4, "-p", str(port), *options, "ping"),
    ]


def _ssh(place: Place) -> list[str]:
    return [
        *(place.packages.program("ssh"), "-F", "/dev/null", "-p", str(SSH), "-o", "BatchMode=yes"),
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
        *("-o", "IdentityFile=/dev/null", f"nobody@{place.ipv4}", "true"),
    ]


def _go(url: str, port: int) -> Callable[[Place], list[str]]:
    return lambda place: [str(place.directory / "client-go"), url, f"{place.ipv4}:{port}"]


def _java(place: Place) -> list[str]:
    return ["java", str(Path(__file__).parent / "Client.java"), NAME, place.ipv4, str(HTTPS)]


def _s_client_starttls(protocol: str) -> Case:
    """openssl s_client against the small server of a protocol; the server's first words make its class."""
    return Case(
        f"s_client -starttls {protocol}",
        _s_client("-starttls", protocol, "-servername", NAME, port=DIALECTS[protocol].port),
        (Seen(FlowClass.STARTTLS, sni=NAME),),
    )


def _plain(hint: Hint | None = None) -> tuple[Seen, ...]:
    return (Seen(FlowClass.PLAINTEXT, hint),)


def _tls(sni: str | None = None, *alpn: str) -> tuple[Seen, ...]:
    return (Seen(FlowClass.TLS, sni=sni, alpn=alpn),)


def _mesh(*alpn: str) -> tuple[Seen, ...]:
    return (Seen(FlowClass.MESH, sni=MESH_SNI, alpn=alpn),)


_H2 = ("h2", "http/1.1")
_HELLO = "hello"
_SERVED = "served"
_REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
_PROXY_V2 = (
    b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11\0\x0c" + bytes((192, 0, 2, 1, 192, 0, 2, 2, 4, 1, 1, 187))
)
# An SSLv2-compatible hello (RFC 5246 appendix E.2): TLS 1.2, three cipher specs, 16 bytes of challenge.
_SSLV2 = b"\x80\x22\x01\x03\x03\0\x09\0\0\0\x10\0\0\x2f\0\0\x35\0\xc0\x2f" + bytes(range(16))
_SSLV2 = bytes((0x80, len(_SSLV2) - 2)) + _SSLV2[2:]

CASES: tuple[Case, ...] = (
    # OpenSSL
    Case("TLS 1.3", _s_client("-tls1_3", "-servername", NAME), _tls(NAME)),
    Case("TLS 1.2", _s_client("-tls1_2", "-servername", NAME, port=TLS12), _tls(NAME)),
    Case("TLS 1.3 without SNI", _s_client("-tls1_3", "-noservername"), _tls()),
    Case("TLS 1.2 without SNI", _s_client("-tls1_2", "-noservername", port=TLS12), _tls()),
    Case("TLS with ALPN", _s_client("-servername", NAME, "-alpn", "h2,http/1.1"), _tls(NAME, *_H2)),
    Case(
        "TLS with ALPN and no SNI",
        _s_client("-noservername", "-alpn", "istio", port=NO_ALPN),
        _tls(None, "istio"),
    ),
    Case(
        "TLS with ALPN that the server does not know",
        _s_client("-servername", NAME, "-alpn", "x", port=NO_ALPN),
        _tls(NAME, "x"),
    ),
    Case("TLS with the mesh's SNI", _s_client("-servername", MESH_SNI), _mesh()),
    Case(
        "TLS with the mesh's SNI in capitals",
        _s_client("-servername", MESH_SNI.upper()),
        (Seen(FlowClass.MESH, sni=MESH_SNI.upper()),),
    ),
    Case(
        "TLS with the longest name",
        _s_client("-servername", ".".join(["a" * 62] * 4) + ".ab"),
        _tls(".".join(["a" * 62] * 4) + ".ab"),
    ),
    *(_s_client_starttls(each) for each in ("smtp", "imap", "pop3", "ftp", "ldap", "xmpp")),
    Case(
        "s_client -starttls postgres",
        _s_client("-starttls", "postgres", "-servername", NAME, port=POSTGRES),
        (Seen(FlowClass.STARTTLS, Hint.POSTGRES, NAME),),
    ),
    Case(
        "s_client -starttls mysql",
        _s_client("-starttls", "mysql", "-servername", NAME, port=MYSQL),
        (Seen(FlowClass.STARTTLS, Hint.MYSQL, NAME),),
    ),
    Case(
        "s_client through a proxy",
        _s_client("-proxy", f"10.77.0.2:{DIALECTS['connect'].port}", "-servername", NAME),
        (Seen(FlowClass.STARTTLS, Hint.HTTP1, NAME),),
    ),
    # curl
    Case("curl http", _curl(f"http://HOST:{HTTP}/"), _plain(Hint.HTTP1), says=_HELLO),
    Case(
        "curl http IPv6", _curl(f"http://HOST:{HTTP}/", version=6), _plain(Hint.HTTP1), says=_HELLO
    ),
    Case(
        "curl http/1.0",
        _curl(f"http://HOST:{HTTP}/", "--http1.0"),
        _plain(Hint.HTTP1),
        status=frozenset({0, 22}),
    ),
    Case("curl upgrade to h2c", _curl(f"http://HOST:{HTTP}/", "--http2"), _plain(Hint.HTTP1)),
    Case(
        "curl h2c",
        _curl(f"http://HOST:{HTTP}/", "--http2-prior-knowledge"),
        _plain(Hint.H2C),
        says=_HELLO,
    ),
    Case(
        "curl https",
        _curl(f"https://{NAME}:{HTTPS}/", "--http1.1"),
        _tls(NAME, "http/1.1"),
        says=_HELLO,
    ),
    Case("curl h2", _curl(f"https://{NAME}:{HTTPS}/", "--http2"), _tls(NAME, *_H2), says=_HELLO),
    Case(
        "curl https without a name", _curl(f"https://HOST:{HTTPS}/"), _tls(None, *_H2), says=_HELLO
    ),
    Case(
        "curl https IPv6", _curl(f"https://HOST:{HTTPS}/", version=6), _tls(None, *_H2), says=_HELLO
    ),
    Case(
        "curl http behind the PROXY protocol",
        _curl(f"http://HOST:{HTTP_PROXIED}/", "--haproxy-protocol"),
        (Seen(FlowClass.PLAINTEXT, Hint.HTTP1, flags=frozenset({"proxy"})),),
        says=_HELLO,
    ),
    Case(
        "curl https behind the PROXY protocol",
        _curl(f"https://HOST:{HTTPS_PROXIED}/", "--haproxy-protocol", "--http1.1"),
        (Seen(FlowClass.TLS, alpn=("http/1.1",), flags=frozenset({"proxy"})),),
        says=_HELLO,
    ),
    Case("curl smtp", _curl("smtp://HOST/"), (Seen(FlowClass.SERVER_FIRST),)),
    Case("curl smtp with TLS", _curl("smtp://HOST/", "--ssl-reqd"), (Seen(FlowClass.STARTTLS),)),
    Case(
        "curl pop3 with TLS",
        _curl("pop3://HOST/", "--ssl-reqd"),
        (Seen(FlowClass.STARTTLS),),
        status=frozenset({0, 8, 67}),
    ),
    Case(
        "curl imap with TLS",
        _curl("imap://HOST/", "--ssl-reqd"),
        (Seen(FlowClass.STARTTLS),),
        status=frozenset({0, 21, 67, 78}),
    ),
    # Databases and caches
    Case("psql without TLS", _psql("disable"), _plain(Hint.POSTGRES), says=_SERVED),
    Case(
        "psql with TLS",
        _psql("require"),
        (Seen(FlowClass.STARTTLS, Hint.POSTGRES, NAME),),
        says=_SERVED,
    ),
    Case(
        "psql that prefers TLS",
        _psql("prefer"),
        (Seen(FlowClass.STARTTLS, Hint.POSTGRES, NAME),),
        says=_SERVED,
    ),
    Case(
        "psql that prefers TLS and gets none",
        _psql("prefer", POSTGRES_PLAIN),
        _plain(Hint.POSTGRES),
        says=_SERVED,
    ),
    Case(
        "mariadb without TLS",
        _mariadb("--skip-ssl"),
        (Seen(FlowClass.SERVER_FIRST, Hint.MYSQL),),
        says=_SERVED,
    ),
    Case(
        "mariadb with TLS", _mariadb("--ssl"), (Seen(FlowClass.STARTTLS, Hint.MYSQL),), says=_SERVED
    ),
    Case("redis-cli", _redis(REDIS), _plain(Hint.REDIS), says="PONG"),
    Case("redis-cli with TLS", _redis(REDIS_TLS, "--tls", "--insecure"), _tls(), says="PONG"),
    Case(
        "redis-cli with TLS and SNI",
        _redis(REDIS_TLS, "--tls", "--insecure", "--sni", NAME),
        _tls(NAME),
        says="PONG",
    ),
    Case(
        "ssh",
        _ssh,
        _plain(Hint.SSH),
        # Nobody is let in.
        status=frozenset({255}),
        says="Permission denied",
        either=FlowClass.SERVER_FIRST,
    ),
    # The mesh's own: curl speaks to the sidecar, which makes the connection.
    Case("Envoy HTTP/1", _curl(f"http://127.0.0.1:{MESH_HTTP1}/"), _mesh("http/1.1"), says=_HELLO),
    Case("Envoy HTTP/2", _curl(f"http://127.0.0.1:{MESH_HTTP2}/"), _mesh("h2"), says=_HELLO),
    Case("Envoy TCP", _curl(f"http://127.0.0.1:{MESH_TCP}/"), _mesh(), says=_HELLO),
    # What no common client sends
    Case("nothing", _raw(HTTP), (Seen(FlowClass.EMPTY),)),
    Case("refused", _raw(CLOSED), (Seen(FlowClass.EMPTY),), status=frozenset({1})),
    Case("HTTP in two segments", _raw(HTTP, _REQUEST[:2], _REQUEST[2:]), _plain(Hint.HTTP1)),
    Case(
        "HTTP in one segment per byte",
        _raw(HTTP, *(bytes([each]) for each in _REQUEST)),
        _plain(Hint.HTTP1),
    ),
    Case(
        "PROXY protocol version 2",
        _raw(HTTP_PROXIED, _PROXY_V2, _REQUEST),
        (Seen(FlowClass.PLAINTEXT, Hint.HTTP1, flags=frozenset({"proxy"})),),
    ),
    Case(
        "SSLv2-compatible hello",
        _raw(NO_ALPN, _SSLV2),
        (Seen(FlowClass.TLS, flags=frozenset({"sslv2"})),),
    ),
    Case("a TLS record that is no hello", _raw(NO_ALPN, b"\x15\x03\x01\0\x02\x01\0"), _plain()),
    # Other implementations of TLS, where they are at hand: too large to be fetched for one connection each
    Case("Go http", _go(f"http://{NAME}/", HTTP), _plain(Hint.HTTP1), says=_HELLO, needs="go"),
    Case("Go https", _go(f"https://{NAME}/", HTTPS), _tls(NAME, *_H2), says=_HELLO, needs="go"),
    Case("Java", _java, _tls(NAME, "http/1.1"), says=_HELLO, needs="javac"),
)
