"""From where an agent observes a workload: the end of its interface that the workload cannot reach, where it may."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, landing, serving

from tidegate.lab import mounts
from tidegate.model import Direction, Workload
from tidegate.node import observation as observation_module
from tidegate.node.config import AgentConfig
from tidegate.node.observation import Observation
from tidegate.observe.classifier import Side

PORT = 8080


@pytest.fixture
def observation() -> Iterator[Observation]:
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    mounts.mount_bpffs(directory / "bpf")
    config = AgentConfig(
        node="n1",
        server="unix:///nowhere",
        run_dir=directory,
        state_dir=directory,
        bpffs=directory / "bpf" / "agent",
        trust_domain="mesh.consul",
    )
    made = Observation(config)
    try:
        yield made
    finally:
        made.close()
        mounts.unmount_below(directory)
        shutil.rmtree(directory)


def workload(pair: Pair) -> Workload:
    return Workload(id=pair.pod, name="api", service="api", node="n1", netns=pair.pod, port=PORT)


@pytest.mark.parametrize("where", [Side.HOST, Side.INSIDE])
def test_an_agent_in_a_pod_observes_others_from_the_machine_where_it_may(
    observation: Observation, pair: Pair, monkeypatch: pytest.MonkeyPatch, where: Side
) -> None:
    machine = pair.peer if where is Side.HOST else "/nonexistent"
    monkeypatch.setattr(observation_module, "MACHINE_NETNS", machine)
    api = workload(pair)
    observation.attach(api)
    assert observation.problem(api) == ""
    observation.look([api])
    (attachment,) = observation._attachments.values()
    assert attachment.side is where
    since = observation.observed_since(api)
    with serving(pair.pod, "api", [PORT]):
        landing(pair.peer, pair.pod_ipv4, PORT)
    edges = observation._classifier.edges()
    assert {(one.key.direction, one.key.peer, one.key.port) for one in edges} == {
        (Direction.INBOUND, pair.peer_ipv4, PORT)
    }
    assert sum(one.count.connections for one in edges) == 1
    observation.attach(msgspec.structs.replace(api, port=1))
    assert observation.observed_since(api) == since, "a new description begins nothing anew"
    observation.detach(api.key)
    observation.look([])
    assert observation._attachments == {}
