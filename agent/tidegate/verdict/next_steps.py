"""The steps that bring the whole mesh furthest, computed from who waits for whom.

Each candidate is weighed by the services that it moves: those that nobody blocks any more after it, that come into
the mesh by it, or that become strict. A caller that alone blocks two services comes before one that shares
the blame for three. Pure.
"""

import enum
from collections.abc import Iterator, Mapping

import msgspec

from tidegate.model import MutualTLSMode
from tidegate.verdict import steps
from tidegate.verdict.onboarding import (
    Downstream,
    MeshFacts,
    ServiceFacts,
    downstreams,
    listed,
)
from tidegate.verdict.permission import Permission
from tidegate.verdict.plan import missing_intentions, onboarding_commands
from tidegate.verdict.readiness import Answer

MOST = 3


class StepKind(enum.StrEnum):
    """In the order of effort, least first: of two steps that move as much the easier one comes first."""

    STRICT = "strict"
    RESECURE = "resecure"
    INTENTION = "intention"
    ONBOARD = "onboard"
    SIDECAR = "sidecar"
    IDENTIFY = "identify"
    RECONNECT = "reconnect"


class NextStep(msgspec.Struct, frozen=True, kw_only=True):
    kind: StepKind
    subject: str
    """Service, or address, that something is done about."""
    message: str
    moves: tuple[str, ...]
    """Services that come one stage further by this step alone."""
    helps: tuple[str, ...]
    """Services that it helps without being enough for them."""
    connections: int
    """Connections in the window that this is about: who is used more comes first among equals."""
    commands: tuple[str, ...]


def next_steps(facts: MeshFacts, most: int = MOST) -> tuple[NextStep, ...]:
    """The steps that move most services, at most so many."""
    using = {one.service: downstreams(one) for one in facts.services}
    candidates = (
        *_strict(facts),
        *_blockers(facts, using),
        *_not_in_mesh(facts, using),
        *_sidecars(facts),
        *_resecure(facts),
    )
    effort = tuple(StepKind)
    ranked = sorted(
        candidates,
        key=lambda step: (
            -len(step.moves),
            -len(step.helps),
            effort.index(step.kind),
            -step.connections,
            step.subject,
        ),
    )
    return tuple(ranked[:most])


def _strict(facts: MeshFacts) -> Iterator[NextStep]:
    for one in facts.services:
        if one.intent.mode is MutualTLSMode.PERMISSIVE and one.verdict.verdict is Answer.READY:
            yield NextStep(
                kind=StepKind.STRICT,
                subject=one.service,
                message=f"{one.service} is READY: switch it to strict",
                moves=(one.service,),
                helps=(),
                connections=0,
                commands=(facts.place.tidegate("strict", one.service),),
            )


def _blockers(facts: MeshFacts, using: Mapping[str, tuple[Downstream, ...]]) -> Iterator[NextStep]:
    """One step for each caller that strict mode would refuse somewhere."""
    blocking = {
        service: {one.name: one for one in found if one.blocks} for service, found in using.items()
    }
    for name in sorted({name for found in blocking.values() for name in found}):
        at = {service: found[name] for service, found in blocking.items() if name in found}
        alone = tuple(service for service in at if len(blocking[service]) == 1)
        others = tuple(service for service in at if service not in alone)
        yield _blocker(facts, name, at, alone, others)


