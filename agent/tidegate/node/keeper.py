"""Keeps one workload as it should be: its sidecar and its redirection, in the order that keeps requests alive.

Level-triggered: `reconcile` compares and does what is missing, again and again. Into the mesh: files, Envoy, wait until
Envoy works by exactly these files, rules. Out of it: rules first. Rules stay when Envoy dies, so that nothing
passes unseen while it is started again. What fails is told by `problems` and tried again; it never stops the rest.
"""

import enum
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tidegate.catalog.client import LeafMaterial
from tidegate.enforce.redirect import nftables as redirect
from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.envoy import EnvoyProcess, Phase, State
from tidegate.enforce.sidecar.files import SidecarError, SidecarFiles
from tidegate.enforce.sidecar.spec import SidecarSpec
from tidegate.errors import TidegateError
from tidegate.identity import spiffe
from tidegate.intent.policy import Policy, policy_from_annotations
from tidegate.kernel.errors import KernelError
from tidegate.model import DEFAULT_PROXY_UID, MutualTLSMode, Workload
from tidegate.node.files import write_atomically
from tidegate.node.log import Log

STOP_DEADLINE_S = 5.0
SETTLE_S = 5.0
"""How long a change is looked after at the faster pace."""
RENEW_AT = 0.66
"""A leaf is renewed when this share of its life is over."""

log = Log("keeper")


class Redirection(enum.StrEnum):
    """State of a workload's redirect rules."""

    NONE = "none"
    WAITING = "waiting"
    """Meshed, but the sidecar has not been ready yet."""
    APPLIED = "applied"
    FAILED = "failed"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a meshed workload's sidecar should do now."""

    spec: SidecarSpec
    index: int
    """Index of the intent that `spec` was made from."""
    leaf: LeafMaterial | None
    """A new leaf; None while the present one is good."""
    roots_pem: str


