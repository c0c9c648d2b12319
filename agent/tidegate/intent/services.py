"""Service definitions: what is registered, and how its sidecar is to be.

Consul's forms: `service { ... }`, `services [ ... ]` or one definition alone, in HCL, JSON and YAML, CamelCase or
snake_case; a sidecar within `connect { sidecar_service { ... } }`, or a registration of its own of kind
connect-proxy. Field names and rules: Consul's agent/structs ServiceDefinition, NodeService.Validate,
ConnectProxyConfig. Knows nothing of catalogs and workloads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from tidegate.intent.documents import read_documents
from tidegate.intent.entries import without_default_tenancy
from tidegate.intent.fields import (
    KEPT,
    Address,
    Field,
    Flag,
    ListOf,
    MapOf,
    MaybeEmpty,
    Name,
    Number,
    Object,
    Opaque,
    Place,
    Record,
    Shape,
    Tenant,
    Text,
    TextMap,
    Word,
    as_object,
    begin_of,
    folded,
    line_of,
)
from tidegate.intent.proxy_fields import (
    EXPOSE,
    MESH_GATEWAY,
    MUTUAL_TLS_MODE,
    NO_EXTENSIONS,
    NO_PEERS,
    OF_NAMESPACE,
    PROXY_CONFIG,
    PROXY_MODE,
    TRANSPARENT_PROXY,
    TransparentProxy,
)
from tidegate.model import DEFAULT_TENANT, MutualTLSMode, ServiceName, ServicePort

CONNECT_PROXY = "connect-proxy"
PROXY_SUFFIX = "-sidecar-proxy"
"""What Consul puts behind the id and the name of a service for its sidecar's."""

_VIRTUAL_TAGS: Final = ("virtual", "consul-virtual")


class TaggedAddress(msgspec.Struct, frozen=True, kw_only=True):
    address: str = ""
    port: int = 0


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """A service that a proxy is told to make reachable."""

    destination_name: str = ""
    destination_namespace: str = ""
    """"" is the namespace of the service whose proxy it is; so is the partition."""
    destination_partition: str = ""
    local_bind_address: str = ""
    local_bind_port: int = 0
    """0: reached by its own addresses only (transparent proxy)."""
    rest: dict[str, Any] = {}


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """What a sidecar is told by its registration."""

    destination_service_name: str = ""
    destination_service_id: str = ""
    local_service_address: str = ""
    """Where the application listens; "" is this host's loopback."""
    local_service_port: int = 0
    """0: the port of the service."""
    mode: str = ""
    transparent_proxy: TransparentProxy = TransparentProxy()
    mutual_tls_mode: MutualTLSMode | None = None
    """Wins over config entries; None says nothing."""
    upstreams: tuple[Upstream, ...] = ()
    config: dict[str, Any] = {}
    rest: dict[str, Any] = {}


class SidecarService(msgspec.Struct, frozen=True, kw_only=True):
    """A sidecar that is registered together with its service."""

    name: str = ""
    address: str = ""
    port: int = 0
    """Of its public listener; 0 leaves it to whoever registers."""
    tags: tuple[str, ...] = ()
    meta: dict[str, str] = {}
    tagged_addresses: dict[str, TaggedAddress] = {}
    proxy: Proxy = Proxy()
    rest: dict[str, Any] = {}


class Connect(msgspec.Struct, frozen=True, kw_only=True):
    sidecar_service: SidecarService | None = None


class ServiceDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """One service, or one proxy, of one node."""

    kind: str = ""
    """"" for an application, or connect-proxy."""
    id: str = ""
    """Unique on its node: the name, where nobody says another."""
    name: str = ""
    namespace: str = DEFAULT_TENANT
    partition: str = DEFAULT_TENANT
    address: str = ""
    """Address or host name; "" is the node's."""
    port: int = 0
    tags: tuple[str, ...] = ()
    meta: dict[str, str] = {}
    tagged_addresses: dict[str, TaggedAddress] = {}
    connect: Connect = Connect()
    proxy: Proxy | None = None
    """Of a connect-proxy."""
    rest: dict[str, Any] = {}
    """What Consul has for services and tidegate only keeps, in Consul's JSON."""

    @property
    def service(self) -> ServiceName:
        return ServiceName(self.name, self.namespace, self.partition)

    @property
    def virtual_addresses(self) -> tuple[str, ...]:
        """Addresses that stand for all instances of the service, sorted by their tag.

        Consul's tags are `virtual` and `consul-virtual`; more of them begin so, such as `virtual_ipv6`.
        """
        tagged = sorted(self.tagged_addresses.items())
        virtual = (one for tag, one in tagged if tag.startswith(_VIRTUAL_TAGS))
        return tuple(dict.fromkeys(one.address for one in virtual))

    @property
    def sidecar(self) -> SidecarService | None:
        return self.connect.sidecar_service


