"""`tidegate lab`: pods on this machine, with real sidecars and real traffic."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from rich.status import Status
from rich.table import Table
from rich.text import Text

from tidegate.cli import tables
from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.cli.target import require_root, the_lab
from tidegate.errors import InputError
from tidegate.lab import runtime, state
from tidegate.lab.spec import DEFAULT_LAB_NAME, LabSpec, check_lab_name, load
from tidegate.lab.state import LabPaths, LabStatus, PodStatus
from tidegate.node.status import RedirectState

MAKES = "it makes network namespaces and loads eBPF"
DEMO_FILE = Path(runtime.__file__).with_name("demo.yaml")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `lab`."""
    group = subparsers.add_parser(
        "lab",
        help="pods on this machine, to try everything on",
        description="A mesh of network namespaces on this machine, with real sidecars, rules and eBPF programs. The "
        "machine's own network is not touched. Without --lab a command is about the lab that is up.",
        epilog="examples:\n  tidegate lab up\n  tidegate lab exec web -- curl -s http://api:8080/\n"
        "  tidegate lab onboard legacy\n  tidegate lab down",
        formatter_class=ExamplesFormatter,
    )
    commands = group.add_subparsers(dest="lab_command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="bring a lab up, or change one that is up",
        description="Makes the lab be as FILE says. With a lab that is up already it changes only "
        "the difference.",
    )
    up.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="lab file (default: the lab's own, if it is up, else that of the demo)",
    )
    up.add_argument(
        "--lab", "--name", metavar="NAME", help="name in place of the file's (TIDEGATE_LAB)"
    )
    up.set_defaults(run=run_up)

    status = commands.add_parser("status", help="nodes, pods, sidecars and traffic")
    _add_lab_option(status)
    add_json(status)
    status.set_defaults(run=run_status)

    execute = commands.add_parser(
        "exec",
        usage="tidegate lab exec [-h] [--lab NAME] POD [--] CMD ...",
        help="run a command in a pod",
        description="Runs a command in the network of a pod, of a node, or outside. Names of pods "
        "and services resolve there. Exits as the command does.",
    )
    _add_lab_option(execute)
    execute.add_argument("pod", metavar="POD", help="a pod, a node, or outside")
    execute.add_argument(
        "argv",
        nargs=argparse.REMAINDER,
        metavar="CMD ...",
        help="a command with its arguments; -- may stand before",
    )
    execute.set_defaults(run=run_exec)

    onboard = commands.add_parser(
        "onboard", help="put pods into the mesh while their applications run"
    )
    _add_lab_option(onboard)
    onboard.add_argument("pods", nargs="+", metavar="POD")
    onboard.set_defaults(run=run_onboard)

    down = commands.add_parser(
        "down",
        help="take a lab down without a trace",
        description="Ends every process of the lab and removes its namespaces, mounts and files, "
        "also after a crash.",
    )
    which = down.add_mutually_exclusive_group()
    which.add_argument("--lab", "--name", metavar="NAME", help="the lab of that name")
    which.add_argument("--all", action="store_true", help="every lab of this machine")
    down.set_defaults(run=run_down)


