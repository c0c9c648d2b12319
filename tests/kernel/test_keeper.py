"""One workload kept as it should be: a real namespace pair, a real Envoy, real rules, real connections."""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, landing, serving, set_sysctl

from tidegate.catalog.client import LeafMaterial
from tidegate.enforce.redirect import foreign
from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.envoy import Phase, binary
from tidegate.enforce.sidecar.spec import LocalService, SidecarSpec
from tidegate.identity.ca import MeshCA
from tidegate.intent.policy import DEFAULT, Outbound, Policy
from tidegate.kernel import links, netns
from tidegate.kernel import nftables as kernel_nftables
from tidegate.kernel.capabilities import CAP_NET_RAW, has
from tidegate.kernel.errors import KernelError
from tidegate.model import DEFAULT_PROXY_UID, MutualTLSMode, Workload
from tidegate.node import redirection
from tidegate.node.config import OnFailure, RedirectConfig
from tidegate.node.keeper import Keeper, abandoned
from tidegate.node.redirection import Redirection
from tidegate.node.sidecar import Wanted, spiffe_ids_of

DEADLINE_S = 20
PORT = 8080
EXCLUDE = "consul.hashicorp.com/transparent-proxy-exclude-inbound-ports"
ROOT = "the root that issues"
SPEC = SidecarSpec(
    service="api",
    trust_domain="0f1e2d3c.consul",
    mode=MutualTLSMode.PERMISSIVE,
    port=PORT,
)
STRICT = msgspec.structs.replace(SPEC, mode=MutualTLSMode.STRICT)


class Site:
    """One pod and what its keeper is given."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.pair = pair
        self.directory = directory / "sidecars" / "api-0"
        self.engine = Engine()
        self.redirect = RedirectConfig()
        self.ca = MeshCA.create(directory / "ca", SPEC.trust_domain)
        self.workload = Workload(
            id="id-api",
            name="api-1",
            service="api",
            node="n1",
            netns=pair.pod,
            port=PORT,
            addresses=(pair.pod_ipv4, pair.pod_ipv6),
            meshed=True,
        )

    def keeper(self, envoy: Path | None = None, **annotations: str) -> Keeper:
        """A keeper as an agent that has just started makes it."""
        keeper = Keeper(
            self.workload,
            self.directory,
            (lambda: envoy) if envoy else binary,
            "api-1.n1",
            self.engine,
            self.redirect,
        )
        keeper.update(msgspec.structs.replace(self.workload, annotations=annotations))
        return keeper

    def leaves(self, spec: SidecarSpec = SPEC) -> tuple[LeafMaterial, ...]:
        issued = [
            (one.service, self.ca.issue(uri, 3600))
            for one, uri in zip(spec.services, spiffe_ids_of(spec), strict=True)
        ]
        return tuple(
            LeafMaterial(
                service=service,
                spiffe_uri=leaf.spiffe_uri,
                certificate_pem=leaf.certificate_pem,
                key_pem=leaf.key_pem,
                not_before=leaf.not_before,
                not_after=leaf.not_after,
                serial=leaf.serial,
            )
            for service, leaf in issued
        )

    def wanted(
        self,
        spec: SidecarSpec = SPEC,
        index: int = 1,
        leaves: tuple[LeafMaterial, ...] = (),
        policy: Policy | None = None,
    ) -> Wanted:
        return Wanted(
            spec=spec,
            index=index,
            leaves=leaves,
            root_id=ROOT,
            roots_pem=self.ca.roots_pem,
            policy=policy,
        )

    def rules(self) -> bool:
        return self.engine.current(self.pair.pod) is not None

    def envoys(self) -> list[int]:
        """Processes of the proxy user in the pod."""
        found = []
        for pid in netns.pids(self.pair.pod):
            with contextlib.suppress(FileNotFoundError):
                if Path(f"/proc/{pid}").stat().st_uid == DEFAULT_PROXY_UID:
                    found.append(pid)
        return found

    def reaches_application(self) -> bool:
        """Whether a plaintext caller's connection arrives at the application's own port."""
        return landing(self.pair.peer, self.pair.pod_ipv4, PORT).port == PORT

    def until_meshed(self, keeper: Keeper, wanted: Wanted) -> None:
        deadline = time.monotonic() + DEADLINE_S
        keeper.reconcile(wanted)
        wanted = msgspec.structs.replace(wanted, leaves=())
        while not (keeper.in_mesh and keeper.applied_index == wanted.index):
            assert time.monotonic() < deadline, keeper.problems
            time.sleep(0.02)
            keeper.reconcile(wanted)


@pytest.fixture
def site(pair: Pair) -> Iterator[Site]:
    """The directory is one that the proxy user can pass, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    directory.chmod(0o711)
    made = Site(directory, pair)
    try:
        with serving(pair.pod, "api", [PORT]):
            yield made
    finally:
        for pid in made.envoys() if Path(pair.pod).exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory)