def parse_services(text: str, source: str) -> tuple[ServiceDefinition, ...]:
    """Every service definition in a text in HCL, JSON or YAML, in order.

    `source` is the file's name or "-", for messages. Raises InputError with line and field, or
    InputErrors when several things are wrong.
    """
    place = Place([], source)
    raw = [
        item
        for document in read_documents(text, source)
        for item in _definitions(document, place._replace(line=document.line))
    ]
    if not raw and not place.faults:
        place.fault("no service definition", 'one such as `service { name = "web" port = 80 }`')
    read = [_definition(fields, at) for fields, at in raw]
    first: dict[tuple[str, str, str], int] = {}
    for definition, (fields, at) in zip(read, raw, strict=True):
        key = (definition.id, definition.namespace, definition.partition)
        if definition.id and key in first:
            where = f" (the first is on line {first[key]})" if first[key] else ""
            at.of(fields, "ID").fault(f"{definition.id} is there twice", f"an ID for each{where}")
        first.setdefault(key, at.line)
    place.raise_faults()
    return tuple(read)


def from_consul(raw: Mapping[str, Any], source: str = "") -> ServiceDefinition:
    """One service definition from an object in Consul's JSON. Raises InputError or InputErrors."""
    place = Place([], source)
    definition = _definition(raw, place)
    place.raise_faults()
    return definition


def to_consul(definition: ServiceDefinition) -> dict[str, Any]:
    """The definition as Consul's HTTP API takes it; a tenancy that is the default is not said."""
    raw = without_default_tenancy(_DEFINITION.encode(definition))
    if definition.sidecar is not None:
        # A sidecar of which nothing is said is one too.
        raw["Connect"] = {"SidecarService": _SIDECAR.encode(definition.sidecar)}
    return raw


def looks_like_services(document: Mapping[str, Any]) -> bool:
    """Whether an object holds service definitions, and is no config entry."""
    keys = {folded(key): key for key in document}
    if not keys.keys().isdisjoint(_HOLDERS):
        return True
    return document.get(keys.get("kind", ""), "") == CONNECT_PROXY or (
        "kind" not in keys and "name" in keys
    )


def upstreams_of(owner: ServiceName, proxy: Proxy | None) -> tuple[str, ...]:
    """The services, as texts, that the proxy of `owner` is told to make reachable."""
    upstreams = proxy.upstreams if proxy else ()
    return tuple(dict.fromkeys(str(_destination(owner, one)) for one in upstreams))


def more_ports(
    definition: ServiceDefinition, all_of_node: tuple[ServiceDefinition, ...]
) -> tuple[ServicePort, ...]:
    """The further services behind the sidecar of `definition`, in order.

    They are those of the same address that have no sidecar of their own, and a port of their own.
    """
    if definition.sidecar is None or not definition.address:
        return ()
    proxied = {one.proxy.destination_service_id for one in all_of_node if one.proxy}
    return tuple(
        ServicePort(service=str(other.service), port=other.port)
        for other in all_of_node
        if other.address == definition.address
        and other.port not in (0, definition.port)
        and not other.kind
        and other.sidecar is None
        and other.id not in proxied
    )


_NO_SOCKETS = "only TCP can be redirected, no unix socket"

