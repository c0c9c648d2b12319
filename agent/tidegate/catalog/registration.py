"""Workloads in Consul's catalog: model.Instance to the JSON of catalog registration, and back.

An instance is a service; a meshed one has a second service next to it, its sidecar proxy, as Consul
registers them (api.CatalogRegistration, AgentServiceConnectProxyConfig). What Consul has no field for is
kept in Meta under "tidegate-". Knows nothing of HTTP and of stores.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tidegate.model import (
    DEFAULT_INBOUND_PORT,
    DEFAULT_TENANT,
    Instance,
    MutualTLSMode,
    ServiceName,
    ServicePort,
)

CONNECT_PROXY = "connect-proxy"
PROXY_SUFFIX = "-sidecar-proxy"
OBSERVED_SUFFIX = "-observed"
"""Ends the name under which an instance stands that is another's: whoever looks for the service does not find it."""

_META_NAME = "tidegate-name"
_META_NAMESPACE = "tidegate-namespace"
_META_ADDRESS = "tidegate-address-"
_META_AGENT_API = "tidegate-agent-api"
_META_SEEN_FROM = "tidegate-seen-from"
_META_APPLIED_INDEX = "tidegate-applied-index"
_META_REGISTERED_MODE = "tidegate-registered-mode"
_META_VIRTUAL = "tidegate-virtual-"
_META_PORT = "tidegate-port-"
_META_UPSTREAM = "tidegate-upstream-"
_META_PART_OF = "tidegate-part-of"
_META_OF_ANOTHER = "tidegate-of-another"

_VIRTUAL_TAGS = ("virtual", "consul-virtual")
"""How the tags of addresses begin that stand for a whole service."""


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the catalog knows it."""

    name: str
    address: str
    agent_api: str = ""
    """Where the node's agent answers, such as unix:///run/tidegate/agent.sock."""


