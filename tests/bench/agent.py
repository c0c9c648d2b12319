"""The agent as a process: memory and processor time with more and more workloads, and how long commands take to start.

A real agent with a real server, in a namespace of their own; the workloads are unmeshed pods, each a namespace
with a veth into the agent's.
"""

import asyncio
import contextlib
import ctypes
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from tests.bench.measure import (
    Alternative,
    Bound,
    Limit,
    Measurement,
    Unit,
    from_samples,
    interleaved,
    milliseconds,
)
from tests.bench.site import REPOSITORY, Site

from tidegate.errors import TidegateError
from tidegate.kernel import links, netns
from tidegate.model import Sidecar, Workload
from tidegate.node.client import AgentClient, AgentUnreachable
from tidegate.observe import pins

PART = "agent"

_WORKLOADS = (0, 20, 100)
_READINGS, _ROUNDS = 6, 2
"""Of each number of workloads, and rounds of one reading."""
_DEADLINE_S = 120.0
_STARTS = 5
_MEMORY = Limit(Bound.MEDIAN_AT_MOST, 60)
_POD_INTERFACE = "eth0"
_MESH = {"trust_domain": "bench.consul", "datacenter": "dc1"}

# linux/inotify.h
_IN_OPEN = 0x20
_IN_ISDIR = 0x40000000
_EVENT = struct.Struct("iIII")
"""struct inotify_event, without the name."""
_EVENTS_BYTES = 64 << 10
_libc = ctypes.CDLL(None, use_errno=True)


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    yield _starts()
    with Agent(site) as agent:
        yield from _resident(agent)


def _starts() -> Measurement:
    def start(*arguments: str) -> Callable[[], float]:
        command = [sys.executable, *arguments]

        def run() -> None:
            subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True)

        return lambda: milliseconds(run)

    command = ("-m", "tidegate.cli.main")
    return interleaved(
        PART,
        "start of a process until it has ended",
        Unit.MILLISECONDS,
        _STARTS,
        [
            Alternative("python -c pass", start("-c", "pass")),
            Alternative("tidegate --version", start(*command, "--version")),
            Alternative("tidegate flows --help", start(*command, "flows", "--help")),
            Alternative("import of the agent", start("-c", "import tidegate.node.daemon")),
        ],
    )


def _resident(agent: "Agent") -> Iterator[Measurement]:
    memory: list[tuple[Alternative, list[float]]] = []
    work: list[tuple[Alternative, list[float]]] = []
    for number in _WORKLOADS:
        agent.have_workloads(number)
        rss, pss, rounds = [], [], []
        for _ in range(_READINGS):
            rounds.append(agent.round_cost())
            used = agent.memory()
            rss.append(used.rss / 1e6)
            pss.append(used.pss / 1e6)
        limit = _MEMORY if number == _WORKLOADS[-1] else None
        memory.append((_named(f"{number} workloads, RSS", limit), rss))
        memory.append((_named(f"{number} workloads, PSS"), pss))
        work.append((_named(f"{number} workloads"), rounds))
    yield from_samples(PART, "resident memory of an agent", Unit.MEGABYTES, memory)
    title = "processor time of an agent's round, of which it does two in a second"
    yield from_samples(PART, title, Unit.MILLISECONDS, work)


def _named(name: str, limit: Limit | None = None) -> Alternative:
    """A line whose samples are taken elsewhere."""
    return Alternative(name, lambda: 0.0, limit)


