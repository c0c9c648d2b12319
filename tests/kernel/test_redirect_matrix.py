"""The behaviour matrix: every connection, under every policy, through every backend, really opened.

A cell is a policy, a backend, a mode and a family. Where each connection of the battery lands must equal what
`explain` says of it, in both backends; what key connections do is written down by hand below as well, so that
evaluator and backends cannot be wrong together.
"""

import json
import socket
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import product

import msgspec
import pytest
from cells import (
    BACKENDS,
    FAR,
    INTO,
    PEER,
    PEER_APP,
    STRANGER,
    TCP,
    UDP,
    UNCOUNTED,
    counts,
    decided_by,
    dials_of,
    ids,
    ports,
    shown,
)
from matrix import (
    APPS,
    CGROUP,
    DNS_PROXY,
    INBOUND,
    MARK,
    NO_SERVER,
    OTHER_INBOUND,
    OTHER_OUTBOUND,
    OUTBOUND,
    PROXY_GID,
    PROXY_UID,
    REFUSED,
    SECOND_PROXY_UID,
    SILENT,
    TENANT_GID,
    TENANT_UID,
    USERS,
    Dial,
    Landed,
    address,
    decide,
    expected,
    site,
)
from namespaces import set_sysctl, tell

from tidegate.enforce.redirect.rules import LEAVE, Hook, lines_of_family, rules_for
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    Inbound,
    Mark,
    Mode,
    Outbound,
    Policy,
    Proxy,
    UserPorts,
)

BIG = ports(*range(2, 2002, 2))

