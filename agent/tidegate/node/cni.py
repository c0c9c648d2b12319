"""Answers the node's CNI plugin: containers are redirected before anything in them runs, and let go when they end.

The plugin (init/cni) speaks the language of workloads/cni.py over a unix socket. What a container is, Kubernetes says
where the agent knows it, otherwise the network configuration. ADD returns when the rules are proven in place; the
daemon finds them as they should be, and looks after them from then on. Calls about one container come one after the
other. The ADD of a container of which all is known, into a namespace where nobody's rules are, is carried out at once
in the thread that takes it in (node/cni_calls.py): of many that come together none waits for another thread. All else
goes on in the event loop, at the same time; kernel work has threads of its own, so that no round of the daemon holds
it up.
"""

import asyncio
import concurrent.futures
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar, assert_never

import msgspec

from tidegate.enforce.redirect.backend import Change
from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import TidegateError
from tidegate.intent.policy import Policy
from tidegate.kernel import netns, sockets
from tidegate.kernel.errors import KernelError
from tidegate.model import Sidecar, Workload
from tidegate.node.api import serving_at
from tidegate.node.cni_calls import DEFECT, Call, Calls, Turns
from tidegate.node.config import RedirectConfig
from tidegate.node.log import Log
from tidegate.node.metrics import CniResult, Metrics
from tidegate.node.policies import policy_for
from tidegate.workloads import cni
from tidegate.workloads.attachments import Attachment, Attachments
from tidegate.workloads.cni import CniConfig, CniError, CniRequest, Code, Command, OnAgentAbsent
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment

LOOK_UP_S = 10.0
"""How long Kubernetes is asked about a pod."""
SIDECAR_S = 10.0
"""How long ADD waits for a sidecar that the agent starts. What the container dials before is refused, not let out."""
SIDECAR_PAUSE_S = 0.02
THREADS = 4
VISITORS = 2
"""Threads for the rules of containers that are not done at once: the kernel's part of two goes on at the same time, the
rest never does.
"""
WAKE_S = 0.1
"""How long after a container the daemon is woken: of many that start at once it hears at once, and not between them."""
LET_GO_S = 2.0
"""How long DEL waits for the daemon to let go of a container; a round usually takes a tenth of that."""
LET_GO_PAUSE_S = 0.02
FAILURES_KEPT = 200
FAILURE_KEPT_S = 600.0
"""A runtime that goes on trying tries again long before that."""
DIFFERENCES_TOLD = 10

_P = ParamSpec("_P")
_T = TypeVar("_T")

log = Log("cni")


