"""`tidegate server`: the small store of intent and catalog that agents share."""

import argparse
import asyncio
from pathlib import Path

from tidegate.catalog.server import serve
from tidegate.catalog.settings import load_config
from tidegate.cli.target import require_root
from tidegate.node import log, notify

DEFAULT_CONFIG = Path("/etc/tidegate/server.yaml")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `server`."""
    parser = subparsers.add_parser(
        "server",
        help="the small store of intent and catalog that agents share",
        description="Speaks Consul's HTTP API for config entries and the catalog, and is the mesh's CA, "
        "until SIGTERM.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="FILE",
        help="its configuration (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the server until it is told to stop."""
    require_root("its keys and its socket are root's")
    config = load_config(args.config)
    log.set_up()
    asyncio.run(serve(config, on_ready=notify.ready))
    return 0