CASES = {
    "default": DEFAULT,
    "own ports": Policy(
        inbound=Inbound(port=OTHER_INBOUND), outbound=Outbound(port=OTHER_OUTBOUND)
    ),
    "IPv4 only": Policy(families=(Family.IPV4,)),
    "IPv6 only": Policy(families=(Family.IPV6,)),
    "no family": Policy(families=()),
    "inbound off": Policy(inbound=Inbound(enabled=False)),
    "outbound off": Policy(outbound=Outbound(enabled=False)),
    "everything off": Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False)),
    "drop invalid": Policy(drop_invalid=True),
    # The sidecar's own traffic.
    "two proxy users": Policy(proxy=Proxy(uids=(PROXY_UID, SECOND_PROXY_UID))),
    "another proxy user": Policy(proxy=Proxy(uids=(SECOND_PROXY_UID,))),
    "proxy is root": Policy(proxy=Proxy(uids=(0,))),
    "proxy by group": Policy(proxy=Proxy(uids=(), gids=(PROXY_GID,))),
    "proxy by mark": Policy(proxy=Proxy(uids=(), mark=Mark(MARK))),
    "proxy by some bits of a mark": Policy(proxy=Proxy(uids=(), mark=Mark(MARK, 0xFFFF))),
    "proxy by cgroup": Policy(proxy=Proxy(uids=(), cgroup=f"{CGROUP}/sidecar")),
    "proxy by cgroup at the top": Policy(proxy=Proxy(uids=(), cgroup=CGROUP)),
    "proxy by everything": Policy(
        proxy=Proxy(
            uids=(PROXY_UID, SECOND_PROXY_UID),
            gids=(PROXY_GID,),
            mark=Mark(MARK),
            cgroup=f"{CGROUP}/sidecar",
        )
    ),
    "self-calls to the listener": Policy(proxy=Proxy(self_calls_inbound=True)),
    "self-calls of two users": Policy(
        proxy=Proxy(uids=(PROXY_UID, SECOND_PROXY_UID), self_calls_inbound=True)
    ),
    "self-calls by everything": Policy(
        proxy=Proxy(
            uids=(PROXY_UID,),
            gids=(PROXY_GID,),
            mark=Mark(MARK, 0xFFFF),
            cgroup=f"{CGROUP}/sidecar",
            self_calls_inbound=True,
        )
    ),
    "self-calls with inbound off": Policy(
        proxy=Proxy(self_calls_inbound=True), inbound=Inbound(enabled=False)
    ),
    "self-calls in IPv6 only": Policy(
        proxy=Proxy(self_calls_inbound=True), families=(Family.IPV6,)
    ),
    # Inbound.
    "inbound port excluded": Policy(inbound=Inbound(exclude_ports=ports(8080))),
    "inbound ranges excluded": Policy(
        inbound=Inbound(exclude_ports=ports((1, 442), (5000, 5431), (5433, 8080)))
    ),
    "a thousand inbound ports excluded": Policy(inbound=Inbound(exclude_ports=(*BIG, *ports(443)))),
    "only one inbound port": Policy(inbound=Inbound(include_ports=ports(8080))),
    "only some inbound ports but one": Policy(
        inbound=Inbound(include_ports=ports((8000, 9999), 443), exclude_ports=ports(8081))
    ),
    "no inbound port": Policy(inbound=Inbound(include_ports=())),
    "inbound source excluded": Policy(inbound=Inbound(exclude_cidrs=STRANGER)),
    "inbound source networks excluded": Policy(
        inbound=Inbound(
            exclude_cidrs=("192.0.2.0/24", "10.77.0.8/29", "2001:db8::/33", "fd79::/16")
        )
    ),
    "inbound source excluded in one family": Policy(inbound=Inbound(exclude_cidrs=STRANGER[:1])),
    "all inbound sources excluded": Policy(inbound=Inbound(exclude_cidrs=("0.0.0.0/0", "::/0"))),
    "inbound interface excluded": Policy(inbound=Inbound(exclude_interfaces=("net1",))),
    "inbound interfaces excluded": Policy(
        inbound=Inbound(exclude_interfaces=("net1", "guest0", "none9"))
    ),
    "only one inbound interface": Policy(inbound=Inbound(include_interfaces=("net1",))),
    "only two inbound interfaces": Policy(
        inbound=Inbound(include_interfaces=("eth0", "net1"), exclude_interfaces=("guest0",))
    ),
    "no inbound interface": Policy(inbound=Inbound(include_interfaces=())),
    "probes of the node": Policy(inbound=Inbound(direct_probes=True, node_addresses=PEER)),
    "probes of the node not asked for": Policy(inbound=Inbound(node_addresses=PEER)),
    "probes of the node in one family": Policy(
        inbound=Inbound(direct_probes=True, node_addresses=PEER[1:])
    ),
    # Outbound.
    "outbound port excluded": Policy(outbound=Outbound(exclude_ports=ports(5432))),
    "outbound ranges excluded": Policy(
        outbound=Outbound(exclude_ports=ports((1, 442), (5432, 8080), 9090))
    ),
    "a thousand outbound ports excluded": Policy(
        outbound=Outbound(exclude_ports=(*BIG, *ports(8081)))
    ),
    "all outbound ports excluded": Policy(
        outbound=Outbound(exclude_ports=ports((1, 15000), (15002, 19999), (20001, 65535)))
    ),
    "outbound networks excluded": Policy(outbound=Outbound(exclude_cidrs=FAR)),
    "one outbound address excluded": Policy(outbound=Outbound(exclude_cidrs=PEER)),
    "outbound networks of one family excluded": Policy(outbound=Outbound(exclude_cidrs=FAR[:1])),
    "overlapping networks excluded": Policy(
        outbound=Outbound(exclude_cidrs=("10.0.0.0/8", "10.77.0.0/16", "fd00::/8", "fd77::/64"))
    ),
    "everywhere excluded": Policy(outbound=Outbound(exclude_cidrs=("0.0.0.0/0", "::/0"))),
    "a user excluded": Policy(outbound=Outbound(exclude_uids=ids(TENANT_UID))),
    "users excluded": Policy(outbound=Outbound(exclude_uids=ids((0, 999), (1999, 2010)))),
    "all users excluded": Policy(outbound=Outbound(exclude_uids=ids((0, 2**32 - 2)))),
    "a group excluded": Policy(outbound=Outbound(exclude_gids=ids(TENANT_GID))),
    "groups excluded": Policy(outbound=Outbound(exclude_gids=ids(0, (2990, 3010)))),
    "ports excluded for a user": Policy(
        outbound=Outbound(exclude_user_ports=(UserPorts((TCP,), ports(5432), ids((1001, 1009))),))
    ),
    "ports excluded for several users": Policy(
        outbound=Outbound(
            exclude_user_ports=(
                UserPorts((TCP, UDP), ports((1, 8080)), ids(1005)),
                UserPorts((UDP,), ports((1, 65535)), ids(1000)),
                UserPorts((TCP,), ports(443, (9000, 9100)), ids(0, TENANT_UID)),
            )
        )
    ),
    "outbound interface excluded": Policy(outbound=Outbound(exclude_interfaces=("net1",))),
    "only one outbound interface": Policy(outbound=Outbound(include_interfaces=("net1",))),
    "no outbound interface": Policy(outbound=Outbound(include_interfaces=())),
    "only some outbound networks": Policy(outbound=Outbound(include_cidrs=FAR)),
    "only IPv6 networks": Policy(outbound=Outbound(include_cidrs=("2000::/3", "fd77::/16"))),
    "no outbound network": Policy(outbound=Outbound(include_cidrs=())),
    "no outbound network but ports": Policy(
        outbound=Outbound(include_cidrs=(), include_ports=ports(8080, (9000, 9999)))
    ),
    "some networks and ports, others not": Policy(
        outbound=Outbound(
            include_cidrs=FAR,
            include_ports=ports(8080),
            exclude_ports=ports(5432),
            exclude_cidrs=("198.51.100.0/24", "2001:db8:2::/48"),
        )
    ),
    # DNS.
    "DNS": Policy(dns=Dns(enabled=True)),
    "DNS in IPv4 only": Policy(dns=Dns(enabled=True, addresses=("127.0.0.1",))),
    "DNS of one resolver": Policy(dns=Dns(enabled=True, resolvers=("10.77.0.1", "fd77::1"))),
    "DNS of a resolver on loopback": Policy(
        dns=Dns(enabled=True, resolvers=("127.0.0.53",), addresses=("127.0.0.1",))
    ),
    "DNS to another host": Policy(
        dns=Dns(enabled=True, addresses=("198.51.100.10", "2001:db8:2::10"), port=53)
    ),
    "DNS to another host's port": Policy(
        dns=Dns(enabled=True, addresses=("10.77.0.1", "fd77::1"), port=DNS_PROXY)
    ),
    "DNS of one resolver to another host": Policy(
        dns=Dns(
            enabled=True,
            resolvers=("192.0.2.10", "127.0.0.53", "2001:db8:1::10"),
            addresses=("10.77.0.1", "fd77::1"),
            port=53,
        )
    ),
    "DNS alone": Policy(
        inbound=Inbound(enabled=False), outbound=Outbound(enabled=False), dns=Dns(enabled=True)
    ),
    "DNS in a family that is off": Policy(dns=Dns(enabled=True), families=(Family.IPV6,)),
    "DNS with its port excluded": Policy(
        dns=Dns(enabled=True), outbound=Outbound(exclude_ports=ports(53))
    ),
    "DNS with a user excluded": Policy(
        dns=Dns(enabled=True),
        outbound=Outbound(exclude_uids=ids(TENANT_UID), exclude_gids=ids(TENANT_GID)),
    ),
    "DNS with a resolver's network excluded": Policy(
        dns=Dns(enabled=True), outbound=Outbound(exclude_cidrs=FAR)
    ),
    "DNS with ports excluded for a user": Policy(
        dns=Dns(enabled=True),
        outbound=Outbound(
            exclude_user_ports=(
                UserPorts((UDP,), ports(53), ids(1005)),
                UserPorts((TCP,), ports(53), ids(TENANT_UID)),
            )
        ),
    ),
    "DNS with an interface excluded": Policy(
        dns=Dns(enabled=True), outbound=Outbound(exclude_interfaces=("net1",))
    ),
    "DNS with nothing else included": Policy(
        dns=Dns(enabled=True), outbound=Outbound(include_cidrs=())
    ),
    "DNS with every kind of proxy": Policy(
        dns=Dns(enabled=True),
        proxy=Proxy(
            uids=(PROXY_UID,),
            gids=(PROXY_GID,),
            mark=Mark(MARK, 0xFFFF),
            cgroup=f"{CGROUP}/sidecar",
            self_calls_inbound=True,
        ),
    ),
    "all at once": Policy(
        proxy=Proxy(
            uids=(PROXY_UID, SECOND_PROXY_UID),
            gids=(PROXY_GID,),
            mark=Mark(MARK),
            cgroup=f"{CGROUP}/sidecar",
            self_calls_inbound=True,
        ),
        inbound=Inbound(
            include_ports=ports((5000, 9999)),
            exclude_ports=ports(8081),
            exclude_cidrs=STRANGER,
            include_interfaces=("eth0", "guest0"),
            exclude_interfaces=("net1",),
            direct_probes=True,
            node_addresses=("192.0.2.10/32", "2001:db8:1::10/128"),
        ),
        outbound=Outbound(
            include_cidrs=("10.0.0.0/8", "fd00::/8", "192.0.2.0/24"),
            include_ports=ports(9090),
            exclude_ports=ports(5432),
            exclude_cidrs=("10.77.0.9/32", "fd77::9/128"),
            exclude_uids=ids(TENANT_UID),
            exclude_gids=ids(TENANT_GID),
            exclude_user_ports=(UserPorts((TCP,), ports(8080), ids(1005)),),
            include_interfaces=("eth0",),
            exclude_interfaces=("guest0",),
        ),
        dns=Dns(enabled=True, resolvers=("10.77.0.1", "fd77::1", "127.0.0.53")),
        drop_invalid=True,
    ),
}


