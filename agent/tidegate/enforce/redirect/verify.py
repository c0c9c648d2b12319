"""Live proof that a workload's connections go where its policy says, by sending their first packets.

A probe is one packet with a random token (a TCP sequence number, a name in a DNS query) between the namespace
and a TUN interface that exists only as long as the probes: what the namespace does not redirect comes out of it
here. So no outside host is needed, and nothing leaves the namespace. Only where a policy redirects nothing but
what goes to addresses or interfaces that really lead out, a probe takes the real way; it may cross no router
(its time to live is 1), and leaves only when the redirection does not work.

Nothing is opened: a SYN is answered (by a SYN-ACK, or by an RST when nobody listens) with the token plus one,
which nobody else can know, and is taken back by an RST. The sidecar accepts nothing, and need not be there. To
which port a probe was redirected is what connection tracking says. All that is left are entries of connection
tracking, which time out.

What should become of a probe is asked of `explain`, never decided here. An exclusion is tried by what it alone
keeps from the sidecar, and only with addresses in which nobody lives: a route to a real one would take the
workload's own traffic away.
"""

import enum
import errno
import ipaddress
import itertools
import os
import re
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import assert_never

import msgspec

from tidegate.enforce.redirect.rules import (
    DNS_PORT,
    DNS_ZONE,
    LEAVE,
    Action,
    ByGroup,
    ByUser,
    Connection,
    Drop,
    FromNetwork,
    Leave,
    Line,
    OfProtocol,
    Redirect,
    Rules,
    ToNetwork,
    ToPort,
    Tproxy,
    Translate,
    Zone,
    explain,
    lines_of_family,
    rules_for,
)
from tidegate.intent.policy import (
    MAX_ID,
    MAX_PORT,
    Family,
    IdRange,
    Mode,
    Policy,
    PortRange,
    Protocol,
)
from tidegate.kernel import conntrack, links, netns, rawtcp, routes, sockets, tun
from tidegate.kernel.conntrack import Endpoint, Original
from tidegate.kernel.errors import KernelError
from tidegate.kernel.rawtcp import ACK, RST, SYN, Segment, Sender
from tidegate.model import Direction

INTERFACE = "tgverify"
"""Name of the TUN interface; it is there only while a verification runs."""

_DEADLINE_S = 0.3
"""How long one answer may take. It never leaves the kernel."""
_TURN_S = 3.0
"""How long to wait for another verification of the same namespace."""
_TURN_POLL_S = 0.02

_DOCUMENTATION = {
    Family.IPV4: ("198.51.100.0/24", "192.0.2.0/24", "203.0.113.0/24"),
    Family.IPV6: ("2001:db8::/32", "3fff::/20"),
}
"""Networks in which nobody lives (RFC 5737, 3849, 9637)."""

_USUAL_IDS = (65534, 1000, 0)
_USUAL_PORTS = (8080, 443)
_EDGES = 2
"""Of how many ranges of a line the edges are tried."""
_MAX_RANGES = 64
"""After how many ranges of ids a free one is looked for."""
_FIRST_PORT = 1024
_TYPE_A = 1
_CLASS_IN = 1
_MAX_SENDERS = 4
"""As how many of the sidecar's ids of each kind a probe is sent."""

_OUTBOUND_EXCLUSIONS = {
    "excluded-uid": "excluded-user",
    "excluded-gid": "excluded-group",
    "excluded-user-port": "excluded-user-port",
    "excluded-port": "excluded-port",
    "excluded-cidr": "excluded-network",
    "excluded-interface": "excluded-interface",
    "not-included-interface": "not-included-interface",
}
_INBOUND_EXCLUSIONS = {
    "probe": "direct-probe",
    "excluded-port": "inbound-excluded-port",
    "excluded-cidr": "inbound-excluded-source",
    "excluded-interface": "inbound-excluded-interface",
    "not-included-interface": "inbound-not-included-interface",
}
"""The lines that leave alone what the policy excludes, without number and family: what their probes are called."""
_NUMBER_OR_FAMILY = re.compile(rf"-(\d+|{'|'.join(Family)})$")

_NOT_INCLUDED = "not-included"
_LEFT_ALONE = "left alone, as the policy says"
_LIVED_IN = "somebody may live at the addresses"
_OTHER_INTERFACE = "only what the workload really sends or gets goes by the interface"
_NOT_ALONE = "it is not all that keeps a connection that can be tried from the sidecar"
_UNTOLD = "connection tracking does not tell where it went (see net.netfilter.nf_conntrack_events)"
_UNTRIED_REASONS = {
    "probe": _LIVED_IN,
    "excluded-cidr": _LIVED_IN,
    "excluded-interface": _OTHER_INTERFACE,
}

