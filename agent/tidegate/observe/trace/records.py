"""One record of each connection at each of its ends, made of what the programs tell. Pure: no I/O.

A record is finished when its first payload byte has come, when the connection ended before, or when nothing came for a
while. Memory is bounded; what was dropped for that is counted.
"""

import enum
import errno
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from tidegate.addresses import endpoint
from tidegate.model import FlowClass

_K = TypeVar("_K")
_V = TypeVar("_V")

MOST_CONNECTIONS = 65536
"""Connections that are followed at a time; as many as program.c follows."""
MOST_LANDINGS = 16384
"""Ends of connections that are remembered to tell where the other end went."""
PATIENCE_S = 10.0
"""A connection without payload is told after so long."""

_UNSPECIFIED = {False: "0.0.0.0", True: "::"}  # noqa: S104 - nothing is bound to it
_CONTAINER = re.compile(r"(?:^|[-/])([0-9a-f]{64})(?:\.scope)?(?:/|$)")


class Kind(enum.IntEnum):
    """What happened; enum kind of program.c."""

    CONNECTING = 1
    NOT_SENT = 2
    ESTABLISHED = 3
    LANDED = 4
    ACCEPTED = 5
    FIRST_BYTE = 6
    FIRST_READ = 7
    CLOSED = 8
    REFUSED_HERE = 9


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """Address and port; an IPv4-mapped address is written as IPv4."""

    address: str
    port: int

    def __str__(self) -> str:
        return endpoint(self.address, self.port)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What the programs tell; struct event of program.c."""

    kind: Kind
    at: int
    """CLOCK_MONOTONIC, nanoseconds."""
    socket: int
    """What tells a socket from others that are open."""
    netns: int
    local: Endpoint
    peer: Endpoint
    dialled: Endpoint = Endpoint("::", 0)
    """Port 0: not known."""
    listener_port: int = 0
    pid: int = 0
    uid: int = 0
    comm: str = ""
    cgroup: int = 0
    error: int = 0


class End(enum.StrEnum):
    """Which end of a connection a record tells of."""

    CONNECT = "connect"
    ACCEPT = "accept"


class Outcome(enum.StrEnum):
    """What became of a connection until it was told."""

    ESTABLISHED = "established"
    WAITING = "waiting"
    """Neither established nor given up."""
    FAILED = "failed"


class Redirected(enum.StrEnum):
    """Whether a connection goes elsewhere than was dialled."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """Who called, at that moment."""

    pid: int
    comm: str
    uid: int
    cgroup: int = 0
    """Number of its cgroup v2."""


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a connection, as far as sockets know."""

    end: End
    at: float
    """When it began, seconds since the Unix epoch: connect(2), or the end of the handshake."""
    netns: int
    process: Process
    local: Endpoint
    peer: Endpoint
    dialled: Endpoint
    """What the process asked for (connect), or the socket's own address (accept)."""
    listener_port: int
    """0 where it is not known."""
    outcome: Outcome
    error: int
    """errno of what failed, 0 for none."""
    handshake_s: float | None
    """connect: until the handshake was done. accept: from then until it was accepted."""
    first_byte_s: float | None
    """From the beginning to the first payload byte that was received; None: none was, until this was told."""
    at_read: bool = False
    """The first byte's time is that of its reading: its arrival was not seen."""

    @property
    def reason(self) -> str:
        """Why it failed, as the kernel's errors are named; "" when it did not."""
        if self.outcome is not Outcome.FAILED:
            return ""
        return errno.errorcode.get(self.error, str(self.error)) if self.error else "given up"


class Tracked(enum.Enum):
    """What connection tracking answers when it knows no addresses."""

    NOT = enum.auto()
    """It has no such connection."""
    NOT_ASKED = enum.auto()
    """It could not be asked."""


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """What was dialled and where that went, after all translation that is known."""

    redirected: Redirected
    dialled: Endpoint
    went: Endpoint | None
    """None where it is not known."""

    @classmethod
    def of(cls, dialled: Endpoint, went: Endpoint) -> "Whereabouts":
        """Where both are known."""
        redirected = Redirected.NO if went == dialled else Redirected.YES
        return cls(redirected=redirected, dialled=dialled, went=went)


class Traced(msgspec.Struct, frozen=True, kw_only=True):
    """All that is told of one end of a connection."""

    connection: Connection
    whereabouts: Whereabouts
    netns: str = ""
    """Name of the network namespace, or its number as in net:[4026531833]."""
    workload: str = ""
    container: str = ""
    flow_class: FlowClass | None = None
    """None where the connection was not seen on a wire that is observed."""


