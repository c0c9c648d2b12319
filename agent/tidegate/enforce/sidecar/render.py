"""From a SidecarSpec to Envoy's configuration, as pure functions that give plain data and JSON text.

Shape, names and statistic prefixes are Consul's (agent/xds/{listeners,clusters,rbac}.go), so that
dashboards keep working. Everything is L4. What Envoy keeps alive over an update decides the shape
(its ListenerMessageUtil::filterChainOnlyChange): a listener differs between modes, intentions
and upstreams in its filter chains only, and each upstream instance has a chain of its own. File names
are relative to Envoy's working directory, see `files`.
"""

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from tidegate.enforce.sidecar.spec import (
    ANY_SERVICE,
    Endpoint,
    SidecarSpec,
    Upstream,
)
from tidegate.identity import spiffe
from tidegate.intent.policy import Family
from tidegate.model import DEFAULT_INBOUND_PORT, IntentionRule, MutualTLSMode

PUBLIC_LISTENER = "public_listener"
PERMISSIVE_PUBLIC_LISTENER = "permissive_public_listener"
OUTBOUND_LISTENER = "outbound_listener"
ORIGINAL_DESTINATION = "original-destination"
LOCAL_APP = "local_app"
PERMISSIVE_LOCAL_APP = "permissive_local_app"
"""The application as permissive chains reach it. Consul has one local_app for all; but Envoy counts
open connections per cluster, and how many of them are plaintext is what matters before strict."""
RBAC_STAT_PREFIX = "connect_authz"

BOOTSTRAP_FILE = "bootstrap.json"
LISTENERS_FILE = "lds.json"
CLUSTERS_FILE = "cds.json"
INTENTIONS_FILE = "ecds.json"
LEAF_FILE = "leaf.json"
ROOTS_FILE = "roots.json"
ADMIN_SOCKET = "admin.sock"

CONNECT_TIMEOUT = "5s"
HANDSHAKE_TIMEOUT = "5s"
"""After it a client is refused that says nothing, or less than Envoy needs to see that it is no TLS."""
BUFFER_LIMIT_BYTES = 256 * 1024
"""What one connection may make Envoy hold per direction before it stops reading."""
MAX_CONNECTIONS = 8192
"""Open at one time towards the sidecar. More are closed at once: Envoy 1.40 crashes when it has no
file descriptor left. The same bound per cluster replaces Envoy's default of 1024."""
FILE_DESCRIPTORS = 2 * MAX_CONNECTIONS + 1024
"""What Envoy needs for that: a connection to each side, and its own files."""

_KEEPALIVE = {"keepalive_time": 300, "keepalive_interval": 30, "keepalive_probes": 5}
"""In seconds. Finds peers that are gone; a live connection may be idle for ever, see _tcp_proxy."""

_LEAF_SECRET = "leaf"  # noqa: S105
_ROOTS_SECRET = "roots"  # noqa: S105
_RBAC_POLICY = "consul-intentions-layer4"

_API = "type.googleapis.com/envoy"
_LISTENER = f"{_API}.config.listener.v3.Listener"
_CLUSTER = f"{_API}.config.cluster.v3.Cluster"
_SECRET = f"{_API}.extensions.transport_sockets.tls.v3.Secret"
_EXTENSION = f"{_API}.config.core.v3.TypedExtensionConfig"
_RBAC = f"{_API}.extensions.filters.network.rbac.v3.RBAC"
_TLS_SOCKET = "envoy.transport_sockets.tls"

_LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
_WILDCARD = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104

