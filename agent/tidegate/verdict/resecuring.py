"""What re-securing the mesh would break, and the proof that it is done.

Re-securing closes AllowEnablingPermissiveMutualTLS and sets MeshDestinationsOnly. The first breaks nothing by
itself; the second closes every connection of a meshed workload to where no sidecar answers with mTLS. A service
that is still permissive is not broken by it, and the mesh is not secure while there is one. Pure.
"""

import enum

import msgspec

from tidegate.durations import ago
from tidegate.model import FlowClass, MutualTLSMode, ServiceName
from tidegate.verdict.onboarding import GlobalSettings, MeshFacts, OutboundCall, listed


class ModeSetting(msgspec.Struct, frozen=True, kw_only=True):
    """One place that says MutualTLSMode: an entry, or the registration of an instance."""

    kind: str
    name: str
    namespace: str
    partition: str
    mode: MutualTLSMode | None
    """None says nothing."""


class Hurt(enum.StrEnum):
    CALL = "call"
    """Connections that MeshDestinationsOnly would close."""
    PERMISSIVE = "permissive"
    """Somebody who stays permissive."""
    UNSEEN = "unseen"
    """Something that could not be looked at."""


class Breakage(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that speaks against re-securing."""

    kind: Hurt
    message: str
    next_step: str
    call: OutboundCall | None = None
    setting: ModeSetting | None = None


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that has to be so in a mesh that is secure."""

    holds: bool
    message: str
    partition: str
    namespace: str = ""
    """Empty for what is about the whole partition."""


def breakages(facts: MeshFacts, settings: tuple[ModeSetting, ...]) -> tuple[Breakage, ...]:
    """What would break, or stay open, calls first. Calls count only where they are still allowed."""
    return (
        *(
            _of_call(facts, one)
            for one in facts.outbound
            if not facts.settings_of(one.caller_service).mesh_destinations_only
        ),
        *(_of_setting(facts, one) for one in settings if one.mode is MutualTLSMode.PERMISSIVE),
        *(
            Breakage(
                kind=Hurt.UNSEEN,
                message=f"not everything was looked at: {problem}",
                next_step="",
            )
            for problem in facts.problems
        ),
    )


def _of_call(facts: MeshFacts, call: OutboundCall) -> Breakage:
    where = f"{call.destination or call.address}:{call.port}"
    amount = f"{call.connections} connection{'' if call.connections == 1 else 's'}"
    kind = "its own TLS" if call.flow_class in (FlowClass.TLS, FlowClass.MESH) else call.flow_class
    seen = ago(facts.at - call.last_seen)
    if call.destination_meshed:
        why = "in the mesh, but no intention lets its sidecar know"
        step = f"Allow it: `{facts.place.tidegate('intentions', 'suggest', call.destination)}` shows the entry"
    elif call.destination:
        why = "not in the mesh"
        step = f"Onboard {call.destination}: `{facts.place.tidegate('onboard', 'plan', call.destination)}`"
    else:
        why = "outside the mesh"
        step = (
            f"Keep it away from the sidecar of {call.caller} with the annotation consul.hashicorp.com/"
            f'transparent-proxy-exclude-outbound-cidrs: "{call.address}", or let it go through a gateway'
        )
    return Breakage(
        kind=Hurt.CALL,
        message=f"{call.caller} calls {where}, {why}, with {kind}: {amount}, last seen {seen}",
        next_step=step,
        call=call,
    )


def _of_setting(facts: MeshFacts, setting: ModeSetting) -> Breakage:
    where = _place_of(setting.partition, setting.namespace)
    match setting.kind:
        case "service-defaults":
            name = _qualified(setting)
            step = f"Switch it to strict: `{facts.place.tidegate('strict', name)}`"
        case "proxy-defaults":
            step = "Write it again without MutualTLSMode: services without one of their own are strict then"
        case _:
            step = (
                "Register it again without MutualTLSMode: its registration wins over config entries"
            )
    return Breakage(
        kind=Hurt.PERMISSIVE,
        message=f"{setting.kind}/{setting.name}{where} is permissive",
        next_step=step,
        setting=setting,
    )


def proofs(
    settings: tuple[GlobalSettings, ...],
    modes: tuple[ModeSetting, ...],
    behind: tuple[str, ...],
    sidecars: int,
) -> tuple[Proof, ...]:
    """What has to be so, partition by partition and namespace by namespace, and whether it is.

    `behind` are the workloads, of so many with sidecars, whose sidecar does not run the new settings yet.
    """
    found = []
    for one in settings:
        found += [
            _gate_proof(one),
            Proof(
                holds=one.mesh_destinations_only,
                message=f"mesh: MeshDestinationsOnly is {_word(one.mesh_destinations_only)}",
                partition=one.partition,
            ),
        ]
        here = [mode for mode in modes if mode.partition == one.partition]
        found += _shared_proofs(one.partition, here)
        for namespace in sorted({mode.namespace for mode in here if _is_own(mode)} | {"default"}):
            found.append(_namespace_proof(one.partition, namespace, here))
    found.append(
        Proof(
            holds=not behind,
            message=f"{sidecars - len(behind)} of {sidecars} sidecars run it"
            + (f"; not yet: {listed(behind)}" if behind else ""),
            partition="",
        )
    )
    return tuple(found)


def _gate_proof(one: GlobalSettings) -> Proof:
    return Proof(
        holds=not one.gate_open,
        message=f"mesh: AllowEnablingPermissiveMutualTLS is {_word(one.gate_open)}",
        partition=one.partition,
    )


def _shared_proofs(partition: str, modes: list[ModeSetting]) -> list[Proof]:
    shared = [mode for mode in modes if mode.kind == "proxy-defaults"]
    if not shared:
        message = "proxy-defaults: there is no entry, so strict is the default"
        return [Proof(holds=True, message=message, partition=partition)]
    return [
        Proof(
            holds=mode.mode is not MutualTLSMode.PERMISSIVE,
            message=f'proxy-defaults/{mode.name}: MutualTLSMode is "{mode.mode or ""}"',
            partition=partition,
        )
        for mode in shared
    ]


def _namespace_proof(partition: str, namespace: str, modes: list[ModeSetting]) -> Proof:
    own = [mode for mode in modes if _is_own(mode) and mode.namespace == namespace]
    permissive = [mode.name for mode in own if mode.mode is MutualTLSMode.PERMISSIVE]
    said = f"permissive: {listed(permissive)}" if permissive else "none is permissive"
    return Proof(
        holds=not permissive,
        message=f"service-defaults and registrations: {len(own)} looked at, {said}",
        partition=partition,
        namespace=namespace,
    )


def _is_own(mode: ModeSetting) -> bool:
    return mode.kind != "proxy-defaults"


def _qualified(setting: ModeSetting) -> str:
    return str(ServiceName(setting.name, setting.namespace, setting.partition))


def _place_of(partition: str, namespace: str) -> str:
    parts = []
    if namespace != "default":
        parts.append(f"namespace {namespace}")
    if partition != "default":
        parts.append(f"partition {partition}")
    return f" ({', '.join(parts)})" if parts else ""


def _word(flag: bool) -> str:
    return "true" if flag else "false"