def outbound_dials():
    for user in USERS:
        yield Dial("pod", "peer", 8080, user)
        yield Dial("pod", "pod", 8080, user)
    for port in (443, 5432, 8081, 9090, OUTBOUND, INBOUND, NO_SERVER):
        yield Dial("pod", "peer", port)
    for to in ("far", "farther", "peer-net1", "metadata", "link-local-peer", "stranger", "guest"):
        yield Dial("pod", to, 8080)
    for to, port in (("far", 5432), ("farther", 5432), ("peer-net1", 5432)):
        yield Dial("pod", to, port)
    for to in ("loopback", "loopback-3", "pod-net1"):
        yield Dial("pod", to, 8080)
        yield Dial("pod", to, 8080, "proxy")
    for port in (OUTBOUND, INBOUND, OTHER_INBOUND):
        yield Dial("pod", "pod", port)
        yield Dial("pod", "pod", port, "proxy")
    yield Dial("pod", "loopback", INBOUND, "proxy")
    yield Dial("pod", "loopback", OUTBOUND)
    yield Dial("pod", "pod", 8080, "proxy", source="own-call")
    yield Dial("pod", "pod", 8080, "proxy", source="loopback")
    yield Dial("pod", "peer", 8080, source="pod-net1")
    for to in ("peer", "pod", "loopback", "far", "loopback-3"):
        yield Dial("pod", to, 8080, mapped=True)
    yield Dial("pod", "peer", 8080, "proxy", mapped=True)
    yield Dial("pod", "peer", 5432, "clerk")
    yield Dial("pod", "peer", 443, "tenant")
    for port in (8080, 8081, 9090):
        yield Dial("pod", "peer", port, shares="source port")


