"""What config entries and service definitions say alike: tenancy, and what a sidecar is told.

Field tables and, where a field is not taken, the reason. Field names: Consul's agent/structs ConnectProxyConfig.
"""

from typing import Any

import msgspec

from tidegate.intent.fields import (
    Choice,
    Field,
    Flag,
    Number,
    Object,
    Opaque,
    Record,
    Shape,
    Tenant,
    Word,
)
from tidegate.model import MutualTLSMode


class TransparentProxy(msgspec.Struct, frozen=True, kw_only=True):
    outbound_listener_port: int = 0
    """0: the default port."""
    dialed_directly: bool = False
    rest: dict[str, Any] = {}


PARTITION = Field("Partition", "partition", Tenant(), always=True)
OF_NAMESPACE = (PARTITION, Field("Namespace", "namespace", Tenant(), always=True))

MUTUAL_TLS_MODE = Choice(
    MutualTLSMode, 'Invalid MutualTLSMode "{}". Must be one of "", "strict", or "permissive".'
)
PROXY_MODE = Word(
    ("transparent",), refused={"direct": "tidegate redirects the traffic of every meshed workload"}
)

NO_LIMITS = "tidegate's sidecars count no connections, so the limit would not hold"
NO_HTTP = "tidegate's sidecars do not look into HTTP"
NO_EXTENSIONS = "tidegate's sidecars have no extensions"
NO_ESCAPE = "tidegate writes the sidecar's configuration whole"
NO_PEERS = "tidegate knows no other clusters"

MESH_GATEWAY = Record(("Mode", Word(("none", "local", "remote"))))
"""Says how other datacenters are reached: nothing changes within one."""

EXPOSE = Record(
    refused={
        "Checks": "tidegate opens no listeners for checks; its annotation direct-probes lets probes through",
        "Paths": "tidegate opens no listeners for paths; its annotation direct-probes lets probes through",
    }
)
PROXY_CONFIG = Opaque(
    refused={
        "envoy_public_listener_json": NO_ESCAPE,
        "envoy_listener_json": NO_ESCAPE,
        "envoy_local_cluster_json": NO_ESCAPE,
        "envoy_cluster_json": NO_ESCAPE,
        "max_inbound_connections": NO_LIMITS,
    }
)

TRANSPARENT_PROXY = Object(
    Shape(
        TransparentProxy,
        (
            Field("OutboundListenerPort", "outbound_listener_port", Number(0, 65535)),
            Field("DialedDirectly", "dialed_directly", Flag()),
        ),
    )
)
