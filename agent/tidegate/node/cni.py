"""Answers the node's CNI plugin: containers are redirected before anything in them runs, and let go when they end.

The plugin (init/cni) speaks the language of workloads/cni.py over a unix socket. What a container is, Kubernetes says
where the agent knows it, otherwise the network configuration. ADD returns when the rules are proven in place; the
daemon finds them as they should be, and looks after them from then on. Calls about one container come one after the
other, others at the same time: kernel work has threads of its own, so that no round of the daemon holds it up.
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
from tidegate.node.config import RedirectConfig
from tidegate.node.log import Log
from tidegate.node.metrics import CniResult, Metrics
from tidegate.node.policies import policy_for
from tidegate.workloads import cni
from tidegate.workloads.attachments import Attachment, Attachments
from tidegate.workloads.cni import CniConfig, CniError, CniRequest, Code, Command, OnAgentAbsent
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment

MAX_CALLS = 128
"""Connections at a time; with the size of a request this bounds the memory that they take."""
BACKLOG = 256
REQUEST_S = 5.0
"""How long the plugin may take to say what it wants."""
LOOK_UP_S = 10.0
"""How long Kubernetes is asked about a pod."""
SIDECAR_S = 10.0
"""How long ADD waits for a sidecar that the agent starts. What the container dials before is refused, not let out."""
SIDECAR_PAUSE_S = 0.02
THREADS = 4
VISITORS = 2
"""Threads for the rules of new containers: the kernel's part of two goes on at the same time, the rest never does."""
WAKE_S = 0.1
"""How long after a container the daemon is woken: of many that start at once it hears at once, and not between them."""
LET_GO_S = 2.0
"""How long DEL waits for the daemon to let go of a container; a round usually takes a tenth of that."""
LET_GO_PAUSE_S = 0.02
FAILURES_KEPT = 200
FAILURE_KEPT_S = 600.0
"""A runtime that goes on trying tries again long before that."""
DIFFERENCES_TOLD = 10

_WELCOMED = 8
"""How many calls are taken in before those that were are gone on with."""
_READ_BYTES = 1 << 16
_NO_ROOM_S = 0.2
"""How long calls wait where none can be taken in."""

_P = ParamSpec("_P")
_T = TypeVar("_T")

log = Log("cni")


class PodLookup(Protocol):
    """Who knows the pods of this node, such as KubernetesSource."""

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
        self._turns: dict[str, _Turn] = {}
        self._connections: set[_Connection] = set()
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
        async with serving_at(self._config.socket, self._serve):
            self._is_open = True
            try:
                yield
            finally:
                self._is_open = False
                calls = [one.call for one in self._connections if one.call is not None]
                for connection in tuple(self._connections):
                    connection.hang_up()
                await asyncio.gather(*calls, return_exceptions=True)
                await asyncio.to_thread(self._threads.shutdown)
                await asyncio.to_thread(self._visitors.close)

    @contextlib.asynccontextmanager
    async def _serve(self, listener: socket.socket) -> AsyncIterator[None]:
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._look_out(listener)
        try:
            yield
        finally:
            asyncio.get_running_loop().remove_reader(listener)

    def problems(self) -> tuple[str, ...]:
        """One sentence for each container that could not be attached, as long as nothing better is known of it."""
        since = time.monotonic() - FAILURE_KEPT_S
        return tuple(problem for at, problem in tuple(self._failures.values()) if at > since)

    async def answer(self, body: bytes) -> bytes:
        """What the plugin is to be told; no exception comes out but that of being cancelled."""
        began = time.monotonic()
        request: CniRequest | None = None
        try:
            request = cni.parse(body)
            async with self._turn(request):
                result = await self._carry_out(request)
        except CniError as error:
            result, answer = self._note_failure(request, error), cni.failed(error)
        except Exception as defect:
            log.exception("a CNI call failed by a defect of the agent", defect)
            result, answer = self._note_failure(request, _DEFECT), cni.failed(_DEFECT)
        else:
            answer = cni.done()
        command = "other" if request is None else request.command
        self._metrics.cni_call(command, result, time.monotonic() - began)
        return answer

    def _look_out(self, listener: socket.socket) -> None:
        """Takes in who calls from now on, unless it has been closed."""
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._welcome, listener)

    def _welcome(self, listener: socket.socket) -> None:
        """Takes in some of those who call."""
        for _ in range(_WELCOMED):
            try:
                caller, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Too many files are open, and nothing tells when that is over.
                log.warning("CNI calls have to wait", reason=str(error))
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(_NO_ROOM_S, self._look_out, listener)
                return
            connection = _Connection(self, caller)
            if not self._is_open:
                connection.hang_up()
            elif len(self._connections) >= MAX_CALLS:
                busy = f"the agent works on {MAX_CALLS} calls already"
                connection.refuse(Code.TRY_AGAIN, busy)
            else:
                self._connections.add(connection)
                connection.read()

    def disconnected(self, connection: "_Connection") -> None:
        self._connections.discard(connection)

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
        await self._inside(request.netns, self._attach, request, described, policy)
        self._wake_soon()
        if policy is not None and described.sidecar is Sidecar.TIDEGATE:
            await self._sidecar_listens(request, policy)
        return CniResult.OK if policy is not None else CniResult.LEFT_ALONE

    def _wake_soon(self) -> None:
        if self._waking is None or self._waking.when() < asyncio.get_running_loop().time():
            self._waking = asyncio.get_running_loop().call_later(WAKE_S, self._wake)

    async def _described(self, request: CniRequest) -> Description | LeftAlone:
        """What is known of a container; CniError when nobody can say whether it is to be redirected."""
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
        match known:
            case LeftAlone():
                return known
            case None:
                return _undecided(request, "Kubernetes did not know it when it started")
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

    def _attach(self, request: CniRequest, described: Description, policy: Policy | None) -> None:
        """In the container's network namespace."""
        place = netns.identity(netns.CURRENT)
        if place == self._own_network or netns.is_initial(netns.CURRENT):
            raise CniError(
                Code.INVALID_ENVIRONMENT,
                "CNI_NETNS is the node's own network namespace",
                "expected that of a container",
            )
        if policy is not None:
            self._redirect_here(request, policy)
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

    @contextlib.asynccontextmanager
    async def _turn(self, request: CniRequest) -> AsyncIterator[None]:
        """While nothing else is done for the container: a runtime may give up waiting, and ask for the contrary."""
        key = request.key.container_id
        turn = self._turns.setdefault(key, _Turn())
        turn.wanted += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._turns[key]

    def _note_failure(self, request: CniRequest | None, error: CniError) -> CniResult:
        """Logs how a call failed, and keeps it for `problems` if a container waits for it."""
        shown = "" if request is None else request.shown
        command = "" if request is None else request.command
        log.warning("a CNI call failed", command=command, container=shown, reason=str(error))
        if request is not None and request.command is Command.ADD:
            key = request.key.container_id
            self._failures.pop(key, None)
            self._failures[key] = (time.monotonic(), f"{shown} cannot start: {error}")
            while len(self._failures) > FAILURES_KEPT:
                del self._failures[next(iter(self._failures))]
        return CniResult.REFUSED if error.code in _REFUSALS else CniResult.FAILED


