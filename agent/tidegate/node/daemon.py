"""The agent of one node: one level-triggered loop over its workloads, and the API beside it.

Each round: read intent and workloads; observe every workload; move each towards what it should be; publish what is;
read the evidence. Work that blocks (kernel, files, Envoy, SQLite) runs in one worker thread, so that nothing of it
needs a lock. Stopping leaves rules, programs, maps and sidecars in place.
"""

import asyncio
import concurrent.futures
import hashlib
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
from aiohttp import web

from tidegate.catalog.client import CatalogClient, LeafMaterial, Snapshot
from tidegate.catalog.registration import NodeInfo, is_published
from tidegate.enforce.sidecar import envoy
from tidegate.enforce.sidecar.spec import Endpoint, SidecarSpec, Upstream
from tidegate.errors import TidegateError
from tidegate.identity import spiffe
from tidegate.intent.resolve import resolve, upstreams_of
from tidegate.model import Instance, ServiceIntent, Workload
from tidegate.node import api
from tidegate.node.config import AgentConfig
from tidegate.node.guard import Guard
from tidegate.node.intent import IntentSource
from tidegate.node.keeper import Keeper, Wanted
from tidegate.node.log import Log
from tidegate.node.mesh import LocalEvidence, MeshView, NodeEvidence, NodeFlows
from tidegate.node.observation import Observation, published
from tidegate.workloads.files import FileSource

ROUND_S = 0.5
SETTLING_ROUND_S = 0.05
"""The pace while a sidecar takes in what it was told: an onboarding or a flip should not wait for the clock."""

_P = ParamSpec("_P")
_T = TypeVar("_T")

log = Log("daemon")


class WorkloadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One workload in the answer of GET /v1/status."""

    id: str
    name: str
    service: str
    wanted_in_mesh: bool
    meshed: bool
    redirect: str
    state: str
    """Of the sidecar; empty while there is none."""
    pid: int
    restarts: int
    last_exit: str
    mode: str
    observed_since: float
    """0 while it is not observed."""
    problem: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/status."""

    node: str
    round_at: float
    """When the last round was completed; 0 before the first."""
    workloads: tuple[WorkloadStatus, ...]
    problems: tuple[str, ...]


