"""Live proof that a workload's connections go where its policy says, by sending their first packets.

A probe is one packet with a random token (a TCP sequence number, a name in a DNS query) between the namespace
and a TUN interface that exists only as long as the probes: what the namespace does not redirect comes out of it
here. So no outside host is needed, and nothing leaves the namespace. Only where a policy redirects nothing but
what goes to addresses or interfaces that really lead out, a probe takes the real way; it may cross no router
(its time to live is 1), and leaves only when the redirection does not work.

No connection is opened: the sidecar accepts nothing, and need not be there. To which port a probe was redirected
is what connection tracking says. All that is left are entries of connection tracking, which time out.

What should become of a probe is asked of `explain`, never decided here. `probing` has the parts.
"""

import itertools
from collections.abc import Iterator

import msgspec

from tidegate.enforce.redirect.families import LABEL, family_of
from tidegate.enforce.redirect.probing.attempts import (
    USUAL_PORTS,
    arrived,
    arriving,
    arriving_at,
    dialling,
    included_addresses,
    ports_worth_trying,
    tried,
)
from tidegate.enforce.redirect.probing.exclusions import exclusion_probes
from tidegate.enforce.redirect.probing.judgement import Outcome, Probe, skipped
from tidegate.enforce.redirect.probing.place import Means, Place, Target, opened_device
from tidegate.enforce.redirect.rules import (
    DNS_PORT,
    LEAVE,
    Redirect,
    Tproxy,
    Translate,
    rules_for,
)
from tidegate.intent.policy import Family, Policy, Protocol
from tidegate.kernel import conntrack, links, netns, tun
from tidegate.kernel.rawtcp import Sender
from tidegate.model import Direction

_MAX_SENDERS = 4
"""As how many of the sidecar's ids of each kind a probe is sent."""
_MAX_SERVICES = 8
"""How many of the ports that are served are tried: half a millisecond each."""


def verify(netns_path: str, policy: Policy, means: Means = Means.SEGMENTS) -> tuple[Probe, ...]:
    """Try out what the policy says, in both directions and families: some milliseconds, 0.3 s per lost answer.

    Needs the capabilities that the means are described with. KernelError when the namespace is gone, may not be
    entered, or is being verified by somebody else all the time.
    """
    return netns.run_in(netns_path, _verify, policy, means)


def _verify(policy: Policy, means: Means) -> tuple[Probe, ...]:
    rules = rules_for(policy)
    with conntrack.beginnings() as beginnings, opened_device(means) as device:
        # Not before it is this verification's turn: another one's addresses are gone now.
        own = links.reach(netns.CURRENT).addresses
        places = [Place(means, family, policy, rules, own, beginnings, device) for family in Family]
        probes = [probe for place in places for probe in _probes(place)]
    names: dict[str, list[str]] = {}
    for name, reason in itertools.chain.from_iterable(place.untried for place in places):
        names.setdefault(reason, []).append(name)
    if names:
        untried = (f"{', '.join(of_reason)} ({reason})" for reason, of_reason in names.items())
        probes.append(skipped("exclusions-not-tried", "; ".join(untried)))
    return tuple(probes)


def _probes(place: Place) -> Iterator[Probe]:
    yield from _outbound(place)
    yield from exclusion_probes(place, Direction.OUTBOUND)
    yield from _inbound(place)
    yield from exclusion_probes(place, Direction.INBOUND)
    yield from _dns(place)


def _outbound(place: Place) -> Iterator[Probe]:
    name = f"outbound-{place.family}"
    if not place.concerned or not place.policy.outbound.enabled:
        if place.device is None:
            yield skipped(
                name, "nothing is to be redirected, and without TUN it would really leave"
            )
            return
        untouched = next(dialling(place, place.far, USUAL_PORTS, Protocol.TCP))
        yield tried(place, name, untouched, place.app)
        return
    lines = place.rules.of(Direction.OUTBOUND)
    destinations = (*place.far, *included_addresses(lines, place.family))
    targets = dialling(place, destinations, ports_worth_trying(lines), Protocol.TCP)
    found = next((target for target in targets if isinstance(target.action, Redirect)), None)
    if found is None:
        yield skipped(name, "no address and port that can be tried is redirected")
        return
    yield tried(place, name, found, place.app)
    yield _sidecar(place, found)


