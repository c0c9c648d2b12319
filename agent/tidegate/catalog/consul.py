"""What a Consul server has, put together from its own endpoints: for servers that have no /v1/tidegate/snapshot.

One blocking query for each thing that is read (a kind of config entry, the nodes, the services of each node), over and
over, by Consul's rules for them (api-docs/features/blocking): an index that goes backwards is begun anew, one below 1
is 1, and a query that keeps changing is asked once a second. A query that fails is told and tried again; what it
answered before stays. Consul knows only who is there now, so who was there is kept here.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from tidegate.catalog.history import History
from tidegate.catalog.registration import Node, NodeInfo, Service, info_of, instances_of
from tidegate.catalog.settings import IntentionPolicy
from tidegate.catalog.transport import TIMEOUT_S, Answer, Transport
from tidegate.errors import TidegateError
from tidegate.intent.entries import Entry, Kind, from_server
from tidegate.model import Instance

WAIT_S = 10.0
"""How long one blocking query waits: after which time a server that does not answer any more is noticed."""
MOST_AT_ONCE = 64
"""Blocking queries under way at one time; Consul refuses above 200 connections of one client
(limits.http_max_conns_per_client). With more nodes than that, each waits for its turn."""
RETRY_S = (0.25, 8.0)
"""First and longest pause after a failure; it doubles, and is spread by half."""
BURST = 2
PACE_S = 1.0
"""A query that changes all the time: this many answers at once, then one in this time."""

T = TypeVar("T")


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the server has, at one index; empty before the first answer."""

    index: int = 0
    entries: tuple[Entry, ...] = ()
    instances: tuple[Instance, ...] = ()
    """Living (seen_until 0) and recently departed."""
    nodes: tuple[NodeInfo, ...] = ()
    default_allow: bool = False
    trust_domain: str = ""
    root_id: str = ""
    """Of the root that leaves are issued by; empty where the server does not say."""
    datacenter: str = ""

    def living(self) -> dict[str, Instance]:
        """The living instances by id."""
        return {instance.id: instance for instance in self.instances if not instance.seen_until}


def next_index(asked: int, answered: int) -> int:
    """The index to ask with next, 0 to ask without waiting."""
    if answered < asked:
        return 0
    return max(1, answered)


