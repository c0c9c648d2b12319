"""The decision: which connections of a workload go to its sidecar. One ordered list per direction.

The first line all of whose criteria match decides. Backends render the lines and decide nothing; `explain`
evaluates the same lines without a kernel. docs/redirect.md shows the lists as tables and says why each line
is where it is.

Only the first packet of a connection is decided on. For one that is older than the rules that is some
segment in its middle, because connection tracking begins with them (nf_conntrack_tcp_loose): redirecting
that would reset it, so only a SYN is redirected.

The nat lists are asked about the first packet of a connection that connection tracking begins. A SYN that it takes
for something else goes where it was going: of an older connection with the same addresses and ports, or of one that
somebody made up with a single segment. Lists of their own drop such a SYN where nat would have redirected it.
"""

import enum
import functools
import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias, assert_never

import msgspec

from tidegate.intent.policy import (
    Family,
    IdRange,
    Mark,
    Mode,
    Policy,
    PortRange,
    Protocol,
    UserPorts,
)
from tidegate.model import Direction

LOOPBACK_INTERFACE = "lo"
DNS_PORT = 53
DNS_ZONE = 53
"""Connection tracking zone of redirected queries, so that the proxy may send the same query from the same port.

And so that a socket that goes on asking is answered as the policy says at that time: what is left alone is in another
zone than what is redirected, so that neither is in the other's way.
"""

HANDED_OVER = 0x4000_0000
"""Bit of connection tracking's mark (not the packet's), for connections whose SYN Tproxy has handed over."""

_LOOPBACK = {Family.IPV4: "127.0.0.0/8", Family.IPV6: "::1/128"}
_OWN_CALL_SOURCES = {Family.IPV4: "127.0.0.6/32", Family.IPV6: "::6/128"}
"""Where Istio's sidecars call the application from (istio InboundPassthroughBindIpv4, -Ipv6)."""


_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


class OfProtocol(msgspec.Struct, frozen=True):
    """TCP, UDP or one of both."""

    protocols: tuple[Protocol, ...]


class Opening(msgspec.Struct, frozen=True):
    """A TCP segment that opens a connection: a SYN, without ACK, FIN or RST."""


class OfKnownSocket(msgspec.Struct, frozen=True):
    """A segment for which this namespace has a socket of exactly these addresses and ports.

    Or one that listens on exactly this address; one that listens on all addresses does not count.
    """


class OfTransparentSocket(msgspec.Struct, frozen=True):
    """A segment for which this namespace has a transparent socket (IP_TRANSPARENT), such as a sidecar's with tproxy."""


class HandedOver(msgspec.Struct, frozen=True):
    """Of a connection whose SYN Tproxy has handed over, as connection tracking remembers (HANDED_OVER)."""


class Untracked(msgspec.Struct, frozen=True):
    """Connection tracking cannot place the packet, or is not to follow it."""


class OfFamily(msgspec.Struct, frozen=True):
    """IPv4 or IPv6 on the wire."""

    family: Family


class ByUser(msgspec.Struct, frozen=True):
    """Sent by a process with one of these user ids; ranges are sorted and do not touch each other."""

    uids: tuple[IdRange, ...]


class ByGroup(msgspec.Struct, frozen=True):
    """Sent by a process with one of these group ids; ranges as for users."""

    gids: tuple[IdRange, ...]


class Marked(msgspec.Struct, frozen=True):
    """Bears this packet mark."""

    mark: Mark


class InCgroup(msgspec.Struct, frozen=True):
    """Sent by a process in this cgroup (v2, path below its root) or in one below it."""

    path: str


class OnInterface(msgspec.Struct, frozen=True):
    """Outbound: routed to one of these interfaces. Inbound: arrives on one. Names are sorted."""

    interfaces: tuple[str, ...]


class ToPort(msgspec.Struct, frozen=True):
    """To one of these ports; the ranges are sorted and do not touch each other."""

    ports: tuple[PortRange, ...]


class ToNetwork(msgspec.Struct, frozen=True):
    """To an address of one of these networks of one family, which are sorted and do not overlap."""

    family: Family
    networks: tuple[str, ...]


