"""Has a redirection compared as soon as the kernel tells of a change in its namespace.

Runs beside the agent's rounds: whatever they wait for, the intent server or a sidecar, a change by somebody else is
repaired at once. Kernels tell of changes of nftables; legacy tables are compared in every round.
"""

import asyncio
from collections.abc import Iterable

from tidegate.enforce.redirect.watch import Watcher
from tidegate.kernel.errors import KernelError
from tidegate.node.events import first_of
from tidegate.node.keeper import Keeper
from tidegate.node.log import Log
from tidegate.node.pool import Pool

log = Log("drift")

BUSY_S = 0.05
"""How soon a workload that is worked on already is asked for again."""
FAILED_S = 0.5
"""How soon it is tried again to listen to the kernel."""


class Drift:
    """Watches the redirected workloads of a node. All methods are for the thread of the event loop."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._watcher = Watcher()
        self._watched: dict[str, Keeper] = {}
        self._pending: set[str] = set()
        """Paths of namespaces that were changed while work for their workload was going on."""
        self._failure = ""
        self._deaf: tuple[str, ...] = ()

    def close(self) -> None:
        """Let go of all namespaces."""
        self._watcher.close()

    def problems(self) -> tuple[str, ...]:
        """Why changes may be noticed late."""
        faults = (*self._deaf, *((self._failure,) if self._failure else ()))
        return (f"changes of rules are noticed late: {'; '.join(faults)}",) if faults else ()

    def follow(self, keepers: Iterable[Keeper]) -> None:
        """Watch the namespaces of those of the workloads that are redirected, and no others."""
        redirected = {keeper.workload.netns: keeper for keeper in keepers if keeper.in_mesh}
        # A socket keeps its namespace alive: what is no longer needed is let go at once.
        for path in (self._watched.keys() - redirected.keys()) | set(self._watcher.stale()):
            self._watcher.forget(path)
        self._watched = redirected
        deaf = []
        for path in sorted(redirected):
            try:
                self._watcher.watch(path)
            except KernelError as error:
                deaf.append(str(error))
        self._deaf = tuple(deaf)

    async def run(self, stop: asyncio.Event) -> None:
        """Have what changes compared, until `stop`."""
        loop = asyncio.get_running_loop()
        watched = self._watcher.fileno()
        woken = asyncio.Event()

        def wake() -> None:
            # It stays readable until it is asked what has changed.
            loop.remove_reader(watched)
            woken.set()

        try:
            while not stop.is_set():
                woken.clear()
                try:
                    self._look()
                except (KernelError, OSError) as error:
                    self._fail(str(error))
                    await first_of(FAILED_S, stop)
                    continue
                self._failure = ""
                loop.add_reader(watched, wake)
                await first_of(BUSY_S if self._pending else None, stop, woken)
        finally:
            loop.remove_reader(watched)

    def _fail(self, failure: str) -> None:
        if failure != self._failure:
            log.warning("the kernel cannot be listened to", reason=failure)
        self._failure = failure

    def _look(self) -> None:
        self._pending.update(self._watcher.changed())
        for path in tuple(self._pending):
            keeper = self._watched.get(path)
            if keeper is None or self._pool.submit(keeper.workload.id, keeper.look):
                self._pending.remove(path)
