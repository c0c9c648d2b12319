"""The sidecar that the agent runs for one workload: its certificates, its files, its Envoy, in this order.

Level-triggered, as the keeper that it belongs to: `keep` does what is missing, and raises what stands in the way. What
it knows of a former agent's sidecar comes from the memory that it shares with its keeper.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tidegate.catalog.client import LeafMaterial, leaf_is_due
from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.closed import ClosedDestination, ClosedDestinations
from tidegate.enforce.sidecar.envoy import EnvoyProcess, Phase, State
from tidegate.enforce.sidecar.files import SidecarError, SidecarFiles
from tidegate.enforce.sidecar.spec import SidecarSpec
from tidegate.identity import spiffe
from tidegate.intent.policy import Policy
from tidegate.model import DEFAULT_PROXY_UID, MutualTLSMode, Workload
from tidegate.node.log import Log
from tidegate.node.memory import Memory, MemoryFile

STOP_DEADLINE_S = 5.0

log = Log("keeper")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a meshed workload's sidecar, which the agent runs, should do now."""

    spec: SidecarSpec
    index: int
    """Index of the intent that `spec` was made from."""
    roots_pem: str
    root_id: str = ""
    """Which of the roots issues leaves; empty where the server does not say."""
    policy: Policy | None = None
    """What is redirected; None where that is what the workload's annotations say."""
    leaves: tuple[LeafMaterial, ...] = ()
    """New leaves, one for each of the spec's services; none while the present ones are good."""


