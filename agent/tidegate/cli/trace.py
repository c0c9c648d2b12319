"""`tidegate trace`: each connect and accept as it happens, by a program that is compiled now and gone afterwards."""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tidegate.cli import namespaces, profiles, target, workloads
from tidegate.cli.arguments import ExamplesFormatter, add_for, add_json
from tidegate.cli.endings import told_to_end
from tidegate.cli.target import require_root
from tidegate.cli.workloads import Node
from tidegate.errors import InputError
from tidegate.kernel import cgroups, netns
from tidegate.kernel.errors import KernelError
from tidegate.observe.trace import session
from tidegate.observe.trace.classes import Classes, observing
from tidegate.observe.trace.records import (
    Connection,
    Connections,
    End,
    Outcome,
    Redirected,
    Traced,
    Whereabouts,
    container_in,
)
from tidegate.observe.trace.translations import Translations

TELL_S = 0.25
"""Between two looks at what is finished: what was read meanwhile is asked for and told together."""
UNDECIDED_ROUNDS = 4
"""How many such looks a connection waits for its class, such as that of a ClientHello in several segments."""
_WHOM_TO_ASK = ("--lab", "--socket")
HEADING = (
    f"{'time':<12} {'what':<7} {'process':<22} {'uid':>5} {'workload':<16} {'connection':<45} "
    f"{'redirected':<26} {'class':<12} first byte"
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `trace`."""
    parser = subparsers.add_parser(
        "trace",
        help="each connect and accept: who, where to, redirected or not, first byte",
        description="Follows the TCP connections of this machine's processes, or of one network namespace, process, "
        "workload or service. Each is told once, when its first payload byte has come, when it ends, or after ten "
        "seconds without one. Compiles a program for the kernel with bcc (Debian's python3-bpfcc) and kernel headers "
        "of any version; nothing is left afterwards. Writes `ready` to standard error once it follows.",
        epilog="examples:\n"
        "  tidegate trace --for 30\n"
        "  tidegate trace --service api --json\n"
        "  tidegate trace --netns web\n"
        "  tidegate trace --pid 4711",
        formatter_class=ExamplesFormatter,
    )
    namespaces.add_options(parser, required=False)
    parser.add_argument(
        "--service", metavar="NAME", help="workloads of this service on this machine"
    )
    profiles.add_option(parser)
    add_for(parser)
    add_json(parser, "one JSON object a line: connections, and at the end what was lost,")
    parser.set_defaults(run=run_trace)


def run_trace(args: argparse.Namespace) -> int:
    """Traces until it is told to end."""
    require_root("it attaches programs to the kernel's tracepoints")
    nodes = workloads.known(target.agents_of_this_machine())
    names = _workload_names(nodes)
    paths = _chosen_paths(args)
    profile = profiles.chosen(args.profile, workloads.meshes(nodes, paths or ()))
    with told_to_end() as end, contextlib.ExitStack() as stack:
        # First what sees the flows: a connection that is followed has been seen from its beginning.
        classes = stack.enter_context(observing(paths, profile)) if paths else None
        trace = stack.enter_context(session.started(None if paths is None else tuple(paths)))
        teller = Teller(paths or {}, names, classes, only_pid=args.pid, as_json=args.json)
        for note in (*trace.notes, *(classes.notes if classes else ())):
            print(f"tidegate: {note}", file=sys.stderr)
        print("ready", file=sys.stderr, flush=True)
        deadline = time.monotonic() + args.end_after if args.end_after else None
        while not end.is_set() and (deadline is None or time.monotonic() < deadline):
            until = time.monotonic() + TELL_S
            until = until if deadline is None else min(until, deadline)
            while (left := until - time.monotonic()) > 0 and not end.is_set():
                teller.take(trace.events(left))
            teller.tell()
        events, losses = trace.stop()
        teller.take(events)
        teller.finish(losses)
    return 0


def _chosen_paths(args: argparse.Namespace) -> dict[int, str] | None:
    """The chosen network namespaces, inode number to path; None for all.

    InputError when there is none, and for an option that has no meaning beside the others.
    """
    given = [option for option, _ in namespaces.options_given(args)]
    asked = [option for option in given if option in _WHOM_TO_ASK]
    if args.service is None:
        named = namespaces.chosen(args)
        if named is None and asked:
            raise InputError(
                "says whom to ask, and there is nothing to ask",
                field=asked[0],
                expected="--workload or --service beside it",
            )
        return None if named is None else {netns.identity(named.path).inode: named.path}
    for option in given:
        if option not in _WHOM_TO_ASK:
            raise InputError(f"is given beside {option}", field="--service", expected="one of them")
    agents = target.agent_addresses(args) if asked else target.agents_of_this_machine()
    everyone = [one for node in workloads.known(agents) for one in node.workloads]
    found = [one.netns for one in everyone if one.service == args.service]
    if not found:
        services = ", ".join(sorted({one.service for one in everyone if one.service})) or "none"
        raise InputError(
            f"no agent that answers has a workload of service {args.service!r} (known: {services})",
            field="--service",
        )
    return {netns.identity(path).inode: path for path in found}


def _workload_names(nodes: Iterable[Node]) -> dict[int, str]:
    """What agents call their network namespaces, by inode number."""
    names = {}
    for node in nodes:
        for one in node.workloads:
            # A workload that went while it was told of has no name any more.
            with contextlib.suppress(KernelError):
                names[netns.identity(one.netns).inode] = one.name
    return names


class Teller:
    """Makes records of events, completes them, and prints them."""

    def __init__(
        self,
        paths: dict[int, str],
        names: dict[int, str],
        classes: Classes | None,
        *,
        only_pid: int | None,
        as_json: bool,
    ) -> None:
        self._connections = Connections(time.time() - time.monotonic())
        self._translations = Translations(paths)
        self._names = names
        self._classes = classes
        self._only_pid = only_pid
        self._as_json = as_json
        self._waiting: list[tuple[int, Connection, Whereabouts]] = []
        """With how often it was looked for their class."""
        self._headed = False

    def take(self, events: Iterable[Any]) -> None:
        """Takes in what happened."""
        self._connections.take(events)

    def tell(self) -> None:
        """Prints what is finished."""
        self._tell(self._connections.finished(time.monotonic_ns()), UNDECIDED_ROUNDS)

    def finish(self, losses: session.Losses) -> None:
        """Prints everything that is left, and what was lost."""
        self._tell(self._connections.rest(), 0)
        if not self._as_json and not self._headed:
            print("no connections")
        sys.stdout.flush()
        if self._as_json:
            print(
                json.dumps(
                    {
                        "event": "end",
                        "lost_events": losses.events,
                        "not_followed": losses.sockets + self._connections.dropped,
                        "not_accepted": self._connections.not_accepted,
                    }
                )
            )
        for sentence in self._sentences(losses):
            print(f"tidegate: {sentence}", file=sys.stderr)

    def _sentences(self, losses: session.Losses) -> Iterator[str]:
        yield from losses.sentences()
        if self._connections.dropped:
            yield f"connections not told, because too many were open at a time: {self._connections.dropped}"
        if self._connections.not_accepted:
            count = self._connections.not_accepted
            yield f"connections that came in, and that no process was seen to accept: {count}"
        for number, reason in self._translations.refused.items():
            name = self._translations.name(number)
            yield f"redirection in {name} is told as far as sockets show it: {reason}"

    def _tell(self, connections: list[Connection], rounds: int) -> None:
        chosen = [one for one in connections if self._only_pid in (None, one.process.pid)]
        self._waiting += [
            (0, one, self._connections.whereabouts(one, tracked))
            for one, tracked in self._translations.of(chosen)
        ]
        if not self._waiting:
            return
        if self._classes is not None:
            self._classes.refresh()
        waiting, self._waiting = self._waiting, []
        for looks, connection, whereabouts in waiting:
            flow = self._classes.of(connection, whereabouts) if self._classes else None
            if flow is not None and whereabouts.redirected is Redirected.UNKNOWN:
                # It was seen on the wire as the socket has it: nothing translated it before.
                whereabouts = Whereabouts.of(whereabouts.dialled, connection.peer)
            if flow is not None and not flow.decided and looks < rounds:
                self._waiting.append((looks + 1, connection, whereabouts))
                continue
            self._print(
                Traced(
                    connection=connection,
                    whereabouts=whereabouts,
                    netns=self._translations.name(connection.netns),
                    workload=self._names.get(connection.netns, ""),
                    container=_container(connection.process.cgroup, connection.process.pid),
                    flow_class=flow.flow_class if flow else None,
                )
            )
        sys.stdout.flush()

    def _print(self, traced: Traced) -> None:
        if self._as_json:
            print(json.dumps(json_of(traced)))
            return
        if not self._headed:
            print(HEADING)
            self._headed = True
        print(line_of(traced))


@functools.lru_cache(4096)
def _container(cgroup: int, pid: int) -> str:
    """The container of a process, by its cgroup v2, else (cgroup v1) by what the process, if it lives, is in."""
    # A machine without cgroup v2 has no such paths; a process that ended has no file.
    with contextlib.suppress(KernelError, OSError):
        found = container_in(cgroups.path_of(cgroup) or "")
        if found:
            return found
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        return next(filter(None, map(container_in, lines)), "")
    return ""


def json_of(traced: Traced) -> dict[str, Any]:
    """One connection as `--json` prints it; times in seconds since the epoch and milliseconds."""
    connection, where = traced.connection, traced.whereabouts
    return {
        "event": connection.end.value,
        "at": round(connection.at, 6),
        "pid": connection.process.pid,
        "comm": connection.process.comm,
        "uid": connection.process.uid,
        "container": traced.container or None,
        "workload": traced.workload or None,
        "netns": traced.netns,
        "local": str(connection.local),
        "peer": str(connection.peer),
        "dialled": str(where.dialled),
        "went": str(where.went) if where.went else None,
        "redirected": where.redirected.value,
        "class": traced.flow_class.value if traced.flow_class else None,
        "outcome": connection.outcome.value,
        "error": connection.reason or None,
        "handshake_ms": _milliseconds(connection.handshake_s),
        "first_byte_ms": _milliseconds(connection.first_byte_s),
        "first_byte_seen_at": None
        if connection.first_byte_s is None
        else ("read" if connection.at_read else "arrival"),
    }


def line_of(traced: Traced) -> str:
    """One connection as a line under HEADING."""
    connection, where = traced.connection, traced.whereabouts
    clock = datetime.fromtimestamp(connection.at).astimezone()
    process = f"{_printable(connection.process.comm)}/{connection.process.pid}"
    place = traced.workload or traced.container[:12] or traced.netns
    match connection.end:
        case End.CONNECT:
            ends = f"{connection.local} -> {where.dialled}"
        case End.ACCEPT:
            ends = f"{where.dialled} <- {connection.peer}"
    flow_class = traced.flow_class.value if traced.flow_class else "-"
    return (
        f"{clock:%H:%M:%S}.{clock.microsecond // 1000:03} {connection.end.value:<7} {process:<22} "
        f"{connection.process.uid:>5} {place:<16} {ends:<45} {_redirection(where):<26} "
        f"{flow_class:<12} {_first_byte(connection)}"
    )


def _redirection(where: Whereabouts) -> str:
    match where.redirected:
        case Redirected.YES:
            return f"to {where.went or 'somewhere'}"
        case Redirected.NO:
            return "no"
        case Redirected.UNKNOWN:
            return "cannot be told"


def _first_byte(connection: Connection) -> str:
    if connection.first_byte_s is not None:
        seen = " (when read)" if connection.at_read else ""
        return f"{connection.first_byte_s * 1000:.1f} ms{seen}"
    match connection.outcome:
        case Outcome.FAILED:
            return f"failed: {connection.reason}"
        case Outcome.WAITING:
            return "not connected yet"
        case Outcome.ESTABLISHED:
            return "none"


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _printable(name: str) -> str:
    """A process gives itself any name: nothing of it may steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)