class FromNetwork(msgspec.Struct, frozen=True):
    """From an address of one of these networks of one family, which are sorted and do not overlap."""

    family: Family
    networks: tuple[str, ...]


class ToSelf(msgspec.Struct, frozen=True):
    """To an address of this namespace."""


class Invalid(msgspec.Struct, frozen=True):
    """Connection tracking cannot place the packet (ct state invalid)."""


class First(msgspec.Struct, frozen=True):
    """The packet with which connection tracking begins a connection, so that nat is asked (ct status not confirmed).

    Packets that are not tracked are neither this nor its opposite.
    """


class Translated(msgspec.Struct, frozen=True):
    """Of a connection whose destination connection tracking translates (ct status dnat)."""


Criterion: TypeAlias = (
    OfProtocol
    | Opening
    | OfKnownSocket
    | OfTransparentSocket
    | HandedOver
    | Untracked
    | OfFamily
    | ByUser
    | ByGroup
    | Marked
    | InCgroup
    | OnInterface
    | ToPort
    | ToNetwork
    | FromNetwork
    | ToSelf
    | Invalid
    | First
    | Translated
)


class Not(msgspec.Struct, frozen=True):
    """The packet does not match the criterion."""

    criterion: Criterion


Match: TypeAlias = Criterion | Not


class Leave(msgspec.Struct, frozen=True):
    """It goes where it was going."""


class Redirect(msgspec.Struct, frozen=True):
    """It goes to a port of this namespace.

    Outbound: at a loopback address. Inbound: at the address that it was going to, so that it does not matter which
    addresses the interface has.
    """

    port: int


class Tproxy(msgspec.Struct, frozen=True):
    """It goes to a transparent socket on a port of this namespace, addresses as they are.

    If it opens a connection, that is marked HANDED_OVER.
    """

    port: int


class Translate(msgspec.Struct, frozen=True):
    """It goes to another address and port."""

    address: str
    port: int


class Zone(msgspec.Struct, frozen=True):
    """Its original direction is tracked in a zone of its own."""

    number: int


class Drop(msgspec.Struct, frozen=True):
    """It ends here."""


Action: TypeAlias = Leave | Redirect | Tproxy | Translate | Zone | Drop

LEAVE = Leave()


class Line(msgspec.Struct, frozen=True):
    """One line of a decision list."""

    name: str
    """Unique in its list: what `explain`, counters and differences call the line."""
    matches: tuple[Match, ...]
    """All must match; () matches everything that got this far."""
    action: Action = LEAVE


class Hook(enum.StrEnum):
    """Where in the kernel a list is asked; the value is the list's name everywhere."""

    OUTBOUND = "outbound"
    """Connections that a process of the workload opens."""
    INBOUND = "inbound"
    """Connections that arrive at the workload."""
    INBOUND_TPROXY = "inbound-tproxy"
    """Packets that arrive at the workload."""
    DNS_ZONE = "dns-zone"
    """Packets that a process of the workload sends, before connection tracking."""
    INVALID = "invalid"
    """Packets that arrive, after connection tracking."""
    INVALID_OUTBOUND = "invalid-outbound"
    """Packets that a process of the workload sends, after connection tracking."""


class Point(NamedTuple):
    """Where the kernel asks a list, and when."""

    kind: str
    """nat, which is asked about the packet with which a connection begins, or filter, about every packet."""
    hook: str
    """output, what the workload sends, or prerouting, what arrives; as nft calls it."""
    priority: int
    """Lower ones are asked earlier; connection tracking begins at -200 (NF_IP_PRI_CONNTRACK)."""


POINTS = {
    Hook.OUTBOUND: Point("nat", "output", -100),
    Hook.INBOUND: Point("nat", "prerouting", -100),
    Hook.INBOUND_TPROXY: Point("filter", "prerouting", -150),
    Hook.DNS_ZONE: Point("filter", "output", -300),
    Hook.INVALID: Point("filter", "prerouting", -151),
    Hook.INVALID_OUTBOUND: Point("filter", "output", -150),
}
SENDING = frozenset(hook for hook, point in POINTS.items() if point.hook == "output")
"""Lists of what the workload sends: a packet there has the interface that it leaves by."""