class _Open:
    """A connection that is not told yet."""

    def __init__(self, event: Event, end: End) -> None:
        self.end = end
        self.began = event
        self.ends = event
        self.process: Process | None = None
        self.listener_port = 0
        self.established: int | None = None
        self.accepted: int | None = None
        self.first_byte: int | None = None
        self.at_read = False
        self.closed = False
        self.error = 0

    @property
    def is_finished(self) -> bool:
        return self.closed or (self.first_byte is not None and self.process is not None)

    def told(self, monotonic_to_unix: float) -> Connection | None:
        """None for what nobody accepted."""
        if self.process is None:
            return None
        done = self.accepted if self.end is End.ACCEPT else self.established
        peer, dialled = self.ends.peer, self.began.dialled
        if not peer.port:
            peer = dialled
        if not dialled.port or dialled == Endpoint(_UNSPECIFIED[":" in dialled.address], peer.port):
            # Who dials the unspecified address means loopback (tcp_v4_connect, tcp_v6_connect).
            dialled = peer
        if self.established is not None:
            outcome = Outcome.ESTABLISHED
        else:
            outcome = Outcome.FAILED if self.closed else Outcome.WAITING
        return Connection(
            end=self.end,
            at=self.began.at / 1e9 + monotonic_to_unix,
            netns=self.began.netns,
            process=self.process,
            local=self.ends.local,
            peer=peer,
            dialled=dialled if self.end is End.CONNECT else self.ends.local,
            listener_port=self.listener_port,
            outcome=outcome,
            error=self.error,
            handshake_s=_seconds(self.began.at, done),
            first_byte_s=_seconds(self.began.at, self.first_byte),
            at_read=self.at_read,
        )


