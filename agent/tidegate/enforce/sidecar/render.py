"""From a SidecarSpec to Envoy's configuration, as pure functions that give plain data and JSON text.

Shape, names and statistic prefixes are Consul's (agent/xds/{listeners,clusters,rbac}.go), so that
dashboards keep working. Everything is L4. What Envoy keeps alive over an update decides the shape
(its ListenerMessageUtil::filterChainOnlyChange): a listener differs between modes, intentions
and upstreams in its filter chains only, and each upstream instance has a chain of its own. What is named after
the first service of a workload is named as in Consul, what belongs to further ones has their name added.
File names are relative to Envoy's working directory, see `files`.
"""

import hashlib
import ipaddress
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from tidegate.enforce.sidecar.spec import (
    ANY,
    CIPHER_SUITES,
    Endpoint,
    LocalService,
    SidecarSpec,
    Upstream,
    tls_versions,
)
from tidegate.identity import spiffe
from tidegate.intent.policy import Family
from tidegate.model import (
    DEFAULT_INBOUND_PORT,
    DEFAULT_TENANT,
    MutualTLSMode,
    ServiceName,
    TLSSettings,
    source_matches,
)

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
SWITCHES_FILE = "rtds.json"
ADMIN_SOCKET = "admin.sock"
ACCESS_LOG = "access.log"
"""Connections without mTLS, beside the working directory."""
CLOSED_LOG = "closed.log"
"""Connections that the application wanted and that lead to no mesh destination, beside it as well."""

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

MAX_CONNECT_ATTEMPTS = 3
"""How many instances are tried for one connection to a virtual address."""
EJECTED_AFTER = 3
"""Failures to connect, one after the other, until an instance gets no more connections for a while."""

LEAF_SECRET = "leaf"  # noqa: S105
ROOTS_SECRET = "roots"  # noqa: S105
_SWITCHES = "switches"
_ACCESS_LOG_SWITCH = "tidegate.access_logs"
_RBAC_POLICY = "consul-intentions-layer4"

_API = "type.googleapis.com/envoy"
_LISTENER = f"{_API}.config.listener.v3.Listener"
_CLUSTER = f"{_API}.config.cluster.v3.Cluster"
_SECRET = f"{_API}.extensions.transport_sockets.tls.v3.Secret"
_EXTENSION = f"{_API}.config.core.v3.TypedExtensionConfig"
_RBAC = f"{_API}.extensions.filters.network.rbac.v3.RBAC"
_RUNTIME = f"{_API}.service.runtime.v3.Runtime"
_FILE_ACCESS_LOG = f"{_API}.extensions.access_loggers.file.v3.FileAccessLog"
_TLS_SOCKET = "envoy.transport_sockets.tls"

_LOOPBACK = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
_WILDCARD = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104

