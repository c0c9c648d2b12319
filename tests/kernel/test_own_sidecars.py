"""Workloads that bring their own sidecar: rules before it listens, whoever is away, and nothing else of the agent."""

import errno
import socket
import time
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, landing, serving

from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar.files import SidecarError
from tidegate.kernel import netns, sockets
from tidegate.kernel.errors import KernelError
from tidegate.model import MutualTLSMode, Sidecar, Workload
from tidegate.node.config import RedirectConfig
from tidegate.node.keeper import Keeper, WantedRules, abandoned
from tidegate.node.redirection import Redirection

PORT, INBOUND, OUTBOUND = 8080, 20000, 15001
WANTED = WantedRules(index=7, mode=MutualTLSMode.PERMISSIVE)


def no_envoy() -> Path:
    raise SidecarError("Envoy is not installed")


class Site:
    """A pod whose application listens, and what its keeper is given."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.pair = pair
        self.directory = directory / "sidecars" / "api-0"
        self.engine = Engine()
        self.workload = Workload(
            id="uid-api",
            name="api-1",
            service="api",
            node="n1",
            netns=pair.pod,
            port=PORT,
            meshed=True,
            sidecar=Sidecar.OWN,
        )

    def keeper(self, **fields: object) -> Keeper:
        """A keeper as an agent that has just started makes it."""
        workload = msgspec.structs.replace(self.workload, **fields)
        keeper = Keeper(
            workload, self.directory, no_envoy, "api-1.n1", self.engine, RedirectConfig()
        )
        keeper.update(workload)
        return keeper

    def waiting(self) -> Keeper:
        """A keeper whose workload's init containers may reach out."""
        return self.keeper(annotations={"tidegate.io/wait-for-sidecar": "true"})

    def has_rules(self) -> bool:
        return self.engine.current(self.pair.pod) is not None

    def lands_at(self, port: int = PORT) -> int:
        """At which of the pod's ports a caller comes out."""
        return landing(self.pair.peer, self.pair.pod_ipv4, port).port

    def goes_to(self) -> str:
        """Who answers what the pod calls."""
        return landing(self.pair.pod, self.pair.peer_ipv4, PORT, uid=1000).server


@pytest.fixture
def site(state: Path, pair: Pair) -> Site:
    with serving(pair.pod, "api", [PORT]), serving(pair.peer, "peer", [PORT]):
        yield Site(state, pair)


def test_rules_are_there_before_the_sidecar_and_let_nothing_by_until_it_listens(
    site: Site,
) -> None:
    keeper = site.keeper()
    assert site.lands_at() == PORT
    keeper.reconcile(WANTED)
    assert (keeper.in_mesh, keeper.problems) == (True, ())
    assert (keeper.applied_index, keeper.mode) == (7, MutualTLSMode.PERMISSIVE)
    with pytest.raises(ConnectionRefusedError):
        site.lands_at()
    with pytest.raises(ConnectionRefusedError):
        site.goes_to()
    with serving(site.pair.pod, "sidecar", [INBOUND, OUTBOUND]):
        assert site.lands_at() == INBOUND
        assert site.goes_to() == "sidecar"


def test_neither_certificate_nor_file_of_a_sidecar_is_made(site: Site) -> None:
    keeper = site.keeper()
    keeper.reconcile(WANTED)
    assert [one.name for one in site.directory.iterdir()] == ["memory.json"]
    assert keeper.spec is None
    keeper.reconcile(None)
    assert not site.has_rules()
    assert not site.directory.exists()
    assert site.lands_at() == PORT


def test_a_pod_that_ran_without_rules_is_redirected_as_it_runs_and_it_is_known_since_when(
    site: Site,
) -> None:
    before = time.time()
    keeper = site.keeper()
    keeper.reconcile(WANTED)
    assert before <= keeper.begun_at <= time.time()
    returned = site.keeper()
    returned.reconcile(WANTED)
    assert returned.begun_at == keeper.begun_at, "also for the next agent"


def test_a_pod_whose_rules_were_there_before_the_agent_knew_it_is_found_so(site: Site) -> None:
    site.engine.apply(site.pair.pod, RedirectConfig().policy)
    keeper = site.keeper()
    keeper.reconcile(WANTED)
    assert keeper.in_mesh
    assert keeper.begun_at == 0.0
    assert keeper.redirection.repairs(0.0) == 0


def test_a_returning_agent_counts_rules_that_went_meanwhile_and_no_others(site: Site) -> None:
    site.keeper().reconcile(WANTED)
    returned = site.keeper()
    returned.reconcile(WANTED)
    assert returned.redirection.repairs(0.0) == 0
    Engine().remove(site.pair.pod)
    returned = site.keeper()
    returned.reconcile(WANTED)
    assert returned.redirection.repairs(0.0) == 1
    assert site.has_rules()


def test_what_cannot_be_written_down_stops_no_rules(site: Site) -> None:
    site.directory.parent.mkdir()
    site.directory.write_text("no directory")
    keeper = site.keeper()
    keeper.reconcile(WANTED)
    assert keeper.in_mesh
    assert site.has_rules()
    (problem,) = keeper.problems
    assert str(site.directory) in problem
    site.directory.unlink()
    keeper.reconcile(WANTED)
    assert keeper.problems == ()
    assert (site.directory / "memory.json").exists()


