"""Flipping a service to strict, and guarding the flip.

Steps, each told as an event: the verdict must be READY (or forced); the service's entry is written; every sidecar
of the service reports that it runs the new mode; then, for the time of the guard, a known caller that is
refused, or that intentions newly deny, brings the former mode back. It also tells how many plaintext connections are
still open, until none is. An address that no workload has is not a known caller: somebody
who knocks from outside cannot hold a service open. A flip is kept in a file from before its entry is written until
its guard is over, so that an agent that is killed at any step goes on with it when it returns.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote

import msgspec

from tidegate.catalog.client import CatalogRefused, CatalogUnreachable
from tidegate.enforce.sidecar.envoy import DRAIN_TIME_S
from tidegate.errors import TidegateError
from tidegate.intent.entries import Entry, EntryKey
from tidegate.model import Instance, MutualTLSMode
from tidegate.node.log import Log
from tidegate.node.modes import own_entry, running_mode, set_mode
from tidegate.state_files import write_atomically
from tidegate.verdict.evidence import CallerKind
from tidegate.verdict.readiness import Answer, CallerFlow, Effect, Reason, ReasonKind, Verdict

POLL_S = 0.25
_DRAIN_TIMES = 1.5
"""How long a guard waits for the last plaintext connection, in times of what sidecars take to close them."""
BLIND_GRACE_S = 60.0
"""How long after its time a guard waits for evidence that it could not see."""

_BLINDING = (ReasonKind.EVIDENCE_MISSING, ReasonKind.EVIDENCE_LOST, ReasonKind.COVERAGE_GAP)

_T = TypeVar("_T")

log = Log("guard")


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened during a flip. The last one, and no other, has an `exit_code`."""

    event: str
    message: str
    service: str
    reasons: tuple[Reason, ...] = ()
    remaining_s: float | None = None
    exit_code: int | None = None


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """A flip under way, as it is kept in a file. Times are unix seconds."""

    service: str
    guard_s: float
    former_entry_mode: MutualTLSMode | None
    """The MutualTLSMode that the service's own entry had; None: it had none and inherited."""
    former_mode: MutualTLSMode
    """What that meant after inheritance."""
    flipped_at: float
    """Just before the entry was written: whoever calls without mTLS from then on is or will be refused."""
    enforced_at: float | None = None
    """When every sidecar was known to run strict mode; None while that is not yet so."""
    denied_before: tuple[str, ...] = ()
    """Workloads that intentions denied before the flip already."""
    back_because: str = ""
    """Why the flip is being rolled back; empty while it is not."""


class Mesh(Protocol):
    """What a flip needs of the rest of the agent."""

    async def verdict(self, service: str, window_s: float | None) -> Verdict: ...

    async def read_entry(self, key: EntryKey) -> Entry | None: ...

    async def write_entry(self, entry: Entry) -> int:
        """Writes and returns the index from which the entry holds."""
        ...

    async def instances(self, service: str | None) -> tuple[Instance, ...]: ...

    async def sidecar_problems(self, service: str) -> tuple[str, ...]: ...

    async def opens_gate(self, service: str) -> str:
        """The command that lets a service become permissive; empty while it may."""
        ...


