"""`tidegate intentions suggest`: the least intentions that what was seen needs, as entries to review, or written."""

import argparse
import asyncio
import json
from typing import Any

from rich.console import Console
from rich.text import Text

from tidegate.cli import tables
from tidegate.cli.arguments import ExamplesFormatter, add_json, duration
from tidegate.cli.onboard import told_problems
from tidegate.cli.target import add_options, agent_address, require_root
from tidegate.errors import TidegateError
from tidegate.node.client import AgentClient

ASKS = "only root may ask an agent"

EXAMPLES = """\
examples:
  tidegate intentions suggest
  tidegate intentions suggest api --window 24h
  tidegate intentions suggest --all-callers --write"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `intentions`."""
    group = subparsers.add_parser(
        "intentions",
        help="which intentions what was seen needs",
        description="Intentions say which service may call which. This compares them with who really calls.",
    )
    commands = group.add_subparsers(dest="intentions_command", required=True, metavar="COMMAND")
    suggest = commands.add_parser(
        "suggest",
        help="the least intentions that allow what was seen",
        description="Compares who called in the window with who may call, and prints entries that also allow the "
        "callers which use mesh mTLS and no intention is about; with --all-callers those too that will need one once "
        "they are in the mesh. What entries have already stays, what they deny too. Exits 0, also when nothing is "
        "missing; 1 when an entry was not written; 2 for a service that nobody knows, or when not every caller could "
        "be seen.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    suggest.add_argument("service", nargs="?", metavar="SERVICE", help="only towards this service")
    suggest.add_argument(
        "--window",
        type=duration,
        metavar="TIME",
        help="observation window, such as 24h (default: the agent's)",
    )
    suggest.add_argument(
        "--all-callers",
        action="store_true",
        help="also for callers that do not use mesh mTLS yet",
    )
    suggest.add_argument("--write", action="store_true", help="write the entries")
    add_options(suggest)
    add_json(suggest, '{"suggestions": [...], "problems": [...]}')
    suggest.set_defaults(run=run_suggest)


def run_suggest(args: argparse.Namespace) -> int:
    """Prints suggestions, and writes them where that is asked for."""
    require_root(ASKS)
    answer = asyncio.run(_written(args) if args.write else _read(args))
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        _print(tables.console(), answer["suggestions"], args)
    failed = args.write and any(
        one["entry"] is not None and not one["written"] for one in answer["suggestions"]
    )
    unseen = told_problems(answer)
    return 1 if failed else unseen


async def _read(args: argparse.Namespace) -> dict[str, Any]:
    query = {
        "service": args.service or "",
        "window": str(args.window or ""),
        "callers": "all" if args.all_callers else "mesh",
    }
    async with AgentClient(agent_address(args)) as agent:
        given = {key: text for key, text in query.items() if text}
        return dict(await agent.get("/v1/intentions/suggest", **given))


async def _written(args: argparse.Namespace) -> dict[str, Any]:
    body = {"service": args.service, "window_s": args.window, "all_callers": args.all_callers}
    async with AgentClient(agent_address(args)) as agent:
        async for answer in agent.stream("/v1/intentions", body):
            return answer
    raise TidegateError("the agent ended before it answered; try again")


def _print(out: Console, suggestions: list[dict[str, Any]], args: argparse.Namespace) -> None:
    for one in suggestions:
        about = one["suggestion"]
        out.print(Text(about["destination"], "bold"))
        for source in about["sources"]:
            seen = f"{source['connections']} connections, {', '.join(source['classes'])}"
            later = source["because"] == "onboarding"
            mark = "  (needs it once it is in the mesh)" if later else ""
            out.print(Text(f"  + {source['source']}: {seen}{mark}"), soft_wrap=True)
        for remark in one["remarks"]:
            out.print(Text(f"  - {remark}", "yellow"), soft_wrap=True)
        if one["written"]:
            out.print(Text(f"  written: service-intentions/{about['destination']}", "green"))
        elif one["entry"] is not None:
            out.print(json.dumps(one["entry"], indent=4), markup=False, soft_wrap=True)
        elif about["sources"] and not args.all_callers:
            out.print("  --all-callers shows the entry for them")
    if not any(one["suggestion"]["sources"] for one in suggestions):
        out.print("no intention is missing for what was seen")