class Rules(msgspec.Struct, frozen=True, kw_only=True, cache_hash=True):
    """The decision lists of a workload. Lists that have no line are not there."""

    families: tuple[Family, ...]
    """IPv4 before IPv6; packets of other families are never seen."""
    lists: tuple[tuple[Hook, tuple[Line, ...]], ...]
    """In the order of Hook."""

    def lines(self, hook: Hook) -> tuple[Line, ...]:
        """The list of a hook, () when it is not there."""
        return dict(self.lists).get(hook, ())

    def of(self, direction: Direction) -> tuple[Line, ...]:
        """The list that decides on connections of a direction."""
        if direction is Direction.OUTBOUND:
            return self.lines(Hook.OUTBOUND)
        return self.lines(Hook.INBOUND) or self.lines(Hook.INBOUND_TPROXY)


class Tracked(enum.StrEnum):
    """For what connection tracking takes a connection that is opened."""

    NEW = "new"
    KNOWN = "known"
    """It has an entry of these addresses and ports already, which is not translated."""
    INVALID = "invalid"
    """It cannot place the SYN: in the entry that it has, the other end dialled."""


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """What the decision looks at when a connection is opened."""

    direction: Direction
    destination: str
    """Address that the client dials."""
    port: int
    source: str = ""
    """Address that the client dials from; "" for one that no line speaks of."""
    interface: str = "eth0"
    """Outbound: where the workload's routes send it. Inbound: where it arrives."""
    uid: int | None = None
    """User id of the process that opens it, where that is a process of the workload."""
    gid: int | None = None
    mark: int = 0
    cgroup: str = ""
    """Cgroup of that process, below the root of cgroup v2."""
    protocol: Protocol | str = Protocol.TCP
    opening: bool = True
    """False for a connection that is older than the rules."""
    tracked: Tracked = Tracked.NEW
    forwarded: bool = False
    """Inbound: whether the destination is not an address of the workload."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a connection, and which line says so (None: its direction is left alone)."""

    action: Action
    line: str | None


def rules_for(policy: Policy) -> Rules:
    """The decision lists of a policy. Policies that mean the same give equal rules."""
    families = tuple(family for family in Family if family in policy.families)
    inbound = Hook.INBOUND if policy.mode is Mode.REDIRECT else Hook.INBOUND_TPROXY
    lists = {
        Hook.OUTBOUND: _outbound(policy),
        inbound: _inbound(policy),
        Hook.DNS_ZONE: _dns_zone(policy),
        Hook.INVALID: _invalid(policy),
        Hook.INVALID_OUTBOUND: _invalid_outbound(policy),
    }
    made = ((hook, _of_families(lists.get(hook, ()), families)) for hook in Hook)
    return Rules(
        families=families,
        lists=tuple((hook, lines) for hook, lines in made if _does_something(lines)),
    )


def explain(rules: Rules, connection: Connection) -> Decision:
    """Where a connection goes under these rules, and which line decides it."""
    family = _family(_address(connection.destination))
    if family not in rules.families:
        return Decision(action=LEAVE, line=f"{family}-off" if rules.lists else None)
    decision = Decision(action=LEAVE, line=None)
    for hook in _asked(connection):
        lines = (line for line in rules.lines(hook) if _decides(line, connection))
        if line := next(lines, None):
            decision = Decision(action=line.action, line=line.name)
        if decision.action != LEAVE:
            break
    return decision


def _asked(connection: Connection) -> tuple[Hook, ...]:
    """The lists that are asked, in turn, until one does not leave the connection alone."""
    new = connection.tracked is Tracked.NEW
    if connection.direction is Direction.OUTBOUND:
        return (Hook.OUTBOUND,) if new else (Hook.INVALID_OUTBOUND,)
    return (Hook.INBOUND if new else Hook.INVALID, Hook.INBOUND_TPROXY)


def _decides(line: Line, connection: Connection) -> bool:
    return all(_matches(match, connection) for match in line.matches)


