"""From config entries to what should be, service by service: precedence, inheritance, intentions.

Semantics are Consul's: service-defaults over proxy-defaults, "" inherits, strict where nothing is
said; intentions by precedence of destination and source. Whether the gate is open does not matter
here: it decides what may be written, not what holds. Knows nothing of stores, instances, sidecars.
"""

from collections.abc import Iterable, Mapping

from tidegate.intent.entries import (
    WILDCARD,
    Action,
    Entry,
    Mesh,
    ProxyDefaults,
    ServiceDefaults,
    ServiceIntentions,
)
from tidegate.model import IntentionRule, MutualTLSMode, ServiceIntent


def resolve(
    entries: Iterable[Entry], services: Iterable[str], default_allow: bool
) -> dict[str, ServiceIntent]:
    """The intent of each of `services`.

    `default_allow` is the action between services for which no intention matches.
    """
    mesh: Mesh | None = None
    proxy_defaults: ProxyDefaults | None = None
    service_defaults: dict[str, ServiceDefaults] = {}
    intentions: dict[str, ServiceIntentions] = {}
    for entry in entries:
        match entry:
            case Mesh():
                mesh = entry
            case ProxyDefaults():
                proxy_defaults = entry
            case ServiceDefaults():
                service_defaults[entry.name] = entry
            case ServiceIntentions():
                intentions[entry.name] = entry
    intents = {}
    for service in services:
        defaults = service_defaults.get(service)
        towards = [intentions[name] for name in (service, WILDCARD) if name in intentions]
        involved = [entry for entry in (mesh, proxy_defaults, defaults, *towards) if entry]
        intents[service] = ServiceIntent(
            service=service,
            mode=effective_mode(defaults, proxy_defaults),
            intentions=_rules(towards),
            default_allow=default_allow,
            mesh_destinations_only=bool(mesh and mesh.transparent_proxy.mesh_destinations_only),
            index=max((entry.modify_index for entry in involved), default=0),
        )
    return intents


def effective_mode(
    service_defaults: ServiceDefaults | None, proxy_defaults: ProxyDefaults | None
) -> MutualTLSMode:
    """The mode that holds: the service's own, else the mesh-wide one, else strict."""
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


def upstreams_of(service: str, intents: Mapping[str, ServiceIntent]) -> tuple[str, ...]:
    """The services that an intention lets `service` call, sorted: its upstreams.

    Consul infers upstreams in the same way. What only the default action allows is no upstream.
    """
    return tuple(
        sorted(name for name, intent in intents.items() if _explicitly_allows(intent, service))
    )


def _explicitly_allows(intent: ServiceIntent, source: str) -> bool:
    for rule in intent.intentions:
        if rule.source in (source, WILDCARD):
            return rule.allow
    return False


def _rules(towards: list[ServiceIntentions]) -> tuple[IntentionRule, ...]:
    """Rules by precedence, one per source: the higher hides the lower of the same source."""
    ranked = sorted(
        (source for entry in towards for source in entry.sources),
        key=lambda source: (-source.precedence, source.name),
    )
    rules: dict[str, IntentionRule] = {}
    for source in ranked:
        rule = IntentionRule(
            source=source.name,
            allow=source.action is Action.ALLOW,
            precedence=source.precedence,
        )
        rules.setdefault(source.name, rule)
    return tuple(rules.values())
