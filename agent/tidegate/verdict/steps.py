"""What a person does next about one reason, with the exact command where there is one.

Pure text from facts: who called, how, whether the catalog says it is meshed and whether an
intention allows it. Which commands exist depends on where the workload lives, so the environment is
an argument.
"""

import enum
import json
import shlex

from tidegate.durations import span
from tidegate.model import FlowClass, ServiceIntent
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


def onboard(environment: Environment, caller: Caller) -> str:
    """How the caller gets a sidecar."""
    name = caller.workload
    match environment:
        case Environment.LAB:
            return f"`{shlex.join(['tidegate', 'lab', 'onboard', name])}`"
        case Environment.KUBERNETES:
            command = [
                *("kubectl", "--namespace", caller.namespace or "default"),
                *("annotate", "pod", name, "tidegate.io/mesh=true"),
            ]
            return f"`{shlex.join(command)}` (and in its pod template, so that it stays)"
        case Environment.VM:
            return f'set the annotation tidegate.io/mesh: "true" of {name} on {caller.node}'


def allow(intent: ServiceIntent, source: str) -> str:
    """The command that writes the intention which lets `source` call: the whole entry, with what
    it has already."""
    sources = [
        {"Name": rule.source, "Action": "allow" if rule.allow else "deny"}
        for rule in intent.intentions
        if rule.precedence >= EXACT_DESTINATION_PRECEDENCE and rule.source != source
    ]
    entry = {
        "Kind": "service-intentions",
        "Name": intent.service,
        "Sources": [{"Name": source, "Action": "allow"}, *sources],
    }
    return f"`echo {shlex.quote(json.dumps(entry))} | tidegate config write -`"


def for_flow(
    environment: Environment,
    intent: ServiceIntent,
    caller: Caller,
    flow_class: FlowClass,
    port: int,
    *,
    window_s: float,
) -> str:
    """The next step for a caller whose flows strict mode would refuse. First matching line of
    the list wins."""
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
        then = "" if allowed else f", and allow it: {allow(intent, caller.service)}"
        return f"Onboard {name}: {onboard(environment, caller)}{then}{carries}"
    if not intent.allows(caller.service):
        return (
            f"{name} is in the mesh, but no intention lets {caller.service} call {intent.service}: "
            f"{allow(intent, caller.service)}"
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


def for_sidecar(environment: Environment, instance: str) -> str:
    command = "tidegate lab status" if environment is Environment.LAB else "tidegate doctor"
    return f"See how the sidecar of {instance} is doing: `{command}`"


def for_loss(window_s: float) -> str:
    return f"Wait until the loss has left the window, at most {span(window_s)}; `tidegate flows` shows what is left"


def for_disagreement(instance: str) -> str:
    return (
        f"Something reaches the sidecar of {instance} unseen, or passes it by: compare `tidegate flows` with the "
        "sidecar's statistics, and check its redirection"
    )


def for_unknown_source(service: str, source: str) -> str:
    return (
        f"Start {source} so that it can be seen, or take it out of the intentions of {service}: "
        f"`{shlex.join(['tidegate', 'config', 'read', '-kind', 'service-intentions', '-name', service])}`"
    )


def for_unmeshed_instance(environment: Environment, instance: Caller) -> str:
    return f"Onboard {instance.workload}: {onboard(environment, instance)}"


def for_no_instance(service: str) -> str:
    return f"Start an instance of {service}, or see whether the name is right: `tidegate ready`"