class TaggedAddress(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    address: str = ""
    port: int = 0


class Service(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", omit_defaults=True):
    """One service instance on a node, in the JSON of Consul's catalog registration."""

    id: str = msgspec.field(default="", name="ID")
    """Unique on its node and in its namespace; Consul takes the service's name where it is empty."""
    service: str
    namespace: str = DEFAULT_TENANT
    partition: str = DEFAULT_TENANT
    """Its node's."""
    kind: str = ""
    tags: tuple[str, ...] = ()
    address: str = ""
    tagged_addresses: dict[str, TaggedAddress] = {}
    port: int = 0
    meta: dict[str, str] = {}
    proxy: dict[str, Any] = {}

    @property
    def full_name(self) -> ServiceName:
        return ServiceName(self.service, self.namespace, self.partition)


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node, in the JSON of Consul's catalog."""

    node: str = msgspec.field(name="Node")
    """Unique in its partition."""
    address: str = msgspec.field(default="", name="Address")
    partition: str = msgspec.field(default=DEFAULT_TENANT, name="Partition")
    tagged_addresses: dict[str, str] = msgspec.field(default_factory=dict, name="TaggedAddresses")
    meta: dict[str, str] = msgspec.field(default_factory=dict, name="Meta")


def node_of(info: NodeInfo, partition: str = DEFAULT_TENANT) -> Node:
    """The node in the form of the catalog: once in each partition that it has services of."""
    meta = {_META_AGENT_API: info.agent_api} if info.agent_api else {}
    return Node(
        node=info.name,
        address=info.address,
        partition=partition,
        tagged_addresses=_lan([info.address]),
        meta=meta,
    )


def info_of(node: Node) -> NodeInfo:
    """What `node_of` was made from."""
    return NodeInfo(
        name=node.node, address=node.address, agent_api=node.meta.get(_META_AGENT_API, "")
    )


def services_of(instance: Instance) -> tuple[Service, ...]:
    """The instance's services: the application, its sidecar where it is meshed, then one for each further port.

    All that an instance is stands in the application and its sidecar. Those of further ports are for others to find.
    """
    if instance.of_another:
        return (_observed(instance),)
    name = ServiceName.of(instance.service)
    address = instance.addresses[0] if instance.addresses else ""
    application = Service(
        id=instance.id,
        service=name.name,
        namespace=name.namespace,
        partition=name.partition,
        address=address,
        tagged_addresses=_tagged(instance.addresses, instance.port)
        | _virtual(instance.virtual_addresses, instance.virtual_port or instance.port),
        port=instance.port,
        meta=_meta_of(instance),
    )
    sidecar = Service(
        id=proxy_id(instance.id),
        service=name.name + PROXY_SUFFIX,
        namespace=name.namespace,
        partition=name.partition,
        kind=CONNECT_PROXY,
        address=address,
        tagged_addresses=_tagged(instance.addresses, instance.inbound_port),
        port=instance.inbound_port,
        meta={_META_APPLIED_INDEX: str(instance.applied_index)},
        proxy={
            "DestinationServiceName": name.name,
            "DestinationServiceID": instance.id,
            "LocalServicePort": instance.port,
            "Mode": "transparent",
            "MutualTLSMode": str(instance.mode),
        }
        | _upstreams_for(instance.upstreams),
    )
    return (
        application,
        *((sidecar,) if instance.meshed else ()),
        *(_further(instance, one, address) for one in instance.more_ports),
    )


def _observed(instance: Instance) -> Service:
    """One service, which nobody calls. It says what is known of the sidecar, which is not ours to register."""
    name = ServiceName.of(instance.service)
    state = f"{instance.meshed:d} {instance.inbound_port} {instance.applied_index} {instance.mode}"
    return Service(
        id=instance.id,
        service=name.name + OBSERVED_SUFFIX,
        namespace=name.namespace,
        partition=name.partition,
        address=instance.addresses[0] if instance.addresses else "",
        tagged_addresses=_tagged(instance.addresses, instance.port),
        port=instance.port,
        meta=_meta_of(instance) | {_META_OF_ANOTHER: state},
    )


def _meta_of(instance: Instance) -> dict[str, str]:
    meta = {_META_NAME: instance.name, _META_NAMESPACE: instance.namespace}
    if instance.agent_api:
        meta[_META_AGENT_API] = instance.agent_api
    if instance.seen_from:
        meta[_META_SEEN_FROM] = repr(instance.seen_from)
    if instance.registered_mode is not None:
        meta[_META_REGISTERED_MODE] = str(instance.registered_mode)
    meta |= port_meta(instance.more_ports)
    meta |= _listed(_META_ADDRESS, instance.addresses)
    meta |= _listed(_META_VIRTUAL, instance.virtual_addresses)
    return meta | _listed(_META_UPSTREAM, instance.upstreams)


def port_meta(more_ports: Iterable[ServicePort]) -> dict[str, str]:
    """What the Meta of an application says of the further services behind its sidecar."""
    return _listed(_META_PORT, (f"{one.port} {one.service}" for one in more_ports))


def part_meta(owner: str) -> dict[str, str]:
    """What the Meta of a service says that is a further port of the instance with the id `owner`."""
    return {_META_PART_OF: owner}


def _listed(prefix: str, values: Iterable[str]) -> dict[str, str]:
    return {f"{prefix}{number:03}": value for number, value in enumerate(values)}


def _further(instance: Instance, one: ServicePort, address: str) -> Service:
    name = ServiceName.of(one.service)
    return Service(
        id=further_id(instance.id, one),
        service=name.name,
        namespace=name.namespace,
        partition=ServiceName.of(instance.service).partition,
        address=address,
        tagged_addresses=_tagged(instance.addresses, one.port),
        port=one.port,
        meta=part_meta(instance.id),
    )


def further_id(instance_id: str, one: ServicePort) -> str:
    """Service id of one of an instance's further ports."""
    return f"{instance_id}-port-{one.port}"


def instance_of(node: Node, application: Service, sidecar: Service | None) -> Instance:
    """The instance that these services are; also of services that others than tidegate registered."""
    meta = application.meta
    own = is_by_agent(application)
    proxy = sidecar.proxy if sidecar else {}
    instance = Instance(
        id=application.id,
        name=meta.get(_META_NAME, application.id),
        service=str(application.full_name),
        node=node.node,
        namespace=meta.get(_META_NAMESPACE, "default"),
        addresses=_addresses(node, application),
        port=application.port,
        more_ports=_more_ports(_values(meta, _META_PORT)),
        virtual_addresses=_virtual_addresses(application),
        virtual_port=_virtual_port(application),
        upstreams=_values(meta, _META_UPSTREAM)
        if own
        else _upstreams(proxy, application.full_name),
        registered_mode=_mode(
            meta.get(_META_REGISTERED_MODE) if own else proxy.get("MutualTLSMode")
        ),
        agent_api=meta.get(_META_AGENT_API, node.meta.get(_META_AGENT_API, "")),
        seen_from=_number(meta.get(_META_SEEN_FROM, "")),
    )
    if _META_OF_ANOTHER in meta:
        return _of_another(instance, meta[_META_OF_ANOTHER])
    if sidecar is None:
        return instance
    return msgspec.structs.replace(
        instance,
        meshed=True,
        inbound_port=sidecar.port or DEFAULT_INBOUND_PORT,
        applied_index=int(_number(sidecar.meta.get(_META_APPLIED_INDEX, ""))),
        mode=_mode(proxy.get("MutualTLSMode")) or MutualTLSMode.STRICT,
    )


def _of_another(instance: Instance, state: str) -> Instance:
    """What `_observed` was made from."""
    meshed, inbound_port, applied_index, mode, *_ = (*state.split(" "), "", "", "", "")
    return msgspec.structs.replace(
        instance,
        of_another=True,
        service=instance.service.removesuffix(OBSERVED_SUFFIX),
        meshed=meshed == "1",
        inbound_port=int(_number(inbound_port)) or DEFAULT_INBOUND_PORT,
        applied_index=int(_number(applied_index)),
        mode=_mode(mode) or MutualTLSMode.STRICT,
    )


def instances_of(node: Node, services: Iterable[Service]) -> tuple[Instance, ...]:
    """The instances on a node, in the order of their services."""
    services = tuple(services)
    sidecars = {
        (one.namespace, destination_id(one)): one for one in services if one.kind == CONNECT_PROXY
    }
    return tuple(
        instance_of(node, one, sidecars.get((one.namespace, one.id)))
        for one in services
        if is_application(one)
    )


def is_by_agent(service: Service) -> bool:
    """Whether an agent of tidegate has registered an application, and not a person or another tool."""
    return _META_NAME in service.meta


def is_application(service: Service) -> bool:
    """Whether an instance begins with this service: not a sidecar or gateway, and no further port of another."""
    return not service.kind and _META_PART_OF not in service.meta


def proxy_id(instance_id: str) -> str:
    """Service id of the sidecar of the instance with that id."""
    return instance_id + PROXY_SUFFIX


def destination_id(sidecar: Service) -> str:
    """Service id of the instance that a sidecar belongs to, "" if it does not say."""
    destination = sidecar.proxy.get("DestinationServiceID")
    return destination if isinstance(destination, str) else ""


def destination_name(sidecar: Service) -> str:
    """Name of the service that a sidecar belongs to, "" for what is no sidecar."""
    destination = sidecar.proxy.get("DestinationServiceName")
    return destination if sidecar.kind == CONNECT_PROXY and isinstance(destination, str) else ""


def is_published(instance: Instance, known: Mapping[str, Instance]) -> bool:
    """Whether the living instances `known` (by id) already say what `instance` says.

    Since when an instance is known is the catalog's to say and not compared.
    """
    other = known.get(instance.id)
    return other is not None and _comparable(other) == _comparable(instance)


def _comparable(instance: Instance) -> Instance:
    normal = msgspec.structs.replace(instance, seen_from=0.0, seen_until=0.0)
    if normal.meshed:
        return normal
    return msgspec.structs.replace(
        normal,
        inbound_port=DEFAULT_INBOUND_PORT,
        applied_index=0,
        mode=MutualTLSMode.STRICT,
    )


def _addresses(node: Node, service: Service) -> tuple[str, ...]:
    kept = _values(service.meta, _META_ADDRESS)
    if not kept:
        tagged = [service.tagged_addresses.get(f"lan_ipv{version}") for version in (4, 6)]
        others = (address.address for address in tagged if address)
        kept = (service.address or node.address, *others)
    return _all_canonical(kept)


def _virtual_addresses(service: Service) -> tuple[str, ...]:
    kept = _values(service.meta, _META_VIRTUAL)
    if not kept:
        tagged = sorted(service.tagged_addresses.items())
        kept = tuple(one.address for tag, one in tagged if tag.startswith(_VIRTUAL_TAGS))
    return _all_canonical(kept)


def _virtual_port(service: Service) -> int:
    """That of the first virtual address that has one; 0 where that is the service's own."""
    tagged = sorted(service.tagged_addresses.items())
    ports = (one.port for tag, one in tagged if tag.startswith(_VIRTUAL_TAGS) and one.port)
    port = next(ports, 0)
    return 0 if port == service.port else port


def _values(meta: Mapping[str, str], prefix: str) -> tuple[str, ...]:
    return tuple(value for key, value in sorted(meta.items()) if key.startswith(prefix))


def _more_ports(texts: Iterable[str]) -> tuple[ServicePort, ...]:
    pairs = (text.partition(" ") for text in texts)
    return tuple(
        ServicePort(service=service, port=int(port))
        for port, _, service in pairs
        if port.isdecimal() and len(port) <= 5 and service
    )


def _upstreams_for(upstreams: Iterable[str]) -> dict[str, Any]:
    forms = []
    for text in upstreams:
        name = ServiceName.of(text)
        form = {"DestinationType": "service", "DestinationName": name.name}
        if name.namespace != DEFAULT_TENANT:
            form["DestinationNamespace"] = name.namespace
        if name.partition != DEFAULT_TENANT:
            form["DestinationPartition"] = name.partition
        forms.append(form)
    return {"Upstreams": forms} if forms else {}


def _upstreams(proxy: Mapping[str, Any], caller: ServiceName) -> tuple[str, ...]:
    """Services of a proxy registration's upstreams; where they say no namespace or partition, the caller's."""
    given = proxy.get("Upstreams")
    found = []
    for form in given if isinstance(given, list) else ():
        name = form.get("DestinationName") if isinstance(form, dict) else None
        if isinstance(name, str) and name and form.get("DestinationType") != "prepared_query":
            namespace = form.get("DestinationNamespace") or caller.namespace
            partition = form.get("DestinationPartition") or caller.partition
            found.append(str(ServiceName(name, str(namespace), str(partition))))
    return tuple(dict.fromkeys(found))


def _mode(word: object) -> MutualTLSMode | None:
    return next((mode for mode in MutualTLSMode if mode.value == word), None)


def _all_canonical(texts: Iterable[str]) -> tuple[str, ...]:
    canonical = (_canonical(text) for text in texts)
    return tuple(dict.fromkeys(address for address in canonical if address))


def _canonical(text: str) -> str:
    """An address as model.py writes it, "" for what is none (Consul allows host names)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _lan(addresses: Iterable[str]) -> dict[str, str]:
    """The first address of each family, under Consul's names."""
    lan: dict[str, str] = {}
    for address in addresses:
        canonical = _canonical(address)
        if canonical:
            lan.setdefault("lan_ipv6" if ":" in canonical else "lan_ipv4", canonical)
    return lan


def _tagged(addresses: Iterable[str], port: int) -> dict[str, TaggedAddress]:
    return {tag: TaggedAddress(address=text, port=port) for tag, text in _lan(addresses).items()}


def _virtual(addresses: Iterable[str], port: int) -> dict[str, TaggedAddress]:
    """The first address under Consul's name for it, and the first of another family under tidegate's."""
    lan = _lan(addresses)
    tags = zip(("virtual", "virtual_ipv6"), lan.values(), strict=False)
    return {tag: TaggedAddress(address=text, port=port) for tag, text in tags}


def _number(text: str) -> float:
    try:
        number = float(text or 0)
    except ValueError:
        return 0.0
    return number if 0 <= number < 1 << 62 else 0.0
