"""Policies: what is a valid one, and what the verdict asks of it. How people write values."""

import msgspec
import pytest

from tidegate.errors import InputError, InputErrors
from tidegate.intent.network_text import canonical_address, canonical_network
from tidegate.intent.policy import (
    DEFAULT,
    MAX_FAULTS,
    MAX_ITEMS,
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
from tidegate.intent.policy_parsing import (
    ALL_PORTS,
    parse_cgroup,
    parse_endpoint,
    parse_gid_range,
    parse_id_range,
    parse_interface,
    parse_mark,
    parse_port_range,
    parse_uid,
    parse_user_ports,
    user_ports_text,
)

BOTH = (Protocol.TCP, Protocol.UDP)
TCP = (Protocol.TCP,)
USERS = {"postgres": 70, "www-data": 33}.get


def ports(*ranges):
    return tuple(PortRange(first, last) for first, last in ranges)


def ids(*ranges):
    return tuple(IdRange(first, last) for first, last in ranges)


def faults_of(**parts):
    with pytest.raises(InputErrors) as raised:
        Policy(**parts)
    return raised.value.faults


def test_the_default_policy_redirects_all_tcp_of_both_families_to_consuls_ports():
    assert DEFAULT.inbound == Inbound(enabled=True, port=20000)
    assert DEFAULT.outbound == Outbound(enabled=True, port=15001)
    assert DEFAULT.proxy.uids == (5995,)
    assert DEFAULT.families == (Family.IPV4, Family.IPV6)
    assert DEFAULT.mode is Mode.REDIRECT
    assert not DEFAULT.dns.enabled


TOO_MANY = ids((1, 1)) * (MAX_ITEMS + 1)


@pytest.mark.parametrize(
    ("parts", "field", "problem"),
    [
        ({"inbound": Inbound(port=0)}, "inbound.port", "no port 0"),
        ({"outbound": Outbound(port=70000)}, "outbound.port", "no port 70000"),
        ({"dns": Dns(port=-1)}, "dns.port", "no port -1"),
        ({"proxy": Proxy(uids=())}, "proxy.uids", "nothing tells"),
        ({"proxy": Proxy(uids=(-1,))}, "proxy.uids", "no user or group -1"),
        ({"proxy": Proxy(gids=(2**32 - 1,))}, "proxy.gids", "no user or group 4294967295"),
        ({"proxy": Proxy(mark=Mark(0, 0xFF))}, "proxy.mark", "all traffic without a mark"),
        ({"proxy": Proxy(mark=Mark(1, 0))}, "proxy.mark", "selects no bits"),
        ({"proxy": Proxy(mark=Mark(1, 2**32))}, "proxy.mark", "selects no bits"),
        ({"proxy": Proxy(mark=Mark(0x100, 0xFF))}, "proxy.mark", "outside of its mask"),
        ({"proxy": Proxy(mark=Mark(-1))}, "proxy.mark", "outside of its mask"),
        ({"proxy": Proxy(cgroup="/pod1")}, "proxy.cgroup", "begins with /"),
        ({"proxy": Proxy(cgroup="pod1/../x")}, "proxy.cgroup", "an empty part"),
        ({"proxy": Proxy(cgroup="pod1//x")}, "proxy.cgroup", "an empty part"),
        ({"proxy": Proxy(cgroup="pod1/")}, "proxy.cgroup", "an empty part"),
        ({"proxy": Proxy(cgroup='a"b')}, "proxy.cgroup", "quotes or control"),
        ({"proxy": Proxy(cgroup="a\nb")}, "proxy.cgroup", "quotes or control"),
        ({"proxy": Proxy(cgroup="a/" * 2500 + "a")}, "proxy.cgroup", "too long"),
        ({"proxy": Proxy(cgroup="a" * 256)}, "proxy.cgroup", "too long"),
        ({"inbound": Inbound(include_ports=ports((0, 80)))}, "inbound.include_ports", "'0-80'"),
        ({"inbound": Inbound(exclude_cidrs=("10.0.0.1",))}, "inbound.exclude_cidrs", "canonical"),
        ({"inbound": Inbound(node_addresses=("x",))}, "inbound.node_addresses", "not an address"),
        (
            {"inbound": Inbound(node_addresses=("10.0.0.0/8",))},
            "inbound.node_addresses",
            "more than one address",
        ),
        (
            {"inbound": Inbound(include_interfaces=("lo",))},
            "inbound.include_interfaces",
            "never redirected",
        ),
        (
            {"inbound": Inbound(exclude_interfaces=("eth 0",))},
            "inbound.exclude_interfaces",
            "not the name",
        ),
        ({"outbound": Outbound(exclude_ports=ports((90, 80)))}, "outbound.exclude_ports", "back"),
        ({"outbound": Outbound(include_ports=ports((1, 99999)))}, "outbound.include_ports", "no p"),
        ({"outbound": Outbound(exclude_cidrs=("10.0.0.1/8",))}, "outbound.exclude_cidrs", "canon"),
        ({"outbound": Outbound(exclude_cidrs=("x",))}, "outbound.exclude_cidrs", "not an address"),
        (
            {"outbound": Outbound(include_cidrs=("::ffff:10.0.0.0/104",))},
            "outbound.include_cidrs",
            "canonical",
        ),
        ({"outbound": Outbound(exclude_uids=ids((5, 4)))}, "outbound.exclude_uids", "backwards"),
        ({"outbound": Outbound(exclude_uids=ids((0, 2**32 - 1)))}, "outbound.exclude_uids", "no u"),
        ({"outbound": Outbound(exclude_gids=ids((-1, 4)))}, "outbound.exclude_gids", "no user"),
        ({"outbound": Outbound(exclude_uids=TOO_MANY)}, "outbound.exclude_uids", "4097 items"),
        (
            {"outbound": Outbound(exclude_user_ports=(UserPorts((), ports((1, 1)), ids((1, 1))),))},
            "outbound.exclude_user_ports",
            "no protocol",
        ),
        (
            {"outbound": Outbound(exclude_user_ports=(UserPorts(TCP, (), ids((1, 1))),))},
            "outbound.exclude_user_ports",
            "0 ranges of ports",
        ),
        (
            {"outbound": Outbound(exclude_user_ports=(UserPorts(TCP, ports((1, 1)), ()),))},
            "outbound.exclude_user_ports",
            "0 ranges of user ids",
        ),
        (
            {
                "outbound": Outbound(
                    exclude_user_ports=(UserPorts(TCP, ports((9, 1)), ids((1, 1))),)
                )
            },
            "outbound.exclude_user_ports",
            "backwards",
        ),
        (
            {"outbound": Outbound(include_interfaces=("a" * 16,))},
            "outbound.include_interfaces",
            "not the name",
        ),
        ({"dns": Dns(resolvers=("10.0.0.0/8",))}, "dns.resolvers", "is not an address"),
        ({"dns": Dns(resolvers=("fe80::1%eth0",))}, "dns.resolvers", "names an interface"),
        ({"dns": Dns(addresses=("::ffff:1.2.3.4",))}, "dns.addresses", "canonical"),
        ({"dns": Dns(addresses=("0:0::1",))}, "dns.addresses", "canonical"),
        ({"families": (Family.IPV4, Family.IPV4)}, "families", "twice"),
    ],
)
def test_a_policy_with_a_value_that_is_none_cannot_be_made(parts, field, problem):
    (fault,) = faults_of(**parts)
    assert fault.field == field
    assert problem in fault.problem
    assert fault.expected


@pytest.mark.parametrize(
    ("parts", "field", "problem"),
    [
        ({"inbound": Inbound(port=15001)}, "outbound.port", "both listeners would have port 15001"),
        (
            {"inbound": Inbound(exclude_ports=ports((20000, 20000)))},
            "inbound.exclude_ports",
            "is port 20000, on which the sidecar",
        ),
        (
            {"outbound": Outbound(exclude_ports=ports((15000, 15002)))},
            "outbound.exclude_ports",
            "includes port 15001, on which sidecars listen",
        ),
        (
            {"inbound": Inbound(include_ports=ports((80, 80)), exclude_ports=ports((80, 80)))},
            "inbound.include_ports",
            "'80' is included, and excluded",
        ),
        (
            {
                "outbound": Outbound(
                    include_ports=ports((40, 60)), exclude_ports=ports((51, 99), (1, 50))
                )
            },
            "outbound.include_ports",
            "'40-60' is included, and excluded",
        ),
        (
            {"outbound": Outbound(include_cidrs=("10.1.0.0/16",), exclude_cidrs=("10.0.0.0/8",))},
            "outbound.include_cidrs",
            "'10.1.0.0/16' is included, and excluded",
        ),
        (
            {
                "outbound": Outbound(
                    include_cidrs=("fd00::/16",), exclude_cidrs=("fd00::/17", "fd00:8000::/17")
                )
            },
            "outbound.include_cidrs",
            "'fd00::/16' is included, and excluded",
        ),
        (
            {"inbound": Inbound(include_interfaces=("eth0",), exclude_interfaces=("eth0",))},
            "inbound.include_interfaces",
            "'eth0' is both",
        ),
        ({"inbound": Inbound(direct_probes=True)}, "inbound.direct_probes", "node's addresses"),
        (
            {"dns": Dns(enabled=True, addresses=("10.0.0.1", "10.0.0.2"))},
            "dns.addresses",
            "more than one ipv4",
        ),
        ({"dns": Dns(enabled=True, addresses=())}, "dns.addresses", "to nowhere"),
        (
            {"dns": Dns(enabled=True, addresses=("::1",)), "families": (Family.IPV4,)},
            "dns.addresses",
            "no query is redirected",
        ),
        (
            {"dns": Dns(enabled=True, addresses=("::1",), resolvers=("10.0.0.1",))},
            "dns.addresses",
            "no query is redirected",
        ),
        ({"dns": Dns(enabled=True, port=15001)}, "dns.port", "127.0.0.1 port 15001"),
    ],
)
def test_a_policy_that_contradicts_itself_cannot_be_made(parts, field, problem):
    (fault,) = faults_of(**parts)
    assert fault.field == field
    assert problem in fault.problem
    assert fault.expected


@pytest.mark.parametrize(
    "parts",
    [
        {"inbound": Inbound(include_ports=ports((80, 90)), exclude_ports=ports((85, 85)))},
        {"outbound": Outbound(include_cidrs=("10.0.0.0/8",), exclude_cidrs=("10.1.0.0/16",))},
        {"outbound": Outbound(include_cidrs=("10.0.0.0/8",), exclude_cidrs=("::/0",))},
        {"outbound": Outbound(exclude_uids=ids((5995, 5996)))},
        {"proxy": Proxy(uids=(), mark=Mark(0x539, 0xFFF))},
        {"proxy": Proxy(uids=(), gids=(0,))},
        {"proxy": Proxy(uids=(), cgroup="kubepods.slice/pod1.scope")},
        {"dns": Dns(addresses=())},
        {"dns": Dns(enabled=True, addresses=("10.0.0.1",), port=15001)},
        {"dns": Dns(enabled=True, addresses=("127.0.0.1",))},
        {"dns": Dns(enabled=True, resolvers=("10.0.0.1", "10.0.0.2"))},
        {"families": ()},
        {"inbound": Inbound(include_ports=(), include_interfaces=())},
        {"inbound": Inbound(direct_probes=True, node_addresses=("10.0.0.1/32", "fd00::1/128"))},
        {"inbound": Inbound(include_interfaces=("eth0",), exclude_interfaces=("net1",))},
    ],
)
def test_what_only_looks_like_a_contradiction_is_a_policy(parts):
    assert Policy(**parts)


def test_an_excluded_outbound_port_on_which_sidecars_listen_would_be_a_way_around_them():
    (fault,) = faults_of(outbound=Outbound(exclude_ports=ports((20000, 20000))))
    assert str(fault) == (
        "outbound.exclude_ports: '20000' is port 20000, on which sidecars listen: traffic to those of other "
        "workloads would go around this workload's own; expected ports on which no sidecar listens"
    )


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("::ffff:10.0.0.7/8", "10.0.0.0/8"),
        ("::ffff:10.0.0.7/32", "10.0.0.7/32"),
        ("::ffff:10.0.0.7/64", "a prefix of 0 to 32, such as 10.0.0.0/8"),
    ],
)
def test_a_mapped_network_that_is_wider_than_all_of_ipv4_is_refused_with_the_ipv4_one(text, advice):
    with pytest.raises(InputError) as raised:
        canonical_network(text)
    assert text in raised.value.problem
    assert advice in raised.value.expected


