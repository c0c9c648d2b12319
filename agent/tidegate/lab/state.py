"""What a lab leaves on disk while it is up: where each file lies, its shape, and how it is written.

Everything is below /run/tidegate/lab/<lab>/, which only root may list, and is gone after `down`.
Files are replaced as a whole by rename, so a reader never sees half of one. Knows no namespaces and
no processes.
"""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from tidegate.errors import TidegateError
from tidegate.lab.spec import AppKind, CallKind, LabSpec

BASE = Path("/run/tidegate/lab")
MAX_STATE_BYTES = 4 << 20

_State = TypeVar("_State")


class LabError(TidegateError):
    """The lab cannot do what was asked."""


class LabBusyError(LabError):
    """Another command is changing the lab right now."""


class LabPaths:
    """Where the files of one lab lie."""

    def __init__(self, lab: str) -> None:
        self.lab = lab
        self.root = BASE / lab
        self.lock = BASE / f"{lab}.lock"
        self.spec = self.root / "spec.json"
        self.layout = self.root / "layout.json"
        self.written_config = self.root / "config.json"
        """The config entries of the lab file that the server has got."""
        self.complete = self.root / "complete"
        """There once an `up` has run to its end."""
        self.hosts = self.root / "hosts"
        self.bpf = self.root / "bpf"
        self.logs = self.root / "logs"
        self.traffic = self.root / "traffic"
        self.apps = self.root / "apps"
        self.processes = self.root / "processes"
        self.nodes = self.root / "nodes"
        self.server_state = self.root / "server"
        self.server_config = self.root / "server.yaml"
        self.server_socket = self.root / "server.sock"

    def node(self, node: str) -> Path:
        return self.nodes / node

    def agent_config(self, node: str) -> Path:
        return self.node(node) / "agent.yaml"

    def agent_socket(self, node: str) -> Path:
        return self.node(node) / "agent.sock"

    def agent_run(self, node: str) -> Path:
        return self.node(node) / "run"

    def agent_state(self, node: str) -> Path:
        return self.node(node) / "state"

    def agent_pins(self, node: str) -> Path:
        return self.bpf / node

    def workloads(self, node: str) -> Path:
        return self.node(node) / "workloads"

    def workload(self, node: str, pod: str) -> Path:
        return self.workloads(node) / f"{pod}.json"

    def log(self, process: str) -> Path:
        return self.logs / f"{process}.log"

    def process(self, process: str) -> Path:
        return self.processes / f"{process}.json"

    def app(self, pod: str) -> Path:
        return self.apps / f"{pod}.json"

    def app_key(self, pod: str) -> Path:
        return self.apps / f"{pod}.key"

    def app_certificate(self, pod: str) -> Path:
        return self.apps / f"{pod}.crt"

    def statistics(self, pod: str) -> Path:
        return self.traffic / f"{pod}.json"


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A process that the lab started."""

    pid: int
    started_ticks: int
    """Start time in clock ticks since boot (/proc/pid/stat field 22): tells reused pids apart."""
    digest: str
    """Of everything that the process was started with; another one means: start it anew."""


class TargetStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """How one caller fares with one target. Times are seconds since the Unix epoch, 0 for never."""

    target: str
    port: int
    kind: CallKind
    ok: int = 0
    failed: int = 0
    """Requests with a wrong answer, an error, or no answer in time."""
    connections: int = 0
    in_flight: int = 0
    last_ok_at: float = 0.0
    last_error: str = ""
    last_error_at: float = 0.0


class AppStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What the application of a pod has done since it started."""

    pod: str
    pid: int
    written_at: float
    served: int = 0
    """Requests that the application answered."""
    targets: tuple[TargetStatistics, ...] = ()


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    namespace: str
    addresses: tuple[str, ...]
    agent_pid: int
    """0: never started."""
    agent_alive: bool
    agent_answers: bool
    problems: tuple[str, ...] = ()
    """What the agent says is wrong."""


class SidecarStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the node's agent says about one workload."""

    meshed: bool = False
    """Whether its sidecar runs and its redirection is in place."""
    state: str = ""
    """Of the sidecar; empty while there is none."""
    restarts: int = 0
    mode: str = ""
    redirect: str = ""
    repairs: int = 0
    """How often its redirection was changed by somebody else and put back."""
    last_repair: str = ""
    notes: tuple[str, ...] = ()
    """What goes around its sidecar although its redirection is as it should be."""
    observed_since: float = 0.0
    """0 while it is not observed."""
    problem: str = ""


class PodStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    node: str
    service: str
    port: int
    namespace: str
    addresses: tuple[str, ...]
    mesh: bool
    """Whether the pod should be meshed."""
    app_kind: AppKind
    app_pid: int
    """0: never started."""
    app_alive: bool
    statistics: AppStatistics | None
    """None while the application has not written any."""
    agent: SidecarStatus | None
    """None while the node's agent does not answer or does not know the pod."""


class LabStatus(msgspec.Struct, frozen=True, kw_only=True):
    lab: str
    server_pid: int
    server_alive: bool
    nodes: tuple[NodeStatus, ...]
    pods: tuple[PodStatus, ...]


def labs() -> tuple[str, ...]:
    """Names of the labs that are up, or that a crash left behind, sorted."""
    try:
        return tuple(sorted(entry.name for entry in BASE.iterdir() if entry.is_dir()))
    except FileNotFoundError:
        return ()


def read_spec(paths: LabPaths) -> LabSpec:
    """The lab's own copy of its file. LabError when the lab is not up."""
    spec = read(paths.spec, LabSpec)
    if spec is None:
        raise LabError(f"lab {paths.lab} is not up; `tidegate lab up` starts one")
    return spec


def read(path: Path, kind: type[_State]) -> _State | None:
    """The content of a state file, None when there is none. LabError when it does not decode."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        raw = stream.read(MAX_STATE_BYTES + 1) or b""
    if len(raw) > MAX_STATE_BYTES:
        raise LabError(f"{path} is larger than {MAX_STATE_BYTES} bytes")
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise LabError(
            f"{path} is damaged ({error}); `tidegate lab down` clears it away"
        ) from error


def write(path: Path, content: msgspec.Struct) -> None:
    """Replace a state file, readable by root only."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(content)))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole, mode 0600."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def locked(paths: LabPaths) -> Iterator[None]:
    """Keep every other command from changing the lab meanwhile. LabBusyError when one already does.

    A lab that does not exist at the end leaves no lock file either.
    """
    descriptor = _lock(paths)
    try:
        yield
    finally:
        if not paths.root.exists():
            paths.lock.unlink()
            _remove_if_empty(BASE)
            _remove_if_empty(BASE.parent)
        os.close(descriptor)


def _lock(paths: LabPaths) -> int:
    while True:
        try:
            BASE.mkdir(mode=0o711, parents=True, exist_ok=True)
            descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            # Another lab has left meanwhile, and taken the empty directory with it.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LabBusyError(
                f"lab {paths.lab} is being changed by another command; try again when it is done"
            ) from None
        if _names(paths.lock, descriptor):
            return descriptor
        os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path still leads to the open file: its last owner may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise
