"""The agent of one node: one level-triggered loop over its workloads, and the API beside it.

Each round: read intent and workloads; observe every workload; move each towards what it should be; publish what is;
read the evidence. Work that blocks runs in other threads: that on a single workload (rules, its sidecar) in those of a
pool, so that a slow one holds up no other; all else (files, eBPF, SQLite) in one worker thread, so that nothing of it
needs a lock. Stopping leaves rules, programs, maps and sidecars in place.
"""

import asyncio
import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
from aiohttp import web

from tidegate.catalog.client import CatalogClient, CatalogRefused, LeafMaterial, Snapshot
from tidegate.catalog.registration import NodeInfo, is_published
from tidegate.catalog.settings import ServerConfig
from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar import envoy
from tidegate.enforce.sidecar.closed import ClosedDestination
from tidegate.errors import TidegateError
from tidegate.identity import spiffe
from tidegate.intent.policy import Policy
from tidegate.intent.resolve import resolve
from tidegate.kernel.errors import KernelError
from tidegate.kernel.memory import give_back, use_one_arena
from tidegate.model import Instance, ServiceIntent, Workload
from tidegate.node import api
from tidegate.node.config import AgentConfig
from tidegate.node.drift import Drift
from tidegate.node.events import StoppedError, first_of, unless
from tidegate.node.guard import Guard
from tidegate.node.intent import IntentSource
from tidegate.node.keeper import Keeper, Wanted, abandoned
from tidegate.node.log import Log
from tidegate.node.mesh import LocalEvidence, MeshView, NodeEvidence, NodeFlows
from tidegate.node.observation import Observation, published
from tidegate.node.pool import Pool
from tidegate.node.wanted import Neighbours, agreed_policy, neighbours, sidecar_spec
from tidegate.verdict import names
from tidegate.workloads.files import FileSource

ROUND_S = 0.5
SETTLING_ROUND_S = 0.05
"""The pace while a sidecar takes in what it was told: an onboarding or a flip should not wait for the clock."""
GIVE_BACK_S = 5.0
"""How often memory is given back that the agent's start, or taking workloads in or out, has taken for a while."""
LINGER_S = 2.0
"""How long a child may outlive an agent that was killed; it holds what the agent held alone."""
PATIENCE_S = 0.3
"""How long a round waits for the work on the workloads that it has asked for; it goes on beside later rounds."""

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
    netns: str
    annotations: dict[str, str]
    namespace_annotations: dict[str, str]
    policy: Policy | None
    """What is redirected when it is meshed: the latest policy that had no fault."""
    redirect: str
    repairs: int
    """How often somebody changed the redirection and it was repaired, since this agent runs."""
    last_repair: str
    """What was different then."""
    notes: tuple[str, ...]
    """What goes around the sidecar although the redirection is as it should be."""
    state: str
    """Of the sidecar; empty while there is none."""
    pid: int
    restarts: int
    last_exit: str
    mode: str
    observed_since: float
    """0 while it is not observed."""
    closed: tuple[ClosedDestination, ...]
    """What the application tried to reach outside the mesh while only mesh destinations were open to it."""
    problem: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/status."""

    node: str
    trust_domain: str
    round_at: float
    """When the last round was completed; 0 before the first."""
    workloads: tuple[WorkloadStatus, ...]
    problems: tuple[str, ...]


async def run_agent(config: AgentConfig) -> None:
    """Runs until SIGTERM or SIGINT. TidegateError or KernelError when the agent cannot start."""
    use_one_arena()
    _make_directories(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        for directory in (config.run_dir, config.state_dir, config.bpffs):
            stack.enter_context(held_alone(directory))
        listener = api.listen(config.socket)
        stack.callback(_hang_up, config.socket, listener)
        if config.embedded_server is not None:
            await stack.enter_async_context(_embedded(config.embedded_server))
        catalog = await stack.enter_async_context(CatalogClient(config.server, config.consul))
        daemon = await Daemon.open(config, catalog)
        stack.push_async_callback(daemon.close)
        runner = web.AppRunner(daemon.app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()
        log.info("agent started", node=config.node, server=config.server)
        await daemon.run(stop)
    log.info("agent stopped; rules, programs and sidecars stay", node=config.node)


@contextlib.asynccontextmanager
async def _embedded(config: ServerConfig) -> AsyncIterator[None]:
    """The intent server in this process. Agents without one do without its CA, which takes memory."""
    from tidegate.catalog.server import running

    async with running(config):
        yield


def _make_directories(config: AgentConfig) -> None:
    """The proxy user has to pass run_dir to its sidecar's directory; nobody has to see the rest."""
    for directory, mode in (
        (config.run_dir, 0o711),
        (config.state_dir, 0o700),
        (config.bpffs, 0o700),
    ):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
        except OSError as error:
            hint = "" if directory != config.bpffs else "; is a BPF file system mounted there?"
            raise TidegateError(f"{directory} cannot be used: {error.strerror}{hint}") from error


