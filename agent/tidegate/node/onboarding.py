"""What onboarding judges, brought together from the server, the catalog and the agents of all nodes; and its answers.

Judging is pure and elsewhere (`verdict.onboarding` and its neighbours): this module asks, and turns entries into what
is judged and back.
"""

import asyncio
import time
from collections.abc import Iterable

import msgspec

from tidegate.catalog.client import Snapshot
from tidegate.intent.changes import (
    allowing,
    defaults_of,
    mesh_entry_of,
    mode_entries,
    partitions,
    written_by_hand,
)
from tidegate.intent.entries import Entry, EntryKey, Kind, Mesh, ServiceIntentions, to_consul
from tidegate.model import Direction, FlowClass, Instance, ServiceName
from tidegate.node.flows import THROUGH_SIDECAR, NamedEdge
from tidegate.node.mesh import (
    ChangedMeanwhile,
    Judged,
    MeshView,
    refuse_unknown,
)
from tidegate.verdict import names
from tidegate.verdict.next_steps import NextStep, next_steps
from tidegate.verdict.onboarding import (
    GlobalSettings,
    MeshFacts,
    ModeSource,
    OutboundCall,
    ServiceFacts,
    ServiceStatus,
    SidecarProblem,
    service_status,
)
from tidegate.verdict.plan import Plan, plan
from tidegate.verdict.resecuring import ModeSetting
from tidegate.verdict.suggestions import Suggestion, suggestions


class MeshStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole mesh at a glance."""

    services: tuple[ServiceStatus, ...]
    next_steps: tuple[NextStep, ...]
    settings: tuple[GlobalSettings, ...]
    problems: tuple[str, ...]
    window_s: float
    at: float


class SuggestedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What the intentions towards one service lack, and its entry with that in it."""

    suggestion: Suggestion
    remarks: tuple[str, ...]
    entry: dict[str, object] | None
    """In Consul's JSON; None where nothing would change."""
    written: bool = False


class Suggestions(msgspec.Struct, frozen=True, kw_only=True):
    """What intentions lack by what was seen."""

    suggestions: tuple[SuggestedEntry, ...]
    problems: tuple[str, ...]
    """Why callers may be missing."""


class Onboarding:
    """Answers of one agent for the whole mesh."""

    def __init__(self, mesh: MeshView) -> None:
        self._mesh = mesh

    async def status(self, window_s: float | None) -> MeshStatus:
        """Every service, and the steps that bring the mesh furthest."""
        facts = await self.facts(window_s)
        return MeshStatus(
            services=tuple(service_status(one) for one in facts.services),
            next_steps=next_steps(facts),
            settings=facts.settings,
            problems=facts.problems,
            window_s=facts.window_s,
            at=facts.at,
        )

    async def plan(self, services: tuple[str, ...], window_s: float | None) -> Plan:
        """The steps of these services, or of all; InputError for one that nobody knows."""
        facts = await self.facts(window_s)
        known = [one.service for one in facts.services]
        for service in services:
            refuse_unknown(service, known)
        return plan(facts, services or known)

    async def suggestions(
        self, service: str | None, window_s: float | None, *, all_callers: bool
    ) -> Suggestions:
        """What intentions lack by what was seen; entries for mesh callers, or for `all_callers`."""
        facts = await self.facts(window_s)
        if service is not None:
            refuse_unknown(service, (one.service for one in facts.services))
        entries = (await self._mesh.snapshot()).entries
        return Suggestions(
            suggestions=tuple(
                _suggested(one, entries, all_callers=all_callers)
                for one in suggestions(facts, service)
            ),
            problems=facts.problems,
        )

    async def write_suggestions(
        self, service: str | None, window_s: float | None, *, all_callers: bool
    ) -> Suggestions:
        """The same, and writes those entries; one that somebody changes meanwhile is not written, and says so."""
        done = []
        found = await self.suggestions(service, window_s, all_callers=all_callers)
        for one in found.suggestions:
            if one.entry is None:
                done.append(one)
                continue
            name = ServiceName.of(one.suggestion.destination)
            present = await self._mesh.read_entry(EntryKey(Kind.SERVICE_INTENTIONS, *name))
            entry = allowing(
                present if isinstance(present, ServiceIntentions) else None,
                one.suggestion.destination,
                one.suggestion.named(all_callers=all_callers),
            )
            try:
                await self._mesh.write_entry(entry)
            except ChangedMeanwhile as error:
                done.append(
                    msgspec.structs.replace(one, remarks=(*one.remarks, f"not written: {error}"))
                )
            else:
                done.append(msgspec.structs.replace(one, entry=to_consul(entry), written=True))
        return msgspec.structs.replace(found, suggestions=tuple(done))

    async def facts(self, window_s: float | None) -> MeshFacts:
        """Everything that is judged, of one moment as far as that goes."""
        window = self._mesh.window if window_s is None else window_s
        snapshot = await self._mesh.snapshot()
        living = tuple(snapshot.living().values())
        services = sorted({name for one in living for name in names.services_of(one)})
        judged, (edges, silent) = await asyncio.gather(
            asyncio.gather(*(self._mesh.judged(service, window) for service in services)),
            self._mesh.edges(window),
        )
        outdated = self._mesh.outdated
        unseen = {
            f"the evidence of {missing.node} could not be read: {missing.reason}": None
            for one in judged
            for missing in one.evidence.nodes_missing
        }
        return MeshFacts(
            services=tuple(_service_facts(one, snapshot, living) for one in judged),
            settings=settings_of(snapshot.entries, services),
            outbound=outbound_calls(edges, living),
            problems=(*((outdated,) if outdated else ()), *silent, *unseen),
            window_s=window,
            window_named=window_s is not None,
            at=time.time(),
            place=self._mesh.place,
        )