def dns_dials():
    for protocol in (UDP, TCP):
        for user in ("app", "proxy", "tenant", "tenant-group", "clerk", "marked", "in-cgroup"):
            yield Dial("pod", "peer", 53, user, protocol)
        for to in ("far", "peer-net1", "pod", "loopback-53", "loopback", "link-local-peer"):
            yield Dial("pod", to, 53, protocol=protocol)
        yield Dial("pod", "peer", 53, protocol=protocol, mapped=True)
    yield Dial("pod", "peer", DNS_PROXY, protocol=UDP)
    yield Dial("peer", "pod", 53, protocol=UDP)


def inbound_dials():
    for port in (53, *APPS, OUTBOUND, INBOUND, OTHER_OUTBOUND, OTHER_INBOUND, NO_SERVER):
        yield Dial("peer", "pod", port)
    for source, port in product(("stranger", "far"), (8080, 8081, OUTBOUND, INBOUND)):
        yield Dial("peer", "pod", port, source=source)
    for to, port in product(("pod-net1", "pod-bare0", "link-local-pod"), (8080, OUTBOUND, INBOUND)):
        yield Dial("peer", to, port)
    for port in (8080, OUTBOUND):
        yield Dial("guest", "pod-guest0", port)
        yield Dial("guest", "pod", port)
        yield Dial("guest", "peer", port)
        yield Dial("peer", "guest", port)
    for port in (8080, 8081, 9090):
        yield Dial("peer", "pod", port, shares="source port")


BATTERY = (*outbound_dials(), *dns_dials(), *inbound_dials())
"""Every connection that is opened in every cell."""

OLDER = (
    Dial("pod", "peer", 8080),
    Dial("pod", "far", 53),
    Dial("pod", "pod", 8080),
    Dial("peer", "pod", 8080),
    Dial("peer", "pod", OUTBOUND),
)
"""Connections that are open before the rules come."""