_NO_TUN = (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EPERM, errno.EACCES)
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)
_NO_FAMILY = (errno.EACCES, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EADDRNOTAVAIL)


class Outcome(enum.StrEnum):
    """What a probe showed."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It could not be made, or could not tell."""


class Probe(msgspec.Struct, frozen=True):
    """One thing that was tried."""

    name: str
    """What and in which family, such as outbound-ipv4."""
    outcome: Outcome
    detail: str
    """What happened, or why it could not be tried; for a person."""


def verify(netns_path: str, policy: Policy) -> tuple[Probe, ...]:
    """Try out what the policy says, in both directions and families: some milliseconds, 0.3 s per lost answer.

    Needs CAP_NET_RAW and CAP_NET_ADMIN. KernelError when the namespace is gone, may not be entered, or is being
    verified by somebody else all the time.
    """
    return netns.run_in(netns_path, _verify, policy)


def _verify(policy: Policy) -> tuple[Probe, ...]:
    rules = rules_for(policy)
    with conntrack.beginnings() as beginnings, _device() as device:
        # Not before it is this verification's turn: another one's addresses are gone now.
        own = links.reach(netns.CURRENT).addresses
        places = [_Place(family, policy, rules, own, beginnings, device) for family in Family]
        probes = [probe for place in places for probe in _probes(place)]
    names: dict[str, list[str]] = {}
    for name, reason in itertools.chain.from_iterable(place.untried for place in places):
        names.setdefault(reason, []).append(name)
    if names:
        untried = (f"{', '.join(of_reason)} ({reason})" for reason, of_reason in names.items())
        probes.append(_skipped("exclusions-not-tried", "; ".join(untried)))
    return tuple(probes)


@contextmanager
def _device() -> Iterator[tun.Tun | None]:
    """The interface, when it is this verification's turn; None on a machine that gives no TUN."""
    deadline = time.monotonic() + _TURN_S
    with ExitStack() as stack:
        while True:
            try:
                device = stack.enter_context(tun.opened(INTERFACE))
            except KernelError as error:
                if error.errno in _NO_TUN:
                    yield None
                    return
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_TURN_POLL_S)
            else:
                yield device
                return


class _Place:
    """One family of the namespace, and what probes of it need."""

    def __init__(
        self,
        family: Family,
        policy: Policy,
        rules: Rules,
        own: tuple[str, ...],
        beginnings: conntrack.Beginnings,
        device: tun.Tun | None,
    ) -> None:
        self.family = family
        self.policy = policy
        self.rules = rules
        self.concerned = family in rules.families
        near = _someone(_DOCUMENTATION[family][0])
        self.device = device if device is not None and _joins(device, near) else None
        others = (_someone(network) for network in _DOCUMENTATION[family])
        self.far = tuple(address for address in others if address != near)
        """Addresses that can be had to lie behind the interface."""
        self.addresses = tuple(address for address in own if _family(address) is family)
        """The workload's own."""
        self.app = _somebody(rules.of(Direction.OUTBOUND))
        self.untried: list[tuple[str, str]] = []
        """Exclusions that could not be tried, each with the reason."""
        self._near = near
        self._listening = {
            listener.port
            for listener in sockets.listeners()
            if not ipaddress.ip_address(listener.address).is_loopback
        }
        self._beginnings = beginnings
        self._routed: set[str] = set()

    def listens(self, port: int) -> bool:
        """Whether somebody accepts connections from outside to a port."""
        return port in self._listening

    def owns(self, address: str) -> bool:
        """Whether an address is one of this namespace."""
        parsed = ipaddress.ip_address(address)
        return parsed.is_loopback or address in (self._near, *self.addresses)

    def put_behind(self, address: str) -> None:
        """Have what goes to an address come out of the interface."""
        if self.device is not None and address not in self._routed:
            self.device.add_route(address)
            self._routed.add(address)

    def can_have_behind(self, address: str) -> bool:
        """`put_behind`, unless the workload has a route to this very address."""
        try:
            self.put_behind(address)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def packets(self) -> Iterator[bytes]:
        """The packets that came out of the interface since the last call, of this or of `came_out`."""
        if self.device is not None:
            yield from self.device.packets()

    def came_out(self) -> Iterator[Segment]:
        """The segments among them."""
        for packet in self.packets():
            segment = rawtcp.parse_packet(packet)
            if segment is not None:
                yield segment

    def landed(self, original: Original) -> Endpoint | None:
        """Where a connection went that has just begun; None when it is not tracked."""
        found = self._beginnings.destination_of(original)
        if found is None and not self._beginnings.complete:
            zones = (conntrack.DEFAULT_ZONE, DNS_ZONE)
            tracked = (conntrack.destination_of(original, zone) for zone in zones)
            found = next((endpoint for endpoint in tracked if endpoint is not None), None)
        return found

    @property
    def knows(self) -> bool:
        """Whether what `landed` does not know of is not tracked."""
        return self._beginnings.complete

    def is_untouched(self, landed: Endpoint | None, target: "_Target") -> bool:
        """Whether a probe is on its way to where it was sent."""
        return landed == target.dialled or (landed is None and self.knows)


