"""From the kernel's counters to what was added to each edge: the ledger's memory between two rounds.

Counters are cumulative, edges are sums of counters. What was told last and what is in the file are kept for each
counter, so that a round that could not be written is in the next one's difference, and nothing is in two. Pure: what
is written, and when, is the ledger's.
"""

from collections.abc import Container, Iterable

import msgspec

from tidegate.model import CountedEdge, Direction, EdgeCount, EdgeKey, FlowClass, Hint

HINT_BITS: dict[Hint, int] = {
    Hint.HTTP1: 1 << 0,
    Hint.H2C: 1 << 1,
    Hint.POSTGRES: 1 << 2,
    Hint.MYSQL: 1 << 3,
    Hint.REDIS: 1 << 4,
    Hint.KAFKA: 1 << 5,
    Hint.SSH: 1 << 6,
    Hint.AMQP: 1 << 7,
    Hint.MONGODB: 1 << 8,
    Hint.CASSANDRA: 1 << 9,
}
"""How hints are stored. A number that was given to one is never another's."""

NO_SLOT = -1
"""The slot of a counter that went away with its map, in what is stored of its last counts."""


class Total(msgspec.Struct, gc=False):
    """What was added to all edges of one direction and class since this process counts.

    Connections leave a class when they turn out to be of another one: a sum can go down.
    """

    connections: int = 0
    to_server: int = 0
    to_client: int = 0


class EdgeState(msgspec.Struct, gc=False):
    """One edge that the kernel counts, or did until a moment ago."""

    key: EdgeKey
    first_seen: float
    last_seen: float
    hints: int = 0
    number: int = 0
    """Of its row; 0 while it has none."""
    counted: bool = False
    """Whether its row says that the kernel counts it."""
    counters: int = 0
    """How many counters it has; none: the edge is leaving."""
    connections: int = 0
    """What was added since rows were written, with the bytes below: the rounds of the present minute."""
    to_server: int = 0
    to_client: int = 0
    changed_at: int = 0
    """When that was last added to, in milliseconds."""
    total: Total | None = None
    """Of its direction and class, once anything was added to it."""


class Counter(msgspec.Struct, gc=False):
    """One counter of the kernel: cumulative counts as they were told, and as they are stored."""

    slot: int
    generation: int
    edge: EdgeState
    live: bool = True
    connections: int = 0
    to_server: int = 0
    to_client: int = 0
    stored_connections: int = 0
    stored_to_server: int = 0
    stored_to_client: int = 0
    waits: bool = False
    """Whether something of it waits to be stored."""