def test_all_faults_of_a_policy_are_told_at_once():
    faults = faults_of(
        proxy=Proxy(uids=(-1,), mark=Mark(0)),
        inbound=Inbound(port=0, exclude_ports=ports((9, 8))),
        dns=Dns(port=0),
    )
    assert [fault.field for fault in faults] == [
        "proxy.uids",
        "proxy.mark",
        "inbound.port",
        "inbound.exclude_ports",
        "dns.port",
    ]


def test_very_many_faults_of_one_list_are_not_all_told():
    faults = faults_of(outbound=Outbound(exclude_cidrs=("x",) * 1000))
    assert len(faults) == MAX_FAULTS + 1
    assert "980 more" in faults[-1].problem


def test_a_policy_of_the_greatest_size_can_be_made():
    networks = tuple(f"10.{number >> 8}.{number & 255}.0/24" for number in range(MAX_ITEMS))
    others = tuple(f"11.{number >> 8}.{number & 255}.0/24" for number in range(MAX_ITEMS))
    assert Policy(outbound=Outbound(include_cidrs=networks, exclude_cidrs=others))
    (fault,) = faults_of(
        outbound=Outbound(include_cidrs=(networks[-1],), exclude_cidrs=networks[1:])
    )
    assert networks[-1] in fault.problem