def _blocker(
    facts: MeshFacts,
    name: str,
    at: Mapping[str, Downstream],
    alone: tuple[str, ...],
    others: tuple[str, ...],
) -> NextStep:
    caller = next(iter(at.values()))
    own = facts.of(name) if caller.service else None
    targets = [found for service in at if (found := facts.of(service))]
    lacking = [one for one in targets if missing_intentions([at[one.service]])]
    allow = tuple(facts.suggest(one.service) for one in lacking)
    denied = [service for service, one in at.items() if one.permission is Permission.DENIED]
    if not caller.service:
        kind, what = StepKind.IDENTIFY, f"Find out what {name} is: the catalog does not know it"
        commands: tuple[str, ...] = (facts.place.tidegate("flows", "--caller", name),)
    elif own is not None and own.unmeshed:
        kind, what = StepKind.ONBOARD, f"Onboard {name}"
        if lacking:
            what += f", and allow it to call {listed(one.service for one in lacking)}"
        commands = (*allow, *onboarding_commands(facts, own))
    elif any(one.unmeshed for one in at.values()):
        unmeshed = tuple(caller for one in at.values() for caller in one.unmeshed)
        kind, what = StepKind.ONBOARD, f"Onboard {name}"
        commands = (*allow, *steps.onboard_all(facts.place, unmeshed))
    elif lacking:
        kind = StepKind.INTENTION
        what = f"Allow {name} to call {listed(one.service for one in lacking)}"
        what += ": it is in the mesh, and no intention names it"
        commands = allow
    elif denied:
        kind = StepKind.INTENTION
        what = f"Decide on {name}: an intention denies that it calls {listed(denied)}, and it does"
        commands = tuple(steps.read_intentions(facts.place, service) for service in denied)
    else:
        kind = StepKind.RECONNECT
        what = f"Restart {name}, or wait until it connects again: it is in the mesh and allowed"
        commands = (facts.place.tidegate("flows", "--caller", name),)
    return NextStep(
        kind=kind,
        subject=name,
        message=f"{what}; {_gain(alone, others)}",
        moves=(*alone, name) if own is not None and own.unmeshed and downstreams(own) else alone,
        helps=others,
        connections=sum(one.not_mesh for one in at.values()),
        commands=commands,
    )


def _not_in_mesh(
    facts: MeshFacts, using: Mapping[str, tuple[Downstream, ...]]
) -> Iterator[NextStep]:
    """One step for each service without a sidecar that blocks nobody: those that do have a step already."""
    blockers = {one.name for found in using.values() for one in found if one.blocks}
    for one in facts.services:
        if not one.unmeshed or one.service in blockers:
            continue
        callers = [caller.name for caller in using[one.service] if caller.not_mesh]
        calls = [
            service
            for service, found in using.items()
            if service != one.service and any(caller.name == one.service for caller in found)
        ]
        if callers:
            why = f"{listed(callers)} {'calls' if len(callers) == 1 else 'call'} it without mTLS"
        elif calls:
            why = f"it calls {listed(calls)}"
        else:
            why = "it was not seen in the window, and strict mode would refuse it"
        yield NextStep(
            kind=StepKind.ONBOARD,
            subject=one.service,
            message=f"Onboard {one.service}: {why}",
            moves=(one.service,) if callers or calls else (),
            helps=(),
            connections=sum(caller.connections for caller in using[one.service]),
            commands=onboarding_commands(facts, one),
        )


def _sidecars(facts: MeshFacts) -> Iterator[NextStep]:
    for one in facts.services:
        for each in one.sidecar_problems:
            yield NextStep(
                kind=StepKind.SIDECAR,
                subject=one.service,
                message=f"Put {each.workload} right: {each.problem}",
                moves=(one.service,),
                helps=(),
                connections=0,
                commands=(steps.status_command(facts.place),),
            )


def _resecure(facts: MeshFacts) -> Iterator[NextStep]:
    """When nothing is left to onboard."""
    open_ = [one for one in facts.settings if one.gate_open or not one.mesh_destinations_only]
    if not open_ or not facts.services or any(not _is_secure(one) for one in facts.services):
        return
    yield NextStep(
        kind=StepKind.RESECURE,
        subject="mesh",
        message="Re-secure the mesh: every service is in it and strict, and the global settings still let others be",
        moves=tuple(one.service for one in facts.services),
        helps=(),
        connections=0,
        commands=(facts.command("resecure"),),
    )


def _is_secure(one: ServiceFacts) -> bool:
    return not one.instances or (one.in_mesh and one.intent.mode is MutualTLSMode.STRICT)


def _gain(alone: tuple[str, ...], others: tuple[str, ...]) -> str:
    told = []
    if alone:
        told.append(f"nothing else blocks {listed(alone)}")
    if others:
        told.append(f"{listed(others)} {'has' if len(others) == 1 else 'have'} other blockers too")
    return ", ".join(told)
