"""Policies of workloads and the annotations that change them."""

import msgspec
import pytest

from tidegate.errors import InputError, InputErrors
from tidegate.intent.policy import (
    ANNOTATIONS,
    DEFAULT,
    MAX_ITEMS,
    Family,
    Inbound,
    Outbound,
    Policy,
    PortRange,
    Proxy,
    Setting,
    parse_cidr,
    policy_from_annotations,
)

CONSUL = "consul.hashicorp.com/transparent-proxy"


def faults_of(annotations, base=DEFAULT):
    with pytest.raises(InputErrors) as raised:
        policy_from_annotations(annotations, base)
    return raised.value.faults


def ports(*ranges):
    return tuple(PortRange(first, last) for first, last in ranges)


def test_without_annotations_the_policy_is_the_base():
    base = Policy(inbound=Inbound(port=21000))
    assert policy_from_annotations({}, base) == base
    assert policy_from_annotations({"app": "web", "prometheus.io/port": "x"}, base) == base


def test_the_default_policy_redirects_all_tcp_of_both_families_to_consuls_ports():
    assert DEFAULT.inbound == Inbound(enabled=True, port=20000)
    assert DEFAULT.outbound == Outbound(enabled=True, port=15001)
    assert DEFAULT.proxy.uids == (5995,)
    assert DEFAULT.families == (Family.IPV4, Family.IPV6)


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [(f"{CONSUL}-exclude-", ""), ("tidegate.io/exclude-", "")],
)
def test_lists_of_consul_and_of_tidegate_are_read_alike(prefix, suffix):
    policy = policy_from_annotations(
        {
            f"{prefix}inbound-ports": "9100, 9200-9300",
            f"{prefix}outbound-ports": "5432,6379:6380",
            f"{prefix}outbound-cidrs": "10.0.0.7/8,192.0.2.1,fd00::/8",
            f"{prefix}uids": "1000,0",
        }
    )
    assert policy.inbound.exclude_ports == ports((9100, 9100), (9200, 9300))
    assert policy.outbound.exclude_ports == ports((5432, 5432), (6379, 6380))
    assert policy.outbound.exclude_cidrs == ("10.0.0.0/8", "192.0.2.1/32", "fd00::/8")
    assert policy.outbound.exclude_uids == (1000, 0)


def test_items_are_trimmed_and_empty_ones_do_not_count():
    policy = policy_from_annotations({f"{CONSUL}-exclude-outbound-ports": " 80 ,, \t443, "})
    assert policy.outbound.exclude_ports == ports((80, 80), (443, 443))
    empty = policy_from_annotations({f"{CONSUL}-exclude-outbound-ports": " , "})
    assert empty == DEFAULT


def test_tidegates_annotation_wins_over_consuls_for_the_same_setting():
    for order in (1, -1):
        items = [
            (f"{CONSUL}-exclude-inbound-ports", "80"),
            ("tidegate.io/exclude-inbound-ports", "90"),
        ][::order]
        assert policy_from_annotations(dict(items)).inbound.exclude_ports == ports((90, 90))


def test_a_list_replaces_the_list_of_the_base():
    base = Policy(outbound=Outbound(exclude_ports=ports((1, 1))))
    policy = policy_from_annotations({"tidegate.io/exclude-outbound-ports": "2"}, base)
    assert policy.outbound.exclude_ports == ports((2, 2))


@pytest.mark.parametrize("text", ["false", "F", "0", " False "])
@pytest.mark.parametrize("name", [CONSUL, "tidegate.io/redirect"])
def test_transparent_proxy_false_means_no_redirection(name, text):
    policy = policy_from_annotations({name: text})
    assert not policy.redirects_anything
    assert not policy.redirects_inbound(80)
    assert not policy.redirects_outbound(80)


@pytest.mark.parametrize(
    ("annotation", "value", "problem", "expected"),
    [
        ("exclude-inbound-ports", "70000", "'70000'", "from 1 to 65535"),
        ("exclude-inbound-ports", "0", "'0'", "from 1 to 65535"),
        ("exclude-inbound-ports", "80-70", "'80-70' runs backwards", "70-80"),
        ("exclude-inbound-ports", "abc", "'abc' is not a port", "8000-8010"),
        ("exclude-inbound-ports", "-1", "'-1' is not a port", "8000-8010"),
        ("exclude-inbound-ports", "8\u0660", "is not a port", "8000-8010"),
        ("exclude-inbound-ports", "20000", "port 20000, on which the sidecar", "application"),
        ("exclude-inbound-ports", "15001", "port 15001, on which the sidecar", "application"),
        ("exclude-outbound-ports", "15000-15002", "includes port 15001", "application"),
        ("exclude-outbound-cidrs", "10.0.0.0/33", "'10.0.0.0/33'", "10.0.0.0/8"),
        ("exclude-outbound-cidrs", "fe80::1%eth0", "names an interface", "fe80::1"),
        ("exclude-outbound-cidrs", "db.local", "'db.local' is not an address", "10.0.0.0/8"),
        ("exclude-uids", "root", "'root' is not a numeric user id", "number"),
        ("exclude-uids", "4294967295", "there is no user id 4294967295", "4294967294"),
        ("redirect", "yes", "'yes' is neither true nor false", "true or false"),
    ],
)
def test_a_wrong_value_is_refused_with_annotation_value_reason_and_what_is_right(
    annotation, value, problem, expected
):
    (fault,) = faults_of({f"tidegate.io/{annotation}": value})
    assert fault.field == f"tidegate.io/{annotation}"
    assert problem in fault.problem
    assert expected in fault.expected