def _joins(device: tun.Tun, address: str) -> bool:
    """Give the interface an address; False when the namespace does not have this family."""
    try:
        device.add_address(address)
    except KernelError as error:
        if error.errno not in _NO_FAMILY:
            raise
        return False
    return True


class _Target(msgspec.Struct, frozen=True):
    """What a probe dials, and what should become of it."""

    connection: Connection
    action: Action

    @property
    def dialled(self) -> Endpoint:
        return Endpoint(self.connection.destination, self.connection.port)

    @property
    def stays(self) -> bool:
        """Whether it ends here even when nothing redirects it."""
        return self.connection.interface == INTERFACE


def _probes(place: _Place) -> Iterator[Probe]:
    yield from _outbound(place)
    yield from _exclusions(place, Direction.OUTBOUND)
    yield from _inbound(place)
    yield from _exclusions(place, Direction.INBOUND)
    yield from _dns(place)


def _outbound(place: _Place) -> Iterator[Probe]:
    name = f"outbound-{place.family}"
    if not place.concerned or not place.policy.outbound.enabled:
        if place.device is None:
            yield _skipped(
                name, "nothing is to be redirected, and without TUN it would really leave"
            )
            return
        untouched = next(_dialled(place, place.far, _USUAL_PORTS, Protocol.TCP))
        yield _tried(place, name, untouched, place.app)
        return
    lines = place.rules.of(Direction.OUTBOUND)
    destinations = (*place.far, *_included(lines, place.family))
    targets = _dialled(place, destinations, _ports(lines), Protocol.TCP)
    found = next((target for target in targets if isinstance(target.action, Redirect)), None)
    if found is None:
        yield _skipped(name, "no address and port that can be tried is redirected")
        return
    yield _tried(place, name, found, place.app)
    yield _sidecar(place, found)


def _sidecar(place: _Place, target: _Target) -> Probe:
    """The sidecar's own connections, to where the application's are redirected."""
    name = f"sidecar-{place.family}"
    if not target.stays:
        return _skipped(name, "a connection of the sidecar would really leave the namespace")
    proxy, app = place.policy.proxy, place.app
    senders = {f"user {uid}": Sender(uid=uid, gid=app.gid) for uid in proxy.uids[:_MAX_SENDERS]}
    senders |= {f"group {gid}": Sender(uid=app.uid, gid=gid) for gid in proxy.gids[:_MAX_SENDERS]}
    if proxy.mark is not None:
        mark = proxy.mark.value
        senders[f"mark {mark:#x}"] = Sender(uid=app.uid, gid=app.gid, mark=mark)
    if not senders:
        return _skipped(
            name, "only a cgroup tells the sidecar apart, and this is not a process in it"
        )
    for who, sender in senders.items():
        own = msgspec.structs.replace(
            target.connection, uid=sender.uid, gid=sender.gid, mark=sender.mark
        )
        probe = _tried(place, name, _Target(own, LEAVE), sender)
        if probe.outcome is not Outcome.PASSED:
            return Probe(name, probe.outcome, f"as {who}: {probe.detail}")
    return Probe(name, Outcome.PASSED, f"left alone as {', '.join(senders)}")


def _inbound(place: _Place) -> Iterator[Probe]:
    name = f"inbound-{place.family}"
    inbound, outbound = place.policy.inbound, place.policy.outbound
    device = place.device
    if device is None:
        yield _skipped(name, "there is no TUN interface on which connections could arrive")
        return
    if not place.addresses:
        yield _skipped(name, f"the workload has no {place.family} address")
        return
    redirects = place.concerned and inbound.enabled
    # A port that nobody listens on, if there is one: a probe that is not redirected then disturbs nobody.
    ports = sorted(_ports(place.rules.of(Direction.INBOUND)), key=place.listens)
    targets = _arriving(place, place.far, [port for port in ports if port != outbound.port])
    found = next(
        (target for target in targets if isinstance(target.action, Redirect | Tproxy) is redirects),
        None,
    )
    if found is not None:
        yield _arrived(place, device, name, found)
    elif inbound.include_interfaces is not None:
        only = ", ".join(inbound.include_interfaces) or "no interface"
        yield _skipped(name, f"it is redirected on {only}, where nothing can be made to arrive")
    else:
        yield _skipped(name, "no source and port that can be tried is redirected")
    if place.concerned and outbound.enabled:
        own = next(_arriving(place, place.far, [outbound.port]))
        yield _arrived(place, device, f"outbound-port-{place.family}", own)


