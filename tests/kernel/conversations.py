"""Callers that have TCP conversations of every class with pods, and know what has to be counted of them.

A caller holds both ends of its connections and goes on with one of them at a time: when a step is over, what one end
sent has been read at the other. So a seed says all that is said, however many callers there are at once.
"""

import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import pytest
from namespaces import DEADLINE_S, namespace
from packets import hello

from tidegate.kernel import links, netns
from tidegate.model import Direction, EdgeKey, FlowClass, Workload

TRUST_DOMAIN = "0a1b.consul"

_CLIENT, _SERVER = True, False
_MESH_HELLO = hello(f"api.default.dc1.internal.{TRUST_DOMAIN}")
_OTHER_HELLO = hello("pay.example.org")
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
"""PostgreSQL's."""
_OPENINGS: dict[FlowClass, Sequence[tuple[bool, bytes]]] = {
    FlowClass.EMPTY: (),
    FlowClass.PLAINTEXT: ((_CLIENT, b"GET / HTTP/1.1\r\n\r\n"),),
    FlowClass.TLS: ((_CLIENT, _OTHER_HELLO),),
    FlowClass.MESH: ((_CLIENT, _MESH_HELLO),),
    FlowClass.SERVER_FIRST: ((_SERVER, b"220 ready\r\n"), (_CLIENT, b"EHLO me\r\n")),
    FlowClass.STARTTLS: ((_CLIENT, _SSL_REQUEST), (_SERVER, b"S"), (_CLIENT, _OTHER_HELLO)),
}
"""Who says what first."""
_JOINED = ((_CLIENT, b"more\r\n"),)
"""What is said first where nobody saw the connection begin."""
_SIZES = (10, 1500, 40_000)
"""Bytes; the buffers of a new socket hold the most of them, so that no end waits for the other."""

_AT_ONCE = 6
_PEERS = 2
"""How many addresses of each family callers have, and are called at."""
_CLOSED_PORT = 9
_RESET = struct.pack("ii", 1, 0)
"""struct linger of a socket whose end is a RST."""


class Counted(NamedTuple):
    """What an edge has, or several have together."""

    connections: int = 0
    to_server: int = 0
    to_client: int = 0

    def plus(self, other: "Counted") -> "Counted":
        return Counted(*(one + more for one, more in zip(self, other, strict=True)))


class Announcing(Protocol):
    """Who has to know of pods."""

    def announce(self, workload: Workload) -> None:
        """Returns when it is observed."""

    def withdraw(self, workload: Workload) -> None: ...


class Progress:
    """How many conversations have ended; whoever waits for more is told."""

    def __init__(self, told: threading.Condition) -> None:
        self._told = told
        self.ended = 0

    def one_ended(self) -> None:
        with self._told:
            self.ended += 1
            self._told.notify_all()


