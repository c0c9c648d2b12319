"""Where the benchmarks work: namespaces and a directory of their own, gone afterwards.

Everything bears the name tg-bench-<pid>-...; so a run that was killed is recognised and cleaned away by the
next one. Knows nothing of what is measured.
"""

import contextlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import msgspec
import psutil

from tidegate.kernel import links, netns
from tidegate.lab import mounts

REPOSITORY = Path(__file__).parents[2]

PREFIX = "tg-bench"
_OWNED = re.compile(rf"{PREFIX}-(\d+)-.*")
_PROGRAM = "tests.bench"
_DEADLINE_S = 5.0

NODE_IPV4, POD_IPV4 = "10.78.0.1", "10.78.0.2"
NODE_IPV6, POD_IPV6 = "fd78::1", "fd78::2"


class Pair(msgspec.Struct, frozen=True):
    """A pod and its node, joined by a veth: pod's eth0 <-> node's host0."""

    pod: str
    """Path of the network namespace."""
    node: str


class Site:
    """One run's own corner of the machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._made = 0

    def namespace(self) -> str:
        """Path of a new network namespace with its loopback up."""
        self._made += 1
        path = netns.create(f"{PREFIX}-{os.getpid()}-{self._made}")
        links.set_up(path, "lo")
        return path

    def remove_namespace(self, path: str) -> None:
        """Takes a namespace away."""
        netns.delete(Path(path).name)

    def pair(self) -> Pair:
        """Two new namespaces joined by a veth pair, with addresses of both families."""
        made = Pair(self.namespace(), self.namespace())
        links.create_veth(made.pod, "eth0", made.node, "host0")
        for path, interface, ipv4, ipv6 in (
            (made.pod, "eth0", POD_IPV4, POD_IPV6),
            (made.node, "host0", NODE_IPV4, NODE_IPV6),
        ):
            links.set_up(path, interface)
            links.add_address(path, interface, f"{ipv4}/24")
            links.add_address(path, interface, f"{ipv6}/64")
        return made

    def bpffs(self) -> Path:
        """A BPF file system of this run's own."""
        directory = self.directory / "bpf"
        mounts.mount_bpffs(directory)
        return directory


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """A corner for one run; leftovers of runs that are no more go first."""
    sweep()
    old = signal.signal(signal.SIGTERM, _as_interrupt)
    directory = tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-")
    try:
        yield Site(Path(directory))
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sweep()
        signal.signal(signal.SIGTERM, old)
        signal.signal(signal.SIGINT, interrupt)


def sweep() -> None:
    """Removes what this process, or benchmarks that do not run any more, have left on the machine."""
    names = [name for name in netns.names() if _is_left(name)]
    left = [process for name in names for process in _processes(name)]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, _DEADLINE_S)
    for name in names:
        netns.delete(name)
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*"):
        if _is_left(directory.name):
            mounts.unmount_below(directory)
            shutil.rmtree(directory)


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _processes(name: str) -> Iterator[psutil.Process]:
    """Those in a namespace; a name without a namespace behind it has none."""
    for pid in netns.pids(netns.path(name)):
        if pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)


def _is_left(name: str) -> bool:
    match = _OWNED.fullmatch(name)
    if match is None:
        return False
    pid = int(match[1])
    if pid == os.getpid():
        return True
    try:
        return _PROGRAM not in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return True
