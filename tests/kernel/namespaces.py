"""What kernel tests share: namespaces joined by veth, TCP servers in them, and clients that dial them."""

import ctypes
import errno
import ipaddress
import itertools
import os
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidegate.kernel import links, netns

DEADLINE_S = 10.0

# linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h
_SO_ORIGINAL_DST = 80
_IP6T_SO_ORIGINAL_DST = 80

_libc = ctypes.CDLL(None)
_numbers = itertools.count()


def needs_user_namespaces() -> None:
    """Skips a test where they cannot be made, as in a chroot."""
    tried = subprocess.run(
        ["unshare", "--user", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"user namespaces cannot be made here: {tried.stderr.strip()}")


def set_sysctl(path: str, name: str, value: str) -> None:
    """Write a setting of a namespace, such as net/ipv4/ip_forward: its parts are divided by slashes."""
    netns.run_in(path, Path("/proc/sys", name).write_text, value)


@contextmanager
def namespace() -> Iterator[str]:
    """Path of a new namespace with its loopback up and without duplicate address detection."""
    name = f"tg-test-{os.getpid()}-{next(_numbers)}"
    path = netns.create(name)
    try:
        set_sysctl(path, "net/ipv6/conf/default/accept_dad", "0")
        links.set_up(path, "lo")
        yield path
    finally:
        netns.delete(name)


@dataclass(frozen=True)
class Pair:
    """A pod and its peer: pod's eth0 <-> peer's host0, both families, routed by default to the peer."""

    pod: str
    peer: str
    pod_ipv4: str = "10.77.0.2"
    pod_ipv6: str = "fd77::2"
    peer_ipv4: str = "10.77.0.1"
    peer_ipv6: str = "fd77::1"

    def pod_address(self, version: int) -> str:
        return self.pod_ipv4 if version == 4 else self.pod_ipv6

    def peer_address(self, version: int) -> str:
        return self.peer_ipv4 if version == 4 else self.peer_ipv6


@contextmanager
def pair_of() -> Iterator[Pair]:
    """Two namespaces joined by a veth pair."""
    with namespace() as pod, namespace() as peer:
        made = Pair(pod, peer)
        links.create_veth(pod, "eth0", peer, "host0")
        links.set_up(pod, "eth0")
        links.set_up(peer, "host0")
        for prefix, in_pod, in_peer in (
            (24, made.pod_ipv4, made.peer_ipv4),
            (64, made.pod_ipv6, made.peer_ipv6),
        ):
            links.add_address(pod, "eth0", f"{in_pod}/{prefix}")
            links.add_address(peer, "host0", f"{in_peer}/{prefix}")
        links.add_route(pod, "0.0.0.0/0", gateway=made.peer_ipv4)
        links.add_route(pod, "::/0", gateway=made.peer_ipv6)
        yield made


@dataclass(frozen=True)
class Landing:
    """Where a connection landed, told by the server that accepted it."""

    server: str
    port: int
    """Port of the listener that accepted it."""
    original: tuple[str, int]
    """What the client dialled, by SO_ORIGINAL_DST."""
    client: str


@contextmanager
def serving(netns_path: str, name: str, ports: Iterable[int]) -> Iterator[None]:
    """TCP servers in the namespace, on each port for both families: they greet, then echo."""
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(netns.run_in(netns_path, _listener, port)) for port in ports
        ]
        wake_server, wake = socket.socketpair()
        stack.enter_context(wake_server)
        thread = threading.Thread(target=_serve, args=(name, listeners, wake_server))
        thread.start()
        try:
            yield
        finally:
            wake.close()
            thread.join()


def dial(
    netns_path: str, address: str, port: int, *, uid: int = 0, source_port: int = 0
) -> tuple[socket.socket, Landing]:
    """Connect from inside a namespace as a user; the open socket and where it landed."""
    connection = netns.run_in(netns_path, _connect, address, port, uid, source_port)
    return connection, _landing(connection)


