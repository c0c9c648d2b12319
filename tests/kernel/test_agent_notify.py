"""What systemd hears of an agent as a process, from its first round to its end (sd_notify(3))."""

import signal
import socket

import pytest
from agents import START_S, node_in_a_directory


@pytest.fixture
def heard(tmp_path, monkeypatch):
    """Reads what is said until something begins so, and returns that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(START_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000000")

        def until(word):
            while not (said := listener.recv(4096).decode()).startswith(word):
                assert not said.startswith("STOPPING"), said
            return said

        yield until


def test_an_agent_is_ready_after_its_first_round_feeds_the_watchdog_reloads_and_ends(heard):
    with node_in_a_directory() as node:
        node.start()
        heard("READY=1")
        heard("WATCHDOG=1")
        node.agent.send_signal(signal.SIGHUP)
        heard("RELOADING=1")
        heard("READY=1")
        (node.directory / "agent.yaml").write_text("node: [")
        node.agent.send_signal(signal.SIGHUP)
        heard("RELOADING=1")
        assert "the configuration stays as it was" in heard("STATUS=the")
        heard("READY=1")
        heard("WATCHDOG=1")
        node.agent.terminate()
        heard("STOPPING=1")
        assert node.agent.wait(START_S) == 0