BY_HAND = {
    "default": {
        "app to peer:8080": f"pod:{OUTBOUND}",
        "root to peer:8080": f"pod:{OUTBOUND}",
        "proxy to peer:8080": PEER_APP,
        "second-proxy to peer:8080": f"pod:{OUTBOUND}",
        "app to peer:7": f"pod:{OUTBOUND}",
        "app to peer:20000": f"pod:{OUTBOUND}",
        "app to peer:15001": f"pod:{OUTBOUND}",
        "app to metadata:8080": f"pod:{OUTBOUND}",
        "app to link-local-peer:8080": PEER_APP,
        "app to pod:8080": "pod:8080",
        "app to pod:15001": f"pod:{OUTBOUND}",
        "proxy to pod:8080": "pod:8080",
        "proxy to pod:20000": INTO,
        "app to loopback:8080": "pod:8080",
        "app to loopback-3:8080": "pod:8080",
        "app to peer:8080 mapped": f"pod:{OUTBOUND}",
        "app to loopback:8080 mapped": "pod:8080",
        "app to peer:53 udp": "peer:53",
        "app to peer:53": f"pod:{OUTBOUND}",
        "app to peer:9090 sharing source port": f"pod:{OUTBOUND}",
        "peer to pod:8080": INTO,
        "peer to pod:7": INTO,
        "peer to pod:15001": INTO,
        "peer to pod:20000": INTO,
        "peer to pod:53 udp": "pod:53",
        "peer to pod-net1:8080": INTO,
        "peer to pod-bare0:8080": INTO,
        "peer to pod-bare0:15001": INTO,
        "peer to link-local-pod:8080": INTO,
        "peer to pod:9090 sharing source port": INTO,
        "guest to peer:8080": PEER_APP,
        "guest to peer:15001": "peer:15001",
        "guest to pod:8080": INTO,
        "peer to guest:8080": "guest:8080",
    },
    "inbound off": {
        "peer to pod:8080": "pod:8080",
        "peer to pod:15001": INTO,
        "app to peer:8080": f"pod:{OUTBOUND}",
    },
    "outbound off": {
        "app to peer:8080": PEER_APP,
        "peer to pod:8080": INTO,
        "peer to pod:15001": INTO,
    },
    "everything off": {"peer to pod:15001": "pod:15001", "app to peer:7": REFUSED},
    "proxy by some bits of a mark": {
        "marked to peer:8080": PEER_APP,
        "marked-more to peer:8080": PEER_APP,
        "proxy to peer:8080": f"pod:{OUTBOUND}",
    },
    "proxy by mark": {"marked-more to peer:8080": f"pod:{OUTBOUND}"},
    "proxy by cgroup": {
        "in-cgroup to peer:8080": PEER_APP,
        "below-cgroup to peer:8080": PEER_APP,
        "beside-cgroup to peer:8080": f"pod:{OUTBOUND}",
        "app to peer:8080": f"pod:{OUTBOUND}",
    },
    "self-calls of two users": {
        "proxy to pod:8080": INTO,
        "second-proxy to pod:8080": INTO,
        "app to pod:8080": "pod:8080",
        "proxy to loopback:8080": "pod:8080",
        "proxy to pod:8080 from own-call": "pod:8080",
        "proxy to pod-net1:8080": INTO,
        "proxy to peer:8080": PEER_APP,
    },
    "inbound port excluded": {"peer to pod:8080": "pod:8080", "peer to pod:8081": INTO},
    "only one inbound port": {
        "peer to pod:8080": INTO,
        "peer to pod:8081": "pod:8081",
        "peer to pod:15001": INTO,
    },
    "inbound source excluded": {
        "peer to pod:8080 from stranger": "pod:8080",
        "peer to pod:15001 from stranger": INTO,
        "peer to pod:8080": INTO,
    },
    "inbound interface excluded": {
        "peer to pod-net1:8080": "pod:8080",
        "peer to pod-net1:15001": INTO,
        "peer to pod:8080": INTO,
    },
    "probes of the node": {
        "peer to pod:8080": "pod:8080",
        "peer to pod:15001": INTO,
        "peer to pod:8080 from stranger": INTO,
    },
    "outbound ranges excluded": {
        "app to peer:8080": PEER_APP,
        "app to peer:8081": f"pod:{OUTBOUND}",
        "app to peer:7": REFUSED,
    },
    "outbound networks excluded": {
        "app to far:8080": PEER_APP,
        "app to far:8080 mapped": PEER_APP,
        "app to farther:8080": f"pod:{OUTBOUND}",
    },
    "ports excluded for a user": {
        "clerk to peer:5432": "peer:5432",
        "app to peer:5432": f"pod:{OUTBOUND}",
        "clerk to peer:8080": f"pod:{OUTBOUND}",
    },
    "no outbound network but ports": {
        "app to peer:8080": f"pod:{OUTBOUND}",
        "app to peer:8081": "peer:8081",
    },
    "DNS": {
        "app to peer:53 udp": f"pod:{DNS_PROXY}",
        "app to peer:53": f"pod:{DNS_PROXY}",
        "app to loopback-53:53 udp": f"pod:{DNS_PROXY}",
        "app to pod:53 udp": f"pod:{DNS_PROXY}",
        "proxy to peer:53 udp": "peer:53",
        "proxy to peer:53": "peer:53",
        "app to link-local-peer:53 udp": "peer:53",
        "app to peer:8600 udp": "peer:8600",
        "app to peer:8080": f"pod:{OUTBOUND}",
    },
    "DNS with its port excluded": {"app to peer:53 udp": "peer:53", "app to peer:53": "peer:53"},
    "DNS with a user excluded": {
        "tenant to peer:53 udp": "peer:53",
        "tenant-group to peer:53": "peer:53",
        "app to peer:53 udp": f"pod:{DNS_PROXY}",
    },
    "DNS with a resolver's network excluded": {
        "app to far:53 udp": "peer:53",
        "app to peer:53 udp": f"pod:{DNS_PROXY}",
    },
    "DNS of one resolver": {
        "app to peer:53 udp": f"pod:{DNS_PROXY}",
        "app to far:53 udp": "peer:53",
        "app to far:53": f"pod:{OUTBOUND}",
    },
    "DNS to another host's port": {
        "app to far:53 udp": "peer:8600",
        "app to far:53": "peer:8600",
        "app to loopback-53:53 udp": "pod:53",
    },
}
"""What key connections do, written down by a person, for both families and modes where the addresses exist."""


