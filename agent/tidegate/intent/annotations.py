"""How annotations change a workload's policy: tidegate's own, Consul's and Istio's under the names they have there.

Layers: a base (built-in defaults, node configuration), the annotations of the workload's namespace, its own; the later
wins. Within a layer, and for one setting: Istio's annotation, Consul's redirect-traffic-config, Consul's single
annotations, tidegate's own; the later wins. ANNOTATIONS is that order.

Consul's webhook writes redirect-traffic-config from the single annotations and from what it knows besides: ports of
probes, the init container's user. Therefore lists of single annotations next to it are added to its lists, and do
not replace them: a changed annotation counts at once, and probes still pass.

Consul redirects IPv6 only where its annotation dual-stack is "true". Here that annotation says nothing: IPv6
of a workload is redirected unless tidegate.io/families says otherwise, because it would go around the sidecar.

Values are checked by the table in policy_settings.py. All faults are told at once, each with its annotation.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from tidegate.errors import InputError
from tidegate.intent.fields import Place
from tidegate.intent.network_text import as_name, clipped, shown
from tidegate.intent.policy import DEFAULT, MAX_FAULTS, Contradiction, Dns, Mode, Policy
from tidegate.intent.policy_documents import read_consul_config
from tidegate.intent.policy_parsing import (
    ALL_PORTS,
    Lookup,
    Names,
    no_such_name,
    parse_endpoint,
)
from tidegate.intent.policy_settings import NO_FAMILY, SETTINGS, Draft

TIDEGATE_PREFIX: Final = "tidegate.io/"
CONSUL_PREFIX: Final = "consul.hashicorp.com/"
ISTIO_PREFIX: Final = "traffic.sidecar.istio.io/"
CONSUL_STEM: Final = f"{CONSUL_PREFIX}transparent-proxy"
CONSUL_CONFIG: Final = f"{CONSUL_PREFIX}redirect-traffic-config"
NAMESPACE: Final = "namespace"
"""Source of a fault in a namespace's annotation."""

MESH: Final = f"{TIDEGATE_PREFIX}mesh"
SERVICE: Final = f"{TIDEGATE_PREFIX}service"
PORT: Final = f"{TIDEGATE_PREFIX}port"
"""What a pod says of itself besides its redirection: see workloads/kubernetes."""

_INCLUDED_PORTS: Final = f"{TIDEGATE_PREFIX}include-outbound-ports"
_ISTIO_INBOUND: Final = f"{ISTIO_PREFIX}includeInboundPorts"
_SIMILAR = 0.85
"""From which likeness (difflib's ratio) on a name of Consul's prefix counts as a mistyped one."""

_NEAR = 0.7
"""From which likeness on an annotation is named as one that may have been meant."""

_CLEAR = 0.9
"""From which likeness on it was the one that was meant, and others are not named."""

_SIMILAR_DOMAIN = 0.8
"""From which likeness on a domain with the rest of a name behind it is a mistyped one."""

_ADVISED = 60
"""Most characters of a value that a message gives in full as it should be."""

Written: TypeAlias = Mapping[str, object]
"""Annotations as a file has them: values should be texts, and YAML makes numbers and bools of what has no quotes."""

Annotations: TypeAlias = Mapping[str, str]
Apply: TypeAlias = Callable[[Draft, str, Place, Annotations], None]
"""Puts the value of one annotation of a layer into a draft; faults go to the place."""


def policy_from_annotations(
    annotations: Written,
    base: Policy = DEFAULT,
    *,
    users: Lookup = no_such_name,
    groups: Lookup = no_such_name,
) -> Policy:
    """The policy of a workload: `base`, changed by the workload's annotations.

    A list replaces the list of `base`. Annotations of other programs are left alone; a name that can only be
    a mistyped one is a fault. `users` and `groups` find the number of a name. InputErrors tells all faults.
    """
    return policy_of({}, annotations, base, users=users, groups=groups)