def _exclusions(place: _Place, direction: Direction) -> Iterator[Probe]:
    """What the policy excludes, and what it does not include: of each list the first and the last."""
    outwards = direction is Direction.OUTBOUND
    names = _OUTBOUND_EXCLUSIONS if outwards else _INBOUND_EXCLUSIONS
    prefix = "" if outwards else "inbound-"
    found: dict[str, list[Line | None]] = {}
    for line in lines_of_family(place.rules.of(direction), place.family):
        kind = _NUMBER_OR_FAMILY.sub("", line.name)
        if kind in names and isinstance(line.action, Leave):
            found.setdefault(kind, []).append(line)
    if _includes_some(place, direction):
        found[_NOT_INCLUDED] = [None]
    for kind, lines in found.items():
        name = f"{names.get(kind, prefix + kind)}-{place.family}"
        if place.device is None:
            place.untried.append((name, "there is no TUN interface to try it with"))
        elif not outwards and not place.addresses:
            place.untried.append((name, f"the workload has no {place.family} address"))
        else:
            yield from _excluded(place, place.device, name, kind, direction, lines)


def _includes_some(place: _Place, direction: Direction) -> bool:
    """Whether what no line speaks of is left alone, where others are redirected."""
    inbound, outbound = place.policy.inbound, place.policy.outbound
    if direction is Direction.OUTBOUND:
        included = outbound.enabled and outbound.include_cidrs is not None
    else:
        included = inbound.enabled and inbound.include_ports is not None
    return included and place.concerned and bool(place.rules.of(direction))


def _excluded(
    place: _Place,
    device: tun.Tun,
    name: str,
    kind: str,
    direction: Direction,
    lines: Sequence[Line | None],
) -> Iterator[Probe]:
    """Try the connections that lines of one kind leave alone; the first that is not tells."""
    tries: dict[str, Connection] = {}
    for line, last in itertools.product((lines[0], *lines[1:][-1:]), (False, True)):
        connection = _kept_by(place, direction, line, last=last)
        if connection is not None:
            tries.setdefault(_shown(line, connection), connection)
    if not tries:
        place.untried.append((name, _UNTRIED_REASONS.get(kind, _NOT_ALONE)))
        return
    if _speak_of_the_living(place, lines):
        place.untried.append((f"other networks of {name}", _LIVED_IN))
    for shown, connection in tries.items():
        target = _Target(connection, LEAVE)
        if direction is Direction.OUTBOUND:
            sender = Sender(uid=connection.uid or 0, gid=connection.gid or 0)
            probe = _tried(place, name, target, sender)
        else:
            probe = _arrived(place, device, name, target)
        if probe.outcome is not Outcome.PASSED:
            yield Probe(name, probe.outcome, f"{shown}: {probe.detail}" if shown else probe.detail)
            return
    listed = ", ".join(filter(None, tries))
    yield Probe(name, Outcome.PASSED, f"left alone: {listed}" if listed else _LEFT_ALONE)


def _speak_of_the_living(place: _Place, lines: Iterable[Line | None]) -> bool:
    """Whether the lines speak of a network in which no address can be tried."""
    nobodys = [ipaddress.ip_network(network) for network in _DOCUMENTATION[place.family]]
    networks = (
        ipaddress.ip_network(network)
        for line in lines
        for match in (line.matches if line is not None else ())
        if isinstance(match, ToNetwork | FromNetwork)
        for network in match.networks
    )
    return any(not any(network.overlaps(other) for other in nobodys) for network in networks)


def _kept_by(
    place: _Place, direction: Direction, line: Line | None, *, last: bool
) -> Connection | None:
    """A connection that can be tried and that only this line keeps from the sidecar: one at an end of its lists.

    None for the line stands for the end of the decision list.
    """
    rules = place.rules
    without = rules if line is None else _without(rules, line)
    for connection in _candidates(place, direction, line, last=last):
        decision = explain(rules, connection)
        if line is None:
            kept = decision.line is None
        else:
            kept = decision.line == line.name and explain(without, connection).action != LEAVE
        if kept:
            return connection
    return None


def _without(rules: Rules, gone: Line) -> Rules:
    lists = tuple(
        (hook, tuple(line for line in lines if line.name != gone.name))
        for hook, lines in rules.lists
    )
    return msgspec.structs.replace(rules, lists=lists)