async def run_agent(config: AgentConfig) -> None:
    """Runs until SIGTERM or SIGINT."""
    # The proxy user has to pass run_dir to its sidecar's directory; nobody has to see the state.
    for directory, mode in ((config.run_dir, 0o711), (config.state_dir, 0o700)):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(mode)
    listener = api.listen(config.socket)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    catalog = CatalogClient(config.server)
    daemon = Daemon(config, catalog)
    try:
        await daemon.start()
        runner = web.AppRunner(daemon.app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        log.info("agent started", node=config.node, server=config.server)
        await daemon.run(stop)
        await runner.cleanup()
    finally:
        await daemon.close()
        await catalog.close()
        listener.close()
        config.socket.unlink(missing_ok=True)
        log.info("agent stopped; rules, programs and sidecars stay", node=config.node)


class Daemon:
    """The parts of one agent and the round that moves them."""

    def __init__(self, config: AgentConfig, catalog: CatalogClient) -> None:
        self._config = config
        self._catalog = catalog
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._source = FileSource(config.workloads)
        self._intent = IntentSource(catalog, config.state_dir / "intent.json")
        self._envoy = envoy.binary()
        self._keepers: dict[str, Keeper] = {}
        self._roots_pem = ""
        self._round_at = 0.0
        self._problems: dict[str, str] = {}
        self._observation: Observation
        local = LocalEvidence(self._evidence, self._flows)
        self._mesh = MeshView(config, self._intent, catalog, local)
        self._guard = Guard(self._mesh, config.state_dir / "guards")
        self.app = api.make_app(self._mesh, local, self._guard, self._status)

    async def start(self) -> None:
        """Opens the evidence; what a former agent left is found again."""
        self._observation = await self._work(Observation, self._config)
        self._guard.resume()

    async def close(self) -> None:
        """Ends this process's part; what it set up stays."""
        await self._guard.stop()
        if hasattr(self, "_observation"):
            await self._work(self._observation.close)
        self._worker.shutdown()

    async def run(self, stop: asyncio.Event) -> None:
        """Round after round until `stop`; a round that fails is told and tried again."""
        while not stop.is_set():
            try:
                await self._round()
            except TidegateError as error:
                self._tell("round", str(error))
            except Exception:
                # The kernel and the sidecars go on; an agent that is gone would help nobody.
                log.exception("a round failed by a defect of the agent")
                self._problems["round"] = "a round failed by a defect of the agent; see its log"
            else:
                self._problems.pop("round", None)
            try:
                settling = any(keeper.is_settling for keeper in self._keepers.values())
                await asyncio.wait_for(stop.wait(), SETTLING_ROUND_S if settling else ROUND_S)
            except TimeoutError:
                continue

    async def _round(self) -> None:
        snapshot = await self._intent.refresh()
        workloads = await self._work(self._source.list)
        intents = _intents(snapshot, workloads)
        await self._work(self._follow, workloads, snapshot)
        leaves = await self._leaves(workloads)
        await self._work(self._reconcile, workloads, snapshot, intents, leaves)
        await self._publish(snapshot)
        await self._work(self._collect)
        self._round_at = time.time()

    def _follow(self, workloads: Iterable[Workload], snapshot: Snapshot) -> None:
        """Takes in which workloads there are; observes them all."""
        self._observation.labels.replace(snapshot.instances)
        self._observation.look()
        living = {workload.id: workload for workload in workloads}
        for gone in [key for key in self._keepers if key not in living]:
            keeper = self._keepers.pop(gone)
            log.info("workload gone", workload=keeper.workload.name)
            keeper.remove()
        for key in self._observation.unclaimed(living.values()):
            self._observation.detach(key)
        for workload in living.values():
            if workload.id not in self._keepers:
                log.info("workload found", workload=workload.name, meshed=workload.meshed)
                node_id = f"{workload.name}.{self._config.node}"
                self._keepers[workload.id] = Keeper(
                    workload, self._directory(workload), self._envoy, node_id
                )
            self._keepers[workload.id].update(workload)
            self._observation.attach(workload)

    async def _leaves(self, workloads: Iterable[Workload]) -> dict[str, LeafMaterial]:
        """New leaf certificates for the workloads that need one."""
        leaves: dict[str, LeafMaterial] = {}
        for workload in workloads:
            if not workload.meshed:
                continue
            try:
                if not self._keepers[workload.id].needs_leaf(time.time(), self._identity(workload)):
                    continue
                self._roots_pem = await self._catalog.roots()
                leaf = await self._catalog.leaf(workload.service, self._config.leaf_lifetime)
            except TidegateError as error:
                self._tell(f"leaf {workload.name}", f"no leaf for {workload.name}: {error}")
            else:
                leaves[workload.id] = leaf
                self._problems.pop(f"leaf {workload.name}", None)
        return leaves

    def _identity(self, workload: Workload) -> str:
        return spiffe.service_id(
            self._config.trust_domain,
            workload.service,
            workload.namespace,
            self._config.datacenter,
        )

    def _reconcile(
        self,
        workloads: Iterable[Workload],
        snapshot: Snapshot,
        intents: dict[str, ServiceIntent],
        leaves: dict[str, LeafMaterial],
    ) -> None:
        for workload in workloads:
            keeper = self._keepers[workload.id]
            if not workload.meshed:
                keeper.reconcile(None)
                continue
            if not self._intent.known:
                continue
            intent = intents[workload.service]
            try:
                spec = sidecar_spec(
                    self._config, workload, intent, intents, snapshot.instances, keeper.spec
                )
            except TidegateError as error:
                self._tell(f"spec {workload.name}", f"{workload.name} cannot be meshed: {error}")
                continue
            self._problems.pop(f"spec {workload.name}", None)
            leaf = leaves.get(workload.id)
            keeper.reconcile(
                Wanted(spec=spec, index=intent.index, leaf=leaf, roots_pem=self._roots_pem)
            )

    async def _publish(self, snapshot: Snapshot) -> None:
        """Tells the catalog what its answer does not say yet."""
        own = [published(keeper, self._config) for keeper in self._keepers.values()]
        known = {
            one.id: one
            for one in snapshot.instances
            if one.node == self._config.node and not one.seen_until
        }
        news = [one for one in own if not is_published(one, known)]
        gone = [one for one in known if one not in self._keepers]
        address = self._config.node_addresses[0] if self._config.node_addresses else "127.0.0.1"
        node = NodeInfo(
            name=self._config.node, address=address, agent_api=f"unix://{self._config.socket}"
        )
        try:
            if news:
                await self._catalog.register(node, news)
            for instance_id in gone:
                await self._catalog.deregister(self._config.node, instance_id)
        except TidegateError as error:
            self._tell("publish", f"the catalog does not have the latest of this node: {error}")
        else:
            self._problems.pop("publish", None)

    def _collect(self) -> None:
        self._observation.collect(time.time(), self._keepers.values())

    async def _evidence(self, service: str, window_s: float) -> NodeEvidence:
        """Evidence up to this moment: a round of reading comes first."""

        def read() -> NodeEvidence:
            self._collect()
            now = time.time()
            return self._observation.evidence(service, now - window_s, now, self._keepers)

        return await self._work(read)

    async def _flows(self, window_s: float | None) -> NodeFlows:
        def read() -> NodeFlows:
            self._collect()
            now = time.time()
            since = now - window_s if window_s else 0.0
            return self._observation.flows(since, now, self._keepers)

        return await self._work(read)

    async def _status(self) -> Status:
        def read() -> Status:
            return Status(
                node=self._config.node,
                round_at=self._round_at,
                workloads=tuple(self._workload_status(one) for one in self._keepers.values()),
                problems=(
                    *self._problems.values(),
                    *self._intent.problems(),
                    *self._source.problems(),
                    *self._observation.problems(),
                ),
            )

        return await self._work(read)

    def _workload_status(self, keeper: Keeper) -> WorkloadStatus:
        workload = keeper.workload
        unobserved = self._observation.problem(workload)
        state = keeper.sidecar
        return WorkloadStatus(
            id=workload.id,
            name=workload.name,
            service=workload.service,
            wanted_in_mesh=workload.meshed,
            meshed=keeper.in_mesh,
            redirect=keeper.redirection,
            state=state.phase if keeper.spec else "",
            pid=state.pid,
            restarts=state.restarts,
            last_exit=state.last_exit,
            mode=keeper.mode if keeper.in_mesh else "",
            observed_since=self._observation.observed_since(workload) or 0.0,
            problem="; ".join((*keeper.problems, *((unobserved,) if unobserved else ()))),
        )

    def _directory(self, workload: Workload) -> Path:
        """The sidecar's directory: short, and another one for another workload of the same name."""
        digest = hashlib.sha256(workload.id.encode()).hexdigest()[:8]
        return self._config.run_dir / "sidecars" / f"{workload.name}-{digest}"

    async def _work(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **kwargs))

    def _tell(self, what: str, problem: str) -> None:
        if self._problems.get(what) != problem:
            log.warning(problem)
        self._problems[what] = problem