def lines_of_family(lines: Iterable[Line], family: Family) -> tuple[Line, ...]:
    """The lines that packets of one family can match, without what then goes without saying."""
    kept = []
    for line in _of_families(lines, (family,)):
        matches = tuple(match for match in line.matches if not isinstance(match, OfFamily))
        kept.append(Line(line.name, matches, line.action))
    return tuple(kept)


@functools.lru_cache(256)
def cgroup_paths(rules: Rules) -> tuple[str, ...]:
    """The cgroups that are spoken of."""
    matches = (match for _, lines in rules.lists for line in lines for match in line.matches)
    criteria = (match.criterion if isinstance(match, Not) else match for match in matches)
    return tuple(criterion.path for criterion in criteria if isinstance(criterion, InCgroup))


_FAMILY_CRITERIA = (OfFamily, ToNetwork, FromNetwork)


def _of_families(lines: Iterable[Line], families: tuple[Family, ...]) -> tuple[Line, ...]:
    """The lines that packets of these families can get to and match."""
    kept: list[Line] = []
    for line in lines if families else ():
        if all(m.family in families for m in line.matches if isinstance(m, _FAMILY_CRITERIA)):
            kept.append(line)
            if not line.matches:
                break
    return tuple(kept)


def _does_something(lines: tuple[Line, ...]) -> bool:
    """Whether not every packet is left alone anyway; where it is, the kernel need not be troubled."""
    return any(line.action != LEAVE for line in lines)


def _outbound(policy: Policy) -> Iterator[Line]:
    concerned = _TCP_OR_UDP if any(_redirected_queries(policy)) else _TCP
    yield Line("other-protocol", (Not(concerned),))
    yield Line("older", (_TCP, Not(Opening())))
    yield from _leaving(policy, concerned)


def _leaving(policy: Policy, concerned: OfProtocol) -> Iterator[Line]:
    """What is decided on connections and queries that leave, of the protocols that are concerned."""
    outbound = policy.outbound
    here, elsewhere = _dns(policy, concerned)
    # From a link-local address there is no way to ::1, where redirection leads.
    yield Line("link-local-ipv6", (ToNetwork(Family.IPV6, ("fe80::/10",)),))
    yield from _self_calls(policy)
    yield from _proxy(policy)
    yield from _excluded_outbound(policy, concerned)
    # A query to a resolver on loopback can only be sent on to one on loopback: its source address is 127.0.0.1.
    yield from here
    yield Line("own-address", (OnInterface((LOOPBACK_INTERFACE,)),))
    for family, network in _LOOPBACK.items():
        yield Line(f"loopback-{family}", (ToNetwork(family, (network,)),))
    yield from elsewhere
    if concerned != _TCP:
        yield Line("not-tcp", (Not(_TCP),))
    if not outbound.enabled:
        return
    if outbound.include_interfaces is not None:
        yield Line("not-included-interface", _outside(outbound.include_interfaces))
    to_listener = Redirect(outbound.port)
    if outbound.include_cidrs is None:
        yield Line("to-outbound-listener", (_TCP,), to_listener)
        return
    if outbound.include_ports:
        yield Line("included-port", (_TCP, ToPort(_merged(outbound.include_ports))), to_listener)
    for family in Family:
        if networks := _collapsed(family, outbound.include_cidrs):
            yield Line(f"included-cidr-{family}", (_TCP, ToNetwork(family, networks)), to_listener)


def _self_calls(policy: Policy) -> Iterator[Line]:
    if not policy.proxy.self_calls_inbound or not policy.inbound.enabled:
        return
    for name, by_proxy in _proxy_criteria(policy):
        for family in Family:
            yield Line(
                f"self-call-{name}-{family}",
                (
                    OfFamily(family),
                    _TCP,
                    by_proxy,
                    OnInterface((LOOPBACK_INTERFACE,)),
                    Not(ToNetwork(family, (_LOOPBACK[family],))),
                    Not(FromNetwork(family, (_OWN_CALL_SOURCES[family],))),
                    Not(ToPort((PortRange(policy.inbound.port, policy.inbound.port),))),
                ),
                Redirect(policy.inbound.port),
            )


