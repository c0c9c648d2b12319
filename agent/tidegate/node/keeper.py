"""Keeps one workload as it should be: its sidecar and its redirection, in the order that keeps requests alive.

Level-triggered: `reconcile` compares and does what is missing, again and again. With a sidecar of the agent's: files,
Envoy, wait until Envoy works by exactly these files, rules. With one of the workload's own the rules come first, and
nothing passes until it listens. Out of the mesh: rules first. Rules stay when a sidecar dies, so that nothing passes
unseen while it is started again. What fails is told by `problems` and tried again; it never stops the rest.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import msgspec

from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.closed import ClosedDestination
from tidegate.enforce.sidecar.envoy import DRAIN_TIME_S, State
from tidegate.enforce.sidecar.spec import SidecarSpec
from tidegate.errors import TidegateError
from tidegate.intent.policy import Policy
from tidegate.kernel import netns, sockets
from tidegate.kernel.errors import KernelError
from tidegate.model import MutualTLSMode, Sidecar, Workload
from tidegate.node.config import RedirectConfig
from tidegate.node.log import Log
from tidegate.node.memory import Memory, MemoryFile, remembered
from tidegate.node.metrics import Metrics
from tidegate.node.policies import policy_for
from tidegate.node.redirection import Redirection, WorkloadRedirection
from tidegate.node.sidecar import AgentSidecar, Wanted

SETTLE_S = 5.0
"""How long a change is looked after at the faster pace."""

log = Log("keeper")


class WantedRules(msgspec.Struct, frozen=True, kw_only=True):
    """What a workload in the mesh is redirected by whose sidecar is its own."""

    policy: Policy | None = None
    """None where that is what the workload's annotations say."""
    index: int = 0
    """Index of the intent that is known, which its own control plane tells the sidecar of; 0 while none is."""
    mode: MutualTLSMode = MutualTLSMode.STRICT
    """What the sidecar enforces by that intent."""


