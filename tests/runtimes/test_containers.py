"""Containers of real runtimes whose network is made by a chain of bridge, portmap and tidegate's plugin."""

from collections.abc import Iterator

import images
import pytest
from containers import Podman, Runtime, configure
from namespaces import landing
from nodeagents import Agent, intent_server
from nodes import Node, until
from plugins import FREEZER, MESHED, install
from worlds import ADDRESS, NODE_ADDRESS, PORT, Wire, World

from tidegate.kernel import links

CALL = f"nc -w 3 {ADDRESS} {PORT} </dev/null"
"""What a container does first: it calls the world."""
SIDECAR = (
    "nc -ll -p 15001 -e echo outbound-listener 15001 0.0.0.0 0 0.0.0.0 & "
    "nc -ll -p 20000 -e echo inbound-listener 20000 0.0.0.0 0 0.0.0.0 & wait"
)
"""Proxies that greet as namespaces.Landing has it."""


@pytest.fixture
def agent(node: Node) -> Iterator[Agent]:
    """With the plugin at the end of the chain; containers are redirected to a sidecar of their own."""
    install(node)
    with intent_server(node), Agent(node, cni={}).running() as made:
        configure(node, MESHED)
        yield made


def test_without_the_plugin_a_container_reaches_the_world(
    node: Node, outside: World, runtime: Runtime
) -> None:
    """What the absence of traffic in the other tests is compared with."""
    with Wire(node) as wire:
        ended = runtime.run("plain", CALL)
    assert ended.code == 0, ended
    assert ended.out.startswith("world 8080"), ended
    assert [where[1:] for where in wire.begun_by_pods()] == [(ADDRESS, PORT)]


def test_a_container_is_redirected_from_its_first_packet(
    node: Node, outside: World, agent: Agent, runtime: Runtime
) -> None:
    configure(node, MESHED, FREEZER)
    with Wire(node) as wire:
        ended = runtime.run("first", CALL)
    assert "refused" in ended.out + ended.complaint, ended
    assert "world" not in ended.out, ended
    assert wire.begun_by_pods() == []


def test_a_containers_connections_pass_the_sidecar_beside_it_both_ways(
    node: Node, outside: World, agent: Agent, runtime: Runtime
) -> None:
    assert runtime.start("app", "nc -ll -p 8080 -e echo application 8080 0 0 0").code == 0
    assert runtime.start("proxy", as_proxy(SIDECAR), beside="app").code == 0
    pod = f"/proc/{runtime.pid('app')}/ns/net"
    (address,) = (one for one in links.addresses(pod, "eth0") if "." in one)

    out = runtime.run("call", f"until {CALL}; do sleep 0.1; done", beside="app").out
    assert out.startswith("outbound-listener"), out
    own = runtime.run("own", as_proxy(CALL), beside="app").out
    assert own.startswith("world"), own
    assert landing(outside.netns, address, PORT).server == "inbound-listener"
    for name in ("proxy", "app"):
        runtime.remove(name)


def test_a_published_port_leads_to_the_sidecar(
    node: Node, outside: World, agent: Agent, archive: object
) -> None:
    """portmap comes before tidegate's plugin in the chain, and translates in the node's namespace."""
    with Podman(node, archive).running() as podman:
        published = {8081: PORT}
        assert podman.start("app", "sleep 1000", ports=published).code == 0
        assert podman.start("proxy", as_proxy(SIDECAR), beside="app").code == 0
        until(lambda: _listens(podman, "app", 20000), "the sidecar listens")
        assert landing(outside.netns, NODE_ADDRESS, 8081).server == "inbound-listener"
        podman.remove("proxy")
        podman.remove("app")


def test_nothing_is_left_of_a_container_that_was_removed(
    node: Node, agent: Agent, runtime: Runtime
) -> None:
    """Also where the runtime never says DEL, as `ctr` does not for what it has left alone."""
    assert runtime.start("app", "sleep 1000").code == 0
    until(lambda: len(agent.workloads()) == 1, "the agent has the container")
    assert [one["redirect"] for one in agent.workloads().values()] == ["ok"]
    runtime.remove("app")
    until(lambda: agent.workloads() == {}, "the agent has forgotten it", agent.last_words)
    records = node.path("/run/tidegate/attachments")
    until(lambda: [*records.iterdir()] == [], "no record is left")


def test_a_container_that_runs_to_its_end_leaves_nothing(
    node: Node, agent: Agent, runtime: Runtime
) -> None:
    """containerd calls DEL without the path of a namespace then."""
    assert runtime.run("short", "true").code == 0
    until(lambda: agent.workloads() == {}, "the agent has forgotten it")
    assert [*node.path("/run/tidegate/attachments").iterdir()] == []


def as_proxy(script: str) -> str:
    """The script, run by the user whose connections are not redirected."""
    return f"su {images.SIDECAR} -c '{script}'"


def _listens(runtime: Runtime, name: str, port: int) -> bool:
    table = f"/proc/{runtime.pid(name)}/net/tcp6"
    with open(table) as lines:  # noqa: PTH123
        return any(f":{port:04X} " in line for line in lines)
