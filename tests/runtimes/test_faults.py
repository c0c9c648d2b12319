"""What breaks on a node besides its agent: it reboots, its disk is full, others write its network configuration."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import PLUGIN, Cluster
from containers import CONFLIST, Containerd, Cri, chain, configure
from nodeagents import TIDEGATE, Agent, intent_server
from nodes import REPOSITORY, Node, until
from plugins import TYPE, install
from sandboxes import Sandbox
from test_containers import CALL
from worlds import Wire, World, world

STATE = Path("/var/lib/tidegate")
MEGABYTES = 4


def test_after_a_reboot_pods_start_redirected_and_nothing_is_remembered_wrongly(
    node: Node,
) -> None:
    """/run and the namespaces are gone, and what is on the disk speaks of pods that had other ones."""
    install(node)
    with intent_server(node), Cluster(node) as cluster, world(node):
        agent = cluster.agent()
        agent.start()
        before = [cluster.start(f"web-{number}") for number in range(3)]
        assert [answer.code for _, answer in before] == [0, 0, 0]
        until(lambda: len(agent.workloads()) == 3, "the agent has the pods")
        node.crash()
    node.boot()
    with intent_server(node), Cluster(node) as cluster, world(node), Wire(node) as wire:
        # The kubelet starts the same pods, in new sandboxes, before the agent is there, and after.
        pods = [Sandbox(node, old.name, uid=old.uid) for old, _ in before]
        for pod in pods:
            cluster.bind(pod)
            pod.make(process=True)
        assert pods[0].call("ADD", PLUGIN).code
        agent = cluster.agent()
        with agent.running():
            for pod in pods:
                assert pod.call("ADD", PLUGIN).code == 0
                cluster.runs(pod)
                assert pod.reaches() == "refused"
            until(
                lambda: (
                    {one["netns"] for one in agent.workloads().values()}
                    == {pod.netns for pod in pods}
                ),
                "the agent has the new sandboxes",
                lambda: str(agent.status()),
            )
            assert [one["problem"] for one in agent.workloads().values()] == ["", "", ""]
        assert wire.begun_by_pods() == []
        for pod in pods:
            pod.remove()


def test_a_full_disk_keeps_no_pod_from_being_redirected(
    node: Node, outside: World, cluster: Cluster
) -> None:
    node.run(STATE.mkdir, exist_ok=True)
    agent = cluster.agent()
    node.do("mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", STATE)
    with Wire(node) as wire, agent.running():
        first, answer = cluster.start("first")
        assert answer.code == 0, answer
        full = node.call("dd", "if=/dev/zero", f"of={STATE}/filler", "bs=1M")
        assert "No space left" in full.stderr
        second, answer = cluster.start("second")
        assert answer.code == 0, answer
        for pod in (first, second):
            assert pod.reaches() == "refused"
        until(lambda: len(agent.workloads()) == 2, "both are in the status")
        until(
            lambda: any("full" in one or "space" in one for one in agent.status()["problems"]),
            "the disk is a problem",
            lambda: str(agent.status()["problems"]),
        )
        # An agent that begins on a full disk has its programs and rules again.
        agent.kill()
        agent.start()
        third, answer = cluster.start("third")
        assert answer.code == 0, answer
        assert {pod.reaches() for pod in (first, second, third)} == {"refused"}
        for pod in (first, second, third):
            cluster.stop(pod)
    assert wire.begun_by_pods() == []


class TestNetworkConfiguration:
    """The installer keeps the plugin in a chain that somebody else writes."""

    @pytest.fixture
    def installer(self, node: Node, outside: World, cluster: Cluster) -> Iterator[Agent]:
        """Runs, beside an agent."""
        configure(node)
        with (node.disk / "installer.log").open("ab") as log:
            process = node.spawn(
                [*TIDEGATE, "cni", "install", "--keep"], stdout=log, stderr=log, cwd=REPOSITORY
            )
        agent = cluster.agent()
        try:
            with agent.running():
                until(lambda: _chained(node), "the plugin is in the chain")
                yield agent
        finally:
            process.terminate()
            process.wait(30)

    def test_it_comes_back_when_another_plugin_writes_the_file_anew(
        self, node: Node, cluster: Cluster, installer: Agent, archive: Path
    ) -> None:
        """And what the runtime starts from then on is redirected before it runs."""
        pod = Sandbox(node, "web-0")
        cluster.bind(pod)
        with Containerd(node, archive).running(), Cri(node) as cri, Wire(node) as wire:
            node.run(CONFLIST.write_text, chain([{"type": "tuning"}]))
            until(lambda: _chained(node) == ["bridge", "portmap", "tuning", TYPE], "it is back")
            until(lambda: TYPE in cri.told(), "containerd has read it")
            sandbox, refused = cri.run_pod(pod.namespace, pod.name, pod.uid)
            assert sandbox, refused
            script = f"({CALL}) >/tmp/first 2>&1; sleep 1000"
            container = cri.run_container(sandbox, pod.namespace, pod.name, pod.uid, script)
            until(lambda: "refused" in cri.execute(container, "cat", "/tmp/first"), "it has called")
            cri.remove_pod(sandbox)
        assert wire.begun_by_pods() == []

    def test_a_pod_that_started_meanwhile_is_redirected_in_place(
        self, node: Node, cluster: Cluster, installer: Agent
    ) -> None:
        """No ADD has come for it."""
        pod = Sandbox(node, "between")
        cluster.bind(pod)
        pod.make(process=True)
        cluster.runs(pod)
        until(lambda: pod.reaches() == "refused", "it is redirected", installer.last_words)
        pod.remove()


def _chained(node: Node) -> list[str]:
    """The plugins in the chain; empty while tidegate's is not among them."""
    types = [plugin["type"] for plugin in json.loads(node.path(CONFLIST).read_text())["plugins"]]
    return types if TYPE in types else []
