"""An agent takes over from another one under traffic: no rule is touched, and what is observed has no gap."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time

import pytest
from classifying import bpffs
from namespaces import landing, pair_of, serving

from tidegate.kernel import netns, nf_tables

DEADLINE_S = 60.0
APP, INBOUND, OUTBOUND = 8080, 20000, 15001


class Asked(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("agent")
        self._path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def until(condition, what):
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)
    return found


def answer(connection, path):
    """What is answered, None while nobody does."""
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return None
    finally:
        connection.close()


class Node:
    def __init__(self, directory, pod):
        self._directory = directory
        (directory / "workloads").mkdir()
        self.port = 0
        server = f"unix://{directory}/server.sock"
        self.socket = directory / "agent.sock"
        self._agents = []
        self._settings = {
            "node": "n1",
            "server": server,
            "embedded_server": {
                "state_dir": f"{directory}/server",
                "listen": server,
                "trust_domain": "mesh.consul",
            },
            "workloads": f"{directory}/workloads",
            "run_dir": f"{directory}/run",
            "state_dir": f"{directory}/state",
            "socket": str(self.socket),
            "bpffs": f"{directory}/bpf/agent",
            "trust_domain": "mesh.consul",
        }
        workload = {
            "id": "web-1",
            "name": "web-1",
            "service": "web",
            "node": "n1",
            "netns": pod,
            "meshed": True,
            "sidecar": "own",
            "port": APP,
        }
        (directory / "workloads" / "web.json").write_text(json.dumps(workload))

    def start(self, name, *options, metrics=False, **settings):
        file = self._directory / f"{name}.yaml"
        if metrics:
            with socket.socket() as found:
                found.bind(("127.0.0.1", 0))
                self.port = found.getsockname()[1]
            settings["metrics"] = f"127.0.0.1:{self.port}"
        file.write_text(json.dumps(self._settings | settings))
        argv = [sys.executable, "-m", "tidegate.cli.main", "agent", "run", *options]
        with self._log(name).open("wb") as log:
            agent = subprocess.Popen([*argv, f"--config={file}"], stdout=log, stderr=log)
        self._agents.append(agent)
        return agent

    def running(self):
        """The agent that runs, of which the workload is redirected and observed; another one if there is none."""
        alive = [agent for agent in self._agents if agent.poll() is None]
        agent = alive[0] if alive else self.start("running")
        until(self.observed, "the agent has taken in the workload")
        return agent

    def end(self, *agents):
        for agent in agents or self._agents:
            agent.send_signal(signal.SIGTERM)
            agent.wait(DEADLINE_S)

    def has_directories(self, agent):
        try:
            return (self._directory / "run" / "agent.pid").read_text().strip() == str(agent.pid)
        except FileNotFoundError:
            return False

    def forget_layout(self):
        """As if the maps were those of another version."""
        (layout,) = (self._directory / "bpf" / "agent" / "classifier").glob("layout-*")
        layout.rename(layout.with_name("layout-another"))

    def log(self, name):
        return self._log(name).read_text()

    def _log(self, name):
        return self._directory / f"{name}.log"

    def workload(self):
        """What the agent that has the socket says of the workload, once it has completed a round."""
        answered = answer(Asked(self.socket), "/v1/status")
        if answered is None:
            return None
        told = json.loads(answered[1])
        return told["workloads"][0] if told["round_at"] and told["workloads"] else None

    def observed(self):
        """That, once it is observed."""
        told = self.workload()
        return told if told and told["observed_since"] else None

    def is_ready(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        answered = answer(connection, "/readyz")
        return answered is not None and answered[0] == 200


@pytest.fixture(scope="module")
def pair():
    with pair_of() as made:
        yield made


@pytest.fixture(scope="module")
def node(pair, tmp_path_factory):
    directory = tmp_path_factory.mktemp("node")
    with bpffs(directory / "bpf"):
        made = Node(directory, pair.pod)
        yield made
        made.end()


@pytest.fixture(scope="module")
def old(node):
    """The agent of the node, which every test here wants to be followed by another."""
    agent = node.start("old")
    before = until(node.observed, "the old agent has taken in the workload")
    assert (before["redirect"], before["problem"]) == ("ok", "")
    return agent


def followed(node, pair, new):
    """What the new agent says of the workload, whose connections all end at its sidecar until then and after."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        after = node.observed()
        assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"
        assert landing(pair.peer, pair.pod_ipv6, APP).server == "sidecar"
        if after is not None:
            return after
        assert new.poll() is None
        assert time.monotonic() < deadline