Resource = dict[str, Any]
"""One Envoy message in the JSON form of protobuf."""


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Listeners, clusters and intentions as the DiscoveryResponse files that Envoy watches."""

    lds: bytes
    cds: bytes
    ecds: dict[str, bytes]
    """Intentions, apart from the listener: a change in a filter chain would close its connections. By the name of
    the extension, one for each service; Envoy takes one per file."""
    version: str
    """Short digest of the content, the version_info of all of them."""
    rtds: bytes
    """What is switched at run time, which is no reason to change a listener either."""


class ServiceCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """What a sidecar proves for one of its services, PEM."""

    service: str
    certificate_pem: str
    """The leaf, and after it what a verifier may need to find a root that it trusts."""
    key_pem: str

    def __repr__(self) -> str:
        return f"ServiceCertificate({self.service!r})"


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """The DiscoveryResponse files with what the sidecar proves and trusts. Envoy takes one per file."""

    leaves: dict[str, bytes]
    """By the name of the secret, one for each service. Certificate and key together, so that one rename changes
    both."""
    roots: bytes
    version: str
    """Short digest of all certificates, the version_info of all files."""

    def __repr__(self) -> str:
        return f"Secrets(version={self.version!r})"


def render(spec: SidecarSpec) -> Configuration:
    """The configuration that does what `spec` says."""
    listeners = [_public_listener(spec), _outbound_listener(spec)]
    clusters = _clusters(spec)
    intentions = [
        _intentions(spec, service, _of(RBAC_STAT_PREFIX, number, service.service))
        for number, service in enumerate(spec.services)
    ]
    version = _digest([listeners, clusters, intentions])
    return Configuration(
        lds=_discovery_response(version, _LISTENER, listeners),
        cds=_discovery_response(version, _CLUSTER, clusters),
        ecds={one["name"]: _discovery_response(version, _EXTENSION, [one]) for one in intentions},
        version=version,
        rtds=_switches(spec),
    )


def render_secrets(certificates: Sequence[ServiceCertificate], roots_pem: str) -> Secrets:
    """The secrets of one sidecar: the certificates of its services, in their order, and what it trusts.

    The result holds keys: write it where only Envoy can read.
    """
    version = _digest([*(one.certificate_pem for one in certificates), roots_pem])
    leaves = {}
    for number, one in enumerate(certificates):
        name = _of(LEAF_SECRET, number, one.service)
        leaf: Resource = {
            "name": name,
            "tls_certificate": {
                "certificate_chain": {"inline_string": one.certificate_pem},
                "private_key": {"inline_string": one.key_pem},
            },
        }
        leaves[name] = _discovery_response(version, _SECRET, [leaf])
    roots: Resource = {
        "name": ROOTS_SECRET,
        "validation_context": {"trusted_ca": {"inline_string": roots_pem}},
    }
    return Secrets(
        leaves=leaves, roots=_discovery_response(version, _SECRET, [roots]), version=version
    )


def intentions_file(extension: str) -> str:
    """The file with the intentions that have that name in Envoy."""
    return INTENTIONS_FILE.replace("ecds", f"ecds{extension.removeprefix(RBAC_STAT_PREFIX)}")


def leaf_file(secret: str) -> str:
    """The file with the certificate that has that name in Envoy."""
    return f"{secret}.json"


def _of(name: str, number: int, service: str) -> str:
    """What is called `name` for the first service of a workload, for the one of this number."""
    return name if number == 0 else f"{name}.{service_label(service)}"


def service_label(service: str) -> str:
    """A service in names of statistics and files: its parts in the order of server names, divided by dots."""
    return ".".join(reversed(service.split("/")))


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
            "layered_runtime": {
                "layers": [
                    {
                        "name": _SWITCHES,
                        "rtds_layer": {
                            "name": _SWITCHES,
                            "rtds_config": _watched_file(SWITCHES_FILE),
                        },
                    }
                ]
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


def _switches(spec: SidecarSpec) -> bytes:
    # An integer: what filters of access logs take (Envoy RuntimeFilter::evaluate), other than other filters.
    percent = 100 if spec.access_logs else 0
    runtime: Resource = {"name": _SWITCHES, "layer": {_ACCESS_LOG_SWITCH: percent}}
    return _discovery_response(_digest(runtime), _RUNTIME, [runtime])


def _public_listener(spec: SidecarSpec) -> Resource:
    numbered = list(enumerate(spec.services))
    chains = [_mutual_tls_chain(spec, number, service) for number, service in numbered]
    chains += [
        _permissive_chain(number, service)
        for number, service in numbered
        if service.port and service.mode is MutualTLSMode.PERMISSIVE
    ]
    listener = _listener(PUBLIC_LISTENER, _WILDCARD, spec.inbound_port, spec.families)
    if len(numbered) > 1:
        listener |= {
            "listener_filters": [*listener["listener_filters"], _server_names(spec)],
            "listener_filters_timeout": HANDSHAKE_TIMEOUT,
            "continue_on_listener_filters_timeout": True,
        }
    return {
        **listener,
        **({"transparent": True} if spec.transparent else {}),
        "traffic_direction": "INBOUND",
        "filter_chains": chains,
    }


def _server_names(spec: SidecarSpec) -> Resource:
    """Looks for a server name, in what is dialled to the sidecar itself only.

    It waits for the client's first bytes, for which a client waits in vain that the server greets first.
    """
    port = spec.inbound_port
    to_sidecar = {"destination_port_range": {"start": port, "end": port + 1}}
    return {
        "name": "envoy.filters.listener.tls_inspector",
        "filter_disabled": {"not_match": to_sidecar},
        "typed_config": {
            "@type": f"{_API}.extensions.filters.listener.tls_inspector.v3.TlsInspector"
        },
    }


def _mutual_tls_chain(spec: SidecarSpec, number: int, service: LocalService) -> Resource:
    """The chain for what is not dialled on a port of a permissive service.

    A connection to the sidecar's own port says by its server name which service it wants; the first service
    takes what names none of the others. Where a service has no port there is nobody to connect to, and its
    local_app has no endpoint.
    """
    name = PUBLIC_LISTENER if number == 0 else f"{PUBLIC_LISTENER}:{service.service}"
    match = {
        "server_names": [spiffe.sni(spec.trust_domain, service.service, spec.datacenter)],
    }
    rbac = _of(RBAC_STAT_PREFIX, number, service.service)
    return {
        "name": name,
        **({"filter_chain_match": match} if number else {}),
        "transport_socket": _tls_socket(
            "DownstreamTlsContext",
            spec.incoming_tls,
            _of(LEAF_SECRET, number, service.service),
            {"validation_context_sds_secret_config": _secret(ROOTS_SECRET, ROOTS_FILE)},
            require_client_certificate=True,
        ),
        "transport_socket_connect_timeout": HANDSHAKE_TIMEOUT,
        "filters": [
            {
                "name": rbac,
                "config_discovery": {
                    "config_source": _watched_file(intentions_file(rbac)),
                    "type_urls": [_RBAC],
                },
            },
            _tcp_proxy(
                _of(PUBLIC_LISTENER, number, service.service),
                _of(LOCAL_APP, number, service.service),
                upstream_connect_mode="ON_DOWNSTREAM_TLS_HANDSHAKE",
                max_early_data_bytes=0,
            ),
        ],
    }


def _permissive_chain(number: int, service: LocalService) -> Resource:
    """Logs say each connection twice: when it has reached the application, and at its end."""
    switched = {"runtime_key": _ACCESS_LOG_SWITCH, "use_independent_randomness": True}
    return {
        "name": f"{PERMISSIVE_PUBLIC_LISTENER}:{service.port}",
        "filter_chain_match": {"destination_port": service.port},
        "filters": [
            _tcp_proxy(
                _of(PERMISSIVE_PUBLIC_LISTENER, number, service.service),
                f"{PERMISSIVE_LOCAL_APP}:{service.port}",
                access_log=[
                    _access_log(
                        ACCESS_LOG,
                        {"runtime_filter": {"percent_sampled": {}, **switched}},
                        start_time="%START_TIME%",
                        event="%ACCESS_LOG_TYPE%",
                        downstream_remote_address="%DOWNSTREAM_REMOTE_ADDRESS%",
                        downstream_local_address="%DOWNSTREAM_LOCAL_ADDRESS%",
                        service=service.service,
                        bytes_received="%BYTES_RECEIVED%",
                        bytes_sent="%BYTES_SENT%",
                        duration="%DURATION%",
                        response_flags="%RESPONSE_FLAGS%",
                    )
                ],
                access_log_options={"flush_access_log_on_connected": True},
            ),
        ],
    }


def _access_log(file: str, filter_: Resource, **fields: str) -> Resource:
    """One JSON object per line, in a file beside the working directory."""
    return {
        "name": "envoy.access_loggers.file",
        "filter": filter_,
        "typed_config": {
            "@type": _FILE_ACCESS_LOG,
            "path": f"../{file}",
            "log_format": {"json_format": fields},
        },
    }


def _intentions(spec: SidecarSpec, service: LocalService, name: str) -> Resource:
    rules = _rbac_rules(spec, service)
    return {
        "name": name,
        "typed_config": {"@type": _RBAC, "stat_prefix": name, "rules": rules},
    }


def _rbac_rules(spec: SidecarSpec, service: LocalService) -> Resource:
    """Intentions as one RBAC policy (agent/xds/rbac.go): it lists what the default is not.

    Precedence becomes exclusion: a wildcard matches everybody but the sources that rules before it are about. Rules
    after one that is about the same sources match nobody.
    """
    principals = []
    before: list[str] = []
    for rule in service.intentions:
        if any(source_matches(earlier, rule.source) for earlier in before):
            continue
        if rule.allow != service.default_allow:
            principal = _principal(spec, rule.source)
            within = [source for source in before if source_matches(rule.source, source)]
            if within:
                others = [{"not_id": _principal(spec, source)} for source in within]
                principal = {"and_ids": {"ids": [principal, *others]}}
            principals.append(principal)
        before.append(rule.source)
    rules: Resource = {"action": "DENY"} if service.default_allow else {}
    if principals:
        policy = {"permissions": [{"any": True}], "principals": principals}
        rules["policies"] = {_RBAC_POLICY: policy}
    return rules


def _principal(spec: SidecarSpec, source: str) -> Resource:
    """Who a source is: a service, every service of a namespace, or every service of a partition."""
    name = ServiceName.of(source)
    domain = re.escape(f"spiffe://{spec.trust_domain}{spiffe.partition_path(name.partition)}/ns/")
    namespace, service = (
        "[^/]+" if part == ANY else re.escape(part) for part in (name.namespace, name.name)
    )
    pattern = f"^{domain}{namespace}/dc/[^/]+/svc/{service}$"
    return {"authenticated": {"principal_name": {"safe_regex": {"regex": pattern}}}}


def _outbound_listener(spec: SidecarSpec) -> Resource:
    """The listener that gets what the application dials.

    What finds no chain is closed, and logged so that it can be said where it wanted to go (Consul has no listener
    where there is nothing to dial).
    """
    chains = [
        *(
            _upstream_chain(
                spec, address, port, upstream, _upstream_cluster_name(spec, upstream, endpoint)
            )
            for (address, port), (upstream, endpoint) in sorted(_destinations(spec).items())
        ),
        *(
            _virtual_chain(spec, address, port, upstream)
            for (address, port), upstream in sorted(_virtual_destinations(spec).items())
        ),
        _loop_chain(spec.outbound_port),
    ]
    default = {} if spec.mesh_destinations_only else {"default_filter_chain": _passthrough_chain()}
    closed = _access_log(
        CLOSED_LOG,
        {"response_flag_filter": {"flags": ["NR"]}},
        destination="%DOWNSTREAM_LOCAL_ADDRESS%",
    )
    return {
        **_listener(OUTBOUND_LISTENER, _LOOPBACK, spec.outbound_port, spec.families),
        "traffic_direction": "OUTBOUND",
        "filter_chains": chains,
        **default,
        "access_log": [closed],
    }


def _destinations(spec: SidecarSpec) -> dict[tuple[str, int], tuple[Upstream, Endpoint]]:
    """Which upstream has which address and port. Envoy refuses two chains with one match."""
    found: dict[tuple[str, int], tuple[Upstream, Endpoint]] = {}
    for upstream in spec.upstreams:
        for endpoint in upstream.endpoints:
            place = (endpoint.address, endpoint.service_port)
            found.setdefault(place, (upstream, endpoint))
    return found


def _virtual_destinations(spec: SidecarSpec) -> dict[tuple[str, int], Upstream]:
    """Which upstream has which virtual address and port; an address of an instance is the instance's."""
    taken = _destinations(spec)
    found: dict[tuple[str, int], Upstream] = {}
    for upstream in spec.upstreams:
        ports = upstream.virtual_ports or (upstream.port,)
        if upstream.endpoints:
            for place in itertools.product(upstream.virtual_addresses, ports):
                if place not in taken:
                    found.setdefault(place, upstream)
    return found


