"""Keeps one workload as it should be: its sidecar and its redirection, in the order that keeps requests alive.

Level-triggered: `reconcile` compares and does what is missing, again and again. Into the mesh: files, Envoy, wait until
Envoy works by exactly these files, rules. Out of it: rules first. Rules stay when Envoy dies, so that nothing
passes unseen while it is started again. What fails is told by `problems` and tried again; it never stops the rest.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tidegate.catalog.client import LeafMaterial
from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.closed import ClosedDestination, ClosedDestinations
from tidegate.enforce.sidecar.envoy import DRAIN_TIME_S, EnvoyProcess, Phase, State
from tidegate.enforce.sidecar.files import SidecarError, SidecarFiles
from tidegate.enforce.sidecar.spec import SidecarSpec
from tidegate.errors import TidegateError
from tidegate.identity import spiffe
from tidegate.intent.annotations import policy_of
from tidegate.intent.policy import Policy
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError
from tidegate.model import DEFAULT_PROXY_UID, MutualTLSMode, Workload
from tidegate.node.config import RedirectConfig
from tidegate.node.files import write_atomically
from tidegate.node.log import Log
from tidegate.node.redirection import Redirection, WorkloadRedirection
from tidegate.node.users import group_id, user_id

STOP_DEADLINE_S = 5.0
SETTLE_S = 5.0
"""How long a change is looked after at the faster pace."""
RENEW_AT = 0.66
"""A leaf is renewed when this share of its life is over."""

log = Log("keeper")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a meshed workload's sidecar should do now."""

    spec: SidecarSpec
    index: int
    """Index of the intent that `spec` was made from."""
    roots_pem: str
    policy: Policy | None = None
    """What is redirected; None where that is what the workload's annotations say."""
    leaves: tuple[LeafMaterial, ...] = ()
    """New leaves, one for each of the spec's services; none while the present ones are good."""


