"""From where an agent observes a workload: the end of its interface that the workload cannot reach, where it may."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, landing, serving

from tidegate.kernel import links, netns
from tidegate.lab import mounts
from tidegate.model import Direction, Workload
from tidegate.node import observation as observation_module
from tidegate.node.config import AgentConfig
from tidegate.node.observation import Observation
from tidegate.observe.classifier import Side

PORT = 8080


@pytest.fixture
def config() -> Iterator[AgentConfig]:
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    mounts.mount_bpffs(directory / "bpf")
    try:
        yield AgentConfig(
            node="n1",
            server="unix:///nowhere",
            run_dir=directory,
            state_dir=directory,
            bpffs=directory / "bpf" / "agent",
            trust_domain="mesh.consul",
        )
    finally:
        mounts.unmount_below(directory)
        shutil.rmtree(directory)


@pytest.fixture
def observation(config: AgentConfig) -> Iterator[Observation]:
    with contextlib.closing(Observation(config)) as made:
        yield made


def opened_in(place: str, config: AgentConfig) -> Observation:
    """By an agent that is in this namespace, in whose thread it observes then."""
    return netns.run_in(place, Observation, config)


def connections(observation: Observation, pair: Pair) -> int:
    """How many are counted, one more having been opened from the peer."""
    with serving(pair.pod, "api", [PORT]):
        landing(pair.peer, pair.pod_ipv4, PORT)
    return sum(one.count.connections for one in observation._classifier.edges())


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
    assert connections(observation, pair) == 1
    edges = observation._classifier.edges()
    assert {(one.key.direction, one.key.peer, one.key.port) for one in edges} == {
        (Direction.INBOUND, pair.peer_ipv4, PORT)
    }
    observation.attach(msgspec.structs.replace(api, port=1))
    assert observation.observed_since(api) == since, "a new description begins nothing anew"
    observation.detach(api.key)
    observation.look([])
    assert observation._attachments == {}


def test_an_agent_that_moves_into_a_pod_and_back_goes_on_where_the_last_one_observed(
    config: AgentConfig,
    pair: Pair,
    new_namespace: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, inside = pair.peer, new_namespace()
    monkeypatch.setattr(observation_module, "MACHINE_NETNS", machine)
    api, since = workload(pair), []
    for count, place in enumerate((machine, inside, machine), 1):
        with contextlib.closing(opened_in(place, config)) as observation:
            netns.run_in(place, observation.look, [api])
            assert observation.observed_since(api) or count == 1, "it is observed all the time"
            netns.run_in(place, observation.attach, api)
            assert observation.problem(api) == ""
            since.append(observation.observed_since(api))
            assert connections(observation, pair) == count
    assert since == [pytest.approx(since[0], abs=0.01)] * 3


def test_an_agent_that_comes_to_see_the_machine_counts_each_packet_once(
    config: AgentConfig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = workload(pair)
    for count, machine in enumerate(("/nonexistent", pair.peer), 1):
        monkeypatch.setattr(observation_module, "MACHINE_NETNS", machine)
        with contextlib.closing(Observation(config)) as observation:
            observation.attach(api)
            observation.look([api])
            (attachment,) = observation._classifier.attachments()
            assert attachment.side is (Side.INSIDE, Side.HOST)[count - 1]
            assert connections(observation, pair) == count


def test_of_a_workload_whose_interface_went_before_anybody_looked_nothing_stays(
    observation: Observation, config: AgentConfig, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observation_module, "MACHINE_NETNS", pair.peer)
    api = workload(pair)
    observation.attach(api)
    links.delete_link(pair.peer, "host0")
    observation.look([api])
    assert observation.observed_since(api) is None
    assert observation.unclaimed([api]) == ()
    (gone,) = observation.unclaimed([])
    observation.detach(gone)
    observation.look([])
    assert observation.unclaimed([]) == ()
    assert observation._classifier._entries() == []
    assert list((config.bpffs / "classifier" / "links").iterdir()) == []
