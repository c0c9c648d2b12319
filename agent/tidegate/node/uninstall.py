"""What an agent leaves on its node, found and removed: without the agent, and whatever has become of its workloads.

Found anew each time, by what the agent wrote down and by what the kernel has, so that it can be broken off and done
again. What belongs to somebody else is not touched: other agents and labs on this machine, configuration, the intent
server's state. An agent has to be stopped first, and cannot be started meanwhile.
"""

import asyncio
import contextlib
import errno
import os
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from tidegate.catalog.access import ACCESS_FOR_ALL, Access
from tidegate.catalog.client import CatalogClient
from tidegate.enforce.redirect import block, inventory
from tidegate.enforce.redirect.engine import Engine
from tidegate.enforce.sidecar import envoy
from tidegate.errors import TidegateError
from tidegate.kernel import netns, processes
from tidegate.kernel.errors import KernelError
from tidegate.node import cni_install
from tidegate.node.config import AgentConfig
from tidegate.node.holding import held_alone
from tidegate.node.keeper import Keeper, abandoned
from tidegate.node.memory import remembered
from tidegate.observe import pins
from tidegate.workloads.attachments import Attachment, Attachments
from tidegate.workloads.files import FileSource

STOP_S = 30.0
"""How long an agent may take to end."""
ANSWER_S = 5.0
"""How long the intent server is waited for."""
_STATE = ("ledger.sqlite*", "intent.json*", "guards", "pods.json*", "aliases.json*", ".*.json.new")
"""What an agent has in its state_dir."""
_HOLDER = "agent.pid"


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where an agent has what it leaves; what is None it never had."""

    run_dir: Path
    state_dir: Path
    bpffs: Path
    sockets: tuple[Path, ...] = ()
    workloads: Path | None = None
    node: str = ""
    server: str = ""
    """The intent server that knows of this node's workloads; empty where that goes with the agent."""
    consul: Access = ACCESS_FOR_ALL
    cni_conf_dir: Path = cni_install.DEFAULT_CONF_DIR
    cni_bin_dir: Path = cni_install.DEFAULT_BIN_DIR

    @classmethod
    def of(cls, config: AgentConfig) -> "Places":
        """Those that a configuration names."""
        server = config.embedded_server
        listening = server.addresses if server else ()
        return cls(
            run_dir=config.run_dir,
            state_dir=config.state_dir,
            bpffs=config.bpffs,
            sockets=(
                config.socket,
                *((config.cni.socket,) if config.cni else ()),
                *(one for one in listening if isinstance(one, Path)),
            ),
            workloads=config.workloads,
            node=config.node,
            server="" if server else config.server,
            consul=config.consul,
        )

    @property
    def held(self) -> tuple[Path, ...]:
        """What an agent holds alone while it runs, as far as it is there."""
        return tuple(path for path in (self.run_dir, self.state_dir, self.bpffs) if path.is_dir())

    @property
    def sidecars(self) -> tuple[Path, ...]:
        """A directory for each workload that is or was redirected."""
        return tuple(sorted((self.run_dir / "sidecars").glob("*")))


class Remnant(NamedTuple):
    """One thing that an agent left."""

    what: str
    """For a person."""
    remove: Callable[[], object]
    """Raises KernelError, TidegateError or OSError where it cannot; it can be tried again then."""


class Options(NamedTuple):
    """How far it goes."""

    everywhere: bool = False
    """Whether redirections of tidegate in all network namespaces of this machine are this agent's."""
    purge: bool = False
    """Whether what the agent knows goes too: its ledger, and what should be."""


class Found(NamedTuple):
    """What there is at the moment."""

    remnants: tuple[Remnant, ...]
    """In the order in which they are to go."""
    unclaimed: tuple[str, ...]
    """Redirections that nothing here tells whose they are, one sentence each."""
    kept: tuple[str, ...]
    """What stays on purpose, one sentence each."""


