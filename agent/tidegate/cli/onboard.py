"""`tidegate onboard status` and `onboard plan`: where every service stands, and what to do next, command by command."""

import argparse
import asyncio
import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from tidegate import durations
from tidegate.cli import tables
from tidegate.cli.arguments import ExamplesFormatter, add_json, duration
from tidegate.cli.target import add_options, agent_address, require_root
from tidegate.node.client import AgentClient

ASKS = "only root may ask an agent"

STATUS_EXAMPLES = """\
examples:
  tidegate onboard status
  tidegate onboard status --window 24h
  tidegate onboard status --json"""

PLAN_EXAMPLES = """\
examples:
  tidegate onboard plan api
  tidegate onboard plan api web --json
  tidegate onboard plan"""

_STATE_STYLES = {"done": "green", "not-needed": "dim", "next": "bold yellow", "later": ""}
_PERMISSION_WORDS = {
    "allowed": "has an intention",
    "by-default": "no intention, allowed by default",
    "missing": "no intention",
    "denied": "denied by an intention",
    "unknowable": "",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `onboard`."""
    group = subparsers.add_parser(
        "onboard",
        help="where every service stands, and what to do next",
        description="From plaintext to strict mTLS: where each service stands, and the next step with its command. "
        "Both only look, and change nothing.",
    )
    commands = group.add_subparsers(dest="onboard_command", required=True, metavar="COMMAND")

    status = commands.add_parser(
        "status",
        help="the whole mesh at a glance, and the steps that bring it furthest",
        description="Every service: mode and what it comes from, instances with a sidecar, share of mesh mTLS in the "
        "window, downstreams that strict mode would refuse, verdict. Then the three steps that move most "
        "services. Exits 0 when every service is in the mesh and strict, 1 when there is something left to do, 2 when "
        "something could not be seen or no agent can be asked.",
        epilog=STATUS_EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    _add_window(status)
    add_options(status)
    add_json(status)
    status.set_defaults(run=run_status)

    plan = commands.add_parser(
        "plan",
        help="the steps of a service: which are done, which is next, and its command",
        description="The steps of onboarding for one service, for several in the order in which to onboard them, or "
        "for all. Exits 0; 2 for a service that nobody knows, or when something could not be seen.",
        epilog=PLAN_EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    plan.add_argument("services", nargs="*", metavar="SERVICE")
    _add_window(plan)
    add_options(plan)
    add_json(plan)
    plan.set_defaults(run=run_plan)


def run_status(args: argparse.Namespace) -> int:
    """Prints the mesh at a glance."""
    require_root(ASKS)
    answer = _asked(args, "/v1/onboard/status")
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        _print_status(tables.console(), answer)
    if unseen := told_problems(answer):
        return unseen
    return 0 if all(_is_done(one) for one in answer["services"]) else 1


def run_plan(args: argparse.Namespace) -> int:
    """Prints the steps of services."""
    require_root(ASKS)
    answer = _asked(args, "/v1/onboard/plan", services=",".join(args.services))
    if args.json:
        print(json.dumps(answer, indent=2))
    else:
        _print_plan(tables.console(), answer)
    return told_problems(answer)


def told_problems(answer: dict[str, Any]) -> int:
    """Says on standard error why something may be missing in an answer; 2 where that is so, else 0."""
    for problem in answer["problems"]:
        print(f"tidegate: {problem}", file=sys.stderr)
    return 2 if answer["problems"] else 0


def _add_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window",
        type=duration,
        metavar="TIME",
        help="observation window, such as 24h (default: the agent's)",
    )


def _asked(args: argparse.Namespace, path: str, **query: str) -> dict[str, Any]:
    query["window"] = str(args.window or "")
    given = {key: text for key, text in query.items() if text}

    async def ask() -> dict[str, Any]:
        async with AgentClient(agent_address(args)) as agent:
            return dict(await agent.get(path, **given))

    return asyncio.run(ask())


def _is_done(service: dict[str, Any]) -> bool:
    return bool(service["mode"] == "strict" and service["meshed"] == service["instances"])


def _print_status(out: Console, answer: dict[str, Any]) -> None:
    out.print(Text(f"window {durations.span(answer['window_s'])}; {_settings(answer['settings'])}"))
    table = tables.titled("service", "mode", "sidecars", "mesh", "verdict")
    table.add_column("blocked by", overflow="fold")
    for one in answer["services"]:
        verdict = one["verdict"] or "-"
        table.add_row(
            one["service"],
            f"{one['mode']} ({one['mode_source']})",
            f"{one['meshed']} of {one['instances']}",
            _share(one),
            Text(verdict, tables.VERDICT_STYLES.get(verdict, "")),
            ", ".join(one["blocking"]),
        )
    if not answer["services"]:
        table.add_row("no service is known yet")
    tables.print_table(out, table)
    for one in answer["services"]:
        _print_callers(out, one)
    out.print()
    for number, step in enumerate(answer["next_steps"], 1):
        out.print(Text(f"{number}. {step['message']}", "bold"), soft_wrap=True)
        for command in step["commands"]:
            out.print(Text(f"   {command}", "cyan"), soft_wrap=True)
    if not answer["next_steps"]:
        out.print("nothing to do now")


def _print_callers(out: Console, one: dict[str, Any]) -> None:
    """What keeps a service: callers without mesh mTLS, sidecars with problems, what the verdict waits for."""
    for caller in one["downstreams"]:
        if caller["not_mesh"]:
            onboarded = "in the mesh" if caller["onboarded"] else "not in the mesh"
            words = [
                f"{caller['not_mesh']} of {caller['connections']} connections without mesh mTLS"
                f" ({', '.join(each for each in caller['classes'] if each != 'mesh')})",
                onboarded if caller["service"] else "not known to the catalog",
                "passes the sidecar by"
                if caller["passes_by"]
                else _PERMISSION_WORDS[caller["permission"]],
            ]
            told = ", ".join(word for word in words if word)
            out.print(Text(f"  - {caller['name']} -> {one['service']}: {told}"), soft_wrap=True)
    problems = {each["workload"]: each["problem"] for each in one["sidecar_problems"]}
    for workload, problem in problems.items():
        out.print(Text(f"  - {workload}: {problem}", "bold red"), soft_wrap=True)
    for reason in one["reasons"]:
        if not any(problem in reason["message"] for problem in problems.values()):
            out.print(Text(f"  - {one['service']}: {reason['message']}"), soft_wrap=True)


def _share(one: dict[str, Any]) -> str:
    if one["mesh_share"] is None:
        return "no calls"
    return f"{one['mesh_share']:.0%} of {one['connections']}"


def _settings(settings: list[dict[str, Any]]) -> str:
    told = []
    for one in settings:
        where = "" if one["partition"] == "default" else f"partition {one['partition']}: "
        gate = "allowed" if one["gate_open"] else "not allowed"
        outside = "closed" if one["mesh_destinations_only"] else "open"
        told.append(f"{where}permissive mode is {gate}, the way out of the mesh is {outside}")
    return "; ".join(told)


def _print_plan(out: Console, answer: dict[str, Any]) -> None:
    if len(answer["services"]) > 1:
        order = " -> ".join(" + ".join(group) for group in answer["groups"])
        out.print(Text(f"order, callers first: {order}"), soft_wrap=True)
    for note in answer["notes"]:
        out.print(Text(note, "yellow"), soft_wrap=True)
    for one in answer["services"]:
        ends = [
            f"{word} {', '.join(one[key])}"
            for word, key in (("called by", "called_by"), ("calls", "calls"))
            if one[key]
        ]
        about = f"   {'; '.join(ends)}" if ends else ""
        out.print(Text.assemble((one["service"], "bold"), about), soft_wrap=True)
        for number, step in enumerate(one["steps"], 1):
            state = step["state"]
            head = f"  {number}. {state.replace('-', ' '):<10}  {step['title']}: {step['detail']}"
            out.print(Text(head, _STATE_STYLES[state]), soft_wrap=True)
            for command in step["commands"]:
                out.print(Text(f"       {command}", "cyan"), soft_wrap=True)
