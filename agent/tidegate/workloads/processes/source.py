"""Services found by unit, process, port or place.

Each service is looked for anew in every round: its network namespace is the workload, whichever process is in it. One
that is not found for a while, such as one that is being restarted, stays where it was as long as that namespace is
there: it would come back unredirected otherwise. The host's own namespace is nobody's: a service that is found in there
is left alone, unless its configuration says host_network. Nothing is started to find out, no shell and no systemctl.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from tidegate.errors import InputError
from tidegate.kernel import netns, sockets
from tidegate.kernel.errors import KernelError
from tidegate.model import ServiceName
from tidegate.workloads.processes.settings import ProcessConfig
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment

LOOKED_S = 2.0
"""How often all namespaces are looked through for a port on which nobody was found to listen."""

_CGROUPS = tuple(map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified")))
"""Where systemd keeps its units, with cgroup v2, v1, or both."""
HOST = "/proc/self/ns/net"
"""Path of the host's own network namespace, for the agent, which is in it."""
_FIRST_PROCESS = "/proc/1/ns/net"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOST_CGROUPS = 1000
"""Of one unit that are looked through: whoever may delegate could make any number."""
_MAX_PID_FILE = 32


class _NotFound(Exception):
    """Nobody knows now where a service is; the message is a whole sentence."""


class _Place(msgspec.Struct, frozen=True):
    """Where a service was found."""

    path: str
    namespace: netns.Identity
    since: float | None = None
    """When the process that was found in it was started."""


class _Numbered(NamedTuple):
    """A process that was named by its number."""

    said: tuple[int, int]
    """The number, and when it was written, in nanoseconds since the epoch: 0 for one of the configuration."""
    process: psutil.Process


class ProcessSource:
    """The services that the configuration names, wherever they are at the moment."""

    def __init__(self, processes: tuple[ProcessConfig, ...], node: str) -> None:
        """`processes` have been checked."""
        self._processes = processes
        self._node = node
        self._finder = _Finder()
        self._found: dict[str, _Place] = {}
        """Where each service was when it was found last, by the name of its workload."""
        self._annotations: dict[str, dict[str, str]] = {}
        """By the same: once they are known, whoever knows users on this machine may be away."""
        self._left_alone: tuple[LeftAlone, ...] = ()
        self._problems: tuple[str, ...] = ()
        self._is_complete = True

    def list(self) -> tuple[Description, ...]:
        """The services that run, or whose network namespace is there for them, in the order of the configuration."""
        found: list[Description] = []
        left: list[LeftAlone] = []
        problems: list[str] = []
        self._is_complete = True
        self._finder.begin()
        for one in self._processes:
            try:
                place, problem = self._place(one)
                problems += [problem] if problem else []
                if place is None:
                    continue
                if place.namespace in self._finder.host and one.host_network is None:
                    left.append(self._in_host_namespace(one))
                    self._found.pop(one.workload_name, None)
                else:
                    found.append(self._described(one, place))
                    self._found[one.workload_name] = place
            except (InputError, KernelError, OSError) as error:
                self._is_complete = False
                problems.append(f"{one.service} cannot be looked for: {error}")
        self._left_alone = tuple(left)
        self._problems = tuple(problems)
        return tuple(found)

    def _place(self, one: ProcessConfig) -> tuple[_Place | None, str]:
        """Where a service is, or was last if it is not found now, None when that is gone; and why it is not found."""
        former = self._found.get(one.workload_name)
        try:
            found = self._finder.find(one)
        except _NotFound as error:
            problem = str(error)
        except (KernelError, OSError) as error:
            self._is_complete = False
            problem = f"{one.service} cannot be looked for: {error}"
        else:
            # Another process in it does not make it another workload.
            if former is not None and former.namespace == found.namespace:
                return msgspec.structs.replace(found, since=former.since), ""
            if former is None or not self._only_starts(one, found):
                return found, ""
            problem = f"{one.service} shares the host's network namespace, and {former.path} is kept for it"
            return (former, problem) if _is_there(former) else (found, "")
        return former if former is not None and _is_there(former) else None, problem

    def _only_starts(self, one: ProcessConfig, found: _Place) -> bool:
        """Whether it may have to enter its own namespace yet, as what `ip netns exec` and ExecStartPre start."""
        return one.host_network is None and found.namespace in self._finder.host

    def left_alone(self) -> tuple[LeftAlone, ...]:
        """Those that share the host's network namespace, and may not be redirected there."""
        return self._left_alone

    def problems(self) -> tuple[str, ...]:
        """One sentence for each service that was not found."""
        return self._problems

    @property
    def is_complete(self) -> bool:
        """Whether it could be looked for all of them."""
        return self._is_complete

    def _described(self, one: ProcessConfig, place: _Place) -> Description:
        name = one.workload_name
        if name not in self._annotations:
            self._annotations[name] = one.redirected_by
        return Description(
            origin=Origin.PROCESSES,
            netns=place.path,
            id=f"{name}-{self._digest(one, place)}",
            name=name,
            service=one.service,
            interface=one.interface,
            port=one.port,
            more_ports=one.more_ports,
            meshed=one.meshed,
            sidecar=one.sidecar,
            reason="by configuration" if one.meshed else "the configuration keeps it out",
            annotations=self._annotations[name],
            created_at=place.since,
        )

    def _in_host_namespace(self, one: ProcessConfig) -> LeftAlone:
        on_host = (each.service for each in self._processes if each.host_network is not None)
        redirected = next(on_host, "")
        instead = (
            f"put it among the more_ports of {redirected}" if redirected else "say host_network"
        )
        return LeftAlone(
            origin=Origin.PROCESSES,
            id=one.workload_name,
            name=one.workload_name,
            namespace=ServiceName.of(one.service).namespace,
            treatment=Treatment.HOST_NETWORK,
            reason="it shares the host's network namespace: give it one of its own (docs/systemd.md),"
            f" or {instead}",
        )

    def _digest(self, one: ProcessConfig, place: _Place) -> str:
        """Another one on another node, after a reboot, and for another namespace."""
        told = (self._node, one.workload_name, self._finder.boot_id, _lifetime_of(place))
        return hashlib.sha256("\0".join(told).encode()).hexdigest()[:12]


