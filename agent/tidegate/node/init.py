"""The redirection of one pod by an init container: policy, rules, proof; with CAP_NET_ADMIN and nothing else.

It works in the network namespace that it runs in, and on what the pod is told: environment, files of the downward API.
Nothing is left running; the rules stay as the agent's do, and an agent that comes by finds them as it would load them.
"""

import enum
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tidegate.enforce.redirect import inventory
from tidegate.enforce.redirect.backend import Backend
from tidegate.enforce.redirect.engine import Applied, Engine
from tidegate.enforce.redirect.foreign import Foreign, Left
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend, Twins
from tidegate.enforce.redirect.probing.judgement import Outcome, Probe
from tidegate.enforce.redirect.probing.place import Means
from tidegate.enforce.redirect.verify import verify
from tidegate.errors import InputError, InputErrors, TidegateError, nearest
from tidegate.intent import downward
from tidegate.intent.annotations import (
    ANNOTATIONS,
    CONSUL_CONFIG,
    TIDEGATE_PREFIX,
    policy_from_annotations,
)
from tidegate.intent.network_text import canonical_network
from tidegate.intent.policy import DEFAULT, Policy
from tidegate.intent.policy_documents import policy_from_document
from tidegate.kernel import capabilities, netns
from tidegate.kernel.errors import KernelError

PREFIX: Final = "TIDEGATE_"
POLICY: Final = f"{PREFIX}POLICY"
"""Environment variable with a policy document."""
NODE_ADDRESSES: Final = f"{PREFIX}NODE_ADDRESSES"
"""The node's own addresses, as status.hostIPs of the downward API has them: connections from them are probes."""
CONSUL: Final = "CONSUL_REDIRECT_TRAFFIC_CONFIG"
"""What consul-k8s gives its init container: the value of the annotation redirect-traffic-config."""

SETTINGS: Final[Mapping[str, str]] = {
    PREFIX + name.removeprefix(TIDEGATE_PREFIX).upper().replace("-", "_"): name
    for name in ANNOTATIONS
    if name.startswith(TIDEGATE_PREFIX)
}
"""Environment variables for single settings, and the annotation that each stands for."""

_OTHERS: Final = frozenset(
    {
        POLICY,
        NODE_ADDRESSES,
        f"{PREFIX}NODE",
        f"{PREFIX}LAB",
        f"{PREFIX}SOCKET",
        f"{PREFIX}HTTP_ADDR",
    }
)
_OF_SERVICES: Final = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)=.*|\w+_PORT=(tcp|udp|sctp)://.*"
)
"""What Kubernetes puts into every environment for a service whose name begins with tidegate."""


class Failure(enum.IntEnum):
    """Exit codes; 0 is success."""

    OTHER = 1
    """What nothing below is about; the sentence says what."""
    POLICY = 2
    """Environment, annotations, labels or document have faults, all of which are told."""
    PERMISSION = 3
    """The container has no CAP_NET_ADMIN."""
    KERNEL = 4
    """The kernel lacks what rules need, or refuses them."""
    FOREIGN = 5
    """Another mesh redirects in this pod already."""
    NODE = 6
    """This is the node's own network namespace: everything on the node would be redirected."""
    FAILED = 7
    """The rules are loaded, and a probe did not land where the policy says."""
    UNPROVEN = 8
    """The rules are loaded, and no probe could be made."""


class InitFailed(TidegateError):
    """Why the pod is not, or not for certain, redirected as its policy says."""

    def __init__(self, failure: Failure, problem: str) -> None:
        self.exit_code = int(failure)
        super().__init__(problem)


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What was done."""

    policy: Policy
    applied: Applied
    why: str
    """Why it was this backend."""
    probes: tuple[Probe, ...]
    warnings: tuple[str, ...]


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """What an init container is told of its pod."""

    environment: Mapping[str, str]
    annotations: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}


def read_downward(path: Path) -> dict[str, str]:
    """Annotations or labels of a file of the downward API. InputError when it cannot be read, or is none."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise InputError(f"cannot be read: {reason}", source=str(path)) from error
    return downward.parse(text, str(path))