def _candidates(
    place: _Place, direction: Direction, line: Line | None, *, last: bool
) -> Iterator[Connection]:
    """Connections by the interface that a line may speak of."""
    outwards = direction is Direction.OUTBOUND
    lines = place.rules.of(direction)
    uid, gid = place.app.uid, place.app.gid
    # A port that nobody listens on, if there is one, as for all that arrives.
    ports = [*_ports(lines), *_beside(lines)]
    ports = ports if outwards else sorted(ports, key=place.listens)
    others: Sequence[str] = place.far
    protocols: tuple[Protocol, ...] = (Protocol.TCP,)
    for match in line.matches if line is not None else ():
        match match:
            case ByUser(ranges):
                uid = _end(ranges, last=last)
            case ByGroup(ranges):
                gid = _end(ranges, last=last)
            case ToPort(ranges):
                ports = [_end(ranges, last=last)]
            case OfProtocol(of_line):
                protocols = of_line
            case ToNetwork(_, networks) | FromNetwork(_, networks):
                others = _nobodies(place, networks[::-1] if last else networks)
            case _:
                pass
    for protocol, other, port in itertools.product(protocols, others, ports):
        yield Connection(
            direction=direction,
            destination=other if outwards else place.addresses[0],
            port=port,
            source="" if outwards else other,
            interface=INTERFACE,
            uid=uid if outwards else None,
            gid=gid if outwards else None,
            protocol=protocol,
        )


def _shown(line: Line | None, connection: Connection) -> str:
    """What of a connection makes the line decide on it; "" when nothing does that is worth telling."""
    shown = []
    for match in line.matches if line is not None else ():
        match match:
            case ByUser():
                shown.append(f"user {connection.uid}")
            case ByGroup():
                shown.append(f"group {connection.gid}")
            case ToPort():
                shown.append(f"port {connection.port}")
            case ToNetwork():
                shown.append(f"to {connection.destination}")
            case FromNetwork():
                shown.append(f"from {connection.source}")
            case _:
                pass
    return " ".join(shown)


def _dns(place: _Place) -> Iterator[Probe]:
    dns = place.policy.dns
    redirects = place.concerned and dns.enabled
    named = [resolver for resolver in dns.resolvers if _family(resolver) is place.family]
    for protocol in Protocol if redirects else (Protocol.UDP,):
        name = f"dns-{protocol}-{place.family}"
        targets = _dialled(place, named or place.far, [DNS_PORT], protocol)
        found = next((target for target in targets if isinstance(target.action, Translate)), None)
        found = found or _other_query(place, protocol)
        if found is not None:
            yield _tried(place, name, found, place.app)
        elif redirects:
            yield _skipped(name, "no query that can be tried is redirected")
        else:
            yield _skipped(
                name, "it is not to be redirected, and without TUN it would really leave"
            )
    other = _other_query(place, Protocol.UDP) if redirects and named else None
    if other is not None:
        yield _tried(place, f"dns-other-udp-{place.family}", other, place.app)


def _other_query(place: _Place, protocol: Protocol) -> _Target | None:
    """A query to where no resolver is, that ends here."""
    targets = _dialled(place, place.far, [DNS_PORT], protocol)
    return next((target for target in targets if target.stays), None)


def _dialled(
    place: _Place, destinations: Sequence[str], ports: Sequence[int], protocol: Protocol
) -> Iterator[_Target]:
    """What the application could dial: first what ends here, then what has a real way out."""
    behind = set(place.far) if place.device is not None else set()
    ways = [(destination, INTERFACE) for destination in destinations if destination in behind]
    ways += [(destination, "") for destination in destinations]
    for destination, here in ways:
        interface = here or routes.outgoing_interface(netns.CURRENT, destination)
        for port in ports if interface is not None else ():
            connection = Connection(
                direction=Direction.OUTBOUND,
                destination=destination,
                port=port,
                interface=interface or "",
                uid=place.app.uid,
                gid=place.app.gid,
                protocol=protocol,
            )
            yield _Target(connection, explain(place.rules, connection).action)


def _arriving(place: _Place, sources: Sequence[str], ports: Sequence[int]) -> Iterator[_Target]:
    """What can be made to arrive for an address of the workload."""
    for source, port in itertools.product(sources, ports):
        connection = Connection(
            direction=Direction.INBOUND,
            destination=place.addresses[0],
            port=port,
            source=source,
            interface=INTERFACE,
        )
        yield _Target(connection, explain(place.rules, connection).action)


class _Answer(enum.Enum):
    """What came back from where a probe went."""

    LISTENER = enum.auto()
    NOBODY = enum.auto()