class Measured:
    """What became of the connections of every cell, for the summary and the comparison of backends."""

    def __init__(self):
        self.cells = {}
        self.connections = 0
        self.inapplicable = []


@pytest.fixture(scope="module")
def measured():
    return Measured()


@pytest.fixture(scope="module")
def lab():
    with site() as made:
        yield made


@pytest.fixture(params=BACKENDS)
def backend(request, lab):
    made = BACKENDS[request.param]()
    yield made
    made.remove(lab.pod)


def with_client_port(want, landed, mode, dial):
    """Translation may change the port of a client that uses it towards several ports; tproxy never does."""
    kept = want.port == dial.port or (mode is Mode.TPROXY and dial.at != "pod")
    port = want.client[1] if kept else landed.client[1]
    return Landed(want.server, want.port, want.original, (want.client[0], port))


def explained(rules, hook, attempts):
    """The same, by what explain says: of all of them, and without a family of which everything is left alone."""
    names = {line.name for line in rules.lines(hook)} - UNCOUNTED
    decided = [
        (attempt.version, decision.line)
        for attempt in attempts
        if (attempt.dial.at == "pod") is (hook is Hook.OUTBOUND)
        and (decision := decide(rules, attempt.dial, attempt.version)).line in names
    ]
    touched = {
        version
        for version, family in ((4, Family.IPV4), (6, Family.IPV6))
        if any(line.action != LEAVE for line in lines_of_family(rules.lines(hook), family))
    }
    return (
        Counter(line for _, line in decided),
        Counter(line for version, line in decided if version in touched),
    )


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("case", CASES)
def test_every_connection_lands_where_explain_says(lab, measured, backend, case, mode):
    policy = msgspec.structs.replace(CASES[case], mode=mode)
    rules = rules_for(policy)
    if mode is Mode.TPROXY and not rules.lines(Hook.INBOUND_TPROXY):
        measured.inapplicable.append(f"{case}, {backend.name.value}, {mode.value}")
        pytest.skip("this policy redirects nothing inbound, so the mode makes no difference")
    backend.remove(lab.pod)
    lab.prepare(mode)
    older = lab.open(dials_of(OLDER))
    backend.apply(lab.pod, rules)
    assert backend.check(lab.pod, rules) == ()
    before = counts(backend, lab.pod)
    attempts = lab.open(dials_of(BATTERY))
    grown = {at: n - before.get(at, 0) for at, n in counts(backend, lab.pod).items()}

    wrong = []
    for attempt in attempts:
        want = expected(rules, attempt.dial, attempt.version, attempt.client)
        if attempt.dial.shares and isinstance(want, Landed) and isinstance(attempt.outcome, Landed):
            want = with_client_port(want, attempt.outcome, mode, attempt.dial)
        if attempt.outcome != want:
            decision = decide(rules, attempt.dial, attempt.version)
            wrong.append(
                f"IPv{attempt.version} {attempt.dial.name}: landed {attempt.outcome}, "
                f"should {want} by {decision and decision.line}"
            )
        cell = (case, mode, attempt.dial.name, attempt.version)
        measured.cells.setdefault(cell, {})[backend.name.value] = shown(attempt.outcome)
    measured.connections += len(attempts) + len(older)
    assert wrong == []

    for attempt in attempts:
        by_hand = BY_HAND.get(case, {}).get(attempt.dial.name)
        if by_hand is not None:
            assert shown(attempt.outcome) == by_hand, (attempt.version, attempt.dial.name)

    assert decided_by(grown, Hook.OUTBOUND) in explained(rules, Hook.OUTBOUND, attempts)
    assert decided_by(grown, Hook.INBOUND) in explained(rules, Hook.INBOUND, attempts)
    assert [attempt.dial.name for attempt in older if not lab.echoes(attempt)] == []
    lab.hang_up(attempts)
    lab.hang_up(older)


