"""Whether a service can go strict: intent and evidence in, READY, NOT READY or UNKNOWN out, with
every reason.

NOT READY as soon as something was seen that strict mode would break; otherwise UNKNOWN as long as
anything is missing that could hide such a thing; otherwise READY. What a flow means for the flip is
decided once, in `effect_of`. Pure: everything is a function of the arguments, the time included.
"""

import enum
import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from tidegate.addresses import canonical, is_within
from tidegate.durations import ago, span
from tidegate.model import (
    FlowClass,
    Hint,
    Instance,
    Interval,
    MutualTLSMode,
    ServiceIntent,
    Sidecar,
)
from tidegate.verdict import intervals, names, steps
from tidegate.verdict.evidence import (
    REDIRECTION_REPAIRED,
    Caller,
    CallerKind,
    ChainTotals,
    EdgeEvidence,
    InstanceEvidence,
    ServiceEvidence,
)
from tidegate.verdict.permission import Permission, permission
from tidegate.verdict.steps import Place

EVIDENCE_AGE_S = 5.0
"""How old the last observation of an instance may be."""

ATTACH_S = 5.0
"""How long after its creation an instance may be without observation."""

TOLERANCE_SHARE = 0.25
"""No tolerance takes more than this share of the window, however short the window is."""

MAX_CALLERS = 1_000
"""Lines of callers in one verdict: whoever can open connections could otherwise make it any
size."""


_ANYWHERE = Place()


class Answer(enum.StrEnum):
    READY = "READY"
    NOT_READY = "NOT READY"
    UNKNOWN = "UNKNOWN"


class Effect(enum.StrEnum):
    """What going strict means for a flow."""

    BLOCKS = "blocks"
    MESH = "mesh"
    UNPROTECTED = "unprotected"
    """Does not pass the sidecar, in neither mode."""
    PROBE = "probe"
    REFUSED_PROBE = "refused-probe"
    """A probe on the service's own, redirected port: it does not block, and strict mode refuses it."""
    REFUSED_ANYWAY = "refused-anyway"
    """Comes to a filter chain that takes nothing but mTLS, in both modes."""
    EMPTY = "empty"


_NOTES: dict[Effect, str] = {
    Effect.BLOCKS: "blocks",
    Effect.MESH: "",
    Effect.UNPROTECTED: "unprotected: passes the sidecar by",
    Effect.PROBE: "probe from the node",
    Effect.REFUSED_PROBE: "probe from the node; strict refuses it, unless tidegate.io/direct-probes lets it through",
    Effect.REFUSED_ANYWAY: "refused in both modes",
    Effect.EMPTY: "no payload",
}


_DENIED_BY: dict[Permission, str] = {
    Permission.MISSING: "would be denied: no intention allows it",
    Permission.DENIED: "would be denied by an intention",
}


class ReasonKind(enum.StrEnum):
    """In the order in which reasons are shown."""

    BLOCKING_FLOW = "blocking-flow"
    UNKNOWN_FLOW = "unknown-flow"
    OPEN_PLAINTEXT = "open-plaintext"
    NO_INSTANCE = "no-instance"
    NOT_MESHED = "not-meshed"
    EVIDENCE_MISSING = "evidence-missing"
    EVIDENCE_LOST = "evidence-lost"
    COVERAGE_GAP = "coverage-gap"
    WITNESS_DISAGREES = "witness-disagrees"
    CALLER_UNKNOWN = "caller-unknown"
    DENIED = "denied"
    """mTLS that intentions refuse, in both modes: it says nothing of strict mode, and only a guard tells it."""


_SHOWN_FIRST = tuple(ReasonKind)
_REFUSES = frozenset({ReasonKind.BLOCKING_FLOW, ReasonKind.UNKNOWN_FLOW, ReasonKind.OPEN_PLAINTEXT})
"""Kinds that make NOT READY; all others make UNKNOWN."""

