"""`tidegate agent run` with the intent server in the same process: one machine, one service, one command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from agents import START_S, Node, node_in_a_directory
from namespaces import eventually, pair_of

from tidegate.enforce.sidecar import render
from tidegate.kernel import netns

GATE = 'Kind = "mesh" AllowEnablingPermissiveMutualTLS = true'
PERMISSIVE = 'Kind = "service-defaults" Name = "web" MutualTLSMode = "permissive"'


class Machine(Node):
    """A node, and what is asked of it by the command line."""

    def tidegate(self, *words: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"TIDEGATE_HTTP_ADDR": self.config["server"]}
        return subprocess.run(
            [sys.executable, "-m", "tidegate.cli.main", *words],
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )

    def mode(self) -> str:
        status = self.status()
        return status["workloads"][0]["mode"] if status and status["workloads"] else ""

    def certificates(self) -> "tuple[str, str]":
        """What the sidecar was given: the roots that it trusts and its leaf, without line breaks."""
        sidecars = self.directory / "run" / "sidecars"
        (roots,) = sidecars.rglob(render.ROOTS_FILE)
        (leaf,) = sidecars.rglob(render.LEAF_FILE)
        return roots.read_text().replace("\\n", ""), leaf.read_text()


@pytest.fixture
def machine():
    with node_in_a_directory(Machine) as made:
        yield made


def end_all(netns_path: str) -> None:
    """An agent leaves sidecars running, and a test may fail before they have gone."""
    for pid in netns.pids(netns_path):
        os.kill(pid, signal.SIGKILL)


def test_one_process_is_agent_and_server_and_a_killed_one_loses_nothing_of_either(machine):
    with pair_of() as pod:
        try:
            machine.put("web", pod)
            machine.start()
            written = machine.tidegate("config", "write", "-", given=f"{GATE}\n{PERMISSIVE}")
            assert written.returncode == 0, written.stderr
            eventually(lambda: machine.mode() == "permissive")
            machine.kill()
            machine.start()
            assert machine.tidegate("config", "list", "-kind", "mesh").stdout == "mesh\n"
            eventually(lambda: machine.mode() == "permissive")
        finally:
            machine.kill()
            end_all(pod.pod)


def test_a_new_root_reaches_sidecars_soon_and_not_when_their_leaves_end(machine):
    with pair_of() as pod:
        try:
            machine.put("web", pod)
            machine.start()
            _, first_leaf = machine.certificates()
            rotated = machine.tidegate("ca", "rotate", "--json")
            assert rotated.returncode == 0, rotated.stderr
            eventually(lambda: machine.certificates()[1] != first_leaf)
            for root in json.loads(rotated.stdout)["roots"]:
                body = "".join(root["RootCert"].split("-----")[2].split())
                assert body in machine.certificates()[0]
        finally:
            machine.kill()
            end_all(pod.pod)


def test_an_agent_that_ends_takes_its_sockets_with_it(machine):
    machine.start()
    machine.agent.terminate()
    machine.agent.wait(START_S)
    assert not Path(machine.config["socket"]).exists()
    assert not Path(machine.config["server"].removeprefix("unix://")).exists()