def _upstream_chain(
    spec: SidecarSpec, address: str, port: int, upstream: Upstream, cluster: str, **fields: object
) -> Resource:
    length = ipaddress.ip_address(address).max_prefixlen
    name = _upstream_label(upstream)
    return {
        "name": f"{name}:{address}:{port}",
        "filter_chain_match": {
            "prefix_ranges": [{"address_prefix": address, "prefix_len": length}],
            "destination_port": port,
        },
        "filters": [_tcp_proxy(f"upstream.{name}", cluster, **fields)],
    }


def _virtual_chain(spec: SidecarSpec, address: str, port: int, upstream: Upstream) -> Resource:
    cluster = _balanced_cluster_name(spec, upstream, _family_of(address))
    return _upstream_chain(
        spec, address, port, upstream, cluster, max_connect_attempts=MAX_CONNECT_ATTEMPTS
    )


def _upstream_label(upstream: Upstream) -> str:
    """An upstream in names of statistics (consul agent/structs UpstreamDestinationStat)."""
    name = ServiceName.of(upstream.service)
    partition = "" if name.partition == DEFAULT_TENANT else f".{name.partition}"
    return f"{name.name}.{name.namespace}{partition}.{upstream.datacenter}"


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
    clusters = {}
    for number, service in enumerate(spec.services):
        name = _of(LOCAL_APP, number, service.service)
        clusters[name] = _local_app_cluster(spec, name, service.port)
        if service.port:
            name = f"{PERMISSIVE_LOCAL_APP}:{service.port}"
            clusters[name] = {
                **_local_app_cluster(spec, name, service.port),
                "alt_stat_name": _of(PERMISSIVE_LOCAL_APP, number, service.service),
            }
    if not spec.mesh_destinations_only:
        clusters[ORIGINAL_DESTINATION] = _original_destination_cluster(ORIGINAL_DESTINATION)
    for upstream, endpoint in _destinations(spec).values():
        name = _upstream_cluster_name(spec, upstream, endpoint)
        clusters[name] = _upstream_cluster(spec, name, upstream, endpoint.proxy_port)
    for (address, _), upstream in _virtual_destinations(spec).items():
        family = _family_of(address)
        name = _balanced_cluster_name(spec, upstream, family)
        clusters[name] = _balanced_cluster(spec, name, upstream, family)
    return [cluster for _, cluster in sorted(clusters.items())]


