"""What `tidegate doctor` says of a node beyond its kernel: each finding once well and once not."""

import asyncio
import fcntl
import json
import os
import re
import resource
import socket
import subprocess
import threading
import time
import types
from pathlib import Path

import msgspec
import pytest
from classifying import bpffs
from namespaces import DEADLINE_S, eventually, namespace, pair_of

from tidegate.catalog.server import ServerConfig, running
from tidegate.kernel import features, netns, processes
from tidegate.kernel.bpf import AttachType, Link, Program
from tidegate.node import cni_install, inspection
from tidegate.node.config import AgentConfig
from tidegate.node.inspection import Place, State, inspect
from tidegate.observe.classifier import Classifier, Side
from tidegate.workloads.cni import CniConfig
from tidegate.workloads.kubernetes.settings import KubernetesConfig


@pytest.fixture
def config(tmp_path):
    return AgentConfig(
        node="n1",
        server="http://127.0.0.1:1",
        workloads=tmp_path,
        bpffs=tmp_path / "bpf" / "agent",
        trust_domain="mesh.consul",
    )


@pytest.fixture
def cni(tmp_path, monkeypatch):
    """Settings of a machine with a chain of its own."""
    conf_dir, bin_dir = tmp_path / "net.d", tmp_path / "bin"
    conf_dir.mkdir()
    plugin = tmp_path / "plugin"
    plugin.write_bytes(b"the plugin")
    monkeypatch.setattr(cni_install, "packaged_plugin", lambda: plugin)
    chain = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}
    (conf_dir / "10-net.conflist").write_text(json.dumps(chain))
    settings = cni_install.Settings(conf_dir=conf_dir, bin_dir=bin_dir)
    monkeypatch.setattr(inspection.cni_install, "Settings", lambda: settings)
    return settings


def found(name, config=None, agent=None, workloads=()):
    """State and sentence of each finding of one name."""
    return [
        (one.state, one.detail) for one in inspect(config, agent, workloads) if one.name == name
    ]


def one(name, *args, **kwargs):
    ((state, detail),) = found(name, *args, **kwargs)
    return state, detail


def test_whatever_is_wrong_comes_with_what_to_do(config):
    for finding in inspect(config, None, ()):
        assert bool(finding.advice) or finding.state in (State.WELL, State.UNKNOWN), finding


def test_an_agents_place_has_to_be_on_a_bpf_file_system(config, tmp_path):
    state, detail = one("BPF file system", config)
    assert (state, detail) == (
        State.WRONG,
        f"{config.bpffs} is not on a BPF file system, so the agent cannot keep its counts",
    )
    with bpffs(tmp_path / "bpf"):
        assert one("BPF file system", config)[0] is State.WELL


def test_capabilities_that_a_process_lacks_are_named_with_what_they_are_for():
    argv = ["setpriv", "--bounding-set=-sys_ptrace,-net_raw", "sleep", "60"]
    with subprocess.Popen(argv) as process:
        try:
            name = f"capabilities of the agent (process {process.pid})"
            comm = Path(f"/proc/{process.pid}/comm")
            eventually(lambda: comm.read_text() == "sleep\n")
            assert one(name, agent=process.pid) == (
                State.WRONG,
                "not in effect: CAP_NET_RAW (the legacy tables, probes), "
                "CAP_SYS_PTRACE (pods that started without the CNI plugin)",
            )
        finally:
            process.kill()
    assert one("capabilities of this command")[0] is State.WELL


def test_an_agent_with_few_descriptors_is_told():
    name = "file descriptors of the agent"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    try:
        for limit, state in ((used + 1, State.WRONG), (1024, State.NOTE), (8192, State.WELL)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
            assert found(name, agent=os.getpid())[0][0] is state, limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("limit", "state"), [(128, State.NOTE), (8192, State.WELL)])
def test_a_node_on_which_few_sidecars_can_run_is_told(limit, state, tmp_path, monkeypatch):
    setting = tmp_path / "max_user_instances"
    setting.write_text(f"{limit}\n")
    monkeypatch.setattr(inspection, "_INOTIFY_LIMIT", setting)
    assert one("inotify instances") == (
        state,
        f"a user may have {limit}, which {limit // 6} sidecars of the agent's take",
    )


def test_the_plugin_has_to_be_the_last_of_the_chain(config, cni):
    config = msgspec.structs.replace(config, cni=CniConfig())
    file = cni.conf_dir / "10-net.conflist"
    state, detail = one("CNI", config)
    assert state is State.WRONG
    assert detail.startswith(f"{file}: bridge; tidegate's plugin is missing")

    cni_install.install(cni)
    assert one("CNI", config) == (
        State.WELL,
        f"{file}: bridge > tidegate-cni; tidegate's is the last",
    )

    chain = json.loads(file.read_text())
    chain["plugins"].append({"type": "tuning"})
    file.write_text(json.dumps(chain))
    state, detail = one("CNI", config)
    assert state is State.WRONG
    assert detail.startswith(
        f"{file}: bridge > tidegate-cni > tuning; tidegate's plugin is not-last"
    )


