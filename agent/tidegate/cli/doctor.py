"""`tidegate doctor`: which kernel features and libraries are there, and what is lost without them.

Then what redirection gets of it: which backend works, and where workloads of this machine's agents, if any answer, have
a way around their sidecar.
"""

import argparse
import json

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidegate.cli import policies, target, workloads
from tidegate.cli.target import require_root
from tidegate.enforce.redirect.backend import BackendName
from tidegate.enforce.redirect.engine import AUTO, Choice, Engine, choose
from tidegate.enforce.sidecar import envoy
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.kernel.features import Feature, probe_all


class BackendState(msgspec.Struct, frozen=True):
    """Whether rules can go through one backend here."""

    name: BackendName
    works: bool
    detail: str


class Redirection(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine has for redirection."""

    backends: tuple[BackendState, ...]
    auto: Choice | None
    """None when no backend works."""
    ways_around: dict[str, tuple[str, ...]]
    """By workload: how its traffic goes around its sidecar, one sentence each."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has of what tidegate needs",
        description="Tries every feature tidegate needs, and each backend of redirection, in throw-away namespaces, "
        "and leaves nothing behind. Names the ways around a sidecar that workloads have, if agents answer here. "
        "Exits 1 when something is missing that nothing else can stand in for.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probes and prints; 0 when everything is there."""
    require_root()
    features = (*probe_all(), _envoy())
    redirection = _redirection()
    if args.json:
        found = {"features": features, "redirection": redirection}
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        out = Console(highlight=False)
        out.print(_features(features))
        out.print()
        _print_redirection(out, redirection)
    missing = any(feature.needed and not feature.present for feature in features)
    return 1 if missing or not redirection.auto else 0


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


def _redirection() -> Redirection:
    states = tuple(map(_state, BackendName))
    if not any(state.works for state in states):
        return Redirection(backends=states, auto=None, ways_around={})
    return Redirection(backends=states, auto=choose(AUTO), ways_around=_ways_around(Engine(AUTO)))


def _state(name: BackendName) -> BackendState:
    try:
        return BackendState(name, True, choose(name).why.removeprefix("it was asked for; "))
    except KernelError as error:
        return BackendState(name, False, str(error))


def _ways_around(engine: Engine) -> dict[str, tuple[str, ...]]:
    """Of every workload that should have a sidecar; what cannot be found out is said in its place."""
    found = {}
    for node in workloads.known(target.agents_of_this_machine()):
        for one in node.workloads:
            if not one.wanted_in_mesh:
                continue
            try:
                gaps = engine.gaps(one.netns, one.policy or policies.of_workload(one))
            except (KernelError, TidegateError) as error:
                gaps = (f"not known: {error}",)
            if gaps:
                found[f"{one.name} on {node.node}"] = gaps
    return found


def _features(features: tuple[Feature, ...]) -> Table:
    table = Table("feature", "", "found", "without it", box=None, pad_edge=False)
    for feature in features:
        missing = "[red]missing[/]" if feature.needed else "[yellow]missing[/]"
        mark = "[green]present[/]" if feature.present else missing
        table.add_row(
            feature.name, mark, feature.detail, "" if feature.present else feature.lost_without
        )
    return table


def _print_redirection(out: Console, redirection: Redirection) -> None:
    table = Table("redirection through", "", "why", box=None, pad_edge=False)
    for state in redirection.backends:
        mark = "[green]works[/]" if state.works else "[yellow]does not work[/]"
        table.add_row(state.name, mark, Text(state.detail))
    out.print(table)
    auto = redirection.auto
    out.print(
        Text(f"auto is {auto.backend}: {auto.why}" if auto else "no backend works here", "bold")
    )
    for workload, gaps in redirection.ways_around.items():
        for gap in gaps:
            out.print(Text(f"{workload}: {gap}", "yellow"), soft_wrap=True)
