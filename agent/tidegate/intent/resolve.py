"""From config entries to what should be, service by service: precedence, inheritance, intentions.

Semantics are Consul's: what the proxy's registration says over service-defaults over proxy-defaults, "" inherits,
strict where nothing is said; mesh and proxy-defaults hold in their partition; intentions by precedence of
destination and source. Whether the gate is open does not matter here: it decides what may be
written, not what holds. Knows nothing of stores, instances, sidecars.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import assert_never

from tidegate.intent.entries import (
    WILDCARD,
    Action,
    DirectionalTLS,
    Entry,
    Mesh,
    ProxyDefaults,
    ServiceDefaults,
    ServiceIntentions,
)
from tidegate.model import (
    IntentionRule,
    MutualTLSMode,
    ServiceIntent,
    ServiceName,
    TLSSettings,
    source_matches,
)

_ELSEWHERE = {"Peer", "SamenessGroup"}
"""Fields of a source that make it one of another cluster."""


def resolve(
    entries: Iterable[Entry], services: Iterable[str], default_allow: bool
) -> dict[str, ServiceIntent]:
    """The intent of each of `services`, texts of ServiceNames.

    `default_allow` is the action between services for which no intention matches.
    """
    meshes: dict[str, Mesh] = {}
    proxy_defaults: dict[str, ProxyDefaults] = {}
    service_defaults: dict[ServiceName, ServiceDefaults] = {}
    intentions: dict[ServiceName, ServiceIntentions] = {}
    for entry in entries:
        match entry:
            case Mesh():
                meshes[entry.partition] = entry
            case ProxyDefaults():
                proxy_defaults[entry.partition] = entry
            case ServiceDefaults():
                service_defaults[entry.service] = entry
            case ServiceIntentions():
                intentions[entry.service] = entry
            case _:
                assert_never(entry)
    intents = {}
    for text in services:
        service = ServiceName.of(text)
        mesh = meshes.get(service.partition)
        shared = proxy_defaults.get(service.partition)
        own = service_defaults.get(service)
        all_of_namespace = service._replace(name=WILDCARD)
        all_of_partition = all_of_namespace._replace(namespace=WILDCARD)
        destinations = (service, all_of_namespace, all_of_partition)
        towards = [intentions[one] for one in destinations if one in intentions]
        involved = [entry for entry in (mesh, shared, own, *towards) if entry]
        intents[text] = ServiceIntent(
            service=text,
            mode=effective_mode(None, own, shared),
            intentions=_rules(towards),
            default_allow=default_allow,
            mesh_destinations_only=bool(mesh and mesh.transparent_proxy.mesh_destinations_only),
            outbound_port=_outbound_port(own, shared),
            incoming_tls=_tls(mesh.tls.incoming) if mesh else TLSSettings(),
            outgoing_tls=_tls(mesh.tls.outgoing) if mesh else TLSSettings(),
            access_logs=bool(shared and shared.access_logs.enabled),
            index=max((entry.modify_index for entry in involved), default=0),
        )
    return intents


def effective_mode(
    registered: MutualTLSMode | None,
    service_defaults: ServiceDefaults | None,
    proxy_defaults: ProxyDefaults | None,
) -> MutualTLSMode:
    """The mode that holds: the registration's, else the service's, else the partition's, else strict.

    `registered` is the MutualTLSMode of a proxy's registration (Consul's MergeServiceConfig).
    """
    if registered is not None:
        return registered
    for entry in (service_defaults, proxy_defaults):
        if entry is not None and entry.mutual_tls_mode is not None:
            return entry.mutual_tls_mode
    return MutualTLSMode.STRICT


def turned_strict(
    before: Iterable[Entry], after: Iterable[Entry], services: Iterable[str]
) -> tuple[str, ...]:
    """The services, sorted, that were permissive by the entries `before` and are not by those `after`."""
    names = sorted(services)
    then, now = (resolve(entries, names, default_allow=False) for entries in (before, after))
    return tuple(
        name
        for name in names
        if then[name].mode is MutualTLSMode.PERMISSIVE and now[name].mode is MutualTLSMode.STRICT
    )


def upstreams_of(
    service: str, intents: Mapping[str, ServiceIntent], explicit: Collection[str] = ()
) -> tuple[str, ...]:
    """The services of `intents` that `service` calls through the mesh, sorted: its upstreams.

    Those whose intentions let it, as Consul infers them, and the `explicit` ones of its registration. What only
    the default action allows is no upstream. A service that `intents` does not have is none.
    """
    return tuple(
        sorted(
            name
            for name, intent in intents.items()
            if name in explicit or _explicitly_allows(intent, service)
        )
    )


def _explicitly_allows(intent: ServiceIntent, source: str) -> bool:
    for rule in intent.intentions:
        if source_matches(rule.source, source):
            return rule.allow
    return False


def _rules(towards: Iterable[ServiceIntentions]) -> tuple[IntentionRule, ...]:
    """Rules by precedence, one per source: the higher hides the lower of the same source.

    Sources in other clusters are nobody here; permissions for HTTP, which only Consul's own entries can have,
    allow no connection (as Consul has it for tcp).
    The order of equals is Consul's (IntentionPrecedenceSorter); it decides nothing.
    """
    ranked = sorted(
        (
            (source, entry)
            for entry in towards
            for source in entry.sources
            if not _ELSEWHERE & source.rest.keys()
        ),
        key=lambda pair: (
            -pair[0].precedence,
            *reversed(pair[0].service),
            *reversed(pair[1].service),
        ),
    )
    rules: dict[str, IntentionRule] = {}
    for source, _ in ranked:
        text = str(source.service)
        rule = IntentionRule(
            source=text, allow=source.action is Action.ALLOW, precedence=source.precedence
        )
        rules.setdefault(text, rule)
    return tuple(rules.values())


def _outbound_port(*entries: ServiceDefaults | ProxyDefaults | None) -> int:
    ports = (entry.transparent_proxy.outbound_listener_port for entry in entries if entry)
    return next((port for port in ports if port), 0)


def _tls(direction: DirectionalTLS) -> TLSSettings:
    return TLSSettings(
        min_version=direction.tls_min_version,
        max_version=direction.tls_max_version,
        cipher_suites=direction.cipher_suites,
    )
