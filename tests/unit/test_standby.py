"""An agent that stands by says that it is ready, does nothing, and begins in the moment in which the other one ends."""

import asyncio
import http.client
import socket

import pytest

from tidegate.errors import InputError, TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.node import standby
from tidegate.node.config import AgentConfig, load_config
from tidegate.node.holding import held_alone
from tidegate.node.standby import stand_by

DEADLINE_S = 10.0
CONFIG = """
server: unix:///run/server.sock
trust_domain: mesh.consul
kubernetes: {}
"""


@pytest.fixture
def config(tmp_path, unused_port):
    made = AgentConfig(
        node="n1",
        server=f"unix://{tmp_path}/server.sock",
        workloads=tmp_path / "workloads",
        run_dir=tmp_path / "run",
        state_dir=tmp_path / "state",
        socket=tmp_path / "agent.sock",
        bpffs=tmp_path / "bpf",
        trust_domain="mesh.consul",
        metrics=f"127.0.0.1:{unused_port}",
    )
    for directory in (made.run_dir, made.state_dir, made.bpffs):
        directory.mkdir()
    return made


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """What the kernel is asked before it stands by."""
    asked = []
    monkeypatch.setattr(standby, "try_programs", lambda: asked.append("programs"))
    return asked


@pytest.fixture
def unused_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def asked(config, path):
    address, _, port = config.metrics.rpartition(":")
    connection = http.client.HTTPConnection(address, int(port), timeout=DEADLINE_S)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


async def until_answered(config, path):
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await asyncio.to_thread(asked, config, path)
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)


class TestStandingBy:
    async def _while_held(self, config, directory):
        stop = asyncio.Event()
        with held_alone(directory):
            waiting = asyncio.create_task(stand_by(config, stop))
            ready = await until_answered(config, "/readyz")
            live = await until_answered(config, "/healthz")
            metrics = await until_answered(config, "/metrics")
            assert not waiting.done()
        await asyncio.wait_for(waiting, DEADLINE_S)
        return ready, live, metrics

    @pytest.mark.parametrize("name", ["run_dir", "state_dir", "bpffs"])
    def test_lasts_while_another_agent_has_any_of_the_directories(self, config, name):
        ready, live, metrics = asyncio.run(self._while_held(config, getattr(config, name)))
        assert ready[0] == live[0] == 200
        assert metrics[0] == 503
        assert "another agent runs on this node" in metrics[1]

    def test_is_over_at_once_where_no_other_agent_is(self, config, kernel):
        asyncio.run(asyncio.wait_for(stand_by(config, asyncio.Event()), DEADLINE_S))
        assert kernel == [], "the programs are loaded once"

    def test_leaves_the_port_and_the_directories_free(self, config):
        asyncio.run(self._while_held(config, config.run_dir))
        with pytest.raises(ConnectionRefusedError):
            asked(config, "/readyz")
        for directory in (config.run_dir, config.state_dir, config.bpffs):
            with held_alone(directory):
                pass

    def test_ends_when_it_is_told_to_stop(self, config):
        async def stopped():
            stop = asyncio.Event()
            with held_alone(config.run_dir):
                waiting = asyncio.create_task(stand_by(config, stop))
                await until_answered(config, "/readyz")
                stop.set()
                await asyncio.wait_for(waiting, DEADLINE_S)

        asyncio.run(stopped())

    def test_does_not_begin_with_programs_that_the_kernel_refuses(self, config, monkeypatch):
        def refuse():
            raise KernelError("the verifier rejects from_pod")

        monkeypatch.setattr(standby, "try_programs", refuse)
        with held_alone(config.run_dir), pytest.raises(KernelError, match="rejects from_pod"):
            asyncio.run(asyncio.wait_for(stand_by(config, asyncio.Event()), DEADLINE_S))
        with pytest.raises(ConnectionRefusedError):
            asked(config, "/readyz")

    def test_says_which_directory_is_not_there(self, config):
        config.state_dir.rmdir()
        with pytest.raises(TidegateError, match="state cannot be used"):
            asyncio.run(stand_by(config, asyncio.Event()))


class TestWhatTheEnvironmentKnowsOfANode:
    def load(self, tmp_path, text, **environment):
        file = tmp_path / "agent.yaml"
        file.write_text(text)
        return load_config(file, environment)

    def test_is_its_name_here_and_in_kubernetes_and_its_addresses(self, tmp_path):
        config = self.load(
            tmp_path,
            CONFIG,
            TIDEGATE_NODE="node-1.example",
            TIDEGATE_NODE_ADDRESSES="10.0.0.7,fd00::7",
        )
        assert (config.node, config.kubernetes.node) == ("node-1-example", "node-1.example")
        assert config.node_addresses == ("10.0.0.7", "fd00::7")
        assert config.redirect.policy.inbound.node_addresses == ("10.0.0.7/32", "fd00::7/128")

    def test_gives_way_to_what_the_file_says(self, tmp_path):
        text = f"{CONFIG}node: here\nnode_addresses: []\n"
        config = self.load(
            tmp_path, text, TIDEGATE_NODE="there", TIDEGATE_NODE_ADDRESSES="10.0.0.7"
        )
        assert (config.node, config.node_addresses) == ("here", ())

    def test_that_is_faulty_is_told(self, tmp_path):
        with pytest.raises(InputError, match="node_addresses"):
            self.load(tmp_path, CONFIG, TIDEGATE_NODE="n1", TIDEGATE_NODE_ADDRESSES="here")

    def test_is_needed_where_the_file_does_not_say_it(self, tmp_path):
        with pytest.raises(InputError, match="node"):
            self.load(tmp_path, CONFIG)
