"""Config entries as the steps of onboarding change them: one thing is another, and all else stays as it is.

And what entries say of modes, entry by entry, which `resolve` answers for services. Pure.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from tidegate.intent.entries import (
    WILDCARD,
    Action,
    Entry,
    Mesh,
    ModeEntry,
    ProxyDefaults,
    ServiceDefaults,
    ServiceIntentions,
    Source,
    precedence,
    to_consul,
)
from tidegate.model import DEFAULT_TENANT, ServiceName

_BOOKKEEPING = ("CreateIndex", "ModifyIndex", "Hash")


def written_by_hand(entry: Entry) -> dict[str, Any]:
    """The entry in Consul's JSON as a person would write it again: without what the store adds, or it says anyway."""
    raw = {key: value for key, value in to_consul(entry).items() if key not in _BOOKKEEPING}
    if isinstance(entry, ServiceIntentions):
        raw["Sources"] = [_source_by_hand(source, entry) for source in raw["Sources"]]
    tenancy = {"Namespace": DEFAULT_TENANT, "Partition": DEFAULT_TENANT}
    return {key: value for key, value in raw.items() if tenancy.get(key) != value}


def _source_by_hand(source: dict[str, Any], entry: ServiceIntentions) -> dict[str, Any]:
    """A source takes from its entry what it does not say (Consul's SourceIntention.MergeNoWildcard)."""
    namespace = DEFAULT_TENANT if entry.namespace == WILDCARD else entry.namespace
    inherited = {"Namespace": namespace, "Partition": entry.partition}
    return {
        key: value
        for key, value in source.items()
        if key != "Precedence" and inherited.get(key) != value
    }


def partitions(entries: Iterable[Entry], services: Iterable[str]) -> tuple[str, ...]:
    """Every partition that an entry or a service is in, and the default one; sorted."""
    found = {entry.partition for entry in entries}
    found |= {ServiceName.of(service).partition for service in services}
    return tuple(sorted(found | {DEFAULT_TENANT}))


def mesh_entry_of(entries: Iterable[Entry], partition: str) -> Mesh:
    """The mesh entry of a partition; one that says nothing where there is none."""
    found = (entry for entry in entries if isinstance(entry, Mesh) and entry.partition == partition)
    return next(found, Mesh(partition=partition))


def secured(entry: Mesh) -> Mesh:
    """The mesh entry with the gate closed and no way out of the mesh."""
    proxy = msgspec.structs.replace(entry.transparent_proxy, mesh_destinations_only=True)
    return msgspec.structs.replace(
        entry, allow_enabling_permissive_mutual_tls=False, transparent_proxy=proxy
    )


def defaults_of(
    entries: Iterable[Entry], service: str
) -> tuple[ServiceDefaults | None, ProxyDefaults | None]:
    """The two entries that say a service's mode, None for one that is not there."""
    name = ServiceName.of(service)
    own: ServiceDefaults | None = None
    shared: ProxyDefaults | None = None
    for entry in entries:
        if isinstance(entry, ServiceDefaults) and entry.service == name:
            own = entry
        elif isinstance(entry, ProxyDefaults) and entry.partition == name.partition:
            shared = entry
    return own, shared


def mode_entries(entries: Iterable[Entry]) -> tuple[ModeEntry, ...]:
    """Every entry that can say a mode."""
    return tuple(entry for entry in entries if isinstance(entry, ModeEntry))


def allowing(
    existing: ServiceIntentions | None, destination: str, sources: Iterable[str]
) -> ServiceIntentions:
    """The entry towards `destination` that also allows `sources`, texts of ServiceNames.

    Sources that it has already stay as they are, those that it denies too.
    """
    name = ServiceName.of(destination)
    entry = existing or ServiceIntentions(
        name=name.name, namespace=name.namespace, partition=name.partition
    )
    present = {source.service for source in entry.sources}
    added = [
        Source(
            name=one.name,
            namespace=one.namespace,
            partition=one.partition,
            action=Action.ALLOW,
            precedence=precedence(entry.service, one),
        )
        for one in sorted({ServiceName.of(source) for source in sources} - present)
    ]
    ranked = sorted(
        (*entry.sources, *added),
        key=lambda source: (-source.precedence, *reversed(source.service)),
    )
    return msgspec.structs.replace(entry, sources=tuple(ranked))
