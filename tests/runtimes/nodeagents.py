"""A real agent on a Node (nodes.py), with an intent server of the node's own, as `tidegate agent run` starts it."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from nodes import REPOSITORY, Node, until

from tidegate.node.client import AgentClient, AgentUnreachable

METRICS = "127.0.0.1:20200"

TIDEGATE = [sys.executable, "-m", "tidegate.cli.main"]
_SERVER = "unix:///run/tidegate-server.sock"
_MESH = {"trust_domain": "runtimes.consul", "datacenter": "dc1"}


class Agent:
    """The agent of a node; what it writes stays on the node's disk."""

    def __init__(self, node: Node, **sections: object) -> None:
        """`sections` are added to the configuration, such as cni."""
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None
        self.log = node.disk / "agent.log"
        config = {
            "node": "node-1",
            "server": _SERVER,
            "bpffs": "/sys/fs/bpf/tidegate",
            "metrics": METRICS,
            **_MESH,
            **sections,
        }
        _write(node, Path("/etc/tidegate/agent.yaml"), msgspec.yaml.encode(config))

    @contextlib.contextmanager
    def running(self) -> Iterator["Agent"]:
        """Runs it; it need not run any more in the end."""
        self.start()
        try:
            yield self
        finally:
            self.kill()

    def start(self) -> None:
        """Returns when it has completed its first round."""
        self.launch()
        until(self._is_ready, "the agent has had a round", self.last_words)

    def launch(self) -> None:
        """Starts it, and does not wait."""
        assert self._process is None
        with self.log.open("ab") as log:
            self._process = self._node.spawn(
                [*TIDEGATE, "agent", "run"], stdout=log, stderr=log, cwd=REPOSITORY
            )

    def kill(self) -> None:
        """SIGKILL: it gets no chance to clear up."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()

    def freeze(self) -> None:
        """It does nothing until it is thawed or killed, and its sockets stay open."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def status(self) -> Any:
        """The answer to GET /v1/status."""
        return asyncio.run(self._get("/v1/status"))

    def workloads(self) -> dict[str, Any]:
        """The workloads of the status by name."""
        return {workload["name"]: workload for workload in self.status()["workloads"]}

    def metrics(self) -> str:
        """What a Prometheus server is told."""
        return self._node.run(_fetch, f"http://{METRICS}/metrics")

    def lines(self) -> list[str]:
        """What it has logged."""
        return self.log.read_text().splitlines()

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-2000:]

    async def _get(self, path: str) -> Any:
        async with AgentClient(f"unix://{self._node.path('/run/tidegate/agent.sock')}") as client:
            return await client.get(path)

    def _is_ready(self) -> bool:
        assert self.is_running, f"the agent ended: {self.last_words()}"
        try:
            return bool(self.status()["round_at"])
        except AgentUnreachable:
            return False


@contextlib.contextmanager
def intent_server(node: Node) -> Iterator[None]:
    """A server without entries: nothing but defaults."""
    config = {"listen": _SERVER, "state_dir": "/var/lib/tidegate-server", **_MESH}
    path = Path("/etc/tidegate/server.yaml")
    _write(node, path, msgspec.yaml.encode(config))
    with (node.disk / "server.log").open("ab") as log:
        process = node.spawn(
            [*TIDEGATE, "server", "--config", str(path)], stdout=log, stderr=log, cwd=REPOSITORY
        )
    try:
        socket = node.path(_SERVER.removeprefix("unix://"))
        until(socket.exists, "the intent server listens")
        yield
    finally:
        process.kill()
        process.wait()


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def _write(node: Node, path: Path, content: bytes) -> None:
    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    node.run(write)