@pytest.fixture
def meshed(site: Site) -> Keeper:
    """A keeper whose workload is in the mesh."""
    keeper = site.keeper()
    site.until_meshed(keeper, site.wanted(leaves=site.leaves()))
    return keeper


def test_rules_come_only_once_envoy_works_by_exactly_these_files(site: Site) -> None:
    keeper = site.keeper()
    wanted = site.wanted(leaves=site.leaves())
    version = render.render(SPEC).version
    deadline = time.monotonic() + DEADLINE_S
    states = []
    while not keeper.in_mesh:
        assert not site.rules()
        assert keeper.applied_index == 0
        assert time.monotonic() < deadline, keeper.problems
        keeper.reconcile(wanted)
        wanted = msgspec.structs.replace(wanted, leaves=())
        states.append(keeper.redirection.state)
    assert site.rules()
    assert keeper.admin.applied_version() == version
    assert states[0] is Redirection.WAITING
    assert states[-1] is Redirection.APPLIED
    assert keeper.sidecar.phase is Phase.RUNNING
    assert (keeper.applied_index, keeper.mode) == (1, MutualTLSMode.PERMISSIVE)
    assert keeper.problems == ()
    assert site.reaches_application(), "permissive lets plaintext through the sidecar"
    assert keeper.admin.sidecar_stats().permissive_connections == 1


def test_without_a_leaf_nothing_is_redirected_and_the_problem_says_so(site: Site) -> None:
    keeper = site.keeper()
    keeper.reconcile(site.wanted())
    assert keeper.redirection.state is Redirection.WAITING
    assert keeper.problems == ("api-1 has no leaf certificate yet",)
    assert not site.rules()
    assert site.envoys() == []
    assert site.reaches_application()


def test_an_envoy_that_does_not_start_keeps_the_workload_out_of_the_mesh(site: Site) -> None:
    keeper = site.keeper(envoy=Path(shutil.which("false")))
    wanted = site.wanted(leaves=site.leaves())
    deadline = time.monotonic() + DEADLINE_S
    while "exited with status 1" not in "".join(keeper.problems):
        assert time.monotonic() < deadline, keeper.problems
        keeper.reconcile(wanted)
    assert keeper.redirection.state is Redirection.WAITING
    assert not site.rules()
    assert site.reaches_application()


def test_out_of_the_mesh_nothing_stays(site: Site, meshed: Keeper) -> None:
    pid = meshed.sidecar.pid
    meshed.reconcile(None)
    assert not site.rules()
    assert pid not in netns.pids(site.pair.pod)
    assert not site.directory.exists()
    assert (meshed.in_mesh, meshed.spec, meshed.applied_index) == (False, None, 0)
    assert meshed.problems == ()
    assert site.reaches_application()
    meshed.reconcile(None)
    site.until_meshed(meshed, site.wanted(leaves=site.leaves()))