def _lifetime_of(place: _Place) -> str:
    """What no other namespace has had since the machine booted; before Linux 5.14, what few others have had."""
    try:
        return str(netns.cookie(place.path))
    except KernelError:
        return f"{place.namespace.inode}-{place.since}"


def _is_there(place: _Place) -> bool:
    try:
        return netns.identity(place.path) == place.namespace
    except KernelError:
        return False


class _Finder:
    """Looks for processes and their network namespaces; what is expensive is done once for all that ask."""

    def __init__(self) -> None:
        self.boot_id = _BOOT_ID.read_text().strip()
        self.host: frozenset[netns.Identity] = frozenset()
        """The agent's network namespace, and that of the first process where that is another one."""
        self._units: dict[str, Path] = {}
        self._identified: dict[str, _Numbered] = {}
        """By the name of the workload: which process had the number first."""
        self._listening: dict[int, _Place] = {}
        self._looked_at: dict[int, float] = {}
        self._namespaces: dict[netns.Identity, int] | None = None

    def begin(self) -> None:
        """Before all are looked for anew. KernelError when the host's own namespace cannot be told."""
        self.host = frozenset(_host_namespaces())
        self._namespaces = None

    def find(self, one: ProcessConfig) -> _Place:
        """Where a service is now. _NotFound when it is nowhere, KernelError and OSError when there is no telling."""
        if one.host_network is not None:
            return _Place(HOST, netns.identity(HOST))
        if one.network is not None:
            return _made_for(one)
        if one.unit:
            return self._by_unit(one)
        if one.listens:
            return self._by_port(one)
        return self._by_pid(one)

    def _by_unit(self, one: ProcessConfig) -> _Place:
        directory = self._units.get(one.unit)
        if directory is None or not directory.is_dir():
            directory = next(_cgroups_of(one.unit), None)
        if directory is None:
            raise _NotFound(f"{one.service}: the unit {one.unit} does not run")
        self._units[one.unit] = directory
        places = {place.namespace: place for place in _places_of(_members(directory))}
        if not places:
            raise _NotFound(f"{one.service}: the unit {one.unit} has no process")
        if len(places) > 1:
            raise _NotFound(
                f"{one.service}: the processes of {one.unit} are in {len(places)} network namespaces;"
                " say the pid of the one that serves"
            )
        return next(iter(places.values()))

    def _by_pid(self, one: ProcessConfig) -> _Place:
        said = (one.pid, 0) if isinstance(one.pid, int) else _written(one.service, Path(one.pid))
        self._refuse_another(one, said)
        pid, _ = said
        place = next(_places_of((pid,)), None)
        if place is None:
            raise _NotFound(f"{one.service}: there is no process {pid}")
        return place

    def _refuse_another(self, one: ProcessConfig, said: tuple[int, int]) -> None:
        """The number of a process that has ended is given to another one some day."""
        pid, _ = said
        known = self._identified.get(one.workload_name)
        if known is None or known.said != said:
            try:
                known = _Numbered(said, psutil.Process(pid))
            except psutil.NoSuchProcess as error:
                raise _NotFound(f"{one.service}: there is no process {pid}") from error
            self._identified[one.workload_name] = known
        if not known.process.is_running():
            raise _NotFound(f"{one.service}: process {pid} has ended")

    def _by_port(self, one: ProcessConfig) -> _Place:
        port = one.listens
        known = self._listening.get(port)
        if known is not None and self._still_listens(known, port):
            return known
        self._listening.pop(port, None)
        nobody = f"{one.service}: no process listens on port {port}"
        if time.monotonic() - self._looked_at.get(port, -LOOKED_S) < LOOKED_S:
            raise _NotFound(nobody)
        self._looked_at[port] = time.monotonic()
        places = [place for place in self._all_namespaces() if _listens(place.path, port)]
        if not places:
            raise _NotFound(nobody)
        if len(places) > 1:
            raise _NotFound(
                f"{one.service}: processes in {len(places)} network namespaces listen on port {port};"
                " say the unit or the pid of the one that serves"
            )
        self._listening[port] = places[0]
        return places[0]

    def _still_listens(self, place: _Place, port: int) -> bool:
        try:
            return netns.identity(place.path) == place.namespace and _listens(place.path, port)
        except KernelError:
            return False

    def _all_namespaces(self) -> Iterator[_Place]:
        if self._namespaces is None:
            self._namespaces = {}
            for pid in psutil.pids():
                with contextlib.suppress(KernelError):
                    self._namespaces.setdefault(netns.identity(f"/proc/{pid}/ns/net"), pid)
        yield from _places_of(self._namespaces.values())


