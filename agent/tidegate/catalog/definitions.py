"""Service definitions that a person has written, as the catalog has services. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tidegate.catalog.registration import (
    CONNECT_PROXY,
    PROXY_SUFFIX,
    Service,
    TaggedAddress,
    part_meta,
    port_meta,
    proxy_id,
)
from tidegate.intent import services
from tidegate.intent.services import ServiceDefinition, SidecarService, more_ports, to_consul
from tidegate.model import DEFAULT_INBOUND_PORT


def services_for(definitions: Sequence[ServiceDefinition]) -> tuple[Service, ...]:
    """The services of all definitions of one node: of each the application, or the proxy that it is, and its sidecar.

    Definitions that are further ports of another are services that others find, and no instances of their own.
    """
    of_all = tuple(definitions)
    further = {one.id: more_ports(one, of_all) for one in of_all}
    owners = {
        (port.service, port.port): owner for owner, ports in further.items() for port in ports
    }
    found: list[Service] = []
    for one in of_all:
        meta = one.meta | port_meta(further[one.id])
        owner = owners.get((str(one.service), one.port))
        if owner is not None:
            meta |= part_meta(owner)
        found.append(msgspec.structs.replace(_service(one), meta=meta))
        if one.sidecar is not None:
            found.append(_sidecar(one, one.sidecar))
    return tuple(found)


def _service(one: ServiceDefinition) -> Service:
    proxy: dict[str, Any] = to_consul(one).get("Proxy", {}) if one.proxy else {}
    return Service(
        id=one.id or one.name,
        service=one.name,
        namespace=one.namespace,
        partition=one.partition,
        kind=one.kind,
        tags=one.tags,
        address=one.address,
        tagged_addresses=_tagged(one.tagged_addresses),
        port=one.port or (DEFAULT_INBOUND_PORT if one.kind == CONNECT_PROXY else 0),
        proxy=proxy,
    )


def _sidecar(one: ServiceDefinition, sidecar: SidecarService) -> Service:
    said = to_consul(one)["Connect"]["SidecarService"].get("Proxy", {})
    own = {"DestinationServiceName": one.name, "DestinationServiceID": one.id or one.name}
    port = {"LocalServicePort": one.port} if not sidecar.proxy.local_service_port else {}
    return Service(
        id=proxy_id(one.id or one.name),
        service=sidecar.name or one.name + PROXY_SUFFIX,
        namespace=one.namespace,
        partition=one.partition,
        kind=CONNECT_PROXY,
        tags=sidecar.tags,
        address=sidecar.address or one.address,
        tagged_addresses=_tagged(sidecar.tagged_addresses),
        port=sidecar.port or DEFAULT_INBOUND_PORT,
        meta=sidecar.meta,
        proxy=said | own | port,
    )


def _tagged(addresses: Mapping[str, services.TaggedAddress]) -> dict[str, TaggedAddress]:
    return {
        tag: TaggedAddress(address=one.address, port=one.port) for tag, one in addresses.items()
    }