def find(places: Places, options: Options) -> Found:
    """What an agent with these places left, but for the CNI plugin. TidegateError when that cannot be seen."""
    kept: list[str] = []
    engine = Engine()
    rules, unclaimed = _redirections(places, engine, everywhere=options.everywhere)
    remnants = (
        *_registrations(places, kept),
        *rules,
        *(_sidecar(directory, engine) for directory in places.sidecars),
        *_programs(places.bpffs),
        *_run_files(places),
    )
    state = _state(places.state_dir)
    if options.purge:
        remnants += state
    elif state:
        kept.append(f"{places.state_dir}: the ledger, and what was last known (--purge removes it)")
    return Found(remnants, unclaimed, tuple(kept))


def find_plugin(places: Places) -> tuple[Remnant, ...]:
    """The CNI plugin and its place in the network configuration, which go while an agent still answers containers.

    TidegateError when that cannot be seen.
    """
    conf_dir, bin_dir = places.cni_conf_dir, places.cni_bin_dir
    found = cni_install.traces(conf_dir, bin_dir)
    if not found:
        return ()
    files = ", ".join(map(str, found))
    return (Remnant(f"the CNI plugin: {files}", partial(_remove_plugin, conf_dir, bin_dir)),)


def _remove_plugin(conf_dir: Path, bin_dir: Path) -> None:
    cni_install.uninstall(conf_dir, bin_dir)


@contextlib.contextmanager
def alone(places: Places) -> Iterator[None]:
    """No agent runs meanwhile, and none can be started. TidegateError when one runs.

    Directories that are empty afterwards go with it.
    """
    with contextlib.ExitStack() as stack:
        for directory in places.held:
            stack.enter_context(held_alone(directory))
            stack.callback(_tidy, directory)
        yield


def running_agent(places: Places) -> int | None:
    """The process that holds one of the places; None when nobody does whom this process can see."""
    holders = [pid for path in places.held for pid in processes.holding(path)]
    return holders[0] if holders else None


def stop(pid: int) -> None:
    """Ends an agent as a service manager does; it is gone then. TidegateError when it does not end."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGTERM)
        # A descriptor of a process is readable when the process has ended (pidfd_open(2)).
        ended, _, _ = select.select([process], [], [], STOP_S)
    finally:
        os.close(process)
    if not ended:
        raise TidegateError(f"the agent (process {pid}) has not ended within {STOP_S:.0f} s")


def _registrations(places: Places, kept: list[str]) -> Iterator[Remnant]:
    """What the catalog has of this node's workloads: callers would go on to use mTLS towards them."""
    if not places.server:
        return

    async def living() -> list[str]:
        async with (
            asyncio.timeout(ANSWER_S),
            CatalogClient(places.server, places.consul) as catalog,
        ):
            known = await catalog.instances()
        return [one.id for one in known if one.node == places.node and not one.seen_until]

    async def deregister(ids: list[str]) -> None:
        async with (
            asyncio.timeout(ANSWER_S),
            CatalogClient(places.server, places.consul) as catalog,
        ):
            for instance_id in ids:
                await catalog.deregister(places.node, instance_id)

    try:
        found = asyncio.run(living())
    except (TidegateError, TimeoutError) as error:
        reason = str(error) or f"it does not answer within {ANSWER_S:.0f} s"
        kept.append(f"what the catalog at {places.server} has of {places.node}: {reason}")
        return
    if found:
        yield Remnant(
            f"{len(found)} workloads of {places.node} in the catalog at {places.server}",
            lambda: asyncio.run(deregister(found)),
        )


