"""The agent under traffic: stopped, killed, returning; sidecars that die; nothing lost and nothing open."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from labs import DEMO_FILE, Lab, eventually, lab_up, tidegate

NODE = "node1"
HOME_OF_API = NODE


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with lab_up("life") as up:
        eventually(
            lambda: up.sees(("web", "api", "mesh"), ("legacy", "api", "plaintext")), "traffic"
        )
        yield up


def start_agents_again(lab: Lab) -> None:
    done = tidegate("lab", "up", "--lab", lab.name)
    assert done.returncode == 0, done.stderr


def legacy_connections(lab: Lab) -> int:
    return sum(target["connections"] for target in lab.targets("legacy"))


def legacy_in_ledger(lab: Lab) -> int:
    return sum(
        row["connections"] for key, row in lab.edges().items() if key[:2] == ("legacy", "api")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_an_agent_that_goes_and_returns_loses_no_count_and_breaks_no_request(
    lab: Lab, number: signal.Signals
) -> None:
    agent = lab.agent(HOME_OF_API)
    sidecar = lab.envoy("api").pid
    since = lab.pod("api")["agent"]["observed_since"]
    agent.send_signal(number)
    psutil.wait_procs([agent], timeout=10)
    eventually(lambda: not lab.status()["nodes"][0]["agent_answers"], "the agent to be gone")

    answered, opened = lab.answered("web"), legacy_connections(lab)
    eventually(lambda: lab.answered("web") > answered + 5, "mesh requests without an agent")
    eventually(lambda: legacy_connections(lab) > opened + 5, "plaintext calls without an agent")

    start_agents_again(lab)
    assert lab.envoy("api").pid == sidecar, "the sidecar was taken over, not started again"
    assert lab.pod("api")["agent"]["observed_since"] == pytest.approx(since, abs=0.5)

    def nothing_lost() -> bool:
        before = legacy_connections(lab)
        seen = legacy_in_ledger(lab)
        return before <= seen <= legacy_connections(lab)

    eventually(nothing_lost, "every connection in the ledger")
    assert lab.failures() == []


def test_a_verdict_is_unknown_and_names_the_node_while_its_agent_is_away(lab: Lab) -> None:
    agent = lab.agent(HOME_OF_API)
    agent.send_signal(signal.SIGKILL)
    psutil.wait_procs([agent], timeout=10)
    try:
        [answer] = lab.json("ready", "api")["verdicts"]
        assert answer["verdict"] == "UNKNOWN"
        assert any(NODE in reason["message"] for reason in answer["reasons"]), answer["reasons"]
    finally:
        start_agents_again(lab)


def test_a_sidecar_that_dies_is_started_again_and_shows_in_the_status(lab: Lab) -> None:
    sidecar = lab.envoy("api")
    restarts = lab.pod("api")["agent"]["restarts"]
    sidecar.kill()

    def is_back() -> bool:
        agent = lab.pod("api")["agent"]
        return agent["restarts"] > restarts and agent["state"] == "running"

    eventually(is_back, "the sidecar to be back")
    answered = lab.answered("web")
    eventually(lambda: lab.answered("web") > answered + 5, "mesh requests to be answered again")


def test_certificates_are_rotated_under_traffic_without_a_failed_request(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        DEMO_FILE.read_text().replace("leaf_lifetime: 1h", "leaf_lifetime: 6s"), encoding="utf-8"
    )
    with lab_up("rotate", file) as lab:
        [leaf] = lab.root.glob("nodes/*/run/sidecars/web-*/envoy/leaf.json")
        presented = {leaf.read_bytes()}

        def rotated(times: int) -> bool:
            presented.add(leaf.read_bytes())
            return len(presented) > times

        answered, began = lab.answered("web"), time.monotonic()
        eventually(lambda: rotated(3), "three rotations")
        assert time.monotonic() - began > 2 * 3, "a certificate is used for most of its life"
        assert lab.answered("web") > answered
        assert lab.failures() == []
