"""The decision lists and their evaluator, and that docs/redirect.md shows the lists as they are."""

import itertools
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from tidegate.enforce.redirect.rules import (
    DNS_ZONE,
    LEAVE,
    ByUser,
    Connection,
    Decision,
    Drop,
    HandedOver,
    Hook,
    Invalid,
    Not,
    OfFamily,
    OfKnownSocket,
    OfProtocol,
    OnInterface,
    Opening,
    Redirect,
    Rules,
    ToNetwork,
    ToPort,
    Tproxy,
    Tracked,
    Translate,
    Zone,
    explain,
    lines_of_family,
    rules_for,
)
from tidegate.errors import InputErrors
from tidegate.intent.policy import (
    DEFAULT,
    Dns,
    Family,
    IdRange,
    Inbound,
    Mark,
    Mode,
    Outbound,
    Policy,
    PortRange,
    Protocol,
    Proxy,
    UserPorts,
)
from tidegate.model import Direction

DOCS = Path(__file__).parents[2] / "docs" / "redirect.md"
OUT, IN = Direction.OUTBOUND, Direction.INBOUND
TCP, UDP = Protocol.TCP, Protocol.UDP


def ports(*items):
    return tuple(
        PortRange(*item) if isinstance(item, tuple) else PortRange(item, item) for item in items
    )


def ids(*items):
    return tuple(
        IdRange(*item) if isinstance(item, tuple) else IdRange(item, item) for item in items
    )


EXCLUDING = Policy(
    inbound=Inbound(
        exclude_ports=ports(9100, (9200, 9300)),
        exclude_cidrs=("203.0.113.0/24", "2001:db8:f::/48"),
        exclude_interfaces=("net1", "net2"),
        direct_probes=True,
        node_addresses=("10.0.0.1/32", "fd00::1/128"),
    ),
    outbound=Outbound(
        exclude_ports=ports(5432),
        exclude_cidrs=("192.0.2.0/24", "2001:db8::/32"),
        exclude_uids=ids((1000, 1001)),
        exclude_gids=ids(50),
        exclude_user_ports=(UserPorts((TCP, UDP), ports(6379), ids((2000, 2009))),),
        exclude_interfaces=("net1",),
    ),
)
INCLUDING = Policy(
    inbound=Inbound(include_ports=ports(8080), include_interfaces=("eth0",)),
    outbound=Outbound(
        include_cidrs=("10.0.0.0/8", "fd00::/8"),
        include_ports=ports((9000, 9009)),
        include_interfaces=("eth0",),
    ),
)
NOTHING_INCLUDED = Policy(
    inbound=Inbound(include_interfaces=()), outbound=Outbound(include_interfaces=())
)
IPV4_ONLY = Policy(families=(Family.IPV4,))
PROXIES = Policy(
    proxy=Proxy(uids=(5995, 101), gids=(60,), mark=Mark(0x539, 0xFFFF), cgroup="pod1/sidecar")
)
SELF_CALLS = Policy(proxy=msgspec.structs.replace(PROXIES.proxy, self_calls_inbound=True))
DNS = Policy(dns=Dns(enabled=True))
DNS_TO_ELSEWHERE = Policy(dns=Dns(enabled=True, addresses=("10.96.0.10", "fd00::53"), port=53))
DNS_OF_ONE = Policy(dns=Dns(enabled=True, resolvers=("10.96.0.10",)))
DNS_EXCLUDING = Policy(
    dns=Dns(enabled=True),
    outbound=Outbound(
        exclude_ports=ports(53),
    ),
)
DNS_EXCLUDING_SOME = Policy(
    dns=Dns(enabled=True),
    outbound=Outbound(
        exclude_cidrs=("192.0.2.0/24",),
        exclude_uids=ids(1000),
        exclude_gids=ids(50),
        exclude_user_ports=(UserPorts((UDP,), ports(53), ids(2000)),),
        exclude_interfaces=("net1",),
    ),
)
DNS_ALONE = Policy(
    dns=Dns(enabled=True), inbound=Inbound(enabled=False), outbound=Outbound(enabled=False)
)
INBOUND_OFF = Policy(inbound=Inbound(enabled=False))
OUTBOUND_OFF = Policy(outbound=Outbound(enabled=False))
TPROXY = Policy(mode=Mode.TPROXY)

TO_OUT, TO_IN, TO_DNS = Redirect(15001), Redirect(20000), Translate("127.0.0.1", 8600)
LO = {"interface": "lo"}
BY_PROXY = {"interface": "lo", "uid": 101}


