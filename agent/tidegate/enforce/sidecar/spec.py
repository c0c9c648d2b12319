"""What one sidecar should do, as data: everything that its configuration is a function of.

Filled by the node from intent and catalog, read by `render`. Names and ports are checked when a
spec is made, so that rendering cannot fail; who may call whom was decided before (IntentionRule).
Services are texts of ServiceNames.
"""

import ipaddress
from typing import Final

import msgspec

from tidegate.errors import InputError
from tidegate.identity import spiffe
from tidegate.intent.policy import Family
from tidegate.model import (
    DEFAULT_INBOUND_PORT,
    DEFAULT_OUTBOUND_PORT,
    IntentionRule,
    MutualTLSMode,
    ServiceName,
    TLSSettings,
)

ANY = "*"
"""Stands for every name, or every namespace, in the source of an intention (Consul's wildcard)."""

TLS_VERSIONS: Final = ("TLSv1_0", "TLSv1_1", "TLSv1_2", "TLSv1_3")
"""From old to new; Consul and Envoy have the same words."""

LOWEST_TLS_VERSION = "TLSv1_2"
"""Where nobody says a lower one."""

CIPHER_SUITES: Final = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_RSA_WITH_AES_128_GCM_SHA256": "AES128-GCM-SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384": "AES256-GCM-SHA384",
    "TLS_RSA_WITH_AES_128_CBC_SHA": "AES128-SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA": "AES256-SHA",
}
"""Envoy's name of each suite that Consul knows (consul types/tls.go)."""

_ECDSA = "_ECDSA_"
"""In the names of suites that go with the mesh's certificates, whose keys are ECDSA."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One meshed instance of an upstream service, at one of its addresses."""

    address: str
    service_port: int
    """TCP port that the instance's application listens on."""
    proxy_port: int = DEFAULT_INBOUND_PORT
    """TCP port of the instance's public listener."""

    def __post_init__(self) -> None:
        check_address(self.address)
        _check_port(self.service_port, "service_port")
        _check_port(self.proxy_port, "proxy_port")


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """One service that the workload may call with mTLS."""

    service: str
    datacenter: str = spiffe.DEFAULT_DATACENTER
    port: int
    """TCP port of the service; at an instance callers dial its own service_port."""
    virtual_ports: tuple[int, ...] = ()
    """TCP ports that callers dial at its virtual addresses, where these are others than `port`."""
    endpoints: tuple[Endpoint, ...] = ()
    virtual_addresses: tuple[str, ...] = ()
    """Addresses at which any of the endpoints will do."""

    def __post_init__(self) -> None:
        spiffe.service_name(self.service)
        spiffe.label(self.datacenter, "datacenter")
        for port in (self.port, *self.virtual_ports):
            _check_port(port, "port")
        for address in self.virtual_addresses:
            check_address(address)


class LocalService(msgspec.Struct, frozen=True, kw_only=True):
    """One of the services that the workload is."""

    service: str
    port: int = 0
    """TCP port of the application; 0 where there is nobody to connect to."""
    mode: MutualTLSMode = MutualTLSMode.STRICT
    intentions: tuple[IntentionRule, ...] = ()
    """Who may call this service, highest precedence first."""
    default_allow: bool = False
    """What happens to callers that no intention names."""

    def __post_init__(self) -> None:
        spiffe.service_name(self.service)
        for rule in self.intentions:
            _check_source(rule.source)
        if self.port:
            _check_port(self.port, "port")


class SidecarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The whole input of one sidecar's configuration."""

    service: str
    """The first of the workload's services: whose identity its own calls bear."""
    datacenter: str = spiffe.DEFAULT_DATACENTER
    trust_domain: str
    port: int = 0
    """As in LocalService, as are the next three."""
    mode: MutualTLSMode = MutualTLSMode.STRICT
    intentions: tuple[IntentionRule, ...] = ()
    default_allow: bool = False
    more_services: tuple[LocalService, ...] = ()
    """The workload's further services. Each has a port of its own."""
    inbound_port: int = DEFAULT_INBOUND_PORT
    outbound_port: int = DEFAULT_OUTBOUND_PORT
    transparent: bool = False
    """Whether inbound connections are handed over with their addresses as they are (tproxy)."""
    mesh_destinations_only: bool = False
    """Whether connections to anything but upstreams are refused (Consul's MeshDestinationsOnly)."""
    upstreams: tuple[Upstream, ...] = ()
    """Services to call with mTLS. Where two claim one address and port, the earlier has it."""
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)
    incoming_tls: TLSSettings = TLSSettings()
    outgoing_tls: TLSSettings = TLSSettings()
    access_logs: bool = False
    """Whether connections without mTLS are logged."""

    def __post_init__(self) -> None:
        spiffe.trust_domain(self.trust_domain)
        spiffe.label(self.datacenter, "datacenter")
        services = self.services
        for port in (self.inbound_port, self.outbound_port):
            _check_port(port, "port")
        ports = [self.inbound_port, self.outbound_port]
        ports += [one.port for one in services if one.port]
        if len(set(ports)) != len(ports):
            raise InputError(
                f"the ports {', '.join(map(str, ports))} of {self.service}'s sidecar and"
                " application are not all different",
                field="port",
                expected="ports other than the sidecar's own, one for each service",
            )
        names = [one.service for one in services]
        if len(set(names)) != len(names):
            raise InputError(
                f"{self.service} has a service on two ports: {', '.join(names)}",
                field="more_services",
                expected="a service for each port",
            )
        _check_one_partition(names)
        if any(not one.port for one in self.more_services):
            problem = f"one of the further services of {self.service} has no port"
            raise InputError(problem, field="more_services", expected="a port for each")
        if not self.families:
            raise InputError("no address family", field="families", expected="ipv4 or ipv6")
        _check_tls(self.incoming_tls, "incoming_tls")
        _check_tls(self.outgoing_tls, "outgoing_tls")

    @property
    def services(self) -> tuple[LocalService, ...]:
        """All services of the workload, `service` first."""
        first = LocalService(
            service=self.service,
            port=self.port,
            mode=self.mode,
            intentions=self.intentions,
            default_allow=self.default_allow,
        )
        return (first, *self.more_services)


def tls_versions(settings: TLSSettings) -> tuple[str, str]:
    """The lowest and the highest TLS version that `settings` allow; what they do not say, the sidecar does."""
    said = settings.max_version
    highest = said if said in TLS_VERSIONS else TLS_VERSIONS[-1]
    lowest = settings.min_version
    if lowest not in TLS_VERSIONS:
        lowest = min(LOWEST_TLS_VERSION, highest)
    return lowest, highest


def _check_tls(settings: TLSSettings, field: str) -> None:
    """That a connection can come about at all: what contradicts itself would refuse everybody."""
    lowest, highest = tls_versions(settings)
    if lowest > highest:
        problem = f"no TLS version is at least {lowest} and at most {highest}"
        raise InputError(problem, field=field, expected=f"one of {', '.join(TLS_VERSIONS)}")
    for suite in settings.cipher_suites:
        if suite not in CIPHER_SUITES:
            expected = "a suite of TLS 1.2 or before by its IANA name"
            raise InputError(f"{suite!r} is no cipher suite", field=field, expected=expected)
    usable = [suite for suite in settings.cipher_suites if _ECDSA in suite]
    if settings.cipher_suites and not usable and highest != TLS_VERSIONS[-1]:
        raise InputError(
            f"with {', '.join(settings.cipher_suites)} and at most {highest} nobody can connect:"
            " the certificates of the mesh are ECDSA",
            field=field,
            expected="a suite with ECDSA, such as TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        )


def _check_one_partition(services: list[str]) -> None:
    """Because everything but intentions and modes holds for the workload as a whole, by its partition's entries."""
    if len({ServiceName.of(service).partition for service in services}) > 1:
        problem = f"{', '.join(services)} are in several partitions"
        raise InputError(problem, field="more_services", expected="one partition for a workload")


def _check_source(text: str) -> None:
    name = ServiceName.of(text)
    spiffe.label(name.partition, "intentions.source")
    if name.name != ANY:
        # A name in any namespace says nothing in Consul, and is refused there.
        spiffe.label(name.name, "intentions.source")
        spiffe.label(name.namespace, "intentions.source")
    elif name.namespace != ANY:
        spiffe.label(name.namespace, "intentions.source")


def _check_port(port: int, field: str) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"{port} is not a TCP port", field=field, expected="1 to 65535")


def check_address(address: str) -> None:
    """That it is one, and canonical, because two spellings of one address would be two chains with one match."""
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