class _Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a returning agent must know of a sidecar that it did not start."""

    workload: Workload
    spec: SidecarSpec
    policy: Policy
    leaf_for: tuple[str, ...]
    """SPIFFE URIs that the leaf certificates were fetched for."""
    leaf_from: float
    """When they were fetched: their own notBefore lies earlier, for clocks that run behind."""
    leaf_until: float
    """When the first of them ends."""
    redirected_in: netns.Identity | None = None
    """The namespace in which the rules were in force when an agent last looked."""


class Keeper:
    """One workload, called so and at this path. Its methods may block, and are called from one thread at a time.

    What it tells may be read from any.
    """

    def __init__(
        self,
        workload: Workload,
        directory: Path,
        envoy: Path,
        node_id: str,
        engine: Engine,
        redirect: RedirectConfig,
        drain_time: float = DRAIN_TIME_S,
    ) -> None:
        """`redirect` says what holds where the workload's annotations are silent; `drain_time`, in seconds, how long
        plaintext connections may go on that are open at a flip to strict.
        """
        self.workload = workload
        self._memory_path = directory / "memory.json"
        self._memory = _remembered(self._memory_path)
        self.policy: Policy | None = self._memory.policy if self._memory else None
        """The policy in force: the latest that had no fault."""
        self.described = self.policy
        """The latest policy without faults of the workload's annotations, whatever config entries say besides."""
        self.redirection = WorkloadRedirection(
            workload.name, engine, on_failure=redirect.on_failure, adopt=redirect.adopt
        )
        self.applied_index = 0
        self.mode = self._memory.spec.mode if self._memory else MutualTLSMode.STRICT
        """Mode that the sidecar is known to run; before it was first asked, what it was last told."""
        self._problems: dict[str, str] = {}
        self._node_id = node_id
        self._files = SidecarFiles(directory, uid=DEFAULT_PROXY_UID, gid=DEFAULT_PROXY_UID)
        self._envoy = EnvoyProcess(
            self._files, workload.netns, envoy=envoy, drain_time_s=math.ceil(drain_time)
        )
        self._admin = SidecarAdmin(self._files.working)
        self._closed = ClosedDestinations(self._files)
        self._state = State()
        self._was_ready = False
        self._applied: SidecarSpec | None = None
        """What Envoy is known to work by."""
        self._unsettled_since: float | None = None
        self._base = redirect.policy
        self._annotations: tuple[dict[str, str], dict[str, str]] | None = None
        self._namespace: netns.Identity | None = None
        """Where the rules and the sidecar are; None before the first look, and while there is none."""
        self.has_looked = False
        """Whether it has ever compared what is with what should be: before that it knows nothing of a former agent's
        sidecar and rules."""
        self.is_removed = False
        """Whether `remove` has ended: nothing is left to be tried again."""

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
    def closed(self) -> tuple[ClosedDestination, ...]:
        """What the application tried to reach outside the mesh while only mesh destinations were open to it."""
        return self._closed.found

    @property
    def plaintext_ports(self) -> frozenset[int]:
        """Ports on which the sidecar is known to take connections without mTLS."""
        spec = self._applied or self.spec
        return frozenset(
            one.port
            for one in (spec.services if spec else ())
            if one.port and one.mode is MutualTLSMode.PERMISSIVE
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it should be, one sentence each."""
        unseen = self.redirection.unseen
        return (
            *self._problems.values(),
            *((unseen,) if unseen else ()),
            *map(str, self.redirection.foreign),
        )

    @property
    def in_mesh(self) -> bool:
        """Whether callers may use mTLS towards this workload."""
        return self.redirection.state is Redirection.APPLIED

    def needs_leaves(self, now: float, service_ids: tuple[str, ...]) -> bool:
        """Whether new leaf certificates have to be fetched before the next `reconcile`."""
        memory = self._memory
        if memory is None or memory.leaf_for != service_ids:
            return True
        return now >= memory.leaf_from + RENEW_AT * (memory.leaf_until - memory.leaf_from)

    def is_of(self, workload: Workload) -> bool:
        """Whether it can keep what is described so: another name or path asks for a sidecar of its own."""
        kept = self.workload
        return (kept.id, kept.name, kept.netns) == (workload.id, workload.name, workload.netns)

    def update(self, workload: Workload) -> None:
        """Takes a new description of the same workload, see `is_of`; the policy follows its annotations unless they
        have faults.
        """
        self.workload = workload
        annotations = (dict(workload.namespace_annotations), dict(workload.annotations))
        if annotations == self._annotations:
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

    def reconcile(self, wanted: Wanted | None) -> None:
        """One step towards `wanted`, or out of the mesh when it is None."""
        self._notice_another_namespace()
        self.policy = wanted.policy if wanted and wanted.policy else self.described
        if wanted is None:
            self._leave()
        elif self.policy is not None:
            policy = self.policy
            self._attempt("sidecar", lambda: self._keep_sidecar(wanted, policy))
            self._attempt("redirect", lambda: self._keep_rules(policy))
            if not self._runs(wanted):
                self._unsettled_since = self._unsettled_since or time.monotonic()
            else:
                self._unsettled_since = None
        else:
            # Meshed, and never had a policy without faults: there is nothing that could be applied.
            self._attempt("redirect", lambda: self.redirection.fail(self.workload.netns))
        self.has_looked = True

    def _notice_another_namespace(self) -> None:
        """What is known of a namespace does not hold for another one at its path: that has no rules and no sidecar."""
        found = self._found()
        if found == self._namespace:
            return
        if self._namespace is not None:
            log.warning("the network namespace is gone or another one", workload=self.workload.name)
        self.redirection.enter(found)
        self._was_ready = False
        self._namespace = found

    def _found(self) -> netns.Identity | None:
        """The namespace that lies at the path now."""
        try:
            return netns.identity(self.workload.netns)
        except KernelError:
            return None

    def _runs(self, wanted: Wanted) -> bool:
        return self.in_mesh and self._applied == wanted.spec

    def remove(self) -> None:
        """The workload is gone, often with its namespace: nothing of it stays. To be called until `is_removed`.

        While its rules cannot be removed the sidecar stays that they lead to; a namespace that is gone has none.
        """
        if not self._attempt("redirect", self._remove_rules_if_there):
            return
        self._attempt("sidecar", lambda: self._envoy.stop(STOP_DEADLINE_S))
        self._attempt("files", self._files.remove)
        self.is_removed = True

    def _remove_rules_if_there(self) -> None:
        known, found = self._namespace or self._redirected_in, self._found()
        if found is not None and known in (None, found):
            self.redirection.remove(self.workload.netns)

    def _leave(self) -> None:
        if self._attempt("redirect", self._remove_rules):
            self._attempt("sidecar", self._remove_sidecar)

    @property
    def _redirected_in(self) -> netns.Identity | None:
        return self._memory.redirected_in if self._memory else None

    def _memorise_redirected_in(self, namespace: netns.Identity | None) -> None:
        if self._memory is not None:
            self._memorise(msgspec.structs.replace(self._memory, redirected_in=namespace))

    def _remove_rules(self) -> None:
        self._memorise_redirected_in(None)
        self.redirection.remove(self.workload.netns)
        self._was_ready = False

    def _remove_sidecar(self) -> None:
        if not self._files.directory.exists():
            return
        self._envoy.stop(STOP_DEADLINE_S)
        self._files.remove()
        self._memory = None
        self._state = State()
        self._applied = None
        self._unsettled_since = None
        self.applied_index = 0
        log.info("sidecar removed", workload=self.workload.name)

    def _keep_sidecar(self, wanted: Wanted, policy: Policy) -> None:
        if wanted.leaves:
            certificates = [
                render.ServiceCertificate(
                    service=one.service, certificate_pem=leaf.certificate_pem, key_pem=leaf.key_pem
                )
                for one, leaf in zip(wanted.spec.services, wanted.leaves, strict=True)
            ]
            self._files.write_secrets(render.render_secrets(certificates, wanted.roots_pem))
            memory = _Memory(
                workload=self.workload,
                spec=wanted.spec,
                policy=policy,
                leaf_for=spiffe_ids_of(wanted.spec),
                leaf_from=time.time(),
                leaf_until=min(leaf.not_after for leaf in wanted.leaves),
            )
            log.info("leaf certificates written", workload=self.workload.name)
        elif self._memory is None:
            raise SidecarError(f"{self.workload.name} has no leaf certificate yet")
        elif self._memory.leaf_for != spiffe_ids_of(wanted.spec):
            # Envoy would wait for the certificates with all that is new, its other services included.
            self._run(self._memory.spec, self.applied_index)
            new = (one.service for one in wanted.spec.services)
            problem = f"{self.workload.name} has no leaf certificates for {', '.join(new)} yet"
            raise SidecarError(f"{problem}; its sidecar stays as it is")
        else:
            memory = msgspec.structs.replace(
                self._memory, workload=self.workload, spec=wanted.spec, policy=policy
            )
        self._memorise(memory)
        self._run(wanted.spec, wanted.index)

    def _run(self, spec: SidecarSpec, index: int) -> None:
        """One step towards an Envoy that works by `spec`."""
        self._files.write_bootstrap(render.bootstrap(self._node_id, spec.service))
        configuration = render.render(spec)
        if self._files.write_configuration(configuration):
            log.info(
                "sidecar configuration written",
                workload=self.workload.name,
                version=configuration.version,
                mode=spec.mode,
            )
        before = self._state
        self._state = self._envoy.ensure(time.monotonic(), transparent=spec.transparent)
        if self._state.pid != before.pid or self._state.phase is not before.phase:
            log.info("sidecar", workload=self.workload.name, **msgspec.structs.asdict(self._state))
        if self._state.phase is not Phase.RUNNING:
            last = f": {self._state.last_exit}" if self._state.last_exit else ""
            raise SidecarError(f"the sidecar of {self.workload.name} is {self._state.phase}{last}")
        self._closed.read(time.time())
        if self._admin.applied_version(configuration.ecds) == configuration.version:
            self._was_ready = True
            self._applied = spec
            self.mode = spec.mode
            # Last: whoever reads it meanwhile takes the rest for as new.
            self.applied_index = index
            return
        rejection = self._admin.rejection(configuration.ecds)
        if rejection:
            raise SidecarError(
                f"the sidecar of {self.workload.name} refuses its configuration: {rejection}"
            )

    def _keep_rules(self, policy: Policy) -> None:
        netns_path = self.workload.netns
        if self.redirection.state is Redirection.NONE and self._redirected_in is not None:
            is_here = self._redirected_in == self._namespace
            if is_here and not self.redirection.note_loss(netns_path, policy):
                return
            self._memorise_redirected_in(None)
        if not self._was_ready and not self.redirection.is_as_wanted(netns_path, policy):
            self.redirection.wait()
            return
        self.redirection.keep(netns_path, policy)
        if self.in_mesh:
            self._memorise_redirected_in(self._namespace)

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

    def _memorise(self, memory: _Memory) -> None:
        if memory != self._memory:
            write_atomically(self._memory_path, msgspec.json.encode(memory))
            self._memory = memory


def policy_for(workload: Workload, base: Policy) -> Policy:
    """What is redirected for a workload whose sidecar this agent runs. InputErrors names all faults."""
    policy = policy_of(
        workload.namespace_annotations,
        workload.annotations,
        base,
        users=user_id,
        groups=group_id,
    )
    uids = policy.proxy.uids
    if DEFAULT_PROXY_UID in uids:
        return policy
    # Whatever else is exempt, the sidecar that the agent starts is: its connections would come back to it.
    proxy = msgspec.structs.replace(policy.proxy, uids=(*uids, DEFAULT_PROXY_UID))
    return msgspec.structs.replace(policy, proxy=proxy)


def abandoned(directory: Path, envoy: Path, engine: Engine) -> Keeper:
    """The keeper of a directory that a former agent left and whose workload is gone: to be removed."""
    memory = _remembered(directory / "memory.json")
    unknown = Workload(id="", name=directory.name, service="", node="", netns="/nonexistent")
    return Keeper(
        memory.workload if memory else unknown,
        directory,
        envoy,
        directory.name,
        engine,
        RedirectConfig(),
    )


def _remembered(path: Path) -> _Memory | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Memory)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, TidegateError, OSError) as error:
        log.warning("what a former agent knew is unreadable", file=str(path), reason=str(error))
        return None


def spiffe_ids_of(spec: SidecarSpec) -> tuple[str, ...]:
    """The SPIFFE URIs that a sidecar of this spec has to prove, one for each of its services."""
    return tuple(
        spiffe.service_id(spec.trust_domain, one.service, spec.datacenter) for one in spec.services
    )
