"""Flipping a service to strict, and guarding the flip.

Steps, each told as an event: the verdict must be READY (or forced); the service's entry is written; every sidecar
of the service reports that it runs the new mode; then, for the time of the guard, a known caller that is
refused brings the former mode back. An address that no workload has is not a known caller: somebody
who knocks from outside cannot hold a service open. A flip under guard is kept in a file, so that an agent that is
killed meanwhile takes the guard up again.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from tidegate.errors import TidegateError
from tidegate.intent.entries import Entry, Kind, ServiceDefaults
from tidegate.model import Instance, MutualTLSMode
from tidegate.node.log import Log
from tidegate.verdict.evidence import CallerKind
from tidegate.verdict.readiness import Answer, Reason, ReasonKind, Verdict

POLL_S = 0.25
ENFORCE_DEADLINE_S = 60.0

log = Log("guard")


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened during a flip. The last one has an `exit_code`."""

    event: str
    message: str
    service: str
    reasons: tuple[Reason, ...] = ()
    remaining_s: float | None = None
    exit_code: int | None = None


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """A flip under way, as it is kept in a file from before the entry is written. Times are unix seconds."""

    service: str
    guard_s: float
    former_entry_mode: MutualTLSMode | None
    """The MutualTLSMode that the service's own entry had; None: it had none and inherited."""
    former_mode: MutualTLSMode
    """What that meant after inheritance."""
    enforced_at: float | None = None
    """When every sidecar was known to run strict mode; None while that is not yet so."""


class Mesh(Protocol):
    """What a flip needs of the rest of the agent."""

    async def verdict(self, service: str, window_s: float | None) -> Verdict: ...

    async def read_entry(self, kind: Kind, name: str) -> Entry | None: ...

    async def write_entry(self, entry: Entry) -> int:
        """Writes and returns the index from which the entry holds."""
        ...

    async def instances(self, service: str) -> tuple[Instance, ...]: ...


