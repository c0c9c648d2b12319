"""What of this node helps an agent or stands in its way, beyond features of the kernel: looked at, never changed.

Each check says what it found and, where that is not well, what to do. One that cannot be made says so and costs the
others nothing.
"""

import asyncio
import ctypes
import enum
import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from tidegate.catalog.client import CatalogClient
from tidegate.errors import TidegateError
from tidegate.kernel import bpf, cgroups, links, netns, processes, tc, xtables
from tidegate.kernel.errors import KernelError
from tidegate.node import cni_install
from tidegate.node.config import AgentConfig
from tidegate.observe.hold import OWNER, PROGRAMS

ANSWER_S = 5.0
"""How long a server is waited for."""
APART_S = 2.0
"""Two clocks that differ by no more are one."""
FULL = 0.8
"""Of a table or a limit: little room is left."""
ENOUGH_FILES = 4096
"""Descriptors for an agent with some hundred workloads."""
ENOUGH_SIDECARS = 110
"""As many pods as Kubernetes puts on a node."""
INOTIFY_PER_SIDECAR = 6
"""Envoy has one for each file of configuration that it watches, and all sidecars have one user."""
_INOTIFY_LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")


class State(enum.StrEnum):
    """How a finding is."""

    WELL = "well"
    NOTE = "note"
    """Worth knowing; nothing is lost by it at the moment."""
    WRONG = "wrong"
    """Workloads lose their redirection or their evidence by it, now or at the next occasion."""
    UNKNOWN = "unknown"
    """It could not be looked at."""


class Finding(msgspec.Struct, frozen=True):
    """What one check says."""

    name: str
    state: State
    detail: str
    advice: str = ""
    """What to do, one sentence; empty where there is nothing to do."""


class Place(NamedTuple):
    """A workload, as its agent tells of it."""

    name: str
    netns: str
    interface: str = "eth0"


def inspect(
    config: AgentConfig | None, agent: int | None, workloads: Iterable[Place]
) -> tuple[Finding, ...]:
    """All checks. `config` is that of this node's agent, `agent` its process, None where there is none."""
    places = tuple(workloads)
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("BPF file system", partial(_bpffs, config)),
        ("control groups", _cgroup2),
        ("capabilities", partial(_capabilities, agent)),
        ("file descriptors", partial(_descriptors, agent)),
        ("inotify instances", _inotify),
        ("CNI", partial(_cni, config)),
        ("programs on interfaces", partial(_programs, places)),
        ("xtables lock", _xtables_lock),
        ("connection tracking", partial(_conntrack, places)),
        ("clock", _clock),
        ("intent server", partial(_server, config)),
        ("Kubernetes API", partial(_kubernetes, config)),
    ]
    return tuple(finding for name, check in checks for finding in _made(name, check))


