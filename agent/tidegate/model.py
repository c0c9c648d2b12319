"""The words of tidegate as types, shared by every part.

The nouns of docs/architecture.md: workload, class, edge, coverage, intention, verdict evidence. Frozen data, no I/O, no
behaviour beyond what a value says about itself. Times are seconds since the Unix epoch (float, UTC),
durations are seconds, addresses are canonical text (IPv4-mapped IPv6 addresses are written as IPv4).
"""

import enum
import hashlib

import msgspec

DEFAULT_INBOUND_PORT = 20000
"""Port of the sidecar's public listener (consul-k8s constants.ProxyDefaultInboundPort)."""

DEFAULT_OUTBOUND_PORT = 15001
"""Port of the sidecar's outbound listener (consul sdk/iptables DefaultTProxyOutboundPort)."""

DEFAULT_PROXY_UID = 5995
"""User id of the sidecar (consul-k8s sidecarUserAndGroupID)."""


class Direction(enum.StrEnum):
    """From the workload's point of view: who opened the connection."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


class FlowClass(enum.StrEnum):
    """What a TCP connection turned out to be by the beginning of its client's byte stream."""

    MESH = "mesh"
    TLS = "tls"
    PLAINTEXT = "plaintext"
    SERVER_FIRST = "server-first"
    STARTTLS = "starttls"
    UNKNOWN = "unknown"
    EMPTY = "empty"

    @property
    def blocks_strict(self) -> bool:
        """Whether a service that receives such flows would lose them by going strict."""
        return self not in (FlowClass.MESH, FlowClass.EMPTY)


class Hint(enum.StrEnum):
    """Which application protocol a plaintext connection speaks, where its first bytes leave no doubt."""

    HTTP1 = "http1"
    H2C = "h2c"
    POSTGRES = "postgres"
    MYSQL = "mysql"
    REDIS = "redis"
    KAFKA = "kafka"
    SSH = "ssh"
    AMQP = "amqp"
    MONGODB = "mongodb"
    CASSANDRA = "cassandra"


class MutualTLSMode(enum.StrEnum):
    """Effective mode of a service; Consul's MutualTLSMode with "" resolved."""

    STRICT = "strict"
    PERMISSIVE = "permissive"


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One network namespace that may have a sidecar: a pod, a VM service, a lab pod."""

    id: str
    """Unique for the life of the workload, over all nodes: a re-created pod has another id."""
    name: str
    service: str
    node: str
    netns: str
    """Path of the network namespace, such as /run/netns/tg-demo-api."""
    namespace: str = "default"
    interface: str = "eth0"
    """Name of the interface inside the network namespace."""
    port: int = 0
    """TCP port that the application listens on, 0 for a workload that only calls."""
    addresses: tuple[str, ...] = ()
    meshed: bool = False
    annotations: dict[str, str] = {}
    namespace_annotations: dict[str, str] = {}
    """Annotations of its namespace, and the labels that Consul reads there; the workload's own win over them."""
    created_at: float = 0.0

    @property
    def key(self) -> int:
        """The 64-bit number that stands for this workload in kernel maps."""
        return workload_key(self.id)


def workload_key(workload_id: str) -> int:
    """64-bit number of a workload id: stable over restarts, without a table that could be lost."""
    return int.from_bytes(hashlib.sha256(workload_id.encode()).digest()[:8], "big")


class EdgeKey(msgspec.Struct, frozen=True, kw_only=True, order=True, gc=False):
    """Who talks to whom, and how, as seen at one workload's interface."""

    workload: int
    """Workload.key of the workload at whose interface the flow was seen."""
    direction: Direction
    peer: str
    """Address of the other end."""
    port: int
    """TCP port of the server side of the connection."""
    flow_class: FlowClass


class EdgeCount(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How much, and when, on one edge. Byte counts are TCP payload."""

    connections: int
    bytes_to_server: int
    bytes_to_client: int
    first_seen: float
    last_seen: float
    hints: tuple[Hint, ...] = ()
    """Protocols that were recognised, in the order of Hint."""


class Edge(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    key: EdgeKey
    count: EdgeCount


class CountedEdge(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one counter of the kernel has counted since it was taken for an edge.

    The kernel gives counters of idle edges back and takes others for them when they return: an edge's sum is
    that of all its counters. Counts can be below zero, where connections left that came when another counter
    was the edge's.
    """

    slot: int
    """Which counter."""
    generation: int
    """Tells apart what the same counter was taken for, one after the other."""
    live: bool
    """False: these are its last counts."""
    key: EdgeKey
    count: EdgeCount


class Interval(msgspec.Struct, frozen=True, order=True):
    """A closed span of time."""

    start: float
    end: float


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """A workload as the catalog knows it: what agents on other nodes may know about it."""

    id: str
    """Workload.id."""
    name: str
    service: str
    node: str
    namespace: str = "default"
    addresses: tuple[str, ...] = ()
    port: int = 0
    meshed: bool = False
    """True once the workload's sidecar runs and its redirection is in place."""
    inbound_port: int = DEFAULT_INBOUND_PORT
    applied_index: int = 0
    """Index of the intent that the workload's sidecar is known to run (0: none). A caller uses mTLS towards an
    instance only when the instance already enforces the intention that allows it."""
    mode: MutualTLSMode = MutualTLSMode.STRICT
    agent_api: str = ""
    """Where the agent of this workload's node answers, such as unix:///run/tidegate/agent.sock."""
    seen_from: float = 0.0
    """Since when the workload is known by these addresses."""
    seen_until: float = 0.0
    """0 while the workload lives; afterwards when it was last known (addresses are reused)."""


class IntentionRule(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved L4 intention towards a service, in order of precedence (highest first)."""

    source: str
    """Service name or "*"."""
    allow: bool
    precedence: int = 9


class ServiceIntent(msgspec.Struct, frozen=True, kw_only=True):
    """What should be, for one service, after precedence and inheritance."""

    service: str
    mode: MutualTLSMode = MutualTLSMode.STRICT
    intentions: tuple[IntentionRule, ...] = ()
    default_allow: bool = False
    mesh_destinations_only: bool = False
    index: int = 0
    """Highest ModifyIndex of what this was resolved from."""

    def allows(self, source: str) -> bool:
        """Whether an mTLS connection from the service `source` is allowed (Consul: first match by precedence)."""
        for rule in self.intentions:
            if rule.source in (source, "*"):
                return rule.allow
        return self.default_allow
