"""One round of the ledger: reading 10,000 edges out of the kernel and storing what was added.

The edges are put into the classifier's map as the programs would have counted them.
"""

import contextlib
import ipaddress
import itertools
import time
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
_ROUNDS = 8
_FIRST_PEER = int(ipaddress.ip_address("::ffff:10.9.0.1"))


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    with contextlib.closing(Classifier.open(site.bpffs() / "ledger")) as classifier:
        with Map.open_pinned(site.bpffs() / "ledger" / "classifier" / "maps" / "edges") as edges:
            yield _rounds(classifier, _Edges(edges), site.directory)
        classifier.remove()


class _Edges:
    """The kernel's edges, from as many peers as there are edges, over some workloads."""

    def __init__(self, edges: Map) -> None:
        self._map = edges
        self._keys = [_key(number) for number in range(_EDGES)]
        self._connections = 0

    def count(self, number: int) -> None:
        """One more connection on the first edges."""
        self._connections += 1
        now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        count = abi.EdgeCount(connections=self._connections, first_seen=1, last_seen=now)
        count.bytes[abi.Role.CLIENT] = count.bytes[abi.Role.SERVER] = 1000 * self._connections
        for key in self._keys[:number]:
            self._map.update(key, bytes(count))


def _key(number: int) -> bytes:
    key = abi.EdgeKey(
        workload=1 + number % _WORKLOADS,
        port=8443,
        direction=abi.Direction.INBOUND,
        flow_class=abi.Class.MESH,
    )
    key.peer[:] = (_FIRST_PEER + number).to_bytes(16, "big")
    return bytes(key)


def _rounds(classifier: Classifier, edges: _Edges, directory: Path) -> Measurement:
    files = (directory / f"ledger-{number}.sqlite" for number in itertools.count())

    def a_round(ledger: Ledger) -> None:
        found, losses = classifier.edges(), classifier.losses()
        ledger.record(time.time(), classifier.generation, found, losses.lost_by_name())
        assert len(found) == _EDGES
        assert not ledger.problems()

    def first() -> float:
        with contextlib.closing(Ledger.open(next(files))) as ledger:
            return milliseconds(lambda: a_round(ledger))

    def after(changed: int) -> Callable[[], float]:
        def sample() -> float:
            edges.count(changed)
            return milliseconds(lambda: a_round(living))

        return sample

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
                    "every edge has changed", after(_EDGES), Limit(Bound.MEDIAN_AT_MOST, 100)
                ),
                Alternative(f"{_FEW} edges have changed", after(_FEW)),
                Alternative("every edge is new", first),
                Alternative("of each: reading the kernel", lambda: milliseconds(classifier.edges)),
            ],
        )