def _made(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except (KernelError, TidegateError, OSError) as error:
        yield Finding(name, State.UNKNOWN, str(error))


def _bpffs(config: AgentConfig | None) -> Iterator[Finding]:
    name = "BPF file system"
    mounted = [place for place, kind in _mounts() if kind == "bpf"]
    wanted = config.bpffs if config else Path("/sys/fs/bpf")
    if any(wanted.is_relative_to(place) for place in mounted):
        yield Finding(name, State.WELL, f"{wanted} is on one")
        return
    yield Finding(
        name,
        State.WRONG if config else State.NOTE,
        f"{wanted} is not on a BPF file system, so the agent cannot keep its counts",
        "mount it: mount -t bpf bpf /sys/fs/bpf (systemd does by itself)",
    )


def _mounts() -> Iterator[tuple[Path, str]]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        yield Path(place), kind


def _cgroup2() -> Iterator[Finding]:
    try:
        yield Finding("control groups", State.WELL, f"version 2 at {cgroups.mounted_at()}")
    except KernelError as error:
        yield Finding(
            "control groups",
            State.NOTE,
            f"{error}: sidecars cannot be told apart by their control group",
            "mount it, or tell sidecars by user: tidegate.io/proxy-uid",
        )


# linux/capability.h
_NEEDED = {
    12: ("CAP_NET_ADMIN", "rules, interfaces, connection tracking"),
    13: ("CAP_NET_RAW", "the legacy tables, probes"),
    21: ("CAP_SYS_ADMIN", "network namespaces of workloads, eBPF"),
    19: ("CAP_SYS_PTRACE", "pods that started without the CNI plugin"),
}


def _capabilities(agent: int | None) -> Iterator[Finding]:
    yield _capabilities_of("capabilities of this command", os.getpid())
    if agent is None:
        yield Finding(
            "agent",
            State.NOTE,
            "none runs here",
            "start it: systemctl start tidegate-agent, or tidegate agent run",
        )
    else:
        yield _capabilities_of(f"capabilities of the agent (process {agent})", agent)


def _capabilities_of(name: str, pid: int) -> Finding:
    (effective,) = (
        int(line.split()[1], 16)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("CapEff:")
    )
    missing = [
        f"{cap} ({why})" for number, (cap, why) in _NEEDED.items() if not effective >> number & 1
    ]
    if not missing:
        return Finding(name, State.WELL, "all that are needed are in effect")
    return Finding(
        name,
        State.WRONG,
        f"not in effect: {', '.join(missing)}",
        "give it what deploy/base or systemd/tidegate-agent.service give it",
    )


def _descriptors(agent: int | None) -> Iterator[Finding]:
    if agent is None:
        return
    name = "file descriptors of the agent"
    limit, _ = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    used = len(list(Path(f"/proc/{agent}/fd").iterdir()))
    said = f"{used} of {limit} are open"
    advice = "raise LimitNOFILE= of its service, or the container runtime's limit"
    if limit == resource.RLIM_INFINITY:
        yield Finding(name, State.WELL, f"{used} are open, without a limit")
    elif used >= FULL * limit:
        yield Finding(name, State.WRONG, f"{said}: there will be none for new workloads", advice)
    elif limit < ENOUGH_FILES:
        yield Finding(name, State.NOTE, f"{said}: few for some hundred workloads", advice)
    else:
        yield Finding(name, State.WELL, said)


def _inotify() -> Iterator[Finding]:
    name = "inotify instances"
    limit = int(_INOTIFY_LIMIT.read_text())
    sidecars = limit // INOTIFY_PER_SIDECAR
    said = f"a user may have {limit}, which {sidecars} sidecars of the agent's take"
    if sidecars < ENOUGH_SIDECARS:
        advice = "where it runs more: sysctl -w fs.inotify.max_user_instances=8192, and in /etc/sysctl.d/"
        yield Finding(name, State.NOTE, said, advice)
    else:
        yield Finding(name, State.WELL, said)


def _cni(config: AgentConfig | None) -> Iterator[Finding]:
    wanted = config is not None and config.cni is not None
    settings = cni_install.Settings()
    if not wanted and not settings.conf_dir.is_dir():
        return
    if not settings.conf_dir.is_dir():
        yield Finding(
            "CNI",
            State.UNKNOWN,
            f"{settings.conf_dir} is not to be seen from here",
            "ask where it is: tidegate cni status, in the pod the container install-cni",
        )
        return
    found = cni_install.look(settings)
    plugins = " > ".join(_plugins(found.configuration)) if found.configuration else "none"
    where = f"{found.configuration or settings.conf_dir}: {plugins}"
    for problem in found.problems:
        yield Finding("CNI", State.NOTE, problem)
    if not found.plugin_is_there and not wanted:
        yield Finding("CNI", State.WELL, f"{where}; tidegate is not part of it")
    elif found.chained is not cni_install.Chained.LAST:
        yield Finding(
            "CNI",
            State.WRONG,
            f"{where}; tidegate's plugin is {found.chained}: containers start outside the mesh, or change afterwards",
            "install it: tidegate cni install, and see who else writes the file",
        )
    elif not found.plugin_is_ours:
        yield Finding(
            "CNI",
            State.NOTE,
            f"{found.plugin} is of another version",
            "install this one: tidegate cni install",
        )
    else:
        yield Finding("CNI", State.WELL, f"{where}; tidegate's is the last")


def _plugins(file: Path) -> list[str]:
    try:
        document = json.loads(file.read_bytes())
        return [str(one["type"]) for one in document.get("plugins", (document,))]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["not readable"]


def _programs(workloads: Iterable[Place]) -> Iterator[Finding]:
    """Other people's programs on workloads' interfaces: what they drop, send elsewhere or rewrite is seen otherwise."""
    name = "programs on interfaces"
    looked_at = 0
    for workload in workloads:
        try:
            others = tuple(_others(workload))
        except (KernelError, OSError) as error:
            yield Finding(name, State.UNKNOWN, f"{workload.name}: {error}")
            continue
        looked_at += 1
        if others:
            yield Finding(
                name,
                State.NOTE,
                f"{workload.name} has others' programs on its interface: {', '.join(others)}",
                "the classifier stands before them; see that none of them redirects past the sidecar",
            )
    if looked_at:
        yield Finding(name, State.WELL, f"those of {looked_at} workloads were looked at")


def _others(workload: Place) -> Iterator[str]:
    def inside() -> tuple[str, ...]:
        return _of_interface(socket.if_nametoindex(workload.interface))

    yield from netns.run_in(workload.netns, inside)
    on_host = links.host_ifindex(workload.netns, workload.interface)
    if on_host is not None:
        yield from _of_interface(on_host)


def _of_interface(ifindex: int) -> tuple[str, ...]:
    linked = [name for where in bpf.AttachType for name in bpf.attached(ifindex, where)]
    return (
        *(f"{name} (tcx)" for name in linked if name not in PROGRAMS),
        *(
            f"{each.name or each.kind} (filter, priority {each.priority})"
            for each in tc.filters(ifindex)
            if not each.owner.startswith(OWNER)
        ),
    )


def _xtables_lock() -> Iterator[Finding]:
    lock = xtables.lock_file()
    holders = tuple(map(processes.named, processes.holding(lock))) if lock.exists() else ()
    if holders:
        yield Finding(
            "xtables lock",
            State.NOTE,
            f"held by {', '.join(holders)}: whoever changes the legacy tables waits for it",
            "look again; whoever still holds it then keeps everybody waiting",
        )
    else:
        yield Finding("xtables lock", State.WELL, "nobody holds it")


def _conntrack(workloads: Iterable[Place]) -> Iterator[Finding]:
    """Each namespace counts its own entries; the limit is one for all (nf_conntrack_standalone.c)."""
    name = "connection tracking"
    limit = _number("nf_conntrack_max")
    if limit is None:
        yield Finding(name, State.WELL, "not in use yet")
        return
    full = []
    for where, path in (("the node", netns.CURRENT), *((one.name, one.netns) for one in workloads)):
        try:
            count = netns.run_in(path, _number, "nf_conntrack_count") or 0
        except KernelError as error:
            yield Finding(name, State.UNKNOWN, f"{where}: {error}")
            continue
        if limit and count >= FULL * limit:
            full.append(f"{where} has {count}")
    if full:
        yield Finding(
            name,
            State.WRONG,
            f"of {limit} entries that a namespace may have {', '.join(full)}: new connections are dropped at the end",
            f"raise it: sysctl net.netfilter.nf_conntrack_max={2 * limit}",
        )
    else:
        yield Finding(name, State.WELL, f"room is left everywhere, of {limit} entries each")


def _number(name: str) -> int | None:
    try:
        return int(Path("/proc/sys/net/netfilter", name).read_text())
    except FileNotFoundError:
        return None


# sys/timex.h
_TIME_ERROR = 5
_TIMEX_BYTES = 208

_libc = ctypes.CDLL(None, use_errno=True)


def _clock() -> Iterator[Finding]:
    state = _libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state < 0:
        number = ctypes.get_errno()
        yield Finding("clock", State.UNKNOWN, f"adjtimex: {os.strerror(number)}")
    elif state == _TIME_ERROR:
        yield Finding(
            "clock",
            State.NOTE,
            "the kernel does not know it to be synchronised: certificates and evidence of several nodes need one time",
            "run a time service, such as systemd-timesyncd or chrony",
        )
    else:
        yield Finding("clock", State.WELL, "synchronised")


def _server(config: AgentConfig | None) -> Iterator[Finding]:
    if config is None:
        return

    async def ask() -> tuple[int, float]:
        async with (
            asyncio.timeout(ANSWER_S),
            CatalogClient(config.server, config.consul) as catalog,
        ):
            nodes = len((await catalog.snapshot()).nodes)
            before = time.time()
            said = await catalog.clock()
            return nodes, 0.0 if said is None else _ahead(said, before, time.time())

    try:
        nodes, ahead = asyncio.run(ask())
    except (TidegateError, TimeoutError) as error:
        yield Finding(
            "intent server",
            State.WRONG,
            str(error) or f"{config.server} does not answer within {ANSWER_S:.0f} s",
            "see that it runs and that the token is right; until then the agent goes on by what it knew",
        )
    else:
        yield Finding(
            "intent server", State.WELL, f"{config.server} answers and knows {nodes} nodes"
        )
        if abs(ahead) > APART_S:
            yield Finding(
                "clock",
                State.WRONG,
                f"it is {abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} the intent server's:"
                " evidence of several nodes is compared in time, and certificates begin and end by it",
                "run a time service on both",
            )


def _ahead(said: float, before: float, after: float) -> float:
    """By how much another clock is ahead of this one, at the least: `said` is cut to seconds, between two looks."""
    return max(said - after, 0.0) + min(said + 1.0 - before, 0.0)


def _kubernetes(config: AgentConfig | None) -> Iterator[Finding]:
    if config is None or config.kubernetes is None:
        return
    from tidegate.kubeapi.client import ApiClient

    access = config.kubernetes.access

    async def ask() -> str:
        client = ApiClient(access)
        try:
            async with asyncio.timeout(ANSWER_S):
                await client.page("/api/v1/pods", {"limit": "1"})
            return client.address
        finally:
            await client.close()

    try:
        address = asyncio.run(ask())
    except (TidegateError, TimeoutError) as error:
        yield Finding(
            "Kubernetes API",
            State.WRONG,
            str(error) or f"it does not answer within {ANSWER_S:.0f} s",
            "see `kubernetes.server`, the token, and that its role may list pods (deploy/base)",
        )
    else:
        yield Finding("Kubernetes API", State.WELL, f"{address} answers, and lets pods be listed")
