"""What to redirect for one workload: the policy.

Pure. A Policy is valid by construction: every value is checked, contradictions between values are refused, and
all faults are reported at once. How annotations and documents change one is in annotations.py and
policy_documents.py; which rules it turns into is decided in enforce/redirect/rules.py.
"""

import bisect
import enum
import ipaddress
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

import msgspec

from tidegate.addresses import is_within
from tidegate.errors import InputError, InputErrors
from tidegate.intent.network_text import (
    canonical_address,
    canonical_network,
    check_interface,
    shown,
)
from tidegate.model import DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT, DEFAULT_PROXY_UID

MAX_PORT = 65535
MAX_ID = 2**32 - 2
"""The highest user or group id: 2**32 - 1 means "none" (uid_t -1)."""

MAX_MARK = 2**32 - 1
MAX_ITEMS = 4096
"""Most items that one list of a policy may have."""

MAX_CGROUP = 4096
"""Most bytes of a cgroup's path (linux/limits.h, PATH_MAX)."""

_MAX_NAME = 255
"""Most bytes of one part of it (linux/limits.h, NAME_MAX)."""

MAX_FAULTS = 20
"""Most faults of one list that are told one by one."""

PORT_EXPECTED: Final = f"a port from 1 to {MAX_PORT} or a range such as 8000-8010"
_ID_EXPECTED = f"a number from 0 to {MAX_ID}"

_T = TypeVar("_T")


class Family(enum.StrEnum):
    """Address family of a packet on the wire; IPv4-mapped IPv6 sockets speak IPv4."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class Protocol(enum.StrEnum):
    """Transport protocols that a policy can speak of; UDP only matters for DNS."""

    TCP = "tcp"
    UDP = "udp"


class Mode(enum.StrEnum):
    """How inbound connections are handed to the sidecar. Outbound ones are always redirected."""

    REDIRECT = "redirect"
    """Destination translation: the sidecar asks for the original destination (SO_ORIGINAL_DST)."""
    TPROXY = "tproxy"
    """No translation: the sidecar's transparent socket (IP_TRANSPARENT) bears the original destination
    as its local address, and the client keeps its port even where it uses it towards several ports."""


class PortRange(msgspec.Struct, frozen=True, order=True):
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class IdRange(msgspec.Struct, frozen=True, order=True):
    """User or group ids from `first` to `last`, both included."""

    first: int
    last: int

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Mark(msgspec.Struct, frozen=True, order=True):
    """A packet mark (SO_MARK): the bits of `mask` have the value `value`, which has no other bits."""

    value: int
    mask: int = 2**32 - 1


class UserPorts(msgspec.Struct, frozen=True, order=True):
    """What some users may reach without the sidecar, written tcp:5432:1000-1009."""

    protocols: tuple[Protocol, ...]
    ports: tuple[PortRange, ...]
    uids: tuple[IdRange, ...]


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    """How the sidecar's own traffic is told from the application's: any of these."""

    uids: tuple[int, ...] = (DEFAULT_PROXY_UID,)
    gids: tuple[int, ...] = ()
    mark: Mark | None = None
    cgroup: str = ""
    """Path of a cgroup v2 below its root, such as pod1/sidecar; the cgroups below it count as well."""
    self_calls_inbound: bool = False
    """Whether the sidecar's connections to the workload's own addresses, loopback excepted, go to its inbound
    listener, as Istio's sidecars expect. Consul's dial the inbound port by themselves."""


class Inbound(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that others open to the workload."""

    enabled: bool = True
    port: int = DEFAULT_INBOUND_PORT
    """Where the sidecar listens for them."""
    include_ports: tuple[PortRange, ...] | None = None
    """None for all."""
    exclude_ports: tuple[PortRange, ...] = ()
    exclude_cidrs: tuple[str, ...] = ()
    """Sources as canonical networks."""
    include_interfaces: tuple[str, ...] | None = None
    exclude_interfaces: tuple[str, ...] = ()
    direct_probes: bool = False
    """Whether connections from the node's own addresses (kubelet's probes) reach the application."""
    node_addresses: tuple[str, ...] = ()
    """The node's own addresses as canonical networks of one address; matters with `direct_probes`."""


