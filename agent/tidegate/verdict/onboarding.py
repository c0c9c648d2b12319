"""Where each service of the mesh stands on its way into strict mTLS, and who it still waits for.

Answers the questions that onboarding asks of every service: which downstreams still send something
else than mesh mTLS, are they in the mesh, does an intention allow them. Facts come from verdicts, the
catalog and config entries; what follows from them for the next step is in `next_steps`, `plan`,
`suggestions` and `resecuring`. Pure.
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tidegate.model import (
    DEFAULT_TENANT,
    FlowClass,
    Instance,
    MutualTLSMode,
    ServiceIntent,
    ServiceName,
)
from tidegate.verdict.evidence import Caller
from tidegate.verdict.permission import Permission, permission
from tidegate.verdict.readiness import Answer, CallerFlow, Effect, Reason, ReasonKind, Verdict
from tidegate.verdict.steps import Place

_COUNTED = (Effect.BLOCKS, Effect.MESH, Effect.UNPROTECTED)
"""Effects of flows by which somebody uses a service; probes, and what no mode lets in, are no use of it."""


class ModeSource(enum.StrEnum):
    """What a service's mode comes from, in the order in which they win."""

    REGISTRATION = "registration"
    SERVICE_DEFAULTS = "service-defaults"
    PROXY_DEFAULTS = "proxy-defaults"
    DEFAULT = "default"
    """Nothing says one: strict."""


class GlobalSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the mesh entry of one partition says."""

    partition: str = DEFAULT_TENANT
    gate_open: bool = False
    """AllowEnablingPermissiveMutualTLS."""
    mesh_destinations_only: bool = False
    entry: dict[str, Any] = {}
    """The entry in Consul's JSON, so that a command can write it again with one thing changed."""

    def opened(self) -> dict[str, Any]:
        """The entry with both settings as onboarding needs them; all else as it is."""
        return {
            **self.entry,
            "Kind": "mesh",
            "AllowEnablingPermissiveMutualTLS": True,
            "TransparentProxy": {
                **self.entry.get("TransparentProxy", {}),
                "MeshDestinationsOnly": False,
            },
        }


class SidecarProblem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a sidecar does not run as it should: Envoy's own words where it refuses its configuration."""

    workload: str
    node: str
    problem: str


class ServiceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one service."""

    intent: ServiceIntent
    mode_source: ModeSource
    verdict: Verdict
    instances: tuple[Instance, ...]
    """Those that live."""
    sidecar_problems: tuple[SidecarProblem, ...] = ()

    @property
    def service(self) -> str:
        return self.intent.service

    @property
    def unmeshed(self) -> tuple[Instance, ...]:
        return tuple(one for one in self.instances if not one.meshed)

    @property
    def in_mesh(self) -> bool:
        """Whether every instance has a sidecar, and there is one."""
        return bool(self.instances) and not self.unmeshed


class OutboundCall(msgspec.Struct, frozen=True, kw_only=True):
    """Connections of a meshed workload that its sidecar passes on as they are: to no destination of the mesh."""

    caller: str
    """Workload."""
    caller_service: str
    node: str
    address: str
    """Where to, as used last."""
    destination: str = ""
    """Service there, empty where the catalog knows none."""
    destination_meshed: bool = False
    """The destination has a sidecar, and the caller's does not know that it may call it."""
    port: int
    flow_class: FlowClass = msgspec.field(name="class")
    connections: int
    last_seen: float


class MeshFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that onboarding judges: one moment of the whole mesh."""

    services: tuple[ServiceFacts, ...]
    settings: tuple[GlobalSettings, ...] = ()
    outbound: tuple[OutboundCall, ...] = ()
    problems: tuple[str, ...] = ()
    """Why something of this may be missing or old."""
    window_s: float
    window_named: bool = False
    """Whether a person chose the window: commands then name it too."""
    at: float
    place: Place = Place()

    def command(self, *words: str) -> str:
        """A tidegate command that looks at the same window."""
        window = ("--window", f"{self.window_s:g}s") if self.window_named else ()
        return self.place.tidegate(*words, *window)

    def suggest(self, service: str) -> str:
        """The command that writes the intentions which a service lacks."""
        return self.command("intentions", "suggest", service, "--all-callers", "--write")

    def of(self, service: str) -> ServiceFacts | None:
        return next((one for one in self.services if one.service == service), None)

    def settings_of(self, service: str) -> GlobalSettings:
        """The settings of the service's partition; Consul's defaults where it has no mesh entry."""
        partition = ServiceName.of(service).partition
        found = (one for one in self.settings if one.partition == partition)
        named = {} if partition == DEFAULT_TENANT else {"Partition": partition}
        return next(found, GlobalSettings(partition=partition, entry=named))


class Downstream(msgspec.Struct, frozen=True, kw_only=True):
    """One service that calls another, or one address that the catalog does not know."""

    name: str
    """Service, or address where there is none."""
    service: str
    """Empty for an address."""
    workloads: tuple[str, ...]
    """Those that were seen calling."""
    unmeshed: tuple[Caller, ...]
    """Those of them that have no sidecar."""
    classes: tuple[FlowClass, ...]
    connections: int
    """All that were opened in the window."""
    not_mesh: int
    """Those of them that are not mesh mTLS."""
    blocks: bool
    """Whether strict mode would refuse it."""
    passes_by: bool
    """Whether exclusions keep all its connections away from the sidecar: no mode and no intention is about them."""
    onboarded: bool
    """Whether every workload of it that was seen has a sidecar."""
    permission: Permission
    last_seen: float

    @property
    def uses_mesh(self) -> bool:
        return FlowClass.MESH in self.classes


def downstreams(facts: ServiceFacts) -> tuple[Downstream, ...]:
    """Who uses a service, those that block first, then by name."""
    groups: dict[str, list[CallerFlow]] = {}
    for flow in facts.verdict.callers:
        if flow.effect in _COUNTED and flow.flow_class is not FlowClass.EMPTY:
            groups.setdefault(flow.caller.service or flow.caller.address, []).append(flow)
    found = [_downstream(name, flows, facts) for name, flows in groups.items()]
    return tuple(sorted(found, key=lambda one: (not one.blocks, one.name)))


def _downstream(name: str, flows: list[CallerFlow], facts: ServiceFacts) -> Downstream:
    service = flows[0].caller.service
    unmeshed = {
        (flow.caller.node, flow.caller.workload): flow.caller
        for flow in flows
        if service and not flow.caller.meshed
    }
    seen = {flow.flow_class for flow in flows}
    return Downstream(
        name=name,
        service=service,
        workloads=tuple(sorted({flow.caller.workload for flow in flows} - {""})),
        unmeshed=tuple(unmeshed[key] for key in sorted(unmeshed)),
        classes=tuple(each for each in FlowClass if each in seen),
        connections=sum(flow.connections for flow in flows),
        not_mesh=sum(flow.connections for flow in flows if flow.effect is not Effect.MESH),
        blocks=any(flow.effect is Effect.BLOCKS for flow in flows),
        passes_by=facts.in_mesh and all(flow.effect is Effect.UNPROTECTED for flow in flows),
        onboarded=bool(service) and not unmeshed,
        permission=permission(facts.intent, service),
        last_seen=max(flow.last_seen for flow in flows),
    )


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the mesh at a glance."""

    service: str
    mode: MutualTLSMode
    mode_source: ModeSource
    instances: int
    meshed: int
    """How many of them have a sidecar in their path."""
    connections: int
    """To the service in the window, those without payload left out."""
    mesh_share: float | None
    """Share of mesh mTLS among them, 0 to 1; None when there was none."""
    verdict: Answer | None
    """None while no instance has a sidecar: there is nothing that could go strict."""
    blocking: tuple[str, ...]
    """Names of the downstreams that strict mode would refuse."""
    downstreams: tuple[Downstream, ...]
    reasons: tuple[Reason, ...]
    """The verdict's, those about single flows left out: `downstreams` has them."""
    sidecar_problems: tuple[SidecarProblem, ...]


def service_status(facts: ServiceFacts) -> ServiceStatus:
    """What there is to say of one service."""
    using = downstreams(facts)
    connections = sum(one.connections for one in using)
    mesh = connections - sum(one.not_mesh for one in using)
    meshed = sum(one.meshed for one in facts.instances)
    shown = (ReasonKind.BLOCKING_FLOW, ReasonKind.UNKNOWN_FLOW, ReasonKind.NOT_MESHED)
    return ServiceStatus(
        service=facts.service,
        mode=facts.intent.mode,
        mode_source=facts.mode_source,
        instances=len(facts.instances),
        meshed=meshed,
        connections=connections,
        mesh_share=mesh / connections if connections else None,
        verdict=facts.verdict.verdict if meshed else None,
        blocking=tuple(one.name for one in using if one.blocks),
        downstreams=using,
        reasons=tuple(one for one in facts.verdict.reasons if meshed and one.kind not in shown),
        sidecar_problems=facts.sidecar_problems,
    )


def calls(facts: MeshFacts) -> Mapping[str, frozenset[str]]:
    """Who calls whom in the window: under each service, the services that it calls. Oneself is left out."""
    called: dict[str, set[str]] = {one.service: set() for one in facts.services}
    for server in facts.services:
        for one in downstreams(server):
            if one.service and one.service != server.service:
                called.setdefault(one.service, set()).add(server.service)
    return {service: frozenset(targets) for service, targets in called.items()}


def listed(names: Iterable[str]) -> str:
    """Names for a sentence: a, b and c."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