def test_while_its_rules_cannot_be_removed_the_sidecar_stays(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(_netns: str) -> None:
        tried.append(1)
        raise KernelError("not now", 16)

    with monkeypatch.context() as patched:
        patched.setattr(site.engine, "remove", refuse)
        for _ in range(3):
            meshed.reconcile(None)
    assert tried == [1], "and the namespace is left alone for a while"
    assert site.envoys() == [meshed.sidecar.pid]
    assert meshed.problems == ("not now",)
    assert not meshed.in_mesh
    deadline = time.monotonic() + DEADLINE_S
    while meshed.problems:
        assert time.monotonic() < deadline
        meshed.reconcile(None)
    assert site.envoys() == []
    assert not site.rules()


def test_a_returning_keeper_adopts_envoy_rules_and_leaf(site: Site, meshed: Keeper) -> None:
    returned = site.keeper()
    assert returned.spec == SPEC
    assert not returned.needs_leaves(time.time(), spiffe_ids_of(SPEC))
    returned.reconcile(site.wanted())
    assert returned.in_mesh
    assert (returned.applied_index, returned.mode) == (1, MutualTLSMode.PERMISSIVE)
    assert returned.sidecar.pid == meshed.sidecar.pid
    assert returned.sidecar.restarts == 0
    assert site.envoys() == [meshed.sidecar.pid]
    assert returned.problems == ()


def test_rules_that_went_while_there_was_no_agent_are_counted_as_repaired(
    site: Site, meshed: Keeper
) -> None:
    Engine().remove(site.pair.pod)
    returned = site.keeper()
    site.until_meshed(returned, site.wanted())
    assert returned.redirection.repairs(0.0) == 1
    assert returned.redirection.last_repair == "the rules were gone when the agent came back"
    again = site.keeper()
    again.reconcile(site.wanted())
    assert again.redirection.repairs(0.0) == 0, "once"


def test_what_was_never_redirected_or_is_no_more_was_not_changed_by_anybody(
    site: Site, meshed: Keeper
) -> None:
    meshed._remove_rules()
    for keeper in (site.keeper(), meshed):
        site.until_meshed(keeper, site.wanted())
        assert keeper.redirection.repairs(0.0) == 0
        keeper._remove_rules()


def test_a_returning_keeper_takes_a_workload_out_of_the_mesh(site: Site, meshed: Keeper) -> None:
    site.keeper().reconcile(None)
    assert not site.rules()
    assert site.envoys() == []
    assert not site.directory.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe"])
def test_a_returning_keeper_with_a_damaged_memory_asks_for_a_leaf_and_adopts(
    site: Site, meshed: Keeper, content: bytes
) -> None:
    (site.directory / "memory.json").write_bytes(content)
    returned = site.keeper()
    assert returned.needs_leaves(time.time(), spiffe_ids_of(SPEC))
    site.until_meshed(returned, site.wanted(leaves=site.leaves()))
    assert returned.sidecar.pid == meshed.sidecar.pid
    (site.directory / "memory.json").write_bytes(content)
    site.keeper().reconcile(None)
    assert site.envoys() == [], "it leaves nothing behind either"


def test_a_faulty_annotation_is_named_and_the_policy_stays(site: Site) -> None:
    keeper = site.keeper(**{EXCLUDE: "9000"})
    site.until_meshed(keeper, site.wanted(leaves=site.leaves()))
    good = keeper.policy
    keeper.update(msgspec.structs.replace(site.workload, annotations={EXCLUDE: "nine"}))
    keeper.reconcile(site.wanted())
    assert keeper.policy == good
    [problem] = keeper.problems
    assert EXCLUDE in problem
    assert "nine" in problem
    assert "the policy stays as it was" in problem
    assert keeper.in_mesh
    assert site.engine.check(site.pair.pod, good) == ()

    returned = site.keeper(**{EXCLUDE: "nine"})
    returned.reconcile(site.wanted())
    assert returned.policy == good, "also for the next agent"
    assert returned.in_mesh
    assert site.engine.check(site.pair.pod, good) == ()

    returned.update(msgspec.structs.replace(site.workload, annotations={EXCLUDE: "9001"}))
    returned.reconcile(site.wanted())
    assert returned.problems == ()
    assert site.engine.check(site.pair.pod, good) != ()
    assert site.engine.check(site.pair.pod, returned.policy) == ()


def test_a_workload_whose_annotations_were_never_good_is_left_alone(site: Site) -> None:
    keeper = site.keeper(**{EXCLUDE: "nine"})
    keeper.reconcile(site.wanted(leaves=site.leaves()))
    assert keeper.redirection.state is Redirection.FAILED
    assert "it has no policy" in keeper.problems[0]
    assert not site.rules()
    assert site.envoys() == []
    assert site.reaches_application()


def test_by_configuration_nothing_passes_until_a_workload_can_be_redirected(site: Site) -> None:
    site.redirect = RedirectConfig(on_failure=OnFailure.BLOCK)
    keeper = site.keeper(**{EXCLUDE: "nine"})
    keeper.reconcile(site.wanted(leaves=site.leaves()))
    assert keeper.redirection.state is Redirection.BLOCKED
    with pytest.raises(TimeoutError):
        netns.run_in(
            site.pair.peer, socket.create_connection, (site.pair.pod_ipv4, PORT), timeout=0.3
        )
    keeper.update(msgspec.structs.replace(site.workload, annotations={EXCLUDE: "9000"}))
    site.until_meshed(keeper, site.wanted(leaves=site.leaves()))
    assert site.reaches_application()


def test_a_block_that_a_former_agent_left_goes_when_the_workload_leaves_the_mesh(
    site: Site,
) -> None:
    site.redirect = RedirectConfig(on_failure=OnFailure.BLOCK)
    site.keeper(**{EXCLUDE: "nine"}).reconcile(site.wanted(leaves=site.leaves()))
    site.keeper().reconcile(None)
    assert site.reaches_application()


def test_rules_that_somebody_removed_are_put_back(site: Site, meshed: Keeper) -> None:
    Engine().remove(site.pair.pod)
    meshed.look()
    assert meshed.redirection.last_repair == "table inet tidegate is missing"
    assert site.engine.check(site.pair.pod, meshed.policy) == ()
    assert meshed.redirection.repairs(0.0) == 1, (
        "and it is counted: what came meanwhile passed the sidecar by"
    )


def test_rules_of_another_mesh_that_come_later_are_a_problem_until_they_are_gone(
    site: Site, meshed: Keeper
) -> None:
    nftables = "add table inet consul_tproxy; add chain inet consul_tproxy CONSUL_PROXY_OUTPUT"
    netns.run_in(site.pair.pod, kernel_nftables.load, nftables)
    meshed.look()
    assert meshed.in_mesh
    assert "Consul" in "".join(meshed.problems)
    assert meshed.redirection.repairs(0.0) == 0, "tidegate's own rules are as they were"
    netns.run_in(site.pair.pod, kernel_nftables.load, "delete table inet consul_tproxy")
    meshed.look()
    assert meshed.problems == ()


def test_what_others_put_before_the_rules_later_on_is_noted_until_it_is_gone(
    site: Site, meshed: Keeper
) -> None:
    others = (
        "add table ip theirs;"
        "add chain ip theirs c { type nat hook output priority -150; };"
        "add rule ip theirs c tcp dport 80 dnat to 192.0.2.1"
    )
    netns.run_in(site.pair.pod, kernel_nftables.load, others)
    meshed.look()
    [note] = meshed.redirection.notes
    assert "chain c of the nftables table ip theirs translates connections" in note
    assert meshed.problems == ()
    assert meshed.in_mesh
    netns.run_in(site.pair.pod, kernel_nftables.load, "delete table ip theirs")
    meshed.look()
    assert meshed.redirection.notes == ()


def test_what_cannot_be_told_of_ways_around_is_a_note_and_no_failure(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("not now", 16)

    monkeypatch.setattr(site.engine, "gaps", refuse)
    meshed.look()
    assert meshed.redirection.notes == ("what goes around the sidecar cannot be told: not now",)
    assert meshed.in_mesh
    assert meshed.problems == ()


def test_what_cannot_be_adopted_is_told_with_the_reason(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.redirect = RedirectConfig(adopt=True)
    adopting = site.keeper()
    nftables = "add table inet consul_tproxy; add chain inet consul_tproxy CONSUL_PROXY_OUTPUT"
    netns.run_in(site.pair.pod, kernel_nftables.load, nftables)

    def refuse(*_: object) -> None:
        raise KernelError("busy", 16)

    with monkeypatch.context() as patched:
        patched.setattr(foreign, "remove", refuse)
        adopting.reconcile(site.wanted())
        [problem] = adopting.problems
        assert "Consul redirects in the nftables table inet consul_tproxy" in problem
        assert problem.endswith("it cannot be taken away: busy")
        assert adopting.redirection.notes == (), "and it is not told twice"
        assert adopting.in_mesh
    adopting.look()
    assert adopting.problems == ()


@pytest.mark.parametrize("before", ["redirect", "tproxy"])
def test_a_change_of_mode_is_followed_by_a_sidecar_with_what_it_needs_and_no_more(
    site: Site, before: str
) -> None:
    mode = "tidegate.io/mode"
    after = "tproxy" if before == "redirect" else "redirect"
    spec = {
        each: msgspec.structs.replace(SPEC, transparent=each == "tproxy")
        for each in (before, after)
    }
    keeper = site.keeper(**{mode: before})
    site.until_meshed(keeper, site.wanted(spec[before], leaves=site.leaves()))
    pid = keeper.sidecar.pid
    assert has(pid, CAP_NET_RAW) is (before == "tproxy")

    keeper.update(msgspec.structs.replace(site.workload, annotations={mode: after}))
    site.until_meshed(keeper, site.wanted(spec[after], index=2))
    assert keeper.sidecar.pid != pid
    assert has(keeper.sidecar.pid, CAP_NET_RAW) is (after == "tproxy")
    keeper.look()
    assert (keeper.problems, keeper.redirection.notes) == ((), ())
    assert site.reaches_application()


def test_the_rules_stay_when_envoy_is_killed_and_it_is_started_again(
    site: Site, meshed: Keeper
) -> None:
    pid = meshed.sidecar.pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while "killed by SIGKILL" not in "".join(meshed.problems):
        assert time.monotonic() < deadline, meshed.problems
        meshed.reconcile(site.wanted())
        assert site.rules()
        assert meshed.in_mesh
    with pytest.raises(ConnectionRefusedError):
        site.reaches_application()
    while meshed.problems:
        assert time.monotonic() < deadline, meshed.problems
        meshed.reconcile(site.wanted())
        assert site.rules()
        assert meshed.in_mesh
    assert meshed.sidecar.pid not in (0, pid)
    assert meshed.sidecar.restarts == 1
    assert site.reaches_application()


def test_a_keeper_that_returns_while_envoy_is_dead_leaves_the_rules(
    site: Site, meshed: Keeper
) -> None:
    meshed._sidecar._process.stop(5)
    returned = site.keeper()
    returned.reconcile(site.wanted())
    assert site.rules()
    assert returned.in_mesh
    site.until_meshed(returned, site.wanted())
    assert site.reaches_application()


def test_a_flip_counts_only_once_envoy_works_by_it(site: Site, meshed: Keeper) -> None:
    pid = meshed.sidecar.pid
    deadline = time.monotonic() + DEADLINE_S
    wanted = site.wanted(STRICT, index=2)
    version = render.render(STRICT).version
    while meshed.applied_index != 2:
        assert meshed.mode is MutualTLSMode.PERMISSIVE
        assert time.monotonic() < deadline, meshed.problems
        meshed.reconcile(wanted)
    assert meshed.mode is MutualTLSMode.STRICT
    assert meshed.admin.applied_version() == version
    assert meshed.sidecar.pid == pid
    with pytest.raises(ConnectionError):
        site.reaches_application()


def test_a_leaf_is_renewed_in_time_and_whenever_the_identity_changes(
    site: Site, meshed: Keeper
) -> None:
    memory = meshed._memory.content
    life = memory.leaf_until - memory.leaf_from
    assert not meshed.needs_leaves(memory.leaf_from + 0.6 * life, spiffe_ids_of(SPEC))
    assert meshed.needs_leaves(memory.leaf_from + 0.7 * life, spiffe_ids_of(SPEC))
    assert memory.leaf_root == ROOT
    assert not meshed.needs_leaves(memory.leaf_from, spiffe_ids_of(SPEC), ROOT)
    assert meshed.needs_leaves(memory.leaf_from, spiffe_ids_of(SPEC), "another root")
    renamed = msgspec.structs.replace(SPEC, service="billing")
    assert meshed.needs_leaves(time.time(), spiffe_ids_of(renamed))
    meshed.reconcile(site.wanted(renamed, index=2))
    assert meshed.spec == SPEC, "it still has the other one's leaf"
    assert meshed.problems == (
        "api-1 has no leaf certificates for billing yet; its sidecar stays as it is",
    )
    meshed.reconcile(site.wanted(renamed, index=2, leaves=site.leaves(renamed)))
    assert not meshed.needs_leaves(time.time(), spiffe_ids_of(renamed))
    assert meshed.spec == renamed


def test_a_service_that_joins_others_gets_its_own_leaf(site: Site, meshed: Keeper) -> None:
    further = LocalService(service="api-admin", port=9090, mode=MutualTLSMode.PERMISSIVE)
    both = msgspec.structs.replace(SPEC, more_services=(further,))
    assert meshed.plaintext_ports == {PORT}
    site.until_meshed(meshed, site.wanted(both, index=2, leaves=site.leaves(both)))
    assert meshed.plaintext_ports == {PORT, 9090}
    assert not meshed.needs_leaves(time.time(), spiffe_ids_of(both))
    assert meshed.needs_leaves(time.time(), spiffe_ids_of(SPEC))


def test_another_port_of_the_outbound_listener_is_the_rules_as_well(
    site: Site, meshed: Keeper
) -> None:
    spec = msgspec.structs.replace(SPEC, outbound_port=16000)
    policy = msgspec.structs.replace(DEFAULT, outbound=Outbound(port=16000))
    site.until_meshed(meshed, site.wanted(spec, index=2, policy=policy))
    assert meshed.policy == policy
    assert meshed.described == DEFAULT
    peer = site.pair.peer
    with serving(peer, "outside", [9000]):
        assert landing(site.pair.pod, site.pair.peer_ipv4, 9000).server == "outside"
    assert meshed.admin.sidecar_stats().passthrough_connections == 1


def test_a_listener_that_envoy_refuses_is_told_and_the_old_one_stays(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = render.render

    def broken(spec: SidecarSpec) -> render.Configuration:
        good = rendered(spec)
        lds = good.lds.replace(b'"0.0.0.0"', b'"0.0.0.999"')
        return msgspec.structs.replace(good, lds=lds)

    monkeypatch.setattr(render, "render", broken)
    deadline = time.monotonic() + DEADLINE_S
    while not any("0.0.0.999" in problem for problem in meshed.problems):
        assert time.monotonic() < deadline, meshed.problems
        meshed.reconcile(site.wanted(STRICT, index=2))
    assert meshed.problems[0].startswith("the sidecar of api-1 refuses its configuration: ")
    assert (meshed.applied_index, meshed.mode) == (1, MutualTLSMode.PERMISSIVE)
    assert site.reaches_application()
    monkeypatch.undo()
    site.until_meshed(meshed, site.wanted(STRICT, index=2))
    assert meshed.problems == ()


def test_of_a_workload_that_is_gone_nothing_stays(site: Site, meshed: Keeper) -> None:
    meshed.remove()
    assert not site.rules(), "a namespace that outlives its workload is not cut off"
    assert site.envoys() == []
    assert not site.directory.exists()
    assert meshed.problems == ()
    assert site.reaches_application()


def test_a_workload_that_is_gone_with_its_namespace_leaves_no_envoy(
    site: Site, meshed: Keeper
) -> None:
    pid = meshed.sidecar.pid
    netns.delete(Path(site.pair.pod).name)
    try:
        meshed.remove()
        assert not site.directory.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        netns.create(Path(site.pair.pod).name)


def test_of_a_workload_that_is_gone_the_sidecar_stays_until_its_rules_can_be_removed(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(_netns: str) -> None:
        tried.append(1)
        raise KernelError("not now", 16)

    with monkeypatch.context() as patched:
        patched.setattr(site.engine, "remove", refuse)
        for _ in range(3):
            meshed.remove()
    assert tried == [1], "and the namespace is left alone for a while"
    assert not meshed.is_removed
    assert meshed.problems == ("not now",)
    assert site.rules()
    assert site.envoys() == [meshed.sidecar.pid]
    assert site.reaches_application(), "through the sidecar"
    deadline = time.monotonic() + DEADLINE_S
    while not meshed.is_removed:
        assert time.monotonic() < deadline
        meshed.remove()
    assert not site.rules()
    assert site.envoys() == []
    assert not site.directory.exists()
    assert meshed.problems == ()


def is_at_work(pid: int) -> bool:
    """Not of one that has ended and that nobody has asked how (proc_pid_cmdline(5))."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def replaced(path: str) -> None:
    """Another namespace lies at the path; the one of before lives on as long as something is in it."""
    name = Path(path).name
    netns.delete(name)
    netns.create(name)


@pytest.mark.parametrize("returned", [False, True])
def test_of_a_workload_that_is_gone_nothing_is_removed_from_another_namespace_at_its_path(
    site: Site, meshed: Keeper, returned: bool
) -> None:
    replaced(site.pair.pod)
    site.engine.apply(site.pair.pod, meshed.policy)
    keeper = abandoned(site.directory, binary, site.engine) if returned else meshed
    keeper.remove()
    assert keeper.is_removed
    assert site.rules()
    assert not site.directory.exists()
    assert not is_at_work(meshed.sidecar.pid)


@pytest.mark.parametrize("when", ["before the look", "after the look has begun"])
def test_another_namespace_at_the_path_gets_no_rules_before_it_has_a_sidecar(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    if when == "before the look":
        replaced(site.pair.pod)
    else:
        run_in = netns.run_in

        def late(path: str, *args: object) -> object:
            monkeypatch.setattr(netns, "run_in", run_in)
            replaced(path)
            return run_in(path, *args)

        monkeypatch.setattr(netns, "run_in", late)
    meshed.look()
    assert not site.rules()
    assert meshed.redirection.repairs(0.0) == 0
    if when == "before the look":
        assert meshed.problems == ()
    set_sysctl(site.pair.pod, "net/ipv6/conf/default/accept_dad", "0")
    links.set_up(site.pair.pod, "lo")
    site.until_meshed(meshed, site.wanted())
    assert site.envoys() == [meshed.sidecar.pid]
    assert meshed.redirection.repairs(0.0) == 0
    assert meshed.problems == ()


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_former_agent_left_of_a_workload_can_be_removed(
    site: Site, meshed: Keeper, damaged: bool
) -> None:
    pid = meshed.sidecar.pid
    if damaged:
        (site.directory / "memory.json").write_bytes(b"{")
    abandoned(site.directory, binary, site.engine).remove()
    assert site.envoys() == []
    assert not site.directory.exists()
    assert site.rules() is damaged, "without the memory nobody knows whose namespace it was"
    assert pid not in netns.pids(site.pair.pod)


def test_a_namespace_that_refuses_is_left_alone_for_a_while_and_stays_told(
    site: Site, meshed: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(*_: object, **__: object) -> None:
        tried.append(time.monotonic())
        raise KernelError("not now", 16)

    with monkeypatch.context() as patched:
        patched.setattr(redirection, "FIRST_REST_S", 60.0)
        patched.setattr(redirection, "LONGEST_REST_S", 60.0)
        patched.setattr(site.engine, "check", refuse)
        for _ in range(3):
            meshed.look()
            assert meshed.problems == ("not now",)
            assert meshed.redirection.state is Redirection.FAILED
    assert len(tried) == 1
    meshed.update(msgspec.structs.replace(site.workload, annotations={EXCLUDE: "9000"}))
    meshed.reconcile(site.wanted())
    assert meshed.in_mesh, "another policy is tried at once"
    assert meshed.problems == ()