def landing(netns_path: str, address: str, port: int, *, uid: int = 0) -> Landing:
    """Where a connection lands; it is closed again."""
    connection, landed = dial(netns_path, address, port, uid=uid)
    connection.close()
    return landed


def echoes(connection: socket.socket) -> bool:
    """Whether the server at the other end still answers."""
    connection.sendall(b"ping\n")
    return connection.recv(16) == b"ping\n"


def eventually(condition: Callable[[], object]) -> None:
    """Asks again and again until it is so; fails after DEADLINE_S."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"


def tell(config: pytest.Config, *lines: str) -> None:
    """Show lines in the output of the test run, whether or not it captures what tests print."""
    capturing = config.pluginmanager.getplugin("capturemanager")
    report = config.pluginmanager.getplugin("terminalreporter")
    with capturing.global_and_fixture_disabled():
        report.ensure_newline()
        for line in lines:
            report.write_line(line)


def open_descriptors() -> int:
    """How many file descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _listener(port: int) -> socket.socket:
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
    )


def _serve(name: str, listeners: list[socket.socket], wake: socket.socket) -> None:
    accepted: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        for readable in (*listeners, wake):
            selector.register(readable, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is wake:
                    for connection in accepted:
                        connection.close()
                    return
                if ready in listeners:
                    connection, _ = ready.accept()
                    connection.sendall(_greeting(name, connection))
                    accepted.add(connection)
                    selector.register(connection, selectors.EVENT_READ)
                elif not _echo(ready):
                    selector.unregister(ready)
                    accepted.remove(ready)
                    ready.close()


def _echo(connection: socket.socket) -> bool:
    try:
        data = connection.recv(4096)
        connection.sendall(data)
    except ConnectionError:
        return False
    return bool(data)


def _greeting(name: str, connection: socket.socket) -> bytes:
    client = on_the_wire(connection.getpeername()[0])
    address, port = original_destination(connection)
    return f"{name} {connection.getsockname()[1]} {address} {port} {client}\n".encode()


def original_destination(
    connection: socket.socket,
) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """What the client of an accepted connection dialled: SO_ORIGINAL_DST, or else the socket's own address.

    The latter is where there is no nat, and so what a transparent socket is reached by.
    """
    try:
        if on_the_wire(connection.getpeername()[0]).version == 4:
            answer = connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
            port, packed = struct.unpack_from("!2xH4s", answer)
        else:
            answer = connection.getsockopt(socket.IPPROTO_IPV6, _IP6T_SO_ORIGINAL_DST, 28)
            port, packed = struct.unpack_from("!2xH4x16s", answer)
    except OSError as error:
        # Without nat rules in the namespace the connection is not tracked, and not redirected; and a kernel whose
        # module for that nobody has needed does not know the question.
        if error.errno not in (errno.ENOENT, errno.ENOPROTOOPT):
            raise
        address, port = connection.getsockname()[:2]
        return on_the_wire(address), port
    return ipaddress.ip_address(packed), port


def on_the_wire(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address without its zone; an IPv4-mapped one as IPv4."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _connect(address: str, port: int, uid: int, source_port: int) -> socket.socket:
    # The kernel asks for the file system user id with which a socket was opened, and that is the
    # thread's: the calling thread is one that run_in made, and it ends right after this.
    _libc.setfsuid(uid)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(DEADLINE_S)
        # Lets a second connection, to another port, have the same source port.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind(("", source_port))
        connection.connect(socket.getaddrinfo(address, port, family)[0][4])
    except OSError:
        connection.close()
        raise
    return connection


def _landing(connection: socket.socket) -> Landing:
    greeting = b""
    while not greeting.endswith(b"\n"):
        received = connection.recv(256)
        if not received:
            raise ConnectionResetError("closed before the greeting")
        greeting += received
    server, port, original, original_port, client = greeting.decode().split()
    return Landing(server, int(port), (original, int(original_port)), client)
