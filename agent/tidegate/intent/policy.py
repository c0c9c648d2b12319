"""What to redirect for one workload: the policy, and how a pod's annotations change it.

Pure. A Policy is valid by construction. Annotations are tidegate's own and Consul's under the names
that consul-k8s gives them; every value is checked, all faults are reported at once. Which rules a
policy turns into is decided in enforce/redirect/rules.py.
"""

import difflib
import enum
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

import msgspec

from tidegate.errors import InputError, InputErrors
from tidegate.model import DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, DEFAULT_PROXY_UID

MAX_PORT = 65535
MAX_UID = 2**32 - 2
"""The highest user id: 2**32 - 1 means "no user" (uid_t -1)."""

MAX_ITEMS = 4096
"""Most items that one list of a policy may have."""


_DIGITS = re.compile(r"[0-9]{1,10}")
_PORT_RANGE = re.compile(r"(?P<first>[0-9]{1,6})(?:[-:](?P<last>[0-9]{1,6}))?")
_PORT_EXPECTED = f"a port from 1 to {MAX_PORT} or a range such as 8000-8010"
_UID_EXPECTED = f"a number from 0 to {MAX_UID}"
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_MAPPED_PREFIX = 96
"""Length of ::ffff:0:0/96, which holds the IPv4-mapped addresses (RFC 4291, 2.5.5.2)."""
_SIMILAR = 0.85
"""From which likeness (difflib's ratio) on a name counts as a mistyped one."""
_SHOWN = 60
"""Most characters of a faulty value that a message repeats."""

_T = TypeVar("_T")


class Family(enum.StrEnum):
    """Address family of a packet on the wire; IPv4-mapped IPv6 sockets speak IPv4."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class PortRange(msgspec.Struct, frozen=True, order=True):
    """TCP ports from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """How the sidecar's own traffic is told from the application's."""

    uids: tuple[int, ...] = (DEFAULT_PROXY_UID,)


