"""Probes of what a policy excludes: each by a connection that this one line alone keeps from the sidecar.

Only with addresses in which nobody lives: a route to a real one would take the workload's own traffic away.
"""

import ipaddress
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from tidegate.enforce.redirect.families import LABEL
from tidegate.enforce.redirect.probing.attempts import arrived, beside, ports_worth_trying, tried
from tidegate.enforce.redirect.probing.judgement import LEFT_ALONE, Outcome, Probe
from tidegate.enforce.redirect.probing.place import (
    DOCUMENTATION,
    INTERFACE,
    Place,
    Target,
    someone,
)
from tidegate.enforce.redirect.rules import (
    LEAVE,
    ByGroup,
    ByUser,
    Connection,
    FromNetwork,
    Leave,
    Line,
    OfProtocol,
    Rules,
    ToNetwork,
    ToPort,
    explain,
    lines_of_family,
)
from tidegate.intent.policy import Family, IdRange, PortRange, Protocol
from tidegate.kernel import tun
from tidegate.kernel.rawtcp import Sender
from tidegate.model import Direction

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
_LIVED_IN = "somebody may live at the addresses"
_OTHER_INTERFACE = "only what the workload really sends or gets goes by the interface"
_NOT_ALONE = "it is not all that keeps a connection that can be tried from the sidecar"
_UNTRIED_REASONS = {
    "probe": _LIVED_IN,
    "excluded-cidr": _LIVED_IN,
    "excluded-interface": _OTHER_INTERFACE,
}


def exclusion_probes(place: Place, direction: Direction) -> Iterator[Probe]:
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
            place.untried.append((name, f"the workload has no {LABEL[place.family]} address"))
        else:
            yield from _excluded(place, place.device, name, kind, direction, lines)


def _includes_some(place: Place, direction: Direction) -> bool:
    """Whether what no line speaks of is left alone, where others are redirected."""
    inbound, outbound = place.policy.inbound, place.policy.outbound
    if direction is Direction.OUTBOUND:
        included = outbound.enabled and outbound.include_cidrs is not None
    else:
        included = inbound.enabled and inbound.include_ports is not None
    return included and place.concerned and bool(place.rules.of(direction))


def _excluded(
    place: Place,
    device: tun.Device,
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
        target = Target(connection, LEAVE)
        if direction is Direction.OUTBOUND:
            sender = Sender(uid=connection.uid or 0, gid=connection.gid or 0)
            probe = tried(place, name, target, sender)
        else:
            probe = arrived(place, device, name, target)
        if probe.outcome is not Outcome.PASSED:
            yield Probe(name, probe.outcome, f"{shown}: {probe.detail}" if shown else probe.detail)
            return
    listed = ", ".join(filter(None, tries))
    yield Probe(name, Outcome.PASSED, f"left alone: {listed}" if listed else LEFT_ALONE)


def _speak_of_the_living(place: Place, lines: Iterable[Line | None]) -> bool:
    """Whether the lines speak of a network in which no address can be tried."""
    nobodys = [ipaddress.ip_network(network) for network in DOCUMENTATION[place.family]]
    networks = (
        ipaddress.ip_network(network)
        for line in lines
        for match in (line.matches if line is not None else ())
        if isinstance(match, ToNetwork | FromNetwork)
        for network in match.networks
    )
    return any(not any(network.overlaps(other) for other in nobodys) for network in networks)


def _kept_by(
    place: Place, direction: Direction, line: Line | None, *, last: bool
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
    place: Place, direction: Direction, line: Line | None, *, last: bool
) -> Iterator[Connection]:
    """Connections by the interface that a line may speak of."""
    outwards = direction is Direction.OUTBOUND
    lines = place.rules.of(direction)
    uid, gid = place.app.uid, place.app.gid
    # A port that nobody listens on, if there is one, as for all that arrives.
    ports = [*ports_worth_trying(lines), *beside(lines)]
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


def _end(ranges: Sequence[PortRange] | Sequence[IdRange], *, last: bool) -> int:
    return ranges[-1].last if last else ranges[0].first


def _nobodies(place: Place, networks: Iterable[str]) -> list[str]:
    """The first address of these networks in which nobody lives, as a list; it lies behind the interface then."""
    nobodys = [ipaddress.ip_network(network) for network in DOCUMENTATION[place.family]]
    for network in map(ipaddress.ip_network, networks):
        for other in nobodys:
            if not network.overlaps(other):
                continue
            address = someone(str(max(network, other, key=lambda one: one.prefixlen)))
            if not place.owns(address) and place.can_have_behind(address):
                return [address]
    return []
