"""Policies in YAML and JSON, and Consul's configuration by itself."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import InputError, InputErrors
from tidegate.intent.annotations import ANNOTATIONS, policy_from_annotations
from tidegate.intent.policy import (
    DEFAULT,
    MAX_FAULTS,
    MAX_ID,
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
from tidegate.intent.policy_documents import (
    policy_from_consul_config,
    policy_from_document,
    policy_from_fields,
    policy_to_document,
)
from tidegate.intent.policy_settings import SETTINGS

EVERYTHING = """
# A comment, and every setting.
proxy:
  uids: [envoy, 5995]
  gids: [7]
  mark: 0x539/0xfff
  cgroup: pod1/sidecar
  self_calls_inbound: true
inbound:
  enabled: true
  port: 21000
  include_ports: [80, "8000-8010"]
  exclude_ports: 8005
  exclude_cidrs: [10.0.0.7/8]
  include_interfaces: [eth0]
  exclude_interfaces: net1, net2
  direct_probes: true
  node_addresses: [10.0.0.1, "fd00::1"]
outbound:
  enabled: "false"
  port: 16001
  include_cidrs: all
  include_ports: []
  exclude_ports: [5432, 6379-6380]
  exclude_cidrs: ["fd00::/8"]
  exclude_uids: [1000-1009, postgres, 0]
  exclude_gids: [5]
  exclude_user_ports: ["tcp:53,80:postgres", "1003"]
  include_interfaces: "*"
  exclude_interfaces: []
  wait_for_sidecar: true
dns:
  enabled: true
  resolvers: [10.0.0.53]
  addresses: [127.0.0.1]
  port: 8600
