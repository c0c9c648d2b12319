"""Pods of a Kubernetes node: an API server that goes, hangs or lies, and a real runtime by CRI."""

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from clusters import PLUGIN, Cluster
from containers import Containerd, Cri, configure
from nodeagents import Agent
from nodes import until
from plugins import FREEZER
from sandboxes import Sandbox
from test_containers import CALL
from worlds import Wire, World

WRONG = {"tidegate_io__mesh": "own", "tidegate_io__exclude_outbound_ports": "http"}
VISIBLE_S = 1.0


@pytest.fixture
def agent(cluster: Cluster, outside: World) -> Iterator[Agent]:
    with cluster.agent().running() as made:
        yield made


class TestTheServerIsAway:
    def test_pods_stay_redirected_and_a_new_one_waits_for_it(
        self, cluster: Cluster, agent: Agent
    ) -> None:
        old, _ = cluster.start("old")
        cluster.do(cluster.api.stop())
        new = Sandbox(cluster.node, "new")
        new.make()
        with Wire(cluster.node) as wire:
            answer = new.call("ADD", PLUGIN)
            assert answer.code
            assert "shop/new" in answer.message
            assert old.reaches() == "refused"
        assert wire.begun_by_pods() == []
        cluster.do(cluster.api.start())
        cluster.bind(new)
        until(lambda: new.call("ADD", PLUGIN).code == 0, "it starts")
        assert new.reaches() == "refused"

    def test_an_agent_that_begins_then_knows_its_pods(self, cluster: Cluster, agent: Agent) -> None:
        pods = [cluster.start(f"web-{number}")[0] for number in range(3)]
        until(lambda: len(agent.workloads()) == 3, "the agent has them")
        cluster.do(cluster.api.stop())
        agent.kill()
        agent.start()
        assert {one["redirect"] for one in agent.workloads().values()} == {"ok"}
        assert {pod.reaches() for pod in pods} == {"refused"}
        assert any("API" in problem or "api" in problem for problem in agent.status()["problems"])
        cluster.do(cluster.api.start())


def test_a_server_that_hangs_holds_up_neither_the_agent_nor_its_pods(
    cluster: Cluster, agent: Agent
) -> None:
    old, _ = cluster.start("old")
    cluster.api.held = cluster.do(_event())
    cluster.do(cluster.api.cut())
    new = Sandbox(cluster.node, "new")
    new.make()
    answer = new.call("ADD", PLUGIN)
    assert answer.code, answer
    assert "shop/new" in answer.message
    assert old.reaches() == "refused"
    round_at = agent.status()["round_at"]
    until(lambda: agent.status()["round_at"] > round_at, "rounds go on")
    cluster.do(_ring(cluster.api))
    cluster.bind(new)
    until(lambda: new.call("ADD", PLUGIN).code == 0, "it starts")


def test_a_server_that_lies_takes_no_pod_out_of_the_mesh(cluster: Cluster, agent: Agent) -> None:
    """What answers is a login page, then an API server whose database is empty."""
    pods = [cluster.start(f"web-{number}")[0] for number in range(3)]
    until(lambda: len(agent.workloads()) == 3, "the agent has them")
    cluster.api.text = "<html>please log in</html>"
    cluster.do(cluster.api.cut())
    until(lambda: agent.status()["problems"], "it is told")
    assert {pod.reaches() for pod in pods} == {"refused"}
    asked = len(cluster.api.asked("list"))
    cluster.api.text = None
    cluster.api.objects.clear()
    cluster.do(cluster.api.compact())
    cluster.do(cluster.api.cut())
    until(lambda: len(cluster.api.asked("list")) > asked, "it has listed again")
    round_at = agent.status()["round_at"]
    until(lambda: agent.status()["round_at"] > round_at + 1, "rounds go by")
    with Wire(cluster.node) as wire:
        assert {pod.reaches() for pod in pods} == {"refused"}
    assert wire.begun_by_pods() == []


def test_a_pod_that_cannot_be_redirected_is_told_by_name_within_a_second(
    cluster: Cluster, agent: Agent
) -> None:
    """The best of three: other work on the machine may hold one up."""
    took = []
    for number in range(3):
        pod = Sandbox(cluster.node, f"broken-{number}")
        pod.make(process=True)
        began = time.monotonic()
        cluster.runs(pod, **WRONG)
        until(partial(_is_told, agent, pod.name), f"{pod.name} is told", agent.last_words)
        took.append(time.monotonic() - began)
        pod.remove()
        cluster.gone(pod)
    assert min(took) < VISIBLE_S, took


def test_a_pod_that_may_not_start_is_told_by_name(cluster: Cluster, agent: Agent) -> None:
    """The annotation is wrong, and the plugin says so to the runtime."""
    _, answer = cluster.start("broken", **WRONG)
    assert answer.code
    assert "exclude-outbound-ports" in answer.message
    assert any("shop/broken" in problem for problem in agent.status()["problems"])


def test_a_pod_of_a_kubelets_runtime_is_redirected_before_its_first_container_runs(
    cluster: Cluster, agent: Agent, archive: Path
) -> None:
    """containerd says by itself which pod it is, and calls the whole chain."""
    node = cluster.node
    configure(node, PLUGIN, FREEZER)
    pod = Sandbox(node, "web-0")
    cluster.bind(pod)
    with Containerd(node, archive).running(), Cri(node) as cri, Wire(node) as wire:
        sandbox, refused = cri.run_pod(pod.namespace, pod.name, pod.uid)
        assert sandbox, refused
        script = f"({CALL}) >/tmp/first 2>&1; sleep 1000"
        container = cri.run_container(sandbox, pod.namespace, pod.name, pod.uid, script)
        until(lambda: "refused" in cri.execute(container, "cat", "/tmp/first"), "it has called")
        agent.thaw()
        cluster.runs(pod)
        until(
            lambda: _has(agent, pod.uid, redirect="ok"),
            "the agent looks after it",
            agent.last_words,
        )
        cri.remove_pod(sandbox)
        cluster.gone(pod)
        until(lambda: not _has(agent, pod.uid), "it is forgotten", agent.last_words)
    assert wire.begun_by_pods() == []


def _has(agent: Agent, uid: str, **fields: str) -> bool:
    """Whether the agent has the pod, with these fields in its status."""
    return any(one.items() >= {"id": uid, **fields}.items() for one in agent.status()["workloads"])


def _is_told(agent: Agent, name: str) -> bool:
    """In status, metrics and log."""
    in_status = any(name in one["name"] and one["problem"] for one in agent.status()["workloads"])
    in_metrics = any(name in line and "problem" in line for line in agent.metrics().splitlines())
    return in_status and in_metrics and any(name in line for line in agent.lines())


async def _event() -> asyncio.Event:
    return asyncio.Event()


async def _ring(api: object) -> None:
    api.held.set()