def test_the_same_namespace_at_another_path_keeps_its_rules(site: Site) -> None:
    keeper = site.keeper()
    keeper.reconcile(WANTED)
    rules = site.engine.current(site.pair.pod)
    with serving(site.pair.pod, "sidecar", [INBOUND]):
        process = netns.spawn(site.pair.pod, ["sleep", "60"])
        try:
            moved = msgspec.structs.replace(
                site.workload, netns=f"/proc/{process.pid}/ns/net", name="called-otherwise"
            )
            assert keeper.is_of(moved)
            keeper.update(moved)
            keeper.reconcile(WANTED)
            assert keeper.in_mesh
            assert site.lands_at() == INBOUND
        finally:
            process.kill()
            process.wait()
    assert [one.name for one in site.engine.current(site.pair.pod)] == [one.name for one in rules]
    assert keeper.redirection.repairs(0.0) == 0
    gone = msgspec.structs.replace(site.workload, netns=f"/proc/{process.pid}/ns/net")
    assert not site.keeper().is_of(gone), "nor is it one that leads nowhere"


def test_another_namespace_at_the_path_gets_rules_of_its_own(site: Site) -> None:
    name = f"tg-test-own-{site.pair.pod.rpartition('-')[2]}"
    path = netns.create(name)
    try:
        keeper = site.keeper(netns=path)
        keeper.reconcile(WANTED)
        assert site.engine.current(path) is not None
        first = keeper.namespace
        with netns.opened(path):
            # As long as the old one lives its number is not given to another.
            netns.delete(name)
            netns.create(name)
            keeper.reconcile(WANTED)
        assert keeper.namespace != first
        assert site.engine.current(path) is not None
        assert keeper.redirection.repairs(0.0) == 0, "nobody took the rules of the new one away"
    finally:
        netns.delete(name)


def test_a_process_number_that_is_given_anew_leads_nowhere(site: Site, pair: Pair) -> None:
    ended = netns.spawn(site.pair.pod, ["sleep", "60"])
    elsewhere = netns.spawn(site.pair.peer, ["sleep", "60"])
    try:
        path = f"/proc/{ended.pid}/ns/net"
        keeper = site.keeper(netns=path)
        keeper.reconcile(WANTED)
        assert keeper.in_mesh
        # What the kernel does when numbers run out: the same path, another process, another namespace.
        keeper.workload = msgspec.structs.replace(
            keeper.workload, netns=f"/proc/{elsewhere.pid}/ns/net"
        )
        for wanted in (WANTED, None):
            keeper.reconcile(wanted)
            assert keeper.namespace is None
            assert keeper.problems != ()
        keeper.remove()
        assert keeper.is_removed
    finally:
        for process in (ended, elsewhere):
            process.kill()
            process.wait()
    assert site.engine.current(site.pair.peer) is None


def test_what_an_agent_left_of_a_pod_that_is_no_workload_any_more_is_taken_away(
    site: Site,
) -> None:
    site.keeper().reconcile(WANTED)
    left = abandoned(site.directory, no_envoy, site.engine)
    left.remove()
    assert left.is_removed
    assert not site.has_rules()
    assert not site.directory.exists()


def test_a_pod_with_wrong_annotations_is_told_and_not_redirected(site: Site) -> None:
    keeper = site.keeper(annotations={"tidegate.io/exclude-inbound-ports": "http"})
    keeper.reconcile(WANTED)
    assert keeper.redirection.state is Redirection.FAILED
    assert "tidegate.io/exclude-inbound-ports" in keeper.problems[0]


# Init containers: what leaves passes until the sidecar listens.


def test_what_init_containers_open_passes_until_the_sidecar_listens_and_never_again(
    site: Site,
) -> None:
    keeper = site.waiting()
    keeper.reconcile(WANTED)
    assert keeper.awaits_sidecar
    assert site.goes_to() == "peer"
    with pytest.raises(ConnectionRefusedError):
        site.lands_at()
    keeper.look_for_sidecar()
    assert site.goes_to() == "peer", "nobody listens yet"
    with serving(site.pair.pod, "sidecar", [INBOUND, OUTBOUND]):
        keeper.look_for_sidecar()
        assert not keeper.awaits_sidecar
        assert site.goes_to() == "sidecar"
    for one in (keeper, site.waiting()):
        one.reconcile(WANTED)
        with pytest.raises(ConnectionRefusedError):
            site.goes_to()
        assert not one.awaits_sidecar, "a sidecar that is away for a moment opens nothing"
    assert keeper.redirection.repairs(0.0) == 0


def test_an_agent_that_returns_while_init_containers_run_goes_on_waiting(site: Site) -> None:
    site.waiting().reconcile(WANTED)
    returned = site.waiting()
    returned.reconcile(WANTED)
    assert returned.awaits_sidecar
    assert returned.redirection.repairs(0.0) == 0
    assert site.goes_to() == "peer"


def test_a_connection_of_an_init_container_goes_on_when_the_sidecar_takes_over(site: Site) -> None:
    keeper = site.waiting()
    keeper.reconcile(WANTED)
    with netns.run_in(
        site.pair.pod, socket.create_connection, (site.pair.peer_ipv4, PORT), 5
    ) as opened:
        opened.recv(256)
        with serving(site.pair.pod, "sidecar", [OUTBOUND]):
            keeper.reconcile(WANTED)
            assert not keeper.awaits_sidecar
            opened.sendall(b"ping\n")
            assert opened.recv(16) == b"ping\n"


def test_listeners_that_cannot_be_listed_are_told_and_inbound_is_redirected_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise KernelError("too many sockets", errno.ENOBUFS)

    with monkeypatch.context() as patched:
        patched.setattr(sockets, "listeners", refuse)
        keeper = site.waiting()
        keeper.reconcile(WANTED)
        assert keeper.problems == ("too many sockets",)
        with pytest.raises(ConnectionRefusedError):
            site.lands_at()
    keeper.reconcile(WANTED)
    assert keeper.problems == ()
