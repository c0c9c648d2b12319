"""Real container runtimes on a Node (nodes.py): containerd by its `ctr run --cni`, and podman with CNI networks.

Both find the same chain of plugins: bridge and portmap of Debian's containernetworking-plugins, and what the test puts
behind them. Containers are those of images.py.
"""

import base64
import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import images
from nodes import Node, until

NETWORK = "pods"
SUBNET = "10.81.0.0/16"
BRIDGE = "cni0"
PLUGINS = Path("/opt/cni/bin")
CONFLIST = Path("/etc/cni/net.d/10-pods.conflist")
"""Where `ctr` looks for it; podman is told to look there too."""

CONTAINERD = "/run/containerd/containerd.sock"

_CRI = Path(__file__).with_name("cri.py")
_DEBIAN_PLUGINS = Path("/usr/lib/cni")
_USED_PLUGINS = ("bridge", "portmap", "host-local", "loopback", "tuning")
_CONFIGURATION = f"""
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[debug]
level = "warn"
[grpc]
address = "{CONTAINERD}"
# A cgroup of this machine may have no controllers, and a score below one's own takes CAP_SYS_RESOURCE.
[plugins."io.containerd.grpc.v1.cri"]
disable_cgroup = true
restrict_oom_score_adj = true
sandbox_image = "{images.NAME}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{PLUGINS}"
conf_dir = "{CONFLIST.parent}"
"""
# crun wants to raise the limit of locked memory, and podman that of files, which takes CAP_SYS_RESOURCE.
_PODMAN = f"""
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
pids_limit = 0
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "cni"
network_config_dir = "{CONFLIST.parent}"
cni_plugin_dirs = ["{PLUGINS}"]
"""


@dataclass(frozen=True)
class Ended:
    """What became of a container that ran to its end, or of one that never began."""

    code: int
    out: str
    complaint: str
    """What the runtime, and through it a plugin, had to say."""


class Runtime(Protocol):
    """What tests ask of a container runtime. A script is for the container's shell.

    A container has a network of its own, or that of another one that it is `beside`.
    """

    def run(self, name: str, script: str, *, beside: str | None = None) -> Ended:
        """Runs a container to its end, and removes it."""

    def start(self, name: str, script: str, *, beside: str | None = None) -> Ended:
        """Starts a container that goes on."""

    def pid(self, name: str) -> int:
        """The first process of a container that was started."""

    def remove(self, name: str) -> None:
        """Stops a container and takes its network away."""


class Containerd:
    """containerd, and `ctr`, which calls the chain itself (go-cni)."""

    def __init__(self, node: Node, archive: Path) -> None:
        self._node = node
        self._archive = archive

    @contextlib.contextmanager
    def running(self) -> Iterator["Containerd"]:
        """A daemon of the node's own, with the image."""
        write(self._node, Path("/etc/containerd/config.toml"), _CONFIGURATION)
        log = self._node.disk / "containerd.log"
        with log.open("ab") as out:
            daemon = self._node.spawn(["containerd"], stdout=out, stderr=out)
        try:
            until(lambda: self._answers(daemon, log), "containerd answers", log.read_text)
            for namespace in ("default", "k8s.io"):
                self._node.do("ctr", "--namespace", namespace, "images", "import", self._archive)
            yield self
        finally:
            daemon.terminate()
            daemon.wait(30)

    def run(self, name: str, script: str, *, beside: str | None = None) -> Ended:
        return self._run("--rm", name, script, beside)

    def start(self, name: str, script: str, *, beside: str | None = None) -> Ended:
        return self._run("--detach", name, script, beside)

    def pid(self, name: str) -> int:
        for line in self._node.do("ctr", "tasks", "list").splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
        raise AssertionError(f"no container {name}")

    def remove(self, name: str) -> None:
        """`ctr` never calls the chain with DEL for a container that it started and left alone."""
        self._node.call("ctr", "tasks", "kill", "--signal", "KILL", name)
        self._node.call("ctr", "tasks", "delete", name)
        self._node.do("ctr", "containers", "delete", name)

    def _run(self, how: str, name: str, script: str, beside: str | None) -> Ended:
        network = ["--cni"]
        if beside is not None:
            network = ["--with-ns", f"network:/proc/{self.pid(beside)}/ns/net"]
        # The machine's cgroups may have no controller for shares.
        options = [how, *network, "--cpu-shares", "0"]
        return _ended(
            self._node.call("ctr", "run", *options, images.NAME, name, "sh", "-c", script)
        )

    def _answers(self, daemon: "subprocess.Popen[Any]", log: Path) -> bool:
        assert daemon.poll() is None, f"containerd ended: {log.read_text()}"
        return self._node.call("ctr", "version").returncode == 0


