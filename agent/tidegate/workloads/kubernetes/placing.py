"""Where the network namespace of a pod is.

1. A CNI call has told it.
2. Of the processes in the pod's cgroup, which the kubelet names by the pod's UID, the oldest: the sandbox's own, where
   the runtime has one. A container can make a network namespace of its own, and a process that is being started is
   still in the node's, so a namespace counts only if it is not the node's and has the pod's address, or had it when
   it was found: a pod may take its address away, and is not to get away by that.

No other process is looked at. A name in /run/netns is preferred to /proc/PID/ns/net: it stays when processes go.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tidegate.kernel import links, netns
from tidegate.kernel.errors import KernelError
from tidegate.workloads.kubernetes.pods import Pod

FindAttachment: TypeAlias = Callable[[str, str, str], str | None]
"""From UID, namespace and name of a pod to the path of its network namespace, where a CNI call has told it."""

_TREE = "kubepods"
"""How the kubelet calls the cgroup of all pods (pkg/kubelet/cm, defaultNodeAllocatableCgroupName)."""
_CLASSES = ("burstable", "besteffort")
"""Cgroups below it; pods whose resources are guaranteed are in none of them."""
_SLICE = ".slice"
_MAX_DEPTH = 3
"""Of that cgroup below where cgroups are mounted: memory/kubelet/kubepods on a node of version 1."""
_MAX_CGROUPS = 64
_MAX_PROCESSES = 256
"""Of one pod: how many are looked at, for the oldest."""
_MAX_OF_CGROUP = 16
"""Of these in each cgroup; a sandbox has one for itself."""
_MAX_LIST_BYTES = 64 << 10
_SEARCH_S = 10.0
"""How often the cgroup of all pods is searched for again, by a pod that is not where others are."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESRCH)


class Placed(NamedTuple):
    """Where a pod is."""

    path: str
    """Of its network namespace."""


class NotPlaced(NamedTuple):
    """A pod that is nowhere to be found."""

    why: str


class _Found(NamedTuple):
    """A network namespace that was found by a process."""

    path: str
    identity: netns.Identity
    cgroup: Path
    """That of the process: it goes with the container, so that the number of the process is nobody else's meanwhile."""


class Places:
    """Where the pods of this node are; used by one thread at a time."""

    def __init__(self, cgroups: Path, find_attachment: FindAttachment) -> None:
        """`cgroups` is where the node's cgroups are mounted, of version 1, 2, or both."""
        self._cgroups = cgroups
        self._find_attachment = find_attachment
        self._found: dict[str, _Found] = {}
        self._trees: tuple[Path, ...] = ()
        self._searched_at: float | None = None
        self._node: netns.Identity | None = None
        self._names: dict[netns.Identity, str] | None = None

    def begin(self) -> None:
        """What was read of the whole node is read anew when it is needed next."""
        self._names = None
        self._node = None

    def keep(self, uids: Iterable[str]) -> None:
        """Forgets all other pods."""
        living = set(uids)
        for uid in self._found.keys() - living:
            del self._found[uid]

    def place(self, pod: Pod) -> Placed | NotPlaced:
        """Where a pod is at the moment."""
        told = self._find_attachment(pod.uid, pod.namespace, pod.name)
        if told is not None and self._identity(told) is not None:
            return Placed(told)
        found = self._found.get(pod.uid)
        if found is None or not _is_still(found):
            searched = self._search(pod, found.identity if found else None)
            if isinstance(searched, NotPlaced):
                stays = found is not None and self._outlives(pod, found)
                return Placed(found.path) if found and stays else searched
            found = self._found[pod.uid] = searched
        return Placed(found.path)

    def _outlives(self, pod: Pod, found: _Found) -> bool:
        """Whether the namespace goes on without a process: others may come until the kubelet removes the pod's cgroup.

        So it is where a sandbox has no process of its own (CRI-O), while the only container is started again.
        """
        is_named = Path(found.path).parent == netns.DIRECTORY
        return is_named and _leads_there(found) and self._directory(pod.uid) is not None

    def _search(self, pod: Pod, before: netns.Identity | None) -> _Found | NotPlaced:
        """`before` is where it was the last time."""
        directory = self._directory(pod.uid)
        if directory is None:
            return NotPlaced(f"there is no cgroup of it below {self._cgroups}")
        processes = _processes(directory)
        if not processes:
            return NotPlaced(f"its cgroup {directory} has no processes")
        if all(process.pid == 0 for process in processes):
            return NotPlaced(
                "its processes are in another PID namespace than the agent; expected an agent with hostPID"
            )
        why = "all its processes are in the node's network namespace"
        tried: set[netns.Identity] = set()
        first: _Found | None = None
        for process in processes:
            path = f"/proc/{process.pid}/ns/net"
            try:
                identity = netns.identity(path)
                if identity in tried or identity == self._of_node():
                    continue
                tried.add(identity)
                if identity == before:
                    return self._found_at(path, identity, process)
                if first is None and _has_address(path, pod.addresses):
                    first = self._found_at(path, identity, process)
                why = f"none of {', '.join(pod.addresses)} is in the network namespace of its processes"
            except KernelError as error:
                if error.errno not in _GONE:
                    why = str(error)
        return first or NotPlaced(why)

    def _found_at(self, path: str, identity: netns.Identity, process: "_Process") -> _Found:
        return _Found(self._named(identity) or path, identity, process.cgroup)

    def _identity(self, path: str) -> netns.Identity | None:
        try:
            identity = netns.identity(path)
        except KernelError:
            # A pod that has just ended; who told of it will say so.
            return None
        return None if identity == self._of_node() else identity

    def _of_node(self) -> netns.Identity:
        if self._node is None:
            self._node = _of_node()
        return self._node

    def _named(self, identity: netns.Identity) -> str | None:
        if self._names is None:
            self._names = {}
            for name in netns.names():
                path = str(netns.DIRECTORY / name)
                try:
                    self._names.setdefault(netns.identity(path), path)
                except KernelError:
                    # It went while it was looked at.
                    continue
        return self._names.get(identity)

    def _directory(self, uid: str) -> Path | None:
        """The cgroup of a pod that has processes, or else any."""
        existing = [path for path in _candidates(self._trees, uid) if path.is_dir()]
        if not existing and self._is_search_due():
            self._trees = tuple(_trees(self._cgroups, _MAX_DEPTH))
            existing = [path for path in _candidates(self._trees, uid) if path.is_dir()]
        return next((path for path in existing if _processes(path)), next(iter(existing), None))

    def _is_search_due(self) -> bool:
        now = time.monotonic()
        if self._searched_at is not None and now - self._searched_at < _SEARCH_S and self._trees:
            return False
        self._searched_at = now
        return True


