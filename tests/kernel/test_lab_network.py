"""The lab's network and life: everybody reaches everybody, nothing else is touched, nothing is left."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil
import pytest
from namespaces import namespace

from tidegate.errors import InputError
from tidegate.kernel import netns
from tidegate.lab import control, mounts, network, processes, runtime, state
from tidegate.lab.runtime import Part
from tidegate.lab.spec import OUTSIDE, ConfigText, LabSpec, PodSpec
from tidegate.lab.state import LabBusyError, LabError, LabPaths
from tidegate.model import Workload

NETWORK = Part(0)
PORT = 7000
DEADLINE_S = 20.0


def small(name: str) -> LabSpec:
    return LabSpec(
        name=name,
        nodes=("n1", "n2"),
        pods=(
            PodSpec(name="a", node="n1", service="a"),
            PodSpec(name="b", node="n1", service="b"),
            PodSpec(name="c", node="n2", service="b"),
        ),
    )


@pytest.fixture
def lab() -> Iterator[Callable[[LabSpec], LabSpec]]:
    """Brings up the network of a lab; every lab is gone after the test."""
    names: set[str] = set()

    def bring_up(spec: LabSpec) -> LabSpec:
        names.add(spec.name)
        runtime.up(spec, parts=NETWORK)
        return spec

    yield bring_up
    for name in names:
        runtime.down(name)


def leftovers(name: str) -> list[str]:
    found = [*network.namespaces(name), *mounts.below(LabPaths(name).root)]
    found += [str(path) for path in state.BASE.glob(f"{name}*")]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(f"/lab/{name}/" in word for word in process.cmdline()):
                found.append(str(process))
    return found


def own_network() -> list[str]:
    return [
        subprocess.run(["ip", "-o", *what], check=True, capture_output=True, text=True).stdout
        for what in (["link"], ["address"], ["route"], ["-6", "route"])
    ]


def addresses(spec: LabSpec) -> dict[str, tuple[str, ...]]:
    layout = network.plan(spec, state.read(LabPaths(spec.name).layout, network.Layout))
    return {
        OUTSIDE: layout.outside_addresses(),
        **{node: layout.node_addresses(node) for node in spec.nodes},
        **{pod.name: layout.pod_addresses(pod.name) for pod in spec.pods},
    }


def path_of(spec: LabSpec, name: str) -> str:
    return netns.path(network.namespace(spec.name, name))


def listener() -> socket.socket:
    return socket.create_server(
        ("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
    )


def connect(address: str) -> str:
    """Connect and return the address that was connected from."""
    with socket.create_connection((address, PORT), timeout=5) as connection:
        return str(connection.getsockname()[0])


def assert_all_pairs_reach_each_other(spec: LabSpec) -> None:
    places = addresses(spec)
    with contextlib.ExitStack() as listeners:
        for name in places:
            listeners.enter_context(netns.run_in(path_of(spec, name), listener))
        for here, own in places.items():
            for there, others in places.items():
                for address in others:
                    source = netns.run_in(path_of(spec, here), connect, address)
                    expected = address if here == there else own[others.index(address)]
                    assert source == expected, f"{here} -> {there} at {address}"


def test_all_pairs_reach_each_other_over_both_families_from_their_own_addresses(lab) -> None:
    assert_all_pairs_reach_each_other(lab(small("f1")))


def test_the_machines_own_network_stays_as_it_is(lab) -> None:
    before = own_network()
    lab(small("f1"))
    assert own_network() == before
    runtime.down("f1")
    assert own_network() == before


def test_two_labs_side_by_side_do_not_touch_each_other(lab) -> None:
    lab(small("f1"))
    other = lab(small("f2"))
    assert {"f1", "f2"} <= set(runtime.labs())
    runtime.down("f1")
    assert leftovers("f1") == []
    assert_all_pairs_reach_each_other(other)


def test_up_again_changes_nothing(lab) -> None:
    spec = lab(small("f1"))
    before = [netns.identity(path_of(spec, name)) for name in addresses(spec)]
    links = subprocess.run(
        ["ip", "-n", "tg-f1-n1", "-o", "link"], check=True, capture_output=True
    ).stdout
    lab(spec)
    assert [netns.identity(path_of(spec, name)) for name in addresses(spec)] == before
    again = ["ip", "-n", "tg-f1-n1", "-o", "link"]
    assert subprocess.run(again, check=True, capture_output=True).stdout == links


def test_up_with_a_changed_file_changes_only_the_difference(lab) -> None:
    spec = lab(small("f1"))
    before = addresses(spec)
    kept = netns.identity(path_of(spec, "b"))
    changed = msgspec.structs.replace(
        spec,
        pods=(
            PodSpec(name="new", node="n1", service="new"),
            spec.pods[1],
            msgspec.structs.replace(spec.pods[2], node="n1"),
        ),
    )
    lab(changed)
    after = addresses(changed)
    assert after["b"] == before["b"]
    assert after["c"] != before["c"], "a pod on another node is another pod"
    assert netns.identity(path_of(spec, "b")) == kept
    assert network.namespace("f1", "a") not in network.namespaces("f1")
    assert_all_pairs_reach_each_other(changed)


def test_what_somebody_broke_is_repaired_by_the_next_up(lab) -> None:
    spec = lab(small("f1"))
    subprocess.run(["ip", "-n", "tg-f1-n1", "link", "del", "tgp1"], check=True)
    subprocess.run(["ip", "-n", "tg-f1-b", "-6", "route", "del", "default"], check=True)
    netns.delete("tg-f1-c")
    lab(spec)
    assert_all_pairs_reach_each_other(spec)


def test_down_twice_and_down_of_a_lab_that_never_was_are_fine(lab) -> None:
    lab(small("f1"))
    runtime.down("f1")
    assert leftovers("f1") == []
    runtime.down("f1")
    runtime.down("f3")
    assert leftovers("f1") == leftovers("f3") == []


def test_down_ends_stubborn_processes_and_mounts_also_without_a_state_file(lab) -> None:
    spec = lab(small("f1"))
    paths = LabPaths("f1")
    mounts.mount_bpffs(paths.bpf)
    mounts.mount_bpffs(paths.bpf)
    deaf = (
        "import signal, sys; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    )
    process = netns.spawn(path_of(spec, "a"), [sys.executable, "-c", deaf], stdout=-1)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    for file in paths.root.glob("*.json"):
        file.unlink()
    runtime.down("f1")
    assert process.wait(timeout=DEADLINE_S) == -9
    assert leftovers("f1") == []


KILLED_UP = """
import os, signal, sys
from tidegate.kernel import netns
from tidegate.lab import network, runtime, state
sys.path.insert(0, {directory!r})
from test_lab_network import NETWORK, small