_HOW: dict[FlowClass, str] = {
    FlowClass.TLS: "with its own TLS",
    FlowClass.MESH: "with TLS that bears the mesh's name and does not come from a sidecar",
    FlowClass.PLAINTEXT: "in plaintext",
    FlowClass.SERVER_FIRST: "in plaintext in which the server speaks first",
    FlowClass.STARTTLS: "in plaintext that turns into TLS",
    FlowClass.UNKNOWN: "over connections whose beginning was not seen",
}
_PROTOCOLS: dict[Hint, str] = {
    Hint.HTTP1: "HTTP/1",
    Hint.H2C: "HTTP/2",
    Hint.POSTGRES: "PostgreSQL",
    Hint.MYSQL: "MySQL",
    Hint.REDIS: "Redis",
    Hint.KAFKA: "Kafka",
    Hint.SSH: "SSH",
    Hint.AMQP: "AMQP",
    Hint.MONGODB: "MongoDB",
    Hint.CASSANDRA: "Cassandra",
}


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that stands between a service and READY."""

    kind: ReasonKind
    message: str
    next_step: str = ""
    caller: Caller | None = None
    flow_class: FlowClass | None = msgspec.field(name="class", default=None)
    port: int | None = None
    connections: int = 0
    last_seen: float | None = None
    hints: tuple[Hint, ...] = ()
    """Protocols that were recognised on these connections, in the order of Hint."""


class CallerFlow(msgspec.Struct, frozen=True, kw_only=True):
    """One caller, one class, one port, summed over instances and address families."""

    caller: Caller
    flow_class: FlowClass = msgspec.field(name="class")
    port: int
    connections: int
    bytes_to_server: int
    bytes_to_client: int
    first_seen: float
    last_seen: float
    effect: Effect
    unprotected: bool
    hints: tuple[Hint, ...]
    """Protocols that were recognised, in the order of Hint."""
    permission: Permission
    """What intentions say of the caller; on connections that are not mesh mTLS nobody enforces it."""
    note: str


class InstanceCoverage(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    node: str
    complete: bool
    since: float | None
    """Since when it has been observed without a gap; None: it is not observed."""
    share: float
    """Share of the window in which nothing that should have been observed was missed, 0 to 1."""
    gaps: tuple[Interval, ...] = ()


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    complete: bool
    since: float | None
    share: float
    instances: tuple[InstanceCoverage, ...] = ()


class InstanceWitness(msgspec.Struct, frozen=True, kw_only=True):
    """The sidecar's counts and the ledger's bounds for them, side by side."""

    workload: str
    node: str
    agrees: bool | None
    detail: str
    sidecar: ChainTotals
    least: ChainTotals
    most: ChainTotals
    permissive_active: int
    permissive_open: int
    """Plaintext connections that the sidecar had when it was last asked."""
    since: float


_EXIT_CODES = {Answer.READY: 0, Answer.NOT_READY: 1, Answer.UNKNOWN: 2}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The judgement of one service over one window."""

    service: str
    verdict: Answer
    mode: MutualTLSMode
    window_s: float
    at: float
    """The moment it holds for: the end of the window."""
    reasons: tuple[Reason, ...]
    callers: tuple[CallerFlow, ...]
    callers_omitted: int
    """How many more there are than MAX_CALLERS; those that block come first and are the last to
    be omitted."""
    coverage: Coverage
    witness: tuple[InstanceWitness, ...]

    @property
    def exit_code(self) -> int:
        """0 READY, 1 NOT READY, 2 UNKNOWN."""
        return _EXIT_CODES[self.verdict]

    def flows(self, effect: Effect) -> tuple[CallerFlow, ...]:
        """The callers whose flows have this effect."""
        return tuple(flow for flow in self.callers if flow.effect is effect)

    def to_json(self) -> bytes:
        """The verdict as one JSON object; `msgspec.json.decode(..., type=Verdict)` reads it
        back."""
        return msgspec.json.encode(self)


def judge(
    intent: ServiceIntent,
    evidence: ServiceEvidence,
    *,
    known: Sequence[Instance],
    window_s: float,
    now: float,
    place: Place = _ANYWHERE,
    evidence_age_s: float = EVIDENCE_AGE_S,
    attach_s: float = ATTACH_S,
) -> Verdict:
    """Judges one service over [now - window_s, now].

    `known` is the catalog: every instance of every service, the departed ones within the window
    included.
    """
    window = Interval(now - window_s, now)
    flows = _caller_flows((*evidence.instances, *evidence.departed), window, known, intent)
    limit = window_s * TOLERANCE_SHARE
    covered = tuple(
        _instance_coverage(each, window, min(evidence_age_s, limit), min(attach_s, limit))
        for each in (*evidence.instances, *evidence.departed)
    )
    everywhere = intervals.union(
        interval for each in (*evidence.instances, *evidence.departed) for interval in each.coverage
    )
    observed_since = everywhere[0].start if everywhere else None
    young = observed_since is None or observed_since > window.start
    reasons = [
        *_flow_reasons(flows[:MAX_CALLERS], intent, place, window),
        *_open_plaintext(evidence, flows, intent, window),
        *_presence(evidence, flows, intent, place),
        *_missing(evidence, place),
        *_lost(evidence, window_s),
        *_gap_reasons(covered, evidence, observed_since if young else None, window),
        *_witness_reasons(evidence, window),
        *_unknown_sources(intent, known, place),
    ]
    reasons.sort(key=lambda reason: (_SHOWN_FIRST.index(reason.kind), -(reason.last_seen or 0.0)))
    return Verdict(
        service=evidence.service,
        verdict=_answer(reasons),
        mode=intent.mode,
        window_s=window_s,
        at=now,
        reasons=tuple(reasons),
        callers=flows[:MAX_CALLERS],
        callers_omitted=max(len(flows) - MAX_CALLERS, 0),
        coverage=_coverage(covered, evidence, observed_since, window),
        witness=tuple(_witness(each) for each in evidence.instances),
    )


