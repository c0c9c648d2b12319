"""This node's evidence: the classifier at every workload's interface, the ledger, and the sidecars as witnesses.

Each round reads Envoy's counters first and the kernel's edges after; the witness depends on that order. The ledger
belongs to one thread at a time: the daemon calls everything here from its one worker.
"""

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import assert_never

from tidegate.enforce.sidecar.envoy import Phase
from tidegate.errors import TidegateError
from tidegate.intent.policy import Policy
from tidegate.kernel import links, netns
from tidegate.kernel.errors import KernelError
from tidegate.model import (
    DEFAULT_INBOUND_PORT,
    Direction,
    Edge,
    EdgeCount,
    EdgeKey,
    Instance,
    Interval,
    Sidecar,
    Workload,
)
from tidegate.node.config import AgentConfig, Profile
from tidegate.node.flows import NamedEdge, named
from tidegate.node.keeper import Keeper
from tidegate.node.log import Log
from tidegate.node.mesh import NodeEvidence, NodeFlows
from tidegate.node.metrics import Observed, Traffic
from tidegate.node.policies import policy_for
from tidegate.node.wanted import service_ports
from tidegate.observe.classifier import (
    ISTIO,
    KUMA,
    Attachment,
    Classifier,
    MeshProfile,
    Side,
    consul_profile,
)
from tidegate.observe.labels import Labels
from tidegate.observe.ledger import Ledger
from tidegate.observe.witness import (
    ChainCounts,
    LedgerCounts,
    SidecarCounts,
    WitnessState,
    advance,
    count_chains,
)
from tidegate.verdict import intervals, names
from tidegate.verdict.evidence import (
    REDIRECTION_REPAIRED,
    EdgeEvidence,
    InstanceEvidence,
    WitnessReading,
)

GIVE_BACK_S = 5.0
"""How often counters are given back."""
MACHINE_NETNS = "/proc/1/ns/net"
"""Where pods' interfaces have their other ends if the agent is in a pod itself."""

_NO_WITNESS = WitnessReading(detail="its sidecar is its own, and is not asked")

log = Log("observation")