@contextlib.contextmanager
def held_alone(directory: Path) -> Iterator[None]:
    """Nobody else holds the directory meanwhile. TidegateError when another agent does: two undo each other.

    The kernel lets go of it with the process, however that ends (flock(2)). A BPF file system has no files, so what is
    locked is the directory itself; who has it stands in a file beside, where there can be one.
    """
    holder = directory / "agent.pid"
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TidegateError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            who = f" (process {pid})" if (pid := _written(holder)) else ""
            raise TidegateError(f"another agent{who} uses {directory}") from error
        except OSError as error:
            raise TidegateError(f"{directory} cannot be locked: {error.strerror}") from error
        with contextlib.suppress(OSError):
            holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        os.close(descriptor)


def _written(holder: Path) -> str:
    """The process that a directory's holder has written down; empty where that cannot be told."""
    try:
        told = holder.read_text(errors="replace")[:20].strip()
    except OSError:
        return ""
    return told if told.isdecimal() else ""


def _lock(descriptor: int) -> None:
    until = time.monotonic() + LINGER_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def _hang_up(path: Path, listener: socket.socket) -> None:
    listener.close()
    path.unlink(missing_ok=True)


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
        """`observation` is used in the one thread of `worker` only."""
        self._config = config
        self._catalog = catalog
        self._worker = worker
        self._observation = observation
        self._source = FileSource(config.workloads)
        self._intent = IntentSource(catalog, config.state_dir / "intent.json")
        self._envoy = envoy.binary()
        self._engine = Engine(config.redirect.backend)
        self._pool = Pool()
        self._drift = Drift(self._pool)
        self._keepers: dict[str, Keeper] = {}
        self._leaving: set[str] = set()
        """Ids of workloads that are gone and are being removed."""
        self._abandoned: dict[Path, Keeper] = {}
        """What former agents left of workloads that are gone, by directory, until it is removed."""
        self._instances: tuple[Instance, ...] = ()
        self._known = neighbours(())
        """What is known of `_instances`."""
        self._given_back_at = 0.0
        self._roots_pem = ""
        self._round_at = 0.0
        self._collecting_since = 0.0
        """When the latest reading of the evidence began, by the monotonic clock."""
        self._problems: dict[tuple[str, str], str] = {}
        """By what it is about and whom it is about, as `_tell` has it."""
        local = LocalEvidence(self._evidence, self._flows)
        self._mesh = MeshView(config, self._intent, catalog, local)
        self._guard = Guard(self._mesh, config.state_dir / "guards", config.drain_time)
        self.app = api.make_app(self._mesh, local, self._guard, self._status)

    async def close(self) -> None:
        """Ends this process's part; what it set up stays."""
        await self._guard.stop()
        await asyncio.to_thread(self._pool.close)
        await self._work(self._observation.close)
        self._drift.close()
        self._worker.shutdown()

    async def run(self, stop: asyncio.Event) -> None:
        """Round after round until `stop`; a round that fails is told and tried again."""
        self._guard.resume()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._rounds(stop))
            tasks.create_task(self._drift.run(stop))

    async def _rounds(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self._round(stop)
            except StoppedError:
                return
            except (TidegateError, KernelError, OSError) as error:
                self._tell("round", str(error))
            except Exception as error:
                # The kernel and the sidecars go on; an agent that is gone would help nobody.
                log.exception("a round failed by a defect of the agent", error)
                self._tell("round", "a round failed by a defect of the agent; see its log")
            else:
                self._clear("round")
            settling = any(keeper.is_settling for keeper in self._keepers.values())
            await first_of(SETTLING_ROUND_S if settling else ROUND_S, stop)

    async def _round(self, stop: asyncio.Event) -> None:
        """StoppedError when it is to stop while it waits for the server; work that has begun is completed before."""
        snapshot = await unless(stop, self._intent.refresh())
        workloads = await self._work(self._source.list)
        intents = _intents(snapshot, workloads)
        known = self._neighbours(snapshot.instances)
        if known.faults:
            self._tell("catalog", f"not called with mTLS: {'; '.join(known.faults)}")
        else:
            self._clear("catalog")
        await self._work(self._follow, workloads, snapshot)
        leaves = await unless(stop, self._leaves(workloads))
        await self._work(self._reconcile, workloads, known, intents, leaves)
        self._drift.follow(
            keeper for key, keeper in self._keepers.items() if key not in self._leaving
        )
        await unless(stop, self._publish(snapshot))
        await self._work(self._collect)
        if time.monotonic() - self._given_back_at > GIVE_BACK_S:
            self._given_back_at = time.monotonic()
            await self._work(give_back)
        self._round_at = time.time()

    def _neighbours(self, instances: tuple[Instance, ...]) -> Neighbours:
        """The same object as before while the catalog answers the same."""
        if self._instances is not instances:
            self._instances, self._known = instances, neighbours(instances)
        return self._known

    def _follow(self, workloads: Iterable[Workload], snapshot: Snapshot) -> None:
        """Takes in which workloads there are; observes them all."""
        self._observation.labels.replace(snapshot.instances)
        living = {workload.id: workload for workload in workloads}
        self._observation.look(living.values())
        # A workload whose file cannot be read is not in the list of an agent that has just started.
        complete = not self._source.problems()
        keys = {keeper.workload.key for keeper in self._gone(living)}
        for key in self._observation.unclaimed(living.values()):
            if complete or key in keys:
                self._observation.detach(key)
        self._remove_abandoned(living.values(), look=complete)
        for workload in living.values():
            if workload.id in self._leaving:
                continue
            with self._defects_told("description", workload):
                self._take_in(workload)
            self._observation.attach(workload)

    def _take_in(self, workload: Workload) -> None:
        """The workload has a keeper that knows its description, unless another one still works in its place."""
        if self._pool.is_busy(workload.id) or self._is_being_cleared(workload):
            return
        if workload.id not in self._keepers:
            log.info("workload found", workload=workload.name, meshed=workload.meshed)
            self._keepers[workload.id] = Keeper(
                workload,
                self._directory(workload),
                self._envoy,
                f"{workload.name}.{self._config.node}",
                self._engine,
                self._config.redirect,
                self._config.drain_time,
            )
        keeper = self._keepers[workload.id]
        if keeper.is_of(workload):
            keeper.update(workload)

    def _gone(self, living: Mapping[str, Workload]) -> list[Keeper]:
        """Has workloads removed that are gone, called otherwise or elsewhere; those of which nothing is left.

        What cannot be removed is tried again: the kernel may refuse now and let it go later.
        """
        for key, keeper in self._keepers.items():
            stays = key in living and keeper.is_of(living[key])
            if (stays and key not in self._leaving) or keeper.is_removed:
                continue
            if self._pool.submit(key, keeper.remove) and key not in self._leaving:
                log.info(
                    "workload gone", workload=keeper.workload.name, netns=keeper.workload.netns
                )
                self._leaving.add(key)
        self._pool.wait(self._leaving, PATIENCE_S)
        gone = [
            keeper
            for key, keeper in self._keepers.items()
            if key in self._leaving and keeper.is_removed and not self._pool.is_busy(key)
        ]
        for keeper in gone:
            key = keeper.workload.id
            del self._keepers[key]
            self._leaving.remove(key)
            self._pool.forget(key)
            for problem in [problem for problem in self._problems if problem[1] == key]:
                del self._problems[problem]
        return gone

    def _remove_abandoned(self, living: Iterable[Workload], *, look: bool) -> None:
        """Has sidecars removed whose workloads went away while there was no agent, or that were not removed whole.

        `look` for such: not while it is unknown which workloads there are.
        """
        claimed = {self._directory(workload) for workload in living}
        claimed |= {self._directory(keeper.workload) for keeper in self._keepers.values()}
        found = set(self._sidecars.glob("*")) - claimed if look else set()
        for directory in sorted(found - self._abandoned.keys()):
            log.info("a sidecar was left behind", directory=str(directory))
            self._abandoned[directory] = abandoned(directory, self._envoy, self._engine)
        for directory, keeper in self._abandoned.items():
            if directory not in claimed:
                self._pool.submit(str(directory), keeper.remove)
        self._pool.wait(map(str, self._abandoned), PATIENCE_S)
        for directory in [*self._abandoned]:
            key = str(directory)
            if not self._pool.is_busy(key) and (directory in claimed or not directory.exists()):
                del self._abandoned[directory]
                self._pool.forget(key)
                self._clear("defect", key)

    def _is_being_cleared(self, workload: Workload) -> bool:
        """Whether what is left of another one has to be removed from its namespace or its directory first."""
        leaving = (self._keepers[key].workload for key in self._leaving)
        cleared = [(self._directory(one), one.netns) for one in leaving]
        cleared += [(path, keeper.workload.netns) for path, keeper in self._abandoned.items()]
        place = self._directory(workload)
        return any(path == place or found == workload.netns for path, found in cleared)

    async def _leaves(self, workloads: Iterable[Workload]) -> dict[str, tuple[LeafMaterial, ...]]:
        """New leaf certificates for the workloads that need them, one for each service."""
        leaves: dict[str, tuple[LeafMaterial, ...]] = {}
        for workload in workloads:
            if not workload.meshed or not self._is_free(workload):
                continue
            try:
                wanted = self._identities(workload)
                if not self._keepers[workload.id].needs_leaves(time.time(), wanted):
                    continue
                self._roots_pem = await self._catalog.roots()
                leaves[workload.id] = tuple(
                    [
                        await self._catalog.leaf(service, self._config.leaf_lifetime)
                        for service in names.services_of(workload)
                    ]
                )
            except TidegateError as error:
                self._tell("leaf", f"no leaf for {workload.name}: {error}", workload.id)
            else:
                self._clear("leaf", workload.id)
        return leaves

    def _identities(self, workload: Workload) -> tuple[str, ...]:
        domain, datacenter = self._config.trust_domain, self._config.datacenter
        return tuple(
            spiffe.service_id(domain, service, datacenter)
            for service in names.services_of(workload)
        )

    def _reconcile(
        self,
        workloads: Iterable[Workload],
        known: Neighbours,
        intents: dict[str, ServiceIntent],
        leaves: dict[str, tuple[LeafMaterial, ...]],
    ) -> None:
        asked = []
        for workload in workloads:
            if not self._is_free(workload):
                continue
            keeper = self._keepers[workload.id]
            if not workload.meshed:
                asked.append(self._reconcile_one(keeper, None))
                self._clear("leaf", workload.id)
                self._clear("spec", workload.id)
                self._clear("sidecar", workload.id)
                continue
            if not self._intent.known:
                continue
            with self._defects_told("sidecar", workload):
                wanted = self._wanted(keeper, known, intents, leaves.get(workload.id, ()))
                if wanted is not None:
                    asked.append(self._reconcile_one(keeper, wanted))
        self._pool.wait(asked, PATIENCE_S)
        self._note_defects(asked)

    def _wanted(
        self,
        keeper: Keeper,
        known: Neighbours,
        intents: dict[str, ServiceIntent],
        leaves: tuple[LeafMaterial, ...],
    ) -> Wanted | None:
        """What a meshed workload's sidecar should do now; what it does already where that would be impossible."""
        workload = keeper.workload
        try:
            policy = keeper.described
            if policy is not None:
                policy = agreed_policy(policy, intents[workload.service])
            spec = sidecar_spec(self._config, workload, policy, intents, known, keeper.spec)
        except TidegateError as error:
            if keeper.spec is None:
                self._tell("spec", f"{workload.name} cannot be meshed: {error}", workload.id)
                return None
            problem = f"the sidecar of {workload.name} stays as it is: {error}"
            self._tell("spec", problem, workload.id)
            return Wanted(
                spec=keeper.spec,
                index=keeper.applied_index,
                roots_pem=self._roots_pem,
                policy=keeper.policy,
            )
        self._clear("spec", workload.id)
        return Wanted(
            spec=spec,
            index=max(intents[one.service].index for one in spec.services),
            roots_pem=self._roots_pem,
            policy=policy,
            leaves=leaves,
        )

    def _reconcile_one(self, keeper: Keeper, wanted: Wanted | None) -> str:
        key = keeper.workload.id
        self._pool.submit(key, lambda: keeper.reconcile(wanted))
        return key

    def _note_defects(self, asked: Iterable[str]) -> None:
        """Tells which workloads' work in the pool came upon a defect. Of those that are gone nobody would ask."""
        names = {key: keeper.workload.name for key, keeper in self._keepers.items()}
        names |= {str(path): keeper.workload.name for path, keeper in self._abandoned.items()}
        defects = self._pool.defects()
        for key, error in defects.items():
            if key in names:
                self._tell_defect("defect", key, names[key], error)
            else:
                log.exception("a workload was not removed whole by a defect of the agent", error)
        for key in asked:
            if key not in defects and not self._pool.is_busy(key):
                self._clear("defect", key)

    @contextlib.contextmanager
    def _defects_told(self, what: str, workload: Workload) -> Iterator[None]:
        """A defect in what is done for one workload is that workload's problem: the round goes on."""
        try:
            yield
        except (TidegateError, KernelError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - it is logged as the defect that it is
            self._tell_defect(what, workload.id, workload.name, error)
        else:
            self._clear(what, workload.id)

    def _tell_defect(self, what: str, key: str, name: str, error: Exception) -> None:
        problem = f"{name} is not worked on, by a defect of the agent; see its log ({error!r})"
        if self._problems.get((what, key)) != problem:
            log.exception(problem, error)
        self._problems[what, key] = problem

    def _is_free(self, workload: Workload) -> bool:
        """Whether it has a keeper, and nothing goes on for it that the next step would have to wait for."""
        key = workload.id
        keeper = self._keepers.get(key)
        return (
            keeper is not None
            and keeper.is_of(workload)
            and key not in self._leaving
            and not self._pool.is_busy(key)
        )

    async def _publish(self, snapshot: Snapshot) -> None:
        """Tells the catalog what its answer does not say yet."""
        known = {
            one.id: one
            for one in snapshot.instances
            if one.node == self._config.node and not one.seen_until
        }
        complete = not self._source.problems()
        kept = {key: keeper for key, keeper in self._keepers.items() if key not in self._leaving}
        gone = [one for one in known if one not in kept] if complete else []
        address = self._config.node_addresses[0] if self._config.node_addresses else "127.0.0.1"
        node = NodeInfo(
            name=self._config.node, address=address, agent_api=f"unix://{self._config.socket}"
        )
        try:
            for keeper in kept.values():
                # What a former agent said holds until this one has looked: callers would leave the mesh meanwhile.
                if keeper.has_looked or keeper.workload.id not in known:
                    await self._publish_one(node, keeper, known)
            for instance_id in gone:
                await self._catalog.deregister(self._config.node, instance_id)
        except TidegateError as error:
            self._tell("publish", f"the catalog does not have the latest of this node: {error}")
        else:
            self._clear("publish")

    async def _publish_one(
        self, node: NodeInfo, keeper: Keeper, known: dict[str, Instance]
    ) -> None:
        """One by one, so that an instance that the server does not take stops no other."""
        instance = published(keeper, self._config)
        try:
            if not is_published(instance, known):
                await self._catalog.register(node, [instance])
        except CatalogRefused as error:
            problem = f"the catalog does not take {instance.name}: {error}"
            self._tell("publish", problem, keeper.workload.id)
        else:
            self._clear("publish", keeper.workload.id)

    def _collect(self) -> None:
        self._collecting_since = time.monotonic()
        self._observation.collect(time.time(), self._keepers.values())

    async def _evidence(self, service: str, window_s: float) -> NodeEvidence:
        def read() -> NodeEvidence:
            now = time.time()
            return self._observation.evidence(service, now - window_s, now, self._keepers)

        return await self._up_to_now(read)

    async def _flows(self, window_s: float | None) -> NodeFlows:
        def read() -> NodeFlows:
            now = time.time()
            since = 0.0 if window_s is None else now - window_s
            return self._observation.flows(since, now, self._keepers)

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
                round_at=self._round_at,
                workloads=tuple(self._workload_status(one) for one in self._keepers.values()),
                problems=(
                    *self._problems.values(),
                    *self._left_behind(),
                    *self._intent.problems(),
                    *self._guard.problems(),
                    *self._source.problems(),
                    *self._observation.problems(),
                    *self._drift.problems(),
                ),
            )

        return await self._work(read)

    def _left_behind(self) -> Iterator[str]:
        for keeper in self._abandoned.values():
            for problem in keeper.problems:
                yield f"what was left of {keeper.workload.name} cannot be removed: {problem}"

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
            netns=workload.netns,
            annotations=workload.annotations,
            namespace_annotations=workload.namespace_annotations,
            policy=keeper.policy,
            redirect=keeper.redirection.state,
            repairs=keeper.redirection.repairs(0.0),
            last_repair=keeper.redirection.last_repair,
            notes=keeper.redirection.notes,
            state=state.phase if keeper.spec else "",
            pid=state.pid,
            restarts=state.restarts,
            last_exit=state.last_exit,
            mode=keeper.mode if keeper.in_mesh else "",
            observed_since=self._observation.observed_since(workload) or 0.0,
            closed=keeper.closed,
            problem="; ".join((*keeper.problems, *((unobserved,) if unobserved else ()))),
        )

    def _directory(self, workload: Workload) -> Path:
        """The sidecar's directory: short, and another one for another workload of the same name."""
        digest = hashlib.sha256(workload.id.encode()).hexdigest()[:8]
        name = re.sub(r"[^a-z0-9-]", "-", workload.name)[:40]
        return self._sidecars / f"{name}-{digest}"

    @property
    def _sidecars(self) -> Path:
        return self._config.run_dir / "sidecars"

    async def _work(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, lambda: function(*args, **kwargs))

    def _tell(self, what: str, problem: str, key: str = "") -> None:
        """`key` is the workload's id, or the directory of what a former agent left; "" for the agent as a whole."""
        if self._problems.get((what, key)) != problem:
            log.warning(problem)
        self._problems[what, key] = problem

    def _clear(self, what: str, key: str = "") -> None:
        self._problems.pop((what, key), None)


def _intents(snapshot: Snapshot, workloads: Iterable[Workload]) -> dict[str, ServiceIntent]:
    services = {service for one in snapshot.instances for service in names.services_of(one)}
    services.update(service for workload in workloads for service in names.services_of(workload))
    services.update(upstream for one in snapshot.instances for upstream in one.upstreams)
    return resolve(snapshot.entries, sorted(services), snapshot.default_allow)