def _local_app_cluster(spec: SidecarSpec, name: str, port: int) -> Resource:
    """The application, on loopback; on ::1 where it does not listen on 127.0.0.1."""
    endpoints = []
    if port:
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
    name = "passthrough~" + _sni(spec, upstream)
    usual = endpoint.proxy_port == DEFAULT_INBOUND_PORT
    return name if usual else f"{name}:{endpoint.proxy_port}"


def _upstream_cluster(
    spec: SidecarSpec, name: str, upstream: Upstream, proxy_port: int
) -> Resource:
    """mTLS to the instance that was dialled. It does not change when instances come and go."""
    return {
        **_original_destination_cluster(name),
        "original_dst_lb_config": {"upstream_port_override": proxy_port},
        "transport_socket": _upstream_socket(spec, upstream),
    }


def _balanced_cluster_name(spec: SidecarSpec, upstream: Upstream, family: Family) -> str:
    name = _sni(spec, upstream)
    return name if family is Family.IPV4 else f"{name}~{family}"


def _balanced_cluster(spec: SidecarSpec, name: str, upstream: Upstream, family: Family) -> Resource:
    """mTLS to any of the instances that do not fail to answer, each in turn.

    By the family of the address that was dialled, if instances have one of that family: an instance with both
    would get twice its share.
    """
    endpoints = sorted(
        endpoint for endpoint in upstream.endpoints if _family_of(endpoint.address) is family
    ) or sorted(upstream.endpoints)
    members = [
        {"endpoint": {"address": _socket_address(endpoint.address, endpoint.proxy_port)}}
        for endpoint in endpoints
    ]
    return {
        **_cluster(name, "STATIC"),
        "alt_stat_name": _sni(spec, upstream),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]},
        "outlier_detection": {
            "consecutive_5xx": EJECTED_AFTER,
            "max_ejection_percent": 100,
        },
        "transport_socket": _upstream_socket(spec, upstream),
    }


