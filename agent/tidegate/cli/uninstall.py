"""`tidegate uninstall`: this node as it was before the agent came."""

import argparse
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.cli.cni import add_directories
from tidegate.cli.target import AGENT_SOCKET, require_root
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.node import uninstall
from tidegate.node.config import DEFAULT_CONFIG, AgentConfig, load_config
from tidegate.node.uninstall import Options, Places, Remnant
from tidegate.workloads.cni import DEFAULT_SOCKET

EXAMPLES = """\
examples:
  tidegate uninstall --dry-run
  tidegate uninstall --stop
  tidegate uninstall --stop --purge --json"""


class _Refused(TidegateError):
    """An agent is in the way."""

    exit_code = 2


class Report(msgspec.Struct, kw_only=True):
    """What is or was there, a sentence each."""

    agent: int | None = None
    """The process of the agent that runs, or ran."""
    found: list[str] = []
    """With --dry-run only."""
    removed: list[str] = []
    failed: dict[str, str] = {}
    """What is still there, and why."""
    unclaimed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 when nothing is left that should not be."""
        return 1 if self.failed or self.unclaimed else 0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `uninstall`."""
    parser = subparsers.add_parser(
        "uninstall",
        help="leave this node as it was",
        description="Removes what the agent left on this node: the CNI plugin, redirections and blocks in network "
        "namespaces, sidecars, eBPF programs with their links and maps, sockets and records. Workloads go on, and are "
        "reached as before. Stops nothing that is not its own, and refuses (exit 2) while the agent runs. Exits 1 when "
        "something could not be removed: it can be run again.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would go")
    parser.add_argument("--stop", action="store_true", help="stop the agent first, if it runs")
    parser.add_argument(
        "--purge",
        action="store_true",
        help="remove the agent's state too: its ledger, and what it last knew",
    )
    parser.add_argument(
        "--everywhere",
        action="store_true",
        help="remove redirections of tidegate from every network namespace of this machine, also of those that "
        "another agent, a lab, an init container or a person put there",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"the agent's configuration (default: {DEFAULT_CONFIG} if it is there, else the default places)",
    )
    add_directories(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Removes, or lists what would go."""
    require_root("it takes away rules, programs and sidecars")
    places = msgspec.structs.replace(
        _places(args.config), cni_conf_dir=args.conf_dir, cni_bin_dir=args.bin_dir
    )
    options = Options(everywhere=args.everywhere, purge=args.purge)
    report = Report(agent=uninstall.running_agent(places))
    if args.dry_run:
        found = uninstall.find(places, options)
        report.found = [one.what for one in (*uninstall.find_plugin(places), *found.remnants)]
        report.unclaimed, report.kept = found.unclaimed, found.kept
    else:
        _remove(report, places, options, stop=args.stop)
    if args.json:
        print(json.dumps(msgspec.to_builtins(report), indent=2))
    else:
        _print(report, dry=args.dry_run)
    return 0 if args.dry_run else report.exit_code


def _places(config: Path | None) -> Places:
    if config is not None or DEFAULT_CONFIG.exists():
        return Places.of(load_config(config or DEFAULT_CONFIG))
    fields = {field.name: field.default for field in msgspec.structs.fields(AgentConfig)}
    return Places(
        run_dir=fields["run_dir"],
        state_dir=fields["state_dir"],
        bpffs=fields["bpffs"],
        sockets=(AGENT_SOCKET, DEFAULT_SOCKET),
    )


def _remove(report: Report, places: Places, options: Options, *, stop: bool) -> None:
    """TidegateError when an agent runs and is not to be stopped."""
    if report.agent is not None and not stop:
        who = f"the agent (process {report.agent})"
        raise _Refused(f"{who} runs; stop its service, or let --stop end it")
    # While the agent still answers: containers that start meanwhile need nobody who is away.
    _remove_all(report, uninstall.find_plugin(places))
    if report.agent is not None:
        uninstall.stop(report.agent)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(uninstall.alone(places))
        except TidegateError as error:
            raise _Refused(str(error)) from error
        _remove_all(report, uninstall.find(places, options).remnants)
        left = uninstall.find(places, options)
    for one in (*uninstall.find_plugin(places), *left.remnants):
        report.failed.setdefault(one.what, "it is still there")
    report.unclaimed, report.kept = left.unclaimed, left.kept


def _remove_all(report: Report, remnants: Iterable[Remnant]) -> None:
    for one in remnants:
        try:
            one.remove()
        except (KernelError, TidegateError, OSError) as error:
            report.failed[one.what] = str(error) or type(error).__name__
        else:
            report.removed.append(one.what)


def _print(report: Report, *, dry: bool) -> None:
    if dry and report.agent is not None:
        print(f"the agent (process {report.agent}) runs: --stop would end it")
    for what in report.found:
        print(f"would go: {what}")
    for what in report.removed:
        print(f"removed: {what}")
    for what, reason in report.failed.items():
        print(f"not removed: {what}: {reason}")
    for what in report.unclaimed:
        print(f"left: {what}, of which this agent knows nothing (--everywhere removes it)")
    for what in report.kept:
        print(f"stays: {what}")
    if not (report.found or report.removed or report.failed or report.unclaimed):
        print("nothing of tidegate is here")