def _made_for(one: ProcessConfig) -> _Place:
    path = netns.path(one.workload_name)
    try:
        return _Place(path, netns.identity(path))
    except KernelError as error:
        raise _NotFound(
            f"{one.service} has no network namespace {path}: start"
            f" tidegate-sidecar@{one.workload_name}.service"
        ) from error


def _host_namespaces() -> Iterator[netns.Identity]:
    yield netns.identity(HOST)
    # An agent in another namespace than the host's is not to take that for a service's. It may not be allowed to look.
    with contextlib.suppress(KernelError):
        yield netns.identity(_FIRST_PROCESS)


def _cgroups_of(unit: str) -> Iterator[Path]:
    """The cgroups that systemd may have made for a unit; it makes them in slices only."""
    slices = [root for root in _CGROUPS if (root / "system.slice").is_dir()]
    while slices:
        directory = slices.pop()
        if (directory / unit).is_dir():
            yield directory / unit
        slices += (each for each in _directories(directory) if each.name.endswith(".slice"))


def _members(directory: Path) -> Iterator[int]:
    """The processes in a cgroup and below it."""
    directories = [directory]
    for _ in range(_MOST_CGROUPS):
        if not directories:
            return
        place = directories.pop()
        # It may go while it is looked at.
        with contextlib.suppress(FileNotFoundError):
            yield from map(int, (place / "cgroup.procs").read_text().split())
        directories += _directories(place)


def _directories(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            return [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _places_of(pids: Iterable[int]) -> Iterator[_Place]:
    """The namespaces of processes that have not ended, each at a path that outlasts the process if it has one."""
    lasting = {}
    for name in netns.names():
        with contextlib.suppress(KernelError):
            lasting[netns.identity(netns.path(name))] = netns.path(name)
    for pid in pids:
        path = f"/proc/{pid}/ns/net"
        try:
            found = netns.identity(path)
            since = psutil.Process(pid).create_time()
        except (KernelError, psutil.NoSuchProcess):
            continue
        yield _Place(lasting.get(found, path), found, since)


def _written(service: str, path: Path) -> tuple[int, int]:
    """The number in a pid file, and when it was written, in nanoseconds since the epoch."""
    try:
        with path.open("rb") as file:
            text, written_at = file.read(_MAX_PID_FILE).strip(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError as error:
        raise _NotFound(f"{service}: there is no file {path}") from error
    if not text.isdigit():
        raise _NotFound(f"{service}: {path} does not have the number of a process")
    return int(text), written_at


def _listens(path: str, port: int) -> bool:
    try:
        return any(each.port == port for each in netns.run_in(path, sockets.listeners))
    except KernelError:
        # The namespace is gone, or is not one that may be entered.
        return False
