"""The whole mesh as one agent sees it: its own evidence, that of the other nodes' agents, and the intent server.

Every agent keeps the evidence of its own workloads only. A question about a service goes to the agents of all nodes
that have (or had) instances of it; one that does not answer is named in the verdict and never guessed for.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import msgspec

from tidegate.catalog.client import CatalogClient
from tidegate.errors import InputError, TidegateError
from tidegate.intent.entries import Entry, Kind
from tidegate.intent.resolve import resolve
from tidegate.model import Instance, ServiceIntent
from tidegate.node.client import AgentClient
from tidegate.node.config import AgentConfig
from tidegate.node.flows import FlowRow, told_once
from tidegate.node.intent import IntentSource
from tidegate.verdict.evidence import InstanceEvidence, MissingNode, ServiceEvidence
from tidegate.verdict.readiness import Verdict, judge
from tidegate.verdict.steps import Place

PEER_TIMEOUT_S = 5.0
"""How long the agent of another node may take to answer."""

_T = TypeVar("_T")


class NodeEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent knows of its own instances of one service."""

    instances: tuple[InstanceEvidence, ...] = ()
    departed: tuple[InstanceEvidence, ...] = ()


class NodeFlows(msgspec.Struct, frozen=True, kw_only=True):
    """The edges that one agent's ledger has, and what is wrong with it."""

    node: str = ""
    """Empty where all nodes are summed."""
    observed: tuple[str, ...] = ()
    """Names of the workloads whose interfaces are observed."""
    flows: tuple[FlowRow, ...] = ()
    problems: tuple[str, ...] = ()


class LocalEvidence:
    """This node's own answers; each runs where the ledger may be used."""

    def __init__(
        self,
        evidence: Callable[[str, float], Awaitable[NodeEvidence]],
        flows: Callable[[float | None], Awaitable[NodeFlows]],
    ) -> None:
        self.evidence = evidence
        self.flows = flows


class MeshView:
    """Answers for the whole mesh."""

    def __init__(
        self,
        config: AgentConfig,
        intent: IntentSource,
        catalog: CatalogClient,
        local: LocalEvidence,
    ) -> None:
        self._config = config
        self._intent = intent
        self._catalog = catalog
        self._local = local

    async def services(self) -> tuple[str, ...]:
        """Every service that has a meshed instance, by name."""
        snapshot = self._intent.current()
        return tuple(
            sorted({one.service for one in snapshot.instances if one.meshed and not one.seen_until})
        )

    async def verdict(self, service: str, window_s: float | None) -> Verdict:
        """Judges one service over `window_s` seconds, or the configured window."""
        window = self._config.window if window_s is None else window_s
        snapshot = await self._intent.refresh()
        now = time.time()
        concerned = [
            one
            for one in snapshot.instances
            if one.service == service and (not one.seen_until or one.seen_until >= now - window)
        ]
        path = f"/v1/node/evidence/{service}"
        answers, missing = await self._ask(
            concerned,
            self._local.evidence(service, window),
            lambda agent: agent.get(path, window=str(window)),
            NodeEvidence,
        )
        living = tuple(one for answer in answers for one in answer.instances)
        told = {one.instance.id for one in living}
        silent = {one.node for one in missing}
        untold = tuple(
            MissingNode(node=one.node, reason=f"its agent knows nothing of {one.name}")
            for one in concerned
            if not one.seen_until and one.id not in told and one.node not in silent
        )
        return judge(
            self._resolved(snapshot.entries, service, snapshot.default_allow),
            ServiceEvidence(
                service=service,
                instances=living,
                departed=tuple(one for answer in answers for one in answer.departed),
                nodes_missing=(*missing, *untold),
                intent_problem=self._intent.outdated,
            ),
            known=snapshot.instances,
            window_s=window,
            now=time.time(),
            place=Place(environment=self._config.environment, lab=self._config.lab),
        )

    async def flows(self, service: str | None, window_s: float | None) -> NodeFlows:
        """The edges of all nodes, each connection told once; of one service where it is named.

        InputError for a service that nobody knows.
        """
        snapshot = await self._intent.refresh()
        query = {} if window_s is None else {"window": str(window_s)}
        answers, missing = await self._ask(
            snapshot.instances,
            self._local.flows(window_s),
            lambda agent: agent.get("/v1/node/flows", **query),
            NodeFlows,
        )
        observed = {(name, answer.node) for answer in answers for name in answer.observed}
        rows = told_once((row for answer in answers for row in answer.flows), observed)
        if service is not None:
            ends = {party.service for row in rows for party in (row.caller, row.server)}
            _refuse_unknown(service, ends | {one.service for one in snapshot.instances})
        return NodeFlows(
            observed=tuple(sorted(name for name, _ in observed)),
            flows=tuple(row for row in rows if _concerns(row, service)),
            problems=(
                *(problem for answer in answers for problem in answer.problems),
                *(f"{one.node} does not answer: {one.reason}" for one in missing),
            ),
        )

    async def read_entry(self, kind: Kind, name: str) -> Entry | None:
        """The entry as the server has it now, None when it has none."""
        entries = await self._catalog.read_entries(kind)
        return next((entry for entry in entries if entry.name == name), None)

    async def write_entry(self, entry: Entry) -> int:
        """Writes an entry and returns the index from which it holds."""
        await self._catalog.write_entry(entry)
        written = await self.read_entry(entry.kind, entry.name)
        if written is None:
            raise TidegateError(f"{entry.kind}/{entry.name} was deleted while it was written")
        return written.modify_index

    async def instances(self, service: str) -> tuple[Instance, ...]:
        """The living instances of a service, from the server."""
        snapshot = await self._intent.refresh()
        return tuple(
            one for one in snapshot.instances if one.service == service and not one.seen_until
        )

    def _resolved(
        self, entries: Iterable[Entry], service: str, default_allow: bool
    ) -> ServiceIntent:
        return resolve(entries, [service], default_allow)[service]

    async def _ask(
        self,
        instances: Iterable[Instance],
        own: Awaitable[_T],
        ask: Callable[[AgentClient], Awaitable[Any]],
        kind: type[_T],
    ) -> tuple[list[_T], tuple[MissingNode, ...]]:
        """The answers of this node and of the other nodes of the instances, asked at the same time."""
        apis: dict[str, str] = {}
        for one in instances:
            if one.node != self._config.node:
                apis[one.node] = one.agent_api or apis.get(one.node, "")

        async def of(node: str, answer: Awaitable[_T]) -> _T | MissingNode:
            try:
                return await answer
            except TidegateError as error:
                return MissingNode(node=node, reason=str(error))
            except msgspec.ValidationError as error:
                return MissingNode(node=node, reason=f"its answer cannot be read: {error}")

        async def over(api: str) -> _T:
            if not api:
                raise TidegateError("it has not said where its agent answers")
            async with AgentClient(api, PEER_TIMEOUT_S) as agent:
                return msgspec.convert(await ask(agent), kind)

        given = await asyncio.gather(
            of(self._config.node, own),
            *(of(node, over(api)) for node, api in sorted(apis.items())),
        )
        answers: list[_T] = []
        missing: list[MissingNode] = []
        for each in given:
            if isinstance(each, MissingNode):
                missing.append(each)
            else:
                answers.append(each)
        return answers, tuple(missing)


def _refuse_unknown(service: str, services: set[str]) -> None:
    if service not in services:
        known = ", ".join(sorted(services - {""})) or "none yet"
        raise InputError(f"no service {service!r} is known (known: {known})", field="service")


def _concerns(row: FlowRow, service: str | None) -> bool:
    return service is None or service in (row.caller.service, row.server.service)