def test_what_is_written_by_hand_names_cases_and_connections_that_exist():
    assert set(BY_HAND) <= set(CASES)
    assert {name for rows in BY_HAND.values() for name in rows} <= {d.name for d in BATTERY}
    assert len({dial.name for dial in BATTERY}) == len(BATTERY)


@pytest.mark.parametrize("mode", Mode)
def test_a_dead_sidecar_is_never_gone_around(lab, backend, mode):
    lab.prepare(mode)
    backend.apply(lab.pod, rules_for(Policy(mode=mode)))
    dials = [Dial("peer", "pod", 8080), Dial("peer", "pod", OUTBOUND), Dial("pod", "peer", 8080)]
    for port in (INBOUND, OUTBOUND):
        lab.stop_listening("pod", port)
    try:
        attempts = lab.open(dials_of(dials), deadline_s=1.0)
    finally:
        for port in (INBOUND, OUTBOUND):
            lab.listen("pod", port)
    inbound = REFUSED if mode is Mode.REDIRECT else SILENT
    assert [a.outcome for a in attempts] == [inbound] * 4 + [REFUSED] * 2
    lab.hang_up(attempts)


def test_with_tproxy_a_listener_that_is_not_transparent_gets_nothing_nor_does_the_application(
    lab, backend
):
    lab.prepare(Mode.REDIRECT)
    backend.apply(lab.pod, rules_for(Policy(mode=Mode.TPROXY)))
    attempts = lab.open(dials_of([Dial("peer", "pod", 8080)]), deadline_s=1.0)
    assert [attempt.outcome for attempt in attempts] == [SILENT, SILENT]
    lab.hang_up(attempts)


def test_with_tproxy_a_handshake_that_the_listener_keeps_no_state_of_is_completed(lab, backend):
    rules = rules_for(Policy(mode=Mode.TPROXY))
    lab.prepare(Mode.TPROXY)
    backend.apply(lab.pod, rules)
    set_sysctl(lab.pod, "net/ipv4/tcp_syncookies", "2")
    try:
        attempts = lab.open(dials_of([d for d in inbound_dials() if d.protocol is TCP]))
    finally:
        set_sysctl(lab.pod, "net/ipv4/tcp_syncookies", "1")
    for attempt in attempts:
        want = expected(rules, attempt.dial, attempt.version, attempt.client)
        assert attempt.outcome == want, attempt.dial.name
    lab.hang_up(attempts)


REAPPLIED = {
    "everything excluded": Policy(
        inbound=Inbound(exclude_cidrs=("0.0.0.0/0", "::/0")),
        outbound=Outbound(exclude_cidrs=("0.0.0.0/0", "::/0")),
    ),
    "DNS": Policy(dns=Dns(enabled=True)),
    "another user": Policy(proxy=Proxy(uids=(1000,))),
    "inbound off": Policy(inbound=Inbound(enabled=False)),
    "outbound off": Policy(outbound=Outbound(enabled=False)),
    "drop invalid": Policy(drop_invalid=True),
    "the other mode": DEFAULT,
    "default": DEFAULT,
}


@pytest.mark.parametrize("mode", Mode)
def test_open_connections_outlive_every_change_of_the_policy(lab, backend, mode):
    other = next(one for one in Mode if one is not mode)
    lab.prepare(mode)
    attempts = lab.open(dials_of(OLDER))
    backend.apply(lab.pod, rules_for(Policy(mode=mode)))
    attempts += lab.open(dials_of(OLDER))
    for name, policy in REAPPLIED.items():
        becomes = other if name == "the other mode" else mode
        if name == "outbound off" and mode is Mode.TPROXY:
            continue  # Nothing is translated any more: docs/redirect.md, limits.
        backend.apply(lab.pod, rules_for(msgspec.structs.replace(policy, mode=becomes)))
        broken = [f"IPv{a.version} {a.dial.name}" for a in attempts if not lab.echoes(a)]
        assert broken == [], name
        lab.prepare(becomes)
        attempts += lab.open(dials_of(OLDER))
        lab.prepare(mode)
    backend.apply(lab.pod, rules_for(Policy(mode=mode, families=(Family.IPV6,))))
    broken = [a.dial.name for a in attempts if a.version == 6 and not lab.echoes(a)]
    assert broken == [], "IPv4 off"
    lab.hang_up(attempts)


