"""The keepers of a node's workloads: each gets one when it comes, and what is left of it is removed when it goes.

What is wanted of each is submitted here, and done in the threads of a pool. Called from one thread, but for `all`,
`by_id` and `staying`, which any may read.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar import envoy
from tidegate.model import Sidecar, Workload
from tidegate.node.config import AgentConfig
from tidegate.node.keeper import Keeper, WantedRules, abandoned
from tidegate.node.log import Log
from tidegate.node.metrics import Metrics
from tidegate.node.pool import Pool
from tidegate.node.problems import Problems
from tidegate.node.sidecar import Wanted

PATIENCE_S = 0.3
"""How long a round waits for the work on the workloads that it has asked for; it goes on beside later rounds."""

log = Log("daemon")


class Keepers:
    """Of one node."""

    def __init__(
        self, config: AgentConfig, engine: Engine, pool: Pool, problems: Problems, metrics: Metrics
    ) -> None:
        self._config = config
        self._engine = engine
        self._pool = pool
        self._problems = problems
        self._metrics = metrics
        self._kept: dict[str, Keeper] = {}
        self._directories: dict[str, Path] = {}
        """Of the workloads that have been asked for, by id."""
        self._leaving: set[str] = set()
        """Ids of workloads that are gone and are being removed."""
        self._abandoned: dict[Path, Keeper] = {}
        """What former agents left of workloads that are gone, by directory, until it is removed."""

    @property
    def all(self) -> tuple[Keeper, ...]:
        """Every workload that is there, those that are being removed among them."""
        return tuple(self._kept.values())

    @property
    def by_id(self) -> dict[str, Keeper]:
        return dict(self._kept)

    @property
    def staying(self) -> tuple[Keeper, ...]:
        """Every workload that is not being removed."""
        return tuple(
            keeper for key, keeper in tuple(self._kept.items()) if key not in self._leaving
        )

    @property
    def idle(self) -> tuple[Keeper, ...]:
        """Those for which nothing goes on."""
        return tuple(one for one in self.staying if not self._pool.is_busy(one.workload.id))

    @property
    def have_been_tried(self) -> bool:
        """Whether all have been looked at, or could not be."""
        return all(one.has_looked for one in self.staying if one not in self.idle)

    def is_leaving(self, workload: Workload) -> bool:
        """Whether what was this workload is being removed."""
        return workload.id in self._leaving

    def problems(self) -> Iterator[str]:
        """What is left of workloads that are gone and cannot be removed."""
        for keeper in tuple(self._abandoned.values()):
            for problem in keeper.problems:
                yield f"what was left of {keeper.workload.name} cannot be removed: {problem}"

    def free(self, workload: Workload) -> Keeper | None:
        """Its keeper, if nothing goes on for it that the next step would have to wait for."""
        key = workload.id
        keeper = self._kept.get(key)
        if keeper is None or key in self._leaving or self._pool.is_busy(key):
            return None
        return keeper if keeper.is_of(workload) else None

    def remove_gone(self, living: Mapping[str, Workload]) -> list[Keeper]:
        """Has workloads removed that are gone, called otherwise or elsewhere; those of which nothing is left.

        What cannot be removed is tried again: the kernel may refuse now and let it go later.
        """
        for key, keeper in self._kept.items():
            if (key not in self._leaving and self._stays(keeper, living)) or keeper.is_removed:
                continue
            if self._pool.submit(key, keeper.remove) and key not in self._leaving:
                log.info(
                    "workload gone", workload=keeper.workload.name, netns=keeper.workload.netns
                )
                self._leaving.add(key)
        self._pool.wait(self._leaving, PATIENCE_S)
        gone = [
            keeper
            for key, keeper in self._kept.items()
            if key in self._leaving and keeper.is_removed and not self._pool.is_busy(key)
        ]
        for keeper in gone:
            key = keeper.workload.id
            del self._kept[key]
            self._directories.pop(key, None)
            self._leaving.remove(key)
            self._problems.forget(key)
        return gone

    def _stays(self, keeper: Keeper, living: Mapping[str, Workload]) -> bool:
        workload = living.get(keeper.workload.id)
        return workload is not None and keeper.is_of(workload)

    def remove_abandoned(self, living: Iterable[Workload], *, look: bool) -> None:
        """Removes what former agents left of workloads that are gone.

        `look` for such: not while it is unknown which workloads there are.
        """
        claimed = {self._directory(workload) for workload in living}
        claimed |= {self._directory(keeper.workload) for keeper in self._kept.values()}
        found = set(self._sidecars.glob("*")) - claimed if look else set()
        for directory in sorted(found - self._abandoned.keys()):
            log.info("a workload was left behind", directory=str(directory))
            self._abandoned[directory] = abandoned(directory, envoy.binary, self._engine)
        for directory, keeper in self._abandoned.items():
            if directory not in claimed:
                self._pool.submit(str(directory), keeper.remove)
        self._pool.wait(map(str, self._abandoned), PATIENCE_S)
        for directory in [*self._abandoned]:
            key = str(directory)
            if not self._pool.is_busy(key) and (directory in claimed or not directory.exists()):
                del self._abandoned[directory]
                self._problems.clear("defect", key)

    def take_in(self, workload: Workload) -> None:
        """The workload has a keeper that knows its description, unless another one still works in its place."""
        key = workload.id
        if key in self._leaving or self._pool.is_busy(key) or self._is_being_cleared(workload):
            return
        if key not in self._kept:
            log.info(
                "workload found",
                workload=workload.name,
                namespace=workload.namespace,
                meshed=workload.meshed,
                sidecar=workload.sidecar,
                reason=workload.reason,
            )
            self._kept[key] = Keeper(
                workload,
                self._directory(workload),
                envoy.binary,
                f"{workload.name}.{self._config.node}",
                self._engine,
                self._config.redirect,
                self._config.drain_time,
                self._metrics,
            )
        keeper = self._kept[key]
        if keeper.is_of(workload):
            keeper.update(workload)

    def _is_being_cleared(self, workload: Workload) -> bool:
        """Whether what is left of another one has to be removed from its namespace or its directory first."""
        leaving = (self._kept[key].workload for key in self._leaving)
        cleared = [(self._directory(one), one.netns) for one in leaving]
        cleared += [(path, keeper.workload.netns) for path, keeper in self._abandoned.items()]
        place = self._directory(workload)
        return any(path == place or found == workload.netns for path, found in cleared)

    def submit(self, keeper: Keeper, wanted: Wanted | WantedRules | None) -> str:
        """Has a step taken; what to `wait` for."""
        key = keeper.workload.id
        self._pool.submit(key, lambda: keeper.reconcile(wanted))
        return key

    def look_for_sidecars(self) -> None:
        """Has those workloads looked at whose outbound connections pass until their sidecar listens."""
        for keeper in self.staying:
            if keeper.awaits_sidecar:
                self._pool.submit(keeper.workload.id, keeper.look_for_sidecar)

    def wait(self, asked: Iterable[str]) -> None:
        """Waits for the steps, as long as a round may; then tells which workloads' work came upon a defect.

        Of those that are gone nobody would ask.
        """
        asked = tuple(asked)
        self._pool.wait(asked, PATIENCE_S)
        names = {key: keeper.workload.name for key, keeper in self._kept.items()}
        names |= {str(path): keeper.workload.name for path, keeper in self._abandoned.items()}
        defects = self._pool.defects()
        for key, error in defects.items():
            if key in names:
                self._problems.tell_defect("defect", key, names[key], error)
            else:
                log.exception("a workload was not removed whole by a defect of the agent", error)
        for key in asked:
            if key not in defects and not self._pool.is_busy(key):
                self._problems.clear("defect", key)

    def _directory(self, workload: Workload) -> Path:
        """The workload's directory: short, and another one for another workload of the same name.

        It is the same when a workload that brings its own sidecar is called otherwise.
        """
        directory = self._directories.get(workload.id)
        if directory is None:
            digest = hashlib.sha256(workload.id.encode()).hexdigest()[:8]
            name = re.sub(r"[^a-z0-9-]", "-", workload.name)[:40]
            own = workload.sidecar is Sidecar.OWN
            present = sorted(self._sidecars.glob(f"*-{digest}")) if own else []
            directory = present[0] if present else self._sidecars / f"{name}-{digest}"
            self._directories[workload.id] = directory
        return directory

    @property
    def _sidecars(self) -> Path:
        return self._config.run_dir / "sidecars"
