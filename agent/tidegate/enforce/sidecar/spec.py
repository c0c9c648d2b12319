"""What one sidecar should do, as data: everything that its configuration is a function of.

Filled by the node from intent and catalog, read by `render`. Names and ports are checked when a
spec is made, so that rendering cannot fail; who may call whom was decided before (IntentionRule).
"""

import ipaddress

import msgspec

from tidegate.errors import InputError
from tidegate.identity import spiffe
from tidegate.intent.policy import Family
from tidegate.model import (
    DEFAULT_INBOUND_PORT,
    DEFAULT_OUTBOUND_PORT,
    IntentionRule,
    MutualTLSMode,
)

ANY_SERVICE = "*"
"""The source of an intention that means every service (Consul's wildcard)."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One meshed instance of an upstream service."""

    address: str
    service_port: int
    """TCP port that the instance's application listens on."""
    proxy_port: int = DEFAULT_INBOUND_PORT
    """TCP port of the instance's public listener."""

    def __post_init__(self) -> None:
        _check_address(self.address)
        _check_port(self.service_port, "service_port")
        _check_port(self.proxy_port, "proxy_port")


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """One service that the workload may call with mTLS."""

    service: str
    namespace: str = spiffe.DEFAULT_NAMESPACE
    datacenter: str = spiffe.DEFAULT_DATACENTER
    port: int
    """TCP port that callers dial. An instance is reached by its own service_port as well."""
    endpoints: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        spiffe.label(self.service, "service")
        spiffe.label(self.namespace, "namespace")
        spiffe.label(self.datacenter, "datacenter")
        _check_port(self.port, "port")


class SidecarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The whole input of one sidecar's configuration."""

    service: str
    namespace: str = spiffe.DEFAULT_NAMESPACE
    datacenter: str = spiffe.DEFAULT_DATACENTER
    trust_domain: str
    mode: MutualTLSMode = MutualTLSMode.STRICT
    service_ports: tuple[int, ...] = ()
    """TCP ports of the application; the first is the one that mTLS connections reach."""
    inbound_port: int = DEFAULT_INBOUND_PORT
    outbound_port: int = DEFAULT_OUTBOUND_PORT
    transparent: bool = False
    """Whether inbound connections are handed over with their addresses as they are (tproxy)."""
    intentions: tuple[IntentionRule, ...] = ()
    """Who may call this service, highest precedence first."""
    default_allow: bool = False
    """What happens to callers that no intention names."""
    mesh_destinations_only: bool = False
    """Whether connections to anything but upstreams are refused (Consul's MeshDestinationsOnly)."""
    upstreams: tuple[Upstream, ...] = ()
    """Services to call with mTLS. Where two claim one address and port, the earlier has it."""
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)

    def __post_init__(self) -> None:
        spiffe.service_id(self.trust_domain, self.service, self.namespace, self.datacenter)
        for rule in self.intentions:
            if rule.source != ANY_SERVICE:
                spiffe.label(rule.source, "intentions.source")
        ports = (self.inbound_port, self.outbound_port, *self.service_ports)
        for port in ports:
            _check_port(port, "port")
        if len(set(ports)) != len(ports):
            raise InputError(
                f"the ports {', '.join(map(str, ports))} of {self.service}'s sidecar and"
                " application are not all different",
                field="service_ports",
                expected="ports other than the sidecar's own",
            )
        if not self.families:
            raise InputError("no address family", field="families", expected="ipv4 or ipv6")


def _check_port(port: int, field: str) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"{port} is not a TCP port", field=field, expected="1 to 65535")


def _check_address(address: str) -> None:
    """Canonical, because two spellings of one address would be two chains with one match."""
    try:
        canonical: str | None = ipaddress.ip_address(address).compressed
    except ValueError:
        canonical = None
    if address != canonical or "%" in address:
        raise InputError(
            f"{address!r} is not an IP address",
            field="address",
            expected="IPv4 or IPv6 in canonical form, without a zone",
        )
