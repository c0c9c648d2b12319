"""The ledger's edges as people and programs read them: named on both ends, each connection once.

A connection between two observed workloads is seen twice, at its caller and at its server; it is told once, from the
server's side. What a workload calls outside of what is observed is told from the caller's side.
"""

from collections.abc import Collection, Iterable

import msgspec

from tidegate.intent.policy import Policy
from tidegate.model import Direction, Edge, FlowClass, Instance, Workload
from tidegate.observe.labels import Labels

THROUGH_SIDECAR = "sidecar"
OUTSIDE_SIDECARS = "outside the sidecars"


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a flow; empty names where the catalog knows none."""

    address: str
    workload: str = ""
    service: str = ""
    node: str = ""
    meshed: bool = False


class FlowRow(msgspec.Struct, frozen=True, kw_only=True):
    """One edge."""

    caller: Party
    server: Party
    port: int
    flow_class: FlowClass = msgspec.field(name="class")
    path: str
    """Whether the server's (or, told from its side, the caller's) sidecar carries these connections."""
    observed_at: Direction
    """At which end: inbound, at the server; outbound, at the caller."""
    connections: int
    bytes_to_server: int
    bytes_to_client: int
    first_seen: float
    last_seen: float


def row(edge: Edge, own: Workload, policy: Policy | None, labels: Labels) -> FlowRow:
    """Names an edge that was seen at the interface of `own`. `policy` is what is redirected there, None for nothing."""
    key, count = edge.key, edge.count
    peer = labels.at(key.peer, count.last_seen)
    mine = Party(
        address=_own_address(own, key.peer),
        workload=own.name,
        service=own.service,
        node=own.node,
        meshed=own.meshed,
    )
    theirs = _party(key.peer, peer)
    inbound = key.direction is Direction.INBOUND
    if policy is None:
        redirected = False
    elif inbound:
        redirected = key.port == policy.inbound.port or policy.redirects_inbound(key.port)
    else:
        redirected = policy.redirects_outbound(key.port)
    return FlowRow(
        caller=theirs if inbound else mine,
        server=mine if inbound else theirs,
        port=key.port,
        flow_class=key.flow_class,
        path=THROUGH_SIDECAR if redirected else OUTSIDE_SIDECARS,
        observed_at=key.direction,
        connections=count.connections,
        bytes_to_server=count.bytes_to_server,
        bytes_to_client=count.bytes_to_client,
        first_seen=count.first_seen,
        last_seen=count.last_seen,
    )


def told_once(rows: Iterable[FlowRow], observed: Collection[str]) -> tuple[FlowRow, ...]:
    """Leaves out the caller's view of flows whose server is among the `observed` workloads (by name)."""
    kept = [
        one
        for one in rows
        if one.observed_at is Direction.INBOUND or one.server.workload not in observed
    ]
    return tuple(
        sorted(kept, key=lambda one: (one.server.service, one.caller.service, one.flow_class))
    )


def _party(address: str, instance: Instance | None) -> Party:
    if instance is None:
        return Party(address=address)
    return Party(
        address=address,
        workload=instance.name,
        service=instance.service,
        node=instance.node,
        meshed=instance.meshed,
    )


def _own_address(own: Workload, peer: str) -> str:
    """The workload's address of the family in which the peer speaks."""
    same = [address for address in own.addresses if (":" in address) == (":" in peer)]
    return same[0] if same else ""