class Counting:
    """Every counter of one map, and the edges that they are for."""

    def __init__(self, limit: int) -> None:
        """`limit`: how many edges, and how many counters that wait to be stored, are held."""
        self._limit = limit
        self.counters: dict[int, Counter] = {}
        """By slot."""
        self.edges: dict[EdgeKey, EdgeState] = {}
        """Those with counters, and those that are leaving."""
        self.waiting: list[Counter] = []
        """Those of which something waits to be stored, in the order in which it was told."""
        self.altered: dict[EdgeKey, EdgeState] = {}
        """Edges whose row is to be made, or does not say the same as they do."""
        self.totals: dict[tuple[Direction, FlowClass], Total] = {}
        self._held = 0
        """How many edges have counters."""
        self._ended: list[Counter] = []
        """Their last counts were told in the latest round; they are known until they are told no more."""

    def take(self, told: Iterable[CountedEdge]) -> tuple[list[tuple[EdgeKey, int]], int]:
        """Takes in what counters say.

        Returns to (or, below zero, from) which edges connections came, and the number of counters that found no
        room.
        """
        ended, self._ended = self._ended, []
        counters, waiting = self.counters, self.waiting
        moved: list[tuple[EdgeKey, int]] = []
        refused = 0
        for one in told:
            count = one.count
            counter = counters.get(one.slot)
            if counter is None or counter.generation != one.generation:
                if not self._has_room(one.key):
                    refused += 1
                    continue
                counter = self.begin(one)
            elif (
                one.live
                and count.last_seen <= counter.edge.last_seen
                and count.connections == counter.connections
                and count.bytes_to_server == counter.to_server
                and count.bytes_to_client == counter.to_client
            ):
                continue
            edge = counter.edge
            total = edge.total or self._total_of(edge)
            total.to_server += count.bytes_to_server - counter.to_server
            total.to_client += count.bytes_to_client - counter.to_client
            if count.connections != counter.connections:
                total.connections += count.connections - counter.connections
                moved.append((edge.key, count.connections - counter.connections))
                counter.connections = count.connections
            counter.to_server = count.bytes_to_server
            counter.to_client = count.bytes_to_client
            if count.last_seen > edge.last_seen:
                edge.last_seen = count.last_seen
            if count.hints or count.first_seen < edge.first_seen:
                self._describe(edge, count)
            if not counter.waits:
                counter.waits = True
                waiting.append(counter)
            if not one.live:
                counter.live = False
                self._ended.append(counter)
        told_again = {counter.slot for counter in self._ended}
        for counter in ended:
            if counter.slot not in told_again and counters.get(counter.slot) is counter:
                self._release(counter)
        return moved, refused

    def begin(self, one: CountedEdge) -> Counter:
        """A counter of which nothing is known yet; whatever had its slot is no longer counted."""
        former = self.counters.get(one.slot)
        if former is not None:
            self._release(former)
        edge = self.edges.get(one.key)
        if edge is None:
            count = one.count
            edge = EdgeState(one.key, count.first_seen, count.last_seen, hint_bits(count.hints))
            self.edges[one.key] = edge
        return self._count(one.slot, one.generation, edge)

    def resume(self, slot: int, generation: int, edge: EdgeState, live: bool) -> Counter:
        """The counter of that slot, as the file knows it."""
        former = self.counters.get(slot)
        if former is None or former.generation != generation:
            if former is not None:
                self._release(former)
            former = self._count(slot, generation, edge)
        if former.live and not live:
            former.live = False
            self._ended.append(former)
        return former

    def forget_map(self) -> None:
        """All counters went away with their map; what waits to be stored still does."""
        for counter in list(self.counters.values()):
            self._release(counter)
        for counter in self.waiting:
            counter.slot = NO_SLOT
        self._ended = []

    def forget_file(self) -> None:
        """Nothing is stored any more: of what the kernel still counts, everything waits to be."""
        for counter in self.counters.values():
            counter.stored_connections = counter.stored_to_server = counter.stored_to_client = 0
            if not counter.waits:
                counter.waits = True
                self.waiting.append(counter)
        self.edges = {counter.edge.key: counter.edge for counter in self.waiting}
        self.altered = dict(self.edges)
        for edge in self.edges.values():
            edge.number, edge.counted = 0, False
            edge.connections = edge.to_server = edge.to_client = 0

    def stored(self, at: int) -> list[EdgeState]:
        """Everything that waited is in the file, dated `at` milliseconds; returns the edges that it was added to."""
        edges = []
        for counter in self.waiting:
            edge = counter.edge
            edge.connections += counter.connections - counter.stored_connections
            edge.to_server += counter.to_server - counter.stored_to_server
            edge.to_client += counter.to_client - counter.stored_to_client
            edge.changed_at = at
            counter.stored_connections = counter.connections
            counter.stored_to_server = counter.to_server
            counter.stored_to_client = counter.to_client
            counter.waits = False
            edges.append(edge)
        self.waiting = []
        self.altered = {}
        return edges

    def forget_left(self, kept: Container[int]) -> None:
        """Edges without counters leave memory, but for those whose number is to be kept. Their rows say the same."""
        for key in [key for key, edge in self.edges.items() if not edge.counters]:
            if key not in self.altered and self.edges[key].number not in kept:
                del self.edges[key]

    def forget_rows(self, numbers: Container[int]) -> None:
        """Edges without counters whose rows are gone leave memory."""
        for key in [key for key, edge in self.edges.items() if edge.number in numbers]:
            del self.edges[key]

    def _total_of(self, edge: EdgeState) -> Total:
        edge.total = self.totals.setdefault((edge.key.direction, edge.key.flow_class), Total())
        return edge.total

    def _has_room(self, key: EdgeKey) -> bool:
        edge = self.edges.get(key)
        known = edge is not None and edge.counters > 0
        return len(self.waiting) < self._limit and (known or self._held < self._limit)

    def _count(self, slot: int, generation: int, edge: EdgeState) -> Counter:
        counter = self.counters[slot] = Counter(slot, generation, edge)
        edge.counters += 1
        self._held += edge.counters == 1
        if not edge.counted:
            self.altered[edge.key] = edge
        return counter

    def _release(self, counter: Counter) -> None:
        del self.counters[counter.slot]
        edge = counter.edge
        edge.counters -= 1
        if not edge.counters:
            self._held -= 1
            self.altered[edge.key] = edge

    def _describe(self, edge: EdgeState, count: EdgeCount) -> None:
        hints = edge.hints | hint_bits(count.hints)
        if hints != edge.hints or count.first_seen < edge.first_seen:
            edge.hints = hints
            edge.first_seen = min(edge.first_seen, count.first_seen)
            self.altered[edge.key] = edge


def hint_bits(hints: Iterable[Hint]) -> int:
    """Hints as they are stored."""
    return sum(HINT_BITS[hint] for hint in hints)


def hints_of(bits: int) -> tuple[Hint, ...]:
    """Stored hints, in the order of Hint."""
    return tuple(hint for hint in Hint if bits & HINT_BITS[hint])