def _sidecar(place: Place, target: Target) -> Probe:
    """The sidecar's own connections, to where the application's are redirected."""
    name = f"sidecar-{place.family}"
    if not target.stays:
        return skipped(name, "a connection of the sidecar would really leave the namespace")
    proxy, app = place.policy.proxy, place.app
    senders = {f"user {uid}": Sender(uid=uid, gid=app.gid) for uid in proxy.uids[:_MAX_SENDERS]}
    senders |= {f"group {gid}": Sender(uid=app.uid, gid=gid) for gid in proxy.gids[:_MAX_SENDERS]}
    if proxy.mark is not None:
        mark = proxy.mark.value
        senders[f"mark {mark:#x}"] = Sender(uid=app.uid, gid=app.gid, mark=mark)
    if not senders:
        return skipped(
            name, "only a cgroup tells the sidecar apart, and this is not a process in it"
        )
    for who, sender in senders.items():
        own = msgspec.structs.replace(
            target.connection, uid=sender.uid, gid=sender.gid, mark=sender.mark
        )
        probe = tried(place, name, Target(own, LEAVE), sender)
        if probe.outcome is not Outcome.PASSED:
            return Probe(name, probe.outcome, f"as {who}: {probe.detail}")
    return Probe(name, Outcome.PASSED, f"left alone as {', '.join(senders)}")


def _inbound(place: Place) -> Iterator[Probe]:
    name = f"inbound-{place.family}"
    inbound, outbound = place.policy.inbound, place.policy.outbound
    device = place.device
    if device is None:
        yield skipped(name, "there is no TUN interface on which connections could arrive")
        return
    if not place.addresses:
        yield skipped(name, f"the workload has no {LABEL[place.family]} address")
        return
    redirects = place.concerned and inbound.enabled
    # A port that nobody listens on, if there is one: a probe that is not redirected then disturbs nobody.
    ports = sorted(ports_worth_trying(place.rules.of(Direction.INBOUND)), key=place.listens)
    targets = arriving(place, place.far, [port for port in ports if port != outbound.port])
    found = next(
        (target for target in targets if isinstance(target.action, Redirect | Tproxy) is redirects),
        None,
    )
    if found is not None:
        yield arrived(place, device, name, found)
    elif inbound.include_interfaces is not None:
        only = ", ".join(inbound.include_interfaces) or "no interface"
        yield skipped(name, f"it is redirected on {only}, where nothing can be made to arrive")
    else:
        yield skipped(name, "no source and port that can be tried is redirected")
    if place.concerned and outbound.enabled:
        own = next(arriving(place, place.far, [outbound.port]))
        yield arrived(place, device, f"outbound-port-{place.family}", own)
    yield from _services(place, device)


def _services(place: Place, device: tun.Device) -> Iterator[Probe]:
    """Each port that is really served: rules of another program may take just that one elsewhere."""
    name = f"served-ports-{place.family}"
    services = place.services()
    ports: dict[tuple[Outcome, str], list[str]] = {}
    for service in services[:_MAX_SERVICES]:
        probe = arrived(place, device, name, arriving_at(place, place.far[0], service))
        if probe.outcome is Outcome.FAILED:
            yield Probe(name, probe.outcome, f"port {service.port}: {probe.detail}")
            return
        ports.setdefault((probe.outcome, probe.detail), []).append(str(service.port))
    if not ports:
        return
    outcomes = {outcome for outcome, _ in ports}
    told = [
        f"port{'s' if len(same) > 1 else ''} {', '.join(same)}: {detail}"
        for (_, detail), same in ports.items()
    ]
    if len(services) > _MAX_SERVICES:
        told.append(f"{len(services) - _MAX_SERVICES} more are not tried")
    outcome = Outcome.SKIPPED if Outcome.SKIPPED in outcomes else Outcome.PASSED
    yield Probe(name, outcome, "; ".join(told))


def _dns(place: Place) -> Iterator[Probe]:
    dns = place.policy.dns
    redirects = place.concerned and dns.enabled
    named = [resolver for resolver in dns.resolvers if family_of(resolver) is place.family]
    for protocol in Protocol if redirects else (Protocol.UDP,):
        name = f"dns-{protocol}-{place.family}"
        targets = dialling(place, named or place.far, [DNS_PORT], protocol)
        found = next((target for target in targets if isinstance(target.action, Translate)), None)
        found = found or _other_query(place, protocol)
        if found is not None:
            yield tried(place, name, found, place.app)
        elif redirects:
            yield skipped(name, "no query that can be tried is redirected")
        else:
            yield skipped(name, "it is not to be redirected, and without TUN it would really leave")
    other = _other_query(place, Protocol.UDP) if redirects and named else None
    if other is not None:
        yield tried(place, f"dns-other-udp-{place.family}", other, place.app)


def _other_query(place: Place, protocol: Protocol) -> Target | None:
    """A query to where no resolver is, that ends here."""
    targets = dialling(place, place.far, [DNS_PORT], protocol)
    return next((target for target in targets if target.stays), None)
