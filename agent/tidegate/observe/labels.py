"""Names for addresses: an index of the catalog for quick lookup of who had an address at a time.

Knows only what the catalog publishes; the rule for addresses that were reused is the verdict's
(verdict/names.py), so that a flow has the same name wherever it is shown.
"""

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

    def label(self, edge: Edge, own: Instance | None) -> LabelledEdge:
        """Names both ends of an edge that was seen at the interface of `own`."""
        peer = self.at(edge.key.peer, edge.count.last_seen)
        match edge.key.direction:
            case Direction.INBOUND:
                return LabelledEdge(edge=edge, client=peer, server=own)
            case Direction.OUTBOUND:
                return LabelledEdge(edge=edge, client=own, server=peer)
