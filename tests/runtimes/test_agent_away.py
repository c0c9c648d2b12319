"""What becomes of containers that start while no agent answers, or while one is killed, and when it comes back."""

import random
import threading

from clusters import Cluster
from containers import Runtime, configure
from namespaces import dial, echoes
from nodeagents import Agent, intent_server
from nodes import Node, until
from plugins import MESHED, TYPE, entry, install
from sandboxes import Answer, Sandbox
from test_containers import CALL
from worlds import ADDRESS, PORT, Wire, World

PODS = 20
OPEN = {"type": TYPE, "tidegate": {"wait_s": 0, "on_agent_absent": "open"}}
KILLS = 8


def test_without_an_agent_no_container_starts_and_the_runtime_says_why(
    node: Node, outside: World, runtime: Runtime
) -> None:
    install(node)
    configure(node, entry(mesh=True, sidecar="own", wait_s=0))
    with Wire(node) as wire:
        ended = runtime.run("early", CALL)
    assert ended.code != 0
    assert "agent" in ended.complaint, ended
    assert wire.begun_by_pods() == []


def test_without_an_agent_containers_start_unredirected_where_that_is_configured(
    node: Node, outside: World, runtime: Runtime
) -> None:
    install(node)
    configure(node, entry(mesh=True, sidecar="own", wait_s=0, on_agent_absent="open"))
    ended = runtime.run("early", CALL)
    assert ended.code == 0, ended
    assert ended.out.startswith("world"), ended


def test_pods_that_may_not_start_without_an_agent_start_when_it_is_back(
    node: Node, outside: World, cluster: Cluster
) -> None:
    with Wire(node) as wire, cluster.agent().running() as agent:
        agent.kill()
        tried = [cluster.start(f"web-{number}", process=False) for number in range(PODS)]
        assert all(answer.code and "agent" in answer.message for _, answer in tried), tried
        agent.start()
        for sandbox, _ in tried:
            answer = sandbox.call("ADD", {"type": TYPE, "tidegate": {}})
            assert answer == Answer(0, answer.out, ""), answer
            cluster.runs(sandbox)
            assert sandbox.reaches() == "refused"
        until(lambda: len(agent.workloads()) == PODS, "all are in the status", agent.last_words)
    assert wire.begun_by_pods() == []


def test_pods_that_started_without_an_agent_are_found_in_place_and_redirected_live(
    node: Node, outside: World, cluster: Cluster
) -> None:
    """Nobody has told the agent where they are but Kubernetes, and the kernel by their cgroups.

    What was open then goes on as it was, and how late they were redirected is told.
    """
    pods = []
    for number in range(PODS):
        sandbox = Sandbox(node, f"web-{number}")
        cluster.bind(sandbox)
        sandbox.make(process=True)
        assert sandbox.call("ADD", OPEN).code == 0
        cluster.runs(sandbox)
        assert sandbox.reaches() == "world"
        pods.append(sandbox)
    (before, _) = node.run(dial, pods[0].netns, ADDRESS, PORT)
    with before, cluster.agent().running() as agent:
        until(
            lambda: redirected(agent) == {pod.name for pod in pods},
            "all are redirected",
            agent.last_words,
        )
        with Wire(node) as wire:
            assert {pod.reaches() for pod in pods} == {"refused"}
            assert echoes(before)
        assert wire.begun_by_pods() == []
        reasons = [one["reason"] for one in agent.workloads().values()]
        assert all("; it had run for " in reason for reason in reasons), reasons
        logged = [line for line in agent.lines() if "redirected while it ran" in line]
        assert len(logged) == PODS, logged
        inodes = {node.run(lambda pod=pod: pod.netns) for pod in pods}
        assert {workload["netns"] for workload in agent.workloads().values()} == inodes
    for pod in pods:
        pod.remove()


def test_a_pod_whose_only_container_is_started_again_stays_redirected(
    node: Node, outside: World, cluster: Cluster
) -> None:
    """Its namespace goes on without a process, as under CRI-O, and no plugin has told of it."""
    pod = Sandbox(node, "web-0")
    cluster.bind(pod)
    pod.make(process=True)
    cluster.runs(pod)
    with cluster.agent().running() as agent, Wire(node) as wire:
        until(lambda: redirected(agent) == {"web-0"}, "it is redirected", agent.last_words)
        pod.end_process()
        round_at = agent.status()["round_at"]
        until(lambda: agent.status()["round_at"] > round_at + 2, "rounds go by")
        pod.start_process()
        assert pod.reaches() == "refused"
        assert redirected(agent) == {"web-0"}
        pod.remove()
        cluster.gone(pod)
        until(lambda: agent.workloads() == {}, "it is forgotten", agent.last_words)
    assert wire.begun_by_pods() == []


def test_an_agent_that_is_killed_during_an_add_lets_nothing_start(
    node: Node, outside: World, cluster: Cluster
) -> None:
    """It has taken the request, and has not answered yet."""
    with Wire(node) as wire, cluster.agent().running() as agent:
        agent.freeze()
        results: list[tuple[Sandbox, Answer]] = []
        starting = threading.Thread(target=lambda: results.append(cluster.start("web-0")))
        starting.start()
        until(
            lambda: node.call("sh", "-c", f"grep -l {TYPE} /proc/[0-9]*/comm").stdout,
            "the plugin runs",
        )
        agent.kill()
        starting.join()
        ((sandbox, answer),) = results
        assert answer.code, answer
        assert "agent" in answer.message, answer
        agent.start()
        assert sandbox.call("ADD", {"type": TYPE, "tidegate": {}}).code == 0
        assert sandbox.reaches() == "refused"
        sandbox.remove()
    assert wire.begun_by_pods() == []


def test_at_whatever_moment_the_agent_is_killed_what_starts_is_redirected(
    node: Node, outside: World, cluster: Cluster
) -> None:
    chance = random.Random(6)
    with Wire(node) as wire, cluster.agent().running() as agent:
        for number in range(KILLS):
            killing = threading.Timer(chance.uniform(0, 0.03), agent.kill)
            killing.start()
            sandbox, answer = cluster.start(f"web-{number}", process=False)
            killing.join()
            if answer.code:
                assert "agent" in answer.message, answer
            else:
                assert sandbox.reaches() == "refused"
            agent.start()
            assert sandbox.call("ADD", {"type": TYPE, "tidegate": {}}).code == 0
            assert sandbox.reaches() == "refused"
            cluster.stop(sandbox)
    assert wire.begun_by_pods() == []


def test_a_container_that_starts_while_agents_are_killed_is_redirected_or_does_not_start(
    node: Node, outside: World, runtime: Runtime
) -> None:
    chance = random.Random(7)
    install(node)
    with intent_server(node), Agent(node, cni={}).running() as agent, Wire(node) as wire:
        configure(node, MESHED)
        for number in range(KILLS // 2):
            killing = threading.Timer(chance.uniform(0.02, 0.3), agent.kill)
            killing.start()
            ended = runtime.run(f"victim-{number}", CALL)
            killing.join()
            assert "world" not in ended.out, ended
            agent.start()
    assert wire.begun_by_pods() == []


def redirected(agent: Agent) -> set[str]:
    """The names of the workloads that are redirected."""
    return {
        name.rpartition("/")[2]
        for name, one in agent.workloads().items()
        if one["redirect"] == "ok"
    }