_DEFECT = CniError(
    Code.NOT_REDIRECTED, "the tidegate agent has a defect", "see the log of the agent"
)

_REFUSALS = frozenset(
    {Code.UNKNOWN_CONTAINER, Code.INVALID_ENVIRONMENT, Code.DECODING, Code.INVALID_CONFIG}
)


class _Turn:
    """Who has to wait for whom, of one container's calls."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.wanted = 0


class _Connection:
    """One call: a request, an answer. As a rule all of the request is there at once, and nothing is waited for."""

    def __init__(self, server: CniServer, caller: socket.socket) -> None:
        self.call: asyncio.Task[None] | None = None
        self._server = server
        self._caller = caller
        self._received = bytearray()
        self._patience: asyncio.TimerHandle | None = None
        """While more is waited for."""

    def read(self) -> None:
        """Takes in what the plugin has said by now."""
        try:
            said = self._caller.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._wait()
            return
        except OSError:
            said = b""
        if not said:
            self.hang_up()
            return
        self._received += said
        head = len(cni.MAGIC) + cni.LENGTH_BYTES
        if self._received[: len(cni.MAGIC)] != cni.MAGIC[: len(self._received)]:
            self.refuse(
                Code.TRY_AGAIN,
                "the tidegate-cni plugin speaks another language than the agent",
                "install the plugin of the agent's version: tidegate cni install",
            )
            return
        if len(self._received) < head:
            self._wait()
            return
        length = int.from_bytes(self._received[len(cni.MAGIC) : head])
        if length > cni.MAX_REQUEST_BYTES:
            self.refuse(Code.DECODING, "the plugin's request is too large")
        elif len(self._received) < head + length:
            self._wait()
        else:
            self._wait_no_longer()
            body = bytes(self._received[head : head + length])
            self._received.clear()
            self.call = asyncio.get_running_loop().create_task(self._answer(body))

    def refuse(self, code: Code, message: str, details: str = "") -> None:
        """Says why, and hangs up."""
        self._say(cni.failed(CniError(code, message, details)))

    def hang_up(self) -> None:
        """Without an answer."""
        if self.call is not None:
            self.call.cancel()
        self._close()

    async def _answer(self, body: bytes) -> None:
        self._say(await self._server.answer(body))

    def _say(self, answer: bytes) -> None:
        # Answers are shorter than what a socket takes without waiting, and who has gone away is told nothing.
        with contextlib.suppress(OSError):
            self._caller.send(answer, socket.MSG_DONTWAIT)
        self._close()

    def _wait(self) -> None:
        if self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(REQUEST_S, self.hang_up)
            loop.add_reader(self._caller, self.read)

    def _wait_no_longer(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
            asyncio.get_running_loop().remove_reader(self._caller)

    def _close(self) -> None:
        self._wait_no_longer()
        self._server.disconnected(self)
        self._caller.close()


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