class _Feed:
    """One blocking query over and over, and its latest answer."""

    def __init__(
        self,
        transport: Transport,
        turns: asyncio.Semaphore,
        path: str,
        query: dict[str, str],
        changed: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._turns = turns
        self._path = path
        self._query = query
        self._changed = changed
        self._index = 0
        self._task = asyncio.create_task(self._run())
        self.answer: Answer | None = None
        self.error: TidegateError | None = None

    async def stop(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        pause = RETRY_S[0]
        credit, since = float(BURST), time.monotonic()
        while True:
            try:
                answer = await self._ask()
            except TidegateError as error:
                self.error, self._index = error, 0
                self._changed()
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                pause = min(2 * pause, RETRY_S[1])
                continue
            pause = RETRY_S[0]
            self._index = next_index(self._index, answer.index)
            former = None if self.error else self.answer
            self.error, self.answer = None, answer
            if former is None or former.body != answer.body:
                self._changed()
            now = time.monotonic()
            credit, since = min(BURST, credit + (now - since) / PACE_S) - 1, now
            if credit < 0:
                await asyncio.sleep(-credit * PACE_S)

    async def _ask(self) -> Answer:
        query = dict(self._query)
        limit_s = TIMEOUT_S
        if self._index:
            query |= {"index": str(self._index), "wait": f"{WAIT_S:g}s"}
            limit_s += WAIT_S * 17 / 16
        async with self._turns:
            return await self._transport.ask("GET", self._path, query=query, limit_s=limit_s)


class ConsulView:
    """Config entries, nodes and instances of a Consul server, followed in the background from the first question on."""

    def __init__(self, transport: Transport, known: Iterable[Instance] = ()) -> None:
        """`known` are instances of a former view, living and departed."""
        self._transport = transport
        self._namespace = transport.access.namespace
        self._history = History(known)
        self._turns = asyncio.Semaphore(MOST_AT_ONCE)
        self._news = asyncio.Condition()
        self._stale = True
        self._snapshot: Snapshot | None = None
        self._kinds: dict[Kind, _Feed] = {}
        self._nodes: _Feed | None = None
        self._roots: _Feed | None = None
        self._services: dict[str, _Feed] = {}
        self._followed = b""
        """The list of nodes that `_services` is in line with."""
        self._ringing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends the queries."""
        for feed in self._feeds():
            await feed.stop()

    async def snapshot(self) -> Snapshot:
        """The latest of everything, as soon as all of it is known. CatalogUnreachable, CatalogRefused when any of it
        cannot be had at the moment."""
        if self._nodes is None:
            self._start()
        async with self._news:
            while True:
                self._follow_nodes()
                failed = [feed.error for feed in self._feeds() if feed.error is not None]
                if failed:
                    raise failed[0]
                if all(feed.answer is not None for feed in self._feeds()):
                    break
                await self._news.wait()
        if self._stale or self._snapshot is None:
            self._snapshot = self._assembled()
            self._stale = False
        return self._snapshot

    async def wait(self, index: int, timeout: float) -> int:  # noqa: ASYNC109 - it waits
        """The index of the snapshot, as soon as it is not `index`, or after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while (await self.snapshot()).index == index:
                    async with self._news:
                        if not self._stale:
                            await self._news.wait()
        return self._snapshot.index if self._snapshot else 0

    def _start(self) -> None:
        for kind in Kind:
            # These hold for a whole partition and are in no namespace but the default.
            everywhere = kind in (Kind.MESH, Kind.PROXY_DEFAULTS)
            self._kinds[kind] = self._feed(f"/v1/config/{kind}", {} if everywhere else self._of())
        self._nodes = self._feed("/v1/catalog/nodes", {})
        self._roots = self._feed("/v1/connect/ca/roots", {})

    def _of(self) -> dict[str, str]:
        return {"ns": self._namespace} if self._namespace else {}

    def _feed(self, path: str, query: dict[str, str]) -> _Feed:
        return _Feed(self._transport, self._turns, path, query, self._changed)

    def _feeds(self) -> list[_Feed]:
        begun = [feed for feed in (self._nodes, self._roots) if feed]
        return [*self._kinds.values(), *begun, *self._services.values()]

    def _follow_nodes(self) -> None:
        """A feed for each node there is, and none for those that are gone."""
        answer = self._nodes.answer if self._nodes else None
        if answer is None or answer.body == self._followed:
            return
        names = {node.node for node in answer.decoded(list[_Node])}
        self._followed = answer.body
        for name in names - set(self._services):
            path = f"/v1/catalog/node-services/{quote(name, safe='')}"
            self._services[name] = self._feed(path, self._of())
        for name in set(self._services) - names:
            self._background(self._services.pop(name).stop())
            self._stale = True

    def _changed(self) -> None:
        self._stale = True
        self._background(self._ring())

    async def _ring(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._ringing.add(task)
        task.add_done_callback(self._ringing.discard)

    def _assembled(self) -> Snapshot:
        source = self._transport.address
        entries = [
            from_server(raw, source)
            for kind in sorted(self._kinds)
            for raw in _answered(self._kinds[kind], list[dict[str, Any]])
        ]
        found: dict[str, NodeInfo] = {}
        datacenter = self._transport.access.datacenter
        for node in _answered(self._nodes, list[_Node]):
            found[node.node] = info_of(_without_nulls(node))
            datacenter = datacenter or node.datacenter
        instances: list[Instance] = []
        for feed in self._services.values():
            on_node = _answered(feed, _NodeServices)
            if on_node.node is not None:
                services = [_plain(one) for one in on_node.services or ()]
                instances += instances_of(_without_nulls(on_node.node), services)
        policy = self._transport.access.default_intention_policy
        said = next((feed.answer.default_policy for feed in self._feeds() if feed.answer), "")
        roots = _answered(self._roots, _Roots)
        return Snapshot(
            index=max((feed.answer.index for feed in self._feeds() if feed.answer), default=0),
            entries=tuple(entries),
            instances=self._history.update(instances, time.time()),
            nodes=tuple(found[name] for name in sorted(found)),
            default_allow=(policy or said) == IntentionPolicy.ALLOW,
            trust_domain=roots.trust_domain,
            root_id=roots.active_root_id,
            datacenter=datacenter,
        )


def _answered(feed: _Feed | None, shape: type[T]) -> T:
    if feed is None or feed.answer is None:
        raise AssertionError("an answer that is not there was assembled")
    return feed.answer.decoded(shape)


class _Node(msgspec.Struct, rename="pascal"):
    """A node as Consul's catalog tells it; what is empty can be null in Go's JSON."""

    node: str
    address: str = ""
    partition: str | None = None
    datacenter: str = ""
    tagged_addresses: dict[str, str] | None = None
    meta: dict[str, str] | None = None


class _TaggedAddress(msgspec.Struct, rename="pascal"):
    address: str = ""
    port: int = 0


class _Service(msgspec.Struct, rename="pascal"):
    """A service of /v1/catalog/node-services/:node."""

    id: str = msgspec.field(name="ID")
    service: str
    namespace: str | None = None
    partition: str | None = None
    kind: str = ""
    tags: list[str] | None = None
    address: str = ""
    tagged_addresses: dict[str, _TaggedAddress] | None = None
    port: int = 0
    meta: dict[str, str] | None = None
    proxy: dict[str, Any] | None = None


class _NodeServices(msgspec.Struct, rename="pascal"):
    node: _Node | None
    services: list[_Service] | None = None


class _Roots(msgspec.Struct, rename="pascal"):
    trust_domain: str = ""
    active_root_id: str = msgspec.field(default="", name="ActiveRootID")


def _without_nulls(node: _Node) -> Node:
    return msgspec.convert(_said(node), type=Node)


def _plain(service: _Service) -> Service:
    return msgspec.convert(_said(service), type=Service)


def _said(value: msgspec.Struct) -> dict[str, Any]:
    """The fields that say something, by their names in JSON."""
    fields: dict[str, Any] = msgspec.to_builtins(value)
    return {name: inner for name, inner in fields.items() if inner not in (None, "")}