def _answer(reasons: Sequence[Reason]) -> Answer:
    if any(reason.kind in _REFUSES for reason in reasons):
        return Answer.NOT_READY
    return Answer.UNKNOWN if reasons else Answer.READY


# Flows


def effect_of(edge: EdgeEvidence, at: InstanceEvidence) -> Effect:
    """What strict mode means for a flow that came to an instance: a decision list, first match
    wins.

    The mTLS chain of the sidecar takes every destination port but the service's own (consul-k8s,
    permissive chain: match on LocalServicePort alone), so only flows to that port depend on the
    mode. Sidecars dial each other's own port: what comes to the service's port with the mesh's
    server name is somebody's own TLS, which the permissive chain hands to the application.

    In meshes whose sidecars dial the service's own port, strict mode holds on every port alike.
    """
    if edge.flow_class is FlowClass.EMPTY:
        return Effect.EMPTY
    from_node = canonical(edge.peer) in {canonical(own) for own in at.node_addresses}
    to_sidecar_itself = edge.port == at.instance.inbound_port
    excluded = any(first <= edge.port <= last for first, last in at.excluded_inbound_ports)
    excluded = excluded or is_within(edge.peer, at.excluded_sources)
    bypasses = not to_sidecar_itself and (excluded or not at.inbound_redirected)
    if from_node:
        on_service_port = at.instance.port in (0, edge.port) and not to_sidecar_itself
        return Effect.REFUSED_PROBE if on_service_port and not bypasses else Effect.PROBE
    if bypasses:
        return Effect.UNPROTECTED
    if at.mesh_dials_service_port:
        return Effect.BLOCKS if edge.flow_class.blocks_strict else Effect.MESH
    if to_sidecar_itself:
        return Effect.REFUSED_ANYWAY if edge.flow_class.blocks_strict else Effect.MESH
    if at.instance.port not in (0, edge.port):
        return Effect.REFUSED_ANYWAY
    return Effect.BLOCKS


class _Seen(msgspec.Struct):
    """One edge with its caller's name and its effect."""

    edge: EdgeEvidence
    instance: Instance | None
    effect: Effect

    @property
    def group(self) -> tuple[str, ...]:
        """What is one line for a person: a caller (its pods' addresses together), a class, a
        port."""
        who = (
            ("workload", self.instance.namespace, self.instance.name)
            if self.instance
            else ("address", canonical(self.edge.peer))
        )
        return (*who, self.edge.flow_class, str(self.edge.port), self.effect)


def _came_to_nothing(edge: EdgeEvidence) -> bool:
    """Whether all that was seen on the edge turned out to be of another class, and is counted there."""
    return edge.connections <= 0 and edge.bytes_to_server <= 0 and edge.bytes_to_client <= 0


def _caller_flows(
    instances: Iterable[InstanceEvidence],
    window: Interval,
    known: Sequence[Instance],
    intent: ServiceIntent,
) -> tuple[CallerFlow, ...]:
    index = names.by_address(known)
    groups: dict[tuple[str, ...], list[_Seen]] = {}
    for at in instances:
        for edge in at.edges:
            if edge.last_seen >= window.start and not _came_to_nothing(edge):
                instance = names.name_at(index, edge.peer, edge.last_seen)
                seen = _Seen(edge, instance, effect_of(edge, at))
                groups.setdefault(seen.group, []).append(seen)
    flows = [_caller_flow(group, intent) for group in groups.values()]
    order = tuple(Effect)
    return tuple(
        sorted(flows, key=lambda flow: (order.index(flow.effect), -flow.last_seen, flow.port))
    )


