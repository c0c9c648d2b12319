"""The decision lists and their evaluator."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.enforce.redirect import rules
from tidegate.enforce.redirect.rules import Action, Connection, explain, rules_for
from tidegate.intent.policy import (
    DEFAULT,
    Family,
    Inbound,
    Outbound,
    Policy,
    PortRange,
    Proxy,
    policy_from_annotations,
)
from tidegate.model import Direction

OUT, IN = Direction.OUTBOUND, Direction.INBOUND

EXCLUDING = policy_from_annotations(
    {
        "tidegate.io/exclude-inbound-ports": "9100,9200-9300",
        "tidegate.io/exclude-outbound-ports": "5432",
        "tidegate.io/exclude-outbound-cidrs": "192.0.2.0/24,2001:db8::/32",
        "tidegate.io/exclude-uids": "1000,1001",
    }
)
IPV4_ONLY = Policy(families=(Family.IPV4,))
TWO_PROXIES = Policy(proxy=Proxy(uids=(5995, 101)))


@pytest.mark.parametrize(
    ("policy", "direction", "destination", "port", "more", "line", "target"),
    [
        (DEFAULT, OUT, "10.0.0.9", 80, {}, "to-outbound-listener", 15001),
        (DEFAULT, OUT, "fd00::9", 80, {}, "to-outbound-listener", 15001),
        (DEFAULT, OUT, "10.0.0.9", 80, {"uid": 0}, "to-outbound-listener", 15001),
        (DEFAULT, OUT, "10.0.0.9", 20000, {}, "to-outbound-listener", 15001),
        (DEFAULT, OUT, "10.0.0.9", 80, {"uid": 5995}, "proxy", None),
        (DEFAULT, OUT, "127.0.0.1", 80, {"uid": 5995, "interface": "lo"}, "proxy", None),
        (DEFAULT, OUT, "10.0.0.2", 80, {"interface": "lo"}, "own-address", None),
        (DEFAULT, OUT, "127.0.0.1", 80, {"interface": "lo"}, "own-address", None),
        (DEFAULT, OUT, "127.8.8.8", 80, {}, "loopback-ipv4", None),
        (DEFAULT, OUT, "::1", 80, {}, "loopback-ipv6", None),
        (DEFAULT, OUT, "::ffff:127.0.0.1", 80, {}, "loopback-ipv4", None),
        (DEFAULT, OUT, "::ffff:10.0.0.9", 80, {}, "to-outbound-listener", 15001),
        (DEFAULT, OUT, "fe80::9", 80, {}, "link-local-ipv6", None),
        (DEFAULT, OUT, "10.0.0.9", 53, {"protocol": "udp"}, "not-tcp", None),
        (DEFAULT, OUT, "10.0.0.9", 80, {"opening": False}, "older", None),
        (DEFAULT, IN, "10.0.0.2", 80, {"opening": False}, "older", None),
        (EXCLUDING, OUT, "10.0.0.9", 80, {"uid": 1001}, "excluded-uid", None),
        (EXCLUDING, OUT, "10.0.0.9", 5432, {}, "excluded-port", None),
        (EXCLUDING, OUT, "10.0.0.9", 5433, {}, "to-outbound-listener", 15001),
        (EXCLUDING, OUT, "10.0.0.9", 9100, {}, "to-outbound-listener", 15001),
        (EXCLUDING, OUT, "192.0.2.255", 80, {}, "excluded-cidr-ipv4", None),
        (EXCLUDING, OUT, "::ffff:192.0.2.1", 80, {}, "excluded-cidr-ipv4", None),
        (EXCLUDING, OUT, "192.0.3.0", 80, {}, "to-outbound-listener", 15001),
        (EXCLUDING, OUT, "2001:db8:ffff::1", 80, {}, "excluded-cidr-ipv6", None),
        (IPV4_ONLY, OUT, "fd00::9", 80, {}, "ipv6-off", None),
        (IPV4_ONLY, OUT, "::ffff:10.0.0.9", 80, {}, "to-outbound-listener", 15001),
        (TWO_PROXIES, OUT, "10.0.0.9", 80, {"uid": 101}, "proxy", None),
        (DEFAULT, IN, "10.0.0.2", 8080, {}, "to-inbound-listener", 20000),
        (DEFAULT, IN, "fd00::2", 8080, {}, "to-inbound-listener", 20000),
        (DEFAULT, IN, "10.0.0.2", 15001, {}, "to-inbound-listener", 20000),
        (DEFAULT, IN, "10.0.0.2", 20000, {}, "inbound-listener", None),
        (DEFAULT, IN, "10.0.0.2", 8080, {"interface": "lo"}, "from-within", None),
        (DEFAULT, IN, "10.0.0.2", 53, {"protocol": "udp"}, "not-tcp", None),
        (EXCLUDING, IN, "10.0.0.2", 9250, {}, "excluded-port", None),
        (EXCLUDING, IN, "10.0.0.2", 9301, {}, "to-inbound-listener", 20000),
        (EXCLUDING, IN, "10.0.0.2", 5432, {}, "to-inbound-listener", 20000),
        (IPV4_ONLY, IN, "fd00::2", 8080, {}, "ipv6-off", None),
    ],
)
def test_the_first_line_that_matches_decides(
    policy, direction, destination, port, more, line, target
):
    connection = Connection(direction=direction, destination=destination, port=port, **more)
    decision = explain(rules_for(policy), connection)
    assert (decision.line, decision.port) == (line, target)
    assert decision.action is (Action.REDIRECT if target else Action.RETURN)


def test_a_direction_that_is_off_has_no_lines_and_is_left_alone():
    policy = Policy(inbound=Inbound(enabled=False))
    inbound = Connection(direction=IN, destination="10.0.0.2", port=80)
    assert rules_for(policy).inbound == ()
    assert explain(rules_for(policy), inbound).line is None
    assert explain(rules_for(policy), inbound).action is Action.RETURN
    assert rules_for(policy).outbound == rules_for(DEFAULT).outbound
    assert rules_for(Policy(families=())).outbound == ()


def test_own_ports_of_the_policy_are_where_connections_go():
    policy = Policy(inbound=Inbound(port=21000), outbound=Outbound(port=16001))
    inbound = Connection(direction=IN, destination="10.0.0.2", port=80)
    outbound = Connection(direction=OUT, destination="10.0.0.2", port=80)
    assert explain(rules_for(policy), inbound).port == 21000
    assert explain(rules_for(policy), outbound).port == 16001


def test_policies_that_mean_the_same_give_equal_rules():
    written = policy_from_annotations(
        {
            "tidegate.io/exclude-outbound-ports": "83,80-81,82,80",
            "tidegate.io/exclude-outbound-cidrs": "10.128.0.0/9,10.0.0.0/9,10.1.0.0/16",
            "tidegate.io/exclude-uids": "7,7",
        }
    )
    meant = policy_from_annotations(
        {
            "tidegate.io/exclude-outbound-ports": "80-83",
            "tidegate.io/exclude-outbound-cidrs": "10.0.0.0/8",
            "tidegate.io/exclude-uids": "7",
        }
    )
    assert rules_for(written) == rules_for(meant)


def test_names_of_lines_are_unique_in_their_list():
    for direction in Direction:
        names = [line.name for line in rules_for(EXCLUDING).of(direction)]
        assert len(set(names)) == len(names)


def test_the_documented_table_names_every_line_in_order():
    documented = re.findall(r"^\| ([a-z][a-z0-9-]+)(?:, [a-z0-9-]+)? +\|", rules.__doc__, re.M)
    documented = [name for name in documented if name != "line"]
    every = Policy(
        proxy=EXCLUDING.proxy,
        inbound=EXCLUDING.inbound,
        outbound=EXCLUDING.outbound,
        families=("ipv6",),
    )
    names = [line.name for line in (*rules_for(every).outbound, *rules_for(every).inbound)]
    assert documented == names


port_ranges = st.tuples(st.integers(1, 14999), st.integers(0, 20)).map(
    lambda pair: PortRange(pair[0], min(pair[0] + pair[1], 14999))
)


@given(excluded=st.lists(port_ranges, max_size=20), port=st.integers(1, 65535))
def test_a_port_is_excluded_exactly_when_one_of_the_ranges_holds_it(excluded, port):
    policy = Policy(outbound=Outbound(exclude_ports=tuple(excluded)))
    connection = Connection(direction=OUT, destination="10.0.0.9", port=port)
    decision = explain(rules_for(policy), connection)
    assert (decision.line == "excluded-port") == any(port in ports for ports in excluded)
    assert (decision.action is Action.REDIRECT) == policy.redirects_outbound(port)
