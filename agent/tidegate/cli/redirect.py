"""`tidegate redirect`: the rules of one network namespace, by hand and for scripts.

Puts options, policy and engine together and prints. Exit codes: 0 good; 1 failed, different or not there; 2 bad input,
and for commands that ask a question also: it cannot be told.
"""

import argparse
import contextlib
import enum
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from rich.text import Text

from tidegate.cli import (
    connections,
    namespaces,
    policies,
    redirect_text,
    tables,
    target,
    workloads,
)
from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.cli.namespaces import Target
from tidegate.cli.redirect_text import warn
from tidegate.cli.target import is_root, require_root
from tidegate.enforce.redirect import block, foreign
from tidegate.enforce.redirect.backend import Backend, BackendName, Change
from tidegate.enforce.redirect.engine import AUTO, Applied, BackendChoice, Engine, choose
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.probing.judgement import Outcome
from tidegate.enforce.redirect.rules import Action, explain, rules_for
from tidegate.enforce.redirect.verify import verify
from tidegate.errors import TidegateError
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.intent.policy_documents import policy_to_document
from tidegate.kernel import netns, sockets
from tidegate.kernel.errors import KernelError

BACKENDS: Mapping[BackendName, Callable[[], Backend]] = {
    BackendName.NFTABLES: NftablesBackend,
    BackendName.IPTABLES: IptablesBackend,
}
CANNOT_TELL = 2
READS = "it reads the rules of a network namespace"
OUTCOME_STYLES = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.SKIPPED: "yellow"}


class Source(enum.StrEnum):
    """Where a policy comes from."""

    BUILT_IN = "built-in"
    OPTIONS = "options"
    WORKLOAD = "workload"


class Chosen(msgspec.Struct, frozen=True):
    """The policy that a command works by."""

    policy: Policy
    source: Source
    warnings: tuple[str, ...] = ()
    """What a person should know of it; told on standard error already."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `redirect`."""
    group = subparsers.add_parser(
        "redirect",
        help="which connections go to the sidecar: apply, show, check, explain, policy, verify, remove",
        description="Redirects the connections of one network namespace to a sidecar, by one policy, and shows that it "
        "does. The agent does the same for its workloads; these commands are for everything else, and for looking.",
    )
    commands = group.add_subparsers(dest="redirect_command", required=True, metavar="COMMAND")
    apply = _command(
        commands,
        "apply",
        run_apply,
        "make a namespace follow a policy",
        "Loads the rules in one step, replacing tidegate's own and nobody else's; open connections stay as they are. "
        "Rules that are there already are not touched.",
        """
  tidegate redirect apply --netns shop-1
  tidegate redirect apply --pid 4711 --policy shop.yaml --backend iptables
  tidegate redirect apply --netns shop-1 --annotations pod.yaml --adopt
  tidegate redirect apply --dry-run --policy shop.yaml | nft -c -f -""",
    )
    namespaces.add_options(apply, required=False)
    policies.add_options(apply)
    _add_backend(
        apply,
        "the kernel's interface for the rules (default auto: what works here, nftables first; that takes over from the "
        "other backend where its rules are there, in the same step, and the output says so)",
    )
    apply.add_argument(
        "--adopt",
        action="store_true",
        help="replace the rules that Consul left there, without a moment in which nothing is redirected",
    )
    apply.add_argument(
        "--dry-run",
        action="store_true",
        help="print exactly what would be loaded where nothing is, and load nothing; needs no namespace",
    )

    show = _command(
        commands,
        "show",
        run_show,
        "the rules that a namespace has, with counters",
        "Shows tidegate's rules as the kernel has them. Exits 1 when there are none, 2 when that cannot be told.",
        """
  tidegate redirect show --netns shop-1
  tidegate redirect show --workload web --json""",
    )
    namespaces.add_options(show, required=True)

    check = _command(
        commands,
        "check",
        run_check,
        "does the kernel equal the policy?",
        "Compares the rules of a namespace with a policy. Exits 0 when they are equal, 1 with the differences, one a "
        "line, and 2 when it cannot tell. What goes around the sidecar although the rules are right is noted.",
        """
  tidegate redirect check --netns shop-1 --policy shop.yaml
  tidegate redirect check --workload web""",
    )
    namespaces.add_options(check, required=True)
    policies.add_options(check)
    _add_backend(
        check,
        "compare with what this backend would load (default auto: the backend whose rules are there; without any, "
        "the one that apply would take)",
    )

    _add_explain(commands)

    policy = _command(
        commands,
        "policy",
        run_policy,
        "the policy that all of this is about, whole",
        "Prints every setting of the policy that the other commands would work by with the same options; of a workload "
        "of the agent, of the one in force. It is a document, which --policy reads again. Where a setting is not the "
        "built-in default, a comment tells that.",
        """
  tidegate redirect policy --workload web
  tidegate redirect policy --annotations pod.yaml | tidegate redirect apply --netns shop-1 --policy -""",
    )
    namespaces.add_options(policy, required=False)
    policies.add_options(policy)

    verify_ = _command(
        commands,
        "verify",
        run_verify,
        "send probes and see where they land",
        "Sends the first packets of connections, in both directions and families, and looks where they land. No host "
        "outside is needed, nothing leaves the namespace, and nothing stays open. Exits 0 when nothing failed, 1 when "
        "something did, 2 when it could not be tried.",
        """
  tidegate redirect verify --netns shop-1 --policy shop.yaml
  tidegate redirect verify --workload web --json""",
    )
    namespaces.add_options(verify_, required=True)
    policies.add_options(verify_)

    remove = _command(
        commands,
        "remove",
        run_remove,
        "leave a namespace as it was",
        "Takes tidegate's rules away, those of both backends; other programs' rules stay. Removing nothing is fine.",
        """
  tidegate redirect remove --netns shop-1""",
    )
    namespaces.add_options(remove, required=True)