def _upstream_socket(spec: SidecarSpec, upstream: Upstream) -> Resource:
    """TLS that proves the workload's first service, and takes nobody but the upstream for the server."""
    server_is = {
        "san_type": "URI",
        "matcher": {
            "exact": spiffe.service_id(spec.trust_domain, upstream.service, upstream.datacenter)
        },
    }
    return _tls_socket(
        "UpstreamTlsContext",
        spec.outgoing_tls,
        LEAF_SECRET,
        {
            "combined_validation_context": {
                "default_validation_context": {"match_typed_subject_alt_names": [server_is]},
                "validation_context_sds_secret_config": _secret(ROOTS_SECRET, ROOTS_FILE),
            }
        },
        sni=_sni(spec, upstream),
    )


def _sni(spec: SidecarSpec, upstream: Upstream) -> str:
    return spiffe.sni(spec.trust_domain, upstream.service, upstream.datacenter)


def _family_of(address: str) -> Family:
    return Family.IPV6 if ":" in address else Family.IPV4


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


def _tls_socket(
    message: str, settings: TLSSettings, leaf: str, validation: Resource, **fields: object
) -> Resource:
    lowest, highest = tls_versions(settings)
    parameters: Resource = {
        "tls_minimum_protocol_version": lowest,
        "tls_maximum_protocol_version": highest,
    }
    if settings.cipher_suites:
        parameters["cipher_suites"] = [CIPHER_SUITES[suite] for suite in settings.cipher_suites]
    return {
        "name": _TLS_SOCKET,
        "typed_config": {
            "@type": f"{_API}.extensions.transport_sockets.tls.v3.{message}",
            "common_tls_context": {
                "tls_params": parameters,
                "tls_certificate_sds_secret_configs": [_secret(leaf, leaf_file(leaf))],
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
