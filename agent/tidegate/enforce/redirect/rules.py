"""The decision: which connections of a workload go to its sidecar. One ordered list per direction.

The first line that matches decides. Backends render the lines and decide nothing; `explain`
evaluates the same lines without a kernel. Only the first packet of a connection is decided on. For one that
is older than the rules that is some segment in its middle, because connection tracking begins with them
(nf_conntrack_tcp_loose): redirecting that would reset it, so only a SYN is redirected.

Outbound, for connections that a process of the workload opens (nat hook output, after routing):

| line                 | matches                                      | then the connection       |
| -------------------- | -------------------------------------------- | ------------------------- |
| not-tcp              | any protocol but TCP                         | is left as it is          |
| older                | a segment that opens no connection (no SYN)  | is left as it is          |
| ipv4-off, ipv6-off   | a family that the policy leaves alone        | is left as it is          |
| proxy                | opened by the sidecar (its user id)          | is left as it is          |
| own-address          | routed to the loopback interface: 127.0.0.1, | is left as it is          |
|                      | ::1 and each address of the workload itself  |                           |
| loopback-ipv4        | to 127.0.0.0/8, wherever it is routed        | is left as it is          |
| loopback-ipv6        | to ::1, wherever it is routed                | is left as it is          |
| link-local-ipv6      | to fe80::/10                                 | is left as it is          |
| excluded-uid         | opened by an excluded user                   | is left as it is          |
| excluded-port        | to an excluded port                          | is left as it is          |
| excluded-cidr-ipv4   | to an excluded IPv4 network                  | is left as it is          |
| excluded-cidr-ipv6   | to an excluded IPv6 network                  | is left as it is          |
| to-outbound-listener | everything else                              | goes to the outbound port |

Inbound, for connections that arrive at the workload (nat hook prerouting, before routing):

| line                 | matches                                      | then the connection       |
| -------------------- | -------------------------------------------- | ------------------------- |
| not-tcp              | any protocol but TCP                         | is left as it is          |
| older                | a segment that opens no connection (no SYN)  | is left as it is          |
| ipv4-off, ipv6-off   | a family that the policy leaves alone        | is left as it is          |
| from-within          | arrives on the loopback interface            | is left as it is          |
| inbound-listener     | to the inbound port itself                   | is left as it is          |
| excluded-port        | to an excluded port                          | is left as it is          |
| to-inbound-listener  | everything else, the outbound port among it  | goes to the inbound port  |

A workload's call to its own address never leaves it, so it is not redirected on its way out; the
kernel decides once per connection, so it is not redirected on its way back in either. A socket that
speaks to a link-local IPv6 address is bound to its interface and cannot reach a listener on the
loopback interface. From outside nobody reaches the outbound listener, which would forward for
anybody.
"""

import enum
import ipaddress
from collections.abc import Iterable, Iterator
from typing import TypeAlias, assert_never

import msgspec

from tidegate.intent.policy import Family, Policy, PortRange
from tidegate.model import Direction

LOOPBACK_INTERFACE = "lo"


class NotTcp(msgspec.Struct, frozen=True):
    """Any protocol but TCP."""


class NotOpening(msgspec.Struct, frozen=True):
    """A TCP segment other than a SYN, as the first one that connection tracking sees."""


class OfFamily(msgspec.Struct, frozen=True):
    """IPv4 or IPv6 on the wire."""

    family: Family


class OpenedBy(msgspec.Struct, frozen=True):
    """Opened by a process with one of these user ids, which are distinct and sorted."""

    uids: tuple[int, ...]


class OnInterface(msgspec.Struct, frozen=True):
    """Outbound: routed to this interface. Inbound: arrives on it."""

    interface: str


class ToPort(msgspec.Struct, frozen=True):
    """To one of these TCP ports; the ranges are sorted and do not touch each other."""

    ports: tuple[PortRange, ...]


class ToNetwork(msgspec.Struct, frozen=True):
    """To an address of one of these networks of one family, which are sorted and do not overlap."""

    family: Family
    networks: tuple[str, ...]


class Anything(msgspec.Struct, frozen=True):
    """Every connection that got this far."""


Match: TypeAlias = (
    NotTcp | NotOpening | OfFamily | OpenedBy | OnInterface | ToPort | ToNetwork | Anything
)


class Action(enum.StrEnum):
    """What becomes of a connection."""

    RETURN = "return"
    """It goes where it was going."""
    REDIRECT = "redirect"
    """It goes to a port of the sidecar."""