def _proxy(policy: Policy) -> Iterator[Line]:
    for name, criterion in _proxy_criteria(policy):
        yield Line(name, (criterion,))


def _proxy_criteria(policy: Policy) -> Iterator[tuple[str, Criterion]]:
    proxy = policy.proxy
    if proxy.uids:
        yield "proxy", ByUser(_spans(IdRange(uid, uid) for uid in proxy.uids))
    if proxy.gids:
        yield "proxy-group", ByGroup(_spans(IdRange(gid, gid) for gid in proxy.gids))
    if proxy.mark:
        yield "proxy-mark", Marked(proxy.mark)
    if proxy.cgroup:
        yield "proxy-cgroup", InCgroup(proxy.cgroup)


def _excluded_outbound(policy: Policy, concerned: OfProtocol) -> Iterator[Line]:
    outbound = policy.outbound
    if outbound.exclude_uids:
        yield Line("excluded-uid", (ByUser(_spans(outbound.exclude_uids)),))
    if outbound.exclude_gids:
        yield Line("excluded-gid", (ByGroup(_spans(outbound.exclude_gids)),))
    by_user = {
        UserPorts(protocols, _merged(item.ports), _spans(item.uids))
        for item in outbound.exclude_user_ports
        if (protocols := tuple(p for p in concerned.protocols if p in item.protocols))
    }
    for number, item in enumerate(sorted(by_user), 1):
        matches = (OfProtocol(item.protocols), ByUser(item.uids), ToPort(item.ports))
        yield Line(f"excluded-user-port-{number}", matches)
    if outbound.exclude_ports:
        yield Line("excluded-port", (ToPort(_merged(outbound.exclude_ports)),))
    for family in Family:
        if networks := _collapsed(family, outbound.exclude_cidrs):
            yield Line(f"excluded-cidr-{family}", (ToNetwork(family, networks),))
    if outbound.exclude_interfaces:
        yield Line("excluded-interface", (OnInterface(_distinct(outbound.exclude_interfaces)),))


def _dns(policy: Policy, concerned: OfProtocol) -> tuple[list[Line], list[Line]]:
    """The lines for queries, to a resolver on loopback and to one elsewhere."""
    here: list[Line] = []
    elsewhere: list[Line] = []
    for address, queries in _redirected_queries(policy):
        matches = (concerned, *queries)
        line = Line(f"dns-{_family(address)}", matches, Translate(str(address), policy.dns.port))
        (here if address.is_loopback else elsewhere).append(line)
    return here, elsewhere


def _redirected_queries(policy: Policy) -> Iterator[tuple[_Address, tuple[Match, ...]]]:
    """Where the queries of each family go, and what tells them, but for the protocol."""
    dns = policy.dns
    if not dns.enabled:
        return
    for address in sorted(map(_address, dns.addresses), key=lambda address: address.version):
        family = _family(address)
        if family not in policy.families:
            continue
        if not dns.resolvers:
            yield address, (OfFamily(family), _TO_DNS)
        elif resolvers := _collapsed(family, map(_host_network, dns.resolvers)):
            yield address, (_TO_DNS, ToNetwork(family, resolvers))


def _dns_zone(policy: Policy) -> Iterator[Line]:
    """What is decided on UDP that leaves, as far as the last line for queries."""
    yield Line("not-udp", (Not(_UDP),))
    kept: list[Line] = []
    for line in _leaving(policy, _UDP):
        if line.action == LEAVE:
            kept.append(line)
        elif isinstance(line.action, Translate):
            yield from kept
            kept.clear()
            yield Line(line.name, line.matches, Zone(DNS_ZONE))


def _invalid(policy: Policy) -> Iterator[Line]:
    # With tproxy it makes no difference for what connection tracking takes a SYN.
    missed = tuple(_arriving(policy)) if policy.mode is Mode.REDIRECT else ()
    yield _NOT_TCP
    if policy.drop_invalid and policy.redirects_anything:
        yield Line("invalid", (Invalid(), Not(OnInterface((LOOPBACK_INTERFACE,)))), Drop())
    if _does_something(missed):
        yield from _dropped_when_missed(missed)