def run_apply(args: argparse.Namespace) -> int:
    """Applies a policy, or prints what that would load."""
    if args.dry_run:
        return _dry_run(args)
    require_root("it loads rules into the kernel")
    where = namespaces.of_command(args)
    chosen = _policy(args, where)
    policy = chosen.policy
    before = [*_own_namespace(where), *_managed(where, policy)]
    for warning in before:
        warn(warning)
    engine = Engine(args.backend)
    applied = engine.apply(where.path, policy, adopt=args.adopt)
    after = (*engine.gaps(where.path, policy), *_unheard(where, policy))
    for left in applied.foreign:
        adoptable = left.found.removable and not args.adopt
        warn(f"{left}; --adopt replaces it" if adoptable else str(left))
    for warning in after:
        warn(warning)
    if args.json:
        _print_json(
            {
                "netns": where.path,
                "change": applied.change,
                "backend": applied.backend,
                "why": engine.choice.why,
                "replaced_backend": applied.replaced_backend,
                "adopted": [*map(str, applied.adopted)],
                "warnings": [*chosen.warnings, *before, *map(str, applied.foreign), *after],
            }
        )
    else:
        print(f"{where.name}: {_applied(applied, policy)}")
        if applied.change is not Change.REMOVED and policy.redirects_anything:
            print(f"  backend: {applied.backend} ({engine.choice.why})")
        if applied.replaced_backend is not None:
            print(f"  replaced: the rules of {applied.replaced_backend}, in the same step")
        for one in applied.adopted:
            print(f"  adopted: {one}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Prints the rules that are there; 1 when none are."""
    with _cannot_tell():
        require_root(READS)
        where = namespaces.of_command(args)
        engine = Engine(AUTO)
        backend = engine.backend_of(where.path)
        installed = engine.current(where.path)
        blocked = block.is_blocked(where.path)
    if args.json:
        lines = [
            {"list": line.hook, "line": line.name, "decided": line.packets}
            for line in installed or ()
        ]
        found = {"netns": where.path, "backend": backend, "blocked": blocked, "lines": lines}
        _print_json(found)
    elif installed is None:
        print(f"{where.name}: no rules of tidegate")
    else:
        print(f"{where.name}: {backend}")
        tables.console().print(redirect_text.installed(installed))
    if blocked and not args.json:
        print(
            f"{where.name}: blocked, nothing but loopback passes until `remove` or the agent's next success"
        )
    return 0 if installed is not None or blocked else 1


def run_check(args: argparse.Namespace) -> int:
    """Prints how the kernel differs from the policy; the exit code is the answer."""
    with _cannot_tell():
        require_root(READS)
        where = namespaces.of_command(args)
        chosen = _policy(args, where)
        engine = _engine_of(args.backend, where)
        differences = engine.check(where.path, chosen.policy)
        gaps = engine.gaps(where.path, chosen.policy)
        backend = engine.backend_of(where.path)
        lacking = bool(differences) and backend is None
        told, notes = differences, gaps
        if lacking:
            told = (_no_rules(args, where), *map(str, foreign.find(where.path)))
        elif differences:
            notes = (*gaps, *_compared_with(chosen))
    if args.json:
        _print_json(
            {
                "netns": where.path,
                "policy": chosen.source,
                "equal": not differences,
                "backend": backend,
                "differences": differences,
                "notes": notes,
            }
        )
    else:
        for difference in told:
            print(difference)
        if not differences:
            print(f"{where.name}: the kernel equals the policy ({backend or 'no rules'})")
        _note(notes)
    return 1 if differences else 0


def run_explain(args: argparse.Namespace) -> int:
    """Prints where a connection goes under a policy, without asking the kernel's rules."""
    where = namespaces.chosen(args)
    asked, notes = connections.asked(args, where)
    chosen = _policy(args, where)
    policy = chosen.policy
    rules = rules_for(policy)
    decision = explain(rules, asked)
    outcome = redirect_text.goes(policy, decision.action)
    because = redirect_text.decided_by(rules, asked, decision)
    lines = rules.of(asked.direction)
    if args.json:
        _print_json(
            {
                "connection": msgspec.to_builtins(asked),
                "policy": chosen.source,
                "outcome": outcome,
                "action": _action(decision.action),
                "line": decision.line,
                "because": because,
                "notes": [*chosen.warnings, *notes],
                "list": [
                    {
                        "line": line.name,
                        "when": redirect_text.condition(line.matches, shown=None),
                        "then": _action(line.action),
                    }
                    for line in lines
                ],
            }
        )
        return 0
    print(f"{redirect_text.connection(asked)} {outcome}")
    print(because)
    _note(notes)
    if args.all and lines:
        print()
        tables.console().print(redirect_text.lines(decision.line, lines))
    return 0


def run_policy(args: argparse.Namespace) -> int:
    """Prints a policy as a document."""
    where = namespaces.chosen(args)
    workload = where.workload if where else None
    layers: tuple[policies.Layer, ...] = ()
    if policies.is_given(args):
        layers = policies.given(args)
        policy = layers[-1].policy
    else:
        policy = _policy(args, where).policy
        layers = policies.layers_of_workload(workload) if workload else ()
    # What neither default nor annotations say, the agent of the node does.
    others = "the node" if layers and workload else ""
    if args.json:
        said_by = policies.said_by(policy, layers, others)
        authors = {".".join(place): who for place, who in said_by.items()}
        _print_json({"policy": policy_to_document(policy), "said_by": authors})
    else:
        sys.stdout.write(policies.as_yaml(policy, layers, others))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Prints what became of each probe; 1 when one failed."""
    with _cannot_tell():
        require_root("it sends probes inside a network namespace")
        where = namespaces.of_command(args)
        chosen = _policy(args, where)
        probes = verify(where.path, chosen.policy)
        outcomes = Counter(probe.outcome for probe in probes)
        failed = outcomes[Outcome.FAILED] > 0
        lacking = failed and Engine(AUTO).backend_of(where.path) is None
    notes: tuple[str, ...] = ()
    if failed:
        notes = (_no_rules(args, where),) if lacking else _compared_with(chosen)
    if args.json:
        _print_json(
            {
                "netns": where.path,
                "policy": chosen.source,
                "passed": not failed,
                "probes": msgspec.to_builtins(probes),
                "notes": notes,
            }
        )
    else:
        out = tables.console()
        for probe in probes:
            outcome = Text(f"{probe.outcome.value.upper():<7}", OUTCOME_STYLES[probe.outcome])
            out.print(Text.assemble(outcome, f"  {probe.name}: {probe.detail}"), soft_wrap=True)
        counted = (Outcome.FAILED, Outcome.PASSED, Outcome.SKIPPED)
        print(", ".join(f"{outcomes[one]} {one}" for one in counted if outcomes[one]))
        _note(notes)
    return 1 if failed else 0


def run_remove(args: argparse.Namespace) -> int:
    """Takes the rules of both backends away."""
    require_root("it takes rules out of the kernel")
    where = namespaces.of_command(args)
    warnings = tuple(_managed(where, None))
    for warning in warnings:
        warn(warning)
    engine = Engine(AUTO)
    backend = engine.backend_of(where.path)
    blocked = block.is_blocked(where.path)
    change = engine.remove(where.path)
    if args.json:
        removed = {"change": change, "backend": backend, "unblocked": blocked, "warnings": warnings}
        _print_json({"netns": where.path, **removed})
    elif change is Change.REMOVED:
        parts = [f"the rules of {backend}"] if backend else []
        parts += ["the block"] if blocked else []
        print(f"{where.name}: removed {' and '.join(parts) or 'what was left of rules'}")
    else:
        print(f"{where.name}: unchanged, no rules of tidegate were there")
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    where = namespaces.chosen(args) if args.workload is not None else None
    policy = _policy(args, where).policy
    backend = _renderer(args.backend)
    ruleset = backend.render(rules_for(policy))
    if args.json:
        _print_json({"backend": backend.name, "ruleset": ruleset})
    else:
        sys.stdout.write(ruleset)
    if not ruleset:
        print("the policy redirects nothing: apply takes away what is there", file=sys.stderr)
    return 0


def _renderer(wanted: str) -> Backend:
    """The backend that `apply` would use; nobody but root can try what the kernel has."""
    if is_root():
        return BACKENDS[choose(AUTO).backend if wanted == AUTO else BackendName(wanted)]()
    if wanted == BackendName.IPTABLES:
        warn("without root nothing can be tried; this is for a kernel with IP sets")
        return IptablesBackend(with_sets=True)
    if wanted == AUTO:
        warn("without root nothing can be tried; this is for nftables")
    return NftablesBackend()


# Options


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:{examples}",
        formatter_class=ExamplesFormatter,
    )
    add_json(parser)
    parser.set_defaults(run=_told(run))
    return parser


def _add_backend(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--backend", choices=[*map(str, BackendChoice)], default=AUTO, help=meaning)


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands,
        "explain",
        run_explain,
        "where a connection goes under a policy, and which line decides",
        "Says what becomes of a connection that somebody opens, by the policy alone: no rules are looked at or loaded. "
        "With a namespace its routes say which interface an outbound connection leaves by, and whether the address of "
        "an inbound one is its own; it then arrives at the interface that has it.",
        """
  tidegate redirect explain outbound 10.1.2.3:443 --uid 1000
  tidegate redirect explain inbound '[fd77::2]:8080' --from fd77::1 --annotations pod.yaml --all
  tidegate redirect explain outbound 10.96.0.10:53 --protocol udp --policy shop.yaml""",
    )
    connections.add_options(parser)
    parser.add_argument("-a", "--all", action="store_true", help="show the whole decision list")
    namespaces.add_options(parser, required=False)
    policies.add_options(parser)


# What the options mean


def _policy(args: argparse.Namespace, where: Target | None) -> Chosen:
    """The policy of the options, else the workload's, else the built-in one; its warnings are told."""
    workload = where.workload if where else None
    if policies.is_given(args):
        return Chosen(policies.given(args)[-1].policy, Source.OPTIONS)
    if workload is None:
        return Chosen(DEFAULT, Source.BUILT_IN)
    warnings = []
    if not workload.wanted_in_mesh:
        warnings.append(
            f"{workload.name} is to have no sidecar; this is the policy that it would have"
        )
    if workload.problem:
        warnings.append(f"the agent says of {workload.name}: {workload.problem}")
    for warning in warnings:
        warn(warning)
    policy = workload.policy or policies.of_workload(workload)
    return Chosen(policy, Source.WORKLOAD, tuple(warnings))


def _engine_of(wanted: str, where: Target) -> Engine:
    """The engine of the backend that is in use there, unless one is asked for."""
    engine = Engine(wanted)
    used = engine.backend_of(where.path)
    return engine if wanted != AUTO or used in (None, engine.choice.backend) else Engine(used)


def _compared_with(chosen: Chosen) -> tuple[str, ...]:
    """A note for whoever forgot to say by which policy the rules were loaded."""
    if chosen.source is not Source.BUILT_IN:
        return ()
    options = ", ".join(policies.OPTIONS[:-1]) + f" or {policies.OPTIONS[-1]}"
    return (f"compared with the built-in policy; say {options} if the rules follow another",)


def _no_rules(args: argparse.Namespace, where: Target) -> str:
    """That there are none, and the command that loads those that were asked about."""
    words = [
        word
        for option, value in (*namespaces.options_given(args), *policies.options_given(args))
        for word in (option, str(value))
    ]
    command = shlex.join(["tidegate", "redirect", "apply", *words])
    return f"{where.name}: no rules of tidegate; load them with: {command}"


def _own_namespace(where: Target) -> Iterator[str]:
    if namespaces.is_own(where.path):
        yield f"{where.name} is the network namespace of this shell: everything that runs in it is redirected"


def _unheard(where: Target, policy: Policy) -> Iterator[str]:
    """A warning for each port that connections are redirected to and nobody listens on."""
    directions = (policy.inbound, policy.outbound) if policy.families else ()
    ports = {direction.port for direction in directions if direction.enabled}
    heard = {listener.port for listener in netns.run_in(where.path, sockets.listeners)}
    for port in sorted(ports - heard):
        yield f"nothing listens on port {port}: connections that are redirected there are refused"


def _managed(where: Target, policy: Policy | None) -> Iterator[str]:
    """A warning when an agent keeps this namespace, and by another policy than this (None: no rules)."""
    identity = netns.identity(where.path)
    for node in workloads.known(target.agents_of_this_machine()):
        for one in node.workloads:
            with contextlib.suppress(KernelError):
                same = policy is not None and one.policy == policy
                if netns.identity(one.netns) == identity and not same:
                    yield (
                        f"{one.name} belongs to the agent of {node.node}, which keeps its redirection as "
                        "its annotations say, and takes back what is changed by hand"
                    )


@contextlib.contextmanager
def _cannot_tell() -> Iterator[None]:
    """Whatever keeps a question from being answered exits 2: 1 is an answer."""
    try:
        yield
    except TidegateError as error:
        error.exit_code = CANNOT_TELL
        raise
    except (KernelError, OSError) as error:
        unanswered = TidegateError(_words(error) if isinstance(error, OSError) else str(error))
        unanswered.exit_code = CANNOT_TELL
        raise unanswered from error


def _told(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Tells what the system refused, and nobody below has put into words, in one sentence."""

    def told(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise TidegateError(_words(error)) from error

    return told


def _words(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


# Output


def _applied(applied: Applied, policy: Policy) -> str:
    if not policy.redirects_anything:
        if applied.change is Change.UNCHANGED:
            return "unchanged, the policy redirects nothing and no rules are there"
        return "removed, the policy redirects nothing"
    if applied.change is Change.UNCHANGED:
        return "unchanged, the kernel follows this policy already"
    return applied.change.value


def _action(action: Action) -> dict[str, Any]:
    return {"kind": type(action).__name__.lower(), **msgspec.structs.asdict(action)}


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"NOTE: {note}", file=sys.stderr)


def _print_json(answer: dict[str, Any]) -> None:
    print(json.dumps(msgspec.to_builtins(answer), indent=2))
