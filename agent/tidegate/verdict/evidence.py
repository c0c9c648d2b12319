"""What an agent must bring so that a service can be judged: the contract between observing and
judging.

Plain frozen data that travels between agents as JSON. It says what was seen and what could not be
seen; it draws no conclusion. Times are seconds since the epoch, byte counts are TCP payload.
"""

import enum

import msgspec

from tidegate.model import Edge, FlowClass, Hint, Instance, Interval, Sidecar


class CallerKind(enum.StrEnum):
    WORKLOAD = "workload"
    """The catalog names it."""
    PROBE = "probe"
    """It called from an address of the instance's own node: kubelet, health checks."""
    OUTSIDE = "outside"
    """Nothing in the catalog had the address at that time."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who called, as far as the catalog knows."""

    address: str
    """The address it used last."""
    workload: str = ""
    service: str = ""
    namespace: str = ""
    node: str = ""
    meshed: bool = False
    kind: CallerKind = CallerKind.OUTSIDE
    addresses: tuple[str, ...] = ()
    """Every address it used in the window, both families."""


class EdgeEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """One inbound edge of an instance, restricted to the window."""

    peer: str
    port: int
    """Destination port of the caller's packets, before any redirection."""
    flow_class: FlowClass = msgspec.field(name="class")
    connections: int
    """Opened in the window: 0 for one that was opened earlier and was still in use."""
    bytes_to_server: int = 0
    bytes_to_client: int = 0
    first_seen: float
    last_seen: float
    hints: tuple[Hint, ...] = ()
    """Protocols that were recognised, in the order of Hint."""

    @classmethod
    def of(cls, edge: Edge) -> "EdgeEvidence":
        """The same facts as an edge of the ledger."""
        return cls(
            peer=edge.key.peer,
            port=edge.key.port,
            flow_class=edge.key.flow_class,
            connections=edge.count.connections,
            bytes_to_server=edge.count.bytes_to_server,
            bytes_to_client=edge.count.bytes_to_client,
            first_seen=edge.count.first_seen,
            last_seen=edge.count.last_seen,
            hints=edge.count.hints,
        )


class ChainTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Connections per inbound filter chain of the sidecar."""

    permissive: int = 0
    public: int = 0


class WitnessReading(msgspec.Struct, frozen=True, kw_only=True):
    """What the sidecar's own counters say about the same traffic, since a common beginning."""

    agrees: bool | None = None
    """None: not enough was read yet to compare."""
    detail: str = "the sidecar's counters have not been read"
    sidecar: ChainTotals = ChainTotals()
    least: ChainTotals = ChainTotals()
    """Connections that the ledger is sure the sidecar has seen."""
    most: ChainTotals = ChainTotals()
    """Connections that the sidecar can have seen at most, by the ledger."""
    permissive_active: int = 0
    """Plaintext connections that have been open at the sidecar for several rounds."""
    permissive_open: int = 0
    """Plaintext connections that the sidecar had when it was last asked, those that drain after a flip among them."""
    since: float = 0.0
    disagreed_at: float = 0.0
    """When the two last disagreed, 0 for never."""


REDIRECTION_REPAIRED = "redirection_repaired"
"""Name of the loss that counts how often somebody else changed an instance's redirection."""


class InstanceEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent knows of one instance of the service."""

    instance: Instance
    created_at: float
    inbound_redirected: bool
    """Whether redirection of inbound connections to the sidecar is in place."""
    excluded_inbound_ports: tuple[tuple[int, int], ...] = ()
    """Ranges, both ends included, that the policy keeps away from the sidecar."""
    excluded_sources: tuple[str, ...] = ()
    """Networks whose connections the policy keeps away from the sidecar."""
    coverage: tuple[Interval, ...] = ()
    """When the instance's interface was observed; not cut to the window, so that what was
    observed before it shows."""
    losses: dict[str, int] = {}
    """By name, what the observation lost in the window; empty when nothing was."""
    edges: tuple[EdgeEvidence, ...] = ()
    """Inbound edges of the window."""
    witness: WitnessReading = WitnessReading()
    node_addresses: tuple[str, ...] = ()
    """Addresses of the instance's own node: flows from them are probes."""
    mesh_dials_service_port: bool = False
    """Whether sidecars of this mesh dial the service's own port, as Istio's do, and not one of the sidecar's."""
    sidecar: Sidecar = Sidecar.TIDEGATE
    """Whose sidecar it has. One of the workload's own tells the agent nothing: there is no second witness then."""
    sidecar_problem: str = ""
    """Why the sidecar does not run as it should, for a person; empty when it does."""


class MissingNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node with instances of the service whose evidence could not be had."""

    node: str
    reason: str


class ServiceEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known about one service, from all nodes."""

    service: str
    instances: tuple[InstanceEvidence, ...] = ()
    """Those that live."""
    departed: tuple[InstanceEvidence, ...] = ()
    """Those that lived before: their coverage and what was seen at them still counts, their
    witness does not."""
    nodes_missing: tuple[MissingNode, ...] = ()
    intent_problem: str = ""
    """Why mode, intentions or instances may be others by now; empty when they have just been read."""
