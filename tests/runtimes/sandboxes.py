"""Pods of a Kubernetes node without the cost of a runtime: a sandbox each, with a real network namespace and cgroup.

The network is made here; then tidegate's plugin is called with what a container runtime gives it for a pod that is
chained after bridge (containerd's internal/cri/server/sandbox_run.go). Sandboxes are where containerd has them: their
namespaces in /run/netns/cni-..., their process in the cgroup of the pod.
"""

import itertools
import json
import os
import socket
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodes import Node, until
from worlds import ADDRESS, PORT

from tidegate.kernel import links, netns

PLUGIN = Path("/opt/cni/bin/tidegate-cni")
GATEWAY = "10.81.255.254"
_KUBEPODS = "/sys/fs/cgroup/kubepods"
_TIMEOUT_S = 3.0

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """What the plugin said."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Of an error; empty when there is none."""
        if not self.code:
            return ""
        told = json.loads(self.out)
        return f"{told['msg']} {told.get('details', '')}"


@dataclass
class Sandbox:
    """A pod's sandbox: what stays the same from its start to its end."""

    node: Node
    name: str
    namespace: str = "shop"
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    container_id: str = field(default_factory=lambda: os.urandom(32).hex())
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def netns(self) -> str:
        """Path of its network namespace, on the node."""
        return f"/run/netns/cni-{self.uid}"

    @property
    def address(self) -> str:
        return f"10.81.{self.number >> 8}.{self.number & 0xFF}"

    @property
    def host_interface(self) -> str:
        return f"veth{self.number}"

    def make(self, *, process: bool = False) -> None:
        """Its namespace with an interface that leads to the node; and a process in its cgroup, as a pause container."""
        self.node.run(self._make)
        if process:
            self.start_process()

    def start_process(self) -> None:
        """One in the pod's cgroup."""
        self.node.run(self._start_process)

    def end_process(self) -> None:
        """It is killed, and its cgroup goes; the pod's stays, and the namespace."""
        cgroup = self.node.path(self._pod_cgroup) / self.container_id
        (cgroup / "cgroup.kill").write_text("1")
        self._process.wait()
        until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text(), "it is gone")
        cgroup.rmdir()

    def remove(self) -> None:
        """Ends its process and takes its namespace away."""
        cgroup = self.node.path(self._pod_cgroup)
        if cgroup.exists():
            (cgroup / "cgroup.kill").write_text("1")
            self._process.wait()
            (cgroup / self.container_id).rmdir()
            cgroup.rmdir()
        self.node.run(netns.delete, Path(self.netns).name)

    def call(self, command: str, plugin: Mapping[str, object]) -> Answer:
        """Calls tidegate's plugin; `plugin` is its entry in the conflist."""
        arguments = {
            "IgnoreUnknown": "1",
            "K8S_POD_NAMESPACE": self.namespace,
            "K8S_POD_NAME": self.name,
            "K8S_POD_INFRA_CONTAINER_ID": self.container_id,
            "K8S_POD_UID": self.uid,
        }
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": "eth0",
            "CNI_ARGS": ";".join(f"{name}={value}" for name, value in arguments.items()),
            "CNI_PATH": str(PLUGIN.parent),
        }
        config = {"cniVersion": "1.0.0", "name": "pods", **plugin, "prevResult": self._result}
        done = self.node.call(PLUGIN, env=env, stdin=json.dumps(config))
        return Answer(done.returncode, done.stdout, done.stderr)

    def reaches(self, address: str = ADDRESS, port: int = PORT) -> str:
        """Who answers a connection from the pod: the first word of the greeting, or how it failed."""
        return self.node.run(netns.run_in, self.netns, greeted, address, port)

    def serve(self, port: int, name: str) -> "Server":
        """Something that listens in the pod and greets with its name."""
        return Server(
            self.node.run(netns.run_in, self.netns, socket.create_server, ("", port)), name
        )

    @property
    def _pod_cgroup(self) -> str:
        return f"{_KUBEPODS}/besteffort/pod{self.uid}"

    @property
    def _result(self) -> dict[str, Any]:
        return {
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": self.host_interface},
                {"name": "eth0", "sandbox": self.netns},
            ],
            "ips": [{"address": f"{self.address}/16", "gateway": GATEWAY, "interface": 1}],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dns": {},
        }

    def _make(self) -> None:
        path = netns.create(Path(self.netns).name)
        here = self.node.netns
        links.create_veth(path, "eth0", here, self.host_interface)
        links.set_up(path, "lo")
        for where, interface, address in (
            (path, "eth0", f"{self.address}/16"),
            (here, self.host_interface, f"{GATEWAY}/32"),
        ):
            links.set_up(where, interface)
            links.add_address(where, interface, address)
        links.add_route(path, "0.0.0.0/0", gateway=GATEWAY)
        links.add_route(here, f"{self.address}/32", interface=self.host_interface)

    def _start_process(self) -> None:
        cgroup = Path(self._pod_cgroup, self.container_id)
        cgroup.mkdir(parents=True)
        script = f"echo $$ > {cgroup}/cgroup.procs && exec sleep 2147483647"
        self._process = netns.spawn(self.netns, ["sh", "-c", script], start_new_session=True)


class Server:
    """A listening socket with somebody behind it who greets by name."""

    def __init__(self, listener: socket.socket, name: str) -> None:
        self._listener = listener
        self._name = name
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes whoever waits in accept, which close does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(f"{self._name} \n".encode())


def greeted(address: str, port: int) -> str:
    """Who answers there: the first word of the greeting, or how it failed. From the calling thread's namespace."""
    try:
        with socket.create_connection((address, port), _TIMEOUT_S) as connection:
            connection.settimeout(_TIMEOUT_S)
            return connection.recv(256).decode().split(" ")[0]
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "silence"
