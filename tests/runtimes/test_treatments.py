"""What becomes of the traffic of each kind of pod that a cluster has, found in place by an agent that starts."""

import kubernetes_pods as shapes
import pytest
from clusters import Cluster
from nodeagents import Agent
from nodes import Node, until
from sandboxes import Sandbox, greeted
from worlds import ADDRESS, PORT, Wire, World


def own(made: object) -> object:
    return shapes.annotated(made, tidegate_io__mesh="own")


REDIRECTED = {
    "annotated": own(shapes.pod()),
    "consul": shapes.consul(),
    "consul-native": shapes.consul(native=True),
    "debugged": shapes.debugged(shapes.consul()),
    "istio": shapes.istio(),
    "istio-native": shapes.istio(native=True),
    "initialising": own(shapes.initialising()),
    "terminating": own(shapes.terminating()),
    "unknown": own(shapes.unknown()),
    "job": own(shapes.running_job()),
    "stateful": own(shapes.stateful()),
    "user-namespaced": own(shapes.user_namespaced()),
    "linkerd-as-own": own(shapes.linkerd()),
}
OBSERVED = {
    "plain": shapes.pod(),
    "daemon": shapes.daemon_set(),
    "consul-init": shapes.consul(cni=False),
    "consul-explicit": shapes.consul_without_transparent_proxy(),
    "consul-gateway": shapes.consul_gateway(),
    "istio-init": shapes.istio(cni=False),
    "istio-gateway": shapes.istio_gateway(),
    "ambient": shapes.istio_ambient(),
    "linkerd": shapes.linkerd(),
    "linkerd-native": shapes.linkerd(native=True),
    "kuma": shapes.kuma(),
    "kept-out": shapes.annotated(shapes.consul(), tidegate_io__mesh="false"),
    "mistyped": shapes.annotated(shapes.pod(), tidegate_io__mesh="yes"),
    "no-user": shapes.annotated(shapes.user_namespaced(), tidegate_io__mesh="true"),
}
PROBLEMS = {"mistyped": "tidegate.io/mesh is 'yes'", "no-user": "hostUsers: false"}
LEFT_ALONE = {
    "node-exporter": ("host-network", shapes.host_network()),
    "etcd": ("host-network", shapes.static()),
    "backup": ("finished", own(shapes.finished_job())),
    "greedy": ("finished", own(shapes.evicted())),
}
"""Those that have no sandbox of their own."""
EXCLUDED = "kube-system"


@pytest.fixture
def sandboxes(node: Node, cluster: Cluster, outside: World) -> dict[str, Sandbox]:
    """All of them run before there is an agent."""
    made = {}
    for name, shape in {**REDIRECTED, **OBSERVED}.items():
        made[name] = Sandbox(node, name)
        made[name].make(process=True)
        cluster.runs_as(made[name], shape)
    static = Sandbox(node, "static", uid="0" * 31 + "1")
    excluded = Sandbox(node, "excluded", namespace=EXCLUDED)
    for pod, shape in ((static, shapes.static_in_its_own_network()), (excluded, shapes.pod())):
        made[pod.name] = pod
        pod.make(process=True)
        cluster.runs_as(pod, own(shape))
    for name, (_, shape) in LEFT_ALONE.items():
        cluster.runs_as(Sandbox(node, name), shape)
    return made


def test_each_kind_of_pod_is_treated_as_the_status_says(
    node: Node, cluster: Cluster, sandboxes: dict[str, Sandbox]
) -> None:
    agent = cluster.agent(enrol=["consul", "istio", "annotated"], exclude_namespaces=[EXCLUDED])
    redirected = {*REDIRECTED, "static"}
    with agent.running():
        until(lambda: _redirected(agent) == redirected, "all are redirected", agent.last_words)
        with Wire(node) as wire:
            assert {name: sandboxes[name].reaches() for name in redirected} == dict.fromkeys(
                redirected, "refused"
            )
        assert wire.begun_by_pods() == []
        for name in (*OBSERVED, "excluded"):
            assert sandboxes[name].reaches() == "world", name
        assert node.run(greeted, ADDRESS, PORT) == "world", "the node's own connections pass"

        status = agent.status()
        found = {one["name"]: one for one in status["workloads"]}
        assert found.keys() == redirected | OBSERVED.keys()
        assert {found[name]["redirect"] for name in OBSERVED} == {"none"}
        assert all(one["reason"] for one in found.values())
        left = {one["name"]: one["treatment"] for one in status["left_alone"]}
        assert left == {name: kind for name, (kind, _) in LEFT_ALONE.items()} | {
            "excluded": "excluded"
        }
        for name, words in PROBLEMS.items():
            assert any(name in one and words in one for one in status["problems"])
        assert len(status["problems"]) == len(PROBLEMS), status["problems"]
    for pod in sandboxes.values():
        pod.remove()


def _redirected(agent: Agent) -> set[str]:
    return {name for name, one in agent.workloads().items() if one["redirect"] == "ok"}