class AgentSidecar:
    """One sidecar. `keep`, `remove` and `move` may block, and are called from one thread at a time."""

    def __init__(
        self,
        workload: Workload,
        directory: Path,
        find_envoy: Callable[[], Path],
        node_id: str,
        drain_time: float,
        memory: MemoryFile,
    ) -> None:
        self._name = workload.name
        self._netns_path = workload.netns
        self._find_envoy = find_envoy
        self._node_id = node_id
        self._drain_time_s = math.ceil(drain_time)
        self._memory = memory
        self._files = SidecarFiles(directory, uid=DEFAULT_PROXY_UID, gid=DEFAULT_PROXY_UID)
        self._envoy: EnvoyProcess | None = None
        self._closed = ClosedDestinations(self._files)
        self.admin = SidecarAdmin(self._files.working)
        self.state = State()
        """How Envoy was doing when last looked at."""
        self.was_ready = False
        """Whether it has been seen to work by what it was told, in the namespace that it is in."""
        self.applied_index = 0
        """Index of the intent that it is known to run."""
        self.mode = self.spec.mode if self.spec else MutualTLSMode.STRICT
        """Mode that it is known to run; before it was first asked, what it was last told."""
        self._applied: SidecarSpec | None = None
        """What Envoy is known to work by."""

    @property
    def spec(self) -> SidecarSpec | None:
        """What it was last told to do, by this agent or a former one."""
        return self._memory.content.spec if self._memory.content else None

    @property
    def closed(self) -> tuple[ClosedDestination, ...]:
        """What the application tried to reach outside the mesh while only mesh destinations were open to it."""
        return self._closed.found

    @property
    def plaintext_ports(self) -> frozenset[int]:
        """Ports on which it is known to take connections without mTLS."""
        spec = self._applied or self.spec
        return frozenset(
            one.port
            for one in (spec.services if spec else ())
            if one.port and one.mode is MutualTLSMode.PERMISSIVE
        )

    def needs_leaves(self, now: float, service_ids: tuple[str, ...], root_id: str = "") -> bool:
        """Whether new leaf certificates have to be fetched before the next `keep`; they do when another root issues."""
        memory = self._memory.content
        if memory is None or memory.leaf_for != service_ids or not self._files.has_secrets:
            return True
        if root_id and memory.leaf_root not in ("", root_id):
            return True
        return leaf_is_due(now, memory.leaf_from, memory.leaf_until)

    def runs(self, spec: SidecarSpec) -> bool:
        """Whether Envoy is known to work by exactly this."""
        return self._applied == spec

    def move(self, netns_path: str) -> None:
        """The same namespace is to be found at another path."""
        self._netns_path = netns_path
        if self._envoy is not None:
            self._envoy.move(netns_path)

    def keep(self, workload: Workload, wanted: Wanted, policy: Policy) -> None:
        """One step towards a sidecar that works by `wanted`.

        TidegateError, KernelError or OSError, for a person, when it cannot be taken, or not yet.
        """
        memory = self._memory.content
        if wanted.leaves:
            self._write_secrets(wanted)
            memory = msgspec.structs.replace(
                memory or Memory(workload=workload, policy=policy),
                leaf_for=spiffe_ids_of(wanted.spec),
                leaf_from=time.time(),
                leaf_until=min(leaf.not_after for leaf in wanted.leaves),
                leaf_root=wanted.root_id,
            )
            log.info("leaf certificates written", workload=self._name)
        elif memory is None or memory.spec is None or not self._files.has_secrets:
            raise SidecarError(f"{self._name} has no leaf certificate yet")
        elif memory.leaf_for != spiffe_ids_of(wanted.spec):
            # Envoy would wait for the certificates with all that is new, its other services included.
            self._run(memory.spec, self.applied_index)
            new = (one.service for one in wanted.spec.services)
            problem = f"{self._name} has no leaf certificates for {', '.join(new)} yet"
            raise SidecarError(f"{problem}; its sidecar stays as it is")
        self._memory.keep(
            msgspec.structs.replace(memory, workload=workload, spec=wanted.spec, policy=policy)
        )
        self._run(wanted.spec, wanted.index)

    def remove(self) -> None:
        """End Envoy and take the files away; nothing where there are none."""
        if not self._files.directory.exists():
            return
        if self._files.working.exists():
            self._process.stop(STOP_DEADLINE_S)
        self._files.remove()
        self._memory.forget()
        self.state = State()
        self.was_ready = False
        self._applied = None
        self.applied_index = 0

    @property
    def _process(self) -> EnvoyProcess:
        """Found when it is needed: nodes whose workloads bring their own sidecars have no Envoy."""
        if self._envoy is None:
            self._envoy = EnvoyProcess(
                self._files,
                self._netns_path,
                envoy=self._find_envoy(),
                drain_time_s=self._drain_time_s,
            )
        return self._envoy

    def _write_secrets(self, wanted: Wanted) -> None:
        certificates = [
            render.ServiceCertificate(
                service=one.service, certificate_pem=leaf.certificate_pem, key_pem=leaf.key_pem
            )
            for one, leaf in zip(wanted.spec.services, wanted.leaves, strict=True)
        ]
        self._files.write_secrets(render.render_secrets(certificates, wanted.roots_pem))

    def _run(self, spec: SidecarSpec, index: int) -> None:
        """One step towards an Envoy that works by `spec`."""
        process = self._process
        self._files.write_bootstrap(render.bootstrap(self._node_id, spec.service))
        configuration = render.render(spec)
        if self._files.write_configuration(configuration):
            log.info(
                "sidecar configuration written",
                workload=self._name,
                version=configuration.version,
                mode=spec.mode,
            )
        before = self.state
        self.state = process.ensure(time.monotonic(), transparent=spec.transparent)
        if self.state.pid != before.pid or self.state.phase is not before.phase:
            log.info("sidecar", workload=self._name, **msgspec.structs.asdict(self.state))
        if self.state.phase is not Phase.RUNNING:
            last = f": {self.state.last_exit}" if self.state.last_exit else ""
            raise SidecarError(f"the sidecar of {self._name} is {self.state.phase}{last}")
        self._closed.read(time.time())
        if self.admin.applied_version(configuration.ecds) == configuration.version:
            self.was_ready = True
            self._applied = spec
            self.mode = spec.mode
            # Last: whoever reads it meanwhile takes the rest for as new.
            self.applied_index = index
            return
        rejection = self.admin.rejection(configuration.ecds)
        if rejection:
            raise SidecarError(
                f"the sidecar of {self._name} refuses its configuration: {rejection}"
            )


def spiffe_ids_of(spec: SidecarSpec) -> tuple[str, ...]:
    """The SPIFFE URIs that a sidecar of this spec has to prove, one for each of its services."""
    return tuple(
        spiffe.service_id(spec.trust_domain, one.service, spec.datacenter) for one in spec.services
    )