class Outbound(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that the workload opens to others."""

    enabled: bool = True
    port: int = DEFAULT_OUTBOUND_PORT
    """Where the sidecar listens for them."""
    include_cidrs: tuple[str, ...] | None = None
    """Destinations as canonical networks, such as 10.0.0.0/8 or fd00::1/128; None for all."""
    include_ports: tuple[PortRange, ...] = ()
    """Ports that go to the sidecar whatever `include_cidrs` says (Istio's includeOutboundPorts)."""
    exclude_ports: tuple[PortRange, ...] = ()
    exclude_cidrs: tuple[str, ...] = ()
    exclude_uids: tuple[IdRange, ...] = ()
    exclude_gids: tuple[IdRange, ...] = ()
    exclude_user_ports: tuple[UserPorts, ...] = ()
    include_interfaces: tuple[str, ...] | None = None
    exclude_interfaces: tuple[str, ...] = ()
    wait_for_sidecar: bool = False
    """Whether connections and DNS queries pass until the sidecar first listens at `port`: those of init containers."""


class Dns(msgspec.Struct, frozen=True, kw_only=True):
    """Where the workload's DNS queries go, over UDP and TCP."""

    enabled: bool = False
    resolvers: tuple[str, ...] = ()
    """Only queries to these addresses are redirected; () for all to port 53. Canonical text, no prefix."""
    addresses: tuple[str, ...] = ("127.0.0.1", "::1")
    """Where to: at most one address of each family. Queries of a family without one are left alone."""
    port: int = 8600


_VERSION = {Family.IPV4: 4, Family.IPV6: 6}
_EVERYWHERE = {Family.IPV4: "0.0.0.0/0", Family.IPV6: "::/0"}


class Policy(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """What to redirect for one workload. InputErrors when parts are wrong or contradictory."""

    proxy: Proxy = Proxy()
    inbound: Inbound = Inbound()
    outbound: Outbound = Outbound()
    dns: Dns = Dns()
    families: tuple[Family, ...] = (Family.IPV4, Family.IPV6)
    mode: Mode = Mode.REDIRECT
    drop_invalid: bool = False
    """Whether packets that connection tracking cannot place are dropped (they would cause resets)."""

    def __post_init__(self) -> None:
        faults = tuple(_faults_of(self))
        if faults:
            raise InputErrors(faults)

    @property
    def redirects_anything(self) -> bool:
        """False when the policy leaves the workload's traffic alone."""
        return bool(self.families) and (
            self.inbound.enabled or self.outbound.enabled or self.dns.enabled
        )

    def before_sidecar(self) -> "Policy":
        """What is redirected until the sidecar first listens; the policy itself where it waits for nothing."""
        if not self.outbound.wait_for_sidecar:
            return self
        replace = msgspec.structs.replace
        outbound, dns = replace(self.outbound, enabled=False), replace(self.dns, enabled=False)
        return replace(self, outbound=outbound, dns=dns)

    def redirects_inbound(self, port: int, source: str) -> bool:
        """Whether connections from the address `source` to `port` reach the sidecar's inbound listener.

        Exclusions by interface are not looked at.
        """
        inbound = self.inbound
        included = inbound.include_ports is None or _within(port, inbound.include_ports)
        return (
            inbound.enabled
            and included
            and not _within(port, inbound.exclude_ports)
            and not is_within(source, self.inbound_sources_left_alone())
        )

    def inbound_ports_left_alone(self) -> tuple[PortRange, ...]:
        """The ports on which connections from outside go to the application, whoever opens them."""
        included = self.inbound.include_ports
        if included is None:
            return self.inbound.exclude_ports
        gaps, beginning = [], 1
        for ports in sorted(included):
            if beginning < ports.first:
                gaps.append(PortRange(beginning, ports.first - 1))
            beginning = max(beginning, ports.last + 1)
        if beginning <= MAX_PORT:
            gaps.append(PortRange(beginning, MAX_PORT))
        return (*gaps, *self.inbound.exclude_ports)

    def inbound_sources_left_alone(self) -> tuple[str, ...]:
        """The networks from which connections go to the application, whatever they dial."""
        node = self.inbound.node_addresses if self.inbound.direct_probes else ()
        return (*self._families_off(), *node, *self.inbound.exclude_cidrs)

    def redirects_outbound(self, port: int, destination: str) -> bool:
        """Whether the application's connections to `port` of the address `destination` reach the sidecar.

        Exclusions by user, group and interface are not looked at.
        """
        outbound = self.outbound
        included = (
            outbound.include_cidrs is None
            or is_within(destination, outbound.include_cidrs)
            or _within(port, outbound.include_ports)
        )
        return (
            outbound.enabled
            and included
            and not _within(port, outbound.exclude_ports)
            and not is_within(destination, (*self._families_off(), *outbound.exclude_cidrs))
        )

    def _families_off(self) -> tuple[str, ...]:
        return tuple(_EVERYWHERE[family] for family in Family if family not in self.families)


def _within(port: int, ranges: tuple[PortRange, ...]) -> bool:
    return any(port in ports for ports in ranges)


def check_port(port: int) -> None:
    """That there is such a port; InputError otherwise, as of all that follow."""
    if not 1 <= port <= MAX_PORT:
        raise InputError(f"there is no port {port}", expected=f"1 to {MAX_PORT}")


def check_ports(ports: PortRange, written: str = "") -> None:
    """That a range runs forwards and holds only ports; `written` is how a person wrote it."""
    _check_forwards(ports, written)
    if ports.first < 1 or ports.last > MAX_PORT:
        raise InputError(f"there is no port '{written or ports}'", expected=PORT_EXPECTED)


def check_id(number: int) -> None:
    """That a user or a group can have this number."""
    if not 0 <= number <= MAX_ID:
        raise InputError(f"there is no user or group {number}", expected=_ID_EXPECTED)


def check_ids(ids: IdRange, written: str = "") -> None:
    """That a range runs forwards and holds only numbers of users or groups; `written` as for ports."""
    _check_forwards(ids, written)
    check_id(ids.first)
    check_id(ids.last)


def check_mark(mark: Mark) -> None:
    """That a mark tells marked packets from others, and fits its mask."""
    if not 0 < mark.mask <= MAX_MARK:
        raise InputError(
            f"the mask {mark.mask:#x} selects no bits of a mark", expected="1 to 32 bits"
        )
    if mark.value == 0:
        problem = "with the mark 0 all traffic without a mark would be the sidecar's own"
        raise InputError(problem, expected="a value other than 0")
    if mark.value < 0 or mark.value & ~mark.mask:
        problem = f"the mark {mark.value:#x} has bits outside of its mask {mark.mask:#x}"
        raise InputError(problem, expected=f"bits of {mark.mask:#x} only")


def check_cgroup(path: str) -> None:
    """That a path names one cgroup below the root of cgroup v2."""
    expected = "a path below the root of cgroup v2, such as pod1/sidecar"
    parts = path.split("/")
    if path.startswith("/"):
        raise InputError(f"{shown(path)} begins with /", expected=expected)
    if any(part in ("", ".", "..") for part in parts):
        raise InputError(f"{shown(path)} has an empty part, . or ..", expected=expected)
    if any(not char.isprintable() or char in "'\"" for char in path):
        raise InputError(f"{shown(path)} has quotes or control characters", expected=expected)
    if len(path.encode()) > MAX_CGROUP or any(len(part.encode()) > _MAX_NAME for part in parts):
        raise InputError(
            f"{shown(path)} is too long",
            expected=f"at most {MAX_CGROUP} bytes, {_MAX_NAME} between two /",
        )


class Contradiction(InputError):
    """Values that are good by themselves and do not go together; `fields` are all that it is between."""

    def __init__(self, problem: str, *, fields: tuple[str, ...], expected: str) -> None:
        self.fields = fields
        super().__init__(problem, field=fields[0], expected=expected)


def _faults_of(policy: Policy) -> Iterator[InputError]:
    faults = (*_faults_of_proxy(policy.proxy), *_faults_of_values(policy))
    yield from faults
    if not faults:
        # What is no value at all cannot be compared with others.
        yield from _contradictions(policy)


def _faults_of_proxy(proxy: Proxy) -> Iterator[InputError]:
    yield from _faults_in("proxy.uids", proxy.uids, check_id)
    yield from _faults_in("proxy.gids", proxy.gids, check_id)
    if proxy.mark is not None:
        yield from _faults_in("proxy.mark", (proxy.mark,), check_mark)
    if proxy.cgroup:
        yield from _faults_in("proxy.cgroup", (proxy.cgroup,), check_cgroup)
    if not (proxy.uids or proxy.gids or proxy.mark or proxy.cgroup):
        yield Contradiction(
            "nothing tells the sidecar's own traffic apart",
            fields=("proxy.uids", "proxy.gids", "proxy.mark", "proxy.cgroup"),
            expected="a user id, a group id, a mark or a cgroup",
        )


def _faults_of_values(policy: Policy) -> Iterator[InputError]:
    inbound, outbound, dns = policy.inbound, policy.outbound, policy.dns
    checked: tuple[tuple[str, tuple[object, ...], Callable[..., None]], ...] = (
        ("inbound.port", (inbound.port,), check_port),
        ("inbound.include_ports", inbound.include_ports or (), check_ports),
        ("inbound.exclude_ports", inbound.exclude_ports, check_ports),
        ("inbound.exclude_cidrs", inbound.exclude_cidrs, _check_network),
        ("inbound.include_interfaces", inbound.include_interfaces or (), check_interface),
        ("inbound.exclude_interfaces", inbound.exclude_interfaces, check_interface),
        ("inbound.node_addresses", inbound.node_addresses, _check_host),
        ("outbound.port", (outbound.port,), check_port),
        ("outbound.include_cidrs", outbound.include_cidrs or (), _check_network),
        ("outbound.include_ports", outbound.include_ports, check_ports),
        ("outbound.exclude_ports", outbound.exclude_ports, check_ports),
        ("outbound.exclude_cidrs", outbound.exclude_cidrs, _check_network),
        ("outbound.exclude_uids", outbound.exclude_uids, check_ids),
        ("outbound.exclude_gids", outbound.exclude_gids, check_ids),
        ("outbound.exclude_user_ports", outbound.exclude_user_ports, _check_user_ports),
        ("outbound.include_interfaces", outbound.include_interfaces or (), check_interface),
        ("outbound.exclude_interfaces", outbound.exclude_interfaces, check_interface),
        ("dns.resolvers", dns.resolvers, _check_address),
        ("dns.addresses", dns.addresses, _check_address),
        ("dns.port", (dns.port,), check_port),
    )
    for field, values, check in checked:
        yield from _faults_in(field, values, check)
    if len(set(policy.families)) < len(policy.families):
        problem = "a family is named twice"
        yield InputError(problem, field="families", expected="ipv4, ipv6 or both")


def _faults_in(
    field: str, values: tuple[_T, ...], check: Callable[[_T], None]
) -> Iterator[InputError]:
    if len(values) > MAX_ITEMS:
        problem = f"the list has {len(values)} items"
        yield InputError(problem, field=field, expected=f"at most {MAX_ITEMS}")
        return
    found: list[InputError] = []
    for value in values:
        try:
            check(value)
        except InputError as fault:
            found.append(located(fault, field))
    yield from not_too_many(found, field)


def not_too_many(faults: list[InputError], field: str = "") -> list[InputError]:
    """The faults of one list, the first of them if there are very many."""
    more = len(faults) - MAX_FAULTS
    if more <= 0:
        return faults
    return [*faults[:MAX_FAULTS], InputError(f"and {more} more values that are wrong", field=field)]


def located(fault: InputError, field: str) -> InputError:
    """The same fault, at a field."""
    return InputError(fault.problem, source=fault.source, field=field, expected=fault.expected)


def _check_forwards(span: PortRange | IdRange, written: str) -> None:
    if span.first > span.last:
        dash = ":" if ":" in written else "-"
        expected = f"the lower number first: {span.last}{dash}{span.first}"
        raise InputError(f"the range '{written or span}' runs backwards", expected=expected)


def _check_network(text: str) -> None:
    _check_canonical(text, canonical_network(text))


def _check_address(text: str) -> None:
    _check_canonical(text, canonical_address(text))


def _check_host(text: str) -> None:
    _check_network(text)
    network = ipaddress.ip_network(text)
    if network.prefixlen != network.max_prefixlen:
        raise InputError(f"{shown(text)} is more than one address", expected="a node's own address")


def _check_canonical(text: str, canonical: str) -> None:
    if canonical != text:
        raise InputError(f"{shown(text)} is not in canonical form", expected=canonical)


def _check_user_ports(item: UserPorts) -> None:
    expected = "protocols, ports and user ids, such as tcp:5432:1000-1009"
    if not item.protocols or len(set(item.protocols)) < len(item.protocols):
        raise InputError("no protocol, or one twice", expected=expected)
    for what, ranges in (("ports", item.ports), ("user ids", item.uids)):
        if not 1 <= len(ranges) <= MAX_ITEMS:
            raise InputError(f"{len(ranges)} ranges of {what}", expected=expected)
    for ports in item.ports:
        check_ports(ports)
    for ids in item.uids:
        check_ids(ids)


def _contradictions(policy: Policy) -> Iterator[InputError]:
    inbound, outbound = policy.inbound, policy.outbound
    if inbound.port == outbound.port:
        yield Contradiction(
            f"both listeners would have port {outbound.port}, the inbound and the outbound one",
            fields=("outbound.port", "inbound.port"),
            expected="a port for each",
        )
    yield from _own_ports(
        "inbound.exclude_ports",
        inbound.exclude_ports,
        policy,
        "on which the sidecar itself listens",
        "ports of the application only",
    )
    yield from _own_ports(
        "outbound.exclude_ports",
        outbound.exclude_ports,
        policy,
        "on which sidecars listen: traffic to those of other workloads would go around this workload's own",
        "ports on which no sidecar listens",
    )
    yield from _moot(
        ("inbound.include_ports", "inbound.exclude_ports"),
        _spans(inbound.include_ports or ()),
        _spans(inbound.exclude_ports),
    )
    yield from _moot(
        ("outbound.include_ports", "outbound.exclude_ports"),
        _spans(outbound.include_ports),
        _spans(outbound.exclude_ports),
    )
    for family in Family:
        yield from _moot(
            ("outbound.include_cidrs", "outbound.exclude_cidrs"),
            _networks(family, outbound.include_cidrs or ()),
            _networks(family, outbound.exclude_cidrs),
        )
    for direction, part in (("inbound", inbound), ("outbound", outbound)):
        for name in sorted(set(part.include_interfaces or ()) & set(part.exclude_interfaces)):
            yield Contradiction(
                f"the interface {shown(name)} is both included and excluded",
                fields=(f"{direction}.include_interfaces", f"{direction}.exclude_interfaces"),
                expected="one of the two",
            )
    if inbound.direct_probes and not inbound.node_addresses:
        yield Contradiction(
            "probes cannot be told from other connections without the node's addresses",
            fields=("inbound.direct_probes", "inbound.node_addresses"),
            expected="inbound.node_addresses in a policy, or node_addresses of the agent",
        )
    if policy.dns.enabled:
        yield from _contradictions_of_dns(policy)


def _contradictions_of_dns(policy: Policy) -> Iterator[InputError]:
    dns = policy.dns
    for family in Family:
        if len([address for address in dns.addresses if _family(address) is family]) > 1:
            problem = f"more than one {family} address that queries are sent to"
            expected = "one of each family"
            yield InputError(problem, field="dns.addresses", expected=expected)
    if not dns.addresses:
        problem = "queries are redirected, but to nowhere"
        fields: tuple[str, ...] = ("dns.addresses", "dns.enabled")
        yield Contradiction(problem, fields=fields, expected="an address of each family")
        return
    used = {_family(address) for address in dns.addresses}
    if dns.resolvers:
        used &= {_family(resolver) for resolver in dns.resolvers}
    if policy.families and not used & set(policy.families):
        yield Contradiction(
            "no query is redirected: no family is on that has both a resolver and an address",
            fields=("dns.addresses", "dns.resolvers", "families", "dns.enabled"),
            expected="addresses of a family that is on",
        )
    for field, own in (
        ("inbound.port", policy.inbound.port),
        ("outbound.port", policy.outbound.port),
    ):
        here = [address for address in dns.addresses if ipaddress.ip_address(address).is_loopback]
        if dns.port == own and here:
            yield Contradiction(
                f"queries would go to {here[0]} port {own}, where the sidecar takes connections",
                fields=("dns.port", field, "dns.addresses", "dns.enabled"),
                expected="the port of a DNS server",
            )


def _own_ports(
    field: str, excluded: tuple[PortRange, ...], policy: Policy, why: str, expected: str
) -> list[InputError]:
    owners = (("inbound.port", policy.inbound.port), ("outbound.port", policy.outbound.port))
    faults: list[InputError] = []
    for ports in excluded:
        for owner, own in owners:
            if own in ports:
                part = "is" if ports.first == ports.last else "includes"
                problem = f"'{ports}' {part} port {own}, {why}"
                faults.append(Contradiction(problem, fields=(field, owner), expected=expected))
    return not_too_many(faults, field)


class _Span(NamedTuple):
    """Numbers from `first` to `last`, and what a person calls them."""

    first: int
    last: int
    name: str


def _moot(
    fields: tuple[str, str], included: list[_Span], excluded: list[_Span]
) -> list[InputError]:
    """What is included although all of it is excluded: it would do nothing."""
    joined: list[_Span] = []
    for span in sorted(excluded):
        if joined and span.first <= joined[-1].last + 1:
            joined[-1] = joined[-1]._replace(last=max(joined[-1].last, span.last))
        else:
            joined.append(span)
    beginnings = [span.first for span in joined]
    faults: list[InputError] = []
    for span in included:
        at = bisect.bisect_right(beginnings, span.first) - 1
        if at >= 0 and span.last <= joined[at].last:
            problem = f"'{span.name}' is included, and excluded as well"
            faults.append(Contradiction(problem, fields=fields, expected="one of the two"))
    return not_too_many(faults, fields[0])


def _spans(ranges: Iterable[PortRange]) -> list[_Span]:
    return [_Span(ports.first, ports.last, str(ports)) for ports in ranges]


def _networks(family: Family, cidrs: Iterable[str]) -> list[_Span]:
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    return [
        _Span(int(network.network_address), int(network.broadcast_address), str(network))
        for network in networks
        if network.version == _VERSION[family]
    ]


def _family(address: str) -> Family:
    return Family.IPV4 if ipaddress.ip_address(address).version == 4 else Family.IPV6


DEFAULT = Policy()
"""What holds where nothing else is said: all TCP of both families, to Consul's ports."""