class _Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a returning agent must know of a sidecar that it did not start."""

    spec: SidecarSpec
    leaf_from: float
    leaf_until: float


class Keeper:
    """One workload. All methods may block for some milliseconds and are called from one thread."""

    def __init__(self, workload: Workload, directory: Path, envoy: Path, node_id: str) -> None:
        self.workload = workload
        self.policy: Policy | None = None
        """The policy in force: the latest that had no fault."""
        self.redirection = Redirection.NONE
        self.applied_index = 0
        self.mode = MutualTLSMode.STRICT
        """Mode that the sidecar is known to run."""
        self._problems: dict[str, str] = {}
        self._node_id = node_id
        self._files = SidecarFiles(directory, uid=DEFAULT_PROXY_UID, gid=DEFAULT_PROXY_UID)
        self._envoy = EnvoyProcess(self._files, workload.netns, envoy=envoy)
        self._admin = SidecarAdmin(self._files.working)
        self._memory_path = directory / "memory.json"
        self._memory = self._remember()
        self._state = State()
        self._was_ready = False
        self._applied: SidecarSpec | None = None
        """What Envoy is known to work by."""
        self._unsettled_since: float | None = None
        self._annotations: dict[str, str] | None = None

    @property
    def spec(self) -> SidecarSpec | None:
        """What the sidecar was last told to do, by this agent or a former one."""
        return self._memory.spec if self._memory else None

    @property
    def sidecar(self) -> State:
        """How Envoy was doing when last looked at."""
        return self._state

    @property
    def admin(self) -> SidecarAdmin:
        return self._admin

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it should be, one sentence each."""
        return tuple(self._problems.values())

    @property
    def in_mesh(self) -> bool:
        """Whether callers may use mTLS towards this workload."""
        return self.redirection is Redirection.APPLIED

    def needs_leaf(self, now: float, service_id: str) -> bool:
        """Whether a new leaf certificate has to be fetched before the next `reconcile`."""
        memory = self._memory
        if memory is None or identity(memory.spec) != service_id:
            return True
        return now >= memory.leaf_from + RENEW_AT * (memory.leaf_until - memory.leaf_from)

    def update(self, workload: Workload) -> None:
        """Takes a new description; the policy follows its annotations unless they have faults."""
        self.workload = workload
        if workload.annotations == self._annotations:
            return
        self._annotations = dict(workload.annotations)
        try:
            self.policy = policy_from_annotations(workload.annotations)
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

    def reconcile(self, wanted: Wanted | None) -> None:
        """One step towards `wanted`, or out of the mesh when it is None."""
        if wanted is None:
            self._leave()
        elif self.policy is not None or self._memory is not None:
            self._attempt("sidecar", lambda: self._keep_sidecar(wanted))
            self._attempt("redirect", self._keep_rules)
            if not self._runs(wanted):
                self._unsettled_since = self._unsettled_since or time.monotonic()
            else:
                self._unsettled_since = None

    def _runs(self, wanted: Wanted) -> bool:
        return self.in_mesh and self._applied == wanted.spec

    def remove(self) -> None:
        """The workload is gone: ends its sidecar and takes its directory away."""
        self._attempt("sidecar", lambda: self._envoy.stop(STOP_DEADLINE_S))
        self._files.remove()

    def _leave(self) -> None:
        def rules() -> None:
            if redirect.remove(self.workload.netns) is redirect.Change.REMOVED:
                log.info("redirection removed", workload=self.workload.name)
            self.redirection = Redirection.NONE
            self._was_ready = False

        def sidecar() -> None:
            if self._memory is None:
                return
            self._envoy.stop(STOP_DEADLINE_S)
            self._files.remove()
            self._memory = None
            self._state = State()
            log.info("sidecar removed", workload=self.workload.name)

        if self._attempt("redirect", rules):
            self._attempt("sidecar", sidecar)

    def _keep_sidecar(self, wanted: Wanted) -> None:
        self._files.prepare()
        self._files.write_bootstrap(render.bootstrap(self._node_id, wanted.spec.service))
        if wanted.leaf is not None:
            leaf = wanted.leaf
            self._files.write_secrets(
                render.render_secrets(leaf.certificate_pem, leaf.key_pem, wanted.roots_pem)
            )
            self._memorise(wanted.spec, leaf.not_before, leaf.not_after)
            log.info("leaf certificate written", workload=self.workload.name)
        elif self._memory is None:
            raise SidecarError(f"{self.workload.name} has no leaf certificate yet")
        configuration = render.render(wanted.spec)
        if self._files.write_configuration(configuration):
            log.info(
                "sidecar configuration written",
                workload=self.workload.name,
                version=configuration.version,
                mode=wanted.spec.mode,
            )
        if self._memory and self._memory.spec != wanted.spec:
            self._memorise(wanted.spec, self._memory.leaf_from, self._memory.leaf_until)
        before = self._state
        self._state = self._envoy.ensure(time.monotonic())
        if self._state.pid != before.pid or self._state.phase is not before.phase:
            log.info("sidecar", workload=self.workload.name, **msgspec.structs.asdict(self._state))
        if self._state.phase is not Phase.RUNNING:
            last = f": {self._state.last_exit}" if self._state.last_exit else ""
            raise SidecarError(f"the sidecar of {self.workload.name} is {self._state.phase}{last}")
        if self._admin.applied_version() == configuration.version:
            self._was_ready = True
            self._applied = wanted.spec
            self.applied_index = wanted.index
            self.mode = wanted.spec.mode
            return
        rejection = self._admin.rejection()
        if rejection:
            raise SidecarError(
                f"the sidecar of {self.workload.name} refuses its configuration: {rejection}"
            )

    def _keep_rules(self) -> None:
        if self.policy is None:
            left = redirect.current(self.workload.netns) is not None
            self.redirection = Redirection.APPLIED if left else Redirection.NONE
            return
        if not self._was_ready and redirect.check(self.workload.netns, self.policy):
            self.redirection = Redirection.WAITING
            return
        change = redirect.apply(self.workload.netns, self.policy)
        if change is not redirect.Change.UNCHANGED:
            log.info("redirection applied", workload=self.workload.name, change=change)
        self.redirection = Redirection.APPLIED

    def _attempt(self, what: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except (TidegateError, KernelError, OSError) as error:
            self._tell(what, str(error))
            if what == "redirect":
                self.redirection = Redirection.FAILED
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

    def _remember(self) -> _Memory | None:
        try:
            return msgspec.json.decode(self._memory_path.read_bytes(), type=_Memory)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _memorise(self, spec: SidecarSpec, leaf_from: float, leaf_until: float) -> None:
        self._memory = _Memory(spec=spec, leaf_from=leaf_from, leaf_until=leaf_until)
        write_atomically(self._memory_path, msgspec.json.encode(self._memory))


def identity(spec: SidecarSpec) -> str:
    """The SPIFFE URI that a sidecar of this spec has to prove."""
    return spiffe.service_id(spec.trust_domain, spec.service, spec.namespace, spec.datacenter)