def policy_of(pod: Pod) -> Policy:
    """The policy of a pod: built-in defaults, changed by the document, the environment, then labels and annotations.

    Names of users and groups have no meaning here: they would be those of this image. InputErrors with all faults.
    """
    faults: list[InputError] = []
    policy = DEFAULT
    try:
        policy = _base(pod.environment)
    except InputErrors as error:
        faults += error.faults
    except InputError as error:
        faults.append(error)
    for layer, names in (_settings(pod.environment), _annotations(pod)):
        try:
            policy = policy_from_annotations(layer, policy)
        except InputErrors as error:
            faults += (_named(fault, names) for fault in error.faults)
    faults += _strangers(pod.environment)
    if faults:
        raise InputErrors(tuple(faults))
    return policy


def redirect(policy: Policy, *, adopt: bool = False) -> Done:
    """Have the namespace of this process follow the policy, and prove it. InitFailed with what went wrong.

    The same again changes nothing. With `adopt` the rules that Consul left are replaced.
    """
    _refuse_without_right()
    _refuse_node()
    _refuse_strangers(adopt)
    engine, applied = _applied(policy, adopt)
    if applied.foreign:
        raise InitFailed(Failure.FOREIGN, _told(applied.foreign))
    return Done(
        policy=policy,
        applied=applied,
        why=engine.choice.why,
        probes=_proven(policy),
        warnings=tuple(_warnings(engine, policy)),
    )


# What the pod is told


def _base(environment: Mapping[str, str]) -> Policy:
    addresses = []
    for text in environment.get(NODE_ADDRESSES, "").replace(",", " ").split():
        try:
            addresses.append(canonical_network(text))
        except InputError as error:
            raise InputError(
                error.problem, field=NODE_ADDRESSES, expected="addresses, divided by commas"
            ) from error
    inbound = msgspec.structs.replace(DEFAULT.inbound, node_addresses=tuple(addresses))
    base = msgspec.structs.replace(DEFAULT, inbound=inbound)
    document = environment.get(POLICY, "")
    return policy_from_document(document, POLICY, base) if document.strip() else base