class Connections:
    """Takes events in the order of their times, and gives records of what is finished."""

    def __init__(self, monotonic_to_unix: float) -> None:
        """`monotonic_to_unix`: what to add to CLOCK_MONOTONIC for seconds since the Unix epoch."""
        self._offset = monotonic_to_unix
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._finished: list[_Open] = []
        self._landings: OrderedDict[tuple[int, Endpoint], tuple[float, Endpoint]] = OrderedDict()
        """By network namespace and client: when a connection arrived, and where."""
        self._arrived: OrderedDict[tuple[Endpoint, Endpoint], None] = OrderedDict()
        """Client and server of what was accepted on this machine, by the addresses of the server's socket."""
        self._dialled: OrderedDict[tuple[Endpoint, Endpoint], None] = OrderedDict()
        """The same of what was connected, by the addresses of the client's socket."""
        self.dropped = 0
        """Connections that were not told because too many were open."""
        self.not_accepted = 0
        """Connections that ended, or waited long, without a process that was seen to accept them."""

    def take(self, events: Iterable[Event]) -> None:
        """Takes in what happened."""
        for event in events:
            self._take(event)

    def finished(self, monotonic_ns: int) -> list[Connection]:
        """What is finished, or too old to wait for, at a time of CLOCK_MONOTONIC; told once."""
        oldest = monotonic_ns - int(PATIENCE_S * 1e9)
        while self._open:
            socket, first = next(iter(self._open.items()))
            if first.began.at > oldest:
                break
            self._finish(socket)
        return list(self._tell())

    def rest(self) -> list[Connection]:
        """Everything that was not told yet, finished or not."""
        # What has just arrived may be accepted yet: it is neither told nor counted.
        for socket, known in list(self._open.items()):
            if known.process is not None:
                self._finish(socket)
        return list(self._tell())

    def whereabouts(self, connection: Connection, tracked: Endpoint | Tracked) -> Whereabouts:
        """Where a connection went. `tracked` is what connection tracking of its network namespace says.

        That is where a connect went, or what was dialled of what was accepted.
        """
        match connection.end:
            case End.CONNECT:
                return self._of_connect(connection, tracked)
            case End.ACCEPT:
                return self._of_accept(connection, tracked)

    def _of_connect(self, connection: Connection, tracked: Endpoint | Tracked) -> Whereabouts:
        went: Endpoint | None = None
        if isinstance(tracked, Endpoint):
            went = tracked
        elif self._landed_at(connection) is not None:
            went = self._landed_at(connection)
        elif (connection.local, connection.peer) in self._arrived or (
            # The kernel keeps an open connection that it translates, and for seconds one that was reset.
            tracked is Tracked.NOT and connection.outcome is Outcome.ESTABLISHED
        ):
            went = connection.peer
        if went is not None:
            return Whereabouts.of(connection.dialled, went)
        # A program of a cgroup can give a socket another destination than was dialled.
        known = connection.dialled != connection.peer
        return Whereabouts(
            redirected=Redirected.YES if known else Redirected.UNKNOWN,
            dialled=connection.dialled,
            went=None,
        )

    def _of_accept(self, connection: Connection, tracked: Endpoint | Tracked) -> Whereabouts:
        own = connection.local
        if connection.listener_port not in (0, own.port):
            # A transparent socket keeps the address that was dialled.
            return Whereabouts.of(own, Endpoint(own.address, connection.listener_port))
        if isinstance(tracked, Endpoint):
            return Whereabouts.of(tracked, own)
        if tracked is Tracked.NOT or (connection.peer, own) in self._dialled:
            return Whereabouts.of(own, own)
        return Whereabouts(redirected=Redirected.UNKNOWN, dialled=own, went=own)

    def _landed_at(self, connection: Connection) -> Endpoint | None:
        """Where in its own network namespace the connection of a client arrived."""
        at, place = self._landings.get((connection.netns, connection.local), (0.0, None))
        # A port may have been another connection's before.
        return place if at >= connection.at else None

    def _take(self, event: Event) -> None:
        match event.kind:
            case Kind.CONNECTING:
                opened = self._begin(event, End.CONNECT)
                opened.process = _process(event)
            case Kind.NOT_SENT:
                failed = _Open(event, End.CONNECT)
                failed.process = _process(event)
                failed.closed, failed.error = True, event.error
                self._finished.append(failed)
            case Kind.LANDED:
                self._begin(event, End.ACCEPT).established = event.at
                self._land(event)
            case Kind.REFUSED_HERE:
                self._land(event)
            case Kind.ACCEPTED:
                # One that was waiting to be accepted before tracing began has no beginning but this.
                known = self._open.get(event.socket) or self._begin(event, End.ACCEPT)
                if known.established is None:
                    known.established = event.at
                known.process = _process(event)
                known.accepted = event.at
                known.listener_port = event.listener_port
                self._finish_if_done(event.socket, known)
            case Kind.ESTABLISHED | Kind.FIRST_BYTE | Kind.FIRST_READ | Kind.CLOSED:
                known_one = self._open.get(event.socket)
                if known_one is not None:
                    self._go_on(known_one, event)

    def _go_on(self, known: _Open, event: Event) -> None:
        if event.local.port:
            # A socket that is closed may have lost its addresses.
            known.ends = event
        match event.kind:
            case Kind.ESTABLISHED:
                known.established = event.at
                _put(self._dialled, (event.local, event.peer), None)
            case Kind.FIRST_BYTE | Kind.FIRST_READ:
                known.first_byte = event.at
                known.at_read = event.kind is Kind.FIRST_READ
            case _:
                known.closed, known.error = True, event.error
        self._finish_if_done(event.socket, known)

    def _begin(self, event: Event, end: End) -> _Open:
        # The end of a socket that is used again was lost.
        self._finish(event.socket)
        if len(self._open) >= MOST_CONNECTIONS:
            self._open.popitem(last=False)
            self.dropped += 1
        opened = _Open(event, end)
        self._open[event.socket] = opened
        return opened

    def _land(self, event: Event) -> None:
        at = event.at / 1e9 + self._offset
        _put(self._landings, (event.netns, event.peer), (at, event.local))
        _put(self._arrived, (event.peer, event.local), None)

    def _finish_if_done(self, socket: int, known: _Open) -> None:
        if known.is_finished:
            self._finish(socket)

    def _finish(self, socket: int) -> None:
        known = self._open.pop(socket, None)
        if known is not None:
            self._finished.append(known)

    def _tell(self) -> Iterator[Connection]:
        finished, self._finished = self._finished, []
        for one in finished:
            told = one.told(self._offset)
            if told is None:
                self.not_accepted += 1
            else:
                yield told


def container_in(cgroup_path: str) -> str:
    """The id of the container whose cgroup this is, as containerd, CRI-O, Docker and Podman name it; "" if of none."""
    found = _CONTAINER.search(cgroup_path)
    return found[1] if found else ""


def _process(event: Event) -> Process:
    return Process(pid=event.pid, comm=event.comm, uid=event.uid, cgroup=event.cgroup)


def _seconds(begin_ns: int, end_ns: int | None) -> float | None:
    return None if end_ns is None else max(end_ns - begin_ns, 0) / 1e9


def _put(table: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    """Enters what may push out what is oldest."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > MOST_LANDINGS:
        table.popitem(last=False)