@pytest.mark.parametrize("mode", Mode)
def test_open_connections_outlive_a_change_of_the_backend(lab, backend, mode):
    (other,) = [made() for name, made in BACKENDS.items() if name != backend.name.value]
    rules = rules_for(Policy(mode=mode, dns=Dns(enabled=True)))
    lab.prepare(mode)
    backend.apply(lab.pod, rules)
    attempts = lab.open(dials_of(OLDER))
    try:
        other.apply(lab.pod, rules)
        attempts += lab.open(dials_of(OLDER))
        backend.withdraw(lab.pod)
        attempts += lab.open(dials_of(OLDER))
        for attempt in attempts:
            want = expected(rules, attempt.dial, attempt.version, attempt.client)
            assert attempt.outcome == want, attempt.dial.name
            assert lab.echoes(attempt), attempt.dial.name
    finally:
        other.remove(lab.pod)
    lab.hang_up(attempts)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("first", ["app", "proxy"])
def test_application_and_proxy_may_send_the_same_query_from_the_same_port_at_once(
    lab, backend, version, first
):
    backend.apply(lab.pod, rules_for(Policy(dns=Dns(enabled=True))))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    here, resolver = address("pod", version), address("peer", version)
    order = ["app", "proxy"] if first == "app" else ["proxy", "app"]
    for port in range(20_100, 20_110):
        with ExitStack() as stack:
            asking = {}
            for user in order:
                (one,) = lab.sockets("pod", [(family, socket.SOCK_DGRAM, USERS[user].uid, 0)])
                asking[user] = stack.enter_context(one)
                one.setblocking(False)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind((here, port))
                one.connect((resolver, 53))
            for user in order:
                asking[user].send(f"{user} asks".encode())
            answers = {}

            def answered(asking=asking, answers=answers):
                # Which of two sockets with the same addresses and ports gets an answer is the kernel's choice.
                for one in asking.values():
                    with suppress(BlockingIOError):
                        server, port, _, client, _, question = json.loads(one.recv(512))
                        answers[question] = (server, port, client[1])
                return len(answers) == len(asking)

            lab.serve_until(answered, "both answers")
            assert answers == {
                "app asks": ("pod", DNS_PROXY, port),
                "proxy asks": ("peer", 53, port),
            }


def test_a_socket_that_goes_on_asking_is_answered_as_the_policy_says_at_that_time(lab, backend):
    dials = [
        Dial("pod", to, 53, user, UDP)
        for to, user in product(("peer", "far", "loopback-53"), ("app", "tenant"))
    ]
    cases = ["default", "DNS", "DNS with its port excluded", "DNS with a user excluded"]
    cases += ["DNS to another host's port", "DNS with a resolver's network excluded", "DNS"]
    cases += ["DNS of one resolver", "DNS to another host", "default", "DNS alone"]
    attempts = lab.open(dials_of(dials))
    for case in cases:
        rules = rules_for(CASES[case])
        backend.apply(lab.pod, rules)
        for attempt in attempts:
            attempt.ask_again()
        waiting = list(attempts)

        def answered(waiting=waiting):
            waiting[:] = [attempt for attempt in waiting if not attempt.read()]
            return not waiting

        lab.serve_until(answered, f"answers with {case}")
        for attempt in attempts:
            want = expected(rules, attempt.dial, attempt.version, attempt.client)
            assert shown(attempt.outcome) == shown(want), (case, attempt.dial.name)
    lab.hang_up(attempts)


def test_the_proxy_may_use_a_port_again_from_which_the_application_has_just_asked(lab, backend):
    backend.apply(lab.pod, rules_for(Policy(dns=Dns(enabled=True))))
    for protocol, number in product((UDP, TCP), range(5)):
        for user, where in (("app", f"pod:{DNS_PROXY}"), ("proxy", "peer:53")):
            dials = dials_of([Dial("pod", "peer", 53, user, protocol)])
            attempts = lab.open(dials, source_port=20_200 + number)
            assert [shown(attempt.outcome) for attempt in attempts] == [where, where]
            lab.hang_up(attempts)


def test_no_cell_differs_between_backends(measured, request):
    """Comes last: it compares what the cells above have measured, and says how much that was."""
    differing = [
        f"{case}, {mode.value}, IPv{version}, {dial}: {outcomes}"
        for (case, mode, dial, version), outcomes in measured.cells.items()
        if len(set(outcomes.values())) > 1
    ]
    cells = {
        (case, mode, version, name)
        for (case, mode, _, version), outcomes in measured.cells.items()
        for name in outcomes
    }
    tell(
        request.config,
        f"behaviour matrix: {len({case for case, *_ in cells})} policies, {len(cells)} cells "
        f"(policies x backends x families x modes), {measured.connections} connections",
        *(
            f"not applicable, nothing inbound is redirected: {name}"
            for name in sorted(measured.inapplicable)
        ),
    )
    assert differing == []