def _caller_flow(group: Sequence[_Seen], intent: ServiceIntent) -> CallerFlow:
    latest = max(group, key=lambda seen: (seen.edge.last_seen, seen.edge.peer))
    edges = [seen.edge for seen in group]
    says = permission(intent, latest.instance.service if latest.instance else "")
    is_let_in = latest.effect is Effect.BLOCKS and intent.mode is MutualTLSMode.PERMISSIVE
    denied = f", {_DENIED_BY[says]}" if is_let_in and says.would_be_denied else ""
    return CallerFlow(
        caller=_caller(latest, {canonical(edge.peer) for edge in edges}),
        flow_class=latest.edge.flow_class,
        port=latest.edge.port,
        connections=max(sum(edge.connections for edge in edges), 0),
        bytes_to_server=sum(edge.bytes_to_server for edge in edges),
        bytes_to_client=sum(edge.bytes_to_client for edge in edges),
        first_seen=min(edge.first_seen for edge in edges),
        last_seen=latest.edge.last_seen,
        effect=latest.effect,
        unprotected=latest.effect is Effect.UNPROTECTED,
        hints=tuple(hint for hint in Hint if any(hint in edge.hints for edge in edges)),
        permission=says,
        note=f"{_NOTES[latest.effect]}{denied}",
    )


def _caller(latest: _Seen, addresses: set[str]) -> Caller:
    address = canonical(latest.edge.peer)
    kind = CallerKind.PROBE if latest.effect is Effect.PROBE else None
    if latest.instance is None:
        return Caller(
            address=address, kind=kind or CallerKind.OUTSIDE, addresses=tuple(sorted(addresses))
        )
    return Caller(
        address=address,
        workload=latest.instance.name,
        service=latest.instance.service,
        namespace=latest.instance.namespace,
        node=latest.instance.node,
        meshed=latest.instance.meshed,
        kind=kind or CallerKind.WORKLOAD,
        addresses=tuple(sorted(addresses)),
    )


# Reasons: what was seen


def _flow_reasons(
    flows: Iterable[CallerFlow], intent: ServiceIntent, place: Place, window: Interval
) -> Iterator[Reason]:
    blocking = [flow for flow in flows if flow.effect is Effect.BLOCKS]
    to_allow = {
        flow.caller.service
        for flow in blocking
        if flow.caller.service and not intent.allows(flow.caller.service)
    }
    for flow in blocking:
        who = (
            f"{flow.caller.workload} ({flow.caller.address})"
            if flow.caller.workload
            else f"{flow.caller.address}, which the catalog does not know,"
        )
        yield Reason(
            kind=ReasonKind.UNKNOWN_FLOW
            if flow.flow_class is FlowClass.UNKNOWN
            else ReasonKind.BLOCKING_FLOW,
            message=(
                f"{who} calls {intent.service}:{flow.port} {_how(flow)}: {_amount(flow)}, last "
                f"seen {ago(window.end - flow.last_seen)}"
            ),
            next_step=steps.for_flow(
                place,
                intent,
                flow.caller,
                flow.flow_class,
                flow.port,
                to_allow=to_allow,
                window_s=window.end - window.start,
            ),
            caller=flow.caller,
            flow_class=flow.flow_class,
            port=flow.port,
            connections=flow.connections,
            last_seen=flow.last_seen,
            hints=flow.hints,
        )


def _how(flow: CallerFlow) -> str:
    spoken = ", ".join(_PROTOCOLS[hint] for hint in flow.hints)
    return f"{_HOW[flow.flow_class]} ({spoken})" if spoken else _HOW[flow.flow_class]


def _amount(flow: CallerFlow) -> str:
    match flow.connections:
        case 0:
            return "on connections opened before"
        case 1:
            return "1 connection"
        case several:
            return f"{several} connections"


def _open_plaintext(
    evidence: ServiceEvidence,
    flows: Iterable[CallerFlow],
    intent: ServiceIntent,
    window: Interval,
) -> Iterator[Reason]:
    if intent.mode is not MutualTLSMode.PERMISSIVE:
        return
    if any(flow.effect is Effect.BLOCKS for flow in flows):
        return
    for each in evidence.instances:
        active = each.witness.permissive_active
        if active:
            yield Reason(
                kind=ReasonKind.OPEN_PLAINTEXT,
                message=(
                    f"{active} plaintext connection{'s' if active > 1 else ''} to {each.instance.name} still open, "
                    f"though not used for {span(window.end - window.start)}"
                ),
                next_step=steps.for_open_plaintext(each.instance.name),
                port=each.instance.port or None,
                connections=active,
            )