class PodLookup(Protocol):
    """Who knows the pods of this node, such as KubernetesSource."""

    def known(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        """What is known of a pod without a question to anybody; None when nothing is. From any thread."""

    async def look_up(
        self, namespace: str, name: str, uid: str, netns: str = ""
    ) -> Description | LeftAlone | None:
        """What is known of a pod; None when there is no such pod. TidegateError when nobody can say."""


class CniServer:
    """The agent's side of the plugin. Its coroutines run in one event loop."""

    def __init__(
        self,
        config: CniConfig,
        redirect: RedirectConfig,
        engine: Engine,
        attachments: Attachments,
        *,
        pods: PodLookup | None,
        wake: Callable[[], None],
        is_ready: Callable[[], bool],
        policy_in_force: Callable[[str], Policy | None],
        metrics: Metrics,
    ) -> None:
        """`wake` begins a round of the daemon; `is_ready` says whether it has completed one; `policy_in_force` what it
        redirects the workload at a path by, None where it has none there: from any thread.
        """
        self._config = config
        self._redirect = redirect
        self._engine = engine
        self._attachments = attachments
        self._pods = pods
        self._wake = wake
        self._is_ready = is_ready
        self._policy_in_force = policy_in_force
        self._metrics = metrics
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "cni")
        self._visitors = netns.Visitors(VISITORS, "cni-visitor")
        self._turns = Turns()
        self._calls: set[Call] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        """Since `running`."""
        self._is_open = False
        self._waking: asyncio.TimerHandle | None = None
        """When the daemon is woken next, or was last."""
        self._failures: dict[str, tuple[float, str]] = {}
        """By container, when its latest ADD failed, and how."""
        self._own_network = netns.identity("/proc/self/ns/net")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers as long as the context lasts. TidegateError when it cannot listen.

        Calls that are not answered at its end are broken off: the plugin repeats them, to the next agent.
        """
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        try:
            async with serving_at(self._config.socket, self._serve):
                yield
        finally:
            self._is_open = False
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for call in tuple(self._calls):
                call.hang_up()
            await asyncio.to_thread(self._threads.shutdown)
            await asyncio.to_thread(self._visitors.close)

    @contextlib.asynccontextmanager
    async def _serve(self, listener: socket.socket) -> AsyncIterator[None]:
        calls = Calls(listener, self._calls, self._take)
        calls.begin()
        try:
            yield
        finally:
            await asyncio.to_thread(calls.end)

    def problems(self) -> tuple[str, ...]:
        """One sentence for each container that could not be attached, as long as nothing better is known of it."""
        since = time.monotonic() - FAILURE_KEPT_S
        return tuple(problem for at, problem in tuple(self._failures.values()) if at > since)

    def _take(self, call: Call, body: bytes) -> None:
        """Carries out what a call asks at once, or has it begun in the loop. In the thread that takes calls in."""
        began = time.monotonic()
        try:
            request = cni.parse(body)
        except CniError as error:
            self._answer(call, None, error, began)
            return

        def begin() -> None:
            self._loop.call_soon_threadsafe(self._begin, call, request, began)

        if not self._turns.take(request.key.container_id, begin):
            return
        result = self._carried_out_at_once(request)
        if result is None:
            begin()
            return
        self._turns.leave(request.key.container_id)
        self._answer(call, request, result, began)

    def _begin(self, call: Call, request: CniRequest, began: float) -> None:
        if self._is_open:
            task = self._loop.create_task(self._go_on(call, request, began))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _go_on(self, call: Call, request: CniRequest, began: float) -> None:
        outcome: CniResult | CniError
        try:
            outcome = await self._carry_out(request)
        except CniError as error:
            outcome = error
        except Exception as defect:
            log.exception("a CNI call failed by a defect of the agent", defect)
            outcome = DEFECT
        finally:
            self._turns.leave(request.key.container_id)
        self._answer(call, request, outcome, began)

    def _answer(
        self, call: Call, request: CniRequest | None, outcome: CniResult | CniError, began: float
    ) -> None:
        """Tells the plugin, and whoever counts calls."""
        match outcome:
            case CniError():
                result, answer = self._note_failure(request, outcome), cni.failed(outcome)
            case CniResult():
                result, answer = outcome, cni.done()
            case _:
                assert_never(outcome)
        call.answer(answer)
        command = "other" if request is None else request.command
        self._metrics.cni_call(command, result, time.monotonic() - began)

    def _carried_out_at_once(self, request: CniRequest) -> CniResult | None:
        """None for what takes longer, and for what fails: that is tried, and told, the long way."""
        if request.command is not Command.ADD:
            return None
        try:
            result = self._add_at_once(request)
        except (_TakesLonger, CniError, TidegateError, KernelError, OSError):
            return None
        except Exception as defect:
            log.exception("a CNI call takes longer by a defect of the agent", defect)
            return None
        self._failures.pop(request.key.container_id, None)
        return result

    def _add_at_once(self, request: CniRequest) -> CniResult:
        described = self._described_at_once(request)
        match described:
            case None:
                raise _TakesLonger
            case LeftAlone():
                return CniResult.LEFT_ALONE
            case Description():
                pass
            case _:
                assert_never(described)
        policy = self._policy(described)
        if policy is not None and described.sidecar is Sidecar.TIDEGATE:
            raise _TakesLonger
        redirect = self._create_here
        self._visitors.visit(request.netns, self._attach, request, described, policy, redirect)
        if not self._wakes_soon:
            self._loop.call_soon_threadsafe(self._wake_soon)
        return CniResult.OK if policy is not None else CniResult.LEFT_ALONE

    def _create_here(self, _request: CniRequest, policy: Policy) -> None:
        """As _redirect_here, if that goes the short way."""
        with self._metrics.applying():
            is_created = self._engine.create(netns.CURRENT, policy)
        if not is_created:
            raise _TakesLonger

    async def _carry_out(self, request: CniRequest) -> CniResult:
        match request.command:
            case Command.ADD:
                result = await self._add(request)
                self._failures.pop(request.key.container_id, None)
                return result
            case Command.DEL:
                return await self._delete(request)
            case Command.CHECK:
                return await self._check(request)
            case Command.STATUS:
                return await self._status()
            case Command.GC:
                return await self._collect(request)
            case _:
                assert_never(request.command)

    async def _add(self, request: CniRequest) -> CniResult:
        described = await self._described(request)
        match described:
            case LeftAlone():
                return CniResult.LEFT_ALONE
            case Description():
                pass
            case _:
                assert_never(described)
        policy = self._policy(described)
        redirect = self._redirect_here
        await self._inside(request.netns, self._attach, request, described, policy, redirect)
        self._wake_soon()
        if policy is not None and described.sidecar is Sidecar.TIDEGATE:
            await self._sidecar_listens(request, policy)
        return CniResult.OK if policy is not None else CniResult.LEFT_ALONE

    @property
    def _wakes_soon(self) -> bool:
        waking = self._waking
        return waking is not None and waking.when() >= self._loop.time()

    def _wake_soon(self) -> None:
        if not self._wakes_soon:
            self._waking = self._loop.call_later(WAKE_S, self._wake)

    def _described_at_once(self, request: CniRequest) -> Description | LeftAlone | None:
        """What is known of a container; None when Kubernetes has to be asked."""
        if request.pod_namespace in self._config.exclude_namespaces:
            return LeftAlone(
                origin=Origin.CNI,
                id=request.pod_uid,
                name=request.pod_name,
                namespace=request.pod_namespace,
                treatment=Treatment.EXCLUDED,
                reason="its namespace is one of cni.exclude_namespaces",
            )
        if self._pods is None or not request.pod_namespace:
            return _as_its_network_says(request)
        known = self._pods.known(
            request.pod_namespace, request.pod_name, request.pod_uid, request.netns
        )
        return None if known is None else _attached(known, request)

    async def _described(self, request: CniRequest) -> Description | LeftAlone:
        """The same, when Kubernetes was asked; CniError when nobody can say whether it is to be redirected."""
        described = self._described_at_once(request)
        if described is not None:
            return described
        assert self._pods is not None  # noqa: S101 - without it all is known at once
        try:
            async with asyncio.timeout(LOOK_UP_S):
                known = await self._pods.look_up(
                    request.pod_namespace, request.pod_name, request.pod_uid, request.netns
                )
        except (TidegateError, TimeoutError) as error:
            why = str(error) or f"Kubernetes did not answer within {LOOK_UP_S:.0f} s"
            if request.plugin.on_agent_absent is OnAgentAbsent.OPEN:
                return _undecided(request, f"nobody could say what it is when it started: {why}")
            problem = f"nobody can say whether {request.shown} is to be redirected"
            raise CniError(Code.TRY_AGAIN, problem, why) from error
        if known is None:
            return _undecided(request, "Kubernetes did not know it when it started")
        return _attached(known, request)

    def _policy(self, described: Description) -> Policy | None:
        """What is redirected from the first packet on; None for a workload outside the mesh."""
        if not described.meshed:
            return None
        try:
            return policy_for(_workload(described), self._redirect.policy).before_sidecar()
        except TidegateError as error:
            raise CniError(
                Code.INVALID_CONFIG, f"the annotations of {described.name} are wrong", str(error)
            ) from error

    def _attach(
        self,
        request: CniRequest,
        described: Description,
        policy: Policy | None,
        redirect: Callable[[CniRequest, Policy], None],
    ) -> None:
        """In the container's network namespace."""
        place = netns.identity(netns.CURRENT)
        if place == self._own_network or netns.is_initial(netns.CURRENT):
            raise CniError(
                Code.INVALID_ENVIRONMENT,
                "CNI_NETNS is the node's own network namespace",
                "expected that of a container",
            )
        if policy is not None:
            redirect(request, policy)
        attachment = Attachment(
            key=request.key,
            place=place,
            description=described,
            pod_uid=request.pod_uid,
            pod_namespace=request.pod_namespace,
            pod_name=request.pod_name,
        )
        try:
            self._attachments.put(attachment)
        except OSError as error:
            # Kubernetes tells the next agent of its pods; of all others nobody else does.
            problem = f"{request.shown} is not recorded for the next agent: {error}"
            if self._pods is None:
                raise CniError(Code.TRY_AGAIN, problem) from error
            log.warning(problem)

    def _redirect_here(self, request: CniRequest, policy: Policy) -> None:
        """Puts the rules in place in the current namespace, and proves it."""
        with self._metrics.applying():
            applied, different = self._engine.establish(
                netns.CURRENT, policy, adopt=self._redirect.adopt
            )
        if different:
            raise CniError(
                Code.NOT_REDIRECTED,
                f"the redirection of {request.shown} is not as it should be",
                _told(different),
            )
        for left in applied.foreign:
            log.warning(str(left), container=request.shown)

    async def _sidecar_listens(self, request: CniRequest, policy: Policy) -> None:
        """Waits until the sidecar accepts connections, as long as that does not take too long."""
        until = time.monotonic() + SIDECAR_S
        wanted = {side.port for side in (policy.inbound, policy.outbound) if side.enabled}
        while not wanted <= await self._inside(request.netns, _listening_ports):
            if time.monotonic() > until:
                log.warning("it starts before its sidecar listens", container=request.shown)
                return
            await asyncio.sleep(SIDECAR_PAUSE_S)

    async def _delete(self, request: CniRequest) -> CniResult:
        self._failures.pop(request.key.container_id, None)
        attachment = self._attachments.get(request.key)
        if attachment is not None:
            await self._end(attachment)
        elif request.netns:
            await self._in_thread(self._clear, request.netns)
        return CniResult.OK

    async def _end(self, attachment: Attachment) -> None:
        """Forgets an attachment, and takes its rules away unless its namespace has others or is gone."""
        is_last = await self._in_thread(lambda: attachment.is_alive)
        is_last = is_last and not self._attachments.others_in(attachment)
        if is_last:
            self._attachments.leave(attachment.place)
        await self._in_thread(self._attachments.remove, attachment.key)
        self._wake()
        if is_last:
            await self._let_go(attachment.netns)
            await self._in_thread(self._remove, attachment.netns, attachment.place)

    async def _let_go(self, netns_path: str) -> None:
        """Waits until the daemon does not look after a namespace any more: it would repair what goes there."""
        until = time.monotonic() + LET_GO_S
        while time.monotonic() < until:
            try:
                if self._policy_in_force(netns_path) is None:
                    return
            except KernelError:
                return
            await asyncio.sleep(LET_GO_PAUSE_S)

    def _clear(self, netns_path: str) -> None:
        """What an ADD left that was broken off, which nobody knows of."""
        try:
            place = netns.identity(netns_path)
            is_the_nodes = place == self._own_network or netns.is_initial(netns_path)
            is_looked_after = self._policy_in_force(netns_path) is not None
        except KernelError:
            return
        if is_the_nodes or is_looked_after or self._attachments.within(place):
            return
        self._remove(netns_path, place)

    def _remove(self, netns_path: str, place: netns.Identity) -> None:
        """Takes the rules out of a namespace, if it still lies at the path."""

        def remove_here() -> Change:
            if netns.identity(netns.CURRENT) != place:
                return Change.UNCHANGED
            return self._engine.remove(netns.CURRENT)

        try:
            change = netns.run_in(netns_path, remove_here)
        except KernelError:
            if not Path(netns_path).exists():
                return
            raise
        if change is Change.REMOVED:
            log.info("redirection removed", netns=netns_path)

    async def _check(self, request: CniRequest) -> CniResult:
        attachment = self._attachments.get(request.key)
        if attachment is None:
            if isinstance(await self._described(request), LeftAlone):
                return CniResult.LEFT_ALONE
            raise CniError(Code.UNKNOWN_CONTAINER, f"{request.shown} was never attached")
        if attachment.place != await self._in_thread(netns.identity, request.netns):
            raise CniError(
                Code.DIFFERENT, f"{request.shown} has another network namespace than it had"
            )
        in_force = await self._in_thread(self._policy_in_force, request.netns)
        policy = in_force or self._policy(attachment.description)
        if policy is None:
            return CniResult.LEFT_ALONE
        different = await self._in_thread(self._engine.check, request.netns, policy)
        if different:
            raise CniError(
                Code.DIFFERENT,
                f"the redirection of {request.shown} is not as it should be",
                _told(different),
            )
        return CniResult.OK

    async def _status(self) -> CniResult:
        if not self._is_ready():
            raise CniError(Code.NOT_AVAILABLE, "the tidegate agent has not looked at this node yet")
        try:
            await self._in_thread(lambda: self._engine.choice)
        except CniError as error:
            raise CniError(Code.NOT_AVAILABLE, error.message, error.details) from error
        return CniResult.OK

    async def _collect(self, request: CniRequest) -> CniResult:
        if request.valid is None:
            raise CniError(
                Code.INVALID_CONFIG,
                "GC does not say what is valid",
                "expected cni.dev/valid-attachments",
            )
        failures: list[CniError] = []
        for attachment in self._attachments.of_network(request.key.network):
            if (attachment.key.container_id, attachment.key.interface) in request.valid:
                continue
            try:
                await self._end(attachment)
            except CniError as error:
                failures.append(error)
        if failures:
            told = _told([str(error) for error in failures])
            raise CniError(failures[0].code, "not all could be cleared away", told)
        return CniResult.OK

    async def _inside(
        self, netns_path: str, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """What the work gives, done in a network namespace; CniError as below."""
        return await _outcome(self._visitors.submit(netns_path, work, *args, **kwargs))

    async def _in_thread(
        self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """What the work gives, done in a thread. CniError for what the kernel or a file system refuses."""
        return await _outcome(self._threads.submit(work, *args, **kwargs))

    def _note_failure(self, request: CniRequest | None, error: CniError) -> CniResult:
        """Logs how a call failed, and keeps it for `problems` if a container waits for it."""
        shown = "" if request is None else request.shown
        command = "" if request is None else request.command
        log.warning("a CNI call failed", command=command, container=shown, reason=str(error))
        if request is not None and request.command is Command.ADD:
            key = request.key.container_id
            self._failures.pop(key, None)
            self._failures[key] = (time.monotonic(), f"{shown} cannot start: {error}")
            for oldest in list(self._failures)[:-FAILURES_KEPT]:
                self._failures.pop(oldest, None)
        return CniResult.REFUSED if error.code in _REFUSALS else CniResult.FAILED


_REFUSALS = frozenset(
    {Code.UNKNOWN_CONTAINER, Code.INVALID_ENVIRONMENT, Code.DECODING, Code.INVALID_CONFIG}
)


class _TakesLonger(Exception):
    """A call cannot be carried out at once."""


def _as_its_network_says(request: CniRequest) -> Description:
    """A container of a runtime without Kubernetes."""
    meshed = request.plugin.mesh or request.is_consuls
    return msgspec.structs.replace(
        _undecided(request, "" if meshed else "its network does not ask for redirection"),
        service=request.plugin.service,
        port=request.plugin.port,
        meshed=meshed,
        sidecar=Sidecar.OWN if request.is_consuls else request.plugin.sidecar,
        annotations=request.annotations,
    )


def _attached(known: Description | LeftAlone, request: CniRequest) -> Description | LeftAlone:
    """What Kubernetes says of a container, where the call says that it is."""
    match known:
        case LeftAlone():
            return known
        case Description():
            return msgspec.structs.replace(
                known,
                origin=Origin.CNI,
                netns=request.netns,
                interface=known.interface or request.key.interface,
                created_at=known.created_at or time.time(),
            )
        case _:
            assert_never(known)


def _undecided(request: CniRequest, reason: str) -> Description:
    """What the call itself tells."""
    return Description(
        origin=Origin.CNI,
        netns=request.netns,
        id=request.pod_uid or f"cni-{request.key.container_id}",
        name=request.pod_name or request.key.container_id,
        namespace=request.pod_namespace or None,
        interface=request.key.interface,
        reason=reason or None,
        created_at=time.time(),
    )


def _workload(described: Description) -> Workload:
    """As far as a policy depends on it."""
    return Workload(
        id=described.id,
        name=described.name or "",
        service=described.service or "",
        node="",
        netns=described.netns,
        sidecar=described.sidecar or Sidecar.TIDEGATE,
        annotations=described.annotations or {},
        namespace_annotations=described.namespace_annotations or {},
    )


def _listening_ports() -> set[int]:
    return {one.port for one in sockets.listeners()}


async def _outcome(work: "concurrent.futures.Future[_T]") -> _T:
    try:
        return await asyncio.wrap_future(work)
    except (KernelError, OSError) as error:
        problem = "the redirection cannot be looked at or changed"
        raise CniError(Code.NOT_REDIRECTED, problem, str(error)) from error


def _told(differences: Sequence[str]) -> str:
    more = len(differences) - DIFFERENCES_TOLD
    return "; ".join((*differences[:DIFFERENCES_TOLD], *((f"{more} more",) if more > 0 else ())))
