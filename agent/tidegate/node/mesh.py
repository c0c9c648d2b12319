"""The whole mesh as one agent sees it: its own evidence, that of the other nodes' agents, and the intent server.

Every agent keeps the evidence of its own workloads only. A question about a service goes to the agents of all nodes
that have (or had) instances of it; one that does not answer is named in the verdict and never guessed for.
"""

import asyncio
import difflib
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from tidegate.catalog.client import CatalogClient, Snapshot
from tidegate.durations import span
from tidegate.enforce.sidecar import envoy
from tidegate.errors import InputError, TidegateError
from tidegate.intent.changes import defaults_of, written_by_hand
from tidegate.intent.entries import MESH_NAME, Entry, EntryKey, Kind, Mesh
from tidegate.intent.resolve import effective_mode, resolve
from tidegate.model import Direction, FlowClass, Instance, MutualTLSMode, ServiceIntent, ServiceName
from tidegate.node.client import AgentClient
from tidegate.node.config import AgentConfig
from tidegate.node.flows import THROUGH_SIDECAR, NamedEdge, told_once
from tidegate.node.intent import IntentSource
from tidegate.verdict import names
from tidegate.verdict.evidence import InstanceEvidence, MissingNode, ServiceEvidence
from tidegate.verdict.permission import permission
from tidegate.verdict.readiness import Verdict, judge
from tidegate.verdict.steps import Place

PEER_TIMEOUT_S = 5.0
"""How long the agent of another node may take to answer."""

MAX_SKEW_S = 5.0
"""How far the clocks of two nodes may be apart; less than what a verdict overlooks anyway would be noise."""

OWN_SIDECAR = 'a sidecar and the annotation tidegate.io/mesh: "own"'
"""What a pod template says where neither an injector nor the agent gives a pod its sidecar."""

_Answer = TypeVar("_Answer", "NodeEvidence", "NodeFlows")


class NodeEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent knows of its own instances of one service."""

    node: str = ""
    """Who answers."""
    at: float = msgspec.field(default_factory=time.time)
    """When it answers, by its own clock, as all times in it are."""
    instances: tuple[InstanceEvidence, ...] = ()
    departed: tuple[InstanceEvidence, ...] = ()


class NodeFlows(msgspec.Struct, frozen=True, kw_only=True):
    """The edges that one agent's ledger has, and what is wrong with it."""

    node: str = ""
    """Empty where all nodes are summed."""
    observed: tuple[str, ...] = ()
    """Names of the workloads whose interfaces are observed."""
    flows: tuple[NamedEdge, ...] = ()
    problems: tuple[str, ...] = ()


class ChangedMeanwhile(TidegateError):
    """Somebody else wrote the entry between its reading and its writing."""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A service's verdict, and what it was judged from."""

    verdict: Verdict
    intent: ServiceIntent
    evidence: ServiceEvidence


class LocalEvidence:
    """This node's own answers; each runs where the ledger may be used."""

    def __init__(
        self,
        evidence: Callable[[str, float], Awaitable[NodeEvidence]],
        flows: Callable[[float | None], Awaitable[NodeFlows]],
    ) -> None:
        self.evidence = evidence
        self.flows = flows


def _no_tls() -> ssl.SSLContext:
    raise TidegateError("this agent does not speak to those of other machines")


