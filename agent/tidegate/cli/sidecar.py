"""`tidegate sidecar`: the place of one service of this machine, made before the service starts (docs/systemd.md)."""

import argparse
import sys
from pathlib import Path

from tidegate.cli.target import require_root
from tidegate.node import places
from tidegate.node.config import DEFAULT_CONFIG, load_config
from tidegate.node.places import PlaceError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `sidecar`."""
    group = subparsers.add_parser("sidecar", help="the place of one service of this machine")
    commands = group.add_subparsers(dest="sidecar_command", required=True, metavar="COMMAND")
    up_parser = commands.add_parser(
        "up",
        help="make the service's network namespace, with its rules in force",
        description="Makes the network namespace of a service of this machine that the agent's configuration has under"
        " `processes`: rules first, then the link to the host. Until the agent has started the sidecar they lead"
        " nowhere. What is there and right stays as it is.",
    )
    up_parser.add_argument("name", help="of the service's workload")
    up_parser.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="then wait at most so long for the sidecar; a service without one starts closed (%(default)g)",
    )
    up_parser.set_defaults(run=up)
    down_parser = commands.add_parser(
        "down", help="take the service's network namespace away, when the service has ended"
    )
    down_parser.add_argument("name", help="of the service's workload")
    down_parser.set_defaults(run=down)
    for parser in (up_parser, down_parser):
        parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE")


def up(args: argparse.Namespace) -> int:
    """Makes the place of one service."""
    require_root("it makes network namespaces, and loads rules into them")
    config = load_config(args.config)
    one = places.described(config, args.name)
    places.make(config, one)
    if args.wait > 0 and one.meshed:
        try:
            places.wait_until_redirected(config, args.name, args.wait)
        except PlaceError as error:
            print(f"tidegate: {error}; it is closed until then", file=sys.stderr)
    return 0


def down(args: argparse.Namespace) -> int:
    """Takes the place of one service away."""
    require_root("it removes network namespaces")
    services = {one.workload_name: one for one in load_config(args.config).processes}
    places.remove(args.name, services.get(args.name))
    return 0
