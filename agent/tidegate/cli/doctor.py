"""`tidegate doctor`: which kernel features and libraries are there, and what is lost without them.

Then what redirection gets of it: which backend works, and where workloads of this machine's agents, if any answer, have
a way around their sidecar. Last, what else of this node stands in an agent's way, and what to do about it.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from tidegate.cli import policies, target, workloads
from tidegate.cli.arguments import add_json
from tidegate.cli.target import require_root
from tidegate.cli.workloads import Node
from tidegate.enforce.redirect import foreign
from tidegate.enforce.redirect.backend import BackendName
from tidegate.enforce.redirect.engine import AUTO, Choice, Engine, choose
from tidegate.enforce.sidecar import envoy
from tidegate.errors import TidegateError
from tidegate.kernel import processes
from tidegate.kernel.errors import KernelError
from tidegate.kernel.features import Feature, probe_all
from tidegate.node import inspection
from tidegate.node.config import DEFAULT_CONFIG, AgentConfig, load_config
from tidegate.node.inspection import Finding, Place, State
from tidegate.verdict.steps import Environment


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
    faulty_annotations: dict[str, tuple[str, ...]]
    """By workload: annotations that are wrong, one sentence each."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has of what tidegate needs",
        description="Tries every feature tidegate needs, and each backend of redirection, in throw-away namespaces, "
        "and leaves nothing behind. Names the ways around a sidecar that workloads have, if agents answer here, and "
        "says what to do about whatever else of this node stands in the agent's way. Exits 1 when something is missing "
        "that nothing else can stand in for, or costs workloads their redirection or their evidence.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"the agent's configuration (default: {DEFAULT_CONFIG} if it is there)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probes and prints; 0 when everything is there."""
    require_root("it tries features of the kernel in network namespaces")
    config = _config(args.config)
    features = (*probe_all(), _envoy(config))
    nodes = workloads.known(target.agents_of_this_machine())
    redirection = _redirection(nodes)
    findings = inspection.inspect(config, _agent(config), _places(nodes))
    if args.json:
        found = {"features": features, "redirection": redirection, "findings": findings}
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        out = Console(highlight=False)
        _print_features(out, features)
        out.print()
        _print_redirection(out, redirection)
        out.print()
        _print_findings(out, findings)
    lacking = [feature.name for feature in features if feature.needed and not feature.present]
    lacking += [finding.name for finding in findings if finding.state is State.WRONG]
    if not redirection.auto:
        lacking.append("a backend of redirection")
    if not args.json:
        out.print()
        well = "nothing that tidegate needs is missing here"
        if remarked := sorted({*redirection.faulty_annotations, *redirection.ways_around}):
            well += f"; see what is said above of {', '.join(remarked)}"
        _print_line(
            out, Text(f"to be put right: {', '.join(lacking)}" if lacking else well, "bold")
        )
    return 1 if lacking else 0


def _config(file: Path | None) -> AgentConfig | None:
    if file is None and not DEFAULT_CONFIG.exists():
        return None
    return load_config(file or DEFAULT_CONFIG)


def _agent(config: AgentConfig | None) -> int | None:
    """The process of this node's agent, None when none is seen to run."""
    directory = config.run_dir if config else target.AGENT_SOCKET.parent
    holders = processes.holding(directory) if directory.is_dir() else ()
    return holders[0] if holders else None


def _places(nodes: Iterable[Node]) -> tuple[Place, ...]:
    return tuple(
        Place(f"{one.name} on {node.node}", one.netns) for node in nodes for one in node.workloads
    )


def _envoy(config: AgentConfig | None) -> Feature:
    """The sidecar's program, which is no feature of the kernel and is needed all the same, but where pods bring it."""
    try:
        found, detail = True, str(envoy.binary())
    except TidegateError as error:
        found, detail = False, str(error)
    return Feature(
        name="Envoy",
        present=found,
        detail=detail,
        lost_without="no workload gets a sidecar here; redirection to workloads' own, and observation, work",
        needed=config is None or config.environment is not Environment.KUBERNETES,
    )


def _redirection(nodes: tuple[Node, ...]) -> Redirection:
    states = tuple(map(_state, BackendName))
    works = any(state.works for state in states)
    return Redirection(
        backends=states,
        auto=choose(AUTO) if works else None,
        ways_around=_ways_around(Engine(AUTO), nodes) if works else {},
        faulty_annotations=_faulty_annotations(nodes),
    )


def _state(name: BackendName) -> BackendState:
    try:
        return BackendState(name, True, choose(name).why.removeprefix("it was asked for; "))
    except KernelError as error:
        return BackendState(name, False, str(error))


def _faulty_annotations(nodes: Iterable[Node]) -> dict[str, tuple[str, ...]]:
    """Of every workload, with a sidecar or without."""
    found = {}
    for node in nodes:
        for one in node.workloads:
            faults = policies.faults_of_workload(one)
            if faults:
                found[f"{one.name} on {node.node}"] = tuple(map(str, faults))
    return found


def _ways_around(engine: Engine, nodes: Iterable[Node]) -> dict[str, tuple[str, ...]]:
    """Of every workload that should have a sidecar; what cannot be found out is said in its place."""
    found = {}
    for node in nodes:
        for one in node.workloads:
            if not one.wanted_in_mesh:
                continue
            try:
                policy = one.policy or policies.of_workload(one)
                others = map(str, foreign.find(one.netns))
                gaps = (*others, *engine.gaps(one.netns, policy))
            except (KernelError, TidegateError) as error:
                gaps = (f"not known: {error}",)
            if gaps:
                found[f"{one.name} on {node.node}"] = gaps
    return found


def _print_features(out: Console, features: tuple[Feature, ...]) -> None:
    width = max((len(feature.name) for feature in features), default=0)
    for feature in features:
        without = "" if feature.present else f"; without it: {feature.lost_without}"
        style = "green" if feature.present else "red" if feature.needed else "yellow"
        mark = Text("present" if feature.present else "missing", style)
        _print_line(out, mark, f"  {feature.name:<{width}}  {feature.detail}{without}")


def _print_redirection(out: Console, redirection: Redirection) -> None:
    for state in redirection.backends:
        mark = Text("works  " if state.works else "fails  ", "green" if state.works else "yellow")
        _print_line(out, mark, f"  redirection through {state.name}: {state.detail}")
    auto = redirection.auto
    chosen = f"auto is {auto.backend}: {auto.why}" if auto else "no backend works here"
    _print_line(out, Text(chosen, "bold"))
    for workload, faults in redirection.faulty_annotations.items():
        for fault in faults:
            _print_line(out, Text(f"{workload}: annotation {fault}", "yellow"))
    for workload, gaps in redirection.ways_around.items():
        for gap in gaps:
            _print_line(out, Text(f"{workload}: {gap}", "yellow"))


_MARKS = {State.WELL: "green", State.NOTE: "yellow", State.WRONG: "red", State.UNKNOWN: "magenta"}


def _print_findings(out: Console, findings: tuple[Finding, ...]) -> None:
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        mark = Text(f"{finding.state:<7}", _MARKS[finding.state])
        _print_line(out, mark, f"  {finding.name:<{width}}  {finding.detail}")
        if finding.advice:
            _print_line(out, Text(f"         {finding.advice}", "cyan"))


def _print_line(out: Console, *parts: Text | str) -> None:
    """One line however long: a path in it stays whole."""
    out.print(Text.assemble(*parts), soft_wrap=True)
