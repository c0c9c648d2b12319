"""`tidegate agent run` with the intent server in the same process: one machine, one service, one command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from namespaces import eventually as eventually_within
from namespaces import pair_of

from tidegate.enforce.sidecar import render
from tidegate.lab import mounts
from tidegate.model import Workload
from tidegate.state_files import write_atomically

STARTED_S = 60.0
"""Whole processes are waited for here, on machines that may be busy."""
GATE = 'Kind = "mesh" AllowEnablingPermissiveMutualTLS = true'
PERMISSIVE = 'Kind = "service-defaults" Name = "web" MutualTLSMode = "permissive"'


def eventually(condition):
    eventually_within(condition, STARTED_S)


class Machine:
    """Files of an agent, and what is asked of it by the command line."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = f"unix://{directory}/server.sock"
        self.socket = directory / "agent.sock"
        self.config = directory / "agent.yaml"
        (directory / "workloads").mkdir()
        server = {"state_dir": f"{directory}/server", "listen": self.server}
        config = {
            "node": "n1",
            "server": self.server,
            "embedded_server": {**server, "trust_domain": "mesh.consul"},
            "workloads": f"{directory}/workloads",
            "run_dir": f"{directory}/run",
            "state_dir": f"{directory}/state",
            "socket": str(self.socket),
            "bpffs": f"{directory}/bpf/agent",
            "trust_domain": "mesh.consul",
        }
        self.config.write_text(json.dumps(config))

    def start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tidegate.cli.main", "agent", "run"]
        with (self.directory / "agent.log").open("ab") as log:
            return subprocess.Popen([*command, "--config", self.config], stderr=log)

    def tidegate(self, *words: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {
            "TIDEGATE_HTTP_ADDR": self.server,
            "TIDEGATE_SOCKET": str(self.socket),
        }
        return subprocess.run(
            [sys.executable, "-m", "tidegate.cli.main", *words],
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def put(self, workload: Workload) -> None:
        path = self.directory / "workloads" / f"{workload.name}.json"
        write_atomically(path, msgspec.json.encode(workload))

    def certificates(self) -> "tuple[str, str]":
        """What the sidecar was given: the roots that it trusts and its leaf, without line breaks."""
        (roots,) = (self.directory / "run" / "sidecars").rglob(render.ROOTS_FILE)
        (leaf,) = (self.directory / "run" / "sidecars").rglob(render.LEAF_FILE)
        return roots.read_text().replace("\\n", ""), leaf.read_text()

    def verdict(self) -> dict[str, object]:
        said = self.tidegate("ready", "web", "--json")
        if said.returncode == 2 and not said.stdout:
            return {}
        (verdict,) = json.loads(said.stdout)["verdicts"]
        return verdict


@pytest.fixture
def machine():
    """The directory is one that the proxy user can pass, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    directory.chmod(0o711)
    mounts.mount_bpffs(directory / "bpf")
    try:
        yield Machine(directory)
    finally:
        mounts.unmount_below(directory)
        shutil.rmtree(directory)


def test_one_process_is_agent_and_server_and_a_killed_one_loses_nothing_of_either(machine):
    with pair_of() as pod:
        agent = machine.start()
        try:
            machine.put(
                Workload(
                    id="web-1",
                    name="web-1",
                    service="web",
                    node="n1",
                    netns=pod.pod,
                    addresses=(pod.pod_ipv4, pod.pod_ipv6),
                    port=8080,
                    meshed=True,
                )
            )
            eventually(machine.socket.exists)
            written = machine.tidegate("config", "write", "-", given=f"{GATE}\n{PERMISSIVE}")
            assert written.returncode == 0, written.stderr
            eventually(lambda: machine.verdict().get("mode") == "permissive")
            _, first_leaf = machine.certificates()
            rotated = machine.tidegate("ca", "rotate", "--json")
            assert rotated.returncode == 0, rotated.stderr
            # Soon, and not when the leaf would have to be renewed anyway.
            eventually(lambda: machine.certificates()[1] != first_leaf)
            for root in json.loads(rotated.stdout)["roots"]:
                body = "".join(root["RootCert"].split("-----")[2].split())
                assert body in machine.certificates()[0]
            agent.send_signal(signal.SIGKILL)
            agent.wait(30)
            agent = machine.start()
            eventually(
                lambda: machine.tidegate("config", "list", "-kind", "mesh").stdout == "mesh\n"
            )
            eventually(lambda: machine.verdict().get("mode") == "permissive")
            # Out of the mesh, so that nothing of it stays.
            (machine.directory / "workloads" / "web-1.json").unlink()
            eventually(lambda: not list((machine.directory / "run" / "sidecars").iterdir()))
        finally:
            agent.terminate()
            agent.wait(30)
        assert not machine.socket.exists()
        assert not (machine.directory / "server.sock").exists()