def settings_of(entries: Iterable[Entry], services: Iterable[str]) -> tuple[GlobalSettings, ...]:
    """The global settings of every partition."""
    entries = tuple(entries)
    return tuple(
        _settings(mesh_entry_of(entries, partition)) for partition in partitions(entries, services)
    )


def _settings(entry: Mesh) -> GlobalSettings:
    return GlobalSettings(
        partition=entry.partition,
        gate_open=entry.allow_enabling_permissive_mutual_tls,
        mesh_destinations_only=entry.transparent_proxy.mesh_destinations_only,
        entry=written_by_hand(entry),
    )


def mode_settings(
    entries: Iterable[Entry], instances: Iterable[Instance]
) -> tuple[ModeSetting, ...]:
    """Every place that can say a mode, and what it says."""
    return (
        *(
            ModeSetting(
                kind=entry.kind,
                name=entry.name,
                namespace=entry.namespace,
                partition=entry.partition,
                mode=entry.mutual_tls_mode,
            )
            for entry in mode_entries(entries)
        ),
        *(
            ModeSetting(
                kind="registration",
                name=one.name,
                namespace=ServiceName.of(one.service).namespace,
                partition=ServiceName.of(one.service).partition,
                mode=one.registered_mode,
            )
            for one in instances
            if one.registered_mode is not None
        ),
    )


def outbound_calls(
    edges: Iterable[NamedEdge], living: Iterable[Instance]
) -> tuple[OutboundCall, ...]:
    """What sidecars pass on as it is: by caller, destination, port and class.

    Leaves out mTLS to sidecars, what keeps clear of the caller's sidecar, and connections to a workload that its
    caller reaches with mTLS since.
    """
    meshed = {(one.name, one.node) for one in living if one.meshed}
    mesh_since: dict[tuple[str, ...], float] = {}
    plain: dict[tuple[str, ...], OutboundCall] = {}
    for edge in edges:
        if edge.observed_at is not Direction.OUTBOUND or not edge.caller.meshed:
            continue
        there = edge.server.workload or edge.server.address
        ends = (edge.caller.workload, edge.caller.node, there, edge.server.node)
        destination_meshed = (edge.server.workload, edge.server.node) in meshed
        if edge.flow_class is FlowClass.MESH and destination_meshed:
            mesh_since[ends] = max(mesh_since.get(ends, 0.0), edge.first_seen)
            continue
        if edge.path != THROUGH_SIDECAR or edge.flow_class is FlowClass.EMPTY:
            continue
        if not (edge.connections or edge.bytes_to_server or edge.bytes_to_client):
            continue
        key = (*ends, str(edge.port), edge.flow_class)
        before = plain.get(key)
        plain[key] = OutboundCall(
            caller=edge.caller.workload,
            caller_service=edge.caller.service,
            node=edge.caller.node,
            address=edge.server.address,
            destination=edge.server.service,
            destination_meshed=destination_meshed,
            port=edge.port,
            flow_class=edge.flow_class,
            connections=edge.connections + (before.connections if before else 0),
            last_seen=max(edge.last_seen, before.last_seen if before else 0.0),
        )
    return tuple(
        call for key, call in sorted(plain.items()) if call.last_seen > mesh_since.get(key[:4], 0.0)
    )


def _service_facts(judged: Judged, snapshot: Snapshot, living: Iterable[Instance]) -> ServiceFacts:
    service = judged.intent.service
    instances = tuple(one for one in living if service in names.services_of(one))
    return ServiceFacts(
        intent=judged.intent,
        mode_source=_mode_source(service, snapshot.entries, instances),
        verdict=judged.verdict,
        instances=instances,
        sidecar_problems=tuple(
            SidecarProblem(
                workload=each.instance.name, node=each.instance.node, problem=each.sidecar_problem
            )
            for each in judged.evidence.instances
            if each.sidecar_problem
        ),
    )


def _mode_source(
    service: str, entries: Iterable[Entry], instances: Iterable[Instance]
) -> ModeSource:
    own, shared = defaults_of(entries, service)
    if any(one.registered_mode is not None for one in instances):
        return ModeSource.REGISTRATION
    if own is not None and own.mutual_tls_mode is not None:
        return ModeSource.SERVICE_DEFAULTS
    if shared is not None and shared.mutual_tls_mode is not None:
        return ModeSource.PROXY_DEFAULTS
    return ModeSource.DEFAULT


def _suggested(
    suggestion: Suggestion, entries: Iterable[Entry], *, all_callers: bool
) -> SuggestedEntry:
    name = ServiceName.of(suggestion.destination)
    key = EntryKey(Kind.SERVICE_INTENTIONS, *name)
    present = next((entry for entry in entries if entry.key == key), None)
    sources = suggestion.named(all_callers=all_callers)
    changed = allowing(
        present if isinstance(present, ServiceIntentions) else None,
        suggestion.destination,
        sources,
    )
    return SuggestedEntry(
        suggestion=suggestion,
        remarks=suggestion.remarks,
        entry=written_by_hand(changed) if sources else None,
    )