@pytest.mark.parametrize(
    ("policy", "direction", "destination", "port", "more", "line", "action"),
    [
        # Outbound, from top to bottom.
        (DEFAULT, OUT, "10.0.0.9", 53, {"protocol": UDP}, "other-protocol", LEAVE),
        (DNS, OUT, "10.0.0.9", 53, {"protocol": "icmp"}, "other-protocol", LEAVE),
        (DEFAULT, OUT, "10.0.0.9", 80, {"opening": False}, "older", LEAVE),
        (DNS, OUT, "10.0.0.9", 53, {"opening": False}, "older", LEAVE),
        (SELF_CALLS, OUT, "10.0.0.2", 80, BY_PROXY, "self-call-proxy-ipv4", TO_IN),
        (SELF_CALLS, OUT, "fd00::2", 80, BY_PROXY, "self-call-proxy-ipv6", TO_IN),
        (SELF_CALLS, OUT, "fd00::2", 80, {**LO, "gid": 60}, "self-call-proxy-group-ipv6", TO_IN),
        (SELF_CALLS, OUT, "10.0.0.2", 8, {**LO, "mark": 0x539}, "self-call-proxy-mark-ipv4", TO_IN),
        (
            SELF_CALLS, OUT, "10.0.0.2", 80, {**LO, "cgroup": "pod1/sidecar/w"},
            "self-call-proxy-cgroup-ipv4", TO_IN,
        ),
        (SELF_CALLS, OUT, "10.0.0.2", 20000, BY_PROXY, "proxy", LEAVE),
        (SELF_CALLS, OUT, "127.0.0.1", 80, BY_PROXY, "proxy", LEAVE),
        (SELF_CALLS, OUT, "::1", 80, BY_PROXY, "proxy", LEAVE),
        (SELF_CALLS, OUT, "::ffff:127.9.9.9", 80, BY_PROXY, "proxy", LEAVE),
        (SELF_CALLS, OUT, "10.0.0.2", 80, {**BY_PROXY, "source": "127.0.0.6"}, "proxy", LEAVE),
        (SELF_CALLS, OUT, "fd00::2", 80, {**BY_PROXY, "source": "::6"}, "proxy", LEAVE),
        (SELF_CALLS, OUT, "10.0.0.9", 80, {"uid": 101}, "proxy", LEAVE),
        (SELF_CALLS, OUT, "10.0.0.2", 80, {**LO, "uid": 1}, "own-address", LEAVE),
        (DEFAULT, OUT, "10.0.0.9", 80, {"uid": 5995}, "proxy", LEAVE),
        (DEFAULT, OUT, "10.0.0.2", 80, {"uid": 5995, **LO}, "proxy", LEAVE),
        (PROXIES, OUT, "10.0.0.9", 80, {"uid": 101}, "proxy", LEAVE),
        (PROXIES, OUT, "10.0.0.9", 80, {"uid": 102}, "to-outbound-listener", TO_OUT),
        (PROXIES, OUT, "10.0.0.9", 80, {"gid": 60}, "proxy-group", LEAVE),
        (PROXIES, OUT, "10.0.0.9", 80, {"mark": 0x10539}, "proxy-mark", LEAVE),
        (PROXIES, OUT, "10.0.0.9", 80, {"mark": 0x53A}, "to-outbound-listener", TO_OUT),
        (PROXIES, OUT, "10.0.0.9", 80, {"cgroup": "pod1/sidecar"}, "proxy-cgroup", LEAVE),
        (PROXIES, OUT, "10.0.0.9", 80, {"cgroup": "pod1/sidecar/a"}, "proxy-cgroup", LEAVE),
        (PROXIES, OUT, "10.0.0.9", 80, {"cgroup": "pod1/sidecar2"}, "to-outbound-listener", TO_OUT),
        (PROXIES, OUT, "10.0.0.9", 80, {"cgroup": "pod1"}, "to-outbound-listener", TO_OUT),
        (EXCLUDING, OUT, "10.0.0.9", 80, {"uid": 1001}, "excluded-uid", LEAVE),
        (EXCLUDING, OUT, "10.0.0.9", 80, {"gid": 50}, "excluded-gid", LEAVE),
        (EXCLUDING, OUT, "10.0.0.9", 6379, {"uid": 2009}, "excluded-user-port-1", LEAVE),
        (EXCLUDING, OUT, "10.0.0.9", 6380, {"uid": 2009}, "to-outbound-listener", TO_OUT),
        (EXCLUDING, OUT, "10.0.0.9", 6379, {"uid": 2010}, "to-outbound-listener", TO_OUT),
        (EXCLUDING, OUT, "10.0.0.9", 5432, {}, "excluded-port", LEAVE),
        (EXCLUDING, OUT, "10.0.0.9", 9100, {}, "to-outbound-listener", TO_OUT),
        (EXCLUDING, OUT, "192.0.2.255", 80, {}, "excluded-cidr-ipv4", LEAVE),
        (EXCLUDING, OUT, "::ffff:192.0.2.1", 80, {}, "excluded-cidr-ipv4", LEAVE),
        (EXCLUDING, OUT, "192.0.3.0", 80, {}, "to-outbound-listener", TO_OUT),
        (EXCLUDING, OUT, "2001:db8:ffff::1", 80, {}, "excluded-cidr-ipv6", LEAVE),
        (EXCLUDING, OUT, "10.0.0.9", 80, {"interface": "net1"}, "excluded-interface", LEAVE),
        (DNS, OUT, "10.0.0.9", 53, {"protocol": UDP}, "dns-ipv4", TO_DNS),
        (DNS, OUT, "10.0.0.9", 53, {}, "dns-ipv4", TO_DNS),
        (DNS, OUT, "fd00::9", 53, {"protocol": UDP}, "dns-ipv6", Translate("::1", 8600)),
        (DNS, OUT, "::ffff:10.0.0.9", 53, {"protocol": UDP}, "dns-ipv4", TO_DNS),
        (DNS, OUT, "127.0.0.53", 53, {**LO, "protocol": UDP}, "dns-ipv4", TO_DNS),
        (DNS, OUT, "10.0.0.9", 53, {"protocol": UDP, "uid": 5995}, "proxy", LEAVE),
        (DNS, OUT, "10.0.0.9", 54, {"protocol": UDP}, "not-tcp", LEAVE),
        (DNS_ALONE, OUT, "10.0.0.9", 53, {}, "dns-ipv4", TO_DNS),
        (DNS_ALONE, OUT, "10.0.0.9", 80, {}, None, LEAVE),
        (DNS_OF_ONE, OUT, "10.96.0.10", 53, {"protocol": UDP}, "dns-ipv4", TO_DNS),
        (DNS_OF_ONE, OUT, "10.96.0.11", 53, {"protocol": UDP}, "not-tcp", LEAVE),
        (DNS_OF_ONE, OUT, "10.96.0.11", 53, {}, "to-outbound-listener", TO_OUT),
        (DNS_OF_ONE, OUT, "fd00::9", 53, {"protocol": UDP}, "not-tcp", LEAVE),
        (DNS_EXCLUDING, OUT, "10.0.0.9", 53, {"protocol": UDP}, "excluded-port", LEAVE),
        (DNS_EXCLUDING, OUT, "10.0.0.9", 53, {}, "excluded-port", LEAVE),
        (DNS_EXCLUDING_SOME, OUT, "192.0.2.1", 53, {"protocol": UDP}, "excluded-cidr-ipv4", LEAVE),
        (DNS_EXCLUDING_SOME, OUT, "10.0.0.9", 53, {"uid": 1000}, "excluded-uid", LEAVE),
        (DNS_EXCLUDING_SOME, OUT, "10.0.0.9", 53, {"gid": 50}, "excluded-gid", LEAVE),
        (
            DNS_EXCLUDING_SOME, OUT, "10.0.0.9", 53, {"uid": 2000, "protocol": UDP},
            "excluded-user-port-1", LEAVE,
        ),
        (DNS_EXCLUDING_SOME, OUT, "10.0.0.9", 53, {"uid": 2000}, "dns-ipv4", TO_DNS),
        (
            DNS_EXCLUDING_SOME, OUT, "10.0.0.9", 53, {"interface": "net1", "protocol": UDP},
            "excluded-interface", LEAVE,
        ),
        (DEFAULT, OUT, "10.0.0.2", 80, LO, "own-address", LEAVE),
        (DEFAULT, OUT, "127.0.0.1", 80, LO, "own-address", LEAVE),
        (DEFAULT, OUT, "127.8.8.8", 80, {}, "loopback-ipv4", LEAVE),
        (DEFAULT, OUT, "::ffff:127.0.0.1", 80, {}, "loopback-ipv4", LEAVE),
        (DEFAULT, OUT, "::1", 80, {}, "loopback-ipv6", LEAVE),
        (
            DNS_TO_ELSEWHERE, OUT, "10.0.0.9", 53, {"protocol": UDP},
            "dns-ipv4", Translate("10.96.0.10", 53),
        ),
        (DNS_TO_ELSEWHERE, OUT, "fd00::9", 53, {}, "dns-ipv6", Translate("fd00::53", 53)),
        (DNS_TO_ELSEWHERE, OUT, "127.0.0.53", 53, {**LO, "protocol": UDP}, "own-address", LEAVE),
        (DEFAULT, OUT, "fe80::9", 80, {}, "link-local-ipv6", LEAVE),
        (DEFAULT, OUT, "fe80::9%eth0", 80, {}, "link-local-ipv6", LEAVE),
        (DNS, OUT, "fe80::1%eth0", 53, {"protocol": UDP}, "link-local-ipv6", LEAVE),
        (SELF_CALLS, OUT, "fe80::2", 80, BY_PROXY, "link-local-ipv6", LEAVE),
        (DEFAULT, OUT, "169.254.169.254", 80, {}, "to-outbound-listener", TO_OUT),
        (INCLUDING, OUT, "10.0.0.9", 80, {"interface": "net1"}, "not-included-interface", LEAVE),
        (NOTHING_INCLUDED, OUT, "10.0.0.9", 80, {}, None, LEAVE),
        (INCLUDING, OUT, "198.51.100.1", 9009, {}, "included-port", TO_OUT),
        (INCLUDING, OUT, "10.255.0.9", 80, {}, "included-cidr-ipv4", TO_OUT),
        (INCLUDING, OUT, "fd00::9", 80, {}, "included-cidr-ipv6", TO_OUT),
        (INCLUDING, OUT, "198.51.100.1", 80, {}, None, LEAVE),
        (DEFAULT, OUT, "10.0.0.9", 80, {}, "to-outbound-listener", TO_OUT),
        (DEFAULT, OUT, "fd00::9", 80, {"uid": 0}, "to-outbound-listener", TO_OUT),
        (DEFAULT, OUT, "::ffff:10.0.0.9", 80, {}, "to-outbound-listener", TO_OUT),
        (DEFAULT, OUT, "10.0.0.9", 20000, {}, "to-outbound-listener", TO_OUT),
        (DEFAULT, OUT, "10.0.0.9", 15001, {}, "to-outbound-listener", TO_OUT),
        (IPV4_ONLY, OUT, "::ffff:10.0.0.9", 80, {}, "to-outbound-listener", TO_OUT),
        (IPV4_ONLY, OUT, "fd00::9", 80, {}, "ipv6-off", LEAVE),
        # Inbound, from top to bottom.
        (DEFAULT, IN, "10.0.0.2", 53, {"protocol": UDP}, "not-tcp", LEAVE),
        (DEFAULT, IN, "10.0.0.2", 80, {"opening": False}, "older", LEAVE),
        (TPROXY, IN, "10.0.0.2", 80, {"opening": False}, "older", LEAVE),
        (DEFAULT, IN, "10.0.0.2", 80, LO, "from-within", LEAVE),
        (TPROXY, IN, "10.0.0.2", 80, LO, "from-within", LEAVE),
        (DEFAULT, IN, "10.9.0.2", 15001, {"forwarded": True}, "forwarded", LEAVE),
        (DEFAULT, IN, "10.0.0.2", 20000, {}, "inbound-listener", LEAVE),
        (TPROXY, IN, "10.0.0.2", 20000, {}, "inbound-listener", LEAVE),
        (DEFAULT, IN, "10.0.0.2", 15001, {}, "outbound-listener", TO_IN),
        (TPROXY, IN, "10.0.0.2", 15001, {}, "outbound-listener", Tproxy(20000)),
        (INBOUND_OFF, IN, "10.0.0.2", 15001, {}, "outbound-listener", TO_IN),
        (INBOUND_OFF, IN, "10.0.0.2", 80, {}, None, LEAVE),
        (OUTBOUND_OFF, IN, "10.0.0.2", 15001, {}, "to-inbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 15001, {"source": "203.0.113.9"}, "outbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 15001, {"source": "10.0.0.1"}, "outbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 15001, {"interface": "net1"}, "outbound-listener", TO_IN),
        (INCLUDING, IN, "10.0.0.2", 15001, {"interface": "net1"}, "outbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 80, {"source": "10.0.0.1"}, "probe-ipv4", LEAVE),
        (EXCLUDING, IN, "10.0.0.2", 80, {"source": "10.0.0.3"}, "to-inbound-listener", TO_IN),
        (EXCLUDING, IN, "fd00::2", 80, {"source": "fd00::1"}, "probe-ipv6", LEAVE),
        (EXCLUDING, IN, "10.0.0.2", 9250, {}, "excluded-port", LEAVE),
        (EXCLUDING, IN, "10.0.0.2", 9301, {}, "to-inbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 5432, {}, "to-inbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 80, {"source": "203.0.113.9"}, "excluded-cidr-ipv4", LEAVE),
        (EXCLUDING, IN, "fd00::2", 80, {"source": "2001:db8:f::9"}, "excluded-cidr-ipv6", LEAVE),
        (EXCLUDING, IN, "203.0.113.9", 80, {}, "to-inbound-listener", TO_IN),
        (EXCLUDING, IN, "10.0.0.2", 80, {"interface": "net2"}, "excluded-interface", LEAVE),
        (INCLUDING, IN, "10.0.0.2", 8080, {"interface": "net1"}, "not-included-interface", LEAVE),
        (INCLUDING, IN, "10.0.0.2", 8080, {}, "included-port", TO_IN),
        (INCLUDING, IN, "10.0.0.2", 8081, {}, None, LEAVE),
        (NOTHING_INCLUDED, IN, "10.0.0.2", 80, {}, "not-included-interface", LEAVE),
        (NOTHING_INCLUDED, IN, "10.0.0.2", 15001, {}, "outbound-listener", TO_IN),
        (DEFAULT, IN, "10.0.0.2", 8080, {}, "to-inbound-listener", TO_IN),
        (TPROXY, IN, "fd00::2", 8080, {}, "to-inbound-listener", Tproxy(20000)),
        (IPV4_ONLY, IN, "fd00::2", 15001, {}, "ipv6-off", LEAVE),
    ],
)  # fmt: skip
def test_the_first_line_that_matches_decides(
    policy, direction, destination, port, more, line, action
):
    connection = Connection(direction=direction, destination=destination, port=port, **more)
    decision = explain(rules_for(policy), connection)
    assert (decision.line, decision.action) == (line, action)


def names(policy, hook):
    return [line.name for line in rules_for(policy).lines(hook)]


def test_queries_are_tracked_in_a_zone_of_their_own_but_the_proxys_are_not():
    assert names(DNS, Hook.DNS_ZONE) == [
        *("not-udp", "link-local-ipv6", "proxy", "dns-ipv4", "dns-ipv6")
    ]
    *_, first, second = rules_for(DNS).lines(Hook.DNS_ZONE)
    assert first.action == second.action == Zone(DNS_ZONE)
    assert rules_for(DEFAULT).lines(Hook.DNS_ZONE) == ()
    assert names(DNS_OF_ONE, Hook.DNS_ZONE)[-2:] == ["proxy", "dns-ipv4"]


@pytest.mark.parametrize("policy", [DNS, DNS_TO_ELSEWHERE, DNS_OF_ONE, DNS_EXCLUDING_SOME])
def test_queries_are_in_that_zone_exactly_when_they_are_redirected(policy):
    rules = rules_for(policy)
    for connection in connections():
        asked = msgspec.structs.replace(connection, direction=OUT, protocol=UDP)
        redirected = explain(rules, asked)
        zoned = decided(rules.lines(Hook.DNS_ZONE), asked)
        assert (zoned.action == Zone(DNS_ZONE)) == (redirected.action != LEAVE), asked


def decided(lines, connection):
    """What a list says of a connection that is not the one to be asked about it."""
    rules = Rules(families=tuple(Family), lists=((Hook.OUTBOUND, lines),))
    return explain(rules, connection)


@pytest.mark.parametrize("policy", [DEFAULT, TPROXY, DNS_ALONE])
def test_packets_that_nothing_is_known_of_are_dropped_only_when_asked_to(policy):
    assert "invalid" not in names(policy, Hook.INVALID)
    lines = rules_for(msgspec.structs.replace(policy, drop_invalid=True)).lines(Hook.INVALID)
    assert [line.name for line in lines[:2]] == ["not-tcp", "invalid"]
    assert lines[0].matches == (Not(OfProtocol((TCP,))),)
    assert lines[1].matches == (Invalid(), Not(OnInterface(("lo",))))
    assert lines[1].action == Drop()
    nothing = Policy(
        drop_invalid=True, inbound=Inbound(enabled=False), outbound=Outbound(enabled=False)
    )
    assert rules_for(nothing).lists == ()


def test_packets_of_open_connections_pass_two_lines_before_they_are_left_alone():
    for hook in (Hook.INVALID, Hook.INVALID_OUTBOUND):
        assert names(DEFAULT, hook)[:2] == ["not-tcp", "older"]
    assert names(Policy(drop_invalid=True), Hook.INVALID)[:3] == ["not-tcp", "invalid", "older"]


def test_with_tproxy_arriving_connections_need_no_guard_and_leaving_ones_do():
    assert rules_for(TPROXY).lines(Hook.INVALID) == ()
    assert names(TPROXY, Hook.INVALID_OUTBOUND) == names(DEFAULT, Hook.INVALID_OUTBOUND) != []


def connections():
    """Connections of which some meet each line that the policies above have."""
    for address in ("10.0.0.9", "10.96.0.10", "127.0.0.1", "192.0.2.1", "fd00::9", "fe80::1"):
        source = "fd00::1" if ":" in address else "203.0.113.9"
        for direction, port in itertools.product(Direction, (53, 80, 8080, 9100, 15001, 20000)):
            for more in (
                *({}, BY_PROXY, {"uid": 1000}, {"gid": 50}, {"interface": "net1"}),
                *({"source": source}, {"forwarded": True}),
            ):
                yield Connection(direction=direction, destination=address, port=port, **more)


@pytest.mark.parametrize("tracked", [Tracked.KNOWN, Tracked.INVALID])
@pytest.mark.parametrize(
    "policy",
    [
        *(DEFAULT, EXCLUDING, INCLUDING, NOTHING_INCLUDED, IPV4_ONLY, SELF_CALLS, TPROXY),
        *(DNS, DNS_OF_ONE, DNS_EXCLUDING, DNS_EXCLUDING_SOME, DNS_ALONE),
        *(INBOUND_OFF, OUTBOUND_OFF),
    ],
)
def test_a_connection_that_nat_misses_is_dropped_exactly_when_it_would_be_redirected(
    policy, tracked
):
    rules = rules_for(policy)
    for connection in connections():
        asked = explain(rules, connection)
        missed = explain(rules, msgspec.structs.replace(connection, tracked=tracked))
        if asked.action == LEAVE:
            assert missed.action == LEAVE, connection
        else:
            by_tproxy = isinstance(asked.action, Tproxy)
            assert missed == (asked if by_tproxy else Decision(action=Drop(), line=asked.line))


@pytest.mark.parametrize(
    ("resolvers", "destination", "action"),
    [
        ((), "10.96.0.10", LEAVE),
        ((), "10.96.0.11", Drop()),
        (("10.96.0.10", "10.96.0.11"), "10.96.0.10", LEAVE),
        (("10.96.0.11",), "10.96.0.11", Drop()),
        (("10.96.0.11",), "10.96.0.10", Drop()),
    ],
)
def test_a_query_that_goes_to_the_dns_address_by_itself_is_never_translated_and_not_dropped(
    resolvers, destination, action
):
    dns = msgspec.structs.replace(DNS_TO_ELSEWHERE.dns, resolvers=resolvers)
    connection = Connection(direction=OUT, destination=destination, port=53, tracked=Tracked.KNOWN)
    assert explain(rules_for(Policy(dns=dns)), connection).action == action
    other_port = msgspec.structs.replace(dns, port=5353)
    assert explain(rules_for(Policy(dns=other_port)), connection).action == Drop()


def test_the_guards_leave_segments_of_open_connections_alone_also_when_they_cannot_be_placed():
    segment = Connection(
        direction=IN, destination="10.0.0.2", port=80, opening=False, tracked=Tracked.INVALID
    )
    assert explain(rules_for(DEFAULT), segment).line == "older"
    assert explain(rules_for(Policy(drop_invalid=True)), segment).action == Drop()


def test_with_tproxy_only_a_segment_of_a_known_socket_that_was_not_handed_over_is_older():
    older = next(
        line for line in rules_for(TPROXY).lines(Hook.INBOUND_TPROXY) if "older" in line.name
    )
    assert older.matches == (Not(Opening()), OfKnownSocket(), Not(HandedOver()))
    assert rules_for(TPROXY).lines(Hook.INBOUND) == ()
    assert rules_for(TPROXY).lines(Hook.OUTBOUND) == rules_for(DEFAULT).lines(Hook.OUTBOUND)


@pytest.mark.parametrize("policy", [EXCLUDING, INCLUDING, INBOUND_OFF])
def test_with_tproxy_what_no_listener_takes_is_dropped_right_there(policy):
    lines = rules_for(msgspec.structs.replace(policy, mode=Mode.TPROXY)).lines(Hook.INBOUND_TPROXY)
    taken = [at for at, line in enumerate(lines) if line.action == Tproxy(20000)]
    assert taken
    for at in taken:
        assert lines[at + 1].matches == lines[at].matches
        assert lines[at + 1].action == Drop()


def test_a_direction_that_is_off_leaves_everything_but_the_guard_of_the_outbound_listener():
    assert rules_for(OUTBOUND_OFF).lines(Hook.OUTBOUND) == ()
    assert names(INBOUND_OFF, Hook.INBOUND)[-1] == "outbound-listener"
    assert "outbound-listener" not in names(OUTBOUND_OFF, Hook.INBOUND)
    neither = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
    assert rules_for(neither).lists == ()


@pytest.mark.parametrize(
    "policy",
    [
        Policy(families=()),
        Policy(outbound=Outbound(enabled=False), inbound=Inbound(include_ports=())),
        Policy(outbound=Outbound(include_cidrs=()), inbound=Inbound(enabled=False)),
    ],
)
def test_a_list_that_would_leave_everything_is_not_there(policy):
    lists = [hook for hook, _ in rules_for(policy).lists]
    assert Hook.OUTBOUND not in lists
    connection = Connection(direction=OUT, destination="10.0.0.9", port=80)
    assert explain(rules_for(policy), connection).action == LEAVE


def test_own_ports_of_the_policy_are_where_connections_go():
    policy = Policy(inbound=Inbound(port=21000), outbound=Outbound(port=16001))
    inbound = Connection(direction=IN, destination="10.0.0.2", port=80)
    outbound = Connection(direction=OUT, destination="10.0.0.2", port=80)
    assert explain(rules_for(policy), inbound).action == Redirect(21000)
    assert explain(rules_for(policy), outbound).action == Redirect(16001)
    guarded = Connection(direction=IN, destination="10.0.0.2", port=16001)
    assert explain(rules_for(policy), guarded).line == "outbound-listener"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (
            Policy(
                outbound=Outbound(
                    exclude_ports=ports(83, (80, 81), 82, 80),
                    exclude_cidrs=("10.128.0.0/9", "10.0.0.0/9", "10.1.0.0/16"),
                    exclude_uids=ids(7, 7, (8, 9)),
                    exclude_gids=ids((3, 5), 4),
                    exclude_interfaces=("net1", "net0", "net1"),
                )
            ),
            Policy(
                outbound=Outbound(
                    exclude_ports=ports((80, 83)),
                    exclude_cidrs=("10.0.0.0/8",),
                    exclude_uids=ids((7, 9)),
                    exclude_gids=ids((3, 5)),
                    exclude_interfaces=("net0", "net1"),
                )
            ),
        ),
        (
            Policy(
                outbound=Outbound(
                    exclude_user_ports=(
                        UserPorts((UDP, TCP), ports(2, 1), ids(5)),
                        UserPorts((UDP,), ports(9), ids(9)),
                        UserPorts((TCP,), ports((1, 2)), ids(5)),
                    )
                )
            ),
            Policy(
                outbound=Outbound(exclude_user_ports=(UserPorts((TCP,), ports((1, 2)), ids(5)),))
            ),
        ),
        (Policy(proxy=Proxy(uids=(2, 1, 2))), Policy(proxy=Proxy(uids=(1, 2)))),
        (
            Policy(dns=Dns(enabled=True, addresses=("::1", "127.0.0.1"))),
            Policy(dns=Dns(enabled=True)),
        ),
        (
            Policy(dns=Dns(enabled=True, resolvers=("fd00::2", "10.0.0.1", "fd00::1"))),
            Policy(dns=Dns(enabled=True, resolvers=("fd00::1", "fd00::2", "10.0.0.1"))),
        ),
        (Policy(dns=Dns(port=53)), DEFAULT),
        (Policy(families=(Family.IPV6, Family.IPV4)), DEFAULT),
        (
            Policy(families=(Family.IPV4,), outbound=Outbound(exclude_cidrs=("fd00::/8",))),
            IPV4_ONLY,
        ),
        (
            Policy(families=(Family.IPV4,), dns=Dns(enabled=True, addresses=("::1", "127.0.0.1"))),
            Policy(families=(Family.IPV4,), dns=Dns(enabled=True, addresses=("127.0.0.1",))),
        ),
        (Policy(outbound=Outbound(include_ports=ports(80))), DEFAULT),
        (Policy(inbound=Inbound(node_addresses=("10.0.0.1/32",))), DEFAULT),
        (
            Policy(outbound=Outbound(enabled=False), inbound=Inbound(include_ports=())),
            Policy(outbound=Outbound(enabled=False), inbound=Inbound(enabled=False)),
        ),
    ],
)
def test_policies_that_mean_the_same_give_equal_rules(written, meant):
    assert rules_for(written) == rules_for(meant)