# Reasons: what is missing


def _presence(
    evidence: ServiceEvidence, flows: Iterable[CallerFlow], intent: ServiceIntent, place: Place
) -> Iterator[Reason]:
    outside_mesh = [
        flow.caller.workload or flow.caller.address
        for flow in flows
        if flow.effect is Effect.UNPROTECTED and flow.flow_class.blocks_strict
    ]
    if not evidence.instances and not evidence.nodes_missing:
        yield Reason(
            kind=ReasonKind.NO_INSTANCE,
            message=f"no instance of {evidence.service} is known",
            next_step=steps.for_no_instance(place, evidence.service),
        )
    for each in evidence.instances:
        if not (each.instance.meshed and each.inbound_redirected):
            own = Caller(
                address=next(iter(each.instance.addresses), ""),
                workload=each.instance.name,
                service=each.instance.service,
                namespace=each.instance.namespace,
                node=each.instance.node,
                meshed=each.instance.meshed,
                kind=CallerKind.WORKLOAD,
            )
            yield Reason(
                kind=ReasonKind.NOT_MESHED,
                message=f"{each.instance.name} has no sidecar in its path: strict mode would not protect it",
                next_step=steps.for_unmeshed_instance(place, intent, own, outside_mesh),
            )


def _missing(evidence: ServiceEvidence, place: Place) -> Iterator[Reason]:
    if evidence.intent_problem:
        yield Reason(
            kind=ReasonKind.EVIDENCE_MISSING,
            message=f"mode, intentions and callers may have changed: {evidence.intent_problem}",
            next_step=steps.for_intent_server(),
        )
    for node in evidence.nodes_missing:
        yield Reason(
            kind=ReasonKind.EVIDENCE_MISSING,
            message=f"the evidence of node {node.node} could not be read: {node.reason}",
            next_step=steps.for_missing_node(node.node),
        )
    for each in evidence.instances:
        if each.sidecar_problem:
            yield Reason(
                kind=ReasonKind.EVIDENCE_MISSING,
                message=f"{each.instance.name}: {each.sidecar_problem}",
                next_step=steps.for_sidecar(place, each.instance.name),
            )
        elif _has_witness(each) and each.witness.agrees is None:
            yield Reason(
                kind=ReasonKind.EVIDENCE_MISSING,
                message=f"no second witness for {each.instance.name}: {each.witness.detail}",
                next_step=steps.for_sidecar(place, each.instance.name),
            )


def _has_witness(each: InstanceEvidence) -> bool:
    return each.instance.meshed and each.inbound_redirected and each.sidecar is Sidecar.TIDEGATE


def _lost(evidence: ServiceEvidence, window_s: float) -> Iterator[Reason]:
    for each in (*evidence.instances, *evidence.departed):
        lost = {name: count for name, count in sorted(each.losses.items()) if count}
        repaired = lost.pop(REDIRECTION_REPAIRED, 0)
        if repaired:
            times = "once" if repaired == 1 else f"{repaired} times"
            yield Reason(
                kind=ReasonKind.EVIDENCE_LOST,
                message=f"another program changed the redirection of {each.instance.name} {times}; it was put"
                " back, and what came meanwhile may have passed the sidecar by",
                next_step=steps.for_loss(window_s),
            )
        if lost:
            what = ", ".join(f"{name} {count}" for name, count in lost.items())
            yield Reason(
                kind=ReasonKind.EVIDENCE_LOST,
                message=f"the observation of {each.instance.name} lost something: {what}",
                next_step=steps.for_loss(window_s),
            )


def _witness_reasons(evidence: ServiceEvidence, window: Interval) -> Iterator[Reason]:
    for each in evidence.instances:
        witness = each.witness
        disagreed_in_window = witness.disagreed_at and witness.disagreed_at >= window.start
        if witness.agrees is False or disagreed_in_window:
            between = f"sidecar and ledger of {each.instance.name}"
            yield Reason(
                kind=ReasonKind.WITNESS_DISAGREES,
                message=f"{between} disagree: {witness.detail}"
                if witness.agrees is False
                else f"{between} disagreed {ago(window.end - witness.disagreed_at)}",
                next_step=steps.for_disagreement(each.instance.name),
                last_seen=witness.disagreed_at or None,
            )