class Podman:
    """podman, which has no daemon, with its CNI backend."""

    def __init__(self, node: Node, archive: Path) -> None:
        self._node = node
        self._archive = archive

    @contextlib.contextmanager
    def running(self) -> Iterator["Podman"]:
        """podman on this node, with the image."""
        write(self._node, Path("/etc/containers/containers.conf"), _PODMAN)
        self._node.do("podman", "load", "--input", self._archive)
        yield self

    def run(self, name: str, script: str, *, beside: str | None = None) -> Ended:
        return self._run(["--rm"], name, script, beside)

    def start(
        self,
        name: str,
        script: str,
        *,
        beside: str | None = None,
        ports: Mapping[int, int] | None = None,
    ) -> Ended:
        """`ports` are published: the node's to the container's."""
        published = [f"--publish={outside}:{inside}" for outside, inside in (ports or {}).items()]
        return self._run(["--detach", *published], name, script, beside)

    def pid(self, name: str) -> int:
        return int(self._node.do("podman", "inspect", "--format", "{{.State.Pid}}", name))

    def remove(self, name: str) -> None:
        self._node.do("podman", "rm", "--force", "--time", "0", name)

    def _run(self, options: Sequence[str], name: str, script: str, beside: str | None) -> Ended:
        network = NETWORK if beside is None else f"container:{beside}"
        options = [*options, "--network", network, "--name", name]
        return _ended(self._node.call("podman", "run", *options, images.NAME, "sh", "-c", script))


class Cri:
    """containerd as a kubelet uses it. Messages are cri.py's."""

    def __init__(self, node: Node) -> None:
        self._client = node.spawn(
            ["/usr/bin/python3", _CRI, CONTAINERD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Cri":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.communicate()

    def told(self) -> str:
        """What the runtime tells of itself, the chain that it has loaded included; not all of it is text."""
        told = self._call("Status", {1: 1})["ok"]["2"]
        return "".join(base64.b64decode(entry).decode(errors="replace") for entry in told)

    def run_pod(self, namespace: str, name: str, uid: str) -> tuple[str, str]:
        """The id of a new pod's sandbox; or an empty one, and why there is none."""
        answer = self._call("RunPodSandbox", {1: self._pod(namespace, name, uid)})
        return _text(answer["ok"]["1"][0]) if "ok" in answer else "", answer.get("error", "")

    def run_container(self, sandbox: str, namespace: str, name: str, uid: str, script: str) -> str:
        """Starts a container in a pod; its id."""
        container = {
            1: {1: "app"},
            2: {1: images.NAME},
            3: ["sh", "-c", script],
            15: {2: {3: _NAMESPACES}},
        }
        request = {1: sandbox, 2: container, 3: self._pod(namespace, name, uid)}
        answer = self._call("CreateContainer", request)
        made = _text(answer["ok"]["1"][0])
        self._call("StartContainer", {1: made})
        return made

    def execute(self, container: str, *command: str) -> str:
        """What a command in a container printed, its complaints included."""
        answer = self._call("ExecSync", {1: container, 2: [*command], 3: 10})["ok"]
        return "".join(_text(part) for field in ("1", "2") for part in answer.get(field, ()))

    def remove_pod(self, sandbox: str) -> None:
        """Stops a pod and forgets it."""
        for method in ("StopPodSandbox", "RemovePodSandbox"):
            answer = self._call(method, {1: sandbox})
            assert "ok" in answer, answer

    def _call(self, method: str, message: object) -> Any:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.write(json.dumps([method, message]) + "\n")
        self._client.stdin.flush()
        return json.loads(self._client.stdout.readline())

    def _pod(self, namespace: str, name: str, uid: str) -> Any:
        """A PodSandboxConfig."""
        return {
            1: {1: name, 2: uid, 3: namespace},
            2: name,
            3: "/run/pods",
            8: {2: {1: _NAMESPACES}},
        }


# NamespaceOption: the pod's network, each container's own processes.
_NAMESPACES = {1: 0, 2: 1}


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()


def configure(node: Node, *plugins: Mapping[str, object]) -> None:
    """Installs Debian's plugins and a chain of bridge, portmap and `plugins`; no other chain is left."""
    node.do("mkdir", "-p", PLUGINS, CONFLIST.parent)
    node.do("cp", *(_DEBIAN_PLUGINS / name for name in _USED_PLUGINS), PLUGINS)
    for other in node.run(lambda: [*CONFLIST.parent.iterdir()]):
        node.run(other.unlink)
    write(node, CONFLIST, chain(plugins))


def chain(plugins: Sequence[Mapping[str, object]] = ()) -> str:
    """The conflist of bridge, portmap and `plugins`."""
    ranges = [[{"subnet": SUBNET}]]
    ipam = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps(
        {"cniVersion": "0.4.0", "name": NETWORK, "plugins": [bridge, portmap, *plugins]}
    )


def write(node: Node, path: Path, text: str) -> None:
    """Writes a file of the node."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    node.run(write)


def _ended(done: "subprocess.CompletedProcess[str]") -> Ended:
    return Ended(done.returncode, done.stdout, done.stderr)