class Observation:
    """Everything that this node sees."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._classifier = Classifier.open(config.bpffs)
        self._classifier.set_profile(_profile(config))
        self._ledger = Ledger.open(config.state_dir / "ledger.sqlite")
        is_known = self._ledger.generation == self._classifier.generation
        self._counted_since = 0.0 if is_known else time.time()
        """Before, another ledger took what the kernel counted, and may have had counters given back."""
        self._attachments: dict[int, Attachment] = {
            each.workload_key: each for each in self._classifier.attachments()
        }
        self._held = set(self._attachments)
        """Workloads of which the kernel has something, also when their interface is gone."""
        self._attached_for: dict[int, Workload] = {}
        """The description by which each workload was attached."""
        self._witnesses: dict[int, WitnessState] = {}
        self._problems: dict[int, str] = {}
        self._defects: dict[tuple[int, str], str] = {}
        """By workload and by what could not be done for it."""
        self._counted: dict[int, LedgerCounts] = {}
        """Connections to the sidecars' filter chains since this agent runs, by the kernel."""
        self._to_forget: set[int] = set()
        """Workloads that are gone and whose counters the kernel still has."""
        self._given_back_at = 0.0
        self._collected_at = 0.0
        """When the latest round of reading began."""
        self._lost: dict[str, int] = {}
        """What was lost since the kernel's maps were made, as of that round."""
        self._notes: tuple[str, ...] = ()
        """What the classifier said in the latest round."""
        self.labels = Labels()

    def close(self) -> None:
        """Ends this process's part; programs and maps stay and go on counting."""
        self._classifier.close()
        self._ledger.close()

    def observed_since(self, workload: Workload) -> float | None:
        """Since when a workload's interface has been observed without a break."""
        attachment = self._attachments.get(workload.key)
        return attachment.attached_at if attachment else None

    def problem(self, workload: Workload) -> str:
        """Why a workload is not observed; empty when it is."""
        return "; ".join(self._problems_of(workload.key))

    def _problems_of(self, workload_key: int) -> tuple[str, ...]:
        defects = [text for (key, _), text in self._defects.items() if key == workload_key]
        known = self._problems.get(workload_key)
        return (*((known,) if known else ()), *defects)

    def problems(self) -> tuple[str, ...]:
        """What costs evidence on this node."""
        return (*self._problems.values(), *self._defects.values(), *self._ledger.problems())

    def look(self, living: Iterable[Workload]) -> None:
        """Asks the kernel what is being observed, logs what is new of how, and forgets problems of workloads
        that are gone; the beginning of each round."""
        found = self._classifier.attachments()
        self._attachments = {each.workload_key: each for each in found}
        notes = self._classifier.notes
        for note in notes:
            if note not in self._notes:
                log.warning(note)
        self._notes = notes
        keys = {workload.key for workload in living}
        self._problems = {key: text for key, text in self._problems.items() if key in keys}
        self._defects = {
            about: text
            for about, text in self._defects.items()
            if about[0] in keys | self._attachments.keys()
        }

    def unobserved(self, living: Iterable[Workload]) -> list[Workload]:
        """What is to be attached, or by another description than it was.

        The youngest come first, of which the least has passed unseen, and last what could not be attached before.
        """
        wanted = [
            one
            for one in living
            if one.key not in self._attachments or self._attached_for.get(one.key) != one
        ]
        return sorted(wanted, key=lambda one: (bool(self.problem(one)), -one.created_at))

    def attach(self, workload: Workload) -> None:
        """Sees to it that a workload's interface is observed; a failure is kept as its problem."""
        self._to_forget.discard(workload.key)
        with self._defects_told(workload.key, workload.name, "observed"):
            self._keep_attached(workload)

    @contextlib.contextmanager
    def _defects_told(self, workload_key: int, name: str, what: str) -> Iterator[None]:
        """A defect in what is done for one workload is that workload's problem: the others' evidence goes on."""
        about = workload_key, what
        try:
            yield
        except Exception as error:
            problem = f"{name} is not {what}, by a defect of the agent; see its log ({error!r})"
            if self._defects.get(about) != problem:
                log.exception(problem, error)
            self._defects[about] = problem
        else:
            self._defects.pop(about, None)

    def _keep_attached(self, workload: Workload) -> None:
        self._held.add(workload.key)
        try:
            attachment = self._attach(workload)
        except (KernelError, TidegateError, OSError) as error:
            problem = f"{workload.name} is not observed: {error}"
            if self._problems.get(workload.key) != problem:
                log.warning(problem, workload=workload.name)
            self._problems[workload.key] = problem
            self._attachments.pop(workload.key, None)
            return
        if self._attachments.get(workload.key) != attachment:
            log.info("observing", workload=workload.name, since=attachment.attached_at)
        self._problems.pop(workload.key, None)
        self._attachments[workload.key] = attachment
        self._attached_for[workload.key] = workload

    def _attach(self, workload: Workload) -> Attachment:
        ports = tuple(port for _, port in service_ports(workload) if port)
        for place in (netns.CURRENT, MACHINE_NETNS):
            on_host = self._other_end(place, workload)
            if on_host is not None:
                return netns.run_in(place, self._attach_at, workload.key, on_host, Side.HOST, ports)
        inside = netns.run_in(workload.netns, socket.if_nametoindex, workload.interface)
        return netns.run_in(
            workload.netns, self._attach_at, workload.key, inside, Side.INSIDE, ports
        )

    def _attach_at(
        self, workload_key: int, ifindex: int, side: Side, ports: tuple[int, ...]
    ) -> Attachment:
        """At this interface alone: at both ends of one each packet would count twice."""
        self._classifier.detach_others(workload_key, ifindex)
        return self._classifier.attach(workload_key, ifindex, side, ports)

    def _other_end(self, place: str, workload: Workload) -> int | None:
        """Index, in that namespace, of the other end of a workload's interface; None when it is not there."""
        try:
            return netns.run_in(place, links.host_ifindex, workload.netns, workload.interface)
        except KernelError:
            if place == netns.CURRENT:
                raise
            # The machine's namespace is not one that every agent may see.
            return None

    def detach(self, workload_key: int) -> None:
        """The workload is gone: its last counts go to the ledger, then it leaves the kernel."""
        name = f"workload {workload_key:016x}, which is gone,"
        with self._defects_told(workload_key, name, "let go"):
            self._let_go(workload_key)

    def _let_go(self, workload_key: int) -> None:
        self._classifier.detach(workload_key)
        self._held.discard(workload_key)
        self._to_forget.add(workload_key)
        self._attachments.pop(workload_key, None)
        self._attached_for.pop(workload_key, None)
        self._witnesses.pop(workload_key, None)
        self._counted.pop(workload_key, None)
        self._problems.pop(workload_key, None)

    def unclaimed(self, living: Iterable[Workload]) -> tuple[int, ...]:
        """Keys of what is held for workloads that do not live any more, observed until now or not."""
        return tuple(self._held - {workload.key for workload in living})

    def collect(self, now: float, keepers: Iterable[Keeper]) -> None:
        """One round: sidecars' counters, then kernel edges, into ledger and witnesses."""
        self._collected_at = now
        counted: list[tuple[Keeper, SidecarCounts | None]] = []
        for keeper in keepers:
            key, name = keeper.workload.key, keeper.workload.name
            attachment = self._attachments.get(key)
            if attachment is not None:
                since = max(attachment.attached_at, self._counted_since)
                self._ledger.extend(keeper.workload, since, now)
            counts = None
            with self._defects_told(key, name, "asked for its sidecar's counters"):
                counts = self._sidecar_counts(keeper)
            counted.append((keeper, counts))
        moved: dict[int, list[Edge]] = {}
        for edge_key, connections in self._read(now):
            moved.setdefault(edge_key.workload, []).append(_moved(edge_key, connections))
        generation = self._classifier.generation
        for keeper, counts in counted:
            key, name = keeper.workload.key, keeper.workload.name
            with self._defects_told(key, name, "compared with its sidecar"):
                self._compare(keeper, now, counts, moved.get(key, []), generation)
        self._give_back(now)

    def _read(self, now: float) -> list[tuple[EdgeKey, int]]:
        """What the kernel counted since the last round, written to the ledger; returns how many connections came
        to edges or left them."""
        counters = self._classifier.changed_edges()
        self._lost = self._classifier.losses().lost_by_name()
        return self._ledger.record(now, self._classifier.generation, counters, self._lost)

    def _give_back(self, now: float) -> None:
        """Counters that are not needed go back to the kernel, as soon as all they said is stored."""
        if not self._ledger.is_stored:
            return
        for workload_key in self._to_forget:
            self._classifier.forget_edges(workload_key)
        self._to_forget.clear()
        if not 0 <= now - self._given_back_at < GIVE_BACK_S:
            self._given_back_at = now
            slots = self._ledger.dispensable(now, self._classifier.room)
            if slots:
                self._classifier.forget(slots)

    def _sidecar_counts(self, keeper: Keeper) -> SidecarCounts | None:
        state = keeper.sidecar
        if state.phase is not Phase.RUNNING or not keeper.in_mesh:
            return None
        try:
            stats = keeper.admin.sidecar_stats()
        except TidegateError:
            # It runs and does not answer: the next round's state says so.
            return None
        return SidecarCounts(
            permissive_total=stats.permissive_connections,
            public_total=stats.public_connections,
            permissive_active=stats.permissive_active,
            public_active=stats.public_active,
            epoch=f"{state.pid} {sorted(keeper.plaintext_ports)}",
        )

    def _compare(
        self,
        keeper: Keeper,
        now: float,
        counts: SidecarCounts | None,
        moved: list[Edge],
        generation: str,
    ) -> None:
        """One round of both witnesses. What fails half-way is forgotten: the comparison begins anew."""
        key = keeper.workload.key
        state = self._witnesses.pop(key, WitnessState())
        chains = _added(self._counted.pop(key, None), self._count(keeper, moved, generation))
        self._counted[key] = chains
        self._witnesses[key] = state if counts is None else advance(state, now, counts, chains)

    def _count(self, keeper: Keeper, moved: list[Edge], generation: str) -> LedgerCounts:
        """Connections that came to the workload's filter chains or left them, by the policy in force."""
        policy = keeper.policy
        return count_chains(
            moved,
            permissive_ports=keeper.plaintext_ports,
            excluded_ports=_ranges(policy) if policy else (),
            excluded_sources=policy.inbound_sources_left_alone() if policy else (),
            inbound_port=policy.inbound.port if policy else 0,
            generation=generation,
        )

    def evidence(
        self, service: str, since: float, until: float, keepers: Mapping[str, Keeper]
    ) -> NodeEvidence:
        """What this node knows of its instances of a service in [since, until]."""
        own = {keeper.workload.key: keeper for keeper in keepers.values()}
        losses = self._ledger.losses(since, until)
        living = [
            self._living(keeper, since, until, losses)
            for keeper in own.values()
            if service in names.services_of(keeper.workload)
        ]
        departed = [
            self._departed(workload, since, until, losses)
            for workload in self._ledger.workloads(service)
            if workload.key not in own
        ]
        return NodeEvidence(
            node=self._config.node, instances=tuple(living), departed=tuple(departed)
        )

    def _living(
        self, keeper: Keeper, since: float, until: float, losses: dict[str, int]
    ) -> InstanceEvidence:
        workload = keeper.workload
        policy = keeper.policy
        state = self._witnesses.get(workload.key, WitnessState())
        return InstanceEvidence(
            mesh_dials_service_port=self._config.profile is not Profile.CONSUL,
            instance=published(keeper, self._config),
            created_at=workload.created_at,
            inbound_redirected=keeper.in_mesh and policy is not None and policy.inbound.enabled,
            excluded_inbound_ports=_ranges(policy) if policy else (),
            excluded_sources=policy.inbound_sources_left_alone() if policy else (),
            coverage=self._ledger.coverage(workload.key),
            losses=losses | _named(REDIRECTION_REPAIRED, keeper.redirection.repairs(since)),
            edges=self._edges(workload, since, until),
            witness=_NO_WITNESS if keeper.has_own_sidecar else state.reading,
            node_addresses=self._config.node_addresses,
            sidecar=workload.sidecar,
            sidecar_problem="; ".join(keeper.problems),
        )

    def _departed(
        self, workload: Workload, since: float, until: float, losses: dict[str, int]
    ) -> InstanceEvidence:
        coverage = self._ledger.coverage(workload.key)
        try:
            policy = policy_for(workload, self._config.redirect.policy)
        except TidegateError:
            policy = self._config.redirect.policy
        return InstanceEvidence(
            mesh_dials_service_port=self._config.profile is not Profile.CONSUL,
            instance=Instance(
                id=workload.id,
                name=workload.name,
                service=workload.service,
                node=workload.node,
                namespace=workload.namespace,
                addresses=workload.addresses,
                port=workload.port,
                more_ports=workload.more_ports,
                inbound_port=policy.inbound.port,
                seen_from=workload.created_at,
                seen_until=coverage[-1].end if coverage else workload.created_at,
            ),
            created_at=workload.created_at,
            inbound_redirected=workload.meshed and policy.inbound.enabled,
            excluded_inbound_ports=_ranges(policy),
            excluded_sources=policy.inbound_sources_left_alone(),
            coverage=coverage,
            losses=losses,
            edges=self._edges(workload, since, until),
            node_addresses=self._config.node_addresses,
        )

    def _edges(self, workload: Workload, since: float, until: float) -> tuple[EdgeEvidence, ...]:
        cuts = self.labels.changes(since, until)
        found = self._ledger.window([workload.key], Direction.INBOUND, since, until, cuts)
        return tuple(EdgeEvidence.of(edge) for edge in found)

    def flows(self, since: float, until: float, keepers: Mapping[str, Keeper]) -> NodeFlows:
        """This node's edges in [since, until], named."""
        own = {keeper.workload.key: keeper for keeper in keepers.values()}
        rows: list[NamedEdge] = []
        cuts = self.labels.changes(since, until)
        for edge in self._ledger.window(list(own), None, since, until, cuts):
            keeper = own[edge.key.workload]
            with self._defects_told(keeper.workload.key, keeper.workload.name, "told of"):
                policy = keeper.policy if keeper.in_mesh else None
                rows.append(named(edge, keeper.workload, policy, self.labels))
        return NodeFlows(
            node=self._config.node,
            observed=tuple(
                keeper.workload.name for key, keeper in own.items() if key in self._attachments
            ),
            flows=tuple(rows),
            problems=self.problems(),
        )

    def observed(self, workloads: Iterable[Workload]) -> Observed:
        """What the metrics tell of observation, as of the latest round; coverage is that of these workloads, in the
        configured window."""
        until = self._collected_at
        since = until - self._config.window
        return Observed(
            traffic=tuple(
                Traffic(*kind, total.connections, total.to_server, total.to_client)
                for kind, total in self._ledger.totals.items()
            ),
            lost=self._lost,
            coverage=tuple(
                _share(self._ledger.coverage(one.key), max(since, one.created_at), until)
                for one in workloads
            ),
            edges=self._ledger.held,
            room=self._classifier.room,
        )


