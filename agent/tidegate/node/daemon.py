"""The agent of one node: one level-triggered loop over its workloads.

Each round: ask the sources who lives here; observe every workload; move each towards what it should be; read the
evidence. What the intent server has to say, and to be told, goes on beside it, and so does the beginning of
observation, for which the kernel takes its time. Work that blocks runs in other threads: that on a single workload
(rules, its sidecar) in those of a pool, so that a slow one holds up no other; all else (eBPF, SQLite) in one worker
thread, piece by piece, so that nothing of it needs a lock. Stopping leaves rules, programs, maps and sidecars in place.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, assert_never

from tidegate.catalog.client import CatalogClient, Snapshot
from tidegate.durations import span
from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import TidegateError
from tidegate.intent.policy import Policy
from tidegate.intent.resolve import resolve
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError
from tidegate.kernel.memory import give_back
from tidegate.model import Instance, ServiceIntent, Sidecar, Workload
from tidegate.node import api, notify
from tidegate.node.census import Census
from tidegate.node.config import AgentConfig
from tidegate.node.drift import Drift
from tidegate.node.events import StoppedError, first_of, unless
from tidegate.node.exchange import Exchange
from tidegate.node.guard import Guard
from tidegate.node.intent import IntentSource
from tidegate.node.keeper import Keeper, WantedRules
from tidegate.node.keepers import Keepers
from tidegate.node.log import Log
from tidegate.node.mesh import LocalEvidence, MeshView, NodeEvidence, NodeFlows
from tidegate.node.metrics import Metrics, NodeState
from tidegate.node.observation import Observation
from tidegate.node.peers import Peers
from tidegate.node.pool import Pool
from tidegate.node.problems import Problems
from tidegate.node.pulse import Pulse
from tidegate.node.redirection import Redirection
from tidegate.node.sidecar import Wanted
from tidegate.node.sources import Sources
from tidegate.node.status import RedirectState, Status, WorkloadStatus
from tidegate.node.wanted import Neighbours, agreed_policy, neighbours, sidecar_spec
from tidegate.verdict import names

if TYPE_CHECKING:
    from tidegate.catalog.kubernetes import CustomResources
    from tidegate.workloads.kubernetes.source import KubernetesSource

ROUND_S = 0.5
SETTLING_ROUND_S = 0.05
"""The pace while a sidecar takes in what it was told: an onboarding or a flip should not wait for the clock."""
AWAITING_S = 0.05
"""How often it is looked whether a sidecar listens by now that outbound connections pass until then."""
SOURCE_PAUSE_S = 1.0
"""How soon a source's work in the background is begun again that came upon a defect."""
OBSERVE_S = 0.02
"""After how long in which workloads were begun to be observed the worker does what else there is."""
GIVE_BACK_S = 5.0
"""How often memory is given back that the agent's start, or taking workloads in or out, has taken for a while."""

_P = ParamSpec("_P")
_T = TypeVar("_T")

log = Log("daemon")


