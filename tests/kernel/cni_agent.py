"""What tests of CNI calls share: the agent's side of the plugin in a thread, or in a process that can be killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tidegate.enforce.redirect.engine import Engine
from tidegate.intent.policy import Policy
from tidegate.kernel import netns
from tidegate.node.cni import CniServer, PodLookup
from tidegate.node.cni_install import packaged_plugin
from tidegate.node.config import RedirectConfig
from tidegate.node.metrics import CniResult, Metrics
from tidegate.workloads.attachments import Attachments
from tidegate.workloads.cni import CniConfig

DEADLINE_S = 30.0
LISTENING = b"listening\n"
RESULT = (
    b'{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],  "ips":[{"address":"10.9.0.2/24"}]}'
)


class Counting(Metrics):
    """Metrics that can be asked which calls there were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, CniResult]] = []

    def cni_call(self, command: str, result: CniResult, seconds: float) -> None:
        self.calls.append((command, result))


class Agent:
    """The agent's side, and what it told the daemon."""

    def __init__(
        self,
        directory: Path,
        *,
        pods: PodLookup | None = None,
        redirect: RedirectConfig | None = None,
    ) -> None:
        self.config = CniConfig(socket=directory / "cni.sock", exclude_namespaces=("infra",))
        self.attachments = Attachments(directory / "attachments")
        self.engine = Engine()
        self.metrics = Counting()
        self.woken = 0
        self.ready = True
        self.in_force: dict[str, Policy] = {}
        self.server = CniServer(
            self.config,
            redirect or RedirectConfig(),
            self.engine,
            self.attachments,
            pods=pods,
            wake=self._wake,
            is_ready=lambda: self.ready,
            policy_in_force=self.in_force.get,
            metrics=self.metrics,
        )

    def _wake(self) -> None:
        self.woken += 1

    @contextmanager
    def running(self) -> Iterator["Agent"]:
        """Answers in a thread of its own."""
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()
        listening = threading.Event()

        async def serve() -> None:
            async with self.server.running():
                listening.set()
                await stop.wait()

        def run() -> None:
            loop.run_until_complete(serve())
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert listening.wait(DEADLINE_S)
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()


class Runtime:
    """Calls the plugin as a container runtime does, for one network."""

    def __init__(self, socket: Path, **section: object) -> None:
        self.section = {
            "socket": str(socket),
            "wait_s": 0,
            "mesh": True,
            "sidecar": "own",
            **section,
        }

    def start(
        self,
        command: str,
        netns: str,
        container: str = "c1",
        *,
        interface: str = "eth0",
        arguments: str = "IgnoreUnknown=1",
        version: str = "1.1.0",
        **more: object,
    ) -> "Call":
        text = {
            "cniVersion": version,
            "name": "net",
            "type": "tidegate-cni",
            "tidegate": self.section,
        }
        body = json.dumps({**text, **more}).encode()[:-1] + b',"prevResult":' + RESULT + b"}"
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns,
            "CNI_IFNAME": interface,
            "CNI_ARGS": arguments,
        }
        return Call(body, environment)

    def call(self, command: str, netns: str, container: str = "c1", **more: Any) -> dict[str, Any]:
        """The error of a call; {} for one that succeeded."""
        return self.start(command, netns, container, **more).error()


class Call:
    """One process of the plugin."""

    def __init__(self, body: bytes, environment: dict[str, str]) -> None:
        self.is_add = environment["CNI_COMMAND"] == "ADD"
        self.process = subprocess.Popen(
            [packaged_plugin()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self.process.stdin is not None
        self.process.stdin.write(body)
        self.process.stdin.close()
        self.process.stdin = None

    @property
    def waits(self) -> bool:
        """Whether it has a connection to an agent and waits for the answer."""
        directory = Path("/proc", str(self.process.pid))
        sleeps = " S " in (directory / "stat").read_text()
        opened = (link.readlink() for link in (directory / "fd").iterdir())
        return sleeps and any(str(target).startswith("socket:") for target in opened)

    def error(self) -> dict[str, Any]:
        printed, _ = self.process.communicate(timeout=DEADLINE_S)
        if self.process.returncode == 0:
            assert printed == (RESULT if self.is_add else b"")
            return {}
        error: dict[str, Any] = json.loads(printed)
        return error


@contextmanager
def process(directory: Path, network: str = netns.CURRENT) -> Iterator[Callable[[], int]]:
    """Starts an agent in a process of its own, as often as it is called, which may be killed by its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        (directory / "cni.sock").unlink(missing_ok=True)
        command = [sys.executable, __file__, str(directory)]
        started.append(netns.spawn(network, command, stdout=subprocess.PIPE))
        stdout = started[-1].stdout
        assert stdout is not None
        with stdout:
            assert stdout.readline() == LISTENING
        return started[-1].pid

    try:
        yield start
    finally:
        for one in started:
            one.kill()
            one.wait()


def main() -> None:
    with Agent(Path(sys.argv[1])).running():
        os.write(sys.stdout.fileno(), LISTENING)
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
    os._exit(0)