class MeshView:
    """Answers for the whole mesh."""

    def __init__(
        self,
        config: AgentConfig,
        intent: IntentSource,
        catalog: CatalogClient,
        local: LocalEvidence,
        tls: Callable[[], ssl.SSLContext] = _no_tls,
    ) -> None:
        """`tls` gives how agents of other machines are spoken to; TidegateError while they cannot be."""
        self._config = config
        self._intent = intent
        self._catalog = catalog
        self._local = local
        self._tls = tls

    @property
    def place(self) -> Place:
        """Where a person stands who reads advice."""
        kubernetes = self._config.kubernetes
        injections = [one.injection for one in kubernetes.enrolments] if kubernetes else []
        return Place(
            environment=self._config.environment,
            lab=self._config.lab,
            injected_by=next(filter(None, injections), "" if envoy.is_installed() else OWN_SIDECAR),
        )

    @property
    def window(self) -> float:
        """Seconds of a window that nobody has named."""
        return self._config.window

    @property
    def outdated(self) -> str:
        """Why what should be may be something else by now; empty when the server has just said it."""
        return self._intent.outdated

    async def snapshot(self) -> Snapshot:
        """What the intent server has now; the last of it where it does not answer."""
        return await self._intent.refresh()

    async def services(self) -> tuple[str, ...]:
        """Every service that has a meshed instance, by name."""
        snapshot = self._intent.current()
        meshed = (one for one in snapshot.living().values() if one.meshed)
        return tuple(sorted({name for one in meshed for name in names.services_of(one)}))

    async def verdict(self, service: str, window_s: float | None) -> Verdict:
        """Judges one service over `window_s` seconds, or the configured window."""
        return (await self.judged(service, window_s)).verdict

    async def judged(self, service: str, window_s: float | None) -> Judged:
        """Judges one service, and tells what from."""
        window = self._config.window if window_s is None else window_s
        snapshot = await self._intent.refresh()
        now = time.time()
        concerned = [
            one
            for one in _without_twins(snapshot.instances)
            if service in names.services_of(one)
            and (not one.seen_until or one.seen_until >= now - window)
        ]
        path = f"/v1/node/evidence/{quote(service, safe='/')}"
        answers, missing = await self._ask(
            concerned,
            self._local.evidence(service, window),
            lambda agent: agent.get(path, window=str(window)),
            NodeEvidence,
        )
        living = tuple(
            _as_instance_of(service, one) for answer in answers for one in answer.instances
        )
        told = {one.instance.id for one in living}
        silent = {one.node for one in missing}
        untold = tuple(
            MissingNode(node=one.node, reason=f"its agent knows nothing of {one.name}")
            for one in concerned
            if not one.seen_until and one.id not in told and one.node not in silent
        )
        intent = intent_of(snapshot, service)
        evidence = ServiceEvidence(
            service=service,
            instances=living,
            departed=tuple(one for answer in answers for one in answer.departed),
            nodes_missing=(*missing, *untold),
            intent_problem=self._intent.outdated,
        )
        verdict = judge(
            intent,
            evidence,
            known=snapshot.instances,
            window_s=window,
            now=time.time(),
            place=self.place,
        )
        return Judged(verdict=verdict, intent=intent, evidence=evidence)

    async def flows(self, service: str | None, window_s: float | None) -> NodeFlows:
        """The edges of all nodes, each connection told once; of one service where it is named.

        InputError for a service that nobody knows.
        """
        snapshot = await self._intent.refresh()
        answers, missing = await self._edges(snapshot, window_s)
        observed = {(name, answer.node) for answer in answers for name in answer.observed}
        rows = told_once((row for answer in answers for row in answer.flows), observed)
        if service is not None:
            ends = {party.service for row in rows for party in (row.caller, row.server)}
            refuse_unknown(service, ends | services_known(snapshot))
        intents = _intents_of(snapshot, {row.server.service for row in rows} - {""})
        return NodeFlows(
            observed=tuple(sorted(name for name, _ in observed)),
            flows=tuple(
                _with_intention(row, snapshot.instances, intents)
                for row in rows
                if _concerns(row, service)
            ),
            problems=(
                *(problem for answer in answers for problem in answer.problems),
                *(f"{one.node} does not answer: {one.reason}" for one in missing),
            ),
        )

    async def edges(self, window_s: float) -> tuple[tuple[NamedEdge, ...], tuple[str, ...]]:
        """The edges of all nodes as each end saw them, and which nodes do not answer."""
        answers, missing = await self._edges(await self._intent.refresh(), window_s)
        return (
            tuple(row for answer in answers for row in answer.flows),
            tuple(f"{one.node} does not answer: {one.reason}" for one in missing),
        )

    async def _edges(
        self, snapshot: Snapshot, window_s: float | None
    ) -> tuple[list[NodeFlows], tuple[MissingNode, ...]]:
        query = {} if window_s is None else {"window": str(window_s)}
        return await self._ask(
            snapshot.instances,
            self._local.flows(window_s),
            lambda agent: agent.get("/v1/node/flows", **query),
            NodeFlows,
        )

    async def read_entry(self, key: EntryKey) -> Entry | None:
        """The entry as the server has it now, None when it has none."""
        if self._intent.is_of_cluster:
            entries = (await self._intent.refresh()).entries
            return next((entry for entry in entries if entry.key == key), None)
        entries = await self._catalog.read_entries(key.kind)
        return next((entry for entry in entries if entry.key == key), None)

    async def write_entry(self, entry: Entry) -> int:
        """Writes an entry that was read before, and returns the index from which it holds.

        ChangedMeanwhile when somebody else has changed it since. InputError where entries are a cluster's.
        """
        if self._intent.is_of_cluster:
            raise InputError(
                f"{entry.kind}/{entry.name} is a custom resource of the cluster",
                expected="a change of that resource, such as by kubectl edit",
            )
        if not await self._catalog.write_entry(entry, entry.modify_index):
            raise ChangedMeanwhile(f"{entry.kind}/{entry.name} was changed by somebody else")
        written = await self.read_entry(entry.key)
        if written is None:
            raise TidegateError(f"{entry.kind}/{entry.name} was deleted while it was written")
        return written.modify_index

    async def instances(self, service: str | None) -> tuple[Instance, ...]:
        """The living instances of a service, or of all, from the server."""
        living = (await self._intent.refresh()).living().values()
        return tuple(one for one in living if service is None or service in names.services_of(one))

    async def sidecar_problems(self, service: str) -> tuple[str, ...]:
        """Why sidecars of the service do not run as they should, and which nodes' agents cannot say."""
        evidence = (await self.judged(service, None)).evidence
        return (
            *(one.sidecar_problem for one in evidence.instances if one.sidecar_problem),
            *(f"{one.node} does not answer: {one.reason}" for one in evidence.nodes_missing),
        )

    async def opens_gate(self, service: str) -> str:
        """The command that lets a service become permissive; empty while it may."""
        partition = ServiceName.of(service).partition
        entry = await self.read_entry(EntryKey(Kind.MESH, MESH_NAME, partition=partition))
        present = entry if isinstance(entry, Mesh) else Mesh(partition=partition)
        if present.allow_enabling_permissive_mutual_tls:
            return ""
        opened = msgspec.structs.replace(present, allow_enabling_permissive_mutual_tls=True)
        return self.place.write(written_by_hand(opened))

    async def _ask(
        self,
        instances: Iterable[Instance],
        own: Awaitable[_Answer],
        ask: Callable[[AgentClient], Awaitable[Any]],
        kind: type[_Answer],
    ) -> tuple[list[_Answer], tuple[MissingNode, ...]]:
        """The answers of this node and of the other nodes of the instances, asked at the same time."""
        apis: dict[str, str] = {}
        for one in instances:
            if one.node != self._config.node:
                apis[one.node] = one.agent_api or apis.get(one.node, "")

        async def of(node: str, answer: Awaitable[_Answer]) -> _Answer | MissingNode:
            try:
                return await answer
            except TidegateError as error:
                return MissingNode(node=node, reason=str(error))
            except msgspec.ValidationError as error:
                return MissingNode(node=node, reason=f"its answer cannot be read: {error}")

        async def over(node: str, api: str) -> _Answer:
            if not api:
                raise TidegateError("it has not said where its agent answers")
            tls = self._tls() if api.startswith("https://") else None
            asked = time.time()
            async with AgentClient(api, PEER_TIMEOUT_S, tls) as agent:
                answer = msgspec.convert(await ask(agent), kind)
            if answer.node != node:
                # A path that means a socket there means another one here.
                hint = "; `peers` in its configuration says where it can be reached"
                raise TidegateError(
                    f"{answer.node or 'somebody else'} answers at {api}"
                    f"{hint if api.startswith('unix://') else ''}"
                )
            if isinstance(answer, NodeEvidence):
                _refuse_other_time(answer.at, asked, time.time())
            return answer

        given = await asyncio.gather(
            of(self._config.node, own),
            *(of(node, over(node, api)) for node, api in sorted(apis.items())),
        )
        answers: list[_Answer] = []
        missing: list[MissingNode] = []
        for each in given:
            if isinstance(each, MissingNode):
                missing.append(each)
            else:
                answers.append(each)
        return answers, tuple(missing)