EVERYTHING = Policy(
    proxy=SELF_CALLS.proxy,
    inbound=msgspec.structs.replace(
        EXCLUDING.inbound, include_ports=ports(8080), include_interfaces=("eth0",)
    ),
    outbound=msgspec.structs.replace(
        EXCLUDING.outbound,
        include_cidrs=("10.0.0.0/8", "fd00::/8"),
        include_ports=ports((9000, 9009)),
        include_interfaces=("eth0",),
    ),
    dns=Dns(enabled=True),
    drop_invalid=True,
)
EVERY_POLICY = [
    EVERYTHING,
    msgspec.structs.replace(EVERYTHING, dns=DNS_TO_ELSEWHERE.dns),
    msgspec.structs.replace(EVERYTHING, mode=Mode.TPROXY),
    DEFAULT,
    TPROXY,
    IPV4_ONLY,
    DNS_ALONE,
    INBOUND_OFF,
]
"""Policies that together make every line that there is."""


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_names_of_lines_are_unique_in_their_list(policy):
    for _, lines in rules_for(policy).lists:
        assert len({line.name for line in lines}) == len(lines)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_the_lines_of_a_family_decide_as_the_whole_list_does(policy, family):
    rules = rules_for(policy)
    only = msgspec.structs.replace(
        rules, lists=tuple((hook, lines_of_family(lines, family)) for hook, lines in rules.lists)
    )
    assert not any(
        isinstance(match, OfFamily)
        for _, lines in only.lists
        for line in lines
        for match in line.matches
    )
    destinations = {
        Family.IPV4: ("10.0.0.9", "127.0.0.1", "192.0.2.1"),
        Family.IPV6: ("fd00::9", "::1", "2001:db8::1", "fe80::1"),
    }
    for destination in destinations[family]:
        for more in ({}, {"uid": 101}, BY_PROXY, {"protocol": UDP}, {"interface": "net1"}):
            for direction, port in ((OUT, 80), (OUT, 53), (IN, 80), (IN, 8080), (IN, 15001)):
                connection = Connection(
                    direction=direction, destination=destination, port=port, **more
                )
                assert explain(only, connection) == explain(rules, connection)


