"""What the classifier takes from the traffic of a veth pair: the same traffic with it and without, in turns.

The client is this process, in the pod; the server is another one, in the node's namespace. The classifier is on
the node's end of the veth, as in production.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from pyroute2 import IPRoute

from tests.bench import peer
from tests.bench.measure import (
    Alternative,
    Bound,
    Limit,
    Measurement,
    Unit,
    interleaved,
    microseconds_each,
    seconds,
)
from tests.bench.site import NODE_IPV4, REPOSITORY, Pair, Site
from tidegate.kernel import netns
from tidegate.observe.classifier import Classifier, Side, consul_profile

_WORKLOAD = 0x7E57
_CHUNK = 1 << 20
_SUPER_SEGMENTS, _SEGMENTS = 768 << 20, 128 << 20
"""Bytes of one transfer, where the kernel passes super-segments on, and where it cuts them."""
_TRANSFERS = 12
_CONNECTIONS, _CONNECTION_ROUNDS = 250, 25
_REQUESTS, _REQUEST_ROUNDS = 500, 25
_REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
_DEADLINE_S = 30.0
_HELD = Limit(Bound.RATIO_AT_LEAST, 0.97)


def measure(part: str, site: Site) -> Iterator[Measurement]:
    """All measurements of traffic."""
    pair = site.pair()
    with contextlib.closing(Classifier.open(site.bpffs() / "veth")) as classifier:
        classifier.set_profile(consul_profile("bench.consul"))
        path = _Path(pair, classifier)

        def compare(
            title: str, unit: Unit, rounds: int, run: Callable[[], float], limit: Limit | None
        ) -> Measurement:
            alternatives = [
                Alternative("without the classifier", path.off(run)),
                Alternative("with the classifier", path.on(run), limit),
            ]
            return interleaved(part, title, unit, rounds, alternatives)

        with _serving(pair, "sink") as port:
            yield compare(
                "one TCP stream through veth",
                Unit.GIGABITS_PER_SECOND,
                _TRANSFERS,
                lambda: netns.run_in(pair.pod, _transfer, port, _SUPER_SEGMENTS),
                _HELD,
            )
            netns.run_in(pair.pod, _cut_segments)
            yield compare(
                "one TCP stream through veth, every packet of at most 1500 bytes",
                Unit.GIGABITS_PER_SECOND,
                _TRANSFERS,
                lambda: netns.run_in(pair.pod, _transfer, port, _SEGMENTS),
                None,
            )
        with _serving(pair, "answer") as port:
            yield compare(
                "connections: open, request, answer, close",
                Unit.PER_SECOND,
                _CONNECTION_ROUNDS,
                lambda: netns.run_in(pair.pod, _connections, port),
                _HELD,
            )
            yield compare(
                "request and answer on an open connection",
                Unit.MICROSECONDS,
                _REQUEST_ROUNDS,
                lambda: netns.run_in(pair.pod, _requests, port),
                None,
            )
        classifier.remove()


class _Path:
    """The way between pod and node, with the classifier in it or not."""

    def __init__(self, pair: Pair, classifier: Classifier) -> None:
        self._pair = pair
        self._classifier = classifier
        self._ifindex = netns.run_in(pair.node, socket.if_nametoindex, "host0")

    def off(self, run: Callable[[], float]) -> Callable[[], float]:
        """A sample without the classifier."""
        return run

    def on(self, run: Callable[[], float]) -> Callable[[], float]:
        """A sample with it; it has to have seen what happened."""

        def sample() -> float:
            attach = self._classifier.attach
            netns.run_in(self._pair.node, attach, _WORKLOAD, self._ifindex, Side.HOST, ())
            before = self._connections()
            try:
                value = run()
            finally:
                self._classifier.detach(_WORKLOAD)
            assert self._connections() > before
            return value

        return sample

    def _connections(self) -> int:
        return sum(edge.count.connections for edge in self._classifier.edges())


@contextlib.contextmanager
def _serving(pair: Pair, kind: str) -> Iterator[int]:
    """A server in the node's namespace; its port."""
    with netns.run_in(pair.node, socket.create_server, ("0.0.0.0", 0), backlog=1024) as listener:
        port: int = listener.getsockname()[1]
        server = subprocess.Popen(
            [sys.executable, "-m", peer.__name__, kind, str(listener.fileno())],
            cwd=REPOSITORY,
            pass_fds=[listener.fileno()],
        )
    try:
        yield port
    finally:
        server.kill()
        server.wait()


def _connect(port: int) -> socket.socket:
    return socket.create_connection((NODE_IPV4, port), _DEADLINE_S)


def _transfer(port: int, size: int) -> float:
    """Gbit/s of one stream, from its first byte until the server says that it has all."""
    with _connect(port) as connection, open(_zeros(), "rb") as zeros:
        started = time.perf_counter()
        for _ in range(size // _CHUNK):
            connection.sendfile(zeros, 0, _CHUNK)
        connection.shutdown(socket.SHUT_WR)
        _read_answer(connection)
        return size * 8 / (time.perf_counter() - started) / 1e9


def _zeros() -> int:
    """A file of one chunk, in memory."""
    descriptor = os.memfd_create("zeros")
    os.truncate(descriptor, _CHUNK)
    return descriptor


def _connections(port: int) -> float:
    """Connections per second, one after the other."""

    def all_of_them() -> None:
        for _ in range(_CONNECTIONS):
            with _connect(port) as connection:
                connection.sendall(_REQUEST)
                _read_answer(connection)

    return _CONNECTIONS / seconds(all_of_them)


def _requests(port: int) -> float:
    """Microseconds from a request to its answer."""
    with _connect(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def all_of_them() -> None:
            for _ in range(_REQUESTS):
                connection.sendall(_REQUEST)
                _read_answer(connection)

        return microseconds_each(_REQUESTS, all_of_them)


def _read_answer(connection: socket.socket) -> None:
    missing = len(peer.ANSWER)
    while missing:
        received = connection.recv(missing)
        if not received:
            raise ConnectionResetError("the server closed before its answer")
        missing -= len(received)


def _cut_segments() -> None:
    """Makes the pod's interface send packets of its own size only."""
    with IPRoute() as rtnetlink:
        (index,) = rtnetlink.link_lookup(ifname="eth0")
        rtnetlink.link("set", index=index, gso_max_segs=1)