def _of_node() -> netns.Identity:
    """The node's own network namespace: that of its first process, which an agent sees that can find pods at all."""
    try:
        return netns.identity("/proc/1/ns/net")
    except KernelError:
        return netns.identity(netns.CURRENT)


def _is_still(found: _Found) -> bool:
    return _leads_there(found) and found.cgroup.is_dir()


def _leads_there(found: _Found) -> bool:
    """What cannot be looked at is not gone."""
    try:
        return netns.identity(found.path) == found.identity
    except KernelError as error:
        return error.errno not in _GONE


def _has_address(path: str, addresses: tuple[str, ...]) -> bool:
    """Whether one of a pod's addresses is in the namespace; of a pod that has none yet nothing can be asked."""
    return not addresses or not set(addresses).isdisjoint(links.reach(path).addresses)


def _trees(directory: Path, depth: int) -> Iterator[Path]:
    """Cgroups of all pods: kubepods, kubepods.slice, kubelet-kubepods.slice. One for each hierarchy of version 1."""
    try:
        children = sorted(entry.path for entry in os.scandir(directory) if entry.is_dir())
    except OSError:
        # A cgroup that went while it was looked at, or cgroups that are not there: no pod is found, and told.
        return
    for child in map(Path, children):
        stem = child.name.removesuffix(_SLICE)
        if stem == _TREE or (stem != child.name and stem.endswith(f"-{_TREE}")):
            yield child
        elif depth > 1:
            yield from _trees(child, depth - 1)


def _candidates(trees: Iterable[Path], uid: str) -> Iterator[Path]:
    """Where the kubelet makes a pod's cgroup, with either driver (pkg/kubelet/cm, ToSystemd and ToCgroupfs)."""
    escaped = uid.replace("-", "_")
    for tree in trees:
        if tree.name.endswith(_SLICE):
            stem = tree.name.removesuffix(_SLICE)
            yield tree / f"{stem}-pod{escaped}{_SLICE}"
            for one in _CLASSES:
                yield tree / f"{stem}-{one}{_SLICE}" / f"{stem}-{one}-pod{escaped}{_SLICE}"
        else:
            yield tree / f"pod{uid}"
            for one in _CLASSES:
                yield tree / one / f"pod{uid}"


class _Process(NamedTuple):
    began: int
    """In ticks since the machine's start (proc_pid_stat(5), starttime)."""
    pid: int
    """0 for one that is not seen from here."""
    cgroup: Path


def _processes(directory: Path) -> list[_Process]:
    """Processes of a cgroup and those below it, the oldest first; of very many the first of each cgroup."""
    found: list[_Process] = []
    waiting = [directory]
    seen = 0
    while waiting and seen < _MAX_CGROUPS:
        cgroup = waiting.pop(0)
        seen += 1
        for pid in _pids(cgroup):
            if len(found) == _MAX_PROCESSES:
                break
            began = _began(pid)
            if began is not None:
                found.append(_Process(began, pid, cgroup))
        try:
            waiting += sorted(Path(entry.path) for entry in os.scandir(cgroup) if entry.is_dir())
        except OSError:
            # It went while it was looked at.
            continue
    return sorted(found)


def _pids(cgroup: Path) -> list[int]:
    try:
        with (cgroup / "cgroup.procs").open("rb") as stream:
            content = stream.read(_MAX_LIST_BYTES)
    except OSError:
        # It went while it was looked at, or is one of threads only.
        return []
    return [int(line) for line in content.split()[:_MAX_OF_CGROUP]]


def _began(pid: int) -> int | None:
    """When a process began, None when it is gone."""
    if pid == 0:
        return 0
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses is the process's own to choose; starttime is the 20th field behind it.
    return int(stat.rpartition(b")")[2].split()[19])
