"""Annotations of workloads and namespaces: tidegate's own, Consul's and Istio's."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.errors import InputErrors
from tidegate.intent.annotations import ANNOTATIONS, policy_from_annotations, policy_of
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
from tidegate.intent.policy_settings import SETTINGS, value_of
from tidegate.lab import runtime
from tidegate.lab.spec import ConfigText, LabSpec, PodSpec

CONSUL = "consul.hashicorp.com/transparent-proxy"
CONFIG = "consul.hashicorp.com/redirect-traffic-config"
ISTIO = "traffic.sidecar.istio.io/"
USERS = {"envoy": 101, "postgres": 70}.get
NODE = Policy(inbound=Inbound(node_addresses=("10.0.0.1/32",)))

WEBHOOK = {
    "ConsulDNSIP": "",
    "ConsulDNSPort": 0,
    "ProxyUserID": "5995",
    "ProxyInboundPort": 20000,
    "ProxyOutboundPort": 15001,
    "ExcludeInboundPorts": ["20300", "9100"],
    "ExcludeOutboundPorts": None,
    "ExcludeOutboundCIDRs": None,
    "ExcludeUIDs": ["5996"],
    "NetNS": "",
    "IptablesProvider": None,
}
"""What consul-k8s writes."""


def faults_of(annotations, base=DEFAULT, **more):
    with pytest.raises(InputErrors) as raised:
        policy_from_annotations(annotations, base, **more)
    return raised.value.faults


def ports(*ranges):
    return tuple(PortRange(first, last) for first, last in ranges)


def ids(*ranges):
    return tuple(IdRange(first, last) for first, last in ranges)


def own(**values):
    return {f"tidegate.io/{name.replace('_', '-')}": value for name, value in values.items()}


def istio(**values):
    return {f"{ISTIO}{name}": value for name, value in values.items()}


def test_without_annotations_the_policy_is_the_base():
    base = Policy(inbound=Inbound(port=21000))
    assert policy_from_annotations({}, base) == base
    assert policy_from_annotations({"app": "web", "prometheus.io/port": "x"}, base) == base


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("redirect-inbound", "false", "inbound.enabled", False),
        ("redirect-outbound", "false", "outbound.enabled", False),
        ("mode", "tproxy", "mode", Mode.TPROXY),
        ("families", "ipv6", "families", (Family.IPV6,)),
        ("families", "ipv4, ipv6", "families", (Family.IPV4, Family.IPV6)),
        ("inbound-port", "21000", "inbound.port", 21000),
        ("outbound-port", "16001", "outbound.port", 16001),
        ("proxy-uids", "5995, envoy", "proxy.uids", (5995, 101)),
        ("proxy-gids", "7,dba", "proxy.gids", (7, 9)),
        ("proxy-mark", "0x539/0xfff", "proxy.mark", Mark(0x539, 0xFFF)),
        ("proxy-mark", "none", "proxy.mark", None),
        ("proxy-cgroup", "pod1/sidecar", "proxy.cgroup", "pod1/sidecar"),
        ("self-calls-inbound", "true", "proxy.self_calls_inbound", True),
        ("include-inbound-ports", "80,443", "inbound.include_ports", ports((80, 80), (443, 443))),
        ("include-inbound-ports", "*", "inbound.include_ports", None),
        ("include-inbound-ports", "all", "inbound.include_ports", None),
        ("include-inbound-ports", "", "inbound.include_ports", ()),
        ("exclude-inbound-ports", "9100-9110", "inbound.exclude_ports", ports((9100, 9110))),
        ("exclude-inbound-cidrs", "10.0.0.7/8", "inbound.exclude_cidrs", ("10.0.0.0/8",)),
        ("include-inbound-interfaces", "eth0", "inbound.include_interfaces", ("eth0",)),
        ("exclude-inbound-interfaces", "net1,net2", "inbound.exclude_interfaces", ("net1", "net2")),
        ("direct-probes", "true", "inbound.direct_probes", True),
        ("include-outbound-cidrs", "10.0.0.0/8", "outbound.include_cidrs", ("10.0.0.0/8",)),
        ("include-outbound-cidrs", "*", "outbound.include_cidrs", None),
        ("exclude-outbound-ports", "5432", "outbound.exclude_ports", ports((5432, 5432))),
        ("exclude-outbound-cidrs", "192.0.2.1", "outbound.exclude_cidrs", ("192.0.2.1/32",)),
        ("exclude-uids", "0,1000-1009,postgres", "outbound.exclude_uids", ids((0, 0), (1000, 1009), (70, 70))),
        ("exclude-gids", "7-8, dba", "outbound.exclude_gids", ids((7, 8), (9, 9))),
        (
            "exclude-user-ports",
            "tcp:5432:postgres; 53:5",
            "outbound.exclude_user_ports",
            (
                UserPorts((Protocol.TCP,), ports((5432, 5432)), ids((70, 70))),
                UserPorts((Protocol.TCP, Protocol.UDP), ports((53, 53)), ids((5, 5))),
            ),
        ),
        ("include-outbound-interfaces", "eth0", "outbound.include_interfaces", ("eth0",)),
        ("exclude-outbound-interfaces", "net1", "outbound.exclude_interfaces", ("net1",)),
        ("wait-for-sidecar", "true", "outbound.wait_for_sidecar", True),
        ("dns", "all", "dns.enabled", True),
        ("dns", "10.0.0.53,fd00::53", "dns.resolvers", ("10.0.0.53", "fd00::53")),
        ("dns-to", "127.0.0.1:8600", "dns.addresses", ("127.0.0.1",)),
        ("dns-to", "127.0.0.1:53, [::1]:53", "dns.port", 53),
        ("drop-invalid", "true", "drop_invalid", True),
    ],
)  # fmt: skip
def test_an_annotation_of_tidegates_sets_its_setting_and_no_other(name, text, path, value):
    before = {path: value_of(NODE, path) for path in SETTINGS}
    policy = policy_from_annotations(
        {f"tidegate.io/{name}": f" {text}\n"}, NODE, users=USERS, groups={"dba": 9}.get
    )
    after = {path: value_of(policy, path) for path in SETTINGS}
    assert after[path] == value
    together = {"dns.enabled", "dns.resolvers"} if name == "dns" else set()
    together |= {"dns.addresses", "dns.port"} if name == "dns-to" else set()
    assert {key for key in after if after[key] != before[key]} <= {path} | together


def test_every_setting_of_a_policy_has_an_annotation_except_the_nodes_own_addresses():
    named = {path for path, setting in SETTINGS.items() if setting.annotation}
    dns = {"dns.enabled", "dns.resolvers", "dns.addresses", "dns.port"}
    assert set(SETTINGS) - named - dns == {"inbound.node_addresses"}
    for setting in SETTINGS.values():
        assert not setting.annotation or f"tidegate.io/{setting.annotation}" in ANNOTATIONS


@pytest.mark.parametrize("text", ["false", "F", "0", " False "])
@pytest.mark.parametrize("name", [CONSUL, "tidegate.io/redirect"])
def test_transparent_proxy_false_means_no_redirection(name, text):
    base = Policy(dns=Dns(enabled=True))
    policy = policy_from_annotations({name: text}, base)
    assert not policy.redirects_anything
    assert not policy.redirects_inbound(80, "10.0.0.9")
    assert not policy.redirects_outbound(80, "10.0.0.9")


def test_redirection_can_be_asked_for_where_the_node_leaves_workloads_alone():
    base = Policy(inbound=Inbound(enabled=False), outbound=Outbound(enabled=False))
    assert policy_from_annotations(own(redirect="true"), base) == DEFAULT
    one = policy_from_annotations(own(redirect="false", redirect_outbound="true"))
    assert (one.inbound.enabled, one.outbound.enabled) == (False, True)


def test_dns_may_be_left_alone_or_redirected():
    assert policy_from_annotations(own(dns="all")).dns == Dns(enabled=True)
    assert policy_from_annotations(own(dns="10.0.0.53")).dns == Dns(
        enabled=True, resolvers=("10.0.0.53",)
    )
    base = Policy(dns=Dns(enabled=True, resolvers=("10.0.0.53",)))
    assert not policy_from_annotations(own(dns="off"), base).dns.enabled
    assert policy_from_annotations(own(dns="all"), base).dns.resolvers == ()


@pytest.mark.parametrize("prefix", [f"{CONSUL}-exclude-", "tidegate.io/exclude-"])
def test_lists_of_consul_and_of_tidegate_are_read_alike(prefix):
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
    assert policy.outbound.exclude_uids == ids((1000, 1000), (0, 0))


def test_items_are_trimmed_and_empty_ones_do_not_count():
    policy = policy_from_annotations({f"{CONSUL}-exclude-outbound-ports": " 80 ,, \t443, "})
    assert policy.outbound.exclude_ports == ports((80, 80), (443, 443))
    assert policy_from_annotations({f"{CONSUL}-exclude-outbound-ports": " , "}) == DEFAULT


def test_a_list_replaces_the_list_of_the_base():
    base = Policy(outbound=Outbound(exclude_ports=ports((1, 1))))
    for name in ("tidegate.io/exclude-outbound-ports", f"{CONSUL}-exclude-outbound-ports"):
        policy = policy_from_annotations({name: "2"}, base)
        assert policy.outbound.exclude_ports == ports((2, 2))


def test_of_two_annotations_for_one_setting_tidegates_wins_over_consuls_and_consuls_over_istios():
    said = [
        (f"{ISTIO}excludeInboundPorts", "70"),
        (f"{CONSUL}-exclude-inbound-ports", "80"),
        ("tidegate.io/exclude-inbound-ports", "90"),
    ]
    for last, port in ((3, 90), (2, 80), (1, 70)):
        for order in (1, -1):
            annotations = dict(said[:last][::order])
            policy = policy_from_annotations(annotations)
            assert policy.inbound.exclude_ports == ports((port, port))


def test_a_workloads_annotations_win_over_its_namespaces_and_those_over_the_base():
    base = Policy(outbound=Outbound(exclude_ports=ports((1, 1)), exclude_uids=ids((1, 1))))
    policy = policy_of(
        own(exclude_outbound_ports="2", exclude_inbound_ports="2"),
        {f"{CONSUL}-exclude-outbound-ports": "3"},
        base,
    )
    assert policy.outbound.exclude_ports == ports((3, 3)), "although the namespace's is tidegate's"
    assert policy.inbound.exclude_ports == ports((2, 2))
    assert policy.outbound.exclude_uids == ids((1, 1))


def test_a_namespace_may_switch_redirection_off_and_a_workload_on_again():
    namespace = {CONSUL: "false"}
    assert not policy_of(namespace, {}).redirects_anything
    assert policy_of(namespace, {CONSUL: "true"}) == DEFAULT
    assert policy_of(namespace, {CONFIG: json.dumps(WEBHOOK)}).redirects_anything


def test_a_contradiction_between_layers_counts_only_when_it_lasts():
    namespace = own(include_inbound_ports="80", exclude_inbound_ports="80")
    with pytest.raises(InputErrors) as raised:
        policy_of(namespace, {})
    (fault,) = raised.value.faults
    assert str(fault).startswith("namespace: tidegate.io/include-inbound-ports: '80' is included")
    assert policy_of(namespace, own(exclude_inbound_ports="")).inbound.include_ports
    swapped = policy_from_annotations(own(inbound_port="15001", outbound_port="20000"))
    assert (swapped.inbound.port, swapped.outbound.port) == (15001, 20000)


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
        ("exclude-inbound-ports", "80:70", "'80:70' runs backwards", "70:80"),
        ("exclude-inbound-ports", "80:70000", "'80:70000'", "from 1 to 65535"),
        ("exclude-uids", "9:1", "'9:1' runs backwards", "1:9"),
        (
            "exclude-outbound-ports",
            "20000",
            "is port 20000, on which sidecars listen",
            "no sidecar",
        ),
        ("exclude-outbound-ports", "15000-15002", "includes port 15001", "no sidecar"),
        ("exclude-outbound-cidrs", "::ffff:10.0.0.0/8", "'::ffff:10.0.0.0/8'", "10.0.0.0/8"),
        ("include-outbound-cidrs", "::ffff:a00:7/95", "IPv4", "0 to 32"),
        ("exclude-outbound-cidrs", "10.0.0.0/33", "'10.0.0.0/33'", "10.0.0.0/8"),
        ("exclude-outbound-cidrs", "fe80::1%eth0", "names an interface", "fe80::1"),
        ("exclude-outbound-cidrs", "db.local", "'db.local' is not an address", "10.0.0.0/8"),
        ("exclude-uids", "nobody-here", "there is no user 'nobody-here'", "name of a user"),
        ("exclude-uids", "4294967295", "no user or group 4294967295", "4294967294"),
        ("exclude-gids", "staff", "there is no group 'staff'", "name of a group"),
        ("proxy-uids", "", "nothing tells the sidecar", "a user id"),
        ("proxy-uids", "1-2", "there is no user '1-2'", "name of a user"),
        ("redirect", "yes", "'yes' is neither true nor false", "true or false"),
        ("redirect", "", "'' is neither true nor false", "true or false"),
        ("mode", "ebpf", "'ebpf' is not a mode", "redirect or tproxy"),
        ("families", "inet", "'inet' is not an address family", "ipv4 or ipv6"),
        ("inbound-port", "70000", "there is no port 70000", "1 to 65535"),
        ("families", "", "no family", 'tidegate.io/redirect: "false"'),
        ("families", " , ", "no family", 'tidegate.io/redirect: "false"'),
        ("include-outbound-ports", "443", "has no effect unless", 'include-outbound-cidrs: ""'),
        ("inbound-port", "15001", "both listeners would have port 15001", "a port for each"),
        ("outbound-port", "20000", "both listeners would have port 20000", "a port for each"),
        ("proxy-mark", "0x0/0xff", "all traffic without a mark", "other than 0"),
        ("proxy-cgroup", "/sys/fs/cgroup/x", "begins with /", "below the root"),
        ("include-inbound-interfaces", "lo", "never redirected", "eth0"),
        ("exclude-user-ports", "tcp:80", "'tcp' is not a port", "8000-8010"),
        ("dns", "", "says nothing", "off, all"),
        ("dns", "on", "'on' is not an address", "off, all, or addresses of resolvers"),
        ("dns", "false", "'false' is not an address", "off, all, or addresses of resolvers"),
        ("dns", "10.1.2.300", "'10.1.2.300' is not an address", "10.1.2.3"),
        ("dns-to", "", "0 ports", "one port"),
        ("dns-to", "127.0.0.1:53,[::1]:54", "2 ports", "one port"),
        ("dns-to", "127.0.0.1", "not an address with a port", "127.0.0.1:8600"),
        ("direct-probes", "true", "without the node's addresses", "node_addresses"),
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
            f"{CONSUL}-exclude-uids": "nobody-here",
            f"{CONSUL}-exclude-outbound-port": "5432",
            "tidegate.io/include-outbound-cidrs": "",
            "tidegate.io/include-outbound-ports": "443",
            "tidegate.io/exclude-outbound-ports": "443",
        }
    )
    assert sorted(fault.field for fault in faults) == [
        f"{CONSUL}-exclude-outbound-port",
        f"{CONSUL}-exclude-uids",
        "tidegate.io/exclude-inbound-ports",
        "tidegate.io/exclude-inbound-ports",
        "tidegate.io/include-outbound-ports",
    ]


def test_ports_may_be_included_where_networks_are_listed():
    said = own(include_outbound_ports="443")
    listed = own(include_outbound_cidrs="")
    policy = policy_from_annotations(said | listed)
    assert policy.outbound == Outbound(include_cidrs=(), include_ports=ports((443, 443)))
    by_the_node = Policy(outbound=Outbound(include_cidrs=("10.0.0.0/8",)))
    assert policy_from_annotations(said, by_the_node).outbound.include_ports == ports((443, 443))
    assert policy_of(said, listed) == policy
    assert policy_from_annotations(own(include_outbound_ports="")) == DEFAULT
    (fault,) = faults_of(said | own(include_outbound_cidrs="all"))
    assert fault.field == "tidegate.io/include-outbound-ports"
    (fault,) = faults_of(said | own(include_outbound_cidrs="db.local"))
    assert fault.field == "tidegate.io/include-outbound-cidrs"
    (fault,) = faults_of(own(include_outbound_ports="http"))
    assert "'http' is not a port" in fault.problem


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (99999, '"99999"'),
        (1.5, '"1.5"'),
        (True, '"true"'),
        (None, '""'),
        ([8080, "9000-9010"], '"8080,9000-9010"'),
        ([], '""'),
        (["x" * 1000], "text in quotes"),
        ([[1]], "text in quotes"),
        ({"a": 1}, "text in quotes"),
    ],
)
def test_a_value_that_is_no_text_is_refused_with_the_text_that_it_should_be(value, advice):
    faults = faults_of({"tidegate.io/exclude-outbound-ports": value})
    assert (faults[0].problem, faults[0].expected) == ("is not a string", advice)
    assert faults[0].field == "tidegate.io/exclude-outbound-ports"
    (fault,) = faults_of({"app": value})
    assert fault.field == "app", "no annotation of anybody's can be anything else"


def test_a_value_that_is_no_text_hides_no_other_fault():
    said = {
        "tidegate.io/exclude-inbound-port": "80",
        "tidegate.io/exclude-outbound-ports": 99999,
        "tidegate.io/include-inbound-ports": [8080, "9000-9010"],
        "tidegate.io/exclude-inbound-ports": "8080",
    }
    assert [
        (fault.field.removeprefix("tidegate.io/"), fault.problem) for fault in faults_of(said)
    ] == [
        ("exclude-outbound-ports", "is not a string"),
        ("include-inbound-ports", "is not a string"),
        ("exclude-inbound-port", "there is no such annotation"),
        ("exclude-outbound-ports", "there is no port '99999'"),
        ("include-inbound-ports", "'8080' is included, and excluded as well"),
    ]
    with pytest.raises(InputErrors) as raised:
        policy_of({"a": 1}, {})
    assert str(raised.value) == 'namespace: a: is not a string; expected "1"'


def test_wrong_annotations_in_a_lab_file_are_told_with_file_and_field():
    good = PodSpec(name="api", node="one", service="api", annotations=own(direct_probes="true"))
    bad = PodSpec(name="customer", node="one", service="c", annotations=own(inbound_port="x"))
    mesh = ConfigText(source="lab.yaml: config[0] (line 8)", text='Kind = "mesh"')
    entry = ConfigText(source="lab.yaml: config[1] (line 9)", text='Kind = "mash"')
    spec = LabSpec(name="lab", nodes=("one",), pods=(good, bad), config=(mesh, entry))
    with pytest.raises(InputErrors) as raised:
        runtime.check(spec, "lab.yaml")
    of_entry, of_pod = map(str, raised.value.faults)
    assert of_entry.startswith("lab.yaml: config[1] (line 9): ")
    assert of_pod == (
        "lab.yaml: pods[1].annotations of pod customer: tidegate.io/inbound-port: 'x' is not a port; "
        "expected 1 to 65535"
    )


def test_very_many_values_that_are_no_texts_are_not_all_told():
    faults = faults_of({f"x{number}": number for number in range(10_000)})
    assert len(faults) == MAX_FAULTS + 1
    assert "9980 more" in faults[-1].problem


def test_a_value_that_cannot_be_read_does_not_lead_to_contradictions_besides():
    (fault,) = faults_of(own(inbound_port="http", exclude_inbound_ports="20000"))
    assert fault.field == "tidegate.io/inbound-port"


def test_the_ports_of_the_base_policy_are_the_sidecars_own():
    base = Policy(inbound=Inbound(port=21000), outbound=Outbound(port=16001))
    assert faults_of({"tidegate.io/exclude-inbound-ports": "21000"}, base)
    assert policy_from_annotations({"tidegate.io/exclude-inbound-ports": "20000"}, base)


def test_a_contradiction_with_the_base_is_told_at_the_annotation():
    base = Policy(inbound=Inbound(exclude_ports=ports((9100, 9100))))
    (fault,) = faults_of(own(inbound_port="9100"), base)
    assert fault.field == "tidegate.io/inbound-port"
    assert "'9100' is port 9100" in fault.problem


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        (f"{CONSUL}-exclude-outbound-port", f"{CONSUL}-exclude-outbound-ports"),
        (f"{CONSUL}-exclude-outbound-cidr", f"{CONSUL}-exclude-outbound-cidrs"),
        (
            "consul.hashicorp.com/transparant-proxy-exclude-uids",
            f"{CONSUL}-exclude-uids",
        ),
        ("consul.hashicorp.com/redirect-traffic-confg", CONFIG),
        ("tidegate.io/exclude-inbound-port", "tidegate.io/exclude-inbound-ports"),
        ("tidegate.io/excluded-uids", "tidegate.io/exclude-uids"),
        (f"{ISTIO}excludeInboundPort", f"{ISTIO}excludeInboundPorts"),
        (f"{ISTIO}includeOutboundIpRanges", f"{ISTIO}includeOutboundIPRanges"),
        ("tidegate.io/mehs", "tidegate.io/mesh"),
        ("tidgate.io/exclude-inbound-ports", "tidegate.io/exclude-inbound-ports"),
        ("Tidegate.io/mesh", "tidegate.io/mesh"),
        ("consul.hashicop.com/transparent-proxy", CONSUL),
        ("trafic.sidecar.istio.io/excludeInboundPorts", f"{ISTIO}excludeInboundPorts"),
    ],
)
def test_a_mistyped_annotation_is_a_fault_that_names_the_nearest(mistyped, nearest):
    (fault,) = faults_of({mistyped: "1"})
    assert fault.field == mistyped
    assert fault.expected == nearest


def test_where_several_annotations_may_have_been_meant_all_are_named():
    (fault,) = faults_of({"tidegate.io/exclude-ports": "1"})
    assert fault.expected == (
        "tidegate.io/exclude-user-ports or tidegate.io/exclude-inbound-ports or tidegate.io/exclude-outbound-ports"
    )


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("tidegate.io/bypass", "tidegate.io/exclude-inbound-ports"),
        (f"{CONSUL}-goes-around-everything", f"{CONSUL}-exclude-inbound-ports"),
        (f"{ISTIO}x", f"{ISTIO}excludeInboundPorts"),
    ],
)
def test_for_an_annotation_that_is_like_no_other_none_is_guessed(name, like):
    (fault,) = faults_of({name: "1"})
    assert fault.expected.startswith(f"one that exists, such as {like}, or none that begins with ")


@pytest.mark.parametrize(
    "name",
    [
        # consul-k8s control-plane/connect-inject/constants/annotations_and_labels.go
        *(
            f"consul.hashicorp.com/{end}"
            for end in (
                "connect-inject",
                "connect-inject-status",
                "mesh-inject-status",
                "connect-inject-mount-volume",
                "connect-service",
                "connect-service-port",
                "connect-service-upstreams",
                "consul-namespace",
                "consul-sidecar-cpu-limit",
                "consul-dns-policy",
                "dual-stack",
                "enable-metrics",
                "enable-metrics-merging",
                "envoy-extra-args",
                "gateway-kind",
                "merged-metrics-port",
                "original-pod",
                "prometheus-scrape-path",
                "prometheus-scrape-port",
                "proxy-config-map",
                "service-meta-x",
                "service-metrics-port",
                "service-tags",
                "sidecar-proxy-cpu-limit",
                "sidecar-user-volume",
                "use-proxy-health-check",
            )
        ),
        f"{CONSUL}-status",
        f"{CONSUL}-overwrite-probes",
        "sidecar.istio.io/inject",
        "sidecar.istio.io/status",
        "istio.io/rev",
        "tidegate.io/mesh",
        "tidegate.io/service",
        "tidegate.io/port",
        "tidegate.example/exclude-inbound-port",
        "traffic.kuma.io/exclude-inbound-ports",
        "api-gateway.consul.hashicorp.com/mesh",
    ],
)
def test_annotations_about_other_things_are_left_alone(name):
    assert policy_from_annotations({name: "anything"}) == DEFAULT


def test_consuls_configuration_is_applied_as_consul_applies_it():
    config = WEBHOOK | {
        "ProxyUserID": "envoy",
        "ProxyInboundPort": 21000,
        "ProxyOutboundPort": 0,
        "ExcludeOutboundPorts": [" 8201", "", "9000:9010"],
        "ExcludeOutboundCIDRs": ["10.0.0.7/8", "192.0.2.1"],
    }
    base = Policy(
        proxy=Proxy(gids=(3,)),
        outbound=Outbound(enabled=False, port=16001, exclude_ports=ports((1, 1))),
        dns=Dns(enabled=True),
    )
    policy = policy_from_annotations({CONFIG: json.dumps(config)}, base, users=USERS)
    assert policy.proxy == Proxy(uids=(101,), gids=(3,)), "what Consul cannot say stays"
    assert policy.inbound == Inbound(port=21000, exclude_ports=ports((20300, 20300), (9100, 9100)))
    assert policy.outbound == Outbound(
        exclude_ports=ports((8201, 8201), (9000, 9010)),
        exclude_cidrs=("10.0.0.0/8", "192.0.2.1/32"),
        exclude_uids=ids((5996, 5996)),
    )
    assert not policy.dns.enabled, "what is missing there is empty"
    assert policy.families == (Family.IPV4, Family.IPV6)


@pytest.mark.parametrize("dual_stack", [{}, {"consul.hashicorp.com/dual-stack": "false"}])
def test_ipv6_is_redirected_whatever_consul_says_of_dual_stack(dual_stack):
    annotations = {CONFIG: json.dumps(WEBHOOK), **dual_stack}
    assert Family.IPV6 in policy_from_annotations(annotations).families
    only = policy_from_annotations(annotations | own(families="ipv4"))
    assert only.families == (Family.IPV4,)


@pytest.mark.parametrize(
    ("address", "port", "dns"),
    [
        ("", 0, (False, (), ("127.0.0.1", "::1"), 8600)),
        ("10.0.0.53", 0, (True, (), ("10.0.0.53",), 53)),
        ("", 8600, (True, ("127.0.0.1", "::1"), ("127.0.0.1", "::1"), 8600)),
        ("10.0.0.53", 8600, (True, ("10.0.0.53",), ("10.0.0.53",), 8600)),
        ("::1", 8600, (True, ("::1",), ("::1",), 8600)),
    ],
)
def test_dns_of_consuls_configuration_goes_where_consul_sends_it(address, port, dns):
    config = WEBHOOK | {"ConsulDNSIP": address, "ConsulDNSPort": port}
    enabled, resolvers, addresses, to_port = dns
    wanted = Dns(enabled=enabled, resolvers=resolvers, addresses=addresses, port=to_port)
    assert policy_from_annotations({CONFIG: json.dumps(config)}).dns == wanted
    if enabled:
        base = Policy(dns=Dns(enabled=True, resolvers=("192.0.2.1",), port=5))
        assert policy_from_annotations({CONFIG: json.dumps(config)}, base).dns == wanted


def test_single_annotations_add_to_consuls_configuration():
    policy = policy_from_annotations(
        {CONFIG: json.dumps(WEBHOOK), f"{CONSUL}-exclude-inbound-ports": "9100,9200"}
    )
    assert policy.inbound.exclude_ports == ports((20300, 20300), (9100, 9100), (9200, 9200))
    own_list = {CONFIG: json.dumps(WEBHOOK)} | own(exclude_inbound_ports="9200")
    assert policy_from_annotations(own_list).inbound.exclude_ports == ports((9200, 9200))
    off = {CONFIG: json.dumps(WEBHOOK), CONSUL: "false"}
    assert not policy_from_annotations(off).redirects_anything


def test_consuls_dns_annotation_redirects_what_its_webhook_would():
    name = "consul.hashicorp.com/consul-dns"
    loopback = ("127.0.0.1", "::1")
    wanted = Dns(enabled=True, resolvers=loopback, addresses=loopback, port=8600)
    assert policy_from_annotations({name: "true"}).dns == wanted
    assert not policy_from_annotations({name: "false"}, Policy(dns=wanted)).dns.enabled
    assert not policy_from_annotations({name: "true", CONSUL: "false"}).redirects_anything
    assert not policy_of({CONSUL: "false"}, {name: "true"}).redirects_anything
    assert policy_of({CONSUL: "false"}, {name: "true", CONSUL: "true"}).dns == wanted
    assert not policy_from_annotations({name: "true", CONFIG: json.dumps(WEBHOOK)}).dns.enabled
    (fault,) = faults_of({name: "maybe"})
    assert fault.field == name


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("", "", "is not a JSON object"),
        ("[]", "", "is not a JSON object"),
        ("a: b", "", "is not a JSON object"),
        ("{", "", "line 1, column 2"),
        ("{} {}", "", "line 1, column 4: found '{'"),
        (WEBHOOK | {"ProxyUserID": ""}, "ProxyUserID", "is missing"),
        (WEBHOOK | {"ProxyInboundPort": 0}, "ProxyInboundPort", "is missing"),
        (WEBHOOK | {"ProxyInboundPort": 70000}, "ProxyInboundPort", "no port 70000"),
        (WEBHOOK | {"ProxyOutboundPort": 20000}, "ProxyOutboundPort", "both listeners"),
        (WEBHOOK | {"ProxyUserID": "ghost"}, "ProxyUserID", "no user 'ghost'"),
        (WEBHOOK | {"ExcludeUIDs": ["1", "ghost"]}, "ExcludeUIDs[1]", "no user 'ghost'"),
        (WEBHOOK | {"ExcludeInboundPorts": [True]}, "ExcludeInboundPorts[0]", "true stands"),
        (WEBHOOK | {"ExcludeInboundPorts": {}}, "ExcludeInboundPorts", "an object stands"),
        (WEBHOOK | {"ConsulDNSIP": "10.0.0.0/8"}, "ConsulDNSIP", "is not an address"),
        (WEBHOOK | {"ConsulDNSPort": 99999}, "ConsulDNSPort", "no port 99999"),
        (WEBHOOK | {"ExcludeInboundPort": []}, "ExcludeInboundPort", "is not a field here"),
    ],
)
def test_a_wrong_configuration_of_consul_is_refused_with_the_field(text, field, problem):
    written = text if isinstance(text, str) else json.dumps(text)
    (fault,) = faults_of({CONFIG: written})
    assert fault.field == (f"{CONFIG}.{field}" if field else CONFIG)
    assert problem in fault.problem
    assert fault.expected


def test_a_mistyped_field_of_consuls_configuration_names_the_nearest():
    (fault,) = faults_of({CONFIG: json.dumps(WEBHOOK | {"ExcludeInboundPort": []})})
    assert fault.expected == "ExcludeInboundPorts"
    lower = {key.lower(): value for key, value in WEBHOOK.items()}
    assert policy_from_annotations({CONFIG: json.dumps(lower)}), "Go ignores case as well"


@pytest.mark.parametrize(
    ("said", "path", "value"),
    [
        (istio(includeInboundPorts="*"), "inbound.include_ports", None),
        (istio(includeInboundPorts=""), "inbound.include_ports", ()),
        (istio(includeInboundPorts="80,443"), "inbound.include_ports", ports((80, 80), (443, 443))),
        (istio(excludeInboundPorts="15090,15021"), "inbound.exclude_ports", ports((15090, 15090), (15021, 15021))),
        (istio(includeInboundPorts="*", excludeInboundPorts="90"), "inbound.exclude_ports", ports((90, 90))),
        (istio(includeInboundPorts="80", excludeInboundPorts="80"), "inbound.exclude_ports", ()),
        (istio(includeOutboundIPRanges="*"), "outbound.include_cidrs", None),
        (istio(includeOutboundIPRanges=""), "outbound.include_cidrs", ()),
        (istio(includeOutboundIPRanges="10.96.0.0/12"), "outbound.include_cidrs", ("10.96.0.0/12",)),
        (istio(excludeOutboundIPRanges="10.1.0.0/16"), "outbound.exclude_cidrs", ("10.1.0.0/16",)),
        (istio(includeOutboundPorts="443"), "outbound.include_ports", ports((443, 443))),
        (istio(includeOutboundPorts="*"), "outbound.include_ports", ports((1, 65535))),
        (istio(includeOutboundPorts=""), "outbound.include_ports", ()),
        (istio(excludeOutboundPorts="5432"), "outbound.exclude_ports", ports((5432, 5432))),
        (istio(excludeInterfaces="net1"), "inbound.exclude_interfaces", ("net1",)),
        (istio(excludeInterfaces="net1"), "outbound.exclude_interfaces", ("net1",)),
        (istio(kubevirtInterfaces=""), "inbound.enabled", True),
        ({"sidecar.istio.io/interceptionMode": "REDIRECT"}, "mode", Mode.REDIRECT),
        ({"sidecar.istio.io/interceptionMode": "TPROXY"}, "mode", Mode.TPROXY),
        ({"sidecar.istio.io/interceptionMode": "NONE"}, "inbound.enabled", False),
        ({"sidecar.istio.io/interceptionMode": "NONE"}, "outbound.enabled", False),
        (istio(includeInboundPorts="80"), "proxy.self_calls_inbound", False),
    ],
)  # fmt: skip
def test_istios_annotations_mean_what_they_mean_to_istio(said, path, value):
    base = Policy(mode=Mode.TPROXY) if value is Mode.REDIRECT else DEFAULT
    assert value_of(policy_from_annotations(said, base), path) == value


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (f"{ISTIO}kubevirtInterfaces", "net1", "cannot be redirected yet"),
        ("istio.io/reroute-virtual-interfaces", "net1", "cannot be redirected yet"),
        ("sidecar.istio.io/interceptionMode", "redirect", "'redirect' is not a mode"),
        (f"{ISTIO}includeInboundPorts", "*,80", "'*' is not a port"),
        (f"{ISTIO}includeOutboundIPRanges", "db.local", "is not an address"),
        (f"{ISTIO}excludeInboundPorts", "http", "'http' is not a port"),
    ],
)
def test_a_wrong_value_of_istios_is_refused(name, text, problem):
    (fault,) = faults_of({name: text})
    assert fault.field == name
    assert problem in fault.problem


def test_a_list_that_is_too_long_is_refused_as_a_whole():
    (fault,) = faults_of({"tidegate.io/exclude-uids": "1," * (MAX_ITEMS + 1)})
    assert str(MAX_ITEMS) in fault.expected


@pytest.mark.parametrize("name", sorted(ANNOTATIONS))
@pytest.mark.parametrize("text", ["x" * 1_000_000, "1," * 100_000, "{" * 1000, "::" * 500_000])
def test_a_huge_faulty_value_is_not_repeated_in_full(name, text):
    faults = faults_of({name: text})
    assert len(faults) <= MAX_FAULTS + 1
    assert all(len(str(fault)) < 500 for fault in faults)


@pytest.mark.parametrize("odd", ["x\n1: all is well", "\x1b[2J", "\ud800"])
def test_a_fault_is_one_printable_line_whatever_it_is_about(odd):
    said = {f"tidegate.io/{odd}": "", "tidegate.io/mode": odd, CONFIG: json.dumps({odd: odd})}
    for fault in faults_of(said):
        assert str(fault).isprintable()


def test_very_many_unknown_annotations_are_not_all_told():
    prefixes = ("tidegate.io/", "consul.hashicorp.com/")
    names = [f"{prefix}{'x' * 1000}{number}" for prefix in prefixes for number in range(50_000)]
    faults = faults_of(dict.fromkeys(names, ""))
    assert len(faults) == MAX_FAULTS + 1
    assert all(len(str(fault)) < 500 for fault in faults)
    assert "49980 more" in faults[-1].problem


FRAGMENTS = st.sampled_from(
    ["80", "80-70", "70000", "1-65535", "20000", "*", "all", "off", "true", "0", "", "10.0.0.0/8",
     "fd00::/8", "::1", "lo", "eth0", "tcp:1:2", "0x1/0x1", "{}", json.dumps(WEBHOOK), "ipv4", "a\0",
     "\ud800", "tproxy", "TPROXY", "[::1]:53", "x/../y"]
)  # fmt: skip
LISTS = st.lists(FRAGMENTS)
VALUES = st.one_of(FRAGMENTS, st.text(), LISTS.map(",".join), LISTS.map(";".join))
NAMES = st.one_of(
    st.sampled_from(sorted(ANNOTATIONS)),
    st.text(),
    st.text().map("tidegate.io/".__add__),
    st.text().map("consul.hashicorp.com/".__add__),
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(NAMES, VALUES),
    st.dictionaries(NAMES, VALUES),
    st.sampled_from([DEFAULT, NODE, Policy(families=(Family.IPV4,), dns=Dns(enabled=True))]),
)
def test_annotations_make_a_policy_or_tell_their_faults_and_nothing_else(namespace, own_ones, base):
    try:
        result = policy_of(namespace, own_ones, base, users=USERS)
    except InputErrors as error:
        result = error.faults
    assert isinstance(result, Policy) or all(fault.problem for fault in result)