def _share(coverage: Iterable[Interval], since: float, until: float) -> float:
    """How much of [since, until] is covered, 0 to 1."""
    length = until - since
    return intervals.total(intervals.clip(coverage, since, until)) / length if length > 0 else 1.0


def _profile(config: AgentConfig) -> MeshProfile:
    match config.profile:
        case Profile.CONSUL:
            return consul_profile(config.trust_domain)
        case Profile.ISTIO:
            return ISTIO
        case Profile.KUMA:
            return KUMA
        case _:
            assert_never(config.profile)


def _moved(key: EdgeKey, connections: int) -> Edge:
    """An edge to which that many connections came, or which they left."""
    count = EdgeCount(
        connections=connections,
        bytes_to_server=0,
        bytes_to_client=0,
        first_seen=0.0,
        last_seen=0.0,
    )
    return Edge(key=key, count=count)


def _added(before: LedgerCounts | None, more: LedgerCounts) -> LedgerCounts:
    """Both together; what another map counted is not a beginning."""
    if before is None or before.generation != more.generation:
        return more
    return LedgerCounts(
        permissive=_sum(before.permissive, more.permissive),
        public=_sum(before.public, more.public),
        generation=more.generation,
    )


def _sum(one: ChainCounts, other: ChainCounts) -> ChainCounts:
    return ChainCounts(nonempty=one.nonempty + other.nonempty, all=one.all + other.all)


def published(keeper: Keeper, config: AgentConfig) -> Instance:
    """A workload as other nodes may know it."""
    workload = keeper.workload
    return Instance(
        id=workload.id,
        name=workload.name,
        service=workload.service,
        node=config.node,
        namespace=workload.namespace,
        addresses=workload.addresses,
        port=workload.port,
        more_ports=workload.more_ports,
        meshed=keeper.in_mesh,
        inbound_port=keeper.policy.inbound.port if keeper.policy else DEFAULT_INBOUND_PORT,
        applied_index=keeper.applied_index,
        mode=keeper.mode,
        of_another=workload.sidecar is Sidecar.OWN,
        agent_api=config.agent_api,
        seen_from=workload.created_at,
    )


def _named(name: str, count: int) -> dict[str, int]:
    return {name: count} if count else {}


def _ranges(policy: Policy) -> tuple[tuple[int, int], ...]:
    return tuple((ports.first, ports.last) for ports in policy.inbound_ports_left_alone())
