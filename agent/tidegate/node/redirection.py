"""Keeps one workload's redirection in the kernel as its policy says: applies, notices changes by others, repairs.

Level-triggered, as the keeper that it belongs to. What the backends do is the engine's business; this knows what
counts as a repair, and what becomes of a workload whose rules the kernel does not take.
"""

import collections
import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tidegate.enforce.redirect import block
from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Applied, Engine
from tidegate.enforce.redirect.foreign import Left
from tidegate.intent.policy import Policy
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError
from tidegate.node.config import OnFailure
from tidegate.node.log import Log
from tidegate.node.metrics import Metrics

REPAIRS_KEPT = 1000
LOOKED_S = 10.0
"""Without an event of the kernel, rules are compared with the policy this often; the legacy tables have no events."""
DIFFERENCES_TOLD = 3
CONTESTED_S = 60.0
CONTESTED = 5
"""Somebody who changes the rules more often than this in that time goes on doing so: that is told as a problem, and the
log has it once in that time instead of each time."""
LONG_S = 0.5
"""What takes longer in a namespace was made long by somebody there."""
RESTS_FOR = 4
"""How many times as long as it took it is then left alone..."""
FIRST_REST_S = 0.4
"""...or, when it failed, this long, and twice as long each time that it fails again..."""
LONGEST_REST_S = 30.0
"""...but never longer than this."""

_T = TypeVar("_T")

log = Log("redirection")


class Redirection(enum.StrEnum):
    """State of a workload's redirect rules."""

    NONE = "none"
    WAITING = "waiting"
    """Meshed, but the sidecar has not been ready yet."""
    APPLIED = "applied"
    FAILED = "failed"
    """The rules could not be applied, or not all of them taken away; traffic goes as it goes with what is there."""
    BLOCKED = "blocked"
    """The rules could not be applied, and by configuration nothing passes until they can."""


class _Step(enum.Enum):
    """What else than a policy can be tried in a namespace."""

    REMOVE = "remove"
    BLOCK = "block"


class _ReplacedError(KernelError):
    """Another network namespace lies at the workload's path than the one that all is known of."""