class Agent:
    """An agent with its server, and the workloads of its node."""

    def __init__(self, site: Site, name: str = "agent", **sections: object) -> None:
        """`sections` are added to its configuration, such as cni."""
        self._site = site
        self._bpffs = site.bpffs() / name
        self._sections = sections
        self._directory = site.directory / name
        self._workloads = self._directory / "workloads"
        self._socket = self._directory / "agent.sock"
        self._server_socket = self._directory / "server.sock"
        self._node = site.namespace()
        self._started: subprocess.Popen[bytes] | None = None
        self._processes = contextlib.ExitStack()
        self._pods: list[str] = []

    def __enter__(self) -> "Agent":
        self._workloads.mkdir(parents=True)
        server_address = f"unix://{self._server_socket}"
        server = {"listen": server_address, "state_dir": str(self._directory / "server"), **_MESH}
        try:
            self._processes.callback(_end, self._run("server", "server", server))
            _wait_until(self._server_socket.exists, "the server listens")
            self.start()
            self.is_as_it_should_be()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._processes.close()

    @property
    def node(self) -> str:
        """Path of the namespace that the agent is in."""
        return self._node

    @property
    def pods(self) -> Sequence[str]:
        """Paths of the namespaces of the workloads."""
        return self._pods

    def start(self) -> None:
        """Starts the agent's process, and does not wait."""
        config = {
            "node": "bench",
            "server": f"unix://{self._server_socket}",
            "workloads": str(self._workloads),
            "run_dir": str(self._directory / "run"),
            "state_dir": str(self._directory / "state"),
            "socket": str(self._socket),
            "bpffs": str(self._bpffs),
            **_MESH,
            **self._sections,
        }
        self._started = self._run("agent", "agent run", config)
        self._process = psutil.Process(self._started.pid)

    def stop(self) -> None:
        """Ends the agent's process, if it runs; what it has put in place stays."""
        if self._started is not None:
            _end(self._started)
            self._started = None

    def forget_programs(self) -> None:
        """Takes away what an agent that was stopped has pinned: returns when nothing is observed any more.

        With a pin alone a link goes later, and has whoever attaches others wait until then.
        """
        pins.remove(self._bpffs / "classifier")

    def have_workloads(self, number: int, *, redirected: bool = False) -> None:
        """Returns when the agent observes so many, and redirects them to sidecars of their own where that is wanted."""
        while len(self._pods) < number:
            self._add_workload(redirected)
        self.is_as_it_should_be()

    def is_as_it_should_be(self) -> None:
        """Returns when every workload is observed, and those in the mesh are redirected."""
        number = len(self._pods)
        _wait_until(lambda: self._looked_after() == number, f"{number} workloads are looked after")

    def memory(self) -> Any:
        """What the agent holds, in bytes: psutil's rss and pss."""
        return self._process.memory_full_info()

    def round_cost(self) -> float:
        """Milliseconds of processor time that a round took while nobody asked anything."""
        with _Rounds(self._workloads) as rounds:
            rounds.wait()
            before = self._processor_time()
            for _ in range(_ROUNDS):
                rounds.wait()
            return (self._processor_time() - before) * 1e3 / _ROUNDS

    def _processor_time(self) -> float:
        """Seconds; psutil's are rounded to hundredths."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def _run(
        self, name: str, command: str, config: Mapping[str, object]
    ) -> "subprocess.Popen[bytes]":
        path = self._directory / f"{name}.yaml"
        path.write_bytes(msgspec.yaml.encode(config))
        argv = [sys.executable, "-m", "tidegate.cli.main", *command.split(), "--config", str(path)]
        with (self._directory / f"{name}.log").open("ab") as log:
            return netns.spawn(
                self._node,
                argv,
                stdout=log,
                stderr=log,
                cwd=str(REPOSITORY),
                start_new_session=True,
            )

    def _add_workload(self, redirected: bool) -> None:
        number = len(self._pods) + 1
        name = f"w{number:04}"
        pod = self._site.namespace()
        self._pods.append(pod)
        links.create_veth(pod, _POD_INTERFACE, self._node, name)
        for path, interface in ((pod, _POD_INTERFACE), (self._node, name)):
            links.set_up(path, interface)
        address = f"10.79.{number >> 8}.{number & 0xFF}"
        links.add_address(pod, _POD_INTERFACE, f"{address}/32")
        workload = Workload(
            id=f"bench-{name}",
            name=name,
            service=f"service-{number % 20}",
            node="bench",
            netns=pod,
            interface=_POD_INTERFACE,
            port=8080,
            addresses=(address,),
            meshed=redirected,
            sidecar=Sidecar.OWN,
            created_at=time.time(),
        )
        draft = self._workloads / f".{name}.json"
        draft.write_bytes(msgspec.json.encode(workload))
        draft.rename(self._workloads / f"{name}.json")

    def _looked_after(self) -> int:
        """How many workloads are as they should be; -1 while the agent does not answer."""
        if not self._socket.exists():
            return -1
        try:
            status = asyncio.run(_status(f"unix://{self._socket}"))
        except AgentUnreachable:
            return -1
        return sum(
            1
            for workload in status["workloads"]
            if workload["observed_since"]
            and (workload["redirect"] == "ok" or not workload["wanted_in_mesh"])
        )


async def _status(address: str) -> Any:
    async with AgentClient(address) as client:
        return await client.get("/v1/status")


class _Rounds:
    """Tells when an agent begins a round: it then opens the directory of its workloads.

    So rounds are counted without asking the agent, which would cost it something.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> "_Rounds":
        self._fd = _libc.inotify_init1(os.O_CLOEXEC)
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(self._directory), _IN_OPEN)
        if self._fd < 0 or watch < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self._directory))
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def wait(self) -> None:
        """Returns when the next round begins."""
        until = time.monotonic() + _DEADLINE_S
        while select.select([self._fd], [], [], max(0.0, until - time.monotonic()))[0]:
            if _opens_directory(os.read(self._fd, _EVENTS_BYTES)):
                return
        raise TidegateError(f"no round in {_DEADLINE_S:.0f} s")


def _opens_directory(events: bytes) -> bool:
    """Whether one of some struct inotify_event is of the directory, not of a file in it."""
    at = 0
    while at < len(events):
        _, mask, _, length = _EVENT.unpack_from(events, at)
        if mask & _IN_ISDIR:
            return True
        at += _EVENT.size + length
    return False


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > until:
            raise TidegateError(f"waited {_DEADLINE_S:.0f} s in vain until {what}")
        time.sleep(0.05)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_DEADLINE_S)
    finally:
        process.kill()