_UPSTREAM = Shape(
    Upstream,
    (
        Field("DestinationName", "destination_name", Name(), always=True),
        Field("DestinationNamespace", "destination_namespace", MaybeEmpty(Tenant())),
        Field("DestinationPartition", "destination_partition", MaybeEmpty(Tenant())),
        Field("DestinationType", "", Word(("service",))),
        Field("Datacenter", KEPT, Text()),
        Field("LocalBindAddress", "local_bind_address", Address()),
        Field("LocalBindPort", "local_bind_port", Number(0, 65535)),
        Field("Config", KEPT, PROXY_CONFIG),
        Field("MeshGateway", KEPT, MESH_GATEWAY),
    ),
    required={"DestinationName": "a service name"},
    refused={
        "DestinationPeer": NO_PEERS,
        "LocalBindSocketPath": _NO_SOCKETS,
        "LocalBindSocketMode": _NO_SOCKETS,
    },
    derived=("CentrallyConfigured", "IngressHosts"),
)
_PROXY = Shape(
    Proxy,
    (
        Field("DestinationServiceName", "destination_service_name", MaybeEmpty(Name())),
        Field("DestinationServiceID", "destination_service_id", Text()),
        Field("LocalServiceAddress", "local_service_address", Address()),
        Field("LocalServicePort", "local_service_port", Number(0, 65535)),
        Field("Mode", "mode", PROXY_MODE),
        Field("TransparentProxy", "transparent_proxy", TRANSPARENT_PROXY),
        Field("MutualTLSMode", "mutual_tls_mode", MUTUAL_TLS_MODE),
        Field("Upstreams", "upstreams", ListOf[Upstream](Object(_UPSTREAM))),
        Field("Config", "config", PROXY_CONFIG),
        Field("MeshGateway", KEPT, MESH_GATEWAY),
        Field("Expose", KEPT, EXPOSE),
    ),
    refused={
        "LocalServiceSocketPath": _NO_SOCKETS,
        "EnvoyExtensions": NO_EXTENSIONS,
        "AccessLogs": "proxy-defaults say it for every sidecar",
    },
)
_TAGGED_ADDRESS = Shape(
    TaggedAddress,
    (Field("Address", "address", Address()), Field("Port", "port", Number(0, 65535))),
    required={"Address": "an IP address"},
)
_CHECKED = (
    Field("Check", KEPT, Opaque()),
    Field("Checks", KEPT, ListOf[dict[str, Any]](Opaque())),
    Field("Weights", KEPT, Record(("Passing", Number(0, 65535)), ("Warning", Number(0, 65535)))),
    Field("Locality", KEPT, Record(("Region", Text()), ("Zone", Text()))),
    Field("EnableTagOverride", KEPT, Flag()),
)
"""Who calls by the catalog's health, weights and places is Consul; tidegate's sidecars go by what fails."""

_COMMON = (
    Field("Tags", "tags", ListOf[str](Text())),
    Field("Address", "address", Text()),
    Field("TaggedAddresses", "tagged_addresses", MapOf(Object(_TAGGED_ADDRESS))),
    Field("Port", "port", Number(0, 65535)),
    Field("Meta", "meta", TextMap()),
    *_CHECKED,
)
_SIDECAR = Shape(
    SidecarService,
    (
        Field("Name", "name", MaybeEmpty(Name())),
        *_COMMON,
        Field("Proxy", "proxy", Object(_PROXY)),
    ),
    refused={
        "ID": "it follows from the service's ID",
        "Kind": "it is connect-proxy",
        "Connect": "a sidecar has no sidecar",
        "SocketPath": _NO_SOCKETS,
    },
    derived=("Token",),
)
_CONNECT = Shape(
    Connect,
    (Field("SidecarService", "sidecar_service", Object(_SIDECAR)),),
    refused={"Native": "tidegate's meshed workloads have a sidecar"},
)
_DEFINITION = Shape(
    ServiceDefinition,
    (
        Field(
            "Kind",
            "kind",
            Word(
                (CONNECT_PROXY,),
                refused=dict.fromkeys(
                    ("api-gateway", "ingress-gateway", "mesh-gateway", "terminating-gateway"),
                    "tidegate runs no gateways",
                ),
            ),
        ),
        Field("ID", "id", Text(), always=True),
        Field("Name", "name", Name(), always=True),
        *OF_NAMESPACE,
        *_COMMON,
        Field("Connect", "connect", Object(_CONNECT)),
        Field("Proxy", "proxy", Object(_PROXY)),
    ),
    required={"Name": "a service name"},
    refused={
        "SocketPath": _NO_SOCKETS,
        "Ports": "a service has one port; a definition for each port makes several services",
    },
    derived=("Token",),
)

