"""`tidegate observe`: what happens on one interface, on any host, with no agent and no other set-up."""

import argparse
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

from rich.console import Console
from rich.live import Live

from tidegate.cli import namespaces, profiles, seen, tables, target, workloads
from tidegate.cli.arguments import ExamplesFormatter, add_for, add_json
from tidegate.cli.endings import told_to_end
from tidegate.cli.target import require_root
from tidegate.errors import InputError
from tidegate.kernel import netns
from tidegate.observe import session

EXAMPLES = """\
examples:
  tidegate observe --for 30
  tidegate observe --netns web --json > seen.json
  tidegate observe --pid 4711 --interface eth1 --profile istio"""

POLL_S = 0.1
"""Between two looks into the ring buffer of hellos."""
KEEP_S = 0.5
"""Between two readings of the flow map."""
KEEP_SHARE = 5
"""How much longer it is left alone than reading it took."""
LINES_BESIDE = 8
"""Of the live table: titles, sums, what was lost."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `observe`."""
    parser = subparsers.add_parser(
        "observe",
        help="watch the connections of one interface, on any host",
        description="Attaches the classifier to one interface, and tells every connection: who, to whom, mTLS of the "
        "mesh, other TLS, plaintext or something else. Needs no agent and no mesh, changes no packet and leaves "
        "nothing. Writes `ready` to standard error once it is attached; ends on Ctrl-C, SIGTERM or after --for, and "
        "prints what was seen.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    namespaces.add_options(parser, required=False)
    parser.add_argument(
        "--interface",
        metavar="NAME",
        help="in that namespace (default: eth0, else that of the default route, else the only one)",
    )
    profiles.add_option(parser)
    add_for(parser)
    add_json(parser, "flows, edges and counters as one JSON object")
    parser.set_defaults(run=run_observe)


def run_observe(args: argparse.Namespace) -> int:
    """Watches until it is told to end, and prints what was seen."""
    require_root("only root may attach programs to an interface")
    profile = profiles.chosen(args.profile)
    named = namespaces.chosen(args)
    if args.profile is None and named and named.workload:
        number = netns.identity(named.path).inode
        nodes = workloads.known(target.agent_addresses(args))
        profile = profiles.chosen(None, workloads.meshes(nodes, (number,)))
    given = namespaces.options_given(args)
    if named is None and given:
        raise InputError(
            "says whom to ask, and there is nothing to ask",
            field=given[0][0],
            expected="--workload beside it",
        )
    place = session.choose(named.path if named else netns.CURRENT, args.interface)
    console = tables.console()
    # Whoever tells it to end while it attaches gets what was seen all the same: nothing.
    with told_to_end() as end, ExitStack() as stack:
        with _saying("attaching"):
            watch = stack.enter_context(session.watching(place, profile))
        print("ready", file=sys.stderr, flush=True)
        deadline = time.monotonic() + args.end_after if args.end_after else None
        if console.is_terminal and not args.json:
            with Live(console=console, auto_refresh=False, transient=True) as live:

                def show() -> None:
                    rows = max(console.height - LINES_BESIDE, 4)
                    live.update(seen.tables_of(watch.report(), rows // 2, console), refresh=True)

                _follow(watch, end, deadline, show)
        else:
            _follow(watch, end, deadline, watch.keep_flows)
        report = watch.finish()
    seen.print_report(console, report, as_json=args.json)
    return 0


def _saying(what: str) -> AbstractContextManager[object]:
    """Says on standard error, where that is a terminal, what is being done as long as it is."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else nullcontext()


def _follow(
    watch: session.Watch,
    end: threading.Event,
    deadline: float | None,
    keep: Callable[[], None],
) -> None:
    """Polls until the end, the deadline, or until the interface is gone. `keep` reads the flows, whatever else."""
    keep_at = 0.0
    while not end.is_set() and watch.is_there():
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return
        watch.fetch_hellos()
        if now >= keep_at:
            keep()
            took = time.monotonic() - now
            keep_at = now + max(KEEP_S, (1 + KEEP_SHARE) * took)
        left = POLL_S if deadline is None else min(POLL_S, max(deadline - time.monotonic(), 0.0))
        end.wait(left)
