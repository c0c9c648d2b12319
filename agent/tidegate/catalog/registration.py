"""Workloads in Consul's catalog: model.Instance to the JSON of catalog registration, and back.

An instance is a service; a meshed one has a second service next to it, its sidecar proxy, as Consul
registers them (api.CatalogRegistration, AgentServiceConnectProxyConfig). What Consul has no field for is
kept in Meta under "tidegate-". Knows nothing of HTTP and of stores.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tidegate.model import DEFAULT_INBOUND_PORT, Instance, MutualTLSMode

CONNECT_PROXY = "connect-proxy"
PROXY_SUFFIX = "-sidecar-proxy"

_META_NAME = "tidegate-name"
_META_NAMESPACE = "tidegate-namespace"
_META_ADDRESS = "tidegate-address-"
_META_AGENT_API = "tidegate-agent-api"
_META_SEEN_FROM = "tidegate-seen-from"
_META_APPLIED_INDEX = "tidegate-applied-index"


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
    """Unique on its node; Consul takes the service's name where it is empty."""
    service: str
    kind: str = ""
    tags: tuple[str, ...] = ()
    address: str = ""
    tagged_addresses: dict[str, TaggedAddress] = {}
    port: int = 0
    meta: dict[str, str] = {}
    proxy: dict[str, Any] = {}


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node, in the JSON of Consul's catalog."""

    node: str = msgspec.field(name="Node")
    address: str = msgspec.field(default="", name="Address")
    tagged_addresses: dict[str, str] = msgspec.field(default_factory=dict, name="TaggedAddresses")
    meta: dict[str, str] = msgspec.field(default_factory=dict, name="Meta")


def node_of(info: NodeInfo) -> Node:
    """The node in the form of the catalog."""
    meta = {_META_AGENT_API: info.agent_api} if info.agent_api else {}
    return Node(
        node=info.name, address=info.address, tagged_addresses=_lan([info.address]), meta=meta
    )


def info_of(node: Node) -> NodeInfo:
    """What `node_of` was made from."""
    return NodeInfo(
        name=node.node, address=node.address, agent_api=node.meta.get(_META_AGENT_API, "")
    )


def services_of(instance: Instance) -> tuple[Service, ...]:
    """The instance's services: the application, and for a meshed instance the sidecar after it."""
    meta = {_META_NAME: instance.name, _META_NAMESPACE: instance.namespace}
    if instance.agent_api:
        meta[_META_AGENT_API] = instance.agent_api
    if instance.seen_from:
        meta[_META_SEEN_FROM] = repr(instance.seen_from)
    for number, address in enumerate(instance.addresses):
        meta[f"{_META_ADDRESS}{number:03}"] = address
    address = instance.addresses[0] if instance.addresses else ""
    application = Service(
        id=instance.id,
        service=instance.service,
        address=address,
        tagged_addresses=_tagged(instance.addresses, instance.port),
        port=instance.port,
        meta=meta,
    )
    if not instance.meshed:
        return (application,)
    sidecar = Service(
        id=proxy_id(instance.id),
        service=instance.service + PROXY_SUFFIX,
        kind=CONNECT_PROXY,
        address=address,
        tagged_addresses=_tagged(instance.addresses, instance.inbound_port),
        port=instance.inbound_port,
        meta={_META_APPLIED_INDEX: str(instance.applied_index)},
        proxy={
            "DestinationServiceName": instance.service,
            "DestinationServiceID": instance.id,
            "LocalServicePort": instance.port,
            "Mode": "transparent",
            "MutualTLSMode": str(instance.mode),
        },
    )
    return (application, sidecar)


def instance_of(node: Node, application: Service, sidecar: Service | None) -> Instance:
    """The instance that these services are; also of services that others than tidegate registered."""
    meta = application.meta
    instance = Instance(
        id=application.id,
        name=meta.get(_META_NAME, application.id),
        service=application.service,
        node=node.node,
        namespace=meta.get(_META_NAMESPACE, "default"),
        addresses=_addresses(node, application),
        port=application.port,
        agent_api=meta.get(_META_AGENT_API, node.meta.get(_META_AGENT_API, "")),
        seen_from=_number(meta.get(_META_SEEN_FROM, "")),
    )
    if sidecar is None:
        return instance
    mode = sidecar.proxy.get("MutualTLSMode")
    return msgspec.structs.replace(
        instance,
        meshed=True,
        inbound_port=sidecar.port or DEFAULT_INBOUND_PORT,
        applied_index=int(_number(sidecar.meta.get(_META_APPLIED_INDEX, ""))),
        mode=MutualTLSMode.PERMISSIVE
        if mode == MutualTLSMode.PERMISSIVE.value
        else MutualTLSMode.STRICT,
    )


def proxy_id(instance_id: str) -> str:
    """Service id of the sidecar of the instance with that id."""
    return instance_id + PROXY_SUFFIX


def destination_id(sidecar: Service) -> str:
    """Service id of the instance that a sidecar belongs to, "" if it does not say."""
    destination = sidecar.proxy.get("DestinationServiceID")
    return destination if isinstance(destination, str) else ""


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
    kept = [value for key, value in sorted(service.meta.items()) if key.startswith(_META_ADDRESS)]
    if not kept:
        tagged = [service.tagged_addresses.get(f"lan_ipv{version}") for version in (4, 6)]
        kept = [address.address for address in tagged if address]
        kept = [service.address or node.address, *kept]
    canonical = (_canonical(address) for address in kept)
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


def _number(text: str) -> float:
    try:
        number = float(text or 0)
    except ValueError:
        return 0.0
    return number if 0 <= number < 1 << 62 else 0.0