class Guard:
    """All flips of this agent; one at a time for a service."""

    def __init__(self, mesh: Mesh, directory: Path, drain_s: float = DRAIN_TIME_S) -> None:
        self._mesh = mesh
        self._directory = directory
        self._drain_s = drain_s
        self._running: dict[str, asyncio.Task[None]] = {}
        self._unreadable: tuple[str, ...] = ()

    def problems(self) -> tuple[str, ...]:
        """Flips that nobody guards although somebody should."""
        return self._unreadable

    def resume(self) -> None:
        """Takes up the flips that a former agent left."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(self._directory.glob("*.json")):
            try:
                flip = msgspec.json.decode(path.read_bytes(), type=Flip)
            except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
                problem = f"the flip of {path.stem} is not guarded: {path} cannot be read ({error})"
                log.warning(problem)
                self._unreadable += (problem,)
                continue
            log.info("guard taken up again", service=flip.service)
            course = self._course(path, flip.service, _log_event)
            self._start(course, course.resume(flip), lambda: None)

    async def stop(self) -> None:
        """Ends the tasks; flips under guard stay in their files for the next agent."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def strict(self, service: str, guard_s: float, *, force: bool) -> "asyncio.Queue[Event | None]":
        """Starts a flip; its events come through the queue, then None. It goes on if nobody reads."""
        if service in self._running:
            raise TidegateError(
                f"a flip of {service} is under guard already; wait until it is over"
            )
        queue: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event) -> None:
            _log_event(event)
            # A heartbeat that nobody has read yet is enough.
            if event.event != "guarding" or queue.empty():
                queue.put_nowait(event)

        path = self._directory / f"{quote(service, safe='')}.json"
        course = self._course(path, service, tell)
        self._start(course, course.begin(guard_s, force=force), lambda: queue.put_nowait(None))
        return queue

    def _course(self, path: Path, service: str, tell_event: Callable[[Event], None]) -> "_Course":
        return _Course(self._mesh, path, service, tell_event, self._drain_s)

    def _start(
        self, course: "_Course", steps: Awaitable[None], finished: Callable[[], None]
    ) -> None:
        service = course.service

        async def run() -> None:
            try:
                await steps
            except TidegateError as error:
                course.tell("failed", str(error), exit_code=error.exit_code)
            except Exception as error:
                # Whoever waits for the end must learn of it; the file stays for the next agent.
                log.exception("a flip failed by a defect of the agent", error, service=service)
                course.tell(
                    "failed",
                    f"the flip of {service} failed by a defect of the agent; see its log",
                    exit_code=1,
                )
            finally:
                self._running.pop(service, None)
                finished()

        self._running[service] = asyncio.create_task(run())


