"""Pods are found by their cgroups: real processes, in real cgroups and network namespaces, laid out as kubelets do."""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from namespaces import DEADLINE_S, eventually, landing, needs_user_namespaces, serving

from tidegate.enforce.redirect.engine import BackendChoice, Engine
from tidegate.intent.policy import DEFAULT
from tidegate.kernel import links, netns
from tidegate.kernel.errors import KernelError
from tidegate.model import DEFAULT_PROXY_UID
from tidegate.workloads.kubernetes import placing
from tidegate.workloads.kubernetes.placing import NotPlaced, Placed, Places
from tidegate.workloads.kubernetes.pods import Pod

HIERARCHIES = {
    2: Path("/sys/fs/cgroup/unified"),
    1: Path("/sys/fs/cgroup/pids"),
}

UID = "4d3c5a8e-1f0b-4e57-9a43-6b1c2d3e4f50"
ESCAPED = UID.replace("-", "_")
STATIC_UID = "a3f8c0d1e2b3a4958677685941322110"
SANDBOX = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
ADDRESS = "10.42.1.7"

LAYOUTS = {
    "systemd, burstable, containerd": (
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{ESCAPED}.slice"
        f"/cri-containerd-{SANDBOX}.scope"
    ),
    "systemd, guaranteed, crun": f"kubepods.slice/kubepods-pod{ESCAPED}.slice/crio-{SANDBOX}.scope/container",
    "cgroupfs, besteffort": f"kubepods/besteffort/pod{UID}/{SANDBOX}",
    "cgroupfs, guaranteed": f"kubepods/pod{UID}/{SANDBOX}",
    "kind": (
        "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice"
        f"/kubelet-kubepods-besteffort-pod{ESCAPED}.slice/cri-containerd-{SANDBOX}.scope"
    ),
    "below kubelet": f"kubelet/kubepods/burstable/pod{UID}/{SANDBOX}",
    "version 1, cgroupfs": f"memory/kubepods/burstable/pod{UID}/{SANDBOX}",
    "version 1, systemd": (
        f"systemd/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{ESCAPED}.slice"
        f"/docker-{SANDBOX}.scope"
    ),
    "version 1, below kubelet": f"memory/kubelet/kubepods/pod{UID}/{SANDBOX}",
}
POD = f"kubepods/besteffort/pod{UID}"


def pod(uid: str = UID, addresses: tuple[str, ...] = (ADDRESS,)) -> Pod:
    return Pod(
        uid=uid, namespace="shop", name="web-0", node="n1", service="web", addresses=addresses
    )


