"""What the classifier takes from the traffic of a veth pair: the same traffic with it and without, in turns.

The client is this process, in the pod; the server is another one, in the node's namespace. The classifier is on
the node's end of the veth, as in production.

Whatever is attached, something is, also where there shall be no program on the way: to another interface, then. To
attach changes the kernel's code and empties caches, and what comes right behind it is slower for that.
"""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec.structs import replace
from pyroute2 import IPRoute
from tests.bench import peer
from tests.bench.measure import (
    Alternative,
    Bound,
    Limit,
    Measurement,
    Unit,
    from_samples,
    interleaved,
    seconds,
)
from tests.bench.site import NODE_IPV4, REPOSITORY, Pair, Site

from tidegate.kernel import links, netns
from tidegate.kernel.bpf import AttachType, Link, Program
from tidegate.observe.classifier import Classifier, Side, consul_profile

_WORKLOAD = 0x7E57
_CHUNK = 1 << 20
_ROUNDS, _FEW_ROUNDS = 60, 20
"""Of short samples: so all alternatives meet the machine in the same mood."""
_REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
_DEADLINE_S = 30.0
_HELD = Limit(Bound.RATIO_AT_LEAST, 0.97)

_libc = ctypes.CDLL(None)


class _Cost(NamedTuple):
    """What one sample of traffic took, in seconds."""

    wall: float
    processors: float
    """Of both ends together, interrupts that they were charged with included."""


class _Traffic(NamedTuple):
    """One kind of traffic: who makes it, and how much of it a sample is, in `unit`."""

    title: str
    made: "Callable[[_Path], contextlib.AbstractContextManager[Callable[[], _Cost]]]"
    """While there is a server: each call is a sample."""
    amount: float
    unit: Unit
    rounds: int
    limit: Limit | None = None


def measure(part: str, site: Site, nothing: Program) -> Iterator[Measurement]:
    """All measurements of traffic. `nothing` is an empty TC program."""
    pair = site.pair()
    with contextlib.closing(Classifier.open(site.bpffs() / "veth")) as classifier:
        classifier.set_profile(consul_profile("bench.consul"))
        path = _Path(pair, classifier, nothing)
        yield from _compare(part, path, _STREAM)
        if _has_iperf3():
            yield from _compare(part, path, _IPERF3)
        yield from _compare(part, path, _CONNECTIONS)
        yield from _compare(part, path, _REQUESTS)
        netns.run_in(pair.pod, _cut_segments)
        yield from _compare(part, path, _SMALL_STREAM)
        classifier.remove()


def not_measured() -> tuple[str, ...]:
    """What this machine does not allow to be measured."""
    missing = "flows by iperf3: there is no iperf3 program (Debian has it in iperf3)"
    return () if _has_iperf3() else (missing,)


def _has_iperf3() -> bool:
    return shutil.which("iperf3") is not None


def _compare(part: str, path: "_Path", traffic: _Traffic) -> Iterator[Measurement]:
    """The rate by the clock, and by the processor time that both ends needed."""
    spent: dict[str, list[float]] = {}
    with traffic.made(path) as run:

        def alternative(name: str, way: Way, limit: Limit | None = None) -> Alternative:
            spent[name] = []

            def sample() -> float:
                with way():
                    cost = run()
                spent[name].append(traffic.amount / cost.processors)
                return traffic.amount / cost.wall

            return Alternative(name, sample, limit)

        alternatives = [
            alternative("without the classifier", path.aside),
            alternative("with an empty program instead", path.empty),
            alternative("with the classifier", path.classified, traffic.limit),
        ]
        by_the_clock = [replace(each, limit=None) for each in alternatives]
        yield interleaved(part, traffic.title, traffic.unit, traffic.rounds, by_the_clock)
    yield from_samples(
        part,
        f"{traffic.title}, per second of both ends' processor time",
        traffic.unit,
        [(each, spent[each.name][-traffic.rounds :]) for each in alternatives],
    )


Way = Callable[[], contextlib.AbstractContextManager[None]]
"""What is on the veth while a sample is taken."""


