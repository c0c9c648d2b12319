"""`tidegate redirect`: the rules of one network namespace, by hand and for scripts.

Puts options, policy and engine together and prints. Exit codes: 0 good; 1 failed, different or not there; 2 bad input,
and for commands that ask a question also: it cannot be told.
"""

import argparse
import contextlib
import ipaddress
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from rich.text import Text

from tidegate.cli import namespaces, policies, redirect_text, tables, target, workloads
from tidegate.cli.namespaces import Target
from tidegate.cli.redirect_text import warn
from tidegate.cli.target import is_root, require_root
from tidegate.enforce.redirect import block, foreign
from tidegate.enforce.redirect.backend import Backend, BackendName, Change
from tidegate.enforce.redirect.engine import AUTO, Applied, BackendChoice, Engine, choose
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.probing.judgement import Outcome
from tidegate.enforce.redirect.rules import (
    LOOPBACK_INTERFACE,
    Action,
    Connection,
    explain,
    rules_for,
)
from tidegate.enforce.redirect.verify import verify
from tidegate.errors import InputError, InputErrors, TidegateError
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.intent.policy_documents import policy_to_document
from tidegate.kernel import netns, routes, sockets
from tidegate.kernel.errors import KernelError
from tidegate.model import Direction
from tidegate.node.users import group_id, user_id