def test_an_agent_that_does_not_stand_by_is_refused_beside_another(node, old):
    new = node.start("refused")
    assert new.wait(DEADLINE_S) == 1
    assert "another agent" in node.log("refused")
    assert old.poll() is None


def test_a_successor_that_cannot_start_leaves_the_agent_as_it_is(node, old):
    new = node.start("faulty", "--stand-by", metrics=True, window=-1)
    assert new.wait(DEADLINE_S) == 2
    assert "window" in node.log("faulty")
    assert old.poll() is None
    assert node.workload()["redirect"] == "ok"


def test_a_successor_is_ready_before_the_agent_ends_and_takes_over_without_a_gap(node, old, pair):
    before = node.workload()
    generation = netns.run_in(pair.pod, nf_tables.generation)
    with serving(pair.pod, "sidecar", [INBOUND, OUTBOUND]), serving(pair.pod, "app", [APP]):
        new = node.start("new", "--stand-by", metrics=True)
        until(node.is_ready, "the new agent is ready")
        assert new.poll() is old.poll() is None
        node.end(old)
        after = followed(node, pair, new)
    assert (after["redirect"], after["repairs"], after["problem"]) == ("ok", 0, "")
    assert after["observed_since"] == pytest.approx(before["observed_since"], abs=0.001)
    assert netns.run_in(pair.pod, nf_tables.generation) == generation


@pytest.fixture
def served(pair):
    with serving(pair.pod, "sidecar", [INBOUND, OUTBOUND]), serving(pair.pod, "app", [APP]):
        yield


def test_an_agent_that_hangs_is_followed_when_it_is_killed(node, pair, served):
    hanging = node.running()
    before, generation = node.workload(), netns.run_in(pair.pod, nf_tables.generation)
    hanging.send_signal(signal.SIGSTOP)
    new = node.start("follows", "--stand-by", metrics=True)
    until(node.is_ready, "the new agent is ready")
    assert not node.has_directories(new)
    assert landing(pair.peer, pair.pod_ipv4, APP).server == "sidecar"
    hanging.kill()
    hanging.wait(DEADLINE_S)
    after = followed(node, pair, new)
    assert (after["redirect"], after["repairs"], after["problem"]) == ("ok", 0, "")
    assert after["observed_since"] == pytest.approx(before["observed_since"], abs=0.001)
    assert netns.run_in(pair.pod, nf_tables.generation) == generation


MOMENTS = {
    "it has the directories": lambda node, agent: node.has_directories(agent),
    "it has looked once": lambda node, _: node.workload(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_successor_that_is_killed_while_it_takes_over_leaves_all_to_the_next(
    node, pair, served, moment
):
    old = node.running()
    before, generation = node.workload(), netns.run_in(pair.pod, nf_tables.generation)
    new = node.start("killed", "--stand-by", metrics=True)
    until(node.is_ready, "the new agent is ready")
    node.end(old)
    until(lambda: MOMENTS[moment](node, new), moment)
    new.kill()
    new.wait(DEADLINE_S)
    after = followed(node, pair, node.start("next", "--stand-by"))
    assert (after["redirect"], after["repairs"], after["problem"]) == ("ok", 0, "")
    assert after["observed_since"] == pytest.approx(before["observed_since"], abs=0.001)
    assert netns.run_in(pair.pod, nf_tables.generation) == generation


def test_a_successor_of_another_version_and_policy_begins_anew_and_lets_nobody_around_the_sidecar(
    node, pair, served
):
    old = node.running()
    before = node.workload()
    policy = {"inbound": {"exclude_ports": [9999]}}
    new = node.start("another", "--stand-by", metrics=True, redirect={"policy": policy})
    until(node.is_ready, "the new agent is ready")
    node.forget_layout()
    node.end(old)
    after = followed(node, pair, new)
    assert (after["redirect"], after["repairs"], after["problem"]) == ("ok", 0, "")
    assert after["policy"]["inbound"]["exclude_ports"] == [{"first": 9999, "last": 9999}]
    assert before["policy"]["inbound"]["exclude_ports"] == []
    assert after["observed_since"] > before["observed_since"] + 0.001
    assert "another layout" in node.log("another")
