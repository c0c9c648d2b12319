"""Keeps one workload's redirection in the kernel as its policy says: applies, notices changes by others, repairs.

Level-triggered, as the keeper that it belongs to. What the backends do is the engine's business; this knows what
counts as a repair, and what becomes of a workload whose rules the kernel does not take.
"""

import collections
import enum
import time

from tidegate.enforce.redirect import block
from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Applied, Engine
from tidegate.intent.policy import Policy
from tidegate.kernel.errors import KernelError
from tidegate.node.config import OnFailure
from tidegate.node.log import Log

REPAIRS_KEPT = 1000
LOOKED_S = 10.0
"""Without an event of the kernel, rules are compared with the policy this often; the legacy tables have no events."""
DIFFERENCES_TOLD = 3
LONG_S = 0.5
"""What takes longer in a namespace was made long by somebody there."""
RESTS_FOR = 4
"""How many times as long as it took it is then left alone..."""
FIRST_REST_S = 0.4
"""...or, when it failed, at least this long, and twice as long each time..."""
LONGEST_REST_S = 30.0
"""...up to this."""

log = Log("redirection")


class Redirection(enum.StrEnum):
    """State of a workload's redirect rules."""

    NONE = "none"
    WAITING = "waiting"
    """Meshed, but the sidecar has not been ready yet."""
    APPLIED = "applied"
    FAILED = "failed"
    """The rules could not be applied; traffic goes as it goes without them."""
    BLOCKED = "blocked"
    """The rules could not be applied, and by configuration nothing passes until they can."""


class WorkloadRedirection:
    """The redirection of one workload. Called from one thread."""

    def __init__(self, name: str, engine: Engine, *, on_failure: OnFailure, adopt: bool) -> None:
        self.state = Redirection.NONE
        self.notes: tuple[str, ...] = ()
        """What goes around the sidecar although the rules are as they should be, one sentence each."""
        self.foreign: tuple[str, ...] = ()
        """What another mesh does to the same connections, one sentence each."""
        self.last_repair = ""
        """What was different when the rules were last repaired."""
        self._name = name
        self._engine = engine
        self._on_failure = on_failure
        self._adopt = adopt
        self._applied_by: Policy | None = None
        self._repairs: collections.deque[float] = collections.deque(maxlen=REPAIRS_KEPT)
        self._looked_at = 0.0
        self._tried: Policy | None = None
        self._refusal: KernelError | None = None
        """Why the rules could not be applied when that was last tried."""
        self._rest_until = 0.0
        self._rested_s = 0.0
        self._removed_at: float | None = None
        """When the kernel was last seen without rules; None when it may have some."""
        self._blocked_before: bool | None = None
        """Whether a block may be in place; None before the kernel was asked."""

    def repairs(self, since: float) -> int:
        """How often since `since` somebody else had changed the rules, and they were repaired."""
        return sum(at >= since for at in self._repairs)

    def is_as_wanted(self, netns_path: str, policy: Policy) -> bool:
        """Whether the kernel has the rules of the policy, whoever applied them. KernelError when it cannot tell."""
        return not self._engine.check(netns_path, policy)

    def wait(self) -> None:
        """The sidecar has never been ready: no rules yet."""
        self.state = Redirection.WAITING

    def keep(self, netns_path: str, policy: Policy, *, look: bool) -> None:
        """Make the kernel follow the policy. `look` asks for a comparison although nothing seems to have happened.

        KernelError when the kernel does not take the rules; by configuration the workload is blocked then.
        """
        self._removed_at = None
        now = time.monotonic()
        settled = self.state is Redirection.APPLIED and self._applied_by == policy
        if settled and not look and now - self._looked_at < self._pace_s:
            return
        if now < self._rest_until and self._tried == policy:
            if self._refusal is not None:
                raise self._refusal
            # What happened meanwhile is looked at after the rest.
            self._looked_at = 0.0 if look else self._looked_at
            return
        self._looked_at = now
        self._tried = policy
        try:
            if settled:
                self._repair(netns_path, policy)
            else:
                self._apply(netns_path, policy)
            self._unblock(netns_path)
        except KernelError as error:
            self._refusal = error
            self._rest(FIRST_REST_S)
            self.fail(netns_path)
            raise
        self._refusal = None
        self._applied_by = policy
        self.state = Redirection.APPLIED
        took = time.monotonic() - now
        if took > LONG_S:
            self._rest(took * RESTS_FOR)
        else:
            self._rested_s = 0.0

    def _rest(self, at_least_s: float) -> None:
        """Leave the namespace alone for a while, longer each time: the other workloads wait meanwhile."""
        self._rested_s = min(max(at_least_s, 2 * self._rested_s), LONGEST_REST_S)
        self._rest_until = time.monotonic() + self._rested_s

    def fail(self, netns_path: str) -> None:
        """The workload cannot be redirected: by configuration nothing of it passes, or all of it passes as it is."""
        self.state = Redirection.FAILED
        self._removed_at = None
        if self._on_failure is OnFailure.BLOCK:
            if block.block(netns_path) is not Change.UNCHANGED:
                log.warning("nothing passes: rules cannot be applied", workload=self._name)
            self._blocked_before = True
            self.state = Redirection.BLOCKED

    def remove(self, netns_path: str) -> None:
        """Take the rules away, whoever applied them. KernelError when they cannot be removed."""
        now = time.monotonic()
        if self._removed_at is not None and now - self._removed_at < LOOKED_S:
            return
        if self._engine.remove(netns_path) is Change.REMOVED:
            log.info("redirection removed", workload=self._name)
        self.state = Redirection.NONE
        self.notes = ()
        self.foreign = ()
        self._applied_by = None
        self._blocked_before = False
        self._removed_at = now

    @property
    def _pace_s(self) -> float:
        return LOOKED_S if self._engine.choice.backend is BackendName.NFTABLES else 0.0

    def _apply(self, netns_path: str, policy: Policy) -> None:
        applied = self._engine.apply(netns_path, policy, adopt=self._adopt)
        if applied.change is not Change.UNCHANGED:
            log.info(
                "redirection applied",
                workload=self._name,
                change=applied.change,
                backend=applied.backend,
                adopted=list(applied.adopted),
            )
        self._note(netns_path, policy, applied)

    def _repair(self, netns_path: str, policy: Policy) -> None:
        differences = self._engine.check(netns_path, policy)
        if not differences:
            self.foreign = ()
            return
        applied = self._engine.apply(netns_path, policy, adopt=self._adopt)
        self._note(netns_path, policy, applied)
        if applied.change is Change.UNCHANGED and not applied.adopted:
            return
        self.last_repair = _told(differences)
        self._repairs.append(time.time())
        log.warning(
            "redirection was not as it should be; repaired",
            workload=self._name,
            different=self.last_repair,
        )

    def _note(self, netns_path: str, policy: Policy, applied: Applied) -> None:
        self.foreign = applied.foreign
        gaps = self._engine.gaps(netns_path, policy)
        notes = tuple(gap for gap in gaps if gap not in applied.foreign)
        for note in notes:
            if note not in self.notes:
                log.warning(note, workload=self._name)
        self.notes = notes

    def _unblock(self, netns_path: str) -> None:
        if self._blocked_before is False:
            return
        if block.unblock(netns_path) is Change.REMOVED:
            log.info("unblocked", workload=self._name)
        self._blocked_before = False


def _told(differences: tuple[str, ...]) -> str:
    more = len(differences) - DIFFERENCES_TOLD
    return "; ".join((*differences[:DIFFERENCES_TOLD], *((f"{more} more",) if more > 0 else ())))