BACKENDS: Mapping[BackendName, Callable[[], Backend]] = {
    BackendName.NFTABLES: NftablesBackend,
    BackendName.IPTABLES: IptablesBackend,
}
CANNOT_TELL = 2
READS = "it reads the rules of a network namespace"
DEFAULT_INTERFACE = "eth0"
ONLY_OF = {Direction.INBOUND: ("forwarded",), Direction.OUTBOUND: ("uid", "gid", "mark", "cgroup")}
"""What explain is told of connections of one direction alone: only they have it, or are asked for it."""
PROTOCOLS = {
    "icmp": 1,
    "igmp": 2,
    "ipip": 4,
    "tcp": 6,
    "udp": 17,
    "dccp": 33,
    "ipv6": 41,
    "gre": 47,
    "esp": 50,
    "ah": 51,
    "icmpv6": 58,
    "ospf": 89,
    "pim": 103,
    "vrrp": 112,
    "l2tp": 115,
    "sctp": 132,
    "udplite": 136,
}
"""IANA's numbers of protocols over IP."""
ID_MAX = 2**32 - 2
"""The greatest user or group id; the one after it stands for none (chown(2))."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
OUTCOME_STYLES = {Outcome.PASSED: "green", Outcome.FAILED: "bold red", Outcome.SKIPPED: "yellow"}


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
    policy = _policy(args, where)
    warnings = [*_own_namespace(where), *_managed(where, policy)]
    for warning in warnings:
        warn(warning)
    engine = Engine(args.backend)
    applied = engine.apply(where.path, policy, adopt=args.adopt)
    gaps = (gap for gap in engine.gaps(where.path, policy) if not _is_told(gap, applied.refused))
    after = (*applied.refused, *gaps, *_unheard(where, policy))
    adoptable = _adoptable(where) if applied.foreign and not args.adopt else ()
    for warning in after:
        warn(f"{warning}; --adopt replaces it" if warning in adoptable else warning)
    if args.json:
        _print_json(
            {
                "netns": where.path,
                "change": applied.change,
                "backend": applied.backend,
                "why": engine.choice.why,
                "replaced_backend": applied.replaced_backend,
                "adopted": applied.adopted,
                "warnings": (*warnings, *after),
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
        policy = _policy(args, where)
        engine = _engine_of(args.backend, where)
        differences = engine.check(where.path, policy)
        gaps = engine.gaps(where.path, policy)
        notes = tuple(gap for gap in gaps if gap not in differences)
        backend = engine.backend_of(where.path)
    if args.json:
        _print_json(
            {
                "netns": where.path,
                "equal": not differences,
                "backend": backend,
                "differences": differences,
                "notes": notes,
            }
        )
    else:
        for difference in differences:
            print(difference)
        if not differences:
            print(f"{where.name}: the kernel equals the policy ({backend or 'no rules'})")
        _note(notes)
    return 1 if differences else 0


def run_explain(args: argparse.Namespace) -> int:
    """Prints where a connection goes under a policy, without asking the kernel's rules."""
    _refuse_other_direction(args)
    dialled, port = args.destination
    address, source = _on_the_wire(dialled), args.source and _on_the_wire(args.source)
    if source and source.version != address.version:
        problem = f"{args.source} and {dialled} are of two families"
        raise InputError(problem, field="--from", expected="an address of the destination's family")
    where = namespaces.chosen(args)
    policy = _policy(args, where)
    direction = Direction(args.direction)
    notes = []
    if str(address) != dialled:
        notes.append(f"{dialled} is {address} on the wire: the IPv4 lines decide")
    forwarded = bool(args.forwarded)
    if direction is Direction.INBOUND and where is not None and not forwarded:
        # What the kernel's rules ask, too: whether its routes deliver the address here.
        routed = routes.outgoing_interface(where.path, str(address))
        forwarded = routed != LOOPBACK_INTERFACE
        if forwarded:
            notes.append(f"{address} is no address of {where.name}: such connections are forwarded")
    asked = Connection(
        direction=direction,
        destination=str(address),
        port=port,
        source=str(source or ""),
        interface=args.interface or _interface(direction, address, where),
        uid=args.uid,
        gid=args.gid,
        mark=args.mark or 0,
        cgroup=(args.cgroup or "").strip("/"),
        protocol=args.protocol,
        opening=not args.older,
        forwarded=forwarded,
    )
    rules = rules_for(policy)
    decision = explain(rules, asked)
    goes = redirect_text.goes(policy, decision.action)
    because = redirect_text.decided_by(rules, asked, decision)
    lines = rules.of(direction)
    if args.json:
        _print_json(
            {
                "connection": msgspec.to_builtins(asked),
                "goes": goes,
                "action": _action(decision.action),
                "line": decision.line,
                "because": because,
                "notes": notes,
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
    print(f"{redirect_text.connection(asked)} {goes}")
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
        policy = _policy(args, where)
        layers = policies.layers_of_workload(workload) if workload else ()
    if args.json:
        _print_json(policy_to_document(policy))
    else:
        # What neither default nor annotations say, the agent of the node does.
        sys.stdout.write(
            policies.as_yaml(policy, layers, "the node" if layers and workload else "")
        )
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Prints what became of each probe; 1 when one failed."""
    with _cannot_tell():
        require_root("it sends probes inside a network namespace")
        where = namespaces.of_command(args)
        policy = _policy(args, where)
        probes = verify(where.path, policy)
    failed = any(probe.outcome is Outcome.FAILED for probe in probes)
    if args.json:
        passed = not failed
        _print_json({"netns": where.path, "passed": passed, "probes": msgspec.to_builtins(probes)})
    else:
        out = tables.console()
        for probe in probes:
            outcome = Text(f"{probe.outcome.value.upper():<7}", OUTCOME_STYLES[probe.outcome])
            out.print(Text.assemble(outcome, f"  {probe.name}: {probe.detail}"), soft_wrap=True)
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
    policy = _policy(args, where)
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
        formatter_class=_Formatter,
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_told(run))
    return parser


class _Formatter(argparse.HelpFormatter):
    """Keeps the lines of the examples and folds everything else."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


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
        "an inbound one is its own.",
        """
  tidegate redirect explain outbound 10.1.2.3:443 --uid 1000
  tidegate redirect explain inbound '[fd77::2]:8080' --from fd77::1 --annotations pod.yaml --all
  tidegate redirect explain outbound 10.96.0.10:53 --protocol udp --policy shop.yaml""",
    )
    parser.add_argument("direction", choices=[direction.value for direction in Direction])
    parser.add_argument(
        "destination", type=_endpoint, metavar="ADDRESS:PORT", help="what the client dials"
    )
    client = parser.add_argument_group("the connection")
    client.add_argument(
        "--from", dest="source", type=_address, metavar="ADDRESS", help="of the client"
    )
    client.add_argument(
        "--protocol",
        type=_protocol,
        default="tcp",
        metavar="NAME",
        help="tcp (default), udp or another, such as sctp or 132",
    )
    client.add_argument(
        "--interface",
        metavar="NAME",
        help="outbound: where the routes send it; inbound: where it arrives (default: eth0, "
        "and lo for loopback addresses)",
    )
    client.add_argument(
        "--uid", type=_id_of("user", user_id), metavar="USER", help="outbound: who opens it"
    )
    client.add_argument(
        "--gid",
        type=_id_of("group", group_id),
        metavar="GROUP",
        help="outbound: the same, by group",
    )
    client.add_argument("--mark", type=_mark, metavar="MARK", help="outbound: such as 0x1")
    client.add_argument(
        "--cgroup", metavar="PATH", help="outbound: of the process, below the root of cgroup v2"
    )
    client.add_argument(
        "--older", action="store_true", help="it was open before the rules were loaded"
    )
    client.add_argument(
        "--forwarded",
        action="store_true",
        default=None,
        help="inbound: to an address that is not the workload's (default: as a namespace, if one is given, has it)",
    )
    parser.add_argument("-v", "--all", action="store_true", help="show the whole decision list")
    namespaces.add_options(parser, required=False)
    policies.add_options(parser)


def _endpoint(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    if ":" in address:
        if not (address.startswith("[") and address.endswith("]")):
            raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT; IPv6: [fd00::1]:443")
        address = address[1:-1]
    if not address or not port.isascii() or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, such as 10.1.2.3:443")
    if not 0 < int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"there is no port {port}; 1 to 65535")
    return _address(address), int(port)


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from error
    if "%" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names an interface; say it by --interface")
    mapped = getattr(address, "ipv4_mapped", None)
    return f"::ffff:{mapped}" if mapped else str(address)


def _id_of(kind: str, number_of: Callable[[str], int | None]) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else number_of(text)
        if number is None:
            raise argparse.ArgumentTypeError(f"this machine has no {kind} {text!r}")
        if number > ID_MAX:
            raise argparse.ArgumentTypeError(f"{text} is no {kind} id; 0 to {ID_MAX}")
        return number

    return parse


def _protocol(text: str) -> str:
    """The name of a protocol, as policies write it; its number when none is known."""
    name = text.lower()
    if name in PROTOCOLS:
        return name
    if not (name.isascii() and name.isdecimal() and int(name) <= 255):
        known = ", ".join(PROTOCOLS)
        raise argparse.ArgumentTypeError(f"{text!r} is no protocol: {known}, or a number to 255")
    names = (known for known, number in PROTOCOLS.items() if number == int(name))
    return next(names, str(int(name)))


def _mark(text: str) -> int:
    try:
        mark = int(text, 0)
    except ValueError:
        mark = -1
    if not 0 <= mark < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a packet mark, such as 0x1 or 17")
    return mark


# What the options mean


def _policy(args: argparse.Namespace, where: Target | None) -> Policy:
    if policies.is_given(args):
        return policies.given(args)[-1].policy
    workload = where.workload if where else None
    if workload is None:
        return DEFAULT
    if not workload.wanted_in_mesh:
        warn(f"{workload.name} is to have no sidecar; this is the policy that it would have")
    if workload.problem:
        warn(f"the agent says of {workload.name}: {workload.problem}")
    if workload.policy is not None:
        return workload.policy
    return policies.of_workload(workload)


def _engine_of(wanted: str, where: Target) -> Engine:
    """The engine of the backend that is in use there, unless one is asked for."""
    engine = Engine(wanted)
    used = engine.backend_of(where.path)
    return engine if wanted != AUTO or used in (None, engine.choice.backend) else Engine(used)


def _refuse_other_direction(args: argparse.Namespace) -> None:
    """InputErrors for what is never asked of connections of the direction."""
    other = next(one for one in Direction if one != args.direction)
    faults = tuple(
        InputError(
            f"is told only of an {other} connection",
            field=f"--{option}",
            expected=f"{other}, or nothing",
        )
        for option in ONLY_OF[other]
        if getattr(args, option) is not None
    )
    if faults:
        raise InputErrors(faults)


def _interface(direction: Direction, address: Address, where: Target | None) -> str:
    if direction is Direction.OUTBOUND and where is not None:
        interface = routes.outgoing_interface(where.path, str(address))
        if interface is None:
            warn(f"{where.name} has no route to {address}; {DEFAULT_INTERFACE} is assumed")
        return interface or DEFAULT_INTERFACE
    return LOOPBACK_INTERFACE if address.is_loopback else DEFAULT_INTERFACE


def _on_the_wire(text: str) -> Address:
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _own_namespace(where: Target) -> Iterator[str]:
    if namespaces.is_own(where.path):
        yield f"{where.name} is the network namespace of this shell: everything that runs in it is redirected"


def _is_told(gap: str, refused: Iterable[str]) -> bool:
    """Whether one of the refusals names the gap, and says why it is still there."""
    return any(one.startswith(gap) for one in refused)


def _adoptable(where: Target) -> tuple[str, ...]:
    return tuple(str(found) for found in foreign.find(where.path) if found.removable)


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