left = {calls}

def deadly(owner, name):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)

for owner, name in (
    (netns, "create"), (netns, "_unshare_and_bind"), (state, "write_bytes"),
    *((network.Door, name) for name in ("sysctls", "up", "addresses", "route", "ensure_veth")),
):
    deadly(owner, name)
runtime.up(small("f1"), parts=NETWORK)
"""


def killed_up(calls: int) -> None:
    """An `up` that is killed right before its n-th change."""
    code = KILLED_UP.format(directory=str(Path(__file__).parent), calls=calls)
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -9


@pytest.mark.parametrize("calls", [1, 2, 7, 12, 20, 33, 50])
def test_nothing_is_left_after_an_up_that_was_killed(calls: int) -> None:
    try:
        killed_up(calls)
    finally:
        runtime.down("f1")
    assert leftovers("f1") == []


@pytest.mark.parametrize("calls", [2, 20, 50])
def test_an_up_that_was_killed_is_finished_by_the_next(lab, calls: int) -> None:
    try:
        killed_up(calls)
    finally:
        spec = lab(small("f1"))
    assert_all_pairs_reach_each_other(spec)


def test_an_up_that_fails_takes_down_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> str:
        raise LabError("no hosts today")

    monkeypatch.setattr(runtime, "_hosts", fail)
    with pytest.raises(LabError, match="no hosts today"):
        runtime.up(small("f1"), parts=NETWORK)
    assert leftovers("f1") == []


def test_a_change_that_fails_leaves_the_lab_that_was_up(lab, monkeypatch) -> None:
    spec = lab(small("f1"))

    def fail(*args: object) -> str:
        raise LabError("no hosts today")

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_hosts", fail)
        with pytest.raises(LabError, match="no hosts today"):
            lab(spec)
    assert_all_pairs_reach_each_other(spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": (ConfigText(source="lab.yaml: config[0]", text='Kind = "mash"'),)}, "mash"),
        (
            {
                "pods": (
                    PodSpec(
                        name="a",
                        node="n1",
                        service="a",
                        annotations={
                            "consul.hashicorp.com/transparent-proxy-exclude-outbound-ports": "x"
                        },
                    ),
                )
            },
            "pod a: consul.hashicorp.com/transparent-proxy-exclude-outbound-ports",
        ),
    ],
    ids=["config entry", "annotation"],
)
def test_wrong_entries_and_annotations_are_refused_before_anything_is_made(
    change: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        runtime.up(msgspec.structs.replace(small("f1"), **change))
    assert leftovers("f1") == []


def test_a_lab_that_is_being_changed_refuses_other_changes() -> None:
    paths = LabPaths("f1")
    with state.locked(paths):
        for change in (lambda: runtime.down("f1"), lambda: runtime.up(small("f1"), parts=NETWORK)):
            with pytest.raises(LabBusyError, match="lab f1 is being changed"):
                change()
    assert leftovers("f1") == []


def run_exec(*argv: str, stdin: str = "", where: str = "a") -> "subprocess.CompletedProcess[str]":
    code = "import sys; from tidegate.lab import runtime; runtime.exec_in('f1', *sys.argv[1:2], sys.argv[2:])"
    return subprocess.run(
        [sys.executable, "-c", code, where, *argv],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


def test_a_command_in_a_pod_sees_its_network_and_the_labs_names(lab) -> None:
    spec = lab(small("f1"))
    places = addresses(spec)
    found = run_exec("getent", "ahosts", "c").stdout
    assert {line.split()[0] for line in found.splitlines()} == set(places["c"])
    found = run_exec("getent", "ahosts", "b").stdout
    assert {line.split()[0] for line in found.splitlines()} == {*places["b"], *places["c"]}
    own = run_exec("ip", "-o", "address", where="n2").stdout
    assert places["n2"][0] in own
    assert "127.0.0.1" in Path("/etc/hosts").read_text(), "the machine keeps its own"
    assert places["c"][0] not in Path("/etc/hosts").read_text()


def test_a_command_in_a_pod_keeps_its_input_output_and_exit_code(lab) -> None:
    lab(small("f1"))
    done = run_exec("sh", "-c", "cat; echo oops >&2; exit 7", stdin="hello")
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello", "oops\n")
    assert "no pod or node nobody" in run_exec("true", where="nobody").stderr
    assert "cannot run /no/such: No such file" in run_exec("/no/such").stderr


def test_a_command_that_still_runs_does_not_outlive_its_lab(lab) -> None:
    lab(small("f1"))
    code = "from tidegate.lab import runtime; runtime.exec_in('f1', 'a', ['sleep', '1000'])"
    command = subprocess.Popen([sys.executable, "-c", code])
    inside = network.namespace("f1", "a")
    wait_for(lambda: command.pid in netns.pids(netns.path(inside)))
    runtime.down("f1")
    assert command.wait(timeout=DEADLINE_S) != 0
    assert leftovers("f1") == []


def test_a_reused_pid_is_never_taken_for_the_labs_process(lab) -> None:
    lab(small("f1"))
    paths = LabPaths("f1")
    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        record = state.ProcessRecord(pid=stranger.pid, started_ticks=1, digest="")
        state.write(paths.process("app-a"), record)
        assert not processes.alive(record)
        processes.stop(paths, "app-a")
        runtime.down("f1")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_onboarding_changes_the_workloads_file_and_nothing_else(lab) -> None:
    spec = lab(small("f1"))
    paths = LabPaths("f1")
    control.write_workloads(paths, spec, state.read(paths.layout, network.Layout))
    file = paths.workload("n1", "a")
    before = state.read(file, Workload)
    other = paths.workload("n1", "b").stat().st_ino
    assert before.addresses == addresses(spec)["a"]
    runtime.onboard("f1", ["a"])
    after = state.read(file, Workload)
    assert after == msgspec.structs.replace(before, meshed=True)
    assert paths.workload("n1", "b").stat().st_ino == other
    assert state.read_spec(paths).pod("a").mesh
    with pytest.raises(InputError, match="no pod nobody"):
        runtime.onboard("f1", ["nobody"])


def test_a_pod_that_was_made_anew_is_another_workload(lab) -> None:
    spec = lab(small("f1"))
    paths = LabPaths("f1")
    layout = state.read(paths.layout, network.Layout)
    control.write_workloads(paths, spec, layout)
    before = state.read(paths.workload("n1", "a"), Workload)
    netns.delete("tg-f1-a")
    lab(spec)
    control.write_workloads(paths, spec, layout)
    assert state.read(paths.workload("n1", "a"), Workload).id != before.id


def test_only_the_way_to_the_sidecars_is_open_to_others_and_nobody_else_may_list_it(lab) -> None:
    lab(small("f1"))
    paths = LabPaths("f1")
    way = {paths.root, paths.nodes, paths.node("n1"), paths.agent_run("n1")}
    assert {path.stat().st_mode & 0o777 for path in way} == {0o711}
    rest = {*paths.root.iterdir(), *paths.node("n1").iterdir()} - way
    assert {path.stat().st_mode & 0o077 for path in rest} == {0}


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_nothing_of_a_lab_is_inherited_by_the_processes_it_starts(lab) -> None:
    spec = lab(small("f1"))
    paths = LabPaths("f1")
    with state.locked(paths):
        record = processes.start(paths, "x", "tg-f1-a", ["sleep", "1000"], "")
    expected = sorted([os.devnull, *[str(paths.log("x"))] * 2])

    def has_those() -> bool:
        """Not at once: it opens and closes files of its own while it begins."""
        try:
            files = [str(file.readlink()) for file in Path(f"/proc/{record.pid}/fd").iterdir()]
        except FileNotFoundError:
            return False
        return sorted(files) == expected

    wait_for(has_those)
    assert processes.alive(record)
    assert record.pid in netns.pids(path_of(spec, "a"))


def test_a_namespace_that_goes_while_it_is_deleted_is_deleted_and_not_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"tg-gone-{os.getpid()}"
    monkeypatch.setattr(network, "_is_namespace", lambda _name: True)
    network.delete(name)
    assert name not in netns.names()
    with pytest.raises(FileNotFoundError):
        network.Door(netns.path(name))
    assert name not in netns.names()


def test_a_door_opens_on_a_machine_that_is_too_busy_to_start_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As long as pyroute2 waits for a child that opens the socket.
    monkeypatch.setattr("pyroute2.config.default_create_socket_timeout", 0)
    with namespace() as path, network.Door(path) as door:
        door.up("lo")
        assert door._link("lo") is not None


def test_an_interface_that_goes_while_it_is_looked_at_has_no_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with namespace() as path, network.Door(path) as door:
        gone = dict(door._link("lo"), index=12345)
        monkeypatch.setattr(door, "_link", lambda _name: gone)
        assert door.global_addresses("eth0") == set()


def test_a_directory_is_removed_while_parts_of_it_go_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab" / "nodes").mkdir(parents=True)
    rmtree, tried = shutil.rmtree, []

    def interrupted(directory: Path) -> None:
        tried.append(directory)
        if len(tried) == 1:
            raise FileNotFoundError
        rmtree(directory)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    for _ in range(2):
        runtime._remove_tree(tmp_path / "lab")
        assert not (tmp_path / "lab").exists()


def test_a_link_that_goes_with_its_peer_while_it_is_deleted_is_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ExitStack() as made:
        paths = [made.enter_context(namespace()) for _ in range(2)]
        mine, other = (made.enter_context(network.Door(path)) for path in paths)
        mine.ensure_veth("tg-a", other, "tg-b")
        seen = mine._link("tg-a")
        other.delete_link("tg-b")
        monkeypatch.setattr(mine, "_link", lambda _: seen)
        mine.delete_link("tg-a")
        monkeypatch.undo()
        assert mine._link("tg-a") is None