def _invalid_outbound(policy: Policy) -> Iterator[Line]:
    yield _NOT_TCP
    yield from _dropped_when_missed(
        itertools.chain(_queries_that_are_there(policy), _leaving(policy, _TCP))
    )


def _dropped_when_missed(lines: Iterable[Line]) -> Iterator[Line]:
    """Drops SYNs that nat is not asked about, where these lines of its list would not leave them alone.

    Every packet comes by: those of open connections get no further than the first line.
    """
    yield Line("older", (Not(Opening()),))
    yield Line("first", (First(),))
    yield Line("translated", (Translated(),))
    for line in lines:
        yield line if line.action == LEAVE else Line(line.name, line.matches, Drop())


def _queries_that_are_there(policy: Policy) -> Iterator[Line]:
    """Queries to the very address that they are redirected to: that is no translation (nf_nat_setup_info)."""
    dns = policy.dns
    for address, _ in _redirected_queries(policy) if dns.port == DNS_PORT else ():
        if not dns.resolvers or str(address) in dns.resolvers:
            family = _family(address)
            there = ToNetwork(family, (_host_network(str(address)),))
            yield Line(f"dns-address-{family}", (_TO_DNS, there))


def _inbound(policy: Policy) -> Iterator[Line]:
    if not policy.inbound.enabled and not policy.outbound.enabled:
        return
    yield _NOT_TCP
    if policy.mode is Mode.REDIRECT:
        yield Line("older", (Not(Opening()),))
    else:
        # Every packet comes by. One that has a socket already belongs to it; one that has none may be the end of a
        # handshake that the listener keeps no state of (SYN cookies), and only the listener can tell. The application's
        # listener would take that too, so of a connection that was handed over it has to be the sidecar's socket.
        yield Line("older", (Not(Opening()), OfKnownSocket(), Not(HandedOver())))
        # What bears no mark can be asked for none.
        yield Line("untracked", (Not(Opening()), OfKnownSocket(), Untracked()))
        yield Line("handed-over", (Not(Opening()), OfKnownSocket(), OfTransparentSocket()))
        # Its addresses here are not those of its socket: an answer to a query that was sent elsewhere, or a connection
        # from before the mode changed.
        yield Line("translated", (Translated(),))
    yield from _arriving(policy)


def _arriving(policy: Policy) -> Iterator[Line]:
    """What is decided on connections that arrive."""
    inbound, outbound = policy.inbound, policy.outbound
    yield Line("from-within", (OnInterface((LOOPBACK_INTERFACE,)),))
    yield Line("forwarded", (Not(ToSelf()),))
    yield Line("inbound-listener", (ToPort((PortRange(inbound.port, inbound.port),)),))
    if outbound.enabled:
        own = ToPort((PortRange(outbound.port, outbound.port),))
        yield from _to_inbound_listener(policy, "outbound-listener", _TCP, own)
    if not inbound.enabled:
        return
    if inbound.direct_probes:
        for family in Family:
            if addresses := _collapsed(family, inbound.node_addresses):
                yield Line(f"probe-{family}", (FromNetwork(family, addresses),))
    if inbound.exclude_ports:
        yield Line("excluded-port", (ToPort(_merged(inbound.exclude_ports)),))
    for family in Family:
        if networks := _collapsed(family, inbound.exclude_cidrs):
            yield Line(f"excluded-cidr-{family}", (FromNetwork(family, networks),))
    if inbound.exclude_interfaces:
        yield Line("excluded-interface", (OnInterface(_distinct(inbound.exclude_interfaces)),))
    if inbound.include_interfaces is not None:
        yield Line("not-included-interface", _outside(inbound.include_interfaces))
    if inbound.include_ports is None:
        yield from _to_inbound_listener(policy, "to-inbound-listener", _TCP)
    elif inbound.include_ports:
        included = ToPort(_merged(inbound.include_ports))
        yield from _to_inbound_listener(policy, "included-port", _TCP, included)


