"""What a person does next about one reason, with the exact command where there is one.

Pure text from facts: who called, how, whether the catalog says it is meshed and whether an
intention allows it. Which commands exist depends on where the workload lives, so the environment is
an argument.
"""

import enum
import json
import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec

from tidegate.durations import span
from tidegate.model import DEFAULT_TENANT, FlowClass, MutualTLSMode, ServiceIntent, ServiceName
from tidegate.verdict.evidence import Caller, CallerKind

EXACT_DESTINATION_PRECEDENCE = 7
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
    injected_by: str = ""
    """What pod templates say in Kubernetes so that pods have a sidecar from their start; empty where the agent gives
    one to a pod that runs."""

    def tidegate(self, *words: str) -> str:
        """A tidegate command, for a shell."""
        lab = ("--lab", self.lab) if self.lab else ()
        return shlex.join(["tidegate", *words, *lab])

    def write(self, entry: dict[str, Any]) -> str:
        """The command that writes a config entry, for a shell."""
        return f"echo {shlex.quote(json.dumps(entry))} | {self.tidegate('config', 'write', '-')}"


def onboard(place: Place, caller: Caller) -> str:
    """How the caller gets a sidecar."""
    [command] = onboard_all(place, (caller,))
    match place.environment:
        case Environment.LAB:
            return f"`{command}`"
        case Environment.KUBERNETES if place.injected_by:
            return command
        case Environment.KUBERNETES:
            return (
                f"`{command}` (and in its pod template, so that it stays), or, where Consul or Istio inject sidecars, "
                "as they are told to"
            )
        case Environment.VM:
            return command


def onboard_all(place: Place, callers: Sequence[Caller]) -> tuple[str, ...]:
    """The commands that give all these workloads sidecars; for a VM, or an injector, what is to be done in words."""
    match place.environment:
        case Environment.LAB:
            names = sorted({caller.workload for caller in callers})
            return (place.tidegate("lab", "onboard", *names),)
        case Environment.KUBERNETES:
            pods: dict[str, set[str]] = {}
            for caller in callers:
                pods.setdefault(caller.namespace or "default", set()).add(caller.workload)
            if place.injected_by:
                return tuple(
                    f"put {place.injected_by} into the pod template of {', '.join(sorted(names))} in the namespace "
                    f"{namespace}, which makes the pods anew"
                    for namespace, names in sorted(pods.items())
                )
            return tuple(
                shlex.join(
                    [
                        *("kubectl", "--namespace", namespace),
                        *("annotate", "pod", *sorted(names), "tidegate.io/mesh=true"),
                    ]
                )
                for namespace, names in sorted(pods.items())
            )
        case Environment.VM:
            return tuple(
                f"set meshed: true for {caller.workload} on {caller.node}, in its workload file, or under `processes` "
                "in the agent's configuration with `systemctl reload tidegate-agent` after it"
                for caller in callers
            )


def allow(place: Place, intent: ServiceIntent, callers: Iterable[str]) -> str:
    """The command that writes the intentions which let all `callers` call: the whole entry, with
    what it has already. It is the same for each of them, so that no step takes back another."""
    named = sorted(set(callers))
    destination = ServiceName.of(intent.service)
    present = [
        {**_source(rule.source, destination), "Action": "allow" if rule.allow else "deny"}
        for rule in intent.intentions
        if rule.precedence >= EXACT_DESTINATION_PRECEDENCE and rule.source not in named
    ]
    entry = {
        "Kind": "service-intentions",
        **_named(destination),
        "Sources": [
            *({**_source(name, destination), "Action": "allow"} for name in named),
            *present,
        ],
    }
    return place.write(entry)


def _named(service: ServiceName) -> dict[str, str]:
    """Name and tenancy of an entry, what is the default left out."""
    fields = {"Name": service.name, "Namespace": service.namespace, "Partition": service.partition}
    return {key: text for key, text in fields.items() if key == "Name" or text != DEFAULT_TENANT}


def _source(text: str, destination: ServiceName) -> dict[str, str]:
    """Name and tenancy of a source; what it shares with the destination's entry it takes from there (Consul
    SourceIntention.MergeNoWildcard)."""
    source = ServiceName.of(text)
    fields = {"Name": source.name}
    if source.namespace != destination.namespace:
        fields["Namespace"] = source.namespace
    if source.partition != destination.partition:
        fields["Partition"] = source.partition
    return fields


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
        then = "" if allowed else f", and allow it: `{allow(place, intent, to_allow)}`"
        return f"Onboard {name}: {onboard(place, caller)}{then}{carries}"
    if not intent.allows(caller.service):
        return (
            f"{name} is in the mesh, but no intention lets {caller.service} call {intent.service}: "
            f"`{allow(place, intent, to_allow)}`"
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
    return f"See how {instance} is doing: `{status_command(place)}`"


def status_command(place: Place) -> str:
    """The command that shows how workloads and their sidecars are doing."""
    in_lab = place.environment is Environment.LAB
    return place.tidegate("lab", "status") if in_lab else "tidegate status"


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
        f"`{read_intentions(place, service)}`"
    )


def read_intentions(place: Place, service: str) -> str:
    """The command that shows a service's intentions."""
    name, namespace, partition = ServiceName.of(service)
    tenancy = ("-namespace", namespace) if namespace != DEFAULT_TENANT else ()
    if partition != DEFAULT_TENANT:
        tenancy = (*tenancy, "-partition", partition)
    return place.tidegate("config", "read", "-kind", "service-intentions", "-name", name, *tenancy)


def for_unmeshed_instance(
    place: Place, intent: ServiceIntent, instance: Caller, outside_mesh: Iterable[str]
) -> str:
    """How an instance gets a sidecar, without cutting off the callers that do not use the mesh yet."""
    step = f"nboard {instance.workload}: {onboard(place, instance)}"
    callers = ", ".join(sorted(set(outside_mesh)))
    if not callers or intent.mode is MutualTLSMode.PERMISSIVE:
        return f"O{step}"
    return (
        f"First make {intent.service} permissive, or its sidecar refuses {callers}: "
        f"`{place.tidegate('permissive', intent.service)}`; then o{step}"
    )


def for_no_instance(place: Place, service: str) -> str:
    return f"Start an instance of {service}, or see whether the name is right: `{place.tidegate('flows')}`"