class _Course:
    """The steps of one flip. Each is kept in the file before it is done, and may be done twice."""

    def __init__(
        self,
        mesh: Mesh,
        path: Path,
        service: str,
        tell_event: Callable[[Event], None],
        drain_s: float,
    ) -> None:
        self.service = service
        self._mesh = mesh
        self._path = path
        self._tell_event = tell_event
        self._drain_s = drain_s

    def tell(
        self,
        event: str,
        message: str,
        *,
        reasons: tuple[Reason, ...] = (),
        remaining_s: float | None = None,
        exit_code: int | None = None,
    ) -> None:
        self._tell_event(
            Event(
                event=event,
                message=message,
                service=self.service,
                reasons=reasons,
                remaining_s=remaining_s,
                exit_code=exit_code,
            )
        )

    async def begin(self, guard_s: float, *, force: bool) -> None:
        """The whole flip, from the question whether it may be."""
        service = self.service
        instances = await self._mesh.instances(service)
        if not any(one.meshed for one in instances):
            why = (
                f"none of the instances of {service} has a sidecar"
                if instances
                else f"the catalog knows no instance of {service}"
            )
            self.tell("refused", f"{why}: not flipped", exit_code=2)
            return
        held = [one.name for one in instances if one.registered_mode is MutualTLSMode.PERMISSIVE]
        if held:
            self.tell(
                "refused",
                f"{service}: the registration of {', '.join(held)} says permissive, and wins over config entries: not"
                " flipped; register it again without MutualTLSMode",
                exit_code=2,
            )
            return
        verdict = await self._mesh.verdict(service, None)
        if verdict.mode is MutualTLSMode.STRICT:
            self.tell("unchanged", f"{service} is strict already", exit_code=0)
            return
        if verdict.verdict is not Answer.READY and not force:
            self.tell(
                "refused",
                f"{service} is {verdict.verdict}: not flipped (--force flips all the same)",
                reasons=verdict.reasons,
                exit_code=verdict.exit_code,
            )
            return
        former = (await own_entry(self._mesh, service)).mutual_tls_mode
        if former is MutualTLSMode.STRICT:
            raise TidegateError(f"somebody else set {service} to strict just now: not flipped")
        if not await self._has_way_back(former, force=force):
            return
        flip = Flip(
            service=service,
            guard_s=guard_s,
            former_entry_mode=former,
            former_mode=verdict.mode,
            flipped_at=time.time(),
            denied_before=tuple(sorted({flow.caller.workload for flow in denied(verdict)})),
        )
        self._keep(flip)
        try:
            index = await set_mode(self._mesh, service, MutualTLSMode.STRICT)
        except TidegateError as error:
            # It may have been written all the same: only the answer is missing.
            await self._roll_back(flip, f"the server did not confirm the entry ({error})", ())
            return
        self.tell("written", f"{service}: MutualTLSMode is strict now")
        await self._enforce_and_watch(flip, index)

    async def _has_way_back(self, former: MutualTLSMode | None, *, force: bool) -> bool:
        """Whether the guard could restore the entry, or need not; tells why not otherwise."""
        command = await self._mesh.opens_gate(self.service) if former else ""
        if not command:
            return True
        why = (
            f"the guard could not make {self.service} permissive again: AllowEnablingPermissiveMutualTLS is false in"
            " the mesh config entry"
        )
        if force:
            self.tell("no-way-back", f"{self.service}: {why}")
            return True
        self.tell(
            "refused",
            f"{why}: not flipped (--force flips all the same; `{command}` opens it)",
            exit_code=1,
        )
        return False

    async def resume(self, flip: Flip) -> None:
        """Goes on where a former agent was killed or stopped."""
        if flip.back_because:
            await self._roll_back(flip, flip.back_because, ())
            return
        own = await self._insist(lambda: own_entry(self._mesh, self.service))
        if own.mutual_tls_mode is not MutualTLSMode.STRICT:
            self._end_unflipped()
        elif flip.enforced_at is None:
            await self._enforce_and_watch(flip, own.modify_index)
        else:
            await self._watch(flip, flip.enforced_at)

    async def _enforce_and_watch(self, flip: Flip, index: int) -> None:
        service = self.service
        try:
            count = await running_mode(self._mesh, service, index, MutualTLSMode.STRICT)
        except TidegateError as error:
            await self._roll_back(flip, str(error), ())
            return
        self.tell("enforced", f"{service}: {count} of {count} sidecars run strict mode")
        enforced_at = time.time()
        flip = msgspec.structs.replace(flip, enforced_at=enforced_at)
        self._keep_if_possible(flip)
        await self._watch(flip, enforced_at)

    async def _watch(self, flip: Flip, enforced_at: float) -> None:
        """Until the guard's time is over and everything since the flip was seen."""
        service = self.service
        guard_until = enforced_at + flip.guard_s
        told_blind = ""
        told_open = 0
        while True:
            now = time.time()
            try:
                verdict = await self._mesh.verdict(service, max(now - flip.flipped_at, POLL_S))
                if verdict.mode is not MutualTLSMode.STRICT and not await self._is_strict():
                    self._end_unflipped()
                    return
                refused, blind = refused_callers(verdict), _blindness(verdict)
                newly_denied = denied_callers(verdict, flip.denied_before)
                open_now = sum(one.permissive_open for one in verdict.witness)
            except TidegateError as error:
                refused, newly_denied, blind, open_now = (), (), str(error), told_open
            if refused or newly_denied:
                why = _names(refused, "refused") if refused else _names(newly_denied, "denied")
                await self._roll_back(flip, why, (*refused, *newly_denied))
                return
            self._tell_open(open_now, told_open)
            told_open = open_now
            is_drained = not open_now or now >= enforced_at + _DRAIN_TIMES * self._drain_s
            if now >= guard_until and not blind and is_drained:
                break
            if blind and now >= guard_until + BLIND_GRACE_S:
                self._forget()
                self.tell(
                    "unwatched",
                    f"{service} is strict; whether a known caller was refused is not known: {blind}",
                    exit_code=2,
                )
                return
            if blind and blind != told_blind:
                self.tell("blind", f"{service}: the guard cannot see everything: {blind}")
            told_blind = blind
            self.tell(
                "guarding",
                f"{service}: nobody was refused{', as far as can be seen' if blind else ''}",
                remaining_s=max(guard_until - now, 0.0),
            )
            await asyncio.sleep(POLL_S)
        self._forget()
        left = f"; {_plaintext(told_open)} still open" if told_open else ""
        self.tell("kept", f"{service} is strict; no known caller was refused{left}", exit_code=0)

    def _tell_open(self, count: int, before: int) -> None:
        if count and count != before:
            self.tell(
                "draining",
                f"{self.service}: {_plaintext(count)} still open; the sidecar closes what was open at the flip",
            )
        elif before and not count:
            self.tell("drained", f"{self.service}: no plaintext connection is left")

    async def _roll_back(self, flip: Flip, why: str, refused: tuple[Reason, ...]) -> None:
        service, mode = self.service, flip.former_mode
        self._keep_if_possible(msgspec.structs.replace(flip, back_because=why))
        self.tell("rolling-back", f"{service}: {why}; rolling back", reasons=refused)

        async def restore() -> int:
            own = await own_entry(self._mesh, service)
            if own.mutual_tls_mode is not MutualTLSMode.STRICT:
                return own.modify_index
            return await set_mode(self._mesh, service, flip.former_entry_mode)

        index = await self._insist(restore)
        try:
            await running_mode(self._mesh, service, index, mode)
        except TidegateError as error:
            lag = f"; {error}"
        else:
            lag = ""
        self._forget()
        self.tell(
            "rolled-back",
            f"{service} is {mode} again, because {why}{lag}",
            reasons=refused,
            exit_code=1,
        )

    def _end_unflipped(self) -> None:
        self._forget()
        self.tell(
            "ended",
            f"{self.service}: its MutualTLSMode is not strict (never written, or changed since); nothing to guard",
            exit_code=1,
        )

    async def _is_strict(self) -> bool:
        own = await own_entry(self._mesh, self.service)
        return own.mutual_tls_mode is MutualTLSMode.STRICT

    async def _insist(self, step: Callable[[], Awaitable[_T]]) -> _T:
        """Does a step again and again while the intent server is away or out of order."""
        told = ""
        while True:
            try:
                return await step()
            except (CatalogUnreachable, CatalogRefused) as error:
                if isinstance(error, CatalogRefused) and error.status < 500:
                    raise
                if str(error) != told:
                    told = str(error)
                    self.tell("waiting", f"{self.service}: {told}; trying again")
            await asyncio.sleep(POLL_S)

    def _keep(self, flip: Flip) -> None:
        try:
            write_atomically(self._path, msgspec.json.encode(flip))
        except OSError as error:
            raise TidegateError(f"{self._path} cannot be written: {error.strerror}") from error

    def _keep_if_possible(self, flip: Flip) -> None:
        """The former content of the file lets the next agent do this step again."""
        try:
            self._keep(flip)
        except TidegateError as error:
            log.warning("a flip goes on unrecorded", service=self.service, reason=str(error))

    def _forget(self) -> None:
        self._path.unlink(missing_ok=True)


