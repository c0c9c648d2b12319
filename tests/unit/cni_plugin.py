"""What tests of the CNI plugin share: calls of it, and agents that answer as they are told."""

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.node.cni_install import packaged_plugin

DEADLINE_S = 20.0
DONE = b'{"done":true}'
PREVIOUS = b'{ "cniVersion":"1.0.0" ,"ips":[{"address":"10.1.2.3\\/24"}],"x": 1.50e3, "\\u00e9": "\xc3\xa9" }'


@dataclass(frozen=True)
class Printed:
    """What the plugin left of a call."""

    stdout: bytes
    stderr: bytes
    status: int

    @property
    def error(self) -> dict[str, Any]:
        """The one JSON object that it printed, of a call that failed."""
        assert self.stderr == b""
        assert self.status == 1
        error = json.loads(self.stdout)
        assert (
            {"cniVersion", "code", "msg"}
            <= error.keys()
            <= {"cniVersion", "code", "msg", "details"}
        )
        assert isinstance(error["code"], int)
        return error

    @property
    def is_silent_success(self) -> bool:
        return (self.stdout, self.stderr, self.status) == (b"", b"", 0)


def configuration(
    path: Path | str, *, version: str = "1.0.0", previous: bytes = b"", **settings: object
) -> bytes:
    """A network configuration with this plugin's settings, and with the result of plugins before it."""
    section = {"socket": str(path), "wait_s": 0, "timeout_s": 5, **settings}
    head = {"cniVersion": version, "name": "net", "type": "tidegate-cni", "tidegate": section}
    text = json.dumps(head).encode()
    return text[:-1] + b', "prevResult" : ' + previous + b" }" if previous else text


def call(
    stdin: bytes,
    command: str = "ADD",
    *,
    container: str = "c1",
    netns: str = "/run/netns/c1",
    interface: str = "eth0",
    arguments: str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
) -> Printed:
    """Runs the plugin as a runtime does."""
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": netns,
        "CNI_IFNAME": interface,
        "CNI_ARGS": arguments,
        "CNI_PATH": "/opt/cni/bin",
    }
    done = subprocess.run(
        [packaged_plugin()],
        input=stdin,
        env={name: value for name, value in environment.items() if value},
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return Printed(done.stdout, done.stderr, done.returncode)


def read_request(connection: socket.socket) -> bytes:
    """What follows the length of a request."""
    received = b""
    while len(received) < 8 or len(received) < 8 + int.from_bytes(received[4:8]):
        got = connection.recv(65536)
        assert got, "the plugin hung up"
        received += got
    assert received[:4] == b"TGC1"
    return received[8:]


@contextmanager
def agent(
    path: Path, *behaviours: Callable[[socket.socket], object], reads: bool = True
) -> Iterator[list[bytes]]:
    """An agent that treats its first call by the first behaviour and so on, and all others by the last; the requests
    that it read.
    """
    requests: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    stopping = threading.Event()

    def serve() -> None:
        calls = 0
        while True:
            connection, _ = listener.accept()
            with connection:
                if stopping.is_set():
                    return
                if reads:
                    requests.append(read_request(connection))
                behaviours[min(calls, len(behaviours) - 1)](connection)
                calls += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield requests
    finally:
        stopping.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join()
        listener.close()
        path.unlink()


def answering(answer: bytes) -> Callable[[socket.socket], object]:
    return lambda connection: connection.sendall(answer)