class Node:
    """Cgroups of a node's own, and what runs in them."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self._stack = stack
        self.attachments: dict[str, str] = {}
        self.places = Places(root, lambda uid, namespace, name: self.attachments.get(uid))

    def run(self, cgroup: str, *command: str, netns_path: str | None = None) -> int:
        """The process of a command that sleeps for ever, in a cgroup, and in a namespace that is there."""
        argv = [*command, "sleep", "infinity"]
        process = netns.spawn(netns_path or netns.CURRENT, argv)
        self._stack.callback(_end, process)
        self.move(process.pid, cgroup)
        # What a command changes of itself it has changed when it has become what sleeps.
        eventually(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        return process.pid

    def move(self, pid: int, cgroup: str) -> None:
        directory = self.root / cgroup
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").write_text(str(pid))

    def place(self, which: Pod | None = None) -> Placed | NotPlaced:
        self.places.begin()
        return self.places.place(which or pod())


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


@contextmanager
def _node_in(hierarchy: Path) -> Iterator[Node]:
    if not (hierarchy / "cgroup.procs").exists():
        pytest.skip(f"there are no cgroups at {hierarchy}")
    root = hierarchy / f"tg-pods-{os.getpid()}"
    root.mkdir()
    try:
        with ExitStack() as stack:
            yield Node(root, stack)
    finally:
        for directory in sorted(root.glob("**/"), reverse=True):
            _remove(directory)


def _remove(cgroup: Path) -> None:
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            cgroup.rmdir()
        except OSError as error:
            # Those that were in it are ended, and the kernel has not forgotten them yet.
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        else:
            return


@pytest.fixture
def node() -> Iterator[Node]:
    with _node_in(HIERARCHIES[2]) as made:
        yield made


def give_address(netns_path: str, address: str = ADDRESS) -> None:
    links.add_address(netns_path, "lo", f"{address}/32")


def path_of(pid: int) -> str:
    return f"/proc/{pid}/ns/net"


@pytest.mark.parametrize("version", HIERARCHIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pod_is_found_by_its_uid_however_kubelet_and_runtime_lay_out_cgroups(
    layout: str, version: int
) -> None:
    with _node_in(HIERARCHIES[version]) as node:
        pid = node.run(LAYOUTS[layout], "unshare", "--net")
        give_address(path_of(pid))
        assert node.place() == Placed(path_of(pid))
        assert isinstance(node.place(pod(uid=STATIC_UID)), NotPlaced)


def test_a_pod_with_an_address_of_ipv6_alone_is_found_by_it(node: Node) -> None:
    node.run(f"{POD}/0-first-by-name", "unshare", "--net")
    pid = node.run(f"{POD}/1-second", "unshare", "--net")
    links.add_address(path_of(pid), "lo", "fd00:42:0:1::7/128")
    assert node.place(pod(addresses=("fd00:42:0:1::7",))) == Placed(path_of(pid))


def test_a_static_pod_is_found_by_the_kubelets_uid(node: Node) -> None:
    pid = node.run(f"kubepods/burstable/pod{STATIC_UID}/{SANDBOX}", "unshare", "--net")
    give_address(path_of(pid))
    assert node.place(pod(uid=STATIC_UID)) == Placed(path_of(pid))


def test_a_name_of_the_namespace_is_preferred_because_it_outlives_processes(
    node: Node, new_namespace: Callable[[], str]
) -> None:
    namespace = new_namespace()
    give_address(namespace)
    node.run(f"{POD}/{SANDBOX}", netns_path=namespace)
    assert node.place() == Placed(namespace)


def test_a_container_with_a_namespace_of_its_own_does_not_stand_for_its_pod(node: Node) -> None:
    sandbox = node.run(f"{POD}/{SANDBOX}", "unshare", "--net")
    give_address(path_of(sandbox))
    node.run(f"{POD}/0-first-by-name", "unshare", "--net")
    assert node.place(pod(addresses=())) == Placed(path_of(sandbox)), "the older one, for now"
    node.places.keep(())
    assert node.place() == Placed(path_of(sandbox))


def test_where_no_sandbox_has_a_process_the_address_tells_which_namespace_is_the_pods(
    node: Node,
) -> None:
    node.run(f"{POD}/0-first-by-name", "unshare", "--net")
    application = node.run(f"{POD}/1-second", "unshare", "--net")
    give_address(path_of(application))
    assert node.place() == Placed(path_of(application))


def test_a_namespace_without_the_pods_address_is_not_the_pods(node: Node) -> None:
    pid = node.run(f"{POD}/{SANDBOX}", "unshare", "--net")
    found = node.place()
    assert isinstance(found, NotPlaced)
    assert f"none of {ADDRESS} is in the network namespace" in found.why
    assert node.place(pod(addresses=())) == Placed(path_of(pid)), "one without address yet"


def test_the_nodes_own_namespace_is_never_a_pods(node: Node) -> None:
    node.run(f"{POD}/{SANDBOX}")
    found = node.place(pod(addresses=()))
    assert isinstance(found, NotPlaced)
    assert "in the node's network namespace" in found.why
    node.attachments[UID] = "/proc/self/ns/net"
    assert isinstance(node.place(pod(addresses=())), NotPlaced)


def test_a_pod_of_which_nothing_runs_is_not_found_and_it_is_said_what_is_missing(
    node: Node,
) -> None:
    found = node.place()
    assert isinstance(found, NotPlaced)
    assert f"there is no cgroup of it below {node.root}" in found.why
    (node.root / POD).mkdir(parents=True)
    found = node.place()
    assert isinstance(found, NotPlaced)
    assert "has no processes" in found.why


def test_a_sandbox_that_is_made_anew_is_found_anew(node: Node) -> None:
    first = node.run(f"{POD}/first", "unshare", "--net")
    give_address(path_of(first))
    assert node.place() == Placed(path_of(first))
    os.kill(first, signal.SIGKILL)
    eventually(lambda: isinstance(node.place(), NotPlaced))
    second = node.run(f"{POD}/second", "unshare", "--net")
    give_address(path_of(second))
    assert node.place() == Placed(path_of(second))


def test_a_pod_that_took_its_address_away_is_found_where_it_was_when_its_sandbox_ends(
    node: Node,
) -> None:
    """One with CAP_NET_ADMIN can, and would be left unredirected."""
    sandbox = node.run(f"{POD}/sandbox", "unshare", "--net")
    give_address(path_of(sandbox))
    # Another namespace that it made, to be taken for its own: it is older than what is left of the pod.
    decoy = node.run(f"{POD}/decoy", "unshare", "--net")
    give_address(path_of(decoy))
    application = node.run(f"{POD}/application", netns_path=path_of(sandbox))
    assert node.place() == Placed(path_of(sandbox))
    taken = ["ip", "address", "delete", f"{ADDRESS}/32", "dev", "lo"]
    assert netns.spawn(path_of(sandbox), taken).wait() == 0
    os.kill(sandbox, signal.SIGKILL)
    _remove(node.root / POD / "sandbox")
    assert node.place() == Placed(path_of(application))


def test_a_pod_that_cannot_be_looked_at_stays_where_it_was(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = node.run(f"{POD}/{SANDBOX}", "unshare", "--net")
    give_address(path_of(pid))
    assert node.place() == Placed(path_of(pid))

    def refuse(path: str) -> netns.Identity:
        raise KernelError("not allowed", errno.EACCES)

    monkeypatch.setattr(netns, "identity", refuse)
    assert node.place() == Placed(path_of(pid))


def test_a_pod_whose_only_container_is_started_again_stays_until_its_cgroup_goes(
    node: Node, new_namespace: Callable[[], str]
) -> None:
    """Sandboxes of CRI-O have no process, and their namespaces have names."""
    namespace = new_namespace()
    give_address(namespace)
    pid = node.run(f"{POD}/first", netns_path=namespace)
    assert node.place() == Placed(namespace)
    os.kill(pid, signal.SIGKILL)
    _remove(node.root / POD / "first")
    assert node.place() == Placed(namespace)
    node.run(f"{POD}/second", netns_path=namespace)
    assert node.place() == Placed(namespace)
    assert isinstance(node.place(pod(uid=STATIC_UID)), NotPlaced)


def test_a_pod_that_ended_is_not_kept_by_the_name_of_its_namespace(
    node: Node, new_namespace: Callable[[], str]
) -> None:
    namespace = new_namespace()
    give_address(namespace)
    pid = node.run(f"{POD}/only", netns_path=namespace)
    assert node.place() == Placed(namespace)
    os.kill(pid, signal.SIGKILL)
    _remove(node.root / POD / "only")
    _remove(node.root / POD)
    assert isinstance(node.place(), NotPlaced)


def test_a_number_that_is_another_processs_by_now_leads_nowhere(node: Node) -> None:
    pid = node.run(f"{POD}/{SANDBOX}", "unshare", "--net")
    give_address(path_of(pid))
    assert node.place() == Placed(path_of(pid))
    # As after a reuse: the process is there, in the same namespace, and in none of the pod's cgroups.
    node.move(pid, "elsewhere")
    _remove(node.root / POD / SANDBOX)
    assert isinstance(node.place(), NotPlaced)


def test_what_a_cni_call_has_told_comes_first_while_it_is_there(
    node: Node, new_namespace: Callable[[], str]
) -> None:
    pid = node.run(f"{POD}/{SANDBOX}", "unshare", "--net")
    give_address(path_of(pid))
    told = new_namespace()
    node.attachments[UID] = told
    assert node.place() == Placed(told)
    node.attachments[UID] = "/run/netns/tg-is-not-there"
    assert node.place() == Placed(path_of(pid))


def test_a_pod_with_very_many_processes_and_cgroups_is_found_by_its_sandbox(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "_MAX_PROCESSES", 4)
    monkeypatch.setattr(placing, "_MAX_OF_CGROUP", 2)
    monkeypatch.setattr(placing, "_MAX_CGROUPS", 8)
    sandbox = node.run(f"{POD}/1-{SANDBOX}", "unshare", "--net")
    give_address(path_of(sandbox))
    for _ in range(6):
        node.run(f"{POD}/0-application", "unshare", "--net")
    for number in range(20):
        (node.root / POD / f"0-application/{number}").mkdir()
    assert node.place() == Placed(path_of(sandbox))


def test_processes_that_cannot_be_seen_are_told_with_what_the_agent_lacks(tmp_path: Path) -> None:
    cgroup = tmp_path / POD / SANDBOX
    cgroup.mkdir(parents=True)
    # What the kernel shows for processes of another PID namespace.
    (cgroup / "cgroup.procs").write_text("0\n0\n")
    found = Places(tmp_path, lambda *_: None).place(pod())
    assert isinstance(found, NotPlaced)
    assert "hostPID" in found.why


def run_in_user_namespace(node: Node) -> int:
    """A sandbox as of a pod with hostUsers: false: 65536 users of its own, from 100000 on."""
    needs_user_namespaces()
    pid = node.run(f"{POD}/{SANDBOX}", "unshare", "--user", "--net")
    for kind in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{kind}").write_text("0 100000 65536")
    return pid


def test_a_pod_in_a_user_namespace_is_found_and_its_sidecar_is_told_by_its_uid_there(
    node: Node, new_namespace: Callable[[], str]
) -> None:
    pid = run_in_user_namespace(node)
    assert Path(f"/proc/{pid}/ns/user").readlink() != Path("/proc/self/ns/user").readlink()
    inside, outside = path_of(pid), new_namespace()
    links.create_veth(inside, "eth0", outside, "host0")
    for where, interface, address in ((inside, "eth0", ADDRESS), (outside, "host0", "10.42.1.1")):
        links.add_address(where, interface, f"{address}/24")
        links.set_up(where, interface)
    links.set_up(inside, "lo")
    assert node.place() == Placed(inside)
    engine = Engine(BackendChoice.NFTABLES)
    engine.apply(inside, DEFAULT)
    assert not engine.check(inside, DEFAULT)
    with serving(inside, "sidecar", [15001]), serving(outside, "peer", [80]):
        assert landing(inside, "10.42.1.1", 80, uid=100000).server == "sidecar"
        assert landing(inside, "10.42.1.1", 80, uid=100000 + DEFAULT_PROXY_UID).server == "peer"
        # Nobody in there can be this user.
        assert landing(inside, "10.42.1.1", 80, uid=DEFAULT_PROXY_UID).server == "sidecar"
    engine.remove(inside)


def test_the_legacy_tables_cannot_tell_a_sidecar_in_a_user_namespace_and_are_refused(
    node: Node,
) -> None:
    # The kernel takes an owner match only from the user namespace of the network namespace (xt_owner.c, owner_check).
    pid = run_in_user_namespace(node)
    engine = Engine(BackendChoice.IPTABLES)
    with pytest.raises(KernelError, match="cannot change the legacy table") as refused:
        engine.apply(path_of(pid), DEFAULT)
    assert "(a pod with hostUsers: false); expected a kernel with nf_tables" in str(refused.value)
    assert engine.current(path_of(pid)) is None