def _refuse_other_time(at: float, asked: float, answered: float) -> None:
    """What was observed until when is told by the clock of who observed: one that goes ahead hides a gap that is as
    long. TidegateError for a clock by which it was another time than between question and answer here.
    """
    ahead = max(at - answered, 0.0) + min(at - asked, 0.0)
    if abs(ahead) > MAX_SKEW_S:
        raise TidegateError(
            f"its clock is {span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the clock of this node; the"
            " clocks of both have to agree (NTP)"
        )


def services_known(snapshot: Snapshot) -> set[str]:
    """Every service that the catalog has or lately had."""
    return {name for one in snapshot.instances for name in names.services_of(one)}


def refuse_unknown(service: str, services: Iterable[str]) -> None:
    """Raises InputError, which names the service that was probably meant, unless it is one of these."""
    known = sorted(set(services) - {""})
    if service in known:
        return
    near = difflib.get_close_matches(service, known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"no service {service!r} is known{meant} (known: {', '.join(known) or 'none yet'})",
        field="service",
    )


def intent_of(snapshot: Snapshot, service: str) -> ServiceIntent:
    """What should be for a service; permissive if a living instance's registration makes it so, which wins."""
    return _intents_of(snapshot, [service])[service]


def _intents_of(snapshot: Snapshot, services: Iterable[str]) -> dict[str, ServiceIntent]:
    wanted = list(services)
    intents = resolve(snapshot.entries, wanted, snapshot.default_allow)
    registered: dict[str, list[Instance]] = {}
    for one in snapshot.living().values():
        for name in names.services_of(one):
            registered.setdefault(name, []).append(one)
    return {
        service: msgspec.structs.replace(
            intents[service], mode=_mode(snapshot, service, registered.get(service, ()))
        )
        for service in wanted
    }