def run_up(args: argparse.Namespace) -> int:
    """Brings a lab up, telling each step."""
    require_root(MAKES)
    spec, source = _wanted(args)
    out = tables.console()
    if out.is_terminal:
        with out.status(f"lab {spec.name}") as shown:
            runtime.up(spec, progress=_shown_in(shown, spec.name), source=source)
    else:
        runtime.up(
            spec,
            progress=lambda step: print(f"lab {spec.name}: {step}", flush=True),
            source=source,
        )
    out.print(f"lab {spec.name} is up: {len(spec.nodes)} nodes, {len(spec.pods)} pods")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Shows nodes and pods; 0 when everything that should run does."""
    require_root("only root may ask the agents")
    status = runtime.status(the_lab(args))
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(status)).decode())
    else:
        out = tables.console()
        out.print(_nodes(status))
        out.print()
        out.print(_pods(status))
        for remark in _remarks(status):
            out.print(Text(remark, "yellow"), soft_wrap=True)
    return 0 if _is_well(status) else 1


def run_exec(args: argparse.Namespace) -> int:
    """Becomes the command."""
    argv = args.argv
    if not argv:
        raise InputError("no command is given", expected=f"one, such as: {args.pod} -- ip address")
    if argv[0].startswith("-"):
        raise InputError(
            f"{argv[0]} stands where the command should", expected="options before POD"
        )
    require_root("it enters a network namespace")
    sys.stdout.flush()
    runtime.exec_in(the_lab(args), args.pod, argv)


def run_onboard(args: argparse.Namespace) -> int:
    """Puts pods into the mesh."""
    require_root("the lab's files are root's")
    runtime.onboard(the_lab(args), args.pods)
    whom = "each" if len(args.pods) > 1 else "it"
    print(f"{', '.join(args.pods)}: the agent gives {whom} a sidecar now")
    return 0


def run_down(args: argparse.Namespace) -> int:
    """Takes labs down."""
    require_root(MAKES)
    for lab in _labs_to_take_down(args):
        runtime.down(lab)
        print(f"lab {lab} is down")
    return 0


def _wanted(args: argparse.Namespace) -> tuple[LabSpec, str]:
    """The lab to bring up, and the file that it comes from; "" for one that is up."""
    name = _named(args)
    if args.file is None:
        present = state.read(LabPaths(name or DEFAULT_LAB_NAME).spec, LabSpec)
        if present is not None:
            return present, ""
    file = args.file or DEMO_FILE
    return load(file, name=name), str(file)


def _named(args: argparse.Namespace) -> str | None:
    """The lab that the option or the environment names, which need not be up."""
    if args.lab is not None:
        return check_lab_name(args.lab, source="--lab")
    name = os.environ.get("TIDEGATE_LAB")
    return check_lab_name(name, source="TIDEGATE_LAB") if name else None


def _add_lab_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lab", metavar="NAME", help="the lab of that name (TIDEGATE_LAB)")


def _shown_in(shown: Status, lab: str) -> Callable[[str], None]:
    return lambda step: shown.update(f"lab {lab}: {step}")


def _labs_to_take_down(args: argparse.Namespace) -> tuple[str, ...]:
    running = runtime.labs()
    if args.all:
        return running
    named = _named(args)
    if named:
        return (named,)
    if len(running) > 1:
        raise InputError(
            f"several labs are up: {', '.join(running)}", expected="--name NAME or --all"
        )
    return running or (DEFAULT_LAB_NAME,)


def _is_well(status: LabStatus) -> bool:
    return (
        status.server_alive
        and all(node.agent_answers for node in status.nodes)
        and all(pod.app_alive for pod in status.pods if pod.app_pid)
    )


def _nodes(status: LabStatus) -> Table:
    table = _table("node", "addresses", "agent")
    for node in status.nodes:
        agent = _process(node.agent_pid, alive=node.agent_alive)
        if node.agent_alive and not node.agent_answers:
            agent += ", does not answer"
        table.add_row(node.name, " ".join(node.addresses), agent)
    table.add_row("outside", "", f"server {_process(status.server_pid, alive=status.server_alive)}")
    return table


def _pods(status: LabStatus) -> Table:
    table = _table(
        "pod", "node", "service", "addresses", "app", "sidecar", "requests", "failed", "served"
    )
    answering = {node.name for node in status.nodes if node.agent_answers}
    for pod in status.pods:
        table.add_row(
            pod.name,
            pod.node,
            f"{pod.service}:{pod.port}" if pod.port else pod.service,
            " ".join(pod.addresses),
            _application(pod),
            _sidecar(pod, answers=pod.node in answering),
            *_counts(pod),
        )
    return table


def _remarks(status: LabStatus) -> Iterator[str]:
    """What a reader has to know of redirections, beyond what is wrong with a sidecar."""
    for pod in status.pods:
        said = pod.agent
        if not pod.mesh or said is None:
            continue
        if said.redirect in _WITHOUT_RULES:
            yield f"{pod.name}: {_WITHOUT_RULES[said.redirect]}"
        if said.repairs:
            times = "once" if said.repairs == 1 else f"{said.repairs} times"
            yield f"{pod.name}: its redirection was changed and put back {times}; the last time: {said.last_repair}"
        yield from (f"{pod.name}: {note}" for note in said.notes)


_WITHOUT_RULES: dict[str, str] = {
    RedirectState.FAILED: "its redirection could not be applied: traffic goes around its sidecar",
    RedirectState.DRIFTED: "its redirection was changed and is not put right yet",
    RedirectState.BLOCKED: "its redirection could not be applied: nothing of it passes until it can be",
}


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        # In a narrow terminal long texts give way, names and numbers do not.
        gives_way = title in ("addresses", "sidecar")
        table.add_column(title, no_wrap=not gives_way, overflow="fold")
    return table


def _application(pod: PodStatus) -> str:
    well = pod.app_alive or not pod.app_pid
    return str(pod.app_kind) if well else f"{pod.app_kind}, [red]has ended[/]"


def _process(pid: int, *, alive: bool) -> str:
    if not pid:
        return "not started"
    return f"runs ({pid})" if alive else "[red]has ended[/]"


def _sidecar(pod: PodStatus, *, answers: bool) -> str:
    said = pod.agent
    if said is None and not answers:
        return f"not known, the agent of {pod.node} does not answer"
    if said is None:
        return "wanted, the agent does not know it" if pod.mesh else "none"
    if not pod.mesh and not said.meshed:
        return "none"
    words = [said.state or ("running" if said.meshed else "not yet")]
    if said.restarts:
        words.append(f"{said.restarts} restarts")
    if said.problem:
        words.append(said.problem)
    return ", ".join(words)


def _counts(pod: PodStatus) -> tuple[str, str, str]:
    if pod.statistics is None:
        return "", "", ""
    targets = pod.statistics.targets
    failed = sum(target.failed for target in targets)
    return (
        str(failed + sum(target.ok for target in targets)),
        f"[red]{failed}[/]" if failed else "0",
        str(pod.statistics.served),
    )
