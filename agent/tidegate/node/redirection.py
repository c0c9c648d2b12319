"""Keeps one workload's redirection in the kernel as its policy says: applies, notices changes by others, repairs.

Level-triggered, as the keeper that it belongs to. What the backends do is the engine's business; this knows what
counts as a repair, and what becomes of a workload whose rules the kernel does not take.
"""

import collections
import contextlib
import enum
import time
from collections.abc import Iterator

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
    """The redirection of one workload. Worked on by one thread at a time; what it tells may be read from any."""

    def __init__(self, name: str, engine: Engine, *, on_failure: OnFailure, adopt: bool) -> None:
        self.last_repair = ""
        """What was different when the rules were last repaired."""
        self._name = name
        self._engine = engine
        self._on_failure = on_failure
        self._adopt = adopt
        self._repairs: collections.deque[float] = collections.deque(maxlen=REPAIRS_KEPT)
        self.forget()

    def forget(self) -> None:
        """What is known of the namespace does not hold any more: it is another one, or gone."""
        self.state = Redirection.NONE
        self.notes: tuple[str, ...] = ()
        """What goes around the sidecar although the rules are as they should be, one sentence each."""
        self.foreign: tuple[str, ...] = ()
        """What another mesh does to the same connections, one sentence each."""
        self._applied_by: Policy | None = None
        self._looked_at = 0.0
        self._noted_at = 0.0
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
        return sum(at >= since for at in tuple(self._repairs))

    def is_as_wanted(self, netns_path: str, policy: Policy) -> bool:
        """Whether the kernel has the rules of the policy, whoever applied them; False while the namespace rests.

        KernelError when it cannot tell.
        """
        if self._rests(policy):
            return False
        with self._pacing(policy):
            return not self._engine.check(netns_path, policy)

    def note_loss(self, netns_path: str) -> None:
        """Rules were in force there when an agent last looked: that they are gone is as if it had seen it happen.

        Rules that are merely different are not counted: an agent of another version may have loaded them.
        """
        if self._engine.backend_of(netns_path) is None:
            self._count("the rules were gone when the agent came back")

    def wait(self) -> None:
        """The sidecar has never been ready: no rules yet."""
        self.state = Redirection.WAITING

    def look(self, netns_path: str) -> None:
        """As `keep`, by the policy in force, and at once: the kernel says that somebody changed something."""
        if self._applied_by is not None:
            self.keep(netns_path, self._applied_by, look=True)

    def keep(self, netns_path: str, policy: Policy, *, look: bool = False) -> None:
        """Make the kernel follow the policy. `look` asks for a comparison although nothing seems to have happened.

        KernelError when the kernel does not take the rules; by configuration the workload is blocked then.
        """
        self._removed_at = None
        now = time.monotonic()
        settled = self.state is Redirection.APPLIED and self._applied_by == policy
        if settled and not look and now - self._looked_at < self._pace_s:
            return
        if self._rests(policy):
            # What happened meanwhile is looked at after the rest.
            self._looked_at = 0.0 if look else self._looked_at
            return
        self._looked_at = now
        try:
            with self._pacing(policy):
                if settled:
                    self._repair(netns_path, policy)
                else:
                    self._apply(netns_path, policy)
                self._unblock(netns_path)
                if look or not settled or now - self._noted_at >= LOOKED_S:
                    self._note(netns_path, policy)
                    self._noted_at = now
        except KernelError:
            self.fail(netns_path)
            raise
        self._applied_by = policy
        self.state = Redirection.APPLIED

    def _rests(self, policy: Policy) -> bool:
        """Whether the namespace is to be left alone. KernelError, the one of before, if work there failed."""
        rests = time.monotonic() < self._rest_until and self._tried == policy
        if rests and self._refusal is not None:
            raise self._refusal
        return rests

    @contextlib.contextmanager
    def _pacing(self, policy: Policy) -> Iterator[None]:
        """Work in the namespace, and then a rest if it failed or took long."""
        began = time.monotonic()
        self._tried = policy
        try:
            yield
        except KernelError as error:
            self._refusal = error
            self._rest(FIRST_REST_S)
            raise
        self._refusal = None
        took = time.monotonic() - began
        if took > LONG_S:
            self._rest(took * RESTS_FOR)
        else:
            self._rested_s = 0.0

    def _rest(self, at_least_s: float) -> None:
        """Leave the namespace alone for a while, longer each time: work there takes a thread and the machine's time."""
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
        self._found(applied)

    def _repair(self, netns_path: str, policy: Policy) -> None:
        differences = self._engine.check(netns_path, policy)
        if not differences:
            self.foreign = ()
            return
        applied = self._engine.apply(netns_path, policy, adopt=self._adopt)
        self._found(applied)
        if applied.change is Change.UNCHANGED and not applied.adopted:
            return
        self._count(_told(differences))

    def _count(self, different: str) -> None:
        self.last_repair = different
        self._repairs.append(time.time())
        log.warning(
            "redirection was not as it should be; repaired",
            workload=self._name,
            different=different,
        )

    def _found(self, applied: Applied) -> None:
        """What other meshes have there, with the reason where it was to be adopted and could not be."""
        self.foreign = tuple(
            next((refused for refused in applied.refused if refused.startswith(one)), one)
            for one in applied.foreign
        )

    def _note(self, netns_path: str, policy: Policy) -> None:
        try:
            gaps = self._engine.gaps(netns_path, policy)
        except KernelError as error:
            gaps = (f"what goes around the sidecar cannot be told: {error}",)
        notes = tuple(gap for gap in gaps if not any(one.startswith(gap) for one in self.foreign))
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
