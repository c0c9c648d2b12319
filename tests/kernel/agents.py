"""An agent as a process, with a node's files in a directory of its own."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from namespaces import DEADLINE_S

from tidegate.errors import TidegateError
from tidegate.lab import mounts
from tidegate.node.client import AgentClient

START_S = 60.0


class Node:
    """One node: its files, and its agent, a process."""

    def __init__(self, directory):
        self.directory = directory
        self.agent = None
        self.config = {
            "node": "n1",
            "server": f"unix://{directory}/server.sock",
            "embedded_server": {
                "state_dir": f"{directory}/server",
                "listen": f"unix://{directory}/server.sock",
                "trust_domain": "mesh.consul",
            },
            "workloads": f"{directory}/workloads",
            "run_dir": f"{directory}/run",
            "state_dir": f"{directory}/state",
            "socket": f"{directory}/run/agent.sock",
            "bpffs": f"{directory}/bpf/agent",
            "trust_domain": "mesh.consul",
        }
        for name in ("workloads", "server"):
            (directory / name).mkdir()

    def put(self, name, pair, **fields):
        workload = {
            "id": f"id-{name}",
            "name": name,
            "service": name,
            "node": "n1",
            "netns": pair.pod,
            "addresses": [pair.pod_ipv4, pair.pod_ipv6],
            "port": 8080,
            "meshed": True,
        }
        file = self.directory / "workloads" / f"{name}.json"
        file.write_text(json.dumps(workload | fields))

    def configure(self):
        (self.directory / "agent.yaml").write_text(json.dumps(self.config))

    def start(self):
        """Returns when the agent has brought all of its workloads to where they should be."""
        self.configure()
        file = self.directory / "agent.yaml"
        log = (self.directory / "agent.log").open("wb")
        argv = [sys.executable, "-m", "tidegate.cli.main", "agent", "run", "--config", str(file)]
        with log:
            self.agent = self.spawn(argv, stderr=log, stdin=subprocess.DEVNULL)
        until = time.monotonic() + START_S
        while not self.is_settled():
            assert time.monotonic() < until, (self.directory / "agent.log").read_text()

    def spawn(self, argv, **popen):
        return subprocess.Popen(argv, **popen)

    def is_settled(self):
        assert self.agent.poll() is None, (self.directory / "agent.log").read_text()
        status = self.status()
        return (
            status is not None
            and status["round_at"]
            and all(
                one["redirect"] in ("ok", "blocked")
                if one["wanted_in_mesh"]
                else one["observed_since"]
                for one in status["workloads"]
            )
        )

    def status(self):
        async def ask():
            async with AgentClient(
                f"unix://{self.config['socket']}", timeout_s=DEADLINE_S
            ) as agent:
                return await agent.get("/v1/status")

        try:
            return asyncio.run(ask())
        except TidegateError:
            return None

    def kill(self):
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()


@contextlib.contextmanager
def node_in_a_directory(kind=Node):
    """A node without a running agent. The directory is one that the proxy user can pass, which pytest's are not."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    directory.chmod(0o711)
    mounts.mount_bpffs(directory / "bpf")
    node = kind(directory)
    try:
        yield node
    finally:
        node.kill()
        _end_sidecars(directory)
        mounts.unmount_below(directory)
        shutil.rmtree(directory)


def _end_sidecars(directory: Path) -> None:
    """An agent that ends leaves them: each works in a directory of its own below the node's."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if Path(process.cwd()).is_relative_to(directory):
                process.kill()
                process.wait()
