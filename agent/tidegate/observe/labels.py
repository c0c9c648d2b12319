"""Names for addresses: an index of the catalog for quick lookup of who had an address at a time.

Knows only what the catalog publishes; the rule for addresses that were reused is the verdict's
(verdict/names.py), so that a flow has the same name wherever it is shown.
"""

import itertools
from collections.abc import Iterable

import msgspec

from tidegate.model import Direction, Edge, Instance
from tidegate.verdict import names


class LabelledEdge(msgspec.Struct, frozen=True, kw_only=True):
    """An edge with the names that both ends had when it was last seen; None where the catalog
    knows none."""

    edge: Edge
    client: Instance | None
    server: Instance | None


class Labels:
    """Every instance the catalog knows, living and departed, by address and by workload."""

    def __init__(self, instances: Iterable[Instance] = ()) -> None:
        self._instances: tuple[Instance, ...] = ()
        self._by_address: dict[str, tuple[Instance, ...]] = {}
        self.replace(instances)

    def replace(self, instances: Iterable[Instance]) -> None:
        """Takes a new answer of the catalog; does nothing when it is the one it has."""
        taken = tuple(instances)
        if taken != self._instances:
            self._instances = taken
            self._by_address = names.by_address(taken)

    def at(self, address: str, when: float) -> Instance | None:
        """Who had `address` at `when` (seconds since the epoch)."""
        return names.name_at(self._by_address, address, when)

    def changes(self, since: float, until: float) -> dict[str, tuple[float, ...]]:
        """The moments in [since, until] at which an address went to another workload, by address, ascending.

        A workload has an address from when it is known by it, and from a little before where nobody else had it
        then (names.SLACK_S).
        """
        found = {}
        for address, holders in self._by_address.items():
            if len(holders) > 1:
                ordered = sorted(holders, key=lambda one: one.seen_from)
                moments = {
                    moment
                    for former, later in itertools.pairwise(ordered)
                    if since < (moment := _handed_over(former, later)) <= until
                }
                if moments:
                    found[address] = tuple(sorted(moments))
        return found

    def label(self, edge: Edge, own: Instance | None) -> LabelledEdge:
        """Names both ends of an edge that was seen at the interface of `own`."""
        peer = self.at(edge.key.peer, edge.count.last_seen)
        match edge.key.direction:
            case Direction.INBOUND:
                return LabelledEdge(edge=edge, client=peer, server=own)
            case Direction.OUTBOUND:
                return LabelledEdge(edge=edge, client=own, server=peer)


def _handed_over(former: Instance, later: Instance) -> float:
    """From when on an address that both had is the later one's."""
    free_for = later.seen_from - former.seen_until if former.seen_until else 0.0
    return later.seen_from - min(max(free_for / 2, 0.0), names.SLACK_S)