def _to_inbound_listener(policy: Policy, name: str, *matches: Match) -> Iterator[Line]:
    port = policy.inbound.port
    if policy.mode is Mode.REDIRECT:
        yield Line(name, matches, Redirect(port))
        return
    yield Line(name, matches, Tproxy(port))
    # Where no transparent socket listens, nftables goes on with the next rule (nft_tproxy_eval; NFT_BREAK), and what
    # the sidecar should have had would reach the application. The iptables target drops by itself.
    yield Line(f"{name}-unserved", matches, Drop())


_TCP = OfProtocol((Protocol.TCP,))
_UDP = OfProtocol((Protocol.UDP,))
_TCP_OR_UDP = OfProtocol((Protocol.TCP, Protocol.UDP))
_TO_DNS = ToPort((PortRange(DNS_PORT, DNS_PORT),))
_NOT_TCP = Line("not-tcp", (Not(_TCP),))


def _outside(interfaces: tuple[str, ...]) -> tuple[Match, ...]:
    """Not on one of these interfaces; with none of them, everything."""
    return (Not(OnInterface(_distinct(interfaces))),) if interfaces else ()


def _matches(match: Match, connection: Connection) -> bool:
    if isinstance(match, Not):
        return not _meets(match.criterion, connection)
    return _meets(match, connection)


def _meets(criterion: Criterion, connection: Connection) -> bool:
    match criterion:
        case OfProtocol(protocols):
            return connection.protocol in protocols
        case Opening():
            return connection.opening
        case OfKnownSocket():
            return not connection.opening
        case OfTransparentSocket() | HandedOver() | Untracked():
            return False
        case OfFamily(family):
            return _family(_address(connection.destination)) is family
        case ByUser(uids):
            return _one_of(connection.uid, uids)
        case ByGroup(gids):
            return _one_of(connection.gid, gids)
        case Marked(mark):
            return connection.mark & mark.mask == mark.value
        case InCgroup(path):
            return f"{connection.cgroup}/".startswith(f"{path}/")
        case OnInterface(interfaces):
            return connection.interface in interfaces
        case ToPort(ports):
            return any(connection.port in range_ for range_ in ports)
        case ToNetwork(_, networks):
            return _within(connection.destination, networks)
        case FromNetwork(_, networks):
            return bool(connection.source) and _within(connection.source, networks)
        case ToSelf():
            return not connection.forwarded
        case Invalid():
            return connection.tracked is Tracked.INVALID
        case First():
            return connection.tracked is Tracked.NEW
        case Translated():
            return False
        case _:
            assert_never(criterion)


def _one_of(number: int | None, ranges: tuple[IdRange, ...]) -> bool:
    return number is not None and any(number in range_ for range_ in ranges)


def _within(address: str, networks: tuple[str, ...]) -> bool:
    parsed = _address(address)
    return any(parsed in ipaddress.ip_network(network) for network in networks)


def _address(text: str) -> _Address:
    """The address as it is on the wire: IPv4-mapped IPv6 addresses are IPv4."""
    address = ipaddress.ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _family(address: _Address) -> Family:
    return Family.IPV4 if address.version == 4 else Family.IPV6


def _host_network(address: str) -> str:
    return str(ipaddress.ip_network(_address(address)))


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def _merged(ranges: Iterable[PortRange]) -> tuple[PortRange, ...]:
    spans = _joined((ports.first, ports.last) for ports in ranges)
    return tuple(PortRange(first, last) for first, last in spans)


def _spans(ranges: Iterable[IdRange]) -> tuple[IdRange, ...]:
    spans = _joined((ids.first, ids.last) for ids in ranges)
    return tuple(IdRange(first, last) for first, last in spans)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers, by sorted spans that do not touch each other."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return joined


def _collapsed(family: Family, cidrs: Iterable[str]) -> tuple[str, ...]:
    networks = [ipaddress.ip_network(cidr) for cidr in cidrs]
    if family is Family.IPV4:
        four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
        return tuple(str(network) for network in ipaddress.collapse_addresses(four))
    six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
    return tuple(str(network) for network in ipaddress.collapse_addresses(six))