class WorkloadRedirection:
    """The redirection of one workload, in one namespace at a time: see `enter`.

    Worked on by one thread at a time; what it tells may be read from any.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        on_failure: OnFailure,
        adopt: bool,
        metrics: Metrics | None = None,
    ) -> None:
        self.last_repair = ""
        """What was different when the rules were last repaired."""
        self._metrics = metrics or Metrics()
        self._name = name
        self._engine = engine
        self._on_failure = on_failure
        self._adopt = adopt
        self._repairs: collections.deque[float] = collections.deque(maxlen=REPAIRS_KEPT)
        self._contest_logged_at = 0.0
        self.enter(None)

    def enter(self, namespace: netns.Identity | None) -> None:
        """From here on it is about this namespace, None for none; what was known of another one does not hold."""
        self._namespace = namespace
        self.state = Redirection.NONE
        self.notes: tuple[str, ...] = ()
        """What goes around the sidecar although the rules are as they should be, one sentence each."""
        self.foreign: tuple[Left, ...] = ()
        """What another mesh does to the same connections."""
        self._applied_by: Policy | None = None
        self._looked_at = 0.0
        self._noted_at = 0.0
        self._tried: Policy | _Step | None = None
        self._refusal: Exception | None = None
        """Why that could not be done when it was last tried."""
        self._rest_until = 0.0
        self._rested_s = 0.0
        self._unseen_since: float | None = None
        """Since when it has not been looked at what somebody changed there, because the namespace rests."""
        self._removed_at: float | None = None
        """When the kernel was last seen without rules; None when it may have some."""
        self.begun_at = 0.0
        """When the first rules were loaded, where there were none; 0 where they were there already."""
        self._blocked_before: bool | None = None
        """Whether a block may be in place; None before the kernel was asked."""

    def repairs(self, since: float) -> int:
        """How often since `since` somebody else had changed the rules, and they were repaired."""
        return sum(at >= since for at in tuple(self._repairs))

    @property
    def unseen(self) -> str:
        """That something was changed there which has not been looked at; empty when all has been."""
        since = self._unseen_since
        if since is None:
            return ""
        return (
            f"something was changed in the network namespace {time.time() - since:.0f} s ago and has not been looked"
            " at, because work there takes long; the redirection may be gone"
        )

    @property
    def contested(self) -> str:
        """That somebody changes the rules again and again; empty when nobody does."""
        times = self.repairs(time.time() - CONTESTED_S)
        if times <= CONTESTED:
            return ""
        return (
            f"somebody else changed the redirection {times} times in the last {CONTESTED_S:.0f} s, and it was repaired"
            f" each time: a second agent, or a program of the workload; the last time {self.last_repair}"
        )

    def is_as_wanted(self, netns_path: str, policy: Policy) -> bool:
        """Whether the kernel has the rules of the policy, whoever applied them; False while the namespace rests.

        KernelError when it cannot tell.
        """
        if self._rests(policy):
            return False
        with self._pacing(policy):
            return not self._there(netns_path, lambda: self._engine.check(netns.CURRENT, policy))

    def note_loss(self, netns_path: str, policy: Policy) -> bool:
        """Rules were in force there when an agent last looked: that they are gone is as if it had seen it happen.

        Rules that are merely different are not counted: an agent of another version may have loaded them. False
        while the namespace rests: it has not been asked. KernelError when it cannot tell.
        """
        if self._rests(policy):
            return False
        with self._pacing(policy):
            found = self._there(netns_path, lambda: self._engine.backend_of(netns.CURRENT))
        if found is None:
            self._count("the rules were gone when the agent came back")
        return True

    def wait(self) -> None:
        """The sidecar has never been ready: no rules yet."""
        self.state = Redirection.WAITING

    def look(self, netns_path: str) -> None:
        """As `keep`, by the policy in force, and at once: the kernel says that somebody changed something."""
        if self._applied_by is not None:
            self.keep(netns_path, self._applied_by, look=True)

    def keep(self, netns_path: str, policy: Policy, *, look: bool = False) -> None:
        """Make the kernel follow the policy. `look` says that something happened, and asks for a comparison at once.

        KernelError when the kernel does not take the rules; by configuration the workload is blocked then. Another
        namespace at the path than that of `enter` is not touched, and a KernelError as well.
        """
        self._removed_at = None
        now = time.monotonic()
        settled = self.state is Redirection.APPLIED and self._applied_by == policy
        if settled and not look and now - self._looked_at < self._pace_s:
            return
        if self._rests(policy):
            if look:
                # It is looked at after the rest.
                self._looked_at = 0.0
                self._miss()
            return
        self._looked_at = now
        noting = look or not settled or now - self._noted_at >= LOOKED_S

        def follow() -> None:
            if settled:
                self._repair(policy)
            else:
                self._apply(policy)
            self._unblock()
            if noting:
                self._note(policy)
                self._noted_at = now

        try:
            with self._pacing(policy):
                self._there(netns_path, follow)
        except _ReplacedError:
            raise
        except Exception:
            # A defect of the agent leaves the workload as little redirected as a refusal of the kernel.
            self._fail(netns_path)
            raise
        self._unseen_since = None
        self._applied_by = policy
        self.state = Redirection.APPLIED

    def _there(self, netns_path: str, work: Callable[[], _T]) -> _T:
        """Do the work inside the namespace that all is known of. KernelError when it does not lie at the path."""

        def checked() -> _T:
            if netns.identity(netns.CURRENT) != self._namespace:
                raise _ReplacedError(f"another network namespace has come to {netns_path}")
            return work()

        return netns.run_in(netns_path, checked)

    def _miss(self) -> None:
        if self._unseen_since is None:
            self._unseen_since = time.time()
            log.warning(
                "something was changed in the network namespace while it rests; it is looked at later",
                workload=self._name,
            )

    def _rests(self, trying: Policy | _Step) -> bool:
        """Whether the namespace is to be left alone. The error of before, if this failed there."""
        rests = time.monotonic() < self._rest_until and self._tried == trying
        if rests and self._refusal is not None:
            raise self._refusal
        return rests

    @contextlib.contextmanager
    def _pacing(self, trying: Policy | _Step) -> Iterator[None]:
        """Work in the namespace, and then a rest if it failed or took long."""
        began = time.monotonic()
        self._tried = trying
        try:
            yield
        except Exception as error:
            self._refusal = error
            self._rested_s = min(max(FIRST_REST_S, 2 * self._rested_s), LONGEST_REST_S)
            self._rest_until = time.monotonic() + self._rested_s
            raise
        self._refusal = None
        self._rested_s = 0.0
        ended = time.monotonic()
        rest = (ended - began) * RESTS_FOR if ended - began > LONG_S else 0.0
        self._rest_until = ended + min(rest, LONGEST_REST_S)

    def fail(self, netns_path: str) -> None:
        """The workload cannot be redirected: by configuration nothing of it passes, or all of it passes as it is.

        KernelError when it cannot be blocked.
        """
        if self._rests(_Step.BLOCK):
            return
        with self._pacing(_Step.BLOCK):
            self._fail(netns_path)

    def _fail(self, netns_path: str) -> None:
        self.state = Redirection.FAILED
        self._removed_at = None
        if self._on_failure is OnFailure.BLOCK:
            change = self._there(netns_path, lambda: block.block(netns.CURRENT))
            if change is not Change.UNCHANGED:
                log.warning("nothing passes: rules cannot be applied", workload=self._name)
            self._blocked_before = True
            self.state = Redirection.BLOCKED

    def remove(self, netns_path: str) -> None:
        """Take the rules away, whoever applied them.

        KernelError when not all of them can be removed. As `keep`, it touches no other namespace than that of `enter`;
        before that, whatever lies at the path.
        """
        now = time.monotonic()
        if self._removed_at is not None and now - self._removed_at < LOOKED_S:
            return
        if self._rests(_Step.REMOVE):
            return
        self._applied_by = None
        try:
            with self._pacing(_Step.REMOVE):
                if self._namespace is None:
                    change = self._engine.remove(netns_path)
                else:
                    change = self._there(netns_path, lambda: self._engine.remove(netns.CURRENT))
        except Exception:
            if self.state is Redirection.APPLIED:
                self.state = Redirection.FAILED
            raise
        if change is Change.REMOVED:
            log.info("redirection removed", workload=self._name)
        self.state = Redirection.NONE
        self.notes = ()
        self.foreign = ()
        self._unseen_since = None
        self._blocked_before = False
        self._removed_at = now

    @property
    def _pace_s(self) -> float:
        return LOOKED_S if self._engine.choice.backend is BackendName.NFTABLES else 0.0

    def _apply(self, policy: Policy) -> None:
        applied = self._engine_applies(policy)
        if applied.change is not Change.UNCHANGED:
            log.info(
                "redirection applied",
                workload=self._name,
                change=applied.change,
                backend=applied.backend,
                adopted=list(map(str, applied.adopted)),
            )
            if applied.change is Change.CREATED and self._applied_by is None:
                self.begun_at = time.time()
        self._note_foreign(applied.foreign)

    def _repair(self, policy: Policy) -> None:
        differences = self._engine.check(netns.CURRENT, policy)
        if not differences:
            self.foreign = ()
            return
        applied = self._engine_applies(policy)
        self._note_foreign(applied.foreign)
        if applied.change is Change.UNCHANGED and not applied.adopted:
            return
        self._count(_told(differences))

    def _engine_applies(self, policy: Policy) -> Applied:
        with self._metrics.applying():
            return self._engine.apply(netns.CURRENT, policy, adopt=self._adopt)

    def _count(self, different: str) -> None:
        self.last_repair = different
        self._repairs.append(time.time())
        self._metrics.repaired()
        message, now = "redirection was not as it should be; repaired", time.time()
        if contested := self.contested:
            if now - self._contest_logged_at < CONTESTED_S:
                return
            self._contest_logged_at, message = now, contested
        log.warning(message, workload=self._name, different=different)

    def _note(self, policy: Policy) -> None:
        try:
            notes = self._engine.gaps(netns.CURRENT, policy)
        except KernelError as error:
            notes = (f"what goes around the sidecar cannot be told: {error}",)
        for note in notes:
            if note not in self.notes:
                log.warning(note, workload=self._name)
        self.notes = notes

    def _note_foreign(self, foreign: tuple[Left, ...]) -> None:
        for left in foreign:
            if left not in self.foreign:
                log.warning(str(left), workload=self._name)
        self.foreign = foreign

    def _unblock(self) -> None:
        if self._blocked_before is False:
            return
        if block.unblock(netns.CURRENT) is Change.REMOVED:
            log.info("unblocked", workload=self._name)
        self._blocked_before = False


def _told(differences: tuple[str, ...]) -> str:
    more = len(differences) - DIFFERENCES_TOLD
    return "; ".join((*differences[:DIFFERENCES_TOLD], *((f"{more} more",) if more > 0 else ())))