def test_a_policy_is_what_it_was_after_a_round_trip_through_json():
    policy = Policy(
        proxy=Proxy(mark=Mark(0x539, 0xFFF), gids=(7,)),
        outbound=Outbound(
            include_cidrs=(), exclude_user_ports=(UserPorts(BOTH, ports((1, 5)), ids((3, 4))),)
        ),
        mode=Mode.TPROXY,
    )
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy


def test_the_verdict_learns_which_ports_and_addresses_reach_the_sidecar():
    peer, six = "10.0.0.9", "fd00::9"
    policy = Policy(
        inbound=Inbound(exclude_ports=ports((90, 92)), exclude_cidrs=("10.9.0.0/16",)),
        outbound=Outbound(exclude_ports=ports((5432, 5432)), exclude_cidrs=("fd09::/16",)),
    )
    reached = [port for port in range(88, 95) if policy.redirects_inbound(port, peer)]
    assert reached == [88, 89, 93, 94]
    assert policy.redirects_inbound(20000, peer)
    assert policy.redirects_inbound(5432, six)
    assert not policy.redirects_inbound(5432, "10.9.0.1")
    assert not policy.redirects_outbound(5432, peer)
    assert policy.redirects_outbound(90, "10.9.0.1")
    assert not policy.redirects_outbound(90, "fd09::1")
    no_family = Policy(families=())
    assert not no_family.redirects_inbound(80, peer)
    assert not no_family.redirects_anything
    one_family = Policy(families=(Family.IPV6,))
    assert one_family.redirects_inbound(80, six)
    assert not one_family.redirects_inbound(80, peer)
    assert not one_family.redirects_outbound(80, peer)
    only_port = Policy(outbound=Outbound(include_cidrs=(), include_ports=ports((443, 443))))
    assert only_port.redirects_outbound(443, peer)
    assert not only_port.redirects_outbound(80, peer)
    only_there = Policy(outbound=Outbound(include_cidrs=("10.0.0.0/8",)))
    assert only_there.redirects_outbound(80, peer)
    assert not only_there.redirects_outbound(80, six)