class Daemon:
    """The parts of one agent and the round that moves them."""

    @classmethod
    async def open(cls, config: AgentConfig, catalog: CatalogClient) -> "Daemon":
        """Opens the evidence; what a former agent left is found again."""
        worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="worker")
        try:
            loop = asyncio.get_running_loop()
            observation = await loop.run_in_executor(worker, Observation, config)
            return cls(config, catalog, worker, observation)
        except BaseException:
            worker.shutdown()
            raise

    def __init__(
        self,
        config: AgentConfig,
        catalog: CatalogClient,
        worker: concurrent.futures.Executor,
        observation: Observation,
    ) -> None:
        """`observation` is used in the one thread of `worker` only. To be made in the event loop that it runs in."""
        self._config = config
        self._worker = worker
        self._observation = observation
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._looked = asyncio.Event()
        """Set after each round: there may be something to publish."""
        self._problems = Problems()
        self._metrics = Metrics()
        self.pulse = Pulse()
        self._sources = Sources(config)
        self._census = Census(
            config.node,
            self._sources.by_name,
            config.state_dir / "aliases.json",
            self._problems,
            self._sources.is_leaving,
        )
        self._resources = _custom_resources(config)
        self._intent = IntentSource(catalog, config.state_dir / "intent.json", self._resources)
        self._engine = Engine(config.redirect.backend)
        self._pool = Pool()
        self._drift = Drift(self._pool)
        self._keepers = Keepers(config, self._engine, self._pool, self._problems, self._metrics)
        self._exchange = Exchange(config, catalog, self._intent, self._problems, self._woken.set)
        self._cni = self._sources.cni_server(
            self._engine,
            wake=self.wake,
            is_ready=lambda: self._is_ready,
            policy_in_force=self._policy_in_force,
            metrics=self._metrics,
        )
        self._instances: tuple[Instance, ...] = ()
        self._known = neighbours(())
        """What is known of `_instances`."""
        self._unobserved: collections.deque[Workload] = collections.deque()
        """What the latest round found and is still to be observed."""
        self._found = asyncio.Event()
        """Set when a round knows what is to be observed, and has asked for the rules of all."""
        self._given_back_at = 0.0
        self._round_at = 0.0
        self._is_ready = False
        """Whether it has looked at everything once."""
        self._collecting_since = 0.0
        """When the latest reading of the evidence began, by the monotonic clock."""
        local = LocalEvidence(self._evidence, self._flows)
        self._peers = Peers(config, catalog, self._intent, self._problems)
        self._peer_app = api.make_peer_app(local)
        self._mesh = MeshView(config, self._intent, catalog, local, self._peers.towards)
        self._guard = Guard(self._mesh, config.state_dir / "guards", config.drain_time)
        self.app = api.make_app(
            self._mesh, local, self._guard, self._status, self.exposition, self.pulse
        )

    async def close(self) -> None:
        """Ends this process's part; what it set up stays."""
        await self._guard.stop()
        await asyncio.to_thread(self._census.close)
        await asyncio.to_thread(self._pool.close)
        await self._work(self._observation.close)
        self._drift.close()
        self._worker.shutdown()

    def wake(self) -> None:
        """Begin a round at once: a source has news. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._woken.set)

    async def run(self, stop: asyncio.Event) -> None:
        """Round after round until `stop`; a round that fails is told and tried again."""
        self._guard.resume()
        async with contextlib.AsyncExitStack() as stack:
            if self._cni is not None:
                await stack.enter_async_context(self._cni.running())
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            tasks.create_task(self._rounds(stop))
            tasks.create_task(self._observing(stop))
            tasks.create_task(self._exchanging(stop))
            tasks.create_task(self._drift.run(stop))
            tasks.create_task(self._peers.run(self._peer_app, stop))
            tasks.create_task(self._follow_kubernetes("pods", self._sources.kubernetes, stop))
            tasks.create_task(self._follow_kubernetes("custom resources", self._resources, stop))

    async def _follow_kubernetes(
        self, what: str, followed: "KubernetesSource | CustomResources | None", stop: asyncio.Event
    ) -> None:
        """A defect in what goes on in the background is told, and it is begun anew."""
        while followed is not None and not stop.is_set():
            with self._problems.defects_told(f"watch of {what}", "", f"the watch of {what}"):
                try:
                    await followed.run(stop, self.wake)
                except (TidegateError, KernelError, OSError) as error:
                    self._problems.tell(
                        f"watch of {what} failed", f"{what} cannot be followed: {error}"
                    )
            await first_of(SOURCE_PAUSE_S, stop)

    async def _rounds(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._woken.clear()
            is_whole = await self._tried("round", self._round(stop))
            self.pulse.beat(whole=is_whole and self._is_ready)
            notify.watchdog()
            self._looked.set()
            await self._pause(stop)

    async def _tried(self, what: str, work: Coroutine[Any, Any, None]) -> bool:
        """Does the work; whether it could be done. What went wrong is told."""
        try:
            await work
        except StoppedError:
            return False
        except (TidegateError, KernelError, OSError) as error:
            self._problems.tell(what, str(error))
            return False
        except Exception as error:
            # The kernel and the sidecars go on; an agent that is gone would help nobody.
            log.exception(f"a {what} failed by a defect of the agent", error)
            self._problems.tell(what, f"a {what} failed by a defect of the agent; see its log")
            return False
        self._problems.clear(what)
        return True

    async def _pause(self, stop: asyncio.Event) -> None:
        """Until the next round; meanwhile it is looked for sidecars that outbound connections wait for."""
        settling = any(keeper.is_settling for keeper in self._keepers.all)
        until = time.monotonic() + (SETTLING_ROUND_S if settling else ROUND_S)
        while (
            (left := until - time.monotonic()) > 0
            and not stop.is_set()
            and not self._woken.is_set()
        ):
            awaits = any(keeper.awaits_sidecar for keeper in self._keepers.all)
            await first_of(min(left, AWAITING_S) if awaits else left, stop, self._woken)
            if awaits:
                await self._work(self._keepers.look_for_sidecars)

    async def _round(self, stop: asyncio.Event) -> None:
        """Work that has begun is completed before it stops."""
        with self._metrics.round():
            snapshot = self._intent.current()
            workloads = await self._work(self._census.take)
            intents = _intents(snapshot, workloads)
            known = self._neighbours(snapshot.instances)
            if known.faults:
                self._problems.tell("catalog", f"not called with mTLS: {'; '.join(known.faults)}")
            else:
                self._problems.clear("catalog")
            await self._work(self._follow, workloads, snapshot)
            asked = await self._work(self._reconcile, workloads, known, intents)
            self._found.set()
            await self._work(self._keepers.wait, asked)
            self._drift.follow(self._keepers.staying)
            if stop.is_set():
                raise StoppedError
            await self._work(self._collect)
            if time.monotonic() - self._given_back_at > GIVE_BACK_S:
                self._given_back_at = time.monotonic()
                await self._work(give_back)
        self._round_at = time.time()
        if not self._is_ready and self._keepers.have_been_tried:
            self._is_ready = True
            notify.ready()

    async def _exchanging(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._looked.clear()
            await self._tried("exchange with the intent server", self._exchange_once(stop))
            await first_of(ROUND_S, stop, self._looked)

    async def _exchange_once(self, stop: asyncio.Event) -> None:
        snapshot = await unless(stop, self._exchange.refresh())
        if not self._round_at:
            return
        free = await self._work(lambda: self._keepers.idle)
        await unless(stop, self._exchange.fetch_leaves(free))
        staying = await self._work(lambda: self._keepers.staying)
        is_complete = self._census.is_complete
        await unless(stop, self._exchange.publish(snapshot, staying, is_complete=is_complete))

    def _neighbours(self, instances: tuple[Instance, ...]) -> Neighbours:
        """The same object as before while the catalog answers the same."""
        if self._instances is not instances:
            self._instances, self._known = instances, neighbours(instances)
        return self._known

    def _follow(self, workloads: Iterable[Workload], snapshot: Snapshot) -> None:
        """Takes in which workloads there are, and has removed what is gone."""
        self._observation.labels.replace(snapshot.instances)
        living = {workload.id: workload for workload in workloads}
        self._observation.look(living.values())
        is_complete = self._census.is_complete
        keys = {keeper.workload.key for keeper in self._keepers.remove_gone(living)}
        for key in self._observation.unclaimed(living.values()):
            if is_complete or key in keys:
                self._observation.detach(key)
        self._keepers.remove_abandoned(living.values(), look=is_complete)
        for workload in living.values():
            if self._keepers.is_leaving(workload):
                continue
            with self._problems.defects_told("description", workload.id, workload.name):
                self._keepers.take_in(workload)
        self._unobserved = collections.deque(self._observation.unobserved(living.values()))

    async def _observing(self, stop: asyncio.Event) -> None:
        """After each round, and while the next ones go on: what they need the worker for comes in between."""
        while not stop.is_set():
            self._found.clear()
            await self._tried("beginning to observe", self._observe(stop))
            await first_of(None, stop, self._found)

    async def _observe(self, stop: asyncio.Event) -> None:
        while not stop.is_set() and self._unobserved:
            await self._work(self._observe_some)

    def _observe_some(self) -> None:
        until = time.monotonic() + OBSERVE_S
        while self._unobserved:
            workload = self._unobserved.popleft()
            if not self._keepers.is_leaving(workload):
                self._observation.attach(workload)
            if time.monotonic() > until:
                return

    def _reconcile(
        self,
        workloads: Iterable[Workload],
        known: Neighbours,
        intents: dict[str, ServiceIntent],
    ) -> list[str]:
        """Has a step taken with each; what to wait for."""
        asked = []
        for workload in workloads:
            keeper = self._keepers.free(workload)
            if keeper is None:
                continue
            if not workload.meshed:
                asked.append(self._keepers.submit(keeper, None))
                for what in ("leaf", "spec", "sidecar"):
                    self._problems.clear(what, workload.id)
                continue
            with self._problems.defects_told("sidecar", workload.id, workload.name):
                wanted = self._wanted(keeper, known, intents)
                if wanted is not None:
                    asked.append(self._keepers.submit(keeper, wanted))
                    self._exchange.taken(workload)
        return asked

    def _wanted(
        self, keeper: Keeper, known: Neighbours, intents: dict[str, ServiceIntent]
    ) -> Wanted | WantedRules | None:
        """What should be of a meshed workload now; what is already where that would be impossible."""
        workload = keeper.workload
        match workload.sidecar:
            case Sidecar.OWN:
                return self._wanted_of_own(keeper, intents[workload.service])
            case Sidecar.TIDEGATE:
                return self._wanted_sidecar(keeper, known, intents) if self._intent.known else None
            case _:
                assert_never(workload.sidecar)

    def _wanted_of_own(self, keeper: Keeper, intent: ServiceIntent) -> WantedRules:
        """Rules at once, whether or not there is a server to say what should be."""
        workload, policy = keeper.workload, keeper.described
        if policy is not None and self._intent.known:
            try:
                policy = agreed_policy(policy, intent)
            except TidegateError as error:
                problem = f"{workload.name} is redirected as its annotations say: {error}"
                self._problems.tell("spec", problem, workload.id)
            else:
                self._problems.clear("spec", workload.id)
        return WantedRules(policy=policy, index=intent.index, mode=intent.mode)

    def _wanted_sidecar(
        self, keeper: Keeper, known: Neighbours, intents: dict[str, ServiceIntent]
    ) -> Wanted | None:
        workload = keeper.workload
        try:
            policy = keeper.described
            if policy is not None:
                policy = agreed_policy(policy, intents[workload.service])
            spec = sidecar_spec(self._config, workload, policy, intents, known, keeper.spec)
        except TidegateError as error:
            if keeper.spec is None:
                problem = f"{workload.name} cannot be meshed: {error}"
                self._problems.tell("spec", problem, workload.id)
                return None
            problem = f"the sidecar of {workload.name} stays as it is: {error}"
            self._problems.tell("spec", problem, workload.id)
            return Wanted(
                spec=keeper.spec,
                index=keeper.applied_index,
                roots_pem=self._exchange.roots_pem,
                root_id=self._exchange.root_id,
                policy=keeper.policy,
            )
        self._problems.clear("spec", workload.id)
        return Wanted(
            spec=spec,
            index=max(intents[one.service].index for one in spec.services),
            roots_pem=self._exchange.roots_pem,
            root_id=self._exchange.root_id,
            policy=policy,
            leaves=self._exchange.leaves(workload),
        )

    def _policy_in_force(self, netns_path: str) -> Policy | None:
        """By which the workload in a namespace is redirected; None where none is."""
        place = netns.identity(netns_path)
        return next(
            (one.policy for one in self._keepers.all if one.in_mesh and one.namespace == place),
            None,
        )

    def _collect(self) -> None:
        self._collecting_since = time.monotonic()
        self._observation.collect(time.time(), self._keepers.all)

    async def _evidence(self, service: str, window_s: float) -> NodeEvidence:
        def read() -> NodeEvidence:
            now = time.time()
            return self._observation.evidence(service, now - window_s, now, self._keepers.by_id)

        return await self._up_to_now(read)

    async def _flows(self, window_s: float | None) -> NodeFlows:
        def read() -> NodeFlows:
            now = time.time()
            since = 0.0 if window_s is None else now - window_s
            return self._observation.flows(since, now, self._keepers.by_id)

        return await self._up_to_now(read)

    async def _up_to_now(self, read: Callable[[], _T]) -> _T:
        """Evidence up to this moment: a round of reading comes first."""
        if not self._round_at:
            raise TidegateError(f"the agent of {self._config.node} has not looked around yet")

        asked_at = time.monotonic()

        def collected() -> _T:
            # Of many questions that come at once the first reads for all.
            if self._collecting_since < asked_at:
                self._collect()
            return read()

        try:
            return await self._work(collected)
        except KernelError as error:
            raise TidegateError(f"the kernel's counts cannot be read: {error}") from error

    async def _status(self) -> Status:
        def read() -> Status:
            return Status(
                node=self._config.node,
                trust_domain=self._config.trust_domain,
                profile=self._config.profile,
                round_at=self._round_at,
                workloads=tuple(self._workload_status(one) for one in self._keepers.all),
                left_alone=self._census.left_alone,
                problems=(
                    *self._problems,
                    *self._keepers.problems(),
                    *self._intent.problems(),
                    *self._guard.problems(),
                    *self._census.problems(),
                    *(self._cni.problems() if self._cni is not None else ()),
                    *self._observation.problems(),
                    *self._drift.problems(),
                ),
            )

        return await self._work(read)

    async def exposition(self) -> bytes:
        """All metrics, as a scrape is answered."""
        workloads = [keeper.workload for keeper in self._keepers.all]
        state = NodeState(
            status=await self._status(),
            observed=await self._work(self._observation.observed, workloads),
            backend=self._backend(),
            intent_at=self._intent.answered_at,
            watch=self._sources.watch,
        )
        return self._metrics.exposition(state)

    def _backend(self) -> str:
        try:
            return self._engine.choice.backend
        except KernelError:
            return ""

    def _workload_status(self, keeper: Keeper) -> WorkloadStatus:
        workload = keeper.workload
        unobserved = self._observation.problem(workload)
        state = keeper.sidecar
        return WorkloadStatus(
            id=workload.id,
            name=workload.name,
            namespace=workload.namespace,
            service=workload.service,
            wanted_in_mesh=workload.meshed,
            meshed=keeper.in_mesh,
            netns=workload.netns,
            annotations=workload.annotations,
            namespace_annotations=workload.namespace_annotations,
            policy=keeper.policy,
            redirect=_state_of(keeper),
            repairs=keeper.redirection.repairs(0.0),
            last_repair=keeper.redirection.last_repair,
            notes=keeper.redirection.notes,
            sidecar=workload.sidecar,
            state=state.phase if keeper.spec else "",
            pid=state.pid,
            restarts=state.restarts,
            last_exit=state.last_exit,
            mode=keeper.mode if keeper.in_mesh else "",
            observed_since=self._observation.observed_since(workload) or 0.0,
            closed=keeper.closed,
            reason=_reason_of(keeper),
            problem="; ".join((*keeper.problems, *((unobserved,) if unobserved else ()))),
        )

    async def _work(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **kwargs))


def _custom_resources(config: AgentConfig) -> "CustomResources | None":
    """The config entries, where they are those of a cluster; what a node does without is not imported."""
    if config.kubernetes is None or not config.kubernetes.config_entries:
        return None
    from tidegate.catalog.kubernetes import CustomResources

    return CustomResources(config.kubernetes.access)


def _intents(snapshot: Snapshot, workloads: Iterable[Workload]) -> dict[str, ServiceIntent]:
    services = {service for one in snapshot.instances for service in names.services_of(one)}
    services.update(service for workload in workloads for service in names.services_of(workload))
    services.update(upstream for one in snapshot.instances for upstream in one.upstreams)
    return resolve(snapshot.entries, sorted(services), snapshot.default_allow)


def _state_of(keeper: Keeper) -> RedirectState:
    match keeper.redirection.state:
        case Redirection.NONE:
            return RedirectState.NONE
        case Redirection.WAITING:
            return RedirectState.WAITING
        case Redirection.APPLIED:
            return RedirectState.DRIFTED if keeper.redirection.unseen else RedirectState.OK
        case Redirection.FAILED:
            return RedirectState.FAILED
        case Redirection.BLOCKED:
            return RedirectState.BLOCKED
        case state:
            assert_never(state)


def _reason_of(keeper: Keeper) -> str:
    """Why it is in the mesh or not, and, of one that brings its sidecar, what it did before it was redirected."""
    parts = [keeper.workload.reason]
    if keeper.has_own_sidecar and keeper.in_mesh:
        since = keeper.begun_at
        ran = since - keeper.workload.created_at
        if since and keeper.workload.created_at and ran > 0:
            parts.append(f"it had run for {span(ran)} when it was redirected")
        elif since:
            parts.append("it ran already when it was redirected")
        if keeper.awaits_sidecar:
            parts.append("what it opens passes until its sidecar listens")
    return "; ".join(part for part in parts if part)
