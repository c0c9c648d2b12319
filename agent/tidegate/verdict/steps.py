"""What a person does next about one reason, with the exact command where there is one.

Pure text from facts: who called, how, whether the catalog says it is meshed and whether an
intention allows it. Which commands exist depends on where the workload lives, so the environment is
an argument.
"""

import enum
import json
import shlex
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from tidegate.durations import span
from tidegate.model import FlowClass, MutualTLSMode, ServiceIntent
from tidegate.verdict.evidence import Caller, CallerKind

EXACT_DESTINATION_PRECEDENCE = 8
"""Rules of the service's own service-intentions entry have at least this (Consul
Intention.UpdatePrecedence); lower ones come from wildcard entries and are not repeated in it.
"""

_EXCLUDE_INBOUND = "consul.hashicorp.com/transparent-proxy-exclude-inbound-ports"
_EXCLUDE_OUTBOUND = "consul.hashicorp.com/transparent-proxy-exclude-outbound-ports"


class Environment(enum.StrEnum):
    """Where workloads live, and so how one is onboarded or restarted."""

    LAB = "lab"
    KUBERNETES = "kubernetes"
    VM = "vm"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a person stands: decides which commands there are, and makes them work when pasted."""

    environment: Environment = Environment.KUBERNETES
    lab: str = ""
    """Name of the lab, in a lab."""

    def tidegate(self, *words: str) -> str:
        """A tidegate command, for a shell."""
        lab = ("--lab", self.lab) if self.lab else ()
        return shlex.join(["tidegate", *words, *lab])

    def write(self, entry: dict[str, Any]) -> str:
        """The command that writes a config entry, for a shell."""
        return f"echo {shlex.quote(json.dumps(entry))} | {self.tidegate('config', 'write', '-')}"


def onboard(place: Place, caller: Caller) -> str:
    """How the caller gets a sidecar."""
    name = caller.workload
    match place.environment:
        case Environment.LAB:
            return f"`{place.tidegate('lab', 'onboard', name)}`"
        case Environment.KUBERNETES:
            command = [
                *("kubectl", "--namespace", caller.namespace or "default"),
                *("annotate", "pod", name, "tidegate.io/mesh=true"),
            ]
            return f"`{shlex.join(command)}` (and in its pod template, so that it stays)"
        case Environment.VM:
            return f'set the annotation tidegate.io/mesh: "true" of {name} on {caller.node}'


def allow(place: Place, intent: ServiceIntent, callers: Iterable[str]) -> str:
    """The command that writes the intentions which let all `callers` call: the whole entry, with
    what it has already. It is the same for each of them, so that no step takes back another."""
    named = sorted(set(callers))
    present = [
        {"Name": rule.source, "Action": "allow" if rule.allow else "deny"}
        for rule in intent.intentions
        if rule.precedence >= EXACT_DESTINATION_PRECEDENCE and rule.source not in named
    ]
    entry = {
        "Kind": "service-intentions",
        "Name": intent.service,
        "Sources": [*({"Name": name, "Action": "allow"} for name in named), *present],
    }
    return f"`{place.write(entry)}`"


def for_flow(
    place: Place,
    intent: ServiceIntent,
    caller: Caller,
    flow_class: FlowClass,
    port: int,
    *,
    to_allow: Collection[str],
    window_s: float,
) -> str:
    """The next step for a caller whose flows strict mode would refuse. First matching line of
    the list wins. `to_allow`: the services of all such callers that no intention allows yet."""
    name = caller.workload or caller.address
    if flow_class is FlowClass.UNKNOWN:
        return (
            f"The connection is older than its observation: restart {name} or let it connect again, "
            f"or wait until it has not been used for {span(window_s)}"
        )
    if caller.kind is CallerKind.OUTSIDE:
        return (
            f"No workload had the address {caller.address}: find out what it is; let it in through a gateway, or keep "
            f'port {port} away from the sidecar with the annotation {_EXCLUDE_INBOUND}: "{port}"'
        )
    if not caller.meshed:
        carries = (
            "; its sidecar then carries the application's TLS inside mTLS"
            if flow_class is FlowClass.TLS
            else ""
        )
        allowed = intent.allows(caller.service)
        then = "" if allowed else f", and allow it: {allow(place, intent, to_allow)}"
        return f"Onboard {name}: {onboard(place, caller)}{then}{carries}"
    if not intent.allows(caller.service):
        return (
            f"{name} is in the mesh, but no intention lets {caller.service} call {intent.service}: "
            f"{allow(place, intent, to_allow)}"
        )
    return (
        f"{name} is in the mesh and allowed: wait; if it is seen again, restart it (connections opened before its "
        f"sidecar stay as they were) and see that its annotation {_EXCLUDE_OUTBOUND} does not name {port}"
    )


def for_open_plaintext(instance: str) -> str:
    return (
        f"Restart the clients that hold plaintext connections to {instance} open, or wait until they close them: "
        "`tidegate flows` shows who called"
    )


def for_coverage(wait_s: float) -> str:
    return f"Wait: the window is complete in {span(wait_s)} if the observation goes on"


def for_missing_node(node: str) -> str:
    return f"See on {node} why its agent does not answer: `tidegate doctor`"


def for_intent_server() -> str:
    return "See why the intent server does not answer: its log says what it met last"


def for_sidecar(place: Place, instance: str) -> str:
    in_lab = place.environment is Environment.LAB
    command = place.tidegate("lab", "status") if in_lab else "tidegate doctor"
    return f"See how the sidecar of {instance} is doing: `{command}`"


def for_loss(window_s: float) -> str:
    return f"Wait until the loss has left the window, at most {span(window_s)}; `tidegate flows` shows what is left"


def for_disagreement(instance: str) -> str:
    return (
        f"Something reaches the sidecar of {instance} unseen, or passes it by: compare `tidegate flows` with the "
        "sidecar's statistics, and check its redirection"
    )


def for_unknown_source(place: Place, service: str, source: str) -> str:
    return (
        f"Start {source} so that it can be seen, or take it out of the intentions of {service}: "
        f"`{place.tidegate('config', 'read', '-kind', 'service-intentions', '-name', service)}`"
    )


def for_unmeshed_instance(
    place: Place, intent: ServiceIntent, instance: Caller, outside_mesh: Iterable[str]
) -> str:
    """How an instance gets a sidecar, without cutting off the callers that do not use the mesh yet."""
    step = f"nboard {instance.workload}: {onboard(place, instance)}"
    callers = ", ".join(sorted(set(outside_mesh)))
    if not callers or intent.mode is MutualTLSMode.PERMISSIVE:
        return f"O{step}"
    entry = {
        "Kind": "service-defaults",
        "Name": intent.service,
        "MutualTLSMode": MutualTLSMode.PERMISSIVE.value,
    }
    return (
        f"First make {intent.service} permissive, or its sidecar refuses {callers}: `{place.write(entry)}`; then "
        f"o{step}"
    )


def for_no_instance(place: Place, service: str) -> str:
    return f"Start an instance of {service}, or see whether the name is right: `{place.tidegate('flows')}`"
