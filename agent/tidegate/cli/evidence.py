"""`tidegate flows`, `ready`, `permissive` and `strict`: what the ledger saw, what follows from it, and acting on it."""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from tidegate.cli import filters, tables
from tidegate.cli.arguments import ExamplesFormatter, add_json, duration
from tidegate.cli.target import CannotAsk, add_options, agent_address, require_root
from tidegate.node.client import AgentClient

FLOWS_EXAMPLES = """\
examples:
  tidegate flows --class plaintext --class starttls --since 14:30
  tidegate flows --service api --caller batch --follow
  tidegate flows --hint postgres --since 7d --json"""

READY_EXAMPLES = """\
examples:
  tidegate ready api
  tidegate ready api --window 24h --wait 10m
  tidegate ready --json"""

PERMISSIVE_EXAMPLES = """\
examples:
  tidegate permissive api
  tidegate permissive billing/api --json"""

STRICT_EXAMPLES = """\
examples:
  tidegate strict api
  tidegate strict api --guard 1h
  tidegate strict api --force --json"""

REFRESH_S = 0.5
ASKS = "only root may ask an agent"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the commands `flows`, `ready`, `permissive` and `strict`."""
    flows = subparsers.add_parser(
        "flows",
        help="who talks to whom, and how",
        description="Who called whom since it is observed: the class is what the client's bytes were (mesh is mTLS of "
        "the mesh, tls somebody's own). path says whether the service's sidecar carries the connections, or they go "
        "outside the sidecars (excluded ports, no sidecar), where no mode protects them. would be denied: permissive "
        "mode lets them in, and no intention would. Exits 0; 2 when no agent can be asked.",
        epilog=FLOWS_EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    add_options(flows)
    flows.add_argument("--service", metavar="NAME", help="only flows to or from this service")
    when = flows.add_mutually_exclusive_group()
    when.add_argument("--window", type=duration, metavar="TIME", help="only this last time")
    when.add_argument(
        "--since",
        type=filters.since,
        metavar="WHEN",
        help="only since this time, such as 10m (ago), 14:30 (today) or 2026-01-31",
    )
    filters.add_options(flows)
    flows.add_argument("--follow", action="store_true", help="keep showing until interrupted")
    flows.add_argument(
        "--for", dest="follow_for", type=duration, metavar="TIME", help="follow this long"
    )
    add_json(flows, "one JSON object, with --follow or --for one a line,")
    flows.set_defaults(run=run_flows)

    ready = subparsers.add_parser(
        "ready",
        help="can this service go strict?",
        description="Says READY (exit 0), NOT READY (1) or UNKNOWN (2), with every reason, the caller "
        "behind it and what to do next. Without SERVICE: every service, exit code of the worst. "
        "Exits 2 too when no agent can be asked.",
        epilog=READY_EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    add_options(ready)
    ready.add_argument("service", nargs="?", metavar="SERVICE")
    ready.add_argument(
        "--window",
        type=duration,
        metavar="TIME",
        help="observation window, such as 24h (default: the agent's)",
    )
    ready.add_argument(
        "--wait",
        type=duration,
        metavar="TIME",
        help="wait up to this long for the verdict READY",
    )
    add_json(ready, '{"verdicts": [...]}, one for each service,')
    ready.set_defaults(run=run_ready)

    permissive = subparsers.add_parser(
        "permissive",
        help="let a service take plaintext too, while its callers are onboarded",
        description="Sets MutualTLSMode=permissive in the service's own entry, and waits until every sidecar of it "
        "runs it. Exits 1 when the mesh does not allow permissive mode, with the command that allows it, or when a "
        "sidecar does not follow; 2 when nobody knows the service.",
        epilog=PERMISSIVE_EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    add_options(permissive)
    permissive.add_argument("service", metavar="SERVICE")
    permissive.add_argument(
        "--force", action="store_true", help="also for a service that the catalog does not know yet"
    )
    add_json(permissive, "one JSON event a line")
    permissive.set_defaults(run=run_permissive)

    strict = subparsers.add_parser(
        "strict",
        help="flip a service to strict mTLS, and guard the flip",
        description="Refuses unless the service is READY. After the flip the guard watches for known "
        "callers that are refused; on the first it puts the service back to its former mode and exits 1. It says "
        "how many plaintext connections are still open, until none is. Exits 0 when the service is strict and nobody "
        "was refused, 1 when it was refused, rolled back or NOT READY, 2 when it is UNKNOWN or could not be watched.",
        epilog=STRICT_EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    add_options(strict)
    strict.add_argument("service", metavar="SERVICE")
    strict.add_argument(
        "--guard",
        type=duration,
        default=600.0,
        metavar="TIME",
        help="watch this long after the flip (default 10m)",
    )
    strict.add_argument("--force", action="store_true", help="flip even if it is not READY")
    add_json(strict, "one JSON event a line")
    strict.set_defaults(run=run_strict)


def run_flows(args: argparse.Namespace) -> int:
    """Prints the ledger's edges once, or keeps them on the screen."""
    require_root(ASKS)
    return asyncio.run(_flows(args))