def policy_of(
    namespace_annotations: Written,
    annotations: Written,
    base: Policy = DEFAULT,
    *,
    users: Lookup = no_such_name,
    groups: Lookup = no_such_name,
) -> Policy:
    """As `policy_from_annotations`, with the annotations of the workload's namespace below its own.

    A label of the namespace by which Consul knows it (transparent-proxy) counts as an annotation.
    """
    draft = Draft(base, Names(users, groups))
    for written, source in ((namespace_annotations, NAMESPACE), (annotations, "")):
        layer = _texts(written, draft, source)
        _refuse_mistyped(layer, draft, source)
        for name, apply in ANNOTATIONS.items():
            if name in layer:
                apply(draft, layer[name].strip(), draft.place(name, source), layer)
    _refuse_ports_without_effect(draft)
    return draft.finish()


def _texts(written: Written, draft: Draft, source: str) -> Annotations:
    """The values as texts. One that is none is a fault, and is read as the text that it should be, if that is clear."""
    texts: dict[str, str] = {}
    strangers = 0
    for name, value in written.items():
        if not isinstance(value, str):
            strangers += 1
            if strangers <= MAX_FAULTS:
                draft.place(as_name(name), source).fault("is not a string", advised(value))
        text = _meant(value)
        if text is not None:
            texts[name] = text
    if strangers > MAX_FAULTS:
        problem = f"and {strangers - MAX_FAULTS} more values that are not strings"
        draft.place("", source).fault(problem)
    return texts


def advised(value: object) -> str:
    """What the value of an annotation, which is no text, should be: that text in quotes, if it is clear."""
    text = _meant(value)
    return "text in quotes" if text is None or len(text) > _ADVISED else json.dumps(text)


def _meant(value: object) -> str | None:
    """The text that a value of YAML or JSON stands for in an annotation, None when there is no saying."""
    match value:
        case str():
            return value
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case list() if not any(isinstance(item, list | dict) for item in value):
            return ",".join(_meant(item) or "" for item in value)
        case _:
            return None


def _refuse_ports_without_effect(draft: Draft) -> None:
    """Istio takes its own annotation without a word, whatever networks are included."""
    ports, cidrs = "outbound.include_ports", "outbound.include_cidrs"
    place = draft.place_of(ports)
    if place is None or place.path != _INCLUDED_PORTS:
        return
    if draft.value(ports) and draft.value(cidrs) is None:
        draft.contradict(
            Contradiction(
                "has no effect unless include-outbound-cidrs limits what is included",
                fields=(ports, cidrs),
                expected=f'{TIDEGATE_PREFIX}include-outbound-cidrs: "" as well, for these ports only',
            )
        )