class Keeper:
    """One workload in one namespace, see `is_of`. Its methods may block, and are called from one thread at a time.

    What it tells may be read from any.
    """

    def __init__(
        self,
        workload: Workload,
        directory: Path,
        find_envoy: Callable[[], Path],
        node_id: str,
        engine: Engine,
        redirect: RedirectConfig,
        drain_time: float = DRAIN_TIME_S,
        metrics: Metrics | None = None,
    ) -> None:
        """`redirect` says what holds where the workload's annotations are silent; `drain_time`, in seconds, how long
        plaintext connections may go on that are open at a flip to strict. SidecarError comes from `find_envoy` where
        Envoy is needed and is not there.
        """
        self.workload = workload
        self._memory = MemoryFile(directory)
        self._sidecar = AgentSidecar(
            workload, directory, find_envoy, node_id, drain_time, self._memory
        )
        memory = self._memory.content
        self.policy: Policy | None = memory.policy if memory else None
        """The policy in force: the latest that had no fault."""
        self.described = self.policy
        """The latest policy without faults of the workload's annotations, whatever config entries say besides."""
        self.redirection = WorkloadRedirection(
            workload.name,
            engine,
            on_failure=redirect.on_failure,
            adopt=redirect.adopt,
            metrics=metrics,
        )
        self._others_index = 0
        self._others_mode = MutualTLSMode.STRICT
        """Of a sidecar that is the workload's own: what it is taken to enforce."""
        self._problems: dict[str, str] = {}
        self._unsettled_since: float | None = None
        self._awaited: Policy | None = None
        """What is to be in force as soon as the workload's own sidecar listens."""
        self._base = redirect.policy
        self._annotations: tuple[dict[str, str], dict[str, str]] | None = None
        self._namespace: netns.Identity | None = None
        """Where the rules and the sidecar are; None before the first look, and while there is none."""
        self._first: netns.Identity | None = None
        """The first namespace that was found at the path."""
        self.has_looked = False
        """Whether it has ever compared what is with what should be: before that it knows nothing of a former agent's
        sidecar and rules."""
        self.is_removed = False
        """Whether `remove` has ended: nothing is left to be tried again."""

    @property
    def spec(self) -> SidecarSpec | None:
        """What the sidecar was last told to do, by this agent or a former one; None where the agent runs none."""
        return self._sidecar.spec

    @property
    def sidecar(self) -> State:
        """How the agent's Envoy was doing when last looked at."""
        return self._sidecar.state

    @property
    def admin(self) -> SidecarAdmin:
        return self._sidecar.admin

    @property
    def closed(self) -> tuple[ClosedDestination, ...]:
        """What the application tried to reach outside the mesh while only mesh destinations were open to it."""
        return self._sidecar.closed

    @property
    def plaintext_ports(self) -> frozenset[int]:
        """Ports on which the agent's sidecar is known to take connections without mTLS."""
        return self._sidecar.plaintext_ports

    @property
    def applied_index(self) -> int:
        """Index of the intent that the sidecar is known to run, or, if it is the workload's own, is taken to run."""
        if self.has_own_sidecar:
            return self._others_index if self.in_mesh else 0
        return self._sidecar.applied_index

    @property
    def mode(self) -> MutualTLSMode:
        """Mode that the sidecar enforces, as far as that is known."""
        return self._others_mode if self.has_own_sidecar else self._sidecar.mode

    @property
    def has_own_sidecar(self) -> bool:
        """Whether the sidecar is the workload's own, of which the agent knows nothing but where it listens."""
        return self.workload.sidecar is Sidecar.OWN

    @property
    def namespace(self) -> netns.Identity | None:
        """Where the rules and the sidecar are; None while there is none."""
        return self._namespace

    @property
    def begun_at(self) -> float:
        """When rules came into the namespace of a workload that was running without; 0 where that was not so."""
        memory = self._memory.content
        is_here = memory is not None and memory.redirected_in == self._namespace
        return memory.begun_at if memory and is_here else 0.0

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it should be, one sentence each."""
        redirection = self.redirection
        return (
            *self._problems.values(),
            *filter(None, (redirection.unseen, redirection.contested)),
            *map(str, self.redirection.foreign),
        )

    @property
    def in_mesh(self) -> bool:
        """Whether callers may use mTLS towards this workload."""
        return self.redirection.state is Redirection.APPLIED

    @property
    def awaits_sidecar(self) -> bool:
        """Whether outbound connections pass until the workload's own sidecar listens."""
        return self._awaited is not None

    def needs_leaves(self, now: float, service_ids: tuple[str, ...], root_id: str = "") -> bool:
        """Whether new leaf certificates have to be fetched before the next `reconcile`."""
        return self._sidecar.needs_leaves(now, service_ids, root_id)

    def is_of(self, workload: Workload) -> bool:
        """Whether it can keep what is described so.

        Another namespace asks for another keeper, and, where the agent runs the sidecar, another name: that is what
        its sidecar is called by. A namespace may be found at another path.
        """
        kept = self.workload
        runs_sidecar = self.spec is not None or workload.sidecar is Sidecar.TIDEGATE
        if kept.id != workload.id or (kept.name != workload.name and runs_sidecar):
            return False
        if kept.netns == workload.netns:
            return True
        return self._namespace is not None and _found_at(workload.netns) == self._namespace

    def update(self, workload: Workload) -> None:
        """Takes a new description of the same workload, see `is_of`; the policy follows its annotations unless they
        have faults.
        """
        if workload.netns != self.workload.netns:
            self._sidecar.move(workload.netns)
        turned = workload.sidecar is not self.workload.sidecar
        self.workload = workload
        annotations = (dict(workload.namespace_annotations), dict(workload.annotations))
        if annotations == self._annotations and not turned:
            return
        self._annotations = annotations
        try:
            self.described = policy_for(workload, self._base)
            if self.policy is None or self.spec is None:
                self.policy = self.described
        except TidegateError as error:
            kept = "the policy stays as it was" if self.policy else "it has no policy"
            self._tell("policy", f"{error} ({kept})")
        else:
            self._clear("policy")

    @property
    def is_settling(self) -> bool:
        """Whether it is worth looking again soon: the sidecar was told something moments ago."""
        since = self._unsettled_since
        return since is not None and time.monotonic() - since < SETTLE_S

    def look(self) -> None:
        """Somebody changed something in the workload's namespace: put the rules right if they were in force.

        Another namespace at its path has no sidecar that they could lead to: it is left to `reconcile`.
        """
        if self.in_mesh and self._found() == self._namespace:
            self._attempt("redirect", lambda: self.redirection.look(self.workload.netns))

    def look_for_sidecar(self) -> None:
        """Let outbound connections pass no more if the workload's own sidecar listens now."""
        policy = self._awaited
        if policy is not None and self._found() == self._namespace:
            self._attempt("redirect", lambda: self._keep_rules_of_own(policy))

    def reconcile(self, wanted: Wanted | WantedRules | None) -> None:
        """One step towards `wanted`, or out of the mesh when it is None."""
        self._notice_another_namespace()
        policy = wanted.policy if wanted and wanted.policy else self.described
        if wanted is None:
            self.policy = policy
            self._leave()
        elif policy is None:
            # Meshed, and never had a policy without faults: there is nothing that could be applied.
            self._attempt("redirect", lambda: self.redirection.fail(self.workload.netns))
        else:
            match wanted:
                case Wanted():
                    self._with_sidecar(wanted, policy)
                case WantedRules():
                    self._with_own_sidecar(wanted, policy)
                case _:
                    assert_never(wanted)
        self.has_looked = True

    def _with_sidecar(self, wanted: Wanted, policy: Policy) -> None:
        self.policy = policy
        self._awaited = None
        self._attempt("sidecar", lambda: self._sidecar.keep(self.workload, wanted, policy))
        self._attempt("redirect", lambda: self._keep_rules(policy))
        if self.in_mesh and self._sidecar.runs(wanted.spec):
            self._unsettled_since = None
        else:
            self._unsettled_since = self._unsettled_since or time.monotonic()

    def _with_own_sidecar(self, wanted: WantedRules, policy: Policy) -> None:
        self._attempt("redirect", lambda: self._keep_rules_of_own(policy))
        if self.spec is not None:
            # It was the agent's before; what led there leads to the workload's own by now.
            self._attempt("sidecar", self._remove_sidecar)
        self._others_mode, self._others_index = wanted.mode, wanted.index

    def _notice_another_namespace(self) -> None:
        """What is known of a namespace does not hold for another one at its path: that has no rules and no sidecar."""
        found = self._found()
        if found == self._namespace:
            return
        if self._namespace is not None:
            log.warning("the network namespace is gone or another one", workload=self.workload.name)
        self.redirection.enter(found)
        self._sidecar.was_ready = False
        self._awaited = None
        self._namespace = found

    def _found(self) -> netns.Identity | None:
        """The namespace that lies at the path now; not another one at that of a process, whose number is given anew."""
        found = _found_at(self.workload.netns)
        if self.workload.netns.startswith("/proc/") and self._first not in (None, found):
            return None
        self._first = self._first or found
        return found

    def remove(self) -> None:
        """The workload is gone, often with its namespace: nothing of it stays. To be called until `is_removed`.

        While its rules cannot be removed the sidecar stays that they lead to; a namespace that is gone has none.
        """
        self._awaited = None
        if not self._attempt("redirect", self._remove_rules_if_there):
            return
        if self._attempt("sidecar", self._sidecar.remove):
            self.is_removed = True

    def _remove_rules_if_there(self) -> None:
        known, found = self._namespace or self._redirected_in, self._found()
        if found is not None and known in (None, found):
            self.redirection.remove(self.workload.netns)

    def _leave(self) -> None:
        self._awaited = None
        if self._attempt("redirect", self._remove_rules):
            self._attempt("sidecar", self._remove_sidecar)

    @property
    def _redirected_in(self) -> netns.Identity | None:
        return self._memory.content.redirected_in if self._memory.content else None

    def _memorise(self, memory: Memory) -> None:
        """What cannot be written down is told, and stops nothing."""
        self._attempt("memory", lambda: self._memory.keep(memory))

    def _forget_where(self) -> None:
        """Rules are in force nowhere."""
        if self._memory.content is not None:
            self._memorise(
                msgspec.structs.replace(self._memory.content, redirected_in=None, begun_at=0.0)
            )

    def _memorise_where(self, policy: Policy) -> None:
        """Rules are in force in the namespace that is there."""
        memory = self._memory.content or Memory(workload=self.workload, policy=policy)
        before = memory.begun_at if memory.redirected_in == self._namespace else 0.0
        if self.has_own_sidecar and self.redirection.begun_at and not before:
            ran = self.redirection.begun_at - self.workload.created_at
            known = {"after_s": round(ran)} if self.workload.created_at else {}
            log.warning("redirected while it ran", workload=self.workload.name, **known)
        self._memorise(
            msgspec.structs.replace(
                memory,
                workload=self.workload,
                policy=policy,
                redirected_in=self._namespace,
                begun_at=before or self.redirection.begun_at,
            )
        )

    def _remove_rules(self) -> None:
        self._forget_where()
        if self._namespace is None:
            netns.identity(self.workload.netns)
            raise KernelError(f"another network namespace has come to {self.workload.netns}")
        self.redirection.remove(self.workload.netns)
        self._sidecar.was_ready = False

    def _remove_sidecar(self) -> None:
        is_there = self.spec is not None
        self._sidecar.remove()
        self._unsettled_since = None
        if is_there:
            log.info("sidecar removed", workload=self.workload.name)

    def _keep_rules(self, policy: Policy) -> None:
        """Of a sidecar that the agent runs: rules once it listens."""
        netns_path = self.workload.netns
        if not self._note_loss(policy):
            return
        if not self._sidecar.was_ready and not self.redirection.is_as_wanted(netns_path, policy):
            self.redirection.wait()
            return
        self._keep_applied(policy)

    def _keep_rules_of_own(self, policy: Policy) -> None:
        """Of a sidecar that is the workload's own: rules at once, what leaves as the policy says."""
        before = policy.before_sidecar()
        waits = before != policy and not self._has_listened(policy)
        self.policy = before if waits else policy
        if not self._note_loss(self.policy):
            return
        self._keep_applied(self.policy)
        self._awaited = policy if waits else None

    def _has_listened(self, policy: Policy) -> bool:
        """Whether somebody has been seen to accept connections at the sidecar's port for what leaves."""
        memory = self._memory.content
        if self._namespace is not None and memory and memory.listened_in == self._namespace:
            return True
        found: list[sockets.Listener] = []

        def look() -> None:
            found.extend(netns.run_in(self.workload.netns, sockets.listeners))

        self._attempt("listeners", look)
        if all(one.port != policy.outbound.port for one in found):
            return False
        log.info("the workload's own sidecar listens", workload=self.workload.name)
        memory = memory or Memory(workload=self.workload, policy=policy)
        self._memorise(msgspec.structs.replace(memory, listened_in=self._namespace))
        return True

    def _note_loss(self, policy: Policy) -> bool:
        """Counts rules that went while no agent looked; False while that cannot be asked."""
        redirection = self.redirection
        if redirection.state is not Redirection.NONE or self._redirected_in is None:
            return True
        if self._redirected_in == self._namespace:
            counted = redirection.repairs(0.0)
            if not redirection.note_loss(self.workload.netns, policy):
                return False
            if redirection.repairs(0.0) == counted:
                return True
        self._forget_where()
        return True

    def _keep_applied(self, policy: Policy) -> None:
        self.redirection.keep(self.workload.netns, policy)
        if self.in_mesh:
            self._memorise_where(policy)

    def _attempt(self, what: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except (TidegateError, KernelError, OSError) as error:
            self._tell(what, str(error))
            return False
        self._clear(what)
        return True

    def _tell(self, what: str, problem: str) -> None:
        if self._problems.get(what) != problem:
            log.warning(problem, workload=self.workload.name, step=what)
        self._problems[what] = problem

    def _clear(self, what: str) -> None:
        if self._problems.pop(what, None):
            log.info("well again", workload=self.workload.name, step=what)


def abandoned(directory: Path, find_envoy: Callable[[], Path], engine: Engine) -> Keeper:
    """The keeper of a directory that a former agent left and whose workload is gone: to be removed."""
    memory = remembered(directory)
    unknown = Workload(id="", name=directory.name, service="", node="", netns="/nonexistent")
    return Keeper(
        memory.workload if memory else unknown,
        directory,
        find_envoy,
        directory.name,
        engine,
        RedirectConfig(),
    )


def _found_at(path: str) -> netns.Identity | None:
    """The namespace that lies at a path now."""
    try:
        return netns.identity(path)
    except KernelError:
        return None