class Conversation:
    """An open connection that will be of a class, and what its ends have still to say."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        opening: Sequence[tuple[bool, bytes]],
        chance: random.Random,
    ) -> None:
        self._client, self._server, self._chance = client, server, chance
        for end in (client, server):
            end.settimeout(DEADLINE_S)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._steps = self._talk(opening)
        self.counted = Counted(connections=1)

    def goes_on(self) -> bool:
        """Takes one step; whether it was not the last."""
        return next(self._steps, False)

    def _talk(self, opening: Sequence[tuple[bool, bytes]]) -> Iterator[bool]:
        """The opening in pieces, then anything, if it is to be more than an empty connection; and the end."""
        chance = self._chance
        for by_client, words in opening:
            while words:
                size = chance.choice((1, len(words), chance.randint(1, len(words))))
                self._say(by_client, words[:size])
                words = words[size:]
                yield True
        for _ in range(chance.randrange(6) if opening else 0):
            self._say(chance.random() < 0.5, bytes(chance.randint(1, chance.choice(_SIZES))))
            yield True
        first, last = chance.sample((self._client, self._server), 2)
        if chance.random() < 0.2:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        first.close()
        last.close()

    def _say(self, by_client: bool, words: bytes) -> None:
        """One end sends and the other reads."""
        ends = self._client, self._server
        sender, reader = ends if by_client else reversed(ends)
        sender.sendall(words)
        left = len(words)
        while left:
            received = reader.recv(left)
            assert received
            left -= len(received)
        more = Counted(to_server=len(words)) if by_client else Counted(to_client=len(words))
        self.counted = self.counted.plus(more)


class Caller:
    """Has conversations with pods, several at once, those that it opens and those that the pods open to it."""

    def __init__(
        self,
        node: str,
        number: int,
        observer: Announcing,
        progress: Progress,
        chance: random.Random,
    ) -> None:
        """`node`: the namespace in which the pods' links end, made by `node`. Numbers tell callers apart."""
        self._node, self._number, self._port = node, number, 8000 + number
        self._observer, self._progress, self._chance = observer, progress, chance
        self.edges: dict[EdgeKey, Counted] = {}
        """What has to be counted."""

    def call(self, pods: Sequence[int], conversations: int) -> None:
        """That many conversations with each of the pods, one pod after the other; then it goes."""
        with _listening(self._node, self._port) as in_node:
            for pod in pods:
                with self._pod(pod) as workload:
                    with _listening(workload.netns, self._port) as in_pod:
                        self._converse(workload, in_node, in_pod, conversations)
                    gone_first = self._chance.random() < 0.5
                    if not gone_first:
                        self._observer.withdraw(workload)
                if gone_first:
                    self._observer.withdraw(workload)

    def _converse(
        self, workload: Workload, in_node: socket.socket, in_pod: socket.socket, count: int
    ) -> None:
        """The first of them begins before the pod is observed."""

        def begin(flow_class: FlowClass, opening: Sequence[tuple[bool, bytes]]) -> None:
            source, destination, key = self._edge(workload, flow_class)
            listener = in_pod if destination.netns_path == workload.netns else in_node
            client = _connect(source, destination, self._port)
            server, _ = listener.accept()
            going_on.append((key, Conversation(client, server, opening, self._chance)))

        chance = self._chance
        going_on: list[tuple[EdgeKey, Conversation]] = []
        begin(FlowClass.UNKNOWN, _JOINED)
        self._observer.announce(workload)
        begun = 1
        while going_on or begun < count:
            has_room = len(going_on) < _AT_ONCE and begun < count
            if has_room and (not going_on or chance.random() < 0.3):
                begun += 1
                if chance.random() < 0.1:
                    self._be_refused(workload)
                else:
                    begin(*chance.choice(list(_OPENINGS.items())))
                continue
            at = chance.randrange(len(going_on))
            key, conversation = going_on[at]
            if not conversation.goes_on():
                del going_on[at]
                self._ended(key, conversation.counted)

    def _be_refused(self, workload: Workload) -> None:
        source, destination, key = self._edge(workload, FlowClass.EMPTY, _CLOSED_PORT)
        with pytest.raises(ConnectionRefusedError):
            _connect(source, destination, _CLOSED_PORT)
        self._ended(key, Counted(connections=1))

    def _ended(self, key: EdgeKey, counted: Counted) -> None:
        self.edges[key] = self.edges.get(key, Counted()).plus(counted)
        self._progress.one_ended()

    def _edge(
        self, workload: Workload, flow_class: FlowClass, port: int | None = None
    ) -> tuple["_End", "_End", EdgeKey]:
        """Where a connection comes from and goes to, and where it is counted."""
        version = self._chance.randrange(2)
        pod = _End(workload.netns, workload.addresses[version])
        peer = _End(self._node, _peers(self._chance.randint(1, _PEERS))[version])
        direction = self._chance.choice(list(Direction))
        ends = (peer, pod) if direction is Direction.INBOUND else (pod, peer)
        key = EdgeKey(
            workload=workload.key,
            direction=direction,
            peer=peer.address,
            port=port or self._port,
            flow_class=flow_class,
        )
        return *ends, key

    @contextmanager
    def _pod(self, number: int) -> Iterator[Workload]:
        with namespace() as inside:
            interface = f"host{number}"
            links.create_veth(inside, "eth0", self._node, interface)
            links.set_up(self._node, interface)
            links.set_up(inside, "eth0")
            for network, length, everything in (
                (f"10.77.{number}.", 24, "0.0.0.0/0"),
                (f"fd77:{number}::", 64, "::/0"),
            ):
                links.add_address(self._node, interface, f"{network}1/{length}")
                links.add_address(inside, "eth0", f"{network}2/{length}")
                links.add_route(inside, everything, gateway=f"{network}1")
            yield Workload(
                id=f"pod-{number}",
                name=f"pod-{number}",
                service="s",
                node="n",
                netns=inside,
                port=self._port,
                addresses=(f"10.77.{number}.2", f"fd77:{number}::2"),
            )


@contextmanager
def node_for_pods() -> Iterator[str]:
    """A namespace for the ends of pods' links, with addresses for those who speak with pods."""
    with namespace() as path:
        for number in range(1, _PEERS + 1):
            for address, length in zip(_peers(number), (32, 128), strict=True):
                links.add_address(path, "lo", f"{address}/{length}")
        yield path


class _End(NamedTuple):
    """Of a connection."""

    netns_path: str
    address: str


def _peers(number: int) -> tuple[str, str]:
    """The addresses of one who speaks with pods, IPv4 first."""
    return f"10.88.0.{number}", f"fd88::{number}"


@contextmanager
def _listening(netns_path: str, port: int) -> Iterator[socket.socket]:
    def listen() -> socket.socket:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    with netns.run_in(netns_path, listen) as listener:
        listener.settimeout(DEADLINE_S)
        yield listener


def _connect(source: _End, destination: _End, port: int) -> socket.socket:
    return netns.run_in(
        source.netns_path,
        socket.create_connection,
        (destination.address, port),
        DEADLINE_S,
        (source.address, 0),
    )