def test_matches_of_a_line_are_what_a_backend_has_to_render():
    lines = {line.name: line for line in rules_for(EVERYTHING).lines(Hook.OUTBOUND)}
    assert lines["proxy"].matches == (ByUser(ids(101, 5995)),)
    assert lines["excluded-port"].matches == (ToPort(ports(5432)),)
    assert lines["own-address"].matches == (OnInterface(("lo",)),)
    assert lines["excluded-cidr-ipv4"].matches == (ToNetwork(Family.IPV4, ("192.0.2.0/24",)),)


def documented(hook):
    """Names of lines in the table of a list, in order; N stands for a number."""
    section = re.search(rf"^### List `{hook.value}`\n(.*?)(?=^##)", DOCS.read_text(), re.M | re.S)
    rows = re.findall(r"^\| ((?:`[a-zN0-9-]+`(?:, )?)+) \|", section[1], re.M)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("hook", Hook)
@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_the_documented_tables_hold_every_line_in_its_order(policy, hook):
    table = iter(documented(hook))
    for name in names(policy, hook):
        generic = re.sub(r"^(excluded-user-port)-\d+$", r"\1-N", name)
        assert generic in table, f"{name} is not in docs/redirect.md, or not at its place"


@pytest.mark.parametrize("hook", Hook)
def test_the_documented_tables_hold_no_line_that_does_not_exist(hook):
    made = {
        re.sub(r"^(excluded-user-port)-\d+$", r"\1-N", name)
        for policy in EVERY_POLICY
        for name in names(policy, hook)
    }
    assert set(documented(hook)) == made


