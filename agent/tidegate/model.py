"""The words of tidegate as types, shared by every part.

The nouns of docs/architecture.md: workload, class, edge, coverage, intention, verdict evidence. Frozen data, no I/O, no
behaviour beyond what a value says about itself. Times are seconds since the Unix epoch (float, UTC),
durations are seconds, addresses are canonical text (IPv4-mapped IPv6 addresses are written as IPv4).
"""

import enum
import hashlib
from typing import NamedTuple

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


DEFAULT_TENANT = "default"
"""Name of the namespace, and of the partition, of whatever says no other."""


class ServiceName(NamedTuple):
    """Which service of a datacenter: its name, in a namespace of an admin partition.

    Its text is what the rest of tidegate calls a service by: `web`, `billing/web` in another namespace,
    `east/billing/web` in another partition. Two services are the same if their texts are.
    """

    name: str
    namespace: str = DEFAULT_TENANT
    partition: str = DEFAULT_TENANT

    @classmethod
    def of(cls, text: str) -> "ServiceName":
        """The service of this text; parts are not checked, and what is not said is the default."""
        *tenancy, name = text.split("/", 2)
        return cls(name, *reversed(tenancy))

    def __str__(self) -> str:
        if self.partition != DEFAULT_TENANT:
            return f"{self.partition}/{self.namespace}/{self.name}"
        return self.name if self.namespace == DEFAULT_TENANT else f"{self.namespace}/{self.name}"


def source_matches(pattern: str, source: str) -> bool:
    """Whether an intention's source is about the service `source`: texts of ServiceNames.

    In the pattern, name, or namespace and name, may be "*"; "*" alone is every service of the default namespace.
    """
    if not pattern.endswith("*"):
        return pattern == source
    if pattern == "*":
        return "/" not in source
    wanted, asked = ServiceName.of(pattern), ServiceName.of(source)
    return (
        wanted.partition == asked.partition
        and wanted.namespace in ("*", asked.namespace)
        and wanted.name in ("*", asked.name)
    )


class Sidecar(enum.StrEnum):
    """Who runs the sidecar that a workload in the mesh is redirected to."""

    TIDEGATE = "tidegate"
    """The node's agent starts it in the workload's network namespace, and configures it."""
    OWN = "own"
    """The workload itself, such as the proxy container that a mesh injects: tidegate redirects to it, and observes."""


class ServicePort(msgspec.Struct, frozen=True, kw_only=True):
    """One of the services of a workload: a service for each port."""

    service: str
    """Text of a ServiceName."""
    port: int
    """TCP port that the application listens on."""


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
    more_ports: tuple[ServicePort, ...] = ()
    """Further services of the same workload, behind the same sidecar."""
    addresses: tuple[str, ...] = ()
    meshed: bool = False
    """Whether its connections are to be redirected to its sidecar."""
    sidecar: Sidecar = Sidecar.TIDEGATE
    """Whose sidecar that is. Where it is the workload's own, rules are there before it listens: closed, not open."""
    reason: str = ""
    """Why it is in the mesh or not, as its source knows it, such as "it has no sidecar"."""
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
    more_ports: tuple[ServicePort, ...] = ()
    """Further services of the same workload, behind the same sidecar."""
    virtual_addresses: tuple[str, ...] = ()
    """Addresses that stand for all instances of the service, such as a Kubernetes ClusterIP."""
    virtual_port: int = 0
    """TCP port that callers dial there, 0 where it is `port`."""
    upstreams: tuple[str, ...] = ()
    """Services that its registration says it calls, in addition to those that intentions let it call."""
    registered_mode: MutualTLSMode | None = None
    """MutualTLSMode of its proxy's registration, which wins over config entries; None says nothing."""
    of_another: bool = False
    """Whether its sidecar, and its place in the catalog, are another's, such as Consul's on Kubernetes. Agents tell
    each other of it, and no caller finds it by that."""
    agent_api: str = ""
    """Where the agent of this workload's node answers, such as unix:///run/tidegate/agent.sock."""
    seen_from: float = 0.0
    """Since when the workload is known by these addresses."""
    seen_until: float = 0.0
    """0 while the workload lives; afterwards when it was last known (addresses are reused)."""


class IntentionRule(msgspec.Struct, frozen=True, kw_only=True):
    """One resolved L4 intention towards a service, in order of precedence (highest first)."""

    source: str
    """Text of a ServiceName, in which name, or namespace and name, may be "*": see `source_matches`."""
    allow: bool
    precedence: int = 9


class TLSSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What mTLS connections may use; empty says nothing and leaves it to the sidecar."""

    min_version: str = ""
    """Consul's word, such as TLSv1_2."""
    max_version: str = ""
    cipher_suites: tuple[str, ...] = ()
    """IANA names, such as TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, for TLS 1.2 and before."""


class ServiceIntent(msgspec.Struct, frozen=True, kw_only=True):
    """What should be, for one service, after precedence and inheritance."""

    service: str
    mode: MutualTLSMode = MutualTLSMode.STRICT
    intentions: tuple[IntentionRule, ...] = ()
    default_allow: bool = False
    mesh_destinations_only: bool = False
    outbound_port: int = 0
    """Port of the sidecar's outbound listener, 0 where no entry says one."""
    incoming_tls: TLSSettings = TLSSettings()
    outgoing_tls: TLSSettings = TLSSettings()
    access_logs: bool = False
    """Whether sidecars log the plaintext connections that they let in."""
    index: int = 0
    """Highest ModifyIndex of what this was resolved from."""

    def allows(self, source: str) -> bool:
        """Whether an mTLS connection from the service `source` is allowed (Consul: first match by precedence)."""
        for rule in self.intentions:
            if source_matches(rule.source, source):
                return rule.allow
        return self.default_allow