def refused_callers(verdict: Verdict) -> tuple[Reason, ...]:
    """The known callers that opened connections in the verdict's window which strict refuses."""
    return tuple(
        reason
        for reason in verdict.reasons
        if reason.kind is ReasonKind.BLOCKING_FLOW
        and reason.connections > 0
        and reason.caller is not None
        and reason.caller.kind is CallerKind.WORKLOAD
    )


def _blindness(verdict: Verdict) -> str:
    """Why refused callers may not have been seen; empty when they must have been."""
    if verdict.coverage.complete:
        return ""
    told = (reason.message for reason in verdict.reasons if reason.kind in _BLINDING)
    return next(told, "not every instance was observed all the time")


def denied(verdict: Verdict) -> tuple[CallerFlow, ...]:
    """Flows of known callers with mTLS that the sidecars refuse because of intentions, in the verdict's window."""
    return tuple(
        flow
        for flow in verdict.flows(Effect.MESH)
        if flow.permission.would_be_denied
        and flow.connections > 0
        and flow.caller.kind is CallerKind.WORKLOAD
    )


def denied_callers(verdict: Verdict, before: tuple[str, ...]) -> tuple[Reason, ...]:
    """The known callers that intentions deny, those left out that they denied `before` the flip already."""
    return tuple(
        Reason(
            kind=ReasonKind.DENIED,
            message=f"{flow.caller.workload} ({flow.caller.address}) calls {verdict.service} with mTLS, and intentions"
            " deny it",
            caller=flow.caller,
            flow_class=flow.flow_class,
            port=flow.port,
            connections=flow.connections,
            last_seen=flow.last_seen,
        )
        for flow in denied(verdict)
        if flow.caller.workload not in before
    )


def _names(reasons: tuple[Reason, ...], what: str) -> str:
    names = list(dict.fromkeys(one.caller.workload for one in reasons if one.caller))
    return f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} {what}"


def _plaintext(count: int) -> str:
    return "1 plaintext connection is" if count == 1 else f"{count} plaintext connections are"


def _log_event(event: Event) -> None:
    if event.event != "guarding":
        log.info(event.message, event=event.event, service=event.service)