async def _flows(args: argparse.Namespace) -> int:
    nothing = "no such flows" if filters.is_given(args) else "no flows yet"
    async with AgentClient(agent_address(args)) as agent:

        async def fetch() -> dict[str, Any]:
            window = time.time() - args.since if args.since else args.window
            query = {"service": args.service or "", "window": str(window or "")}
            answer = await agent.get(
                "/v1/flows", **{key: text for key, text in query.items() if text}
            )
            return filters.chosen(dict(answer), args)

        if args.follow or args.follow_for is not None:
            deadline = time.monotonic() + args.follow_for if args.follow_for else None
            await _follow(fetch, deadline, nothing, json_lines=args.json)
        elif args.json:
            print(json.dumps(await fetch(), indent=2))
        else:
            answer = await fetch()
            table = tables.flows(answer, time.time(), nothing=nothing)
            tables.print_table(tables.console(), table)
            _tell_problems(answer)
    return 0


async def _follow(
    fetch: Callable[[], Any], deadline: float | None, nothing: str, *, json_lines: bool
) -> None:
    console = tables.console()

    def over() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    if json_lines:
        while not over():
            print(json.dumps(await fetch()), flush=True)
            await asyncio.sleep(REFRESH_S)
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while not over():
                answer = await fetch()
                table = tables.flows(answer, time.time(), nothing=nothing)
                problems = (Text(problem, "yellow") for problem in answer["problems"])
                live.update(Group(tables.fitted(console, table), *problems), refresh=True)
                await asyncio.sleep(REFRESH_S)
    else:
        seen: set[str] = set()
        missing: Collection[str] = ()
        while not over():
            answer = await fetch()
            for line in tables.flow_lines(answer):
                if line not in seen:
                    console.print(f"new: {line}", soft_wrap=True)
                    seen.add(line)
            missing = _tell_problems(answer, missing)
            await asyncio.sleep(REFRESH_S)
        answer = await fetch()
        tables.print_table(console, tables.flows(answer, time.time(), nothing=nothing))
        _tell_problems(answer, missing)


def _tell_problems(answer: dict[str, Any], known: Collection[str] = ()) -> Collection[str]:
    """Tells what is missing in an answer, such as that of a node, unless it is known; all that is missing."""
    problems: list[str] = answer["problems"]
    for problem in problems:
        if problem not in known:
            print(f"tidegate: {problem}", file=sys.stderr, flush=True)
    return problems


def run_ready(args: argparse.Namespace) -> int:
    """Prints the verdict of one service or of all; the exit code is the verdict."""
    require_root(ASKS)
    return asyncio.run(_ready(args))


async def _ready(args: argparse.Namespace) -> int:
    async with AgentClient(agent_address(args)) as agent:
        query = {"window": str(args.window)} if args.window else {}
        path = f"/v1/ready/{args.service}" if args.service else "/v1/ready"
        answer = dict(await agent.get(path, **query))
        if args.wait:
            answer = await _wait_ready(agent, path, query, args.wait, answer)
    verdicts = answer["verdicts"]
    if args.json:
        print(json.dumps(answer, indent=2))
    elif not verdicts:
        print("no service has a sidecar yet: there is nothing that could go strict")
    else:
        console = tables.console()
        for verdict in verdicts:
            tables.print_verdict(console, verdict, time.time())
    return max((tables.EXIT_CODES[verdict["verdict"]] for verdict in verdicts), default=2)


async def _wait_ready(
    agent: AgentClient, path: str, query: dict[str, str], wait_s: float, answer: dict[str, Any]
) -> dict[str, Any]:
    """Asks again until every verdict is READY or the time is over; shows a progress bar."""
    deadline = time.monotonic() + wait_s
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} % of the window is clean"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("observing", total=1.0)
        while True:
            verdicts = answer["verdicts"]
            if all(verdict["verdict"] == "READY" for verdict in verdicts):
                return answer
            if time.monotonic() >= deadline:
                return answer
            clean = min(
                (tables.clean_share(verdict, time.time()) for verdict in verdicts), default=0
            )
            why = next(
                (reason["message"] for verdict in verdicts for reason in verdict["reasons"]), ""
            )
            bar.update(task, completed=clean, description=why[:60] or "observing")
            await asyncio.sleep(REFRESH_S)
            answer = dict(await agent.get(path, **query))


def run_strict(args: argparse.Namespace) -> int:
    """Flips and guards; prints events as they come."""
    require_root(ASKS)
    try:
        return asyncio.run(_strict(args))
    except KeyboardInterrupt:
        print(
            f"\nthe flip of {args.service} and its guard go on in the agent; "
            f"`tidegate ready {args.service}` shows the mode",
            file=sys.stderr,
        )
        raise


def run_permissive(args: argparse.Namespace) -> int:
    """Makes a service permissive; prints events as they come."""
    require_root(ASKS)
    body = {"service": args.service, "force": args.force}
    exit_code = asyncio.run(told(args, "/v1/permissive", body))
    if exit_code is None:
        raise CannotAsk("the agent ended before the service was permissive; try again")
    return exit_code


async def told(args: argparse.Namespace, path: str, body: dict[str, object]) -> int | None:
    """Prints the events of a change as they come; the exit code of the last, None when the agent ended before."""
    console = tables.console()
    exit_code: int | None = None
    async with AgentClient(agent_address(args)) as agent:
        async for event in agent.stream(path, body):
            if args.json:
                print(json.dumps(event), flush=True)
            else:
                tables.print_event(console, event)
            exit_code = event.get("exit_code", exit_code)
    return exit_code


async def _strict(args: argparse.Namespace) -> int:
    body = {"service": args.service, "guard_s": args.guard, "force": args.force}
    exit_code = await told(args, "/v1/strict", body)
    if exit_code is None:
        raise CannotAsk(
            "the agent ended before the guard did; it takes the guard up again when it returns: "
            f"see `tidegate ready {args.service}`"
        )
    sys.stdout.flush()
    return exit_code
