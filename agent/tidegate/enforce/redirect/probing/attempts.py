"""What can be dialled at a place, from inside and from outside, and dialling it."""

import errno
import ipaddress
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence

from tidegate.enforce.redirect.families import LABEL
from tidegate.enforce.redirect.probing.judgement import Outcome, Probe, judged, skipped
from tidegate.enforce.redirect.probing.place import INTERFACE, Means, Place, Target, someone
from tidegate.enforce.redirect.probing.sending import (
    FIRST_PORT,
    connect,
    let_arrive,
    send_query,
    send_syn,
)
from tidegate.enforce.redirect.rules import (
    Connection,
    Leave,
    Line,
    Redirect,
    ToNetwork,
    ToPort,
    explain,
)
from tidegate.intent.policy import MAX_PORT, Family, Protocol
from tidegate.kernel import netns, routes, tun
from tidegate.kernel.conntrack import Endpoint
from tidegate.kernel.rawtcp import Sender
from tidegate.model import Direction

USUAL_PORTS = (8080, 443)
_EDGES = 2
"""Of how many ranges of a line the edges are tried."""
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL)


def dialling(
    place: Place, destinations: Sequence[str], ports: Sequence[int], protocol: Protocol
) -> Iterator[Target]:
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
            yield Target(connection, explain(place.rules, connection).action)


def arriving(place: Place, sources: Sequence[str], ports: Sequence[int]) -> Iterator[Target]:
    """What can be made to arrive for an address of the workload."""
    for source, port in itertools.product(sources, ports):
        yield arriving_at(place, source, Endpoint(place.addresses[0], port))


def arriving_at(place: Place, source: str, dialled: Endpoint) -> Target:
    """What is made to arrive for this very address and port."""
    connection = Connection(
        direction=Direction.INBOUND,
        destination=dialled.address,
        port=dialled.port,
        source=source,
        interface=INTERFACE,
    )
    return Target(connection, explain(place.rules, connection).action)


def tried(place: Place, name: str, target: Target, sender: Sender) -> Probe:
    """Dial from inside the namespace, and say what became of it."""
    if target.stays:
        place.put_behind(target.connection.destination)
    if not place.can_send_as(sender):
        who = f"user {sender.uid} and group {sender.gid}"
        return skipped(name, f"this process may not send as {who}")
    if target.connection.protocol is Protocol.UDP:
        send = send_query
    else:
        send = send_syn if place.means is Means.SEGMENTS else connect
    try:
        fate = send(place, target, sender)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in _NO_WAY and not place.addresses:
            return skipped(
                name, f"{LABEL[place.family]} is switched off in this namespace: {reason}"
            )
        return Probe(name, Outcome.FAILED, f"it could not be sent: {reason}")
    return judged(place, name, target, fate)


def arrived(place: Place, device: tun.Device, name: str, target: Target) -> Probe:
    """Dial from outside, and say what became of it."""
    place.put_behind(target.connection.source)
    return judged(place, name, target, let_arrive(place, device, target))


def ports_worth_trying(lines: Iterable[Line]) -> list[int]:
    """Ports worth trying: one by chance, usual ones, and those on either side of an edge."""
    found = [FIRST_PORT + secrets.randbelow(MAX_PORT - FIRST_PORT), *USUAL_PORTS]
    for line in lines:
        for match in line.matches:
            for ports in match.ports[:_EDGES] if isinstance(match, ToPort) else ():
                beyond = isinstance(line.action, Leave)
                found += [ports.last + 1, ports.first - 1] if beyond else [ports.first, ports.last]
    return [port for port in dict.fromkeys(found) if 1 <= port <= MAX_PORT]


def beside(lines: Iterable[Line]) -> list[int]:
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


def included_addresses(lines: Iterable[Line], family: Family) -> tuple[str, ...]:
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
        network.partition("/")[0] if alone else someone(network)
        for network, alone in zip(networks, single, strict=True)
    )