def _unknown_sources(
    intent: ServiceIntent, known: Iterable[Instance], place: Place
) -> Iterator[Reason]:
    services = {instance.service for instance in known}
    for rule in intent.intentions:
        if rule.allow and rule.source != "*" and rule.source not in services:
            yield Reason(
                kind=ReasonKind.CALLER_UNKNOWN,
                message=(
                    f"an intention lets {rule.source} call {intent.service}, but the catalog knows no {rule.source}"
                ),
                next_step=steps.for_unknown_source(place, intent.service, rule.source),
                caller=Caller(address="", service=rule.source),
            )


# Coverage


def _instance_coverage(
    each: InstanceEvidence, window: Interval, age_s: float, attach_s: float
) -> InstanceCoverage:
    """What of an instance's life in the window was not observed.

    A living instance must be covered from its creation to now; a departed one between its first and
    last observation.
    """
    covered = intervals.union(each.coverage)
    if each.instance.seen_until:
        start = max(window.start, covered[0].start) if covered else window.end
        end = min(window.end, covered[-1].end) if covered else window.end
    else:
        born = each.created_at + attach_s if each.created_at else 0.0
        start, end = max(window.start, born), window.end - age_s
    missed = intervals.gaps(covered, start, end)
    return InstanceCoverage(
        workload=each.instance.name,
        node=each.instance.node,
        complete=not missed,
        since=covered[-1].start if covered else None,
        share=1.0 - intervals.total(missed) / (window.end - window.start),
        gaps=missed,
    )


def _gap_reasons(
    covered: Sequence[InstanceCoverage],
    evidence: ServiceEvidence,
    young_since: float | None,
    window: Interval,
) -> Iterator[Reason]:
    """One reason for each instance with gaps, and one where the service itself is younger than the
    window.

    `young_since` is when observation of the service began, None where that was before the window.
    """
    window_s = window.end - window.start
    said_young = False
    for each in covered:
        if each.complete:
            continue
        last = each.gaps[-1]
        at_start = each.gaps[0].start <= window.start
        said_young = said_young or at_start
        ongoing = each.since is None or last.end > each.since
        observed = 0.0 if ongoing else window.end - last.end
        missed = intervals.total(each.gaps)
        yield Reason(
            kind=ReasonKind.COVERAGE_GAP,
            message=(
                f"{each.workload} is not observed, for {span(window.end - last.start)} now"
                if ongoing
                else f"{each.workload} observed for {_part(observed, window_s)}"
                if at_start and len(each.gaps) == 1
                else f"{each.workload} was not observed for {span(missed)}, until {span(observed)} ago"
            ),
            next_step=steps.for_missing_node(each.node)
            if ongoing
            else steps.for_coverage(window_s - observed),
        )
    if young_since is not None and not said_young and evidence.instances:
        observed = window.end - young_since
        yield Reason(
            kind=ReasonKind.COVERAGE_GAP,
            message=f"{evidence.service} observed for {_part(observed, window_s)}",
            next_step=steps.for_coverage(window_s - observed),
        )


def _part(observed_s: float, window_s: float) -> str:
    """So much of a window, in whole seconds: what is missing is never rounded away."""
    return f"{span(math.floor(observed_s))} of {span(window_s)}"


def _coverage(
    covered: Sequence[InstanceCoverage],
    evidence: ServiceEvidence,
    observed_since: float | None,
    window: Interval,
) -> Coverage:
    before = Interval(window.start, window.end if observed_since is None else observed_since)
    missed = intervals.clip(
        (before, *(gap for each in covered for gap in each.gaps)), window.start, window.end
    )
    lost = any(any(each.losses.values()) for each in (*evidence.instances, *evidence.departed))
    length = intervals.total(missed)
    return Coverage(
        complete=not length and not lost and not evidence.nodes_missing,
        since=missed[-1].end if length else observed_since,
        share=1.0 - length / (window.end - window.start),
        instances=tuple(covered),
    )


def _witness(each: InstanceEvidence) -> InstanceWitness:
    return InstanceWitness(
        workload=each.instance.name,
        node=each.instance.node,
        agrees=each.witness.agrees,
        detail=each.witness.detail,
        sidecar=each.witness.sidecar,
        least=each.witness.least,
        most=each.witness.most,
        permissive_active=each.witness.permissive_active,
        permissive_open=each.witness.permissive_open,
        since=each.witness.since,
    )
