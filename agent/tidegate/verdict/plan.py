"""The steps of onboarding for one service: which are done, which is next, and the exact command for it.

The steps are those of Consul's document on permissive mTLS, its last one (re-securing) in three: the downstreams,
the service itself, the mesh. Several services are put in order by who calls whom. Pure.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from tidegate.model import FlowClass, MutualTLSMode, ServiceName
from tidegate.verdict import steps
from tidegate.verdict.evidence import Caller, CallerKind
from tidegate.verdict.onboarding import (
    Downstream,
    MeshFacts,
    ServiceFacts,
    calls,
    downstreams,
    listed,
)
from tidegate.verdict.permission import Permission
from tidegate.verdict.readiness import Answer


class StepName(enum.StrEnum):
    """In the order in which they are done."""

    SETTINGS = "settings"
    PERMISSIVE = "permissive"
    INTENTIONS = "intentions"
    SIDECAR = "sidecar"
    DOWNSTREAMS = "downstreams"
    STRICT = "strict"
    RESECURE = "resecure"


_TITLES: dict[StepName, str] = {
    StepName.SETTINGS: "Configure global settings",
    StepName.PERMISSIVE: "Enable permissive mTLS mode",
    StepName.INTENTIONS: "Configure intentions",
    StepName.SIDECAR: "Register the service, with its sidecar",
    StepName.DOWNSTREAMS: "Onboard the services that call it",
    StepName.STRICT: "Switch the service to strict mTLS mode",
    StepName.RESECURE: "Re-secure the mesh",
}


class StepState(enum.StrEnum):
    DONE = "done"
    NOT_NEEDED = "not-needed"
    NEXT = "next"
    LATER = "later"


class PlanStep(msgspec.Struct, frozen=True, kw_only=True):
    name: StepName
    title: str
    state: StepState
    detail: str
    """What is so, or why it is not needed."""
    commands: tuple[str, ...] = ()
    """What to do, command by command; none for a step that is done."""


class ServicePlan(msgspec.Struct, frozen=True, kw_only=True):
    service: str
    steps: tuple[PlanStep, ...]
    calls: tuple[str, ...]
    called_by: tuple[str, ...]

    @property
    def next_step(self) -> PlanStep | None:
        """None when everything is done."""
        return next((step for step in self.steps if step.state is StepState.NEXT), None)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Plans of services in the order in which to onboard them."""

    services: tuple[ServicePlan, ...]
    groups: tuple[tuple[str, ...], ...]
    """The same order; services that call each other in a circle are one group."""
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why callers may be missing."""


class _Need(msgspec.Struct, frozen=True):
    """Whether a step is needed, whether it is done, and how."""

    done: bool
    detail: str
    commands: tuple[str, ...] = ()
    needed: bool = True
    waits: bool = False
    """Whether something else comes first, also if all steps before it are done."""


def plan(facts: MeshFacts, services: Iterable[str]) -> Plan:
    """The plans of these services, callers before those whom they call."""
    targets = calls(facts)
    groups = order(services, targets)
    return Plan(
        services=tuple(
            plan_of(facts, found)
            for group in groups
            for found in (facts.of(service) for service in group)
            if found is not None
        ),
        groups=groups,
        notes=tuple(
            f"{listed(group)} call each other in a circle: none of them can be onboarded after all its callers;"
            " make each permissive before it gets its sidecar"
            for group in groups
            if len(group) > 1
        ),
        problems=facts.problems,
    )


def plan_of(facts: MeshFacts, service: ServiceFacts) -> ServicePlan:
    """The steps of one service; the first that is needed and not done is the next."""
    using = downstreams(service)
    needs = {
        **_until_in_mesh(facts, service, using),
        StepName.DOWNSTREAMS: _downstreams(facts, service, using),
        StepName.STRICT: _strict(facts, service),
        StepName.RESECURE: _resecure(facts, service),
    }
    planned = []
    is_next = True
    for name, need in needs.items():
        state = _state(need, is_next=is_next)
        is_next = is_next and state is not StepState.NEXT
        planned.append(
            PlanStep(
                name=name,
                title=_TITLES[name],
                state=state,
                detail=need.detail,
                commands=need.commands if state in (StepState.NEXT, StepState.LATER) else (),
            )
        )
    return ServicePlan(
        service=service.service,
        steps=tuple(planned),
        calls=tuple(sorted(calls(facts).get(service.service, ()))),
        called_by=tuple(sorted(one.name for one in using if one.service != service.service)),
    )


def needs_permissive(service: ServiceFacts, using: Iterable[Downstream]) -> bool:
    """Whether somebody would be cut off if the service were in the mesh and strict."""
    return any(one.not_mesh for one in using) and not (
        service.in_mesh and service.intent.mode is MutualTLSMode.STRICT
    )


def onboarding_commands(facts: MeshFacts, service: ServiceFacts) -> tuple[str, ...]:
    """Everything that puts a service into the mesh without cutting anybody off, in order."""
    needs = _until_in_mesh(facts, service, downstreams(service)).values()
    return tuple(
        command for need in needs if need.needed and not need.done for command in need.commands
    )


def _until_in_mesh(
    facts: MeshFacts, service: ServiceFacts, using: Sequence[Downstream]
) -> dict[StepName, _Need]:
    return {
        StepName.SETTINGS: _settings(facts, service, using),
        StepName.PERMISSIVE: _permissive(facts, service, using),
        StepName.INTENTIONS: _intentions(facts, service, using),
        StepName.SIDECAR: _sidecar(facts, service),
    }


def order(
    services: Iterable[str], targets: Mapping[str, frozenset[str]]
) -> tuple[tuple[str, ...], ...]:
    """Services, callers before those whom they call, in groups: those of one group call each other in a circle.

    A service whose callers are in the mesh already is READY as soon as it is there itself. Services that are not
    asked about do not matter. Sorted by name where nothing else decides.
    """
    asked = sorted(set(services))
    reach = {one: _reachable(one, targets) & set(asked) for one in asked}
    groups: list[tuple[str, ...]] = []
    left = list(asked)
    while left:
        # Somebody whom nobody calls who is left, but for those in a circle with it: there always is one.
        first = next(
            one for one in left if all(other in reach[one] for other in left if one in reach[other])
        )
        group = tuple(
            one for one in left if one == first or (one in reach[first] and first in reach[one])
        )
        groups.append(group)
        left = [one for one in left if one not in group]
    return tuple(groups)


def _reachable(service: str, targets: Mapping[str, frozenset[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [service]
    while ahead:
        for target in targets.get(ahead.pop(), ()):
            if target not in found:
                found.add(target)
                ahead.append(target)
    return found


def _state(need: _Need, *, is_next: bool) -> StepState:
    if need.done:
        return StepState.DONE
    if not need.needed:
        return StepState.NOT_NEEDED
    return StepState.NEXT if is_next and not need.waits else StepState.LATER


# The steps


def _settings(facts: MeshFacts, service: ServiceFacts, using: Sequence[Downstream]) -> _Need:
    settings = facts.settings_of(service.service)
    gate = needs_permissive(service, using) and service.intent.mode is MutualTLSMode.STRICT
    outside = _calls_outside(facts, service.service)
    where = _where(settings.partition)
    missing = []
    if not settings.gate_open:
        missing.append("AllowEnablingPermissiveMutualTLS is false")
    if settings.mesh_destinations_only:
        missing.append("MeshDestinationsOnly is true")
    if not missing:
        return _Need(True, f"permissive mode is allowed, and calls out of the mesh{where}")
    detail = f"{' and '.join(missing)}{where}"
    needed = (gate and not settings.gate_open) or (
        settings.mesh_destinations_only and bool(outside) and not service.in_mesh
    )
    if not needed:
        return _Need(False, f"{detail}; nothing of it is needed", needed=False)
    why = f"; {service.service} calls {listed(outside)}, outside the mesh" if outside else ""
    return _Need(False, f"{detail}{why}", (facts.place.write(settings.opened()),))


def _permissive(facts: MeshFacts, service: ServiceFacts, using: Sequence[Downstream]) -> _Need:
    if service.intent.mode is MutualTLSMode.PERMISSIVE:
        return _Need(True, f"it is permissive, by {service.mode_source}")
    if not needs_permissive(service, using):
        detail = (
            "nobody was seen calling it without mesh mTLS"
            if using
            else "nobody was seen calling it"
        )
        return _Need(False, detail, needed=False)
    names = listed(one.name for one in using if one.not_mesh)
    return _Need(
        False,
        f"{names} would be refused otherwise as soon as it has its sidecar",
        (facts.place.tidegate("permissive", service.service),),
    )


def _intentions(facts: MeshFacts, service: ServiceFacts, using: Sequence[Downstream]) -> _Need:
    known = [
        one for one in using if one.service and one.service != service.service and not one.passes_by
    ]
    denied = [one.name for one in known if one.permission is Permission.DENIED]
    missing = missing_intentions(known)
    suffix = f"; an intention denies {listed(denied)}" if denied else ""
    if not known:
        return _Need(False, "nobody whom an intention could name was seen calling it", needed=False)
    if not missing:
        return _Need(True, f"every service that calls it has an intention{suffix}")
    return _Need(
        False,
        f"no intention names {listed(missing)}{suffix}",
        (facts.suggest(service.service),),
    )


def missing_intentions(using: Iterable[Downstream]) -> tuple[str, ...]:
    """The services among the downstreams that no intention is about. What is denied is denied on purpose."""
    lacking = (Permission.MISSING, Permission.BY_DEFAULT)
    return tuple(one.service for one in using if one.service and one.permission in lacking)


def _sidecar(facts: MeshFacts, service: ServiceFacts) -> _Need:
    count = len(service.instances)
    if not count:
        return _Need(
            False,
            "the catalog knows no instance of it",
            (steps.for_no_instance(facts.place, service.service),),
        )
    problems = "".join(f"; {each.workload}: {each.problem}" for each in service.sidecar_problems)
    meshed = count - len(service.unmeshed)
    detail = f"{meshed} of {count} instances {'has' if meshed == 1 else 'have'} a sidecar{problems}"
    if not service.unmeshed:
        return _Need(True, detail)
    return _Need(False, detail, steps.onboard_all(facts.place, unmeshed_of(service)))


def unmeshed_of(service: ServiceFacts) -> tuple[Caller, ...]:
    """Its instances without a sidecar, as whom a person has to deal with."""
    return tuple(
        Caller(
            address=next(iter(one.addresses), ""),
            workload=one.name,
            service=one.service,
            namespace=one.namespace,
            node=one.node,
            kind=CallerKind.WORKLOAD,
        )
        for one in service.unmeshed
    )


def _downstreams(facts: MeshFacts, service: ServiceFacts, using: Sequence[Downstream]) -> _Need:
    waiting = [one for one in using if one.blocks or (one.not_mesh and not service.in_mesh)]
    if not waiting:
        if service.verdict.verdict is Answer.NOT_READY and service.in_mesh:
            return _Need(False, service.verdict.reasons[0].message)
        detail = "everybody who calls it uses mesh mTLS" if using else "nobody was seen calling it"
        return _Need(True, detail)
    commands = tuple(
        dict.fromkeys(
            command for one in waiting for command in _downstream_commands(facts, service, one)
        )
    )
    told = "; ".join(_told(one) for one in waiting)
    return _Need(False, told, commands)


def _downstream_commands(facts: MeshFacts, service: ServiceFacts, one: Downstream) -> Iterator[str]:
    own = facts.of(one.service) if one.service else None
    if own is not None and own.unmeshed and own.service != service.service:
        yield from onboarding_commands(facts, own)
    elif one.unmeshed and one.service != service.service:
        yield from steps.onboard_all(facts.place, one.unmeshed)
    elif not one.service:
        yield facts.place.tidegate("flows", "--caller", one.name)


def _told(one: Downstream) -> str:
    kinds = listed(each for each in one.classes if each is not FlowClass.MESH) or FlowClass.MESH
    if not one.service:
        where = "the catalog does not know it"
    elif one.onboarded:
        where = "is in the mesh"
    else:
        where = "is not in the mesh"
    intention = {
        Permission.ALLOWED: ", has an intention",
        Permission.BY_DEFAULT: ", is allowed by default only",
        Permission.MISSING: ", has no intention",
        Permission.DENIED: ", is denied by an intention",
        Permission.UNKNOWABLE: "",
    }[one.permission]
    return f"{one.name} ({kinds}) {where}{intention}"


def _strict(facts: MeshFacts, service: ServiceFacts) -> _Need:
    if service.intent.mode is MutualTLSMode.STRICT:
        return _Need(
            service.in_mesh,
            f"it is strict, by {service.mode_source}"
            if service.in_mesh
            else "it is strict as soon as it has its sidecar",
            needed=False,
        )
    verdict = service.verdict
    command = facts.place.tidegate("strict", service.service)
    if verdict.verdict is Answer.READY:
        return _Need(False, "it is READY", (command,))
    why = verdict.reasons[0].message if verdict.reasons else "nothing is known of it"
    wait = facts.command("ready", service.service, "--wait", "10m")
    return _Need(False, f"it is {verdict.verdict}: {why}", (wait, command))


def _resecure(facts: MeshFacts, service: ServiceFacts) -> _Need:
    settings = facts.settings_of(service.service)
    if not settings.gate_open and settings.mesh_destinations_only:
        return _Need(True, "permissive mode is not allowed, and calls out of the mesh are not")
    left = [
        one.service
        for one in facts.services
        if one.instances
        and ServiceName.of(one.service).partition == settings.partition
        and (not one.in_mesh or one.intent.mode is MutualTLSMode.PERMISSIVE)
        and one.service != service.service
    ]
    detail = f"when {listed(left)} {'is' if len(left) == 1 else 'are'} strict too" if left else ""
    return _Need(
        False,
        detail or "the global settings are still those of onboarding",
        (facts.command("resecure"),),
        waits=bool(left),
    )


def _calls_outside(facts: MeshFacts, service: str) -> list[str]:
    """Destinations without a sidecar that a service calls."""
    meshed = {one.service for one in facts.services if one.in_mesh}
    named = {target for target in calls(facts).get(service, ()) if target not in meshed}
    named |= {
        one.destination or one.address for one in facts.outbound if one.caller_service == service
    }
    return sorted(named - meshed)


def _where(partition: str) -> str:
    return "" if partition == "default" else f" (partition {partition})"
