"""`tidegate status`: how the workloads of this node are, what is left alone and why, and what is wrong.

One line for each workload. Its verdict is that of its service in the whole mesh, where the agents can say it in time;
the rest is this node's agent alone.
"""

import argparse
import asyncio
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidegate import durations
from tidegate.cli import tables
from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.cli.endings import told_to_end
from tidegate.cli.target import add_options, agent_addresses, require_root
from tidegate.errors import TidegateError
from tidegate.node.client import AgentClient, AgentUnreachable

EXAMPLES = """\
examples:
  tidegate status
  tidegate status --watch
  tidegate status --json | jq '.nodes[].workloads[] | select(.redirect == "drifted")'
  tidegate status --quiet      # as a liveness probe"""

REFRESH_S = 1.0
PROBE_S = 5.0
"""How long a probe waits for the agent."""
VERDICT_S = 5.0
"""How long a verdict is waited for: it needs the agents of other nodes."""

WELL, UNWELL, UNKNOWN = 0, 1, 2
"""Exit codes."""

FEW = 5
"""Of more workloads, what is the same is said once."""

_NOT_FOUND = "not-found"
_STYLES = {
    "ok": "green",
    "waiting": "yellow",
    "none": "dim",
    "drifted": "bold red",
    "blocked": "bold red",
    "failed": "bold red",
}
_BROKEN = ("drifted", "blocked", "failed")


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of one workload in the answer of GET /v1/status."""

    id: str
    name: str
    service: str
    namespace: str = "default"
    netns: str
    wanted_in_mesh: bool
    redirect: str
    sidecar: str
    state: str
    mode: str
    observed_since: float
    repairs: int = 0
    last_repair: str = ""
    notes: tuple[str, ...] = ()
    reason: str = ""
    problem: str
    verdict: str = ""
    """Of its service; empty while that is not known. No part of the agent's answer."""


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """What runs on the node and is not looked after."""

    name: str
    namespace: str
    treatment: str
    reason: str


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What one agent answers."""

    node: str
    round_at: float
    workloads: tuple[Workload, ...]
    left_alone: tuple[Left, ...] = ()
    problems: tuple[str, ...]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One look at all nodes that were asked."""

    nodes: tuple[Node, ...] = ()
    unheard: tuple[str, ...] = ()
    """Why an agent did not answer, one sentence each."""

    @property
    def exit_code(self) -> int:
        """0 when all is well, 1 when something is wrong, 2 when that is not known."""
        if self.unheard or not all(node.round_at for node in self.nodes):
            return UNKNOWN
        return UNWELL if any(map(_is_unwell, self.nodes)) else WELL


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `status`."""
    parser = subparsers.add_parser(
        "status",
        help="how this node's workloads are",
        description="One line for each workload: its redirection, since when it is observed, its sidecar, its mode "
        "and the verdict on its service. Then what is left alone and why, and what is wrong. Exits 0 when all is well, "
        "1 when a workload or the agent has a problem, 2 when the agent cannot be asked or has not looked around yet.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    add_options(parser)
    parser.add_argument("--watch", action="store_true", help="keep showing until interrupted")
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="print nothing, and exit 0 while the agent lives, whatever is wrong with workloads, else 2",
    )
    add_json(parser, "one JSON object, with --watch one a line whenever something has changed,")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints once, or keeps it on the screen."""
    require_root("only root may ask an agent")
    addresses = agent_addresses(args)
    if args.quiet:
        return asyncio.run(_probe(addresses))
    if args.watch:
        return _watch(addresses, json_lines=args.json)
    seen = asyncio.run(_look(addresses))
    if args.json:
        print(json.dumps(_as_json(seen), indent=2))
    else:
        _print(tables.console(), seen)
    return seen.exit_code


async def _probe(addresses: Iterable[str]) -> int:
    try:
        for address in addresses:
            async with AgentClient(address, timeout_s=PROBE_S) as agent:
                await agent.get("/healthz")
    except TidegateError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return UNKNOWN
    return WELL


async def _look(addresses: Iterable[str]) -> Seen:
    answers = await asyncio.gather(*map(_ask, addresses), return_exceptions=True)
    found, unheard = [], []
    for answer in answers:
        match answer:
            case Node():
                found.append(answer)
            case TidegateError():
                unheard.append(str(answer))
            case error:
                raise error
    return Seen(nodes=tuple(found), unheard=tuple(unheard))


async def _ask(address: str) -> Node:
    async with AgentClient(address) as agent:
        answer, verdicts = await asyncio.gather(agent.get("/v1/status"), _verdicts(address))
    try:
        node = msgspec.convert(answer, Node)
    except msgspec.ValidationError as error:
        problem = f"the agent at {address} answers in a way that this command does not know"
        raise AgentUnreachable(f"{problem}: {error}") from error
    workloads = sorted(node.workloads, key=lambda one: (one.namespace, one.name))
    judged = tuple(
        msgspec.structs.replace(one, verdict=verdicts.get(one.service, "")) for one in workloads
    )
    return msgspec.structs.replace(node, workloads=judged)


async def _verdicts(address: str) -> dict[str, str]:
    """By service; none where the mesh does not answer in time: this node is shown all the same."""
    try:
        async with AgentClient(address, timeout_s=VERDICT_S) as agent:
            answer = await agent.get("/v1/ready")
        return {str(one["service"]): str(one["verdict"]) for one in answer["verdicts"]}
    except (TidegateError, KeyError, TypeError):
        return {}


