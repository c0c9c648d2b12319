"""`tidegate init`: the redirection of one pod, from its init container."""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

import msgspec

from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.cli.redirect_text import warn
from tidegate.enforce.redirect.probing.judgement import Outcome
from tidegate.node import init
from tidegate.node.init import Done, Failure, Pod

DEFAULT_DIRECTORY = Path("/etc/podinfo")
"""Where the downward API's files are mounted, in Kubernetes' own examples."""

_CODES = "\n".join(
    f"  {code}  {meaning}"
    for code, meaning in (
        (0, "redirected, and proven by probes"),
        (Failure.OTHER, "anything else; the sentence says what"),
        (Failure.POLICY, "faults in environment, annotations, labels or document: all are told"),
        (Failure.PERMISSION, "the container has no NET_ADMIN"),
        (Failure.KERNEL, "the kernel lacks what rules need, or refuses them"),
        (Failure.FOREIGN, "another mesh redirects in this pod already"),
        (Failure.NODE, "the pod is on the node's own network"),
        (Failure.FAILED, "the rules are loaded, and a probe landed elsewhere"),
        (Failure.UNPROVEN, "the rules are loaded, and no probe could be made"),
    )
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `init`."""
    parser = subparsers.add_parser(
        "init",
        help="redirect the pod that this runs in, as its init container",
        description="Redirects the connections of the network namespace that it runs in to the pod's sidecar, proves "
        "that they are, and ends. Needs NET_ADMIN and nothing else. The policy is the built-in one, changed by "
        "TIDEGATE_POLICY (a document), by TIDEGATE_* (any annotation tidegate.io/*, as TIDEGATE_EXCLUDE_INBOUND_PORTS) "
        "and by the pod's labels and annotations; CONSUL_REDIRECT_TRAFFIC_CONFIG counts as Consul's annotation. "
        "May be run again, and next to the agent: what is right already is not touched.",
        epilog="examples:\n  tidegate init\n  tidegate init --annotations /etc/podinfo/annotations --adopt\n\n"
        f"exit codes:\n{_CODES}",
        formatter_class=ExamplesFormatter,
    )
    for name in ("annotations", "labels"):
        default = DEFAULT_DIRECTORY / name
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help=f"the pod's {name}, as the downward API writes them (default: {default}, if it is there)",
        )
    parser.add_argument(
        "--adopt", action="store_true", help="replace the rules that Consul left there"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Applies, proves, prints."""
    pod = Pod(
        environment=os.environ,
        annotations=_downward(args.annotations, "annotations"),
        labels=_downward(args.labels, "labels"),
    )
    done = init.redirect(init.policy_of(pod), adopt=args.adopt)
    for warning in done.warnings:
        warn(warning)
    if args.json:
        print(json.dumps(_as_json(done), indent=2))
    else:
        print(_as_text(done))
    return 0


def _downward(given: Path | None, name: str) -> dict[str, str]:
    if given is not None:
        return init.read_downward(given)
    default = DEFAULT_DIRECTORY / name
    return init.read_downward(default) if default.exists() else {}


def _as_text(done: Done) -> str:
    outcomes = Counter(probe.outcome for probe in done.probes)
    counted = ", ".join(f"{outcomes[one]} {one}" for one in Outcome if outcomes[one])
    lines = [
        f"{done.applied.change} by {done.applied.backend} ({done.why}); probes: {counted}",
        *(f"adopted: {one}" for one in done.applied.adopted),
        *(f"{one.outcome}: {one.name}: {one.detail}" for one in done.probes),
    ]
    return "\n".join(lines)


def _as_json(done: Done) -> object:
    return {
        "change": done.applied.change,
        "backend": done.applied.backend,
        "why": done.why,
        "adopted": [*map(str, done.applied.adopted)],
        "probes": msgspec.to_builtins(done.probes),
        "warnings": done.warnings,
    }