def test_networks_are_written_in_one_way():
    assert canonical_network("10.0.0.7/8") == "10.0.0.0/8"
    assert canonical_network("FD00:0::1") == "fd00::1/128"
    assert canonical_network("::ffff:10.0.0.0/104") == "10.0.0.0/8"
    assert canonical_network("::ffff:192.0.2.1") == "192.0.2.1/32"
    assert canonical_network("::/0") == "::/0"
    assert canonical_address("::FFFF:192.0.2.1") == "192.0.2.1"
    assert canonical_address("fd00:0::1") == "fd00::1"


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0.0/33", "fe80::1%eth0", "db.local", "10.0.0.0/8 ", "::ffff:10.0.0.0/8",
     "::ffff:0:0/95", "::ffff:1.2.3.4/0"],
)  # fmt: skip
def test_what_is_no_network_is_refused(text):
    with pytest.raises(InputError):
        canonical_network(text)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_port_range, "80", PortRange(80, 80)),
        (parse_port_range, "8000-8010", PortRange(8000, 8010)),
        (parse_port_range, "8000:8010", PortRange(8000, 8010)),
        (lambda text: parse_id_range(text, USERS), "1000-1009", IdRange(1000, 1009)),
        (lambda text: parse_id_range(text, USERS), "0", IdRange(0, 0)),
        (lambda text: parse_id_range(text, USERS), "www-data", IdRange(33, 33)),
        (lambda text: parse_gid_range(text, {"dba": 9}.get), "dba", IdRange(9, 9)),
        (lambda text: parse_uid(text, USERS), "postgres", 70),
        (parse_mark, "0x539/0xfff", Mark(0x539, 0xFFF)),
        (parse_mark, "1337", Mark(1337, 2**32 - 1)),
        (parse_mark, "0XFFFFFFFF", Mark(2**32 - 1, 2**32 - 1)),
        (parse_interface, "veth-a.100@b", "veth-a.100@b"),
        (parse_cgroup, "a/b.slice/c:d", "a/b.slice/c:d"),
        (parse_cgroup, "", ""),
        (parse_user_ports, "tcp:5432:1000-1009", UserPorts(TCP, ports((5432, 5432)), ids((1000, 1009)))),
        (parse_user_ports, "UDP:53:7", UserPorts((Protocol.UDP,), ports((53, 53)), ids((7, 7)))),
        (parse_user_ports, "80:1002", UserPorts(BOTH, ports((80, 80)), ids((1002, 1002)))),
        (parse_user_ports, "1003", UserPorts(BOTH, (ALL_PORTS,), ids((1003, 1003)))),
        (parse_user_ports, "*:*:0", UserPorts(BOTH, (ALL_PORTS,), ids((0, 0)))),
        (parse_user_ports, ":: 5 ", UserPorts(BOTH, (ALL_PORTS,), ids((5, 5)))),
        (
            parse_user_ports,
            "53, 3000-5000:106-108",
            UserPorts(BOTH, ports((53, 53), (3000, 5000)), ids((106, 108))),
        ),
        (
            lambda text: parse_user_ports(text, USERS),
            "tcp:5432:postgres,www-data",
            UserPorts(TCP, ports((5432, 5432)), ids((70, 70), (33, 33))),
        ),
        (parse_endpoint, "127.0.0.1:8600", ("127.0.0.1", 8600)),
        (parse_endpoint, "[::1]:53", ("::1", 53)),
    ],
)  # fmt: skip
def test_values_are_read_as_people_write_them(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "problem"),
    [
        (parse_port_range, "8\u0660", "is not a port"),
        (parse_port_range, "1-2-3", "is not a port"),
        (parse_port_range, "80:70", "'80:70' runs backwards"),
        (parse_port_range, "080-99999", "'080-99999'"),
        (parse_id_range, "9-1", "'9-1' runs backwards"),
        (parse_id_range, "9:1", "'9:1' runs backwards"),
        (parse_user_ports, "tcp:80:9-1", "'9-1' runs backwards"),
        (parse_id_range, "www-data", "no user 'www-data'"),
        (parse_id_range, "", "no user ''"),
        (parse_id_range, "a\0b", "no user 'a\\x00b'"),
        (parse_id_range, "4294967295", "no user or group 4294967295"),
        (parse_gid_range, "dba", "no group 'dba'"),
        (parse_mark, "", "not a packet mark"),
        (parse_mark, "1/", "not a packet mark"),
        (parse_mark, "0x1/0x2/0x3", "not a packet mark"),
        (parse_mark, "0x100000000", "not a packet mark"),
        (parse_mark, "9999999999", "32 bits"),
        (parse_mark, "0", "all traffic without a mark"),
        (parse_mark, "0x10/0x0f", "outside of its mask"),
        (parse_interface, "lo", "never redirected"),
        (parse_interface, "", "not the name"),
        (parse_interface, "..", "not the name"),
        (parse_interface, "eth*", "not the name"),
        (parse_interface, "eth+", "not the name"),
        (parse_interface, "a/b", "not the name"),
        (parse_interface, "eth0:1", "not the name"),
        (parse_interface, "eth\N{NO-BREAK SPACE}0", "not the name"),
        (parse_cgroup, "..", "an empty part, . or .."),
        (parse_user_ports, "tcp:80:1:2", "too many parts"),
        (parse_user_ports, "icmp:80:1", "not a protocol"),
        (parse_user_ports, "tcp:80:", "names no user"),
        (parse_user_ports, "tcp:80:*", "names no user"),
        (parse_user_ports, "tcp:,:7", "a list of 0 items"),
        (parse_user_ports, "tcp:http:7", "'http' is not a port"),
        (parse_endpoint, "127.0.0.1", "not an address with a port"),
        (parse_endpoint, "::1:53", "not an address with a port"),
        (parse_endpoint, "[127.0.0.1]:53", "not an address with a port"),
        (parse_endpoint, "localhost:53", "is not an address"),
        (parse_endpoint, "127.0.0.1:dns", "is not a port"),
    ],
)
def test_a_value_that_is_none_is_refused_with_the_reason(parse, text, problem):
    with pytest.raises(InputError) as raised:
        parse(text)
    assert problem in raised.value.problem
    assert raised.value.expected


@pytest.mark.parametrize("text", ["tcp:5432:1000-1009", "*:1-65535:0", "udp:53,60-70:5,7-9"])
def test_what_users_may_reach_is_written_as_it_is_read(text):
    assert user_ports_text(parse_user_ports(text)) == text
