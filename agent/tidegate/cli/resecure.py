"""`tidegate resecure`: the last step of onboarding, what it would break, and the proof that it is done."""

import argparse
import asyncio

from tidegate.cli.arguments import ExamplesFormatter, add_json, duration
from tidegate.cli.evidence import ASKS, told
from tidegate.cli.target import CannotAsk, add_options, require_root

EXAMPLES = """\
examples:
  tidegate resecure
  tidegate resecure --window 24h --json
  tidegate resecure --force"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `resecure`."""
    parser = subparsers.add_parser(
        "resecure",
        help="close what onboarding opened, and prove it",
        description="Says what would break: who of the mesh still calls out of it, and who is still permissive; "
        "refuses then. Otherwise sets AllowEnablingPermissiveMutualTLS=false and MeshDestinationsOnly=true "
        "in every partition, waits until every sidecar runs it, and verifies every namespace and partition, "
        "proxy-defaults included. Exits 0 when the mesh is proved secure, 1 when it is not or something would break, "
        "2 when something could not be seen.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    parser.add_argument(
        "--window",
        type=duration,
        metavar="TIME",
        help="observation window, such as 24h (default: the agent's)",
    )
    parser.add_argument("--force", action="store_true", help="change it even if something breaks")
    add_options(parser)
    add_json(parser, "one JSON event a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Re-secures the mesh; prints events as they come."""
    require_root(ASKS)
    body = {"window_s": args.window, "force": args.force}
    exit_code = asyncio.run(told(args, "/v1/resecure", body))
    if exit_code is None:
        raise CannotAsk("the agent ended before the mesh was verified; try again")
    return exit_code
