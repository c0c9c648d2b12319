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
from tidegate.errors import TidegateError
from tidegate.intent.entries import Entry, Kind
from tidegate.intent.resolve import resolve
from tidegate.model import Instance, ServiceIntent
from tidegate.node.client import AgentClient
from tidegate.node.config import AgentConfig
from tidegate.node.flows import FlowRow, told_once
from tidegate.node.intent import IntentSource
from tidegate.verdict.evidence import InstanceEvidence, MissingNode, ServiceEvidence
from tidegate.verdict.readiness import Verdict, judge

_T = TypeVar("_T")


class NodeEvidence(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent knows of its own instances of one service."""

    instances: tuple[InstanceEvidence, ...] = ()
    departed: tuple[InstanceEvidence, ...] = ()


class NodeFlows(msgspec.Struct, frozen=True, kw_only=True):
    """The edges that one agent's ledger has, and what is wrong with it."""

    observed: tuple[str, ...] = ()
    """Names of the workloads whose interfaces this agent observes."""
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
        window = window_s or self._config.window
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
        return judge(
            self._resolved(snapshot.entries, service, snapshot.default_allow),
            ServiceEvidence(
                service=service,
                instances=tuple(one for answer in answers for one in answer.instances),
                departed=tuple(one for answer in answers for one in answer.departed),
                nodes_missing=missing,
            ),
            known=snapshot.instances,
            window_s=window,
            now=time.time(),
            environment=self._config.environment,
        )

    async def flows(self, service: str | None, window_s: float | None) -> NodeFlows:
        """The edges of all nodes, each connection told once; of one service where it is named."""
        snapshot = await self._intent.refresh()
        query = {"window": str(window_s)} if window_s else {}
        answers, missing = await self._ask(
            snapshot.instances,
            self._local.flows(window_s),
            lambda agent: agent.get("/v1/node/flows", **query),
            NodeFlows,
        )
        observed = {name for answer in answers for name in answer.observed}
        rows = told_once((row for answer in answers for row in answer.flows), observed)
        return NodeFlows(
            observed=tuple(sorted(observed)),
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
        """This node's answer and those of the other nodes of the instances, at the same time."""
        apis = {one.node: one.agent_api for one in instances if one.node != self._config.node}

        async def one_node(node: str, api: str) -> _T | MissingNode:
            if not api:
                return MissingNode(node=node, reason="it has not said where its agent answers")
            try:
                async with AgentClient(api) as agent:
                    return msgspec.convert(await ask(agent), kind)
            except TidegateError as error:
                return MissingNode(node=node, reason=str(error))
            except msgspec.ValidationError as error:
                return MissingNode(node=node, reason=f"its answer cannot be read: {error}")

        others = asyncio.gather(*(one_node(node, api) for node, api in sorted(apis.items())))
        answers = [await own]
        missing: list[MissingNode] = []
        for other in await others:
            if isinstance(other, MissingNode):
                missing.append(other)
            else:
                answers.append(other)
        return answers, tuple(missing)


def _concerns(row: FlowRow, service: str | None) -> bool:
    return service is None or service in (row.caller.service, row.server.service)
