"""One round of the ledger: reading 10,000 edges out of the kernel and storing what was added.

The edges are put into the classifier's map as the programs would have counted them: 25 more flows from each of 10,000
peers is what 250,000 flows leave behind for a round.
"""

import contextlib
import ipaddress
import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.measure import (
    Alternative,
    Bound,
    Limit,
    Measurement,
    Unit,
    interleaved,
    milliseconds,
)
from tests.bench.site import Site

from tidegate.kernel.bpf import Map
from tidegate.observe import abi
from tidegate.observe.classifier import Classifier
from tidegate.observe.ledger import Ledger

PART = "ledger"

_EDGES = 10_000
_WORKLOADS = 100
_FEW = 100
_FLOWS_EACH = 25
_ROUNDS = 8
_FIRST_PEER = int(ipaddress.ip_address("::ffff:10.9.0.1"))
_SIZE = len(bytes(abi.Edge()))


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    with contextlib.closing(Classifier.open(site.bpffs() / "ledger")) as classifier:
        maps = site.bpffs() / "ledger" / "classifier" / "maps"
        with Map.open_pinned(maps / "edges") as edges, Map.open_pinned(maps / "edge_pool") as pool:
            counters = _Edges(edges, pool)
            yield _rounds(classifier, counters, site.directory)
            yield _memory(classifier, counters, site.directory)
        classifier.remove()


class _Edges:
    """The kernel's edges, from as many peers as there are edges, over some workloads."""

    def __init__(self, edges: Map, pool: Map) -> None:
        self._map = edges
        self._edges = [_edge(number) for number in range(_EDGES)]
        self._write(_EDGES)
        pool.update(bytes(4), _EDGES.to_bytes(4, "little"))

    def count(self, number: int) -> None:
        """More connections on the first edges."""
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for edge in self._edges[:number]:
            edge.tally[abi.Tally.CONNECTION] += _FLOWS_EACH
            edge.tally[abi.Role.CLIENT] += 1000 * _FLOWS_EACH
            edge.tally[abi.Role.SERVER] += 2000 * _FLOWS_EACH
            edge.last_seen = now
        self._write(number)

    def _write(self, number: int) -> None:
        with self._map.mapped() as memory:
            memory[: number * _SIZE] = b"".join(bytes(edge) for edge in self._edges[:number])


def _edge(number: int) -> abi.Edge:
    edge = abi.Edge(generation=1, state=abi.EdgeState.LIVE, first_seen=1, last_seen=1)
    edge.key.workload = 1 + number % _WORKLOADS
    edge.key.port = 8443
    edge.key.direction = abi.Direction.INBOUND
    edge.key.flow_class = abi.Class.MESH
    edge.key.peer[:] = (_FIRST_PEER + number).to_bytes(16, "big")
    return edge


def _rounds(classifier: Classifier, edges: _Edges, directory: Path) -> Measurement:
    files = (directory / f"ledger-{number}.sqlite" for number in itertools.count())
    generations = itertools.count()

    def a_round(ledger: Ledger, generation: str = "living") -> None:
        found, losses = classifier.changed_edges(), classifier.losses()
        ledger.record(time.time(), generation, found, losses.lost_by_name())
        assert not ledger.problems()

    def first() -> float:
        edges.count(_EDGES)
        with contextlib.closing(Ledger.open(next(files))) as ledger:
            return milliseconds(lambda: a_round(ledger, f"new {next(generations)}"))

    def after(changed: int) -> Callable[[], float]:
        def sample() -> float:
            a_round(living)
            edges.count(changed)
            return milliseconds(lambda: a_round(living))

        return sample

    def reading() -> float:
        a_round(living)
        edges.count(_EDGES)
        return milliseconds(classifier.changed_edges)

    edges.count(_EDGES)
    with contextlib.closing(Ledger.open(next(files))) as living:
        a_round(living)
        return interleaved(
            PART,
            f"one round with {_EDGES} edges in the kernel",
            Unit.MILLISECONDS,
            _ROUNDS,
            [
                Alternative(
                    f"{_FLOWS_EACH * _EDGES} flows from {_EDGES} peers: every edge has changed",
                    after(_EDGES),
                    Limit(Bound.MEDIAN_AT_MOST, 100),
                ),
                Alternative(f"{_FEW} edges have changed", after(_FEW)),
                Alternative("every edge is new", first),
                Alternative("of the first: reading the kernel", reading),
            ],
        )


def _memory(classifier: Classifier, edges: _Edges, directory: Path) -> Measurement:
    """What Python takes for the ledger of 10,000 edges, and for a round of it."""
    files = (directory / f"memory-{number}.sqlite" for number in itertools.count())

    def traced() -> tuple[float, float]:
        edges.count(_EDGES)
        tracemalloc.start()
        with contextlib.closing(Ledger.open(next(files))) as ledger:
            for _ in range(3):
                ledger.record(time.time(), "traced", classifier.changed_edges(), {})
                held, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                edges.count(_EDGES)
            ledger.record(time.time(), "traced", classifier.changed_edges(), {})
            _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return held / 1e6, most / 1e6

    return interleaved(
        PART,
        f"memory of the ledger of {_EDGES} edges, {_FLOWS_EACH * _EDGES} flows in each round",
        Unit.MEGABYTES,
        1,
        [
            Alternative("at most during a round", lambda: traced()[1]),
            Alternative("between rounds", lambda: traced()[0]),
        ],
    )
