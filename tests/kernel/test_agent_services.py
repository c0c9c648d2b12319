"""Services of a machine behind their sidecars, by an agent that is told of them in its configuration: on traffic."""

import functools
import pwd
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Node, node_in_a_directory
from namespaces import Pair, eventually, landing, namespace, pair_of, serving

from tidegate.kernel import netns
from tidegate.model import DEFAULT_PROXY_UID

WEB, ADMIN = 8080, 9090
DB = 25432
"""Looked for on the whole machine: nobody else is to listen there."""
SIDECAR = [15001, 20000]
NOBODY = pwd.getpwnam("nobody").pw_uid
SOMEBODY = 1000

GREETING = """
import socket, sys
with socket.create_server(("", int(sys.argv[1]))) as server:
    while True:
        with server.accept()[0] as connection:
            connection.sendall(b"application 0 0.0.0.0 0 0.0.0.0\\n")
"""


class Machine(Node):
    """A machine whose agent runs in the network namespace at `home`."""

    home = ""

    def spawn(self, argv: list[str], **popen: Any) -> "subprocess.Popen[bytes]":
        return netns.spawn(self.home, argv, **popen)

    def start_with(self, *processes: dict[str, Any]) -> None:
        del self.config["workloads"]
        self.config["processes"] = list(processes)
        self.start()

    def shows(self, name: str, redirect: str) -> bool:
        found = [one["redirect"] for one in self.status()["workloads"] if one["name"] == name]
        return found == [redirect]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with node_in_a_directory(Machine) as made:
        yield made


@pytest.fixture
def pair() -> Iterator[Pair]:
    with pair_of() as made:
        yield made


def test_of_two_services_in_the_hosts_namespace_only_the_one_that_is_named_is_redirected(
    machine: Machine, pair: Pair
) -> None:
    machine.home = pair.pod
    with (
        serving(pair.pod, "sidecar", SIDECAR),
        serving(pair.pod, "application", [WEB, ADMIN, DB, 22]),
        serving(pair.peer, "world", [80]),
    ):
        machine.start_with(
            {
                "service": "web",
                "port": WEB,
                "more_ports": [{"service": "admin", "port": ADMIN}],
                "host_network": {"user": "nobody"},
                "sidecar": "own",
            },
            {"service": "db", "port": DB, "listens": DB, "sidecar": "own"},
        )
        eventually(lambda: machine.shows("web", "ok") and machine.status()["left_alone"])
        status = machine.status()
        assert [(one["name"], one["redirect"]) for one in status["workloads"]] == [("web", "ok")]
        (left,) = status["left_alone"]
        assert (left["name"], left["treatment"]) == ("db", "host-network")
        assert "among the more_ports of web" in left["reason"]
        for version in (4, 6):
            here, there = pair.pod_address(version), pair.peer_address(version)
            inward = functools.partial(landing, pair.peer, here)
            outward = functools.partial(landing, pair.pod, there, 80)
            assert (inward(WEB).port, inward(ADMIN).port) == (20000, 20000)
            assert {inward(port).server for port in (DB, 22)} == {"application"}
            assert outward(uid=NOBODY).port == 15001
            for uid in (0, SOMEBODY, DEFAULT_PROXY_UID):
                assert outward(uid=uid).server == "world"
            # By loopback others of the machine go around the sidecar, as docs/systemd.md says.
            assert landing(pair.pod, here, WEB).server == "application"
        machine.kill()
        assert landing(pair.peer, pair.pod_ipv4, WEB).server == "sidecar", "rules outlive the agent"


@pytest.fixture
def greeting() -> Iterator[Callable[[str], "subprocess.Popen[bytes]"]]:
    """Starts the service in a namespace."""
    started: list[subprocess.Popen[bytes]] = []

    def start(path: str) -> "subprocess.Popen[bytes]":
        started.append(netns.spawn(path, [sys.executable, "-c", GREETING, str(WEB)]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_service_that_is_restarted_in_its_namespace_is_redirected_from_its_first_moment(
    machine: Machine, pair: Pair, greeting: Callable[[str], "subprocess.Popen[bytes]"]
) -> None:
    pid_file = machine.directory / "web.pid"
    with namespace() as machine.home, serving(pair.pod, "sidecar", SIDECAR):
        process = greeting(pair.pod)
        pid_file.write_text(str(process.pid))
        eventually(lambda: _answers(pair))
        machine.start_with({"service": "web", "port": WEB, "sidecar": "own", "pid": str(pid_file)})
        eventually(lambda: machine.shows("web", "ok"))
        assert landing(pair.peer, pair.pod_ipv4, WEB).server == "sidecar"
        process.kill()
        process.wait()
        eventually(lambda: any("web: " in one for one in machine.status()["problems"]))
        # Whatever an agent does that takes the service for gone it has done two rounds later.
        for _ in range(2):
            before = machine.status()["round_at"]
            eventually(lambda before=before: machine.status()["round_at"] > before)
        process = greeting(pair.pod)
        eventually(lambda: _listens(process.pid))
        assert landing(pair.peer, pair.pod_ipv4, WEB).server == "sidecar"
        pid_file.write_text(str(process.pid))
        eventually(lambda: machine.status()["problems"] == [])
        assert machine.shows("web", "ok")


def _answers(pair: Pair) -> bool:
    try:
        return landing(pair.peer, pair.pod_ipv4, WEB).server == "application"
    except OSError:
        return False


def _listens(pid: int) -> bool:
    table = Path(f"/proc/{pid}/net/tcp").read_text()
    return f"00000000:{WEB:04X} 00000000:0000 0A" in table