class Guard:
    """All flips of this agent; one at a time for a service."""

    def __init__(self, mesh: Mesh, directory: Path) -> None:
        self._mesh = mesh
        self._directory = directory
        self._running: dict[str, asyncio.Task[None]] = {}

    def resume(self) -> None:
        """Takes up the guards that a former agent left."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(self._directory.glob("*.json")):
            try:
                flip = msgspec.json.decode(path.read_bytes(), type=Flip)
            except msgspec.DecodeError as error:
                log.warning(
                    "cannot read a guard left by a former agent", file=str(path), reason=str(error)
                )
                continue
            log.info("guard taken up again", service=flip.service)
            self._start(flip.service, self._guarded(flip), self._log_event)

    async def stop(self) -> None:
        """Ends the tasks; flips under guard stay in their files for the next agent."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def strict(self, service: str, guard_s: float, *, force: bool) -> "asyncio.Queue[Event | None]":
        """Starts a flip; its events come through the queue, then None. It goes on if nobody reads."""
        if service in self._running:
            raise TidegateError(
                f"a flip of {service} is under guard already; wait until it is over"
            )
        queue: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event | None) -> None:
            self._log_event(event)
            queue.put_nowait(event)

        self._start(service, self._flip(service, guard_s, force=force), tell)
        return queue

    def _start(
        self, service: str, events: AsyncIterator[Event], tell: Callable[[Event | None], None]
    ) -> None:
        async def drain() -> None:
            try:
                async for event in events:
                    tell(event)
            except TidegateError as error:
                tell(_event("failed", service, str(error), exit_code=error.exit_code))
            finally:
                self._running.pop(service, None)
                tell(None)

        self._running[service] = asyncio.create_task(drain())

    @staticmethod
    def _log_event(event: Event | None) -> None:
        if event is not None and event.event != "guarding":
            log.info(event.message, event=event.event, service=event.service)

    async def _flip(self, service: str, guard_s: float, *, force: bool) -> AsyncIterator[Event]:
        verdict = await self._mesh.verdict(service, None)
        if verdict.mode is MutualTLSMode.STRICT:
            yield _event("unchanged", service, f"{service} is strict already", exit_code=0)
            return
        if verdict.verdict is not Answer.READY and not force:
            yield _event(
                "refused",
                service,
                f"{service} is {verdict.verdict}: not flipped (--force flips all the same)",
                reasons=verdict.reasons,
                exit_code=verdict.exit_code,
            )
            return
        flip = Flip(
            service=service,
            guard_s=guard_s,
            former_entry_mode=(await self._defaults(service)).mutual_tls_mode,
            former_mode=verdict.mode,
        )
        self._keep(flip)
        async for event in self._guarded(flip):
            yield event

    async def _guarded(self, flip: Flip) -> AsyncIterator[Event]:
        """From the written file to the end of the guard; every step may be done a second time."""
        service = flip.service
        if flip.enforced_at is None:
            index = await self._write_mode(service, MutualTLSMode.STRICT)
            yield _event("written", service, f"{service}: MutualTLSMode is strict now")
            try:
                async for event in self._enforced(service, index, MutualTLSMode.STRICT):
                    yield event
            except TidegateError as error:
                yield _event("failed", service, f"{error}; rolling back")
                async for event in self._roll_back(flip, ()):
                    yield event
                return
            flip = msgspec.structs.replace(flip, enforced_at=time.time())
            self._keep(flip)
        async for event in self._watch(flip, flip.enforced_at or time.time()):
            yield event

    async def _defaults(self, service: str) -> ServiceDefaults:
        entry = await self._mesh.read_entry(Kind.SERVICE_DEFAULTS, service)
        return entry if isinstance(entry, ServiceDefaults) else ServiceDefaults(name=service)

    async def _write_mode(self, service: str, mode: MutualTLSMode | None) -> int:
        defaults = await self._defaults(service)
        return await self._mesh.write_entry(msgspec.structs.replace(defaults, mutual_tls_mode=mode))

    async def _enforced(
        self, service: str, index: int, mode: MutualTLSMode
    ) -> AsyncIterator[Event]:
        """Waits until every sidecar of the service runs `mode` by an intent of at least `index`."""
        deadline = time.monotonic() + ENFORCE_DEADLINE_S
        while True:
            instances = [one for one in await self._mesh.instances(service) if one.meshed]
            behind = [
                one.name for one in instances if one.applied_index < index or one.mode is not mode
            ]
            if not behind:
                yield _event(
                    "enforced",
                    service,
                    f"{service}: {len(instances)} of {len(instances)} sidecars run {mode} mode",
                )
                return
            if time.monotonic() >= deadline:
                raise TidegateError(
                    f"after {ENFORCE_DEADLINE_S:.0f} s these sidecars of {service} do not run {mode}"
                    f" mode: {', '.join(behind)}; see `tidegate lab status`"
                )
            await asyncio.sleep(POLL_S)

    async def _watch(self, flip: Flip, enforced_at: float) -> AsyncIterator[Event]:
        service = flip.service
        guard_until = enforced_at + flip.guard_s
        while True:
            now = time.time()
            refused = refused_callers(await self._mesh.verdict(service, now - enforced_at))
            if refused:
                async for event in self._roll_back(flip, refused):
                    yield event
                return
            if now >= guard_until:
                break
            yield _event(
                "guarding", service, f"{service}: nobody was refused", remaining_s=guard_until - now
            )
            await asyncio.sleep(POLL_S)
        self._forget(service)
        yield _event(
            "kept", service, f"{service} is strict; no known caller was refused", exit_code=0
        )

    async def _roll_back(self, flip: Flip, refused: tuple[Reason, ...]) -> AsyncIterator[Event]:
        service, mode = flip.service, flip.former_mode
        names = ", ".join(dict.fromkeys(one.caller.workload for one in refused if one.caller))
        why = f"{names} was refused" if names else "not every sidecar followed"
        yield _event("rolling-back", service, f"{service}: {why}; rolling back", reasons=refused)
        index = await self._write_mode(service, flip.former_entry_mode)
        async for event in self._enforced(service, index, mode):
            yield event
        self._forget(service)
        yield _event(
            "rolled-back",
            service,
            f"{service} is {mode} again, because {why}",
            reasons=refused,
            exit_code=1,
        )

    def _keep(self, flip: Flip) -> None:
        path = self._path(flip.service)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(flip))
        temporary.rename(path)

    def _forget(self, service: str) -> None:
        self._path(service).unlink(missing_ok=True)

    def _path(self, service: str) -> Path:
        return self._directory / f"{service}.json"


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


def _event(
    event: str,
    service: str,
    message: str,
    *,
    reasons: tuple[Reason, ...] = (),
    remaining_s: float | None = None,
    exit_code: int | None = None,
) -> Event:
    return Event(
        event=event,
        service=service,
        message=message,
        reasons=reasons,
        remaining_s=remaining_s,
        exit_code=exit_code,
    )