class Line(msgspec.Struct, frozen=True):
    """One line of a decision list."""

    name: str
    """Unique in its list: what `explain`, counters and differences call the line."""
    match: Match
    action: Action = Action.RETURN
    port: int | None = None
    """Where to, for REDIRECT."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Both decision lists of a workload; an empty list leaves its direction alone."""

    outbound: tuple[Line, ...]
    inbound: tuple[Line, ...]

    def of(self, direction: Direction) -> tuple[Line, ...]:
        """The list for a direction."""
        return self.outbound if direction is Direction.OUTBOUND else self.inbound


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """What the decision looks at when a connection is opened."""

    direction: Direction
    destination: str
    """Address that the client dials."""
    port: int
    interface: str = "eth0"
    """Outbound: where the workload's routes send it. Inbound: where it arrives."""
    uid: int | None = None
    """User id of the process that opens it, where that is a process of the workload."""
    protocol: str = "tcp"
    opening: bool = True
    """False for a connection that is older than the rules."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a connection, and which line says so (None: its direction is left alone)."""

    action: Action
    port: int | None
    line: str | None


def rules_for(policy: Policy) -> Rules:
    """The decision lists of a policy. Policies that mean the same give equal rules."""
    return Rules(
        outbound=tuple(_outbound(policy)) if policy.families and policy.outbound.enabled else (),
        inbound=tuple(_inbound(policy)) if policy.families and policy.inbound.enabled else (),
    )


def explain(rules: Rules, connection: Connection) -> Decision:
    """Where a connection goes under these rules, and which line decides it."""
    for line in rules.of(connection.direction):
        if _matches(line.match, connection):
            return Decision(action=line.action, port=line.port, line=line.name)
    return Decision(action=Action.RETURN, port=None, line=None)


def _outbound(policy: Policy) -> Iterator[Line]:
    outbound = policy.outbound
    yield from _not_concerned(policy)
    yield Line("proxy", OpenedBy(_distinct(policy.proxy.uids)))
    yield Line("own-address", OnInterface(LOOPBACK_INTERFACE))
    yield Line("loopback-ipv4", ToNetwork(Family.IPV4, ("127.0.0.0/8",)))
    yield Line("loopback-ipv6", ToNetwork(Family.IPV6, ("::1/128",)))
    yield Line("link-local-ipv6", ToNetwork(Family.IPV6, ("fe80::/10",)))
    if outbound.exclude_uids:
        yield Line("excluded-uid", OpenedBy(_distinct(outbound.exclude_uids)))
    if outbound.exclude_ports:
        yield Line("excluded-port", ToPort(_merged(outbound.exclude_ports)))
    for family in Family:
        if networks := _collapsed(family, outbound.exclude_cidrs):
            yield Line(f"excluded-cidr-{family}", ToNetwork(family, networks))
    yield Line("to-outbound-listener", Anything(), Action.REDIRECT, outbound.port)


def _inbound(policy: Policy) -> Iterator[Line]:
    inbound = policy.inbound
    yield from _not_concerned(policy)
    yield Line("from-within", OnInterface(LOOPBACK_INTERFACE))
    yield Line("inbound-listener", ToPort((PortRange(inbound.port, inbound.port),)))
    if inbound.exclude_ports:
        yield Line("excluded-port", ToPort(_merged(inbound.exclude_ports)))
    yield Line("to-inbound-listener", Anything(), Action.REDIRECT, inbound.port)


def _not_concerned(policy: Policy) -> Iterator[Line]:
    yield Line("not-tcp", NotTcp())
    yield Line("older", NotOpening())
    for family in Family:
        if family not in policy.families:
            yield Line(f"{family}-off", OfFamily(family))


def _matches(match: Match, connection: Connection) -> bool:
    match match:
        case NotTcp():
            return connection.protocol != "tcp"
        case NotOpening():
            return not connection.opening
        case OfFamily(family):
            return _family(_address(connection.destination)) is family
        case OpenedBy(uids):
            return connection.uid in uids
        case OnInterface(interface):
            return connection.interface == interface
        case ToPort(ports):
            return any(connection.port in range_ for range_ in ports)
        case ToNetwork(_, networks):
            address = _address(connection.destination)
            return any(address in ipaddress.ip_network(network) for network in networks)
        case Anything():
            return True
        case _:
            assert_never(match)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address as it is on the wire: IPv4-mapped IPv6 addresses are IPv4."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _family(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Family:
    return Family.IPV4 if address.version == 4 else Family.IPV6


def _distinct(uids: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(uids)))


def _merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    merged: list[PortRange] = []
    for ports in sorted(ranges):
        if merged and ports.first <= merged[-1].last + 1:
            merged[-1] = PortRange(merged[-1].first, max(merged[-1].last, ports.last))
        else:
            merged.append(ports)
    return tuple(merged)


def _collapsed(family: Family, cidrs: Iterable[str]) -> tuple[str, ...]:
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    if family is Family.IPV4:
        four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
        return tuple(str(network) for network in ipaddress.collapse_addresses(four))
    six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return tuple(str(network) for network in ipaddress.collapse_addresses(six))