def _watch(addresses: tuple[str, ...], *, json_lines: bool) -> int:
    """Shows until it is told to end; the exit code is that of the last look."""
    out = tables.console()
    with told_to_end() as end, contextlib.ExitStack() as stack:
        live = None
        if out.is_terminal and not json_lines:
            live = stack.enter_context(Live(console=out, auto_refresh=False))
        shown: Seen | None = None
        while True:
            seen = asyncio.run(_look(addresses))
            if live is not None:
                unheard = (Text(problem, "bold red") for problem in seen.unheard)
                live.update(Group(*_lines(out, seen, time.time()), *unheard), refresh=True)
            elif shown is None or _lasting(seen) != _lasting(shown):
                if json_lines:
                    print(json.dumps(_as_json(seen)), flush=True)
                else:
                    _print(out, seen)
            shown = seen
            if end.wait(REFRESH_S):
                return seen.exit_code


def _lasting(seen: Seen) -> bytes:
    """Without what is another each time: when the agent has looked, and the numbers in its sentences."""
    nodes = (msgspec.structs.replace(node, round_at=min(node.round_at, 1.0)) for node in seen.nodes)
    told = msgspec.json.encode(msgspec.structs.replace(seen, nodes=tuple(nodes)))
    return re.sub(rb"[0-9]+ s\b", b"", told)


def _as_json(seen: Seen) -> dict[str, object]:
    return {**msgspec.to_builtins(seen), "exit_code": seen.exit_code}


def _print(out: Console, seen: Seen) -> None:
    for line in _lines(out, seen, time.time()):
        if isinstance(line, Table):
            tables.print_table(out, line)
        else:
            out.print(line, soft_wrap=True)
    sys.stdout.flush()
    for problem in seen.unheard:
        print(f"tidegate: {problem}", file=sys.stderr, flush=True)


def _lines(out: Console, seen: Seen, now: float) -> Iterator[RenderableType]:
    for number, node in enumerate(seen.nodes):
        if number:
            yield Text()
        yield from _of_node(out, node, now)


def _of_node(out: Console, node: Node, now: float) -> Iterator[RenderableType]:
    yield Text.assemble(("node ", "bold"), (node.node, "bold"), _round(node, now))
    if node.workloads:
        yield tables.fitted(out, _workloads(node, now))
    else:
        yield Text("no workloads")
    yield from _told_together(
        "{}: not in the mesh: {}",
        (
            (_name_of(one), one.reason)
            for one in node.workloads
            if not one.wanted_in_mesh and one.reason
        ),
    )
    yield from _told_together(
        "left alone: {}: {}",
        (
            (_name_of(left), f"{left.treatment}: {left.reason}")
            for left in node.left_alone
            if left.treatment != _NOT_FOUND
        ),
    )
    for one in node.workloads:
        yield from _remarks(one)
    # What is wrong comes last: there it is seen, however many lines there are.
    for one in node.workloads:
        if one.problem:
            yield Text(f"{_name_of(one)}: {one.problem}", "bold red")
    for left in node.left_alone:
        if left.treatment == _NOT_FOUND:
            said = f"left alone: {_name_of(left)}: {left.treatment}: {left.reason}"
            yield Text(said, "bold red")
    for problem in node.problems:
        yield Text(f"problem: {problem}", "bold red")


def _round(node: Node, now: float) -> str:
    if not node.round_at:
        return ": the agent has not looked around yet"
    said = f": looked at {durations.ago(now - node.round_at)}"
    if len(node.workloads) <= FEW:
        return said
    states = Counter(one.redirect for one in node.workloads).most_common()
    return f"{said}; {len(node.workloads)} workloads: " + ", ".join(
        f"{count} {state}" for state, count in states
    )


def _told_together(form: str, remarks: Iterable[tuple[str, str]]) -> Iterator[Text]:
    """What is said by name; where the same is said of many, by their number."""
    names: dict[str, list[str]] = {}
    for name, remark in remarks:
        names.setdefault(remark, []).append(name)
    for remark, those in names.items():
        said = those if len(those) <= FEW else (f"{len(those)} of them",)
        yield from (Text(form.format(who, remark), "dim") for who in said)


def _workloads(node: Node, now: float) -> Table:
    table = tables.titled("workload", "service", "redirect", "observed", "sidecar", "mode")
    table.add_column("verdict", no_wrap=True)
    for one in node.workloads:
        table.add_row(
            _name_of(one),
            one.service,
            Text(one.redirect, _STYLES.get(one.redirect, "")),
            durations.span(now - one.observed_since) if one.observed_since else Text("no", "red"),
            _sidecar(one),
            one.mode or "-",
            Text(one.verdict or "-", tables.VERDICT_STYLES.get(one.verdict, "")),
        )
    return table


def _sidecar(one: Workload) -> str:
    if not one.wanted_in_mesh:
        return one.state or "-"
    return "its own" if one.sidecar == "own" else one.state or "not yet"


def _remarks(one: Workload) -> Iterator[Text]:
    """What a reader has to know of a workload beyond its line, and beyond what is wrong."""
    name = _name_of(one)
    if one.repairs:
        times = "once" if one.repairs == 1 else f"{one.repairs} times"
        said = f"its redirection was changed and put back {times}; the last time: {one.last_repair}"
        yield Text(f"{name}: {said}", "yellow")
    yield from (Text(f"{name}: {note}", "yellow") for note in one.notes)


def _name_of(one: Workload | Left) -> str:
    return one.name if one.namespace in ("", "default") else f"{one.namespace}/{one.name}"


def _is_unwell(node: Node) -> bool:
    return (
        bool(node.problems)
        or any(one.problem or one.redirect in _BROKEN for one in node.workloads)
        or any(left.treatment == _NOT_FOUND for left in node.left_alone)
    )