class _Fate(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a probe."""

    landed: Endpoint | None
    """Where it went, as tracked; None when it is not tracked."""
    answer: _Answer | None = None
    left: bool = False
    """Whether it left as it was."""


def _tried(place: _Place, name: str, target: _Target, sender: Sender) -> Probe:
    """Dial from inside the namespace, and say what became of it."""
    if target.stays:
        place.put_behind(target.connection.destination)
    send = _query if target.connection.protocol is Protocol.UDP else _syn
    try:
        fate = send(place, target, sender)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in _NO_WAY and not place.addresses:
            return _skipped(name, f"{place.family} is switched off in this namespace: {reason}")
        return Probe(name, Outcome.FAILED, f"it could not be sent: {reason}")
    return _judged(place, name, target, fate)


def _arrived(place: _Place, device: tun.Tun, name: str, target: _Target) -> Probe:
    """Dial from outside, and say what became of it."""
    place.put_behind(target.connection.source)
    return _judged(place, name, target, _syn_from_outside(place, device, target))


def _syn(place: _Place, target: _Target, sender: Sender) -> _Fate:
    destination, port = target.connection.destination, target.connection.port
    with (
        rawtcp.reserved_port(ipaddress.ip_address(destination).version) as source_port,
        rawtcp.open_raw(destination, sender, hops=1) as raw,
    ):
        syn = Segment(
            source=raw.getsockname()[0],
            source_port=source_port,
            destination=destination,
            destination_port=port,
            sequence=secrets.randbits(32),
            flags=SYN,
        )
        raw.send(rawtcp.pack(syn))
        landed = place.landed(_original(syn))
        if not target.stays and place.is_untouched(landed, target):
            return _Fate(landed=landed, left=True)

        def fate() -> _Fate | None:
            if any(segment == syn for segment in place.came_out()):
                return _Fate(landed=landed, left=True)
            answer = _answer(syn, rawtcp.received(raw))
            return _Fate(landed=landed, answer=answer) if answer is not None else None

        return _awaited(fate, place, raw) or _Fate(landed=landed)


def _query(place: _Place, target: _Target, sender: Sender) -> _Fate:
    """Ask a DNS question that nobody will pass on: recursion is not desired, the name is invalid (RFC 6761)."""
    destination, port = target.connection.destination, target.connection.port
    question = _question(secrets.token_hex(8))
    with rawtcp.open_udp(destination, port, sender, hops=1) as udp:
        udp.send(question)
        source, source_port, *_ = udp.getsockname()
        landed = place.landed(
            Original(
                protocol=socket.IPPROTO_UDP,
                source=source,
                source_port=source_port,
                destination=destination,
                destination_port=port,
            )
        )
        if not target.stays and place.is_untouched(landed, target):
            return _Fate(landed=landed, left=True)

        def fate() -> _Fate | None:
            if any(packet.endswith(question) for packet in place.packets()):
                return _Fate(landed=landed, left=True)
            answered = rawtcp.answered(udp)
            if answered is None:
                return None
            return _Fate(landed=landed, answer=_Answer.LISTENER if answered else _Answer.NOBODY)

        return _awaited(fate, place, udp) or _Fate(landed=landed)


def _syn_from_outside(place: _Place, device: tun.Tun, target: _Target) -> _Fate:
    connection = target.connection
    syn = Segment(
        source=connection.source,
        source_port=_FIRST_PORT + secrets.randbelow(MAX_PORT - _FIRST_PORT),
        destination=connection.destination,
        destination_port=connection.port,
        sequence=secrets.randbits(32),
        flags=SYN,
    )
    device.write(rawtcp.pack_packet(syn))
    landed = place.landed(_original(syn))

    def fate() -> _Fate | None:
        answer = _answer(syn, place.came_out())
        return _Fate(landed=landed, answer=answer) if answer is not None else None

    found = _awaited(fate, place) or _Fate(landed=landed)
    if found.answer is _Answer.LISTENER:
        reset = msgspec.structs.replace(syn, sequence=_next(syn.sequence), flags=RST)
        device.write(rawtcp.pack_packet(reset))
    return found


def _answer(syn: Segment, heard: Iterable[Segment]) -> _Answer | None:
    """The answer to a SYN, told by its token."""
    for segment in heard:
        here = (segment.source, segment.source_port, segment.destination_port)
        if here != (syn.destination, syn.destination_port, syn.source_port):
            continue
        if segment.acknowledged == _next(syn.sequence):
            if segment.flags & RST:
                return _Answer.NOBODY
            if segment.flags & (SYN | ACK) == SYN | ACK:
                return _Answer.LISTENER
    return None


def _awaited(
    fate: Callable[[], _Fate | None], place: _Place, sender: socket.socket | None = None
) -> _Fate | None:
    """What becomes of a probe, as soon as that is known; None when it is not in time."""
    poll = select.poll()
    for readable in (place.device, sender):
        if readable is not None:
            poll.register(readable.fileno(), select.POLLIN)
    deadline = time.monotonic() + _DEADLINE_S
    while (found := fate()) is None and (rest := deadline - time.monotonic()) > 0:
        poll.poll(rest * 1000)
    return found


def _judged(place: _Place, name: str, target: _Target, fate: _Fate) -> Probe:
    outcome, detail = _judgement(place, target, fate)
    return Probe(name, outcome, detail)


def _judgement(place: _Place, target: _Target, fate: _Fate) -> tuple[Outcome, str]:
    action = target.action
    match action:
        case Redirect(port):
            return _redirected(place, target, fate, port)
        case Tproxy(port):
            return _handed_over(place, target, fate, port)
        case Translate(address, port):
            wanted = Endpoint(address, port)
            if fate.landed == wanted:
                instead = f"it went to {_at(wanted)} instead of {_at(target.dialled)}"
                return Outcome.PASSED, instead + _heard(fate.answer)
            return _astray(place, target, fate, _at(wanted))
        case Leave():
            return _left_alone(place, target, fate)
        case Drop() | Zone():
            raise AssertionError(f"{action} decides on no connection of an application")
        case _:
            assert_never(action)


def _redirected(place: _Place, target: _Target, fate: _Fate, port: int) -> tuple[Outcome, str]:
    landed = fate.landed
    if landed is None or landed.port != port:
        return _astray(place, target, fate, f"port {port}")
    if not place.owns(landed.address):
        return _astray(place, target, fate, "an address of the workload")
    if fate.answer is None:
        gone = f"redirected to port {port}, but no answer came back: something drops it"
        return Outcome.FAILED, gone
    return Outcome.PASSED, f"redirected to port {port}{_heard(fate.answer)}"


def _heard(answer: _Answer | None) -> str:
    """What to add about who answered."""
    match answer:
        case _Answer.LISTENER:
            return "; a listener answered"
        case _Answer.NOBODY:
            return "; nobody listens there yet"
        case None:
            return "; nobody answered"
        case _:
            assert_never(answer)


def _handed_over(place: _Place, target: _Target, fate: _Fate, port: int) -> tuple[Outcome, str]:
    """There is no translation to see: only the answer of the transparent listener tells."""
    if fate.landed not in (None, target.dialled):
        return _astray(place, target, fate, f"port {port}")
    if place.listens(target.connection.port):
        return Outcome.SKIPPED, _own_listener(target)
    if fate.answer is _Answer.LISTENER:
        return Outcome.PASSED, f"handed to the listener on port {port}, which answered"
    if place.listens(port):
        return Outcome.FAILED, f"the listener on port {port} did not get it, or is not transparent"
    return Outcome.SKIPPED, f"nobody listens on port {port} yet: until then nothing can be told"


def _left_alone(place: _Place, target: _Target, fate: _Fate) -> tuple[Outcome, str]:
    if fate.landed not in (None, target.dialled):
        return Outcome.FAILED, f"it landed on {_at(fate.landed)}, and should be left alone"
    if target.connection.direction is Direction.INBOUND:
        return _let_in(place, target, fate)
    if not fate.left:
        return Outcome.FAILED, "it should be left alone, but never came out: something drops it"
    return Outcome.PASSED, _LEFT_ALONE


def _let_in(place: _Place, target: _Target, fate: _Fate) -> tuple[Outcome, str]:
    """With tproxy there is no translation to see, and what a listener should get that is not there is dropped."""
    if fate.landed is None and not place.knows:
        return Outcome.SKIPPED, _UNTOLD
    served = place.listens(target.connection.port)
    if fate.answer is _Answer.LISTENER and not served:
        return Outcome.FAILED, "it should be left alone, but a listener of another port answered"
    if place.policy.mode is Mode.TPROXY:
        if fate.answer is None:
            dropped = "it should be left alone, but no answer came back: something drops it"
            return Outcome.FAILED, dropped
        if served and place.listens(place.policy.inbound.port):
            return Outcome.SKIPPED, _own_listener(target)
    return Outcome.PASSED, _LEFT_ALONE


def _own_listener(target: _Target) -> str:
    return f"port {target.connection.port} has a listener of its own: an answer tells nothing"


def _astray(place: _Place, target: _Target, fate: _Fate, wanted: str) -> tuple[Outcome, str]:
    """What to say of a probe that did not land where it should."""
    if fate.left:
        by = "" if target.stays else f" by {target.connection.interface}"
        return Outcome.FAILED, f"not redirected to {wanted}: it left the namespace{by}"
    if fate.landed is None and not place.knows:
        return Outcome.SKIPPED, _UNTOLD
    if fate.landed is not None and fate.landed != target.dialled:
        return Outcome.FAILED, f"it landed on {_at(fate.landed)}, not on {wanted}"
    if fate.answer is not None:
        own = target.connection.port
        return Outcome.FAILED, f"not redirected to {wanted}: it reached port {own} itself"
    return Outcome.FAILED, f"no answer came back from {wanted}: something drops it"


def _skipped(name: str, reason: str) -> Probe:
    return Probe(name, Outcome.SKIPPED, reason)


def _at(endpoint: Endpoint) -> str:
    return f"{endpoint.address} port {endpoint.port}"


def _original(syn: Segment) -> Original:
    return Original(
        protocol=socket.IPPROTO_TCP,
        source=syn.source,
        source_port=syn.source_port,
        destination=syn.destination,
        destination_port=syn.destination_port,
    )


def _next(sequence: int) -> int:
    return (sequence + 1) & 0xFFFFFFFF


def _question(token: str) -> bytes:
    """A query for the address of a name that does not exist (RFC 1035, 4.1)."""
    labels = (token.encode(), b"tidegate", b"invalid")
    name = b"".join(bytes([len(label)]) + label for label in labels)
    header = struct.pack("!HHHHHH", secrets.randbits(16), 0, 1, 0, 0, 0)
    return header + name + struct.pack("!BHH", 0, _TYPE_A, _CLASS_IN)


def _family(address: str) -> Family:
    return Family.IPV4 if ipaddress.ip_address(address).version == 4 else Family.IPV6


def _someone(network: str) -> str:
    """An address of the network by chance, neither its first nor its last where it has others."""
    parsed = ipaddress.ip_network(network)
    others = max(parsed.num_addresses - 2, 1)
    return str(parsed[min(1 + secrets.randbelow(others), parsed.num_addresses - 1)])


def _included(lines: Iterable[Line], family: Family) -> tuple[str, ...]:
    """Addresses of networks that go to the sidecar."""
    networks = [
        network
        for line in lines
        if isinstance(line.action, Redirect)
        for match in line.matches
        if isinstance(match, ToNetwork) and match.family is family
        for network in match.networks[:_EDGES]
    ]
    single = (ipaddress.ip_network(network).num_addresses == 1 for network in networks)
    return tuple(
        network.partition("/")[0] if alone else _someone(network)
        for network, alone in zip(networks, single, strict=True)
    )


def _ports(lines: Iterable[Line]) -> list[int]:
    """Ports worth trying: one by chance, usual ones, and those on either side of an edge."""
    found = [_FIRST_PORT + secrets.randbelow(MAX_PORT - _FIRST_PORT), *_USUAL_PORTS]
    for line in lines:
        for match in line.matches:
            for ports in match.ports[:_EDGES] if isinstance(match, ToPort) else ():
                beyond = isinstance(line.action, Leave)
                found += [ports.last + 1, ports.first - 1] if beyond else [ports.first, ports.last]
    return [port for port in dict.fromkeys(found) if 1 <= port <= MAX_PORT]


def _beside(lines: Iterable[Line]) -> list[int]:
    """Ports just outside of ranges that go to the sidecar."""
    redirected = (line for line in lines if not isinstance(line.action, Leave))
    matches = (match for line in redirected for match in line.matches if isinstance(match, ToPort))
    edges = (
        port
        for match in matches
        for ports in match.ports[:_EDGES]
        for port in (ports.first - 1, ports.last + 1)
    )
    return [port for port in edges if 1 <= port <= MAX_PORT]


def _end(ranges: Sequence[PortRange] | Sequence[IdRange], *, last: bool) -> int:
    return ranges[-1].last if last else ranges[0].first


def _nobodies(place: _Place, networks: Iterable[str]) -> list[str]:
    """The first address of these networks in which nobody lives, as a list; it lies behind the interface then."""
    nobodys = [ipaddress.ip_network(network) for network in _DOCUMENTATION[place.family]]
    for network in map(ipaddress.ip_network, networks):
        for other in nobodys:
            if not network.overlaps(other):
                continue
            address = _someone(str(max(network, other, key=lambda one: one.prefixlen)))
            if not place.owns(address) and place.can_have_behind(address):
                return [address]
    return []


def _somebody(lines: Sequence[Line]) -> Sender:
    """A user and a group of whom no line speaks."""
    matches = [match for line in lines for match in line.matches]
    uids = [ids for match in matches if isinstance(match, ByUser) for ids in match.uids]
    gids = [ids for match in matches if isinstance(match, ByGroup) for ids in match.gids]
    return Sender(uid=_unnamed(uids), gid=_unnamed(gids))


def _unnamed(ranges: Sequence[IdRange]) -> int:
    """An id in none of the ranges; a usual one when they have all."""
    candidates = (*_USUAL_IDS, *(ids.last + 1 for ids in ranges[:_MAX_RANGES]))
    free = (number for number in candidates if not any(number in ids for ids in ranges))
    return next((number for number in free if number <= MAX_ID), _USUAL_IDS[0])
