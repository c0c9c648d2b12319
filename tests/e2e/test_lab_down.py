"""`tidegate lab down` leaves nothing, whatever happened before."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from labs import DEMO_FILE, eventually, lab_up, leftovers, start, tidegate


def own_network() -> list[str]:
    return [
        subprocess.run(["ip", "-o", *what], text=True, capture_output=True, check=True).stdout
        for what in (["link"], ["address"], ["route"], ["-6", "route"])
    ]


def test_down_leaves_nothing_and_may_be_said_twice() -> None:
    before = own_network()
    with lab_up("gone"):
        assert own_network() == before, "the machine's own namespace stays untouched"
    assert leftovers("gone") == []
    assert own_network() == before
    again = tidegate("lab", "down", "--name", "gone")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("seconds", [0.5, 1.2, 2.5, 4.0])
def test_down_leaves_nothing_after_an_up_that_was_killed_half_way(seconds: float) -> None:
    up = start("lab", "up", str(DEMO_FILE), "--name", "half")
    time.sleep(seconds)
    up.kill()
    up.communicate()
    down = tidegate("lab", "down", "--name", "half")
    assert down.returncode == 0, down.stderr
    assert leftovers("half") == []


@pytest.mark.parametrize("victim", ["agent", "server", "sidecar", "application", "everything"])
def test_down_leaves_nothing_after_a_crash_of(victim: str) -> None:
    with lab_up("crash") as lab:
        eventually(lambda: lab.sees(("web", "api", "mesh")), "the lab to work")
        status = lab.status()
        victims = {
            "agent": [lab.agent("node1").pid],
            "server": [status["server_pid"]],
            "sidecar": [lab.envoy("api").pid],
            "application": [lab.pod("web")["app_pid"]],
        }
        victims["everything"] = [pid for pids in victims.values() for pid in pids]
        for pid in victims[victim]:
            psutil.Process(pid).send_signal(signal.SIGKILL)
    assert leftovers("crash") == []


def test_down_leaves_nothing_when_the_state_directory_is_gone() -> None:
    with lab_up("blind") as lab:
        for path in sorted(lab.root.glob("*.json")):
            path.unlink()
    assert leftovers("blind") == []


def test_a_wrong_lab_file_makes_nothing_and_says_every_fault(tmp_path: Path) -> None:
    wrong = tmp_path / "lab.yaml"
    wrong.write_text(
        "lab: wrong\nnodes: [one]\npods:\n"
        "  - {name: a, node: two, port: 70000, mesh: true, app: {kind: http}}\n"
    )
    done = tidegate("lab", "up", str(wrong))
    assert done.returncode == 2
    assert "lab.yaml" in done.stderr
    assert "two" in done.stderr
    assert "70000" in done.stderr
    assert leftovers("wrong") == []


def test_two_labs_run_side_by_side() -> None:
    with lab_up("left") as left, lab_up("right") as right:
        for lab in (left, right):
            eventually(lambda lab=lab: lab.sees(("web", "api", "mesh")), f"{lab.name} to work")
        tidegate("lab", "down", "--name", "left")
        assert leftovers("left") == []
        answered = right.answered("web")
        eventually(lambda: right.answered("web") > answered + 3, "the other lab to go on")
