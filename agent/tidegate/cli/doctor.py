"""`tidegate doctor`: which kernel features and libraries are there, and what is lost without them."""

import argparse
import json

import msgspec
from rich.console import Console
from rich.table import Table

from tidegate.cli.target import require_root
from tidegate.enforce.sidecar import envoy
from tidegate.errors import TidegateError
from tidegate.kernel.features import Feature, probe_all


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has of what tidegate needs",
        description="Tries every feature tidegate needs, in throw-away namespaces, and leaves nothing "
        "behind. Exits 1 when one is missing.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def _envoy() -> Feature:
    """The sidecar's program, which is no feature of the kernel and is needed all the same."""
    try:
        found, detail = True, str(envoy.binary())
    except TidegateError as error:
        found, detail = False, str(error)
    return Feature(
        name="Envoy",
        present=found,
        detail=detail,
        lost_without="no workload gets a sidecar here; observation works",
    )


def run(args: argparse.Namespace) -> int:
    """Probes and prints; 0 when everything is there."""
    require_root()
    features = (*probe_all(), _envoy())
    if args.json:
        print(json.dumps({"features": msgspec.to_builtins(features)}, indent=2))
    else:
        table = Table("feature", "", "found", "without it", box=None, pad_edge=False)
        for feature in features:
            mark = "[green]present[/]" if feature.present else "[red]missing[/]"
            table.add_row(
                feature.name, mark, feature.detail, "" if feature.present else feature.lost_without
            )
        Console(highlight=False).print(table)
    return 0 if all(feature.present for feature in features) else 1