def _intents(snapshot: Snapshot, workloads: Iterable[Workload]) -> dict[str, ServiceIntent]:
    services = {one.service for one in snapshot.instances}
    services.update(workload.service for workload in workloads)
    return resolve(snapshot.entries, sorted(services), snapshot.default_allow)


def sidecar_spec(
    config: AgentConfig,
    workload: Workload,
    intent: ServiceIntent,
    intents: dict[str, ServiceIntent],
    instances: Iterable[Instance],
    present: SidecarSpec | None,
) -> SidecarSpec:
    """What the sidecar of `workload` should do. `present` is what it does now.

    An instance becomes reachable with mTLS only when it has published that its sidecar runs the intention that
    allows it; one that is reachable already stays so while the intention lasts.
    """
    reached = {
        (upstream.service, endpoint.address)
        for upstream in (present.upstreams if present else ())
        for endpoint in upstream.endpoints
    }
    living = sorted(
        (one for one in instances if one.meshed and one.port and not one.seen_until),
        key=lambda one: one.id,
    )
    upstreams = []
    for service in upstreams_of(workload.service, intents):
        callees = [one for one in living if one.service == service and one.id != workload.id]
        endpoints = tuple(
            Endpoint(address=address, service_port=one.port, proxy_port=one.inbound_port)
            for one in callees
            for address in one.addresses
            if one.applied_index >= intents[service].index or (service, address) in reached
        )
        if endpoints:
            upstreams.append(
                Upstream(
                    service=service,
                    namespace=callees[0].namespace,
                    datacenter=config.datacenter,
                    port=endpoints[0].service_port,
                    endpoints=endpoints,
                )
            )
    return SidecarSpec(
        service=workload.service,
        namespace=workload.namespace,
        datacenter=config.datacenter,
        trust_domain=config.trust_domain,
        mode=intent.mode,
        service_ports=(workload.port,) if workload.port else (),
        intentions=intent.intentions,
        default_allow=intent.default_allow,
        mesh_destinations_only=intent.mesh_destinations_only,
        upstreams=tuple(upstreams),
    )