port_ranges = st.tuples(st.integers(1, 14999), st.integers(0, 20)).map(
    lambda pair: PortRange(pair[0], min(pair[0] + pair[1], 14999))
)


@settings(deadline=None)
@given(excluded=st.lists(port_ranges, max_size=20), port=st.integers(1, 65535))
def test_a_port_is_excluded_exactly_when_one_of_the_ranges_holds_it(excluded, port):
    policy = Policy(outbound=Outbound(exclude_ports=tuple(excluded)))
    connection = Connection(direction=OUT, destination="10.0.0.9", port=port)
    decision = explain(rules_for(policy), connection)
    assert (decision.line == "excluded-port") == any(port in span for span in excluded)


NETWORKS = ("10.0.0.0/8", "10.0.0.8/29", "10.0.0.9/32", "fd00::/8", "fd00::9/128")
ADDRESSES = ("10.0.0.7", "10.0.0.9", "192.0.2.1", "fd00::9", "fd00::1", "2001:db8::1")
networks = st.lists(st.sampled_from(NETWORKS), max_size=3, unique=True).map(tuple)
some_ports = st.lists(port_ranges, max_size=3).map(tuple)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    families=st.lists(st.sampled_from(list(Family)), max_size=2, unique=True).map(tuple),
    included=st.none() | networks,
    included_ports=some_ports,
    excluded=networks,
    excluded_ports=some_ports,
    address=st.sampled_from(ADDRESSES),
    port=st.integers(1, 14999),
)
def test_what_the_verdict_takes_for_redirected_is_what_the_rules_redirect(
    families, included, included_ports, excluded, excluded_ports, address, port
):
    try:
        policy = Policy(
            families=families,
            inbound=Inbound(
                include_ports=included_ports or None,
                exclude_ports=excluded_ports,
                exclude_cidrs=excluded,
            ),
            outbound=Outbound(
                include_cidrs=included,
                include_ports=included_ports,
                exclude_ports=excluded_ports,
                exclude_cidrs=excluded,
            ),
        )
    except InputErrors:
        # What is included lies wholly in what is excluded.
        reject()
    out = Connection(direction=OUT, destination=address, port=port)
    assert (explain(rules_for(policy), out).action != LEAVE) == policy.redirects_outbound(
        port, address
    )
    own = "10.0.0.2" if "." in address else "fd00::2"
    into = Connection(direction=IN, source=address, destination=own, port=port)
    assert (explain(rules_for(policy), into).action != LEAVE) == policy.redirects_inbound(
        port, address
    )