def _redirections(
    places: Places, engine: Engine, *, everywhere: bool
) -> tuple[tuple[Remnant, ...], tuple[str, ...]]:
    """Rules and blocks in network namespaces: those of this agent, and those of nobody knows whom."""
    known = _recorded(places)
    remnants, unclaimed = [], []
    for identity, path in netns.everywhere().items():
        try:
            if not _has_rules(path):
                continue
        except KernelError as error:
            if identity in known:
                remnants.append(_unseen(path, error))
            continue
        what = f"the redirection in the network namespace {path}"
        remove = partial(_remove_redirection, engine, path, identity)
        if name := known.get(identity):
            remnants.append(Remnant(f"{what} ({name})", remove))
        elif everywhere:
            remnants.append(Remnant(what, remove))
        else:
            unclaimed.append(what)
    return tuple(remnants), tuple(unclaimed)


def _remove_redirection(engine: Engine, path: str, identity: netns.Identity) -> None:
    """A process's path may lead to another process's namespace by now, such as the node's own."""

    def remove() -> None:
        if netns.identity(netns.CURRENT) != identity:
            raise KernelError(f"another network namespace has come to {path}", errno.ESTALE)
        engine.remove(netns.CURRENT)

    netns.run_in(path, remove)


def _unseen(path: str, error: KernelError) -> Remnant:
    def refuse() -> None:
        raise error

    return Remnant(f"whatever is in the network namespace {path}", refuse)


def _has_rules(path: str) -> bool:
    return bool(inventory.taken(path).backends) or block.is_blocked(path)


def _recorded(places: Places) -> dict[netns.Identity, str]:
    """The network namespaces of this agent's workloads that are still there, with a workload's name for each."""
    found: dict[netns.Identity, str] = {}
    named: list[tuple[str, str]] = []
    for directory in places.sidecars:
        memory = remembered(directory)
        if memory is not None and memory.redirected_in is not None:
            found[memory.redirected_in] = memory.workload.name
        elif memory is not None:
            named.append((memory.workload.netns, memory.workload.name))
    for one in _attached(places):
        found.setdefault(one.place, one.description.name or one.key.container_id)
    if places.workloads is not None and places.workloads.is_dir():
        described = FileSource(places.workloads).list()
        named += [(one.netns, one.name or one.id) for one in described]
    for path, name in named:
        # A workload that went has none.
        with contextlib.suppress(KernelError):
            found.setdefault(netns.identity(path), name)
    return found


def _attached(places: Places) -> tuple[Attachment, ...]:
    directory = places.run_dir / "attachments"
    return Attachments(directory).all if directory.is_dir() else ()


def _sidecar(directory: Path, engine: Engine) -> Remnant:
    keeper = abandoned(directory, envoy.binary, engine)
    return Remnant(
        f"{directory}: what is known of {keeper.workload.name}, and the sidecar that the agent runs for it, if any",
        partial(_remove_sidecar, keeper),
    )


def _remove_sidecar(keeper: Keeper) -> None:
    keeper.remove()
    if not keeper.is_removed:
        raise TidegateError("; ".join(keeper.problems))


def _programs(bpffs: Path) -> Iterator[Remnant]:
    directory = bpffs / "classifier"
    if directory.exists():
        yield Remnant(
            f"the classifier's programs, links and maps below {directory}",
            partial(pins.remove, directory),
        )


def _run_files(places: Places) -> Iterator[Remnant]:
    for path in (*places.sockets, places.run_dir / "attachments"):
        if path.exists():
            yield Remnant(str(path), partial(_remove_file, path))


def _state(directory: Path) -> tuple[Remnant, ...]:
    found = sorted(path for pattern in _STATE for path in directory.glob(pattern))
    return tuple(Remnant(str(path), partial(_remove_file, path)) for path in found)


def _remove_file(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tidy(directory: Path) -> None:
    """What stands in it for nothing but that it was held goes, and the directory if nothing else is in it."""
    with contextlib.suppress(OSError):
        (directory / _HOLDER).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for empty in (directory / "sidecars", directory):
            if empty.is_dir() and not empty.is_mount() and not any(empty.iterdir()):
                empty.rmdir()