def test_without_the_plugin_a_chain_is_well_where_nobody_asked_for_it(cni):
    file = cni.conf_dir / "10-net.conflist"
    assert one("CNI") == (State.WELL, f"{file}: bridge; tidegate is not part of it")


def test_other_programs_on_a_workloads_interface_are_named_and_ours_are_not(tmp_path):
    with pair_of() as pod, bpffs(tmp_path / "bpf"):
        place = Place("web", pod.pod)
        name = "programs on interfaces"
        assert one(name, workloads=[place]) == (State.WELL, "those of 1 workloads were looked at")
        index = netns.run_in(pod.pod, socket.if_nametoindex, "eth0")
        classifier = Classifier.open(tmp_path / "bpf" / "agent")
        try:
            netns.run_in(pod.pod, classifier.attach, 7, index, Side.INSIDE, ())
            assert one(name, workloads=[place])[0] is State.WELL

            def attach():
                with Program(features._load_sched_cls(), "theirs") as program:
                    number = program.id
                    return number, Link.attach(program, index, AttachType.TCX_INGRESS)

            number, link = netns.run_in(pod.pod, attach)
            with link:
                (first, _) = found(name, workloads=[place])
                assert first == (
                    State.NOTE,
                    f"web has others' programs on its interface: program {number} (tcx)",
                )
        finally:
            classifier.remove()


def test_a_workload_whose_namespace_went_costs_the_others_nothing():
    with namespace() as path:
        gone = Place("gone", "/run/netns/tg-nowhere")
        here = Place("here", path, interface="lo")
        states = [state for state, _ in found("programs on interfaces", workloads=[gone, here])]
        assert states == [State.UNKNOWN, State.WELL]


def test_whoever_holds_the_xtables_lock_is_named(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    assert one("xtables lock") == (State.WELL, "nobody holds it")
    with path.open("w") as lock:
        assert one("xtables lock")[0] is State.WELL
        fcntl.flock(lock, fcntl.LOCK_EX)
        state, detail = one("xtables lock")
        assert state is State.NOTE
        assert detail.startswith(f"held by {processes.named(os.getpid())}: ")
    assert one("xtables lock")[0] is State.WELL


def test_a_full_table_of_connections_is_told_by_workload(monkeypatch):
    with namespace() as path:
        place = Place("web", path)
        assert one("connection tracking", workloads=[place])[0] is State.WELL
        numbers = iter([100, 10, 80])
        monkeypatch.setattr(inspection, "_number", lambda _name: next(numbers))
        state, detail = one("connection tracking", workloads=[place])
        assert state is State.WRONG
        assert detail.startswith("of 100 entries that a namespace may have web has 80: ")


def test_without_the_directory_of_the_network_configuration_nothing_is_said_of_it(config, cni):
    config = msgspec.structs.replace(config, cni=CniConfig())
    (cni.conf_dir / "10-net.conflist").unlink()
    cni.conf_dir.rmdir()
    assert one("CNI", config) == (State.UNKNOWN, f"{cni.conf_dir} is not to be seen from here")


@pytest.fixture
def server(config, tmp_path):
    """The configuration of an agent whose intent server answers."""
    address = f"unix://{tmp_path}/server.sock"
    server = ServerConfig(state_dir=tmp_path / "server", listen=address, trust_domain="mesh.consul")
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve():
        async with running(server):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(DEADLINE_S)
    yield msgspec.structs.replace(config, server=address)
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


@pytest.mark.parametrize(("ahead_s", "words"), [(300, "ahead of"), (-300, "behind")])
def test_a_clock_that_is_not_the_intent_servers_is_told(server, monkeypatch, ahead_s, words):
    shifted = types.SimpleNamespace(time=lambda: time.time() + ahead_s)
    monkeypatch.setattr(inspection, "time", shifted)
    (told,) = [sentence for state, sentence in found("clock", server) if state is State.WRONG]
    (seconds,) = re.findall(rf"it is (\d+) s {words} the intent server's", told)
    # An answer has whole seconds.
    assert 295 <= int(seconds) <= 300


def test_a_clock_that_is_the_intent_servers_is_well(server):
    assert State.WRONG not in [state for state, _ in found("clock", server)]


def test_servers_that_do_not_answer_are_told(config):
    config = msgspec.structs.replace(
        config, kubernetes=KubernetesConfig(server="https://127.0.0.1:1")
    )
    assert one("intent server", config)[0] is State.WRONG
    assert one("Kubernetes API", config)[0] is State.WRONG


def test_what_cannot_be_looked_at_is_unknown_and_the_rest_goes_on(monkeypatch):
    def refuse():
        raise PermissionError(1, "not for you")

    monkeypatch.setattr(inspection, "_clock", refuse)
    assert one("clock")[0] is State.UNKNOWN
    assert found("control groups")


def test_a_lock_of_another_file_is_not_this_ones(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    other.touch()
    with mine.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert processes.holding(mine) == (os.getpid(),)
        assert processes.holding(tmp_path) == ()
        assert processes.holding(other) == ()