class _Path:
    """The way between pod and node, and what is in it."""

    def __init__(self, pair: Pair, classifier: Classifier, nothing: Program) -> None:
        self._pair = pair
        self._classifier = classifier
        self._nothing = nothing
        self._ifindex = netns.run_in(pair.node, socket.if_nametoindex, "host0")
        links.create_veth(pair.node, "aside0", pair.node, "aside1")
        self._aside = netns.run_in(pair.node, socket.if_nametoindex, "aside0")

    @contextlib.contextmanager
    def classified(self) -> Iterator[None]:
        """With the classifier, which has to have seen what happened."""
        attach = self._classifier.attach
        netns.run_in(self._pair.node, attach, _WORKLOAD, self._ifindex, Side.HOST, ())
        before = self._seen()
        try:
            yield
        finally:
            self._classifier.detach(_WORKLOAD)
        assert self._seen() > before

    def empty(self) -> contextlib.AbstractContextManager[None]:
        """With an empty program both ways: what any program costs."""
        return self._with_nothing_on(self._ifindex)

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """With no program on the way, and an empty one where nothing passes."""
        return self._with_nothing_on(self._aside)

    @contextlib.contextmanager
    def _with_nothing_on(self, ifindex: int) -> Iterator[None]:
        with contextlib.ExitStack() as attached:
            for where in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS):
                link = netns.run_in(self._pair.node, Link.attach, self._nothing, ifindex, where)
                attached.enter_context(link)
                attached.callback(link.detach)
            yield

    def _seen(self) -> int:
        return sum(edge.count.connections for edge in self._classifier.edges())

    @contextlib.contextmanager
    def served(self, kind: str, run: Callable[[int], None]) -> Iterator[Callable[[], _Cost]]:
        """A server in the node's namespace; `run` is called in the pod's, with the server's port."""
        address = ("0.0.0.0", 0)
        with netns.run_in(self._pair.node, socket.create_server, address, backlog=1024) as listener:
            port: int = listener.getsockname()[1]
            server = netns.spawn(
                self._pair.node,
                [sys.executable, "-m", peer.__name__, kind, str(listener.fileno())],
                cwd=str(REPOSITORY),
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        try:
            yield lambda: netns.run_in(self._pair.pod, _cost, server.pid, run, port)
        finally:
            server.kill()
            server.wait()

    @contextlib.contextmanager
    def iperf3(self, megabytes: int) -> Iterator[Callable[[], _Cost]]:
        """A stream of iperf3's, by its own account."""
        serve = ["iperf3", "--server", "--forceflush"]
        server = netns.spawn(self._pair.node, serve, stdout=subprocess.PIPE, start_new_session=True)
        try:
            assert server.stdout is not None
            while b"Server listening" not in server.stdout.readline():
                assert server.poll() is None, "iperf3 ended at once"
            yield lambda: _iperf3(self._pair.pod, megabytes)
        finally:
            server.kill()
            server.communicate()


def _iperf3(pod: str, megabytes: int) -> _Cost:
    argv = ["iperf3", "--client", NODE_IPV4, "--bytes", f"{megabytes}M", "--json"]
    with netns.spawn(pod, argv, stdout=subprocess.PIPE) as client:
        told, _ = client.communicate(timeout=_DEADLINE_S)
    end = json.loads(told)["end"]
    wall, used = end["sum_received"]["seconds"], end["cpu_utilization_percent"]
    return _Cost(wall, wall * (used["host_total"] + used["remote_total"]) / 100)


def _cost(server: int, run: Callable[[int], None], port: int) -> _Cost:
    clock = _processor_clock(server)
    before, own = time.clock_gettime(clock), time.thread_time()
    wall = seconds(lambda: run(port))
    return _Cost(wall, time.clock_gettime(clock) - before + time.thread_time() - own)


def _processor_clock(pid: int) -> int:
    """The clock of a process's processor time, clock_getcpuclockid(3)."""
    clock = ctypes.c_int()
    result = _libc.clock_getcpuclockid(pid, ctypes.byref(clock))
    if result:
        raise OSError(result, os.strerror(result))
    return clock.value


def _connect(port: int) -> socket.socket:
    return socket.create_connection((NODE_IPV4, port), _DEADLINE_S)


def _transfer(size: int, port: int) -> None:
    """One stream, from its first byte until the server says that it has all."""
    with _connect(port) as connection, open(_zeros(), "rb") as zeros:
        for _ in range(size // _CHUNK):
            connection.sendfile(zeros, 0, _CHUNK)
        connection.shutdown(socket.SHUT_WR)
        _read_answer(connection)


def _zeros() -> int:
    """A file of one chunk, in memory."""
    descriptor = os.memfd_create("zeros")
    os.truncate(descriptor, _CHUNK)
    return descriptor


def _open_and_close(count: int, port: int) -> None:
    """Connections, one after the other, each with a request and an answer."""
    for _ in range(count):
        with _connect(port) as connection:
            connection.sendall(_REQUEST)
            _read_answer(connection)


def _ask(count: int, port: int) -> None:
    """Requests and answers on one connection."""
    with _connect(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            connection.sendall(_REQUEST)
            _read_answer(connection)


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


def _stream(title: str, megabytes: int, rounds: int, limit: Limit | None = None) -> _Traffic:
    size = megabytes * _CHUNK
    made = functools.partial(_Path.served, kind="sink", run=functools.partial(_transfer, size))
    return _Traffic(title, made, size * 8 / 1e9, Unit.GIGABITS_PER_SECOND, rounds, limit)


def _dialogue(
    title: str, count: int, run: Callable[[int, int], None], limit: Limit | None = None
) -> _Traffic:
    made = functools.partial(_Path.served, kind="answer", run=functools.partial(run, count))
    return _Traffic(title, made, count, Unit.PER_SECOND, _ROUNDS, limit)


_STREAM = _stream("one TCP stream through veth", 128, _ROUNDS, _HELD)
_IPERF3_MEGABYTES = 512
_IPERF3 = _Traffic(
    "one TCP stream of iperf3 through veth",
    functools.partial(_Path.iperf3, megabytes=_IPERF3_MEGABYTES),
    _IPERF3_MEGABYTES * _CHUNK * 8 / 1e9,
    Unit.GIGABITS_PER_SECOND,
    _FEW_ROUNDS,
    _HELD,
)
_SMALL_STREAM = _stream("one TCP stream, no packet larger than 1500 bytes", 16, _FEW_ROUNDS)
_CONNECTIONS = _dialogue("connections: open, request, answer, close", 100, _open_and_close, _HELD)
_REQUESTS = _dialogue("request and answer on an open connection", 200, _ask)