families: [ipv4]
mode: tproxy
drop_invalid: true
"""


def users(name):
    return {"envoy": 101, "postgres": 70}.get(name)


def ports(*ranges):
    return tuple(PortRange(first, last) for first, last in ranges)


def faults_of(text, base=DEFAULT):
    with pytest.raises(InputErrors) as raised:
        policy_from_document(text, "policy.yaml", base)
    assert all(fault.source == "policy.yaml" for fault in raised.value.faults)
    return raised.value.faults


def test_a_document_may_say_everything():
    said = yaml.safe_load(EVERYTHING)
    paths = {
        f"{section}.{name}" if isinstance(inner, dict) else section
        for section, inner in said.items()
        for name in (inner if isinstance(inner, dict) else [""])
    }
    assert paths == set(SETTINGS)
    both = (Protocol.TCP, Protocol.UDP)
    assert policy_from_document(EVERYTHING, "policy.yaml", users=users) == Policy(
        proxy=Proxy(
            uids=(101, 5995),
            gids=(7,),
            mark=Mark(0x539, 0xFFF),
            cgroup="pod1/sidecar",
            self_calls_inbound=True,
        ),
        inbound=Inbound(
            port=21000,
            include_ports=ports((80, 80), (8000, 8010)),
            exclude_ports=ports((8005, 8005)),
            exclude_cidrs=("10.0.0.0/8",),
            include_interfaces=("eth0",),
            exclude_interfaces=("net1", "net2"),
            direct_probes=True,
            node_addresses=("10.0.0.1/32", "fd00::1/128"),
        ),
        outbound=Outbound(
            enabled=False,
            port=16001,
            exclude_ports=ports((5432, 5432), (6379, 6380)),
            exclude_cidrs=("fd00::/8",),
            exclude_uids=(IdRange(1000, 1009), IdRange(70, 70), IdRange(0, 0)),
            exclude_gids=(IdRange(5, 5),),
            exclude_user_ports=(
                UserPorts((Protocol.TCP,), ports((53, 53), (80, 80)), (IdRange(70, 70),)),
                UserPorts(both, ports((1, 65535)), (IdRange(1003, 1003),)),
            ),
            wait_for_sidecar=True,
        ),
        dns=Dns(enabled=True, resolvers=("10.0.0.53",), addresses=("127.0.0.1",)),
        families=(Family.IPV4,),
        mode=Mode.TPROXY,
        drop_invalid=True,
    )


def test_json_is_read_as_well():
    text = json.dumps({"inbound": {"port": 21000, "exclude_ports": ["80-90", 7]}})
    policy = policy_from_document(text, "-")
    assert policy.inbound == Inbound(port=21000, exclude_ports=ports((80, 90), (7, 7)))


@pytest.mark.parametrize("text", ["{}", "---\n{}", "inbound:\n", "inbound: {}"])
def test_what_a_document_does_not_say_stays_as_in_the_base(text):
    base = Policy(inbound=Inbound(port=21000), mode=Mode.TPROXY)
    assert policy_from_document(text, "policy.yaml", base) == base
    changed = policy_from_document("inbound: {exclude_ports: [9]}", "policy.yaml", base)
    assert changed.inbound == Inbound(port=21000, exclude_ports=ports((9, 9)))
    assert changed.mode is Mode.TPROXY


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds nothing; expected a policy, {} for the built-in one"),
        ("\n# nothing\n", "holds nothing; expected a policy, {} for the built-in one"),
        ("---\n", "holds nothing; expected a policy, {} for the built-in one"),
        ("null\n", "is null; expected one policy, fields in { }"),
        ("[]", "is an empty list; expected one policy, fields in { }"),
        ('{"inbound', "line 1, column 2: unterminated string; expected JSON"),
    ],
)
def test_a_document_that_says_no_policy_is_refused(text, told):
    with pytest.raises(InputError) as caught:
        policy_from_document(text, "policy.yaml")
    assert str(caught.value) == f"policy.yaml: {told}"


@pytest.mark.parametrize(
    ("text", "field", "problem", "expected"),
    [
        ("inbound:\n  port: 70000", "line 2: inbound.port", "no port 70000", "1 to 65535"),
        ("inbound:\n  port: http", "line 2: inbound.port", "'http' is not a port", "65535"),
        ("inbound:\n  port: [1, 2]", "line 2: inbound.port", "a list stands", "a number"),
        ("inbound:\n  port:\n", "line 2: inbound.port", "null stands", "a number"),
        ("inbound:\n  port: 1.5\n", "line 2: inbound.port", "1.5 stands", "a number"),
        ("inbound: 7", "line 1: inbound", "7 is not an object", "fields"),
        ("outbond:\n  port: 1", "line 1: outbond", "not a field", "outbound"),
        ("inbound:\n  exclude_port: 1", "line 2: inbound.exclude_port", "not a f", "exclude_ports"),
        ("inbound:\n  include_cidrs: all", "line 2: inbound.include_cidrs", "not a field", "cidrs"),
        (
            "outbound:\n  exclude_ports:\n  - 80\n  - 80-70",
            "line 2: outbound.exclude_ports[1]",
            "backwards",
            "70-80",
        ),
        ("outbound: {exclude_uids: [ghost]}", "line 1: outbound.exclude_uids[0]", "ghost", "name"),
        ("drop_invalid: 3", "line 1: drop_invalid", "'3' is neither", "true or false"),
        ("families: ipv5", "line 1: families", "'ipv5' is not", "ipv4 or ipv6"),
        ("families: []", "line 1: families", "no family", "ipv4, ipv6 or both"),
        ("families: ''", "line 1: families", "no family", "ipv4, ipv6 or both"),
        ("dns: yes", "line 1: dns", "'yes' is not an object", "dns: {enabled: true}"),
        ("dns: true", "line 1: dns", "true is not an object", "dns: {enabled: true}"),
        ("dns: off", "line 1: dns", "'off' is not an object", "dns: {enabled: false}"),
        ("mode: tproxy\ninbound: false", "line 2: inbound", "false", "inbound: {enabled: false}"),
        ("proxy: true", "line 1: proxy", "true is not an object", "fields in { }"),
        ("dns: 10.0.0.1", "line 1: dns", "'10.0.0.1' is not an object", "fields in { }"),
        ("mode: ebpf", "line 1: mode", "'ebpf' is not a mode", "redirect or tproxy"),
        ("proxy: {uids: []}", "line 1: proxy.uids", "nothing tells", "a user id"),
        (
            "inbound:\n  port: 15001",
            "line 2: inbound.port",
            "both listeners would have port 15001",
            "a port for each",
        ),
        (
            "inbound:\n  direct_probes: true",
            "line 2: inbound.direct_probes",
            "without the node's addresses",
            "node_addresses",
        ),
    ],
)
def test_a_wrong_document_is_refused_with_line_field_reason_and_what_is_right(
    text, field, problem, expected
):
    (fault,) = faults_of(text)
    assert fault.field == field
    assert problem in fault.problem
    assert expected in fault.expected


def test_all_faults_of_a_document_are_told_at_once():
    faults = faults_of(
        "inbound:\n  port: 0\n  exclude_ports: [x, 80, 99999]\nmod: 1\n"
        "outbound: {include_ports: [443], exclude_ports: [443]}\n"
    )
    assert [fault.field for fault in faults] == [
        "line 2: inbound.port",
        "line 3: inbound.exclude_ports[0]",
        "line 3: inbound.exclude_ports[2]",
        "line 4: mod",
        "line 5: outbound.include_ports",
    ]


def test_faults_are_told_in_the_order_of_their_lines():
    faults = faults_of(
        "outbound: {include_ports: [443],\n  exclude_ports: [443]}\nmod: 1\n"
        "inbound:\n  prt: 1\n  port: 0\n  exclude_ports: [x, 9-8]\ndns: {enabled: true, port: 15001}\n"
        "modus: 1\nfamilies: []\n"
    )
    assert [fault.field for fault in faults] == [
        "line 1: outbound.include_ports",
        "line 3: mod",
        "line 5: inbound.prt",
        "line 6: inbound.port",
        "line 7: inbound.exclude_ports[0]",
        "line 7: inbound.exclude_ports[1]",
        "line 8: dns.port",
        "line 9: modus",
        "line 10: families",
    ]


def test_what_is_left_out_of_a_list_of_faults_is_told_after_them():
    wrong = "".join(f"  x{number}: 1\n" for number in range(MAX_FAULTS + 2))
    bad = ",".join(["x"] * (MAX_FAULTS + 3))
    faults = faults_of(f"mode: {{}}\noutbound:\n  exclude_cidrs: [{bad}]\ninbound:\n{wrong}")
    assert faults[0].field == "line 1: mode"
    assert [at for at, fault in enumerate(faults) if "3 more values" in fault.problem] == [
        MAX_FAULTS + 1
    ]
    assert "and 2 more fields" in faults[-1].problem


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1]",
        "- a",
        "{",
        "a: b: c",
        "a: 1\n---\nb: 2",
        "mode: tproxy\nmode: redirect",
        "!!x y",
    ],
)
def test_what_is_no_document_is_refused_with_the_file(text):
    with pytest.raises(InputError) as raised:
        policy_from_document(text, "policy.yaml")
    assert "policy.yaml" in str(raised.value)


def test_an_object_that_has_been_read_keeps_its_place_in_messages():
    with pytest.raises(InputErrors) as raised:
        policy_from_fields({"inbound": {"port": 0}}, "agent.yaml", "redirect.policy")
    assert str(raised.value).startswith("agent.yaml: redirect.policy.inbound.port: there is no")


@pytest.mark.parametrize(
    "document",
    [
        {"outbound": {"exclude_ports": ["x" * 1_000_000]}},
        {"outbound": {"exclude_ports": list(range(100_000))}},
        {"outbound": {"exclude_cidrs": ["x"] * 4000}},
        {"outbound": {"exclude_cidrs": [[]] * 4000}},
        {f"{'x' * 1000}{number}": 1 for number in range(10_000)},
        {"inbound": {f"x{number}": 1 for number in range(10_000)}},
    ],
    ids=range(6),
)
def test_a_huge_faulty_document_is_told_in_few_short_sentences(document):
    with pytest.raises(InputErrors) as raised:
        policy_from_fields(document, "x")
    assert len(raised.value.faults) <= MAX_FAULTS + 1
    assert all(len(str(fault)) < 500 for fault in raised.value.faults)


def test_consuls_configuration_may_be_given_by_itself():
    text = json.dumps({"ProxyUserID": "envoy", "ProxyInboundPort": 20000, "ConsulDNSPort": 8600})
    policy = policy_from_consul_config(text, users=users)
    assert policy.proxy.uids == (101,)
    assert policy.dns.enabled
    with pytest.raises(InputErrors) as raised:
        policy_from_consul_config('{"ProxyInboundPort": "http"}')
    assert [str(fault).partition(";")[0] for fault in raised.value.faults] == [
        "redirect-traffic-config: ProxyUserID: is missing",
        "redirect-traffic-config: ProxyInboundPort: 'http' is not a port",
    ]


# Not among the sidecar's own ports.
PORTS = st.integers(1, 14000)
PORT_RANGES = st.tuples(PORTS, PORTS).map(lambda pair: PortRange(min(pair), max(pair)))
IDS = st.integers(0, MAX_ID)
ID_RANGES = st.tuples(IDS, IDS).map(lambda pair: IdRange(min(pair), max(pair)))
NETWORKS = st.sampled_from(["10.0.0.0/8", "192.0.2.1/32", "fd00::/8", "::1/128", "0.0.0.0/0"])
INTERFACES = st.sampled_from(["eth1", "veth-a.100@b", "a"])
PROTOCOLS = st.sampled_from([(Protocol.TCP,), (Protocol.UDP,), (Protocol.TCP, Protocol.UDP)])
ADDRESSES = st.sampled_from([("127.0.0.1",), ("10.0.0.53", "fd00::53"), ("127.0.0.1", "::1")])


def few(items):
    return st.lists(items, max_size=3).map(tuple)


POLICIES = st.builds(
    Policy,
    proxy=st.builds(
        Proxy,
        uids=few(IDS).filter(bool),
        gids=few(IDS),
        mark=st.sampled_from([None, Mark(1), Mark(0x539, 0xFFF)]),
        cgroup=st.sampled_from(["", "a/b.slice"]),
        self_calls_inbound=st.booleans(),
    ),
    inbound=st.builds(
        Inbound,
        enabled=st.booleans(),
        port=st.integers(20000, 30000),
        include_ports=st.none() | few(PORT_RANGES),
        exclude_cidrs=few(NETWORKS),
        include_interfaces=st.none() | few(st.just("eth0")),
        exclude_interfaces=few(INTERFACES),
        direct_probes=st.booleans(),
        node_addresses=st.just(("10.0.0.1/32", "fd00::1/128")),
    ),
    outbound=st.builds(
        Outbound,
        enabled=st.booleans(),
        port=st.integers(15000, 16000),
        include_cidrs=st.none() | few(NETWORKS),
        exclude_ports=few(PORT_RANGES),
        exclude_uids=few(ID_RANGES),
        exclude_gids=few(ID_RANGES),
        exclude_user_ports=few(
            st.builds(
                UserPorts, PROTOCOLS, few(PORT_RANGES).filter(bool), few(ID_RANGES).filter(bool)
            )
        ),
        include_interfaces=st.none() | few(st.just("eth0")),
        exclude_interfaces=few(INTERFACES),
    ),
    dns=st.builds(
        Dns,
        enabled=st.booleans(),
        resolvers=st.sampled_from([(), ("10.0.0.1", "fd00::1")]),
        addresses=ADDRESSES,
        port=PORTS,
    ),
    families=st.sampled_from([(Family.IPV4,), (Family.IPV4, Family.IPV6)]),
    mode=st.sampled_from(Mode),
    drop_invalid=st.booleans(),
)


@settings(max_examples=100, deadline=None)
@given(POLICIES, st.sampled_from([DEFAULT, Policy(proxy=Proxy(mark=Mark(5)), families=())]))
def test_a_policy_that_is_written_down_is_read_as_what_it_was(policy, base):
    document = policy_to_document(policy)
    for text in (json.dumps(document), yaml.safe_dump(document)):
        assert policy_from_document(text, "-", base) == policy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
SECTIONS = {
    section: sorted(path.rpartition(".")[2] for path in SETTINGS if path.rpartition(".")[0] == section)
    for section in ("", "proxy", "inbound", "outbound", "dns")
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(SECTIONS[""], JSON),
            **{
                section: JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(names, JSON))
                for section, names in SECTIONS.items()
                if section
            },
        },
    )
)
def test_any_document_makes_a_policy_or_tells_its_faults_and_nothing_else(document):
    try:
        result = policy_from_fields(document, "-")
    except InputErrors as error:
        result = error.faults
    assert isinstance(result, Policy) or all(fault.problem for fault in result)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["ProxyUserID", "ProxyInboundPort", "ProxyOutboundPort", "ExcludeUIDs", "ConsulDNSIP",
             "ConsulDNSPort", "ExcludeInboundPorts", "NetNS", "proxyuserid", "X"]
        ),
        JSON,
    )
)  # fmt: skip
def test_any_configuration_of_consul_makes_a_policy_or_tells_its_faults(config):
    try:
        result = policy_from_consul_config(json.dumps(config))
    except InputErrors as error:
        result = error.faults
    assert isinstance(result, Policy) or all(fault.problem for fault in result)


DOCUMENT = (Path(__file__).parents[2] / "docs/policy.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def rows():
    """The first two columns of the tables of tidegate's own annotations, their default and example."""
    for line in DOCUMENT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and not cells[0].startswith(("`tidegate.io/`", "---")):
            yield [cell.strip("`") for cell in (cells[0], cells[1], cells[2], cells[4])]


