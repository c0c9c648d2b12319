"""`tidegate uninstall`: the node is as it was, whatever has become of the agent and of its workloads."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest
from agents import Node, node_in_a_directory
from namespaces import DEADLINE_S, landing, namespace, pair_of, serving

from tidegate.catalog.client import CatalogClient
from tidegate.catalog.registration import NodeInfo
from tidegate.catalog.server import ServerConfig, running
from tidegate.cli import uninstall as command
from tidegate.cli.main import main
from tidegate.enforce.redirect import block
from tidegate.enforce.redirect.engine import Engine
from tidegate.intent.policy import DEFAULT
from tidegate.kernel import netns, tc
from tidegate.kernel.bpf import Link
from tidegate.kernel.errors import KernelError
from tidegate.model import Instance, Workload
from tidegate.node import cni_install, holding, uninstall
from tidegate.node.config import load_config
from tidegate.node.memory import Memory, MemoryFile
from tidegate.observe.classifier import Classifier, Side
from tidegate.observe.hold import By
from tidegate.workloads.attachments import Attachment, Attachments
from tidegate.workloads.cni import AttachmentKey
from tidegate.workloads.source import Description, Origin

CHAIN = {
    "cniVersion": "1.0.0",
    "name": "net",
    "plugins": [{"type": "bridge"}, {"type": "portmap"}],
}


class Installed(Node):
    """A node that tidegate is to be removed from."""

    def __init__(self, directory):
        super().__init__(directory)
        for name in ("net.d", "bin"):
            (directory / name).mkdir()

    def redirect(self, name, pair):
        """A workload as an agent leaves it that was killed and whose sidecar has ended."""
        Engine().apply(pair.pod, DEFAULT)
        workload = Workload(id=name, name=name, service=name, node="n1", netns=pair.pod)
        memory = Memory(workload=workload, policy=DEFAULT, redirected_in=netns.identity(pair.pod))
        MemoryFile(self.directory / "run" / "sidecars" / name).keep(memory)

    def uninstall(self, *options):
        """Exit code and lines of what is printed."""
        argv = ["uninstall", "--config", str(self.directory / "agent.yaml")]
        argv += [
            "--conf-dir",
            str(self.directory / "net.d"),
            "--bin-dir",
            str(self.directory / "bin"),
        ]
        code = main([*argv, *options])
        printed = self.capsys.readouterr()
        return code, (printed.out or printed.err).splitlines()

    def files(self):
        """Every file and directory but those of the test itself, with the content of what is not tidegate's."""
        ignored = ("agent.yaml", "agent.log", "server")
        return {
            str(path.relative_to(self.directory)): path.read_bytes()
            if path.suffix in (".json", ".conflist")
            else b""
            for path in sorted(self.directory.rglob("*"))
            if path.relative_to(self.directory).parts[0] not in ignored
        }

    def links(self):
        """The classifier's links, opened: whether they still hold anything can be asked when their pins are gone."""
        return [
            Link.open_pinned(pin)
            for pin in (self.directory / "bpf" / "agent" / "classifier" / "links").glob("*/*")
            if pin.name != "clsact"
        ]


