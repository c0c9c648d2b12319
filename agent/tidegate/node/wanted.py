"""What the sidecar of a workload should do, out of intents and the catalog: pure.

An instance is called with mTLS only once it enforces the intention that allows it, so that no request fails while an
intention spreads. Where config entries and a workload's annotations contradict each other, that is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from tidegate.enforce.sidecar.spec import (
    Endpoint,
    LocalService,
    SidecarSpec,
    Upstream,
    check_address,
)
from tidegate.errors import InputError
from tidegate.identity import spiffe
from tidegate.intent.policy import Mode, Policy
from tidegate.intent.resolve import upstreams_of
from tidegate.model import DEFAULT_OUTBOUND_PORT, Instance, ServiceIntent, Workload
from tidegate.node.config import AgentConfig


def service_ports(one: Workload | Instance) -> Iterator[tuple[str, int]]:
    """The services of a workload with their ports, its first one first; port 0 where it only calls."""
    yield one.service, one.port
    for further in one.more_ports:
        yield further.service, further.port


def agreed_policy(policy: Policy, intent: ServiceIntent) -> Policy:
    """A workload's policy with what config entries say of it: the port of the outbound listener.

    InputError when annotations or the node's configuration say another one, InputErrors when the policy does not go
    together with it.
    """
    said, port = intent.outbound_port, policy.outbound.port
    if said in (0, port):
        return policy
    if port != DEFAULT_OUTBOUND_PORT:
        raise InputError(
            f"the config entries say {said} for {intent.service}, and the workload's policy says {port}",
            field="TransparentProxy.OutboundListenerPort",
            expected=f"{port} there, or no tidegate.io/outbound-port in the annotations",
        )
    outbound = msgspec.structs.replace(policy.outbound, port=said)
    return msgspec.structs.replace(policy, outbound=outbound)


class Offer(NamedTuple):
    """One service of one instance that lives."""

    instance: Instance
    port: int
    endpoints: tuple[Endpoint, ...]
    """Where it is called with mTLS; none while it has no sidecar."""


class Neighbours(msgspec.Struct, frozen=True, kw_only=True):
    """What the catalog knows of living instances, by service, as `sidecar_spec` asks for it."""

    offers: dict[str, list[Offer]]
    faults: tuple[str, ...]
    """What is wrong with instances, which are not called with mTLS for it: one fault does not stop the rest."""


def neighbours(instances: Iterable[Instance]) -> Neighbours:
    """The living ones of `instances`, in an order that does not depend on the catalog's."""
    offers: dict[str, list[Offer]] = {}
    faults = []
    for one in sorted(instances, key=lambda one: one.id):
        if one.seen_until:
            continue
        try:
            for address in one.virtual_addresses:
                check_address(address)
            found = [
                (service, Offer(one, port, _endpoints(one, service, port)))
                for service, port in service_ports(one)
            ]
        except InputError as error:
            faults.append(f"{one.name} on {one.node}: {error}")
            continue
        for service, offer in found:
            offers.setdefault(service, []).append(offer)
    return Neighbours(offers=offers, faults=tuple(faults))


def _endpoints(instance: Instance, service: str, port: int) -> tuple[Endpoint, ...]:
    if not instance.meshed or instance.of_another or not port:
        return ()
    spiffe.service_name(service)
    return tuple(
        Endpoint(address=address, service_port=port, proxy_port=instance.inbound_port)
        for address in instance.addresses
    )


def sidecar_spec(
    config: AgentConfig,
    workload: Workload,
    policy: Policy | None,
    intents: Mapping[str, ServiceIntent],
    known: Neighbours,
    present: SidecarSpec | None,
) -> SidecarSpec:
    """What the sidecar of `workload` should do. `present` is what it does now.

    An instance becomes reachable with mTLS only when it has published that its sidecar runs the intention that
    allows it; one that is reachable already stays so while the intention lasts. InputError when there can be no
    such sidecar.
    """
    policy = policy or config.redirect.policy
    intent = intents[workload.service]
    own = [
        offer.instance
        for offer in known.offers.get(workload.service, ())
        if _is_of(offer.instance, workload)
    ]
    registered = next((one.registered_mode for one in own if one.registered_mode), None)
    explicit = {upstream for one in own for upstream in one.upstreams}
    before = {upstream.service: upstream for upstream in (present.upstreams if present else ())}
    upstreams = []
    for service in upstreams_of(workload.service, intents, explicit):
        offers = [one for one in known.offers.get(service, ()) if one.instance.id != workload.id]
        upstream = _upstream(config, intents[service], offers, before.get(service))
        if upstream is not None:
            upstreams.append(upstream)
    first, *more = (
        LocalService(
            service=service,
            port=port,
            mode=registered or intents[service].mode,
            intentions=intents[service].intentions,
            default_allow=intents[service].default_allow,
        )
        for service, port in service_ports(workload)
    )
    return SidecarSpec(
        service=first.service,
        datacenter=config.datacenter,
        trust_domain=config.trust_domain,
        port=first.port,
        mode=first.mode,
        intentions=first.intentions,
        default_allow=first.default_allow,
        more_services=tuple(more),
        inbound_port=policy.inbound.port,
        outbound_port=policy.outbound.port,
        transparent=policy.mode is Mode.TPROXY,
        mesh_destinations_only=intent.mesh_destinations_only,
        upstreams=tuple(upstreams),
        incoming_tls=intent.incoming_tls,
        outgoing_tls=intent.outgoing_tls,
        access_logs=intent.access_logs,
    )


def _is_of(instance: Instance, workload: Workload) -> bool:
    """Whether the catalog speaks of this workload: as its agent registered it, or as a person did, by an address."""
    if instance.id == workload.id:
        return True
    return instance.service == workload.service and not set(workload.addresses).isdisjoint(
        instance.addresses
    )


def _upstream(
    config: AgentConfig, intent: ServiceIntent, offers: list[Offer], before: Upstream | None
) -> Upstream | None:
    """How a service is called with mTLS; None while no instance of it can be."""
    reached = {endpoint.address for endpoint in before.endpoints} if before else set()
    endpoints = tuple(
        endpoint
        for one in offers
        for endpoint in one.endpoints
        if one.instance.applied_index >= intent.index or endpoint.address in reached
    )
    if not endpoints:
        return None
    virtual = {address for one in offers for address in one.instance.virtual_addresses}
    if not _all_are_among(offers, {endpoint.address for endpoint in endpoints}):
        virtual &= set(before.virtual_addresses) if before else set()
    dialled = {one.instance.virtual_port for one in offers if one.port == one.instance.port}
    return Upstream(
        service=intent.service,
        datacenter=config.datacenter,
        port=endpoints[0].service_port,
        virtual_ports=tuple(sorted(dialled - {0})),
        endpoints=endpoints,
        virtual_addresses=tuple(sorted(virtual)),
    )


def _all_are_among(offers: Iterable[Offer], addresses: set[str]) -> bool:
    """Whether with mTLS a virtual address would lead to all instances that it leads to without.

    Otherwise the first instance in the mesh would get the load of all.
    """
    return all(not addresses.isdisjoint(one.instance.addresses) for one in offers)