def _sets(path: str, *others: str) -> Apply:
    """The value of a setting, and of others of its kind."""

    def apply(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
        draft.read(text, place, path, *others)

    return apply


def _adds(path: str) -> Apply:
    """A list of Consul's, which is part of redirect-traffic-config where there is one."""

    def apply(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
        before = draft.value(path) if CONSUL_CONFIG in layer else ()
        values = draft.read(text, place, path)
        if values is not None:
            draft.put(path, tuple(dict.fromkeys((*before, *values))), place)

    return apply


def _redirect(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    """Both directions; without them, DNS stays as it is as well."""
    if draft.read(text, place, "inbound.enabled", "outbound.enabled") is False:
        draft.put("dns.enabled", False, place)


def _families(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    if text.strip(", "):
        draft.read(text, place, "families")
    else:
        off = f'{TIDEGATE_PREFIX}redirect: "false" to redirect nothing'
        place.fault(NO_FAMILY, f"ipv4, ipv6 or both; {off}")
        draft.spoil("families")


_DNS_CHOICES = "off, all, or addresses of resolvers"


def _dns(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    match text:
        case "off":
            draft.put("dns.enabled", False, place)
        case "all":
            draft.put("dns.enabled", True, place)
            draft.put("dns.resolvers", (), place)
        case _ if text.isalpha():
            place.fault(f"{shown(text)} is not an address", _DNS_CHOICES)
            draft.spoil("dns.enabled", "dns.resolvers")
        case _ if text.strip(", "):
            if draft.read(text, place, "dns.resolvers") is not None:
                draft.put("dns.enabled", True, place)
        case _:
            place.fault("says nothing", _DNS_CHOICES)
            draft.spoil("dns.enabled", "dns.resolvers")


def _dns_to(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    try:
        endpoints = [parse_endpoint(item.strip()) for item in text.split(",", 2) if item.strip()]
    except InputError as error:
        place.fault(error.problem, error.expected)
        draft.spoil("dns.addresses", "dns.port")
        return
    ports = {port for _, port in endpoints}
    if len(ports) != 1:
        place.fault(f"{len(ports)} ports that queries are sent to", "one port, in both families")
        draft.spoil("dns.addresses", "dns.port")
        return
    draft.put("dns.addresses", tuple(address for address, _ in endpoints), place)
    draft.put("dns.port", ports.pop(), place)


def _consul_dns(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    """What Consul's webhook makes of it: queries to loopback go to the port of consul-dataplane.

    It says nothing without a transparent proxy, nor next to redirect-traffic-config, which has it in full.
    """
    before = draft.value("dns.enabled")
    enabled = draft.read(text, place, "dns.enabled")
    if CONSUL_CONFIG in layer or not draft.value("outbound.enabled"):
        draft.put("dns.enabled", before, place)
    elif enabled:
        proxy = Dns()
        draft.put("dns.resolvers", proxy.addresses, place)
        draft.put("dns.addresses", proxy.addresses, place)
        draft.put("dns.port", proxy.port, place)


def _consul_config(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    read_consul_config(draft, text, place)


def _istio_mode(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    match text:
        case "REDIRECT":
            draft.put("mode", Mode.REDIRECT, place)
        case "TPROXY":
            draft.put("mode", Mode.TPROXY, place)
        case "NONE":
            for path in ("inbound.enabled", "outbound.enabled", "dns.enabled"):
                draft.put(path, False, place)
        case _:
            place.fault(f"{shown(text)} is not a mode", "REDIRECT, TPROXY or NONE")
            draft.spoil("mode")


def _istio_excluded_inbound(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    """Next to a list of included ports Istio's exclusions say nothing (istio-iptables -d needs -b *)."""
    before = draft.value("inbound.exclude_ports")
    draft.read(text, place, "inbound.exclude_ports")
    if layer.get(_ISTIO_INBOUND, "*").strip() != "*":
        draft.put("inbound.exclude_ports", before, place)


def _istio_included_outbound(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
    if text == "*":
        draft.put("outbound.include_ports", (ALL_PORTS,), place)
    else:
        draft.read(text, place, "outbound.include_ports")


def _unsupported(problem: str, expected: str) -> Apply:
    def apply(draft: Draft, text: str, place: Place, layer: Annotations) -> None:
        if text:
            place.fault(problem, expected)

    return apply


_NO_VIRTUAL_MACHINES: Final = _unsupported(
    "connections that virtual machines open through the workload cannot be redirected yet",
    "a workload whose own processes open its connections",
)

ANNOTATIONS: Final[Mapping[str, Apply]] = {
    # Istio's resource annotations (istio.io/api annotation/annotations.yaml)
    _ISTIO_INBOUND: _sets("inbound.include_ports"),
    f"{ISTIO_PREFIX}excludeInboundPorts": _istio_excluded_inbound,
    f"{ISTIO_PREFIX}includeOutboundIPRanges": _sets("outbound.include_cidrs"),
    f"{ISTIO_PREFIX}excludeOutboundIPRanges": _sets("outbound.exclude_cidrs"),
    f"{ISTIO_PREFIX}includeOutboundPorts": _istio_included_outbound,
    f"{ISTIO_PREFIX}excludeOutboundPorts": _sets("outbound.exclude_ports"),
    f"{ISTIO_PREFIX}excludeInterfaces": _sets(
        "inbound.exclude_interfaces", "outbound.exclude_interfaces"
    ),
    f"{ISTIO_PREFIX}kubevirtInterfaces": _NO_VIRTUAL_MACHINES,
    "istio.io/reroute-virtual-interfaces": _NO_VIRTUAL_MACHINES,
    "sidecar.istio.io/interceptionMode": _istio_mode,
    # consul-k8s control-plane/connect-inject/constants/annotations_and_labels.go
    CONSUL_CONFIG: _consul_config,
    f"{CONSUL_STEM}-exclude-inbound-ports": _adds("inbound.exclude_ports"),
    f"{CONSUL_STEM}-exclude-outbound-ports": _adds("outbound.exclude_ports"),
    f"{CONSUL_STEM}-exclude-outbound-cidrs": _adds("outbound.exclude_cidrs"),
    f"{CONSUL_STEM}-exclude-uids": _adds("outbound.exclude_uids"),
    CONSUL_STEM: _redirect,
    f"{CONSUL_PREFIX}consul-dns": _consul_dns,
    f"{TIDEGATE_PREFIX}redirect": _redirect,
    **{
        f"{TIDEGATE_PREFIX}{setting.annotation}": _sets(setting.path)
        for setting in SETTINGS.values()
        if setting.annotation
    },
    f"{TIDEGATE_PREFIX}families": _families,
    f"{TIDEGATE_PREFIX}dns": _dns,
    f"{TIDEGATE_PREFIX}dns-to": _dns_to,
}
"""The annotations that are read, in the order in which they are applied: the later wins."""

_OTHERS: Final = frozenset(
    {MESH, SERVICE, PORT, f"{CONSUL_STEM}-status", f"{CONSUL_STEM}-overwrite-probes"}
)
"""Annotations of the same prefixes that say nothing of redirection."""

_EXAMPLES: Final[Mapping[str, str]] = {
    TIDEGATE_PREFIX: f"{TIDEGATE_PREFIX}exclude-inbound-ports",
    CONSUL_STEM: f"{CONSUL_STEM}-exclude-inbound-ports",
    ISTIO_PREFIX: f"{ISTIO_PREFIX}excludeInboundPorts",
}
"""An annotation that exists, by how a name begins that can only be meant for redirection."""

_PREFIXES: Final = (TIDEGATE_PREFIX, CONSUL_PREFIX, ISTIO_PREFIX)

_ENDS: Final[Mapping[str, frozenset[str]]] = {
    prefix: frozenset(
        name.removeprefix(prefix) for name in (*ANNOTATIONS, *_OTHERS) if name.startswith(prefix)
    )
    for prefix in _PREFIXES
}
"""What may stand behind each prefix."""


def meant_by(name: str) -> str:
    """The annotation that was meant by a name whose domain is mistyped, "" when there is none."""
    domain, _, end = name.partition("/")
    for prefix, ends in _ENDS.items():
        if end in ends and not name.startswith(prefix):
            alike = difflib.SequenceMatcher(None, clipped(domain), prefix[:-1]).ratio()
            if alike >= _SIMILAR_DOMAIN:
                return prefix + end
    return ""


def _refuse_mistyped(layer: Annotations, draft: Draft, source: str) -> None:
    strangers = sorted(
        name
        for name in layer
        if name.startswith(_PREFIXES) and name not in ANNOTATIONS and name not in _OTHERS
    )
    mistyped = [name for name in strangers if name.startswith(tuple(_EXAMPLES))]
    mistyped += [name for name in layer if meant_by(name)]
    # Comparing names takes time, and a workload may have very many.
    for name in strangers[:MAX_FAULTS]:
        if name not in mistyped and _nearest(name, _SIMILAR):
            mistyped.append(name)
    for name in mistyped[:MAX_FAULTS]:
        draft.place(as_name(name), source).fault(
            "there is no such annotation", _meant_names(name) or _example(name)
        )
    if len(mistyped) > MAX_FAULTS:
        more = len(mistyped) - MAX_FAULTS
        draft.place("", source).fault(f"and {more} more annotations that do not exist")


def _example(name: str) -> str:
    prefix = next(prefix for prefix in _EXAMPLES if name.startswith(prefix))
    return f"one that exists, such as {_EXAMPLES[prefix]}, or none that begins with {prefix}"


def _meant_names(name: str) -> str:
    """The annotations that were probably meant, "" when none is near."""
    if meant := meant_by(name):
        return meant
    return " or ".join(_nearest(name, _CLEAR) or _nearest(name, _NEAR, 3))


def _nearest(name: str, likeness: float, most: int = 1) -> list[str]:
    """The annotations that are at least so similar, the most similar first."""
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    end = clipped(name.removeprefix(prefix))
    near = difflib.get_close_matches(end, sorted(_ENDS[prefix]), most, likeness)
    return [prefix + one for one in near]