def _mode(snapshot: Snapshot, service: str, instances: Sequence[Instance]) -> MutualTLSMode:
    own, shared = defaults_of(snapshot.entries, service)
    said = {effective_mode(one.registered_mode, own, shared) for one in instances}
    said = said or {effective_mode(None, own, shared)}
    permissive = MutualTLSMode.PERMISSIVE in said
    return MutualTLSMode.PERMISSIVE if permissive else MutualTLSMode.STRICT


def _without_twins(instances: Sequence[Instance]) -> Iterator[Instance]:
    """Without what others, such as Consul on Kubernetes, have registered of workloads that an agent tells of too."""
    told = {
        (service, address)
        for one in instances
        if one.agent_api and not one.seen_until
        for service in names.services_of(one)
        for address in one.addresses
    }
    for one in instances:
        is_twin = not one.agent_api and any(
            (service, address) in told
            for service in names.services_of(one)
            for address in one.addresses
        )
        if not is_twin:
            yield one


def _as_instance_of(service: str, evidence: InstanceEvidence) -> InstanceEvidence:
    """Of a workload with several services what is about this one: its port, and no flows to the others' ports."""
    one = evidence.instance
    ports = names.ports_of(one, service)
    if one.service == service and not one.more_ports:
        return evidence
    others = {port for name in names.services_of(one) for port in names.ports_of(one, name)}
    others -= set(ports)
    return msgspec.structs.replace(
        evidence,
        instance=msgspec.structs.replace(one, service=service, port=ports[0] if ports else 0),
        edges=tuple(edge for edge in evidence.edges if edge.port not in others),
    )


def _with_intention(
    row: NamedEdge, instances: Iterable[Instance], intents: Mapping[str, ServiceIntent]
) -> NamedEdge:
    """Says of connections that a permissive sidecar lets in whether intentions would refuse them."""
    intent = intents.get(row.server.service)
    if (
        intent is None
        or intent.mode is not MutualTLSMode.PERMISSIVE
        or row.observed_at is not Direction.INBOUND
        or row.path != THROUGH_SIDECAR
        or row.flow_class is FlowClass.EMPTY
    ):
        return row
    ports = {
        port
        for one in instances
        if one.name == row.server.workload and one.node == row.server.node
        for port in names.ports_of(one, row.server.service)
    }
    denied = permission(intent, row.caller.service).would_be_denied
    return msgspec.structs.replace(row, would_be_denied=denied and row.port in ports)


def _concerns(row: NamedEdge, service: str | None) -> bool:
    return service is None or service in (row.caller.service, row.server.service)