@pytest.fixture
def node(capsys):
    with node_in_a_directory(Installed) as node:
        node.capsys = capsys
        yield node


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with few network namespaces: those of other tests are none of its. Add paths to what is returned."""
    paths = []

    def everywhere():
        own = {}
        for path in paths:
            with contextlib.suppress(Exception):
                own[netns.identity(path)] = path
        return own

    monkeypatch.setattr(uninstall.netns, "everywhere", everywhere)
    return paths


@pytest.fixture
def pods(machine):
    """Two pods, without what agents leave running in them."""
    with pair_of() as one, pair_of() as other:
        machine += [one.pod, other.pod]
        try:
            yield one, other
        finally:
            for pod in (one.pod, other.pod):
                if Path(pod).exists():
                    for pid in netns.pids(pod):
                        os.kill(pid, signal.SIGKILL)


def looks(*namespaces):
    """What people would look at in a namespace."""
    commands = (
        ["nft", "list", "ruleset"],
        ["iptables-legacy-save"],
        ["ip6tables-legacy-save"],
        ["ipset", "list"],
        ["ip", "rule"],
        ["ip", "-6", "rule"],
        ["ip", "route", "show", "table", "all"],
        ["ip", "-details", "link"],
        ["grep", "--recursive", "--no-messages", "", "/proc/sys/net"],
        ["tc", "qdisc"],
        ["tc", "filter", "show", "dev", "eth0", "ingress"],
        ["ss", "-Htnl"],
    )
    return {
        (path, *command): told(path, command) for path in namespaces for command in commands
    } | {(path, "pids"): netns.pids(path) for path in namespaces}


def told(path, command):
    with netns.spawn(path, command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        text = process.communicate()[0].decode()
    lines = re.sub(r"packets \d+ bytes \d+", "", text).splitlines()
    # Legacy tables that are empty are there as soon as anybody has looked at them.
    passing = ("#", ":", "*", "COMMIT", "/proc/sys/net/netfilter/nf_conntrack_count")
    return [line for line in lines if not line.startswith(passing)]


def reaches(pair):
    """Whether the peer reaches the application itself."""
    try:
        return landing(pair.peer, pair.pod_ipv4, 8080).port == 8080
    except OSError:
        return False


def test_a_node_is_as_it_was_after_its_agent_was_killed(node, pods, monkeypatch, tmp_path):
    meshed, observed = pods
    chain = node.directory / "net.d" / "10-net.conflist"
    chain.write_text(json.dumps(CHAIN))
    plugin = tmp_path / "plugin"
    plugin.write_bytes(b"the plugin")
    monkeypatch.setattr(cni_install, "packaged_plugin", lambda: plugin)
    node.put("web", meshed)
    node.put("job", observed, meshed=False)
    with serving(meshed.pod, "web", [8080]):
        everywhere = (meshed.pod, meshed.peer, observed.pod, observed.peer)
        files, found = node.files(), looks(*everywhere)
        assert reaches(meshed)
        node.start()
        cni_install.install(
            cni_install.Settings(conf_dir=node.directory / "net.d", bin_dir=node.directory / "bin")
        )
        assert not reaches(meshed)
        links = node.links()
        assert len(links) == 4
        node.kill()

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "remove", refuse)
            code, lines = node.uninstall("--purge")
        assert code == 1
        what = f"the redirection in the network namespace {meshed.pod} (web)"
        assert f"not removed: {what}: the kernel has no time" in lines
        assert Engine().current(meshed.pod)
        assert netns.pids(meshed.pod), "the rules have no sidecar that they lead to"
        assert not (node.directory / "bpf" / "agent").exists()

        code, lines = node.uninstall("--purge")
        assert code == 0, lines
        assert {line.split(":")[0] for line in lines} == {"removed"}
        assert reaches(meshed)
        assert looks(*everywhere) == found
        assert node.files() == files
        for link in links:
            with link:
                assert not link.interface(), "a program still sees packets"

        assert node.uninstall("--purge") == (0, ["nothing of tidegate is here"])


def refuse(_engine, _path):
    raise KernelError("the kernel has no time")


def test_while_the_agent_runs_it_is_refused_and_with_stop_it_ends(node, pods):
    pod, _ = pods
    node.put("web", pod)
    node.start()
    files, found = node.files().keys(), looks(pod.pod)

    code, lines = node.uninstall("--dry-run")
    assert code == 0
    assert lines[0] == f"the agent (process {node.agent.pid}) runs: --stop would end it"
    assert f"would go: the redirection in the network namespace {pod.pod} (web)" in lines
    assert any(": what is known of web, and the sidecar" in line for line in lines)
    assert any(line.startswith("would go: the classifier's programs") for line in lines)

    code, lines = node.uninstall()
    who = f"the agent (process {node.agent.pid})"
    assert (code, lines) == (
        2,
        [f"tidegate: {who} runs; stop its service, or let --stop end it"],
    )
    assert node.status() is not None
    assert (node.files().keys(), looks(pod.pod)) == (files, found)

    code, lines = node.uninstall("--stop")
    assert code == 0, lines
    assert node.agent.wait(DEADLINE_S) == 0
    assert not Engine().current(pod.pod)
    assert not netns.pids(pod.pod)
    state = node.directory / "state"
    assert lines[-1] == f"stays: {state}: the ledger, and what was last known (--purge removes it)"
    assert (state / "ledger.sqlite").exists()


def test_workloads_that_are_gone_leave_nothing_behind(node):
    files = node.files()
    node.configure()
    with pair_of() as pod:
        node.redirect("web", pod)
    assert node.uninstall()[0] == 0
    assert node.files() == files


def test_a_namespace_that_has_lost_its_path_and_lives_on_is_found(node, machine):
    node.configure()
    with pair_of() as pod, netns.opened(pod.pod) as still:
        path = f"/proc/self/fd/{still}"
        machine.append(path)
        node.redirect("web", pod)
        netns.delete(Path(pod.pod).name)
        code, lines = node.uninstall()
        assert code == 0, lines
        assert f"removed: the redirection in the network namespace {path} (web)" in lines
        assert not Engine().current(path)


def test_another_namespace_at_a_workloads_path_is_not_its(node, machine):
    node.configure()
    with pair_of() as pod:
        node.redirect("web", pod)
        netns.delete(Path(pod.pod).name)
        netns.create(Path(pod.pod).name)
        machine.append(pod.pod)
        Engine().apply(pod.pod, DEFAULT)
        code, lines = node.uninstall()
        assert code == 1
        assert lines[-1].startswith(f"left: the redirection in the network namespace {pod.pod},")
        assert Engine().current(pod.pod)


def test_a_path_that_leads_elsewhere_by_the_time_of_removal_is_left_alone(node, pods):
    pod, other = pods
    node.configure()
    node.redirect("web", pod)
    Engine().apply(other.pod, DEFAULT)
    places = uninstall.Places.of(load_config(node.directory / "agent.yaml"))
    (web,) = [
        one
        for one in uninstall.find(places, uninstall.Options()).remnants
        if one.what.startswith("the redirection")
    ]
    name = Path(pod.pod).name
    netns.delete(name)
    Path(pod.pod).symlink_to(other.pod)
    try:
        with pytest.raises(KernelError, match="another network namespace has come to"):
            web.remove()
        assert Engine().current(other.pod)
    finally:
        Path(pod.pod).unlink()


def test_a_block_goes_too(node, pods):
    pod, _ = pods
    node.configure()
    node.put("web", pod)
    block.block(pod.pod)
    assert node.uninstall()[0] == 0
    assert not block.is_blocked(pod.pod)


def test_a_container_that_cni_attached_is_known(node, pods):
    pod, _ = pods
    node.configure()
    Attachments(node.directory / "run" / "attachments").put(
        Attachment(
            key=AttachmentKey("net", "c1", "eth0"),
            place=netns.identity(pod.pod),
            description=Description(origin=Origin.CNI, netns=pod.pod, id="c1", name="web-x"),
        )
    )
    Engine().apply(pod.pod, DEFAULT)
    code, lines = node.uninstall()
    assert code == 0, lines
    assert f"removed: the redirection in the network namespace {pod.pod} (web-x)" in lines
    assert not (node.directory / "run").exists()


def test_what_somebody_else_put_into_a_namespace_stays_unless_asked_for(node, machine):
    node.configure()
    with namespace() as other:
        machine.append(other)
        Engine().apply(other, DEFAULT)
        code, lines = node.uninstall()
        assert (code, lines) == (
            1,
            [
                f"left: the redirection in the network namespace {other}, of which this agent knows nothing "
                "(--everywhere removes it)"
            ],
        )
        assert Engine().current(other)
        assert node.uninstall("--everywhere")[0] == 0
        assert not Engine().current(other)


def test_the_catalog_does_not_keep_workloads_of_a_node_that_is_gone(node):
    server = ServerConfig(**node.config.pop("embedded_server"))
    server = msgspec.structs.replace(server, state_dir=Path(server.state_dir))
    node.configure()
    (node.directory / "run").mkdir()

    async def uninstalled():
        async with running(server), CatalogClient(node.config["server"]) as catalog:
            for name in ("n1", "n2"):
                info = NodeInfo(name=name, address="10.0.0.1")
                web = Instance(id=f"web-{name}", name="web", service="web", node=name)
                await catalog.register(info, [web])
            told = await asyncio.to_thread(node.uninstall)
            living = [one.node for one in await catalog.instances() if not one.seen_until]
            return told, living

    (code, lines), living = asyncio.run(uninstalled())
    assert code == 0
    assert lines[0] == f"removed: 1 workloads of n1 in the catalog at {node.config['server']}"
    assert living == ["n2"]
    # Without the server it is said, and no failure: it may never come back.
    code, lines = node.uninstall()
    assert code == 0
    assert lines[0].startswith(f"stays: what the catalog at {node.config['server']} has of n1: ")


def test_filters_of_kernels_without_tcx_go_too(node, pods, monkeypatch):
    pod, _ = pods
    node.configure()
    pin_dir = node.directory / "bpf" / "agent"
    pin_dir.mkdir()
    found = looks(pod.pod)

    classifier = Classifier.open(pin_dir, by=(By.CLSACT,))
    try:
        ifindex = netns.run_in(pod.pod, socket.if_nametoindex, "eth0")
        netns.run_in(pod.pod, classifier.attach, 7, ifindex, Side.INSIDE, ())
        assert netns.run_in(pod.pod, tc.filters, ifindex)
    finally:
        classifier.close()
    assert node.uninstall()[0] == 0
    assert looks(pod.pod) == found
    assert not pin_dir.exists()


def test_an_agent_that_this_process_does_not_see_is_in_the_way_too(node, monkeypatch):
    node.configure()
    (node.directory / "run").mkdir()
    monkeypatch.setattr(uninstall, "running_agent", lambda _places: None)
    with holding.held_alone(node.directory / "run"):
        code, (refusal,) = node.uninstall()
    assert code == 2
    assert refusal.startswith(f"tidegate: another agent (process {os.getpid()}) uses ")


def test_without_a_configuration_the_default_places_are_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "DEFAULT_CONFIG", tmp_path / "agent.yaml")
    places = command._places(None)
    assert places.run_dir == Path("/run/tidegate")
    assert places.state_dir == Path("/var/lib/tidegate")
    assert places.bpffs == Path("/sys/fs/bpf/tidegate")
    assert Path("/run/tidegate/agent.sock") in places.sockets
