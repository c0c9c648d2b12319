"""`tidegate agent run`: the daemon of one node."""

import argparse
import asyncio
from pathlib import Path

from tidegate.cli.target import require_root
from tidegate.node import log
from tidegate.node.config import DEFAULT_CONFIG, load_config
from tidegate.node.running import run_agent


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `agent`."""
    group = subparsers.add_parser("agent", help="the daemon of one node")
    commands = group.add_subparsers(dest="agent_command", required=True, metavar="COMMAND")
    run_parser = commands.add_parser(
        "run",
        help="run in the foreground until SIGTERM",
        description="Reconciles this node's workloads until SIGTERM; at SIGHUP by its configuration as it is then. "
        "What it set up in the kernel, and the sidecars, stay when it ends and are found again by the next run.",
    )
    run_parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="its configuration (default: %(default)s)",
    )
    run_parser.add_argument(
        "--stand-by",
        action="store_true",
        help="where another agent runs on this node, be ready, and take over when it ends (an upgrade)",
    )
    run_parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the agent until it is told to stop."""
    require_root("it loads eBPF, and rules into network namespaces")
    config = load_config(args.config)
    log.set_up()
    asyncio.run(run_agent(config, stands_by=args.stand_by, reread=lambda: load_config(args.config)))
    return 0
