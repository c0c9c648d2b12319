"""Which network namespace the redirect commands work on: a name or path, that of a process, or a workload's."""

import argparse
import errno
from pathlib import Path
from typing import Any

import msgspec

from tidegate.cli import target, workloads
from tidegate.cli.workloads import KnownWorkload
from tidegate.errors import InputError, TidegateError, nearest
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A network namespace that is there, and what is known of it."""

    name: str
    """What a person calls it."""
    path: str
    workload: KnownWorkload | None = None
    """Where the namespace was named by its workload."""


def add_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the options that choose a namespace, exactly one of which must be given if `required`."""
    group = parser.add_argument_group("network namespace (one of)")
    choice = group.add_mutually_exclusive_group(required=required)
    choice.add_argument("--netns", metavar="NAME", help="a name of `ip netns`, or a path")
    choice.add_argument("--pid", type=_pid, metavar="PID", help="that of a process")
    choice.add_argument(
        "--workload", metavar="NAME", help="that of a workload of the agent, or of the lab"
    )
    agent = parser.add_argument_group(
        "whom to ask for --workload (default: this node, or the lab that is up)"
    )
    agent.add_argument("--lab", metavar="NAME", help="the lab of that name (TIDEGATE_LAB)")
    agent.add_argument("--socket", metavar="PATH", help="unix socket of an agent (TIDEGATE_SOCKET)")


def _pid(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a process") from None


def options_given(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The options that choose a namespace, as they were given."""
    names = ("netns", "pid", "workload", "lab", "socket")
    values = [(f"--{name}", getattr(args, name)) for name in names]
    return [(option, value) for option, value in values if value is not None]


def chosen(args: argparse.Namespace) -> Target | None:
    """The namespace that the options choose, None when they choose none.

    InputError when it is not there; AgentUnreachable when the agent does not answer for a workload.
    """
    if args.netns is not None:
        return _named(args.netns)
    if args.pid is not None:
        return _of_process(args.pid)
    if args.workload is not None:
        return _of_workload(args)
    return None


def of_command(args: argparse.Namespace) -> Target:
    """The namespace of a command that needs one."""
    found = chosen(args)
    if found is None:
        raise InputError("no network namespace is named", expected="--netns, --pid or --workload")
    return found


def is_own(path: str) -> bool:
    """Whether a namespace is the one that this command runs in."""
    return netns.identity(path) == netns.identity(netns.CURRENT)


def _named(name: str) -> Target:
    if "/" in name:
        return Target(name=name, path=_entered(name, "--netns"))
    try:
        path = netns.path(name)
    except KernelError as error:
        raise InputError(str(error), field="--netns", expected=_near(name)) from error
    if not _is_there(path, "--netns"):
        problem = f"there is no network namespace {name!r}"
        raise InputError(problem, field="--netns", expected=_near(name))
    return Target(name=name, path=_entered(path, "--netns"))


def _near(name: str) -> str:
    """Which namespaces there are by name."""
    names = netns.names()
    return nearest(name, names) if names else "a path; none has a name here"


def _of_process(pid: int) -> Target:
    path = f"/proc/{pid}/ns/net"
    if pid < 1 or not _is_there(f"/proc/{pid}", "--pid"):
        problem = f"there is no process {pid}; it may have ended"
        raise InputError(problem, field="--pid", expected="the number of one that runs")
    return Target(name=f"process {pid}", path=_entered(path, "--pid"))


def _of_workload(args: argparse.Namespace) -> Target:
    found = workloads.find(args.workload, target.agent_addresses(args))
    return Target(name=found.name, path=_entered(found.netns, "--workload"), workload=found)


def _entered(path: str, option: str) -> str:
    """The path, once a thread has been in there. InputError when it leads to no network namespace."""
    if _is_there(path, option) and not Path(path).is_file():
        raise InputError(f"{path} is no network namespace", field=option)
    try:
        netns.run_in(path, lambda: None)
    except KernelError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise TidegateError(f"{error}; try sudo") from error
        raise InputError(str(error), field=option, expected="a network namespace") from error
    return path


def _is_there(path: str, option: str) -> bool:
    """Whether something is at a path. InputError when nobody may look, or it can be no path."""
    try:
        return Path(path).exists()
    except OSError as error:
        problem = f"{path} may not be looked at: {error.strerror}"
        advice = "" if target.is_root() else "; try sudo"
        raise InputError(problem + advice, field=option) from error