def test_the_documentation_has_every_setting_with_its_default_and_a_good_example():
    named = set()
    written = policy_to_document(DEFAULT)
    base = policy_from_fields(
        {"inbound": {"node_addresses": "10.0.0.1"}, "outbound": {"include_cidrs": "192.0.2.0/24"}},
        "-",
    )
    for annotation, path, default, example in rows():
        if annotation:
            said = {f"tidegate.io/{annotation}": example}
            known = {"envoy": 101, "postgres": 70}.get
            assert (
                policy_from_annotations(said, base, users=known) != base or path == "outbound.port"
            )
            named.add(f"tidegate.io/{annotation}")
        if path in SETTINGS and annotation:
            assert SETTINGS[path].annotation == annotation
            section, _, name = path.rpartition(".")
            value = (written[section] if section else written)[name]
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            assert default in (shown, shown.lower()) or (default, shown) == ("none", ""), path
    assert named == {name for name in ANNOTATIONS if name.startswith("tidegate.io/")}
    for name in (*SETTINGS, *(name.rpartition("/")[2] for name in ANNOTATIONS)):
        assert f"`{name}`" in DOCUMENT or f"/{name}`" in DOCUMENT, name


def test_the_documented_policy_is_accepted():
    (document,) = blocks("yaml")
    policy = policy_from_document(document, "policy.yaml")
    assert policy.mode is Mode.TPROXY
    wrong = document.replace("9200-9210", "9210-9200")
    (fault,) = faults_of(wrong)
    assert f"`{fault}`" in DOCUMENT


def test_the_documented_faults_are_what_is_told():
    annotations = {
        "tidegate.io/exclude-inbound-port": "1",
        "tidegate.io/include-outbound-ports": "443",
        "consul.hashicorp.com/redirect-traffic-config": json.dumps(
            {"ProxyUserID": "5995", "ProxyInboundPort": 20000, "ExcludeUIDs": ["5996", "ghost"]}
        ),
        "consul.hashicorp.com/transparent-proxy-exclude-outbound-cidrs": "10.0.0.0/33",
        "tidegate.io/exclude-outbound-ports": "70000,80-70",
        "tidegate.io/exclude-inbound-ports": "20000",
    }
    with pytest.raises(InputErrors) as raised:
        policy_from_annotations(annotations)
    assert blocks("text") == [f"{raised.value}\n"]