def _settings(environment: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The single settings as annotations, and which variable each of them is from."""
    said = {name: SETTINGS[name] for name in SETTINGS if name in environment}
    layer = {annotation: environment[name] for name, annotation in said.items()}
    return layer, {annotation: name for name, annotation in said.items()}


def _annotations(pod: Pod) -> tuple[dict[str, str], dict[str, str]]:
    """What labels and annotations say, the latter win, and which variable stands for one of them."""
    labels = {name: value for name, value in pod.labels.items() if name in ANNOTATIONS}
    layer = {**labels, **pod.annotations}
    config = pod.environment.get(CONSUL, "")
    if config.strip() and CONSUL_CONFIG not in layer:
        return {CONSUL_CONFIG: config, **layer}, {CONSUL_CONFIG: CONSUL}
    return layer, {}


def _named(fault: InputError, names: Mapping[str, str]) -> InputError:
    """A fault with the name of the variable, where it is of one."""
    for annotation, name in names.items():
        if fault.field == annotation or fault.field.startswith(
            (f"{annotation}.", f"{annotation}[")
        ):
            field = name + fault.field.removeprefix(annotation)
            return InputError(fault.problem, field=field, expected=fault.expected)
    return fault


def _strangers(environment: Mapping[str, str]) -> Iterator[InputError]:
    for name, value in sorted(environment.items()):
        known = name in SETTINGS or name in _OTHERS or _OF_SERVICES.fullmatch(f"{name}={value}")
        if name.startswith(PREFIX) and not known:
            problem = "there is no such setting"
            yield InputError(problem, field=name, expected=nearest(name, (*SETTINGS, POLICY)))


# What is done


def _refuse_without_right() -> None:
    if not capabilities.has(os.getpid(), capabilities.CAP_NET_ADMIN):
        raise InitFailed(
            Failure.PERMISSION,
            "rules cannot be loaded without CAP_NET_ADMIN: add NET_ADMIN to the container's"
            " securityContext.capabilities, and run it as root, unless its program may have it otherwise",
        )


def _refuse_node() -> None:
    try:
        is_nodes = netns.is_initial(netns.CURRENT)
    except KernelError as error:
        raise InitFailed(Failure.KERNEL, str(error)) from error
    if is_nodes:
        raise InitFailed(
            Failure.NODE,
            "this is the node's own network namespace (hostNetwork: true), in which everything on the node would be"
            " redirected; such a pod cannot be in the mesh",
        )


def _refuse_strangers(adopt: bool) -> None:
    try:
        found = inventory.taken(netns.CURRENT).foreign
    except KernelError as error:
        raise InitFailed(Failure.KERNEL, str(error)) from error
    strangers = [one for one in found if not (adopt and one.removable)]
    if strangers:
        raise InitFailed(Failure.FOREIGN, _told(strangers))


def _applied(policy: Policy, adopt: bool) -> tuple[Engine, Applied]:
    """By nf_tables or else by the legacy tables; rules that a pod cannot have because of its policy fail with both."""
    nftables: Backend = NftablesBackend(Twins.BESIDE)
    refusals: list[str] = []
    for backend in (nftables, IptablesBackend(with_sets=False)):
        engine = Engine.by(backend, "; ".join((*refusals, f"{backend.name} works here")))
        try:
            applied = engine.apply(netns.CURRENT, policy, adopt=adopt)
            differences = engine.check(netns.CURRENT, policy)
        except KernelError as error:
            refusals.append(str(error))
            continue
        if differences and not applied.foreign:
            raise InitFailed(Failure.FAILED, f"the rules are loaded, and: {differences[0]}")
        return engine, applied
    told = "; ".join(refusals)
    raise InitFailed(Failure.KERNEL, f"{told} (the legacy tables take NET_RAW and root besides)")


def _told(strangers: Sequence[Foreign | Left]) -> str:
    adoptable = all(_found(one).removable for one in strangers)
    what = "; ".join(map(str, strangers))
    advice = "--adopt replaces that" if adoptable else "a pod can be in one mesh only"
    return f"{what}; {advice}"


def _found(one: Foreign | Left) -> Foreign:
    return one.found if isinstance(one, Left) else one


def _proven(policy: Policy) -> tuple[Probe, ...]:
    """What probes showed; InitFailed for one that failed, and where none could be made of what is redirected."""
    try:
        probes = verify(netns.CURRENT, policy, Means.CONNECTIONS)
    except KernelError as error:
        problem = f"the rules are loaded, but no probe could be made: {error}"
        raise InitFailed(Failure.UNPROVEN, problem) from error
    for probe in probes:
        if probe.outcome is Outcome.FAILED:
            problem = f"the rules are loaded, but the probe {probe.name} failed: {probe.detail}"
            raise InitFailed(Failure.FAILED, problem)
    if not any(probe.outcome is Outcome.PASSED for probe in probes):
        reasons = "; ".join(f"{probe.name}: {probe.detail}" for probe in probes)
        problem = f"the rules are loaded, but no probe could be made: {reasons}"
        raise InitFailed(Failure.UNPROVEN, problem)
    return probes


def _warnings(engine: Engine, policy: Policy) -> Iterator[str]:
    if policy.outbound.wait_for_sidecar:
        yield (
            "outbound connections do not wait for the sidecar: only an agent could tell that it listens; "
            "init containers that need the network come before this one"
        )
    try:
        yield from engine.gaps(netns.CURRENT, policy)
    except KernelError as error:
        yield f"ways around the sidecar were not all looked for: {error}"