Resource = dict[str, Any]
"""One Envoy message in the JSON form of protobuf."""


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Listeners, clusters and intentions as the DiscoveryResponse files that Envoy watches."""

    lds: bytes
    cds: bytes
    ecds: bytes
    """Intentions apart from the listener: a change in a filter chain would close its connections."""
    version: str
    """Short digest of the content, the version_info of all three."""


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """The DiscoveryResponse files with what the sidecar proves and trusts. Envoy takes one per file."""

    leaf: bytes
    """Certificate and key together, so that one rename changes both."""
    roots: bytes
    version: str
    """Short digest of both certificates, the version_info of both files."""

    def __repr__(self) -> str:
        return f"Secrets(version={self.version!r})"


def render(spec: SidecarSpec) -> Configuration:
    """The configuration that does what `spec` says."""
    listeners = [_public_listener(spec), *_outbound_listener(spec)]
    clusters = _clusters(spec)
    intentions: Resource = {
        "name": RBAC_STAT_PREFIX,
        "typed_config": {
            "@type": _RBAC,
            "stat_prefix": RBAC_STAT_PREFIX,
            "rules": _rbac_rules(spec),
        },
    }
    version = _digest([listeners, clusters, intentions])
    return Configuration(
        lds=_discovery_response(version, _LISTENER, listeners),
        cds=_discovery_response(version, _CLUSTER, clusters),
        ecds=_discovery_response(version, _EXTENSION, [intentions]),
        version=version,
    )


def render_secrets(certificate_pem: str, key_pem: str, roots_pem: str) -> Secrets:
    """The secrets of one sidecar. The result holds the key: write it where only Envoy can read."""
    leaf: Resource = {
        "name": _LEAF_SECRET,
        "tls_certificate": {
            "certificate_chain": {"inline_string": certificate_pem},
            "private_key": {"inline_string": key_pem},
        },
    }
    roots: Resource = {
        "name": _ROOTS_SECRET,
        "validation_context": {"trusted_ca": {"inline_string": roots_pem}},
    }
    version = _digest([certificate_pem, roots_pem])
    return Secrets(
        leaf=_discovery_response(version, _SECRET, [leaf]),
        roots=_discovery_response(version, _SECRET, [roots]),
        version=version,
    )


def bootstrap(node_id: str, service: str) -> bytes:
    """What Envoy starts with: who it is, where its files are, an admin API that only root reaches."""
    return _json(
        {
            "node": {"id": node_id, "cluster": service},
            "admin": {"address": {"pipe": {"path": ADMIN_SOCKET, "mode": 0o600}}},
            "dynamic_resources": {
                "cds_config": _watched_file(CLUSTERS_FILE),
                "lds_config": _watched_file(LISTENERS_FILE),
            },
            "overload_manager": {
                "resource_monitors": [
                    {
                        "name": "envoy.resource_monitors.global_downstream_max_connections",
                        "typed_config": {
                            "@type": f"{_API}.extensions.resource_monitors.downstream_connections"
                            ".v3.DownstreamConnectionsConfig",
                            "max_active_downstream_connections": MAX_CONNECTIONS,
                        },
                    }
                ]
            },
        }
    )


def _public_listener(spec: SidecarSpec) -> Resource:
    chains = [_mutual_tls_chain(spec)]
    if spec.mode is MutualTLSMode.PERMISSIVE:
        chains += [_permissive_chain(port) for port in spec.service_ports]
    return {
        **_listener(PUBLIC_LISTENER, _WILDCARD, spec.inbound_port, spec.families),
        **({"transparent": True} if spec.transparent else {}),
        "traffic_direction": "INBOUND",
        "filter_chains": chains,
    }


def _mutual_tls_chain(spec: SidecarSpec) -> Resource:
    """The chain for everything that is not dialled on a service port.

    A connection to the sidecar's own port does not say which port of the application it wants, so that
    of a service with several ports only the first is reached with mTLS. Without any, there is nobody
    to connect to and local_app has no endpoint.
    """
    return {
        "name": PUBLIC_LISTENER,
        "transport_socket": _tls_socket(
            "DownstreamTlsContext",
            {"validation_context_sds_secret_config": _secret(_ROOTS_SECRET, ROOTS_FILE)},
            require_client_certificate=True,
        ),
        "transport_socket_connect_timeout": HANDSHAKE_TIMEOUT,
        "filters": [
            {
                "name": RBAC_STAT_PREFIX,
                "config_discovery": {
                    "config_source": _watched_file(INTENTIONS_FILE),
                    "type_urls": [_RBAC],
                },
            },
            _tcp_proxy(
                PUBLIC_LISTENER,
                LOCAL_APP,
                upstream_connect_mode="ON_DOWNSTREAM_TLS_HANDSHAKE",
                max_early_data_bytes=0,
            ),
        ],
    }


def _permissive_chain(port: int) -> Resource:
    return {
        "name": f"{PERMISSIVE_PUBLIC_LISTENER}:{port}",
        "filter_chain_match": {"destination_port": port},
        "filters": [
            _tcp_proxy(PERMISSIVE_PUBLIC_LISTENER, f"{PERMISSIVE_LOCAL_APP}:{port}"),
        ],
    }


def _rbac_rules(spec: SidecarSpec) -> Resource:
    """Intentions as one RBAC policy (agent/xds/rbac.go): it lists what the default is not.

    Precedence becomes exclusion: a wildcard matches everybody but the sources that rules before it name.
    Rules after a wildcard match nobody.
    """
    principals = []
    named: dict[str, IntentionRule] = {}
    for rule in spec.intentions:
        if rule.source in named:
            continue
        principal = _principal(spec, rule.source)
        if rule.source == ANY_SERVICE and named:
            others = [{"not_id": _principal(spec, source)} for source in named]
            principal = {"and_ids": {"ids": [principal, *others]}}
        named[rule.source] = rule
        if rule.allow != spec.default_allow:
            principals.append(principal)
        if rule.source == ANY_SERVICE:
            break
    rules: Resource = {"action": "DENY"} if spec.default_allow else {}
    if principals:
        policy = {"permissions": [{"any": True}], "principals": principals}
        rules["policies"] = {_RBAC_POLICY: policy}
    return rules


def _principal(spec: SidecarSpec, source: str) -> Resource:
    """Who a source is: a service of the same namespace, or with "*" every service of the mesh."""
    domain = re.escape(f"spiffe://{spec.trust_domain}/ns/")
    if source == ANY_SERVICE:
        pattern = f"^{domain}[^/]+/dc/[^/]+/svc/[^/]+$"
    else:
        pattern = f"^{domain}{re.escape(spec.namespace)}/dc/[^/]+/svc/{re.escape(source)}$"
    return {"authenticated": {"principal_name": {"safe_regex": {"regex": pattern}}}}


def _outbound_listener(spec: SidecarSpec) -> list[Resource]:
    """The listener that gets what the application dials; none when there is nothing it may dial."""
    chains = [
        _upstream_chain(spec, address, port, upstream, endpoint)
        for (address, port), (upstream, endpoint) in sorted(_destinations(spec).items())
    ]
    default = {} if spec.mesh_destinations_only else {"default_filter_chain": _passthrough_chain()}
    if not chains and not default:
        return []
    chains.append(_loop_chain(spec.outbound_port))
    return [
        {
            **_listener(OUTBOUND_LISTENER, _LOOPBACK, spec.outbound_port, spec.families),
            "traffic_direction": "OUTBOUND",
            "filter_chains": chains,
            **default,
        }
    ]


def _destinations(spec: SidecarSpec) -> dict[tuple[str, int], tuple[Upstream, Endpoint]]:
    """Which upstream has which address and port. Envoy refuses two chains with one match."""
    found: dict[tuple[str, int], tuple[Upstream, Endpoint]] = {}
    for upstream in spec.upstreams:
        for endpoint in upstream.endpoints:
            for port in (upstream.port, endpoint.service_port):
                found.setdefault((endpoint.address, port), (upstream, endpoint))
    return found


def _upstream_chain(
    spec: SidecarSpec, address: str, port: int, upstream: Upstream, endpoint: Endpoint
) -> Resource:
    length = ipaddress.ip_address(address).max_prefixlen
    stat_prefix = f"upstream.{upstream.service}.{upstream.namespace}.{upstream.datacenter}"
    return {
        "name": f"{upstream.service}.{upstream.namespace}.{upstream.datacenter}:{address}:{port}",
        "filter_chain_match": {
            "prefix_ranges": [{"address_prefix": address, "prefix_len": length}],
            "destination_port": port,
        },
        "filters": [_tcp_proxy(stat_prefix, _upstream_cluster_name(spec, upstream, endpoint))],
    }


def _passthrough_chain() -> Resource:
    return {
        "name": ORIGINAL_DESTINATION,
        "filters": [_tcp_proxy(f"upstream.{ORIGINAL_DESTINATION}", ORIGINAL_DESTINATION)],
    }


def _loop_chain(port: int) -> Resource:
    """Closes what was dialled to the listener itself: it would pass through to itself for ever.

    A chain without filters closes the connection (Envoy's FilterChain.filters).
    """
    loopback = [("127.0.0.0", 8), ("::1", 128)]
    return {
        "name": "loop",
        "filter_chain_match": {
            "prefix_ranges": [
                {"address_prefix": address, "prefix_len": length} for address, length in loopback
            ],
            "destination_port": port,
        },
    }


def _clusters(spec: SidecarSpec) -> list[Resource]:
    """The same in both modes: connections that drain still need and count in their cluster."""
    clusters = {LOCAL_APP: _local_app_cluster(spec, LOCAL_APP, spec.service_ports[:1])}
    for port in spec.service_ports:
        name = f"{PERMISSIVE_LOCAL_APP}:{port}"
        clusters[name] = {
            **_local_app_cluster(spec, name, (port,)),
            "alt_stat_name": PERMISSIVE_LOCAL_APP,
        }
    if not spec.mesh_destinations_only:
        clusters[ORIGINAL_DESTINATION] = _original_destination_cluster(ORIGINAL_DESTINATION)
    for upstream, endpoint in _destinations(spec).values():
        name = _upstream_cluster_name(spec, upstream, endpoint)
        clusters[name] = _upstream_cluster(spec, name, upstream, endpoint.proxy_port)
    return [cluster for _, cluster in sorted(clusters.items())]


def _local_app_cluster(spec: SidecarSpec, name: str, ports: tuple[int, ...]) -> Resource:
    """The application, on loopback; on ::1 where it does not listen on 127.0.0.1."""
    endpoints = []
    for port in ports:
        first, *others = (_socket_address(_LOOPBACK[family], port) for family in spec.families)
        additional = [{"address": address} for address in others]
        endpoints.append(
            {"endpoint": {"address": first, "additional_addresses": additional}}
            if additional
            else {"endpoint": {"address": first}}
        )
    return {
        **_cluster(name, "STATIC"),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _original_destination_cluster(name: str) -> Resource:
    return {**_cluster(name, "ORIGINAL_DST"), "lb_policy": "CLUSTER_PROVIDED"}


def _upstream_cluster_name(spec: SidecarSpec, upstream: Upstream, endpoint: Endpoint) -> str:
    name = "passthrough~" + spiffe.sni(
        spec.trust_domain, upstream.service, upstream.namespace, upstream.datacenter
    )
    usual = endpoint.proxy_port == DEFAULT_INBOUND_PORT
    return name if usual else f"{name}:{endpoint.proxy_port}"


def _upstream_cluster(
    spec: SidecarSpec, name: str, upstream: Upstream, proxy_port: int
) -> Resource:
    """mTLS to the instance that was dialled. It does not change when instances come and go."""
    identity = (upstream.service, upstream.namespace, upstream.datacenter)
    server_is = {
        "san_type": "URI",
        "matcher": {"exact": spiffe.service_id(spec.trust_domain, *identity)},
    }
    return {
        **_original_destination_cluster(name),
        "original_dst_lb_config": {"upstream_port_override": proxy_port},
        "transport_socket": _tls_socket(
            "UpstreamTlsContext",
            {
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": [server_is]},
                    "validation_context_sds_secret_config": _secret(_ROOTS_SECRET, ROOTS_FILE),
                }
            },
            sni=spiffe.sni(spec.trust_domain, *identity),
        ),
    }


def _listener(
    name: str, addresses: dict[Family, str], port: int, families: tuple[Family, ...]
) -> Resource:
    """What a listener is apart from its chains.

    Without SO_REUSEPORT a second Envoy by mistake cannot take half of the connections.
    """
    first, *others = (_socket_address(addresses[family], port) for family in families)
    listener: Resource = {
        "name": name,
        "stat_prefix": name,
        "address": first,
        "enable_reuse_port": False,
        "per_connection_buffer_limit_bytes": BUFFER_LIMIT_BYTES,
        "tcp_keepalive": _KEEPALIVE,
        "listener_filters": [
            {
                "name": "envoy.filters.listener.original_dst",
                "typed_config": {
                    "@type": f"{_API}.extensions.filters.listener.original_dst.v3.OriginalDst"
                },
            }
        ],
    }
    if others:
        listener["additional_addresses"] = [{"address": address} for address in others]
    return listener


def _cluster(name: str, discovery: str) -> Resource:
    return {
        "name": name,
        "type": discovery,
        "connect_timeout": CONNECT_TIMEOUT,
        "per_connection_buffer_limit_bytes": BUFFER_LIMIT_BYTES,
        "upstream_connection_options": {"tcp_keepalive": _KEEPALIVE},
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": MAX_CONNECTIONS, "max_pending_requests": MAX_CONNECTIONS}
            ]
        },
    }


def _tcp_proxy(stat_prefix: str, cluster: str, **fields: object) -> Resource:
    """Idle connections stay, as they would without a sidecar."""
    return _filter(
        "tcp_proxy",
        "TcpProxy",
        stat_prefix=stat_prefix,
        cluster=cluster,
        idle_timeout="0s",
        **fields,
    )


def _filter(package: str, message: str, **fields: object) -> Resource:
    return {
        "name": f"envoy.filters.network.{package}",
        "typed_config": {
            "@type": f"{_API}.extensions.filters.network.{package}.v3.{message}",
            **fields,
        },
    }


def _tls_socket(message: str, validation: Resource, **fields: object) -> Resource:
    return {
        "name": _TLS_SOCKET,
        "typed_config": {
            "@type": f"{_API}.extensions.transport_sockets.tls.v3.{message}",
            "common_tls_context": {
                "tls_params": {
                    "tls_minimum_protocol_version": "TLSv1_2",
                    "tls_maximum_protocol_version": "TLSv1_3",
                },
                "tls_certificate_sds_secret_configs": [_secret(_LEAF_SECRET, LEAF_FILE)],
                **validation,
            },
            **fields,
        },
    }


def _secret(name: str, file: str) -> Resource:
    return {"name": name, "sds_config": _watched_file(file)}


def _watched_file(file: str) -> Resource:
    """A file in the working directory. Envoy wants a slash in every path that it is to watch."""
    return {"resource_api_version": "V3", "path_config_source": {"path": f"./{file}"}}


def _socket_address(address: str, port: int) -> Resource:
    return {"socket_address": {"address": address, "port_value": port}}


def _discovery_response(version: str, type_url: str, resources: Iterable[Resource]) -> bytes:
    return _json(
        {
            "version_info": version,
            "type_url": type_url,
            "resources": [{"@type": type_url, **resource} for resource in resources],
        }
    )


def _digest(content: object) -> str:
    return hashlib.sha256(_json(content)).hexdigest()[:16]


def _json(content: object) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
