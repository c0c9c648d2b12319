"""The ledger's edges as people and programs read them: named on both ends, each connection once.

A connection between two observed workloads is seen twice, at its caller and at its server; it is told once, from the
server's side. What a workload calls outside of what is observed is told from the caller's side.
"""

from collections.abc import Collection, Iterable

import msgspec

from tidegate.intent.policy import Policy
from tidegate.model import Direction, Edge, FlowClass, Hint, Instance, Workload
from tidegate.observe.labels import Labels

THROUGH_SIDECAR = "sidecar"
OUTSIDE_SIDECARS = "outside the sidecars"


class Party(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a flow; empty names where the catalog knows none."""

    address: str
    """Of several, the one that was used last."""
    addresses: tuple[str, ...] = ()
    """Every address that it used in this flow, in order; none where none is known."""
    workload: str = ""
    service: str = ""
    node: str = ""
    meshed: bool = False


class NamedEdge(msgspec.Struct, frozen=True, kw_only=True):
    """An edge of the ledger, with the names of both ends."""

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
    hints: tuple[Hint, ...] = ()
    """Protocols that were recognised, in the order of Hint."""
    would_be_denied: bool = False
    """Permissive mode lets these connections in, and no intention allows their caller."""


def named(edge: Edge, own: Workload, policy: Policy | None, labels: Labels) -> NamedEdge:
    """Names an edge that was seen at the interface of `own`. `policy` is what is redirected there, None for nothing."""
    key, count = edge.key, edge.count
    peer = labels.at(key.peer, count.last_seen)
    address = _own_address(own, key.peer)
    mine = Party(
        address=address,
        addresses=(address,) if address else (),
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
        redirected = key.port == policy.inbound.port or policy.redirects_inbound(key.port, key.peer)
    else:
        redirected = policy.redirects_outbound(key.port, key.peer)
    return NamedEdge(
        caller=theirs if inbound else mine,
        server=mine if inbound else theirs,
        port=key.port,
        flow_class=key.flow_class,
        path=THROUGH_SIDECAR if redirected else OUTSIDE_SIDECARS,
        observed_at=key.direction,
        # Below zero where connections of before turned out to be something else.
        connections=max(count.connections, 0),
        bytes_to_server=max(count.bytes_to_server, 0),
        bytes_to_client=max(count.bytes_to_client, 0),
        first_seen=count.first_seen,
        last_seen=count.last_seen,
        hints=count.hints,
    )


def told_once(
    rows: Iterable[NamedEdge], observed: Collection[tuple[str, str]]
) -> tuple[NamedEdge, ...]:
    """One row for each pair of ends, port, class and path, whatever addresses and families were used.

    Leaves out the caller's view of flows whose server is among the `observed` workloads (name and node), and
    connections that turned out to be something else since.
    """
    merged: dict[tuple[object, ...], NamedEdge] = {}
    for one in rows:
        if one.observed_at is Direction.OUTBOUND and _who(one.server) in observed:
            continue
        if not (one.connections or one.bytes_to_server or one.bytes_to_client):
            continue
        key = (_who(one.caller), _who(one.server), one.port, one.flow_class, one.path)
        merged[key] = _sum(merged[key], one) if key in merged else one
    return tuple(
        sorted(
            merged.values(),
            key=lambda one: (
                (one.server.service, *_who(one.server)),
                (one.caller.service, *_who(one.caller)),
                (one.port, one.flow_class, one.path),
            ),
        )
    )


def _who(party: Party) -> tuple[str, str]:
    return (party.workload, party.node) if party.workload else (party.address, "")


def _sum(one: NamedEdge, other: NamedEdge) -> NamedEdge:
    latest = max(one, other, key=lambda row: row.last_seen)
    return msgspec.structs.replace(
        latest,
        caller=_with_addresses(latest.caller, one.caller, other.caller),
        server=_with_addresses(latest.server, one.server, other.server),
        connections=one.connections + other.connections,
        bytes_to_server=one.bytes_to_server + other.bytes_to_server,
        bytes_to_client=one.bytes_to_client + other.bytes_to_client,
        first_seen=min(one.first_seen, other.first_seen),
        last_seen=latest.last_seen,
        hints=tuple(hint for hint in Hint if hint in one.hints or hint in other.hints),
    )


def _with_addresses(party: Party, *seen: Party) -> Party:
    """The party with the addresses of all, which are the same workload."""
    addresses = sorted({address for each in seen for address in each.addresses})
    return msgspec.structs.replace(party, addresses=tuple(addresses))


def _party(address: str, instance: Instance | None) -> Party:
    if instance is None:
        return Party(address=address, addresses=(address,))
    return Party(
        address=address,
        addresses=(address,),
        workload=instance.name,
        service=instance.service,
        node=instance.node,
        meshed=instance.meshed,
    )


def _own_address(own: Workload, peer: str) -> str:
    """The workload's address of the family in which the peer speaks."""
    same = [address for address in own.addresses if (":" in address) == (":" in peer)]
    return same[0] if same else ""