class Inbound(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that others open to the workload."""

    enabled: bool = True
    port: int = DEFAULT_INBOUND_PORT
    """Where the sidecar listens for them."""
    exclude_ports: tuple[PortRange, ...] = ()


class Outbound(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that the workload opens to others."""

    enabled: bool = True
    port: int = DEFAULT_OUTBOUND_PORT
    """Where the sidecar listens for them."""
    exclude_ports: tuple[PortRange, ...] = ()
    exclude_cidrs: tuple[str, ...] = ()
    """Destinations as canonical networks, such as 10.0.0.0/8 or fd00::1/128."""
    exclude_uids: tuple[int, ...] = ()


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What to redirect for one workload. InputErrors when parts are wrong or contradictory."""

    proxy: Proxy = Proxy()
    inbound: Inbound = Inbound()
    outbound: Outbound = Outbound()
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)

    def __post_init__(self) -> None:
        faults = tuple(_faults_of(self))
        if faults:
            raise InputErrors(faults)

    @property
    def redirects_anything(self) -> bool:
        """False when the policy leaves the workload's traffic alone."""
        return bool(self.families) and (self.inbound.enabled or self.outbound.enabled)

    def redirects_inbound(self, port: int) -> bool:
        """Whether connections from outside to `port` reach the sidecar's inbound listener."""
        return _covers(self, self.inbound, port)

    def redirects_outbound(self, port: int) -> bool:
        """Whether the application's connections to `port` reach the sidecar.

        Exclusions by destination address and by user are not looked at.
        """
        return _covers(self, self.outbound, port)


def parse_port_range(text: str) -> PortRange:
    """A port, or a range: 8000-8010 or, as iptables writes it, 8000:8010. InputError otherwise."""
    match = _PORT_RANGE.fullmatch(text)
    if match is None:
        raise InputError(f"{_shown(text)} is not a port", expected=_PORT_EXPECTED)
    first = int(match["first"])
    ports = PortRange(first, int(match["last"] or first))
    _check_ports(ports)
    return ports


def parse_cidr(text: str) -> str:
    """An address or a network in canonical form, always with a prefix; host bits are cleared.

    IPv4-mapped IPv6 networks become IPv4: that is what such connections are on the wire. InputError
    otherwise.
    """
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        problem = f"{_shown(text)} is not an address or a network"
        raise InputError(problem, expected="such as 10.0.0.0/8, 10.1.2.3 or fd00::/8") from error
    if "%" in text:
        raise InputError(f"{_shown(text)} names an interface", expected=text.partition("%")[0])
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= _MAPPED_PREFIX:
        network = ipaddress.ip_network((mapped, network.prefixlen - _MAPPED_PREFIX))
    return str(network)


def parse_uid(text: str) -> int:
    """A numeric user id. InputError otherwise."""
    if not _DIGITS.fullmatch(text):
        raise InputError(f"{_shown(text)} is not a numeric user id", expected=_UID_EXPECTED)
    _check_uid(int(text))
    return int(text)


def parse_bool(text: str) -> bool:
    """What Go's strconv.ParseBool, and so Consul, takes for a boolean. InputError otherwise."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise InputError(f"{_shown(text)} is neither true nor false", expected="true or false")


def _covers(policy: Policy, direction: Inbound | Outbound, port: int) -> bool:
    excluded = any(port in ports for ports in direction.exclude_ports)
    return bool(policy.families) and direction.enabled and not excluded


def _check_ports(ports: PortRange) -> None:
    if ports.first > ports.last:
        expected = f"the lower port first: {ports.last}-{ports.first}"
        raise InputError(f"the range '{ports}' runs backwards", expected=expected)
    if ports.first < 1 or ports.last > MAX_PORT:
        raise InputError(f"there is no port '{ports}'", expected=_PORT_EXPECTED)


def _check_not_own(ports: PortRange, policy: Policy) -> None:
    for own in (policy.inbound.port, policy.outbound.port):
        if own in ports:
            part = "is" if ports.first == ports.last else "includes"
            raise InputError(
                f"'{ports}' {part} port {own}, on which the sidecar itself listens",
                expected="ports of the application only",
            )


def _check_uid(uid: int) -> None:
    if not 0 <= uid <= MAX_UID:
        raise InputError(f"there is no user id {uid}", expected=_UID_EXPECTED)


def _check_cidr(cidr: str) -> None:
    canonical = parse_cidr(cidr)
    if canonical != cidr:
        raise InputError(f"{_shown(cidr)} is not in canonical form", expected=canonical)


def _faults_of(policy: Policy) -> Iterator[InputError]:
    inbound, outbound = policy.inbound, policy.outbound

    def check_excluded(ports: PortRange) -> None:
        _check_ports(ports)
        _check_not_own(ports, policy)

    for field, port in (("inbound.port", inbound.port), ("outbound.port", outbound.port)):
        if not 1 <= port <= MAX_PORT:
            yield InputError(f"there is no port {port}", field=field, expected=_PORT_EXPECTED)
    if inbound.port == outbound.port:
        problem = f"{outbound.port} is the inbound listener's port as well"
        yield InputError(problem, field="outbound.port", expected="a port of its own")
    if not policy.proxy.uids:
        problem = "nothing tells the sidecar's own traffic apart"
        yield InputError(problem, field="proxy.uids", expected="at least one user id")
    yield from _faults_in("proxy.uids", policy.proxy.uids, _check_uid)
    yield from _faults_in("inbound.exclude_ports", inbound.exclude_ports, check_excluded)
    yield from _faults_in("outbound.exclude_ports", outbound.exclude_ports, check_excluded)
    yield from _faults_in("outbound.exclude_cidrs", outbound.exclude_cidrs, _check_cidr)
    yield from _faults_in("outbound.exclude_uids", outbound.exclude_uids, _check_uid)


def _faults_in(
    field: str, values: tuple[_T, ...], check: Callable[[_T], None]
) -> Iterator[InputError]:
    if len(values) > MAX_ITEMS:
        problem = f"the list has {len(values)} items"
        yield InputError(problem, field=field, expected=f"at most {MAX_ITEMS}")
    for value in values:
        try:
            check(value)
        except InputError as fault:
            yield _located(fault, field)


def _located(fault: InputError, field: str) -> InputError:
    return InputError(fault.problem, source=fault.source, field=field, expected=fault.expected)


def _shown(text: str) -> str:
    return repr(_clipped(text))


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


DEFAULT = Policy()


class Setting(enum.Enum):
    """What an annotation can set; the value is the end of tidegate's name for it."""

    REDIRECT = "redirect"
    EXCLUDE_INBOUND_PORTS = "exclude-inbound-ports"
    EXCLUDE_OUTBOUND_PORTS = "exclude-outbound-ports"
    EXCLUDE_OUTBOUND_CIDRS = "exclude-outbound-cidrs"
    EXCLUDE_UIDS = "exclude-uids"


TIDEGATE_PREFIX: Final = "tidegate.io/"
CONSUL_PREFIX: Final = "consul.hashicorp.com/"
_CONSUL_STEM: Final = f"{CONSUL_PREFIX}transparent-proxy"

ANNOTATIONS: Final[Mapping[str, Setting]] = {
    # consul-k8s control-plane/connect-inject/constants/annotations_and_labels.go
    _CONSUL_STEM: Setting.REDIRECT,
    f"{_CONSUL_STEM}-exclude-inbound-ports": Setting.EXCLUDE_INBOUND_PORTS,
    f"{_CONSUL_STEM}-exclude-outbound-ports": Setting.EXCLUDE_OUTBOUND_PORTS,
    f"{_CONSUL_STEM}-exclude-outbound-cidrs": Setting.EXCLUDE_OUTBOUND_CIDRS,
    f"{_CONSUL_STEM}-exclude-uids": Setting.EXCLUDE_UIDS,
    **{f"{TIDEGATE_PREFIX}{setting.value}": setting for setting in Setting},
}
"""The annotations that are read, in the order in which they are applied: the later wins."""

_OTHERS: Final = frozenset(
    {f"{TIDEGATE_PREFIX}mesh", f"{_CONSUL_STEM}-status", f"{_CONSUL_STEM}-overwrite-probes"}
)
"""Annotations of the same prefixes that say nothing of redirection."""


def policy_from_annotations(annotations: Mapping[str, str], base: Policy = DEFAULT) -> Policy:
    """The policy of a workload: `base`, changed by the workload's annotations.

    A list replaces the list of `base`. Of two annotations for one setting tidegate's own wins over
    Consul's. Annotations of other programs are left alone. InputErrors names every faulty value.
    """
    faults = [_unknown(name) for name in sorted(annotations) if _is_mistyped(name)]
    policy = base
    for name, setting in ANNOTATIONS.items():
        if name not in annotations:
            continue
        try:
            policy = _set(policy, setting, annotations[name].strip())
        except InputErrors as error:
            faults += [_located(fault, name) for fault in error.faults]
        except InputError as error:
            faults.append(_located(error, name))
    if faults:
        raise InputErrors(tuple(faults))
    return policy


def _set(policy: Policy, setting: Setting, text: str) -> Policy:
    def parse_excluded(item: str) -> PortRange:
        ports = parse_port_range(item)
        _check_not_own(ports, policy)
        return ports

    replace = msgspec.structs.replace
    inbound, outbound = policy.inbound, policy.outbound
    match setting:
        case Setting.REDIRECT:
            enabled = parse_bool(text)
            inbound = replace(inbound, enabled=enabled)
            outbound = replace(outbound, enabled=enabled)
        case Setting.EXCLUDE_INBOUND_PORTS:
            inbound = replace(inbound, exclude_ports=_parse_list(text, parse_excluded))
        case Setting.EXCLUDE_OUTBOUND_PORTS:
            outbound = replace(outbound, exclude_ports=_parse_list(text, parse_excluded))
        case Setting.EXCLUDE_OUTBOUND_CIDRS:
            outbound = replace(outbound, exclude_cidrs=_parse_list(text, parse_cidr))
        case Setting.EXCLUDE_UIDS:
            outbound = replace(outbound, exclude_uids=_parse_list(text, parse_uid))
    return replace(policy, inbound=inbound, outbound=outbound)


def _parse_list(text: str, parse: Callable[[str], _T]) -> tuple[_T, ...]:
    items = [item.strip() for item in text.split(",")]
    items = [item for item in items if item]
    if len(items) > MAX_ITEMS:
        raise InputError(f"the list has {len(items)} items", expected=f"at most {MAX_ITEMS}")
    values, faults = [], []
    for item in items:
        try:
            values.append(parse(item))
        except InputError as fault:
            faults.append(fault)
    if faults:
        raise InputErrors(tuple(faults))
    return tuple(values)


def _is_mistyped(name: str) -> bool:
    """Whether a name can only be meant for redirection, and is none of those that exist."""
    if name in ANNOTATIONS or name in _OTHERS:
        return False
    if name.startswith((TIDEGATE_PREFIX, _CONSUL_STEM)):
        return True
    return name.startswith(CONSUL_PREFIX) and bool(_nearest(name, _SIMILAR))


def _unknown(name: str) -> InputError:
    nearest = _nearest(name, 0.0)
    return InputError("there is no such annotation", field=_clipped(name), expected=nearest[0])


def _nearest(name: str, likeness: float) -> list[str]:
    prefix = CONSUL_PREFIX if name.startswith(CONSUL_PREFIX) else TIDEGATE_PREFIX
    ends = [known.removeprefix(prefix) for known in ANNOTATIONS if known.startswith(prefix)]
    end = _clipped(name.removeprefix(prefix))
    return [prefix + near for near in difflib.get_close_matches(end, ends, n=1, cutoff=likeness)]