def test_all_faults_of_all_annotations_are_reported_at_once():
    faults = faults_of(
        {
            "tidegate.io/exclude-inbound-ports": "70000,80,abc",
            f"{CONSUL}-exclude-uids": "root",
            f"{CONSUL}-exclude-outbound-port": "5432",
        }
    )
    assert sorted(fault.field for fault in faults) == [
        f"{CONSUL}-exclude-outbound-port",
        f"{CONSUL}-exclude-uids",
        "tidegate.io/exclude-inbound-ports",
        "tidegate.io/exclude-inbound-ports",
    ]


def test_the_ports_of_the_base_policy_are_the_sidecars_own():
    base = Policy(inbound=Inbound(port=21000), outbound=Outbound(port=16001))
    assert faults_of({"tidegate.io/exclude-inbound-ports": "21000"}, base)
    assert policy_from_annotations({"tidegate.io/exclude-inbound-ports": "20000"}, base)


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        (f"{CONSUL}-exclude-outbound-port", f"{CONSUL}-exclude-outbound-ports"),
        (f"{CONSUL}-exclude-outbound-cidr", f"{CONSUL}-exclude-outbound-cidrs"),
        (
            "consul.hashicorp.com/transparant-proxy-exclude-uids",
            f"{CONSUL}-exclude-uids",
        ),
        ("tidegate.io/exclude-inbound-port", "tidegate.io/exclude-inbound-ports"),
        ("tidegate.io/excluded-uids", "tidegate.io/exclude-uids"),
    ],
)
def test_a_mistyped_annotation_is_a_fault_that_names_the_nearest(mistyped, nearest):
    (fault,) = faults_of({mistyped: "1"})
    assert fault.field == mistyped
    assert fault.expected == nearest


@pytest.mark.parametrize(
    "name",
    [
        "consul.hashicorp.com/connect-inject",
        "consul.hashicorp.com/connect-service-upstreams",
        "consul.hashicorp.com/consul-dns",
        f"{CONSUL}-status",
        f"{CONSUL}-overwrite-probes",
        "tidegate.io/mesh",
        "tidegate.example/exclude-inbound-port",
    ],
)
def test_annotations_about_other_things_are_left_alone(name):
    assert policy_from_annotations({name: "anything"}) == DEFAULT


def test_every_setting_has_a_name_of_tidegates_and_one_of_consuls():
    for setting in Setting:
        names = [name for name, known in ANNOTATIONS.items() if known is setting]
        assert len(names) == 2
        assert names[-1].startswith("tidegate.io/")


def test_a_list_that_is_too_long_is_refused_as_a_whole():
    (fault,) = faults_of({"tidegate.io/exclude-uids": "1," * (MAX_ITEMS + 1)})
    assert str(MAX_ITEMS) in fault.expected


def test_a_huge_faulty_value_is_not_repeated_in_full():
    (fault,) = faults_of({"tidegate.io/exclude-uids": "x" * 10_000})
    assert len(str(fault)) < 300
    (fault,) = faults_of({"tidegate.io/" + "x" * 10_000: ""})
    assert len(str(fault)) < 300


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"inbound": Inbound(port=0)}, "inbound.port"),
        ({"outbound": Outbound(port=70000)}, "outbound.port"),
        ({"inbound": Inbound(port=15001)}, "outbound.port"),
        ({"proxy": Proxy(uids=())}, "proxy.uids"),
        ({"proxy": Proxy(uids=(-1,))}, "proxy.uids"),
        ({"inbound": Inbound(exclude_ports=ports((20000, 20000)))}, "inbound.exclude_ports"),
        ({"outbound": Outbound(exclude_ports=ports((90, 80)))}, "outbound.exclude_ports"),
        ({"outbound": Outbound(exclude_cidrs=("10.0.0.1/8",))}, "outbound.exclude_cidrs"),
        ({"outbound": Outbound(exclude_cidrs=("x",))}, "outbound.exclude_cidrs"),
        ({"outbound": Outbound(exclude_uids=(2**32 - 1,))}, "outbound.exclude_uids"),
        ({"outbound": Outbound(exclude_uids=(1,) * (MAX_ITEMS + 1))}, "outbound.exclude_uids"),
    ],
)
def test_a_policy_that_is_wrong_cannot_be_made(parts, field):
    with pytest.raises(InputErrors) as raised:
        Policy(**parts)
    assert [fault.field for fault in raised.value.faults] == [field]


def test_a_policy_is_what_it_was_after_a_round_trip_through_json():
    policy = policy_from_annotations(
        {"tidegate.io/exclude-inbound-ports": "1-5", "tidegate.io/exclude-uids": "7"}
    )
    assert msgspec.json.decode(msgspec.json.encode(policy), type=Policy) == policy


def test_mapped_ipv6_networks_are_ipv4():
    assert parse_cidr("::ffff:10.0.0.0/104") == "10.0.0.0/8"
    assert parse_cidr("::ffff:192.0.2.1") == "192.0.2.1/32"
    assert parse_cidr("::/0") == "::/0"
    with pytest.raises(InputError):
        parse_cidr("")


def test_the_verdict_learns_which_ports_reach_the_sidecar():
    policy = policy_from_annotations(
        {"tidegate.io/exclude-inbound-ports": "90-92", "tidegate.io/exclude-outbound-ports": "5432"}
    )
    assert [port for port in range(88, 95) if not policy.redirects_inbound(port)] == [90, 91, 92]
    assert policy.redirects_inbound(20000)
    assert policy.redirects_inbound(5432)
    assert not policy.redirects_outbound(5432)
    assert policy.redirects_outbound(90)
    no_family = Policy(families=())
    assert not no_family.redirects_inbound(80)
    assert not no_family.redirects_anything