_HOLDERS: Final = ("service", "services")


def _definitions(
    document: Mapping[str, Any], place: Place
) -> list[tuple[Mapping[str, Any], Place]]:
    """The objects in a document that are definitions, each with its place."""
    held = [key for key in document if folded(key) in _HOLDERS]
    if not held:
        return [(document, place)]
    found = []
    for key in document:
        at = place.inside(key, line_of(document, key))
        if key not in held:
            at.fault("is not a field here", "service or services")
            continue
        raw = document[key]
        items = raw if isinstance(raw, list) else [raw]
        for index, item in enumerate(items):
            inner = at if len(items) == 1 else at.element(index, begin_of(item))
            faults = len(place.faults)
            fields = as_object(item, inner)
            if len(place.faults) == faults:
                found.append((fields, inner))
    return found


def _definition(raw: Mapping[str, Any], place: Place) -> ServiceDefinition:
    faults = len(place.faults)
    definition = _DEFINITION.decode(raw, place)
    if len(place.faults) == faults:
        _check(definition, raw, place)
    return msgspec.structs.replace(definition, id=definition.id or definition.name)


def _check(definition: ServiceDefinition, raw: Mapping[str, Any], place: Place) -> None:
    """What contradicts itself, as Consul's NodeService.Validate and its validation of sidecars have it."""
    if definition.kind == CONNECT_PROXY:
        _check_proxy(definition, raw, place)
    elif definition.proxy is not None:
        place.of(raw, "Proxy").fault(
            "is the place of a proxy's own registration",
            f'Kind "{CONNECT_PROXY}", or connect {{ sidecar_service {{ proxy {{ }} }} }}',
        )
    if definition.sidecar is not None:
        _check_sidecar(
            definition, definition.sidecar, partial(place.of, raw, "Connect", "SidecarService")
        )


def _check_sidecar(
    definition: ServiceDefinition, sidecar: SidecarService, place: Callable[..., Place]
) -> None:
    """`place` tells where a field of the sidecar is; as in the functions below."""
    if sidecar.port and sidecar.port == definition.port and not sidecar.address:
        place("Port").fault(f"{sidecar.port} is the service's own port", "another port")
    if sidecar.proxy.destination_service_name or sidecar.proxy.destination_service_id:
        place("Proxy").fault(
            "names a destination, which is the service itself", "the proxy without it"
        )
    _check_upstreams(definition.service, sidecar.proxy, partial(place, "Proxy", "Upstreams"))


def _check_proxy(definition: ServiceDefinition, raw: Mapping[str, Any], place: Place) -> None:
    if definition.sidecar is not None:
        place.of(raw, "Connect").fault("a proxy has no sidecar", "the registration without it")
    if definition.proxy is None or not definition.proxy.destination_service_name:
        at = place.of(raw, "Proxy", "DestinationServiceName")
        at.fault("is missing", "the service that it is for")
    if not definition.port:
        place.of(raw, "Port").fault("is missing", "the port of its public listener")
    if definition.proxy is not None:
        _check_upstreams(
            definition.service, definition.proxy, partial(place.of, raw, "Proxy", "Upstreams")
        )


def _check_upstreams(owner: ServiceName, proxy: Proxy, place: Callable[..., Place]) -> None:
    destinations: set[ServiceName] = set()
    listeners: set[tuple[str, int]] = set()
    for index, upstream in enumerate(proxy.upstreams):
        destination = _destination(owner, upstream)
        listener = (upstream.local_bind_address, upstream.local_bind_port)
        if destination in destinations:
            place(index, "DestinationName").fault(
                f"{destination} is there twice", "each upstream once"
            )
        if upstream.local_bind_port and listener in listeners:
            place(index, "LocalBindPort").fault(
                f"{upstream.local_bind_port} is there twice", "a port for each upstream"
            )
        destinations.add(destination)
        listeners.add(listener)


def _destination(owner: ServiceName, upstream: Upstream) -> ServiceName:
    return ServiceName(
        upstream.destination_name,
        upstream.destination_namespace or owner.namespace,
        upstream.destination_partition or owner.partition,
    )
