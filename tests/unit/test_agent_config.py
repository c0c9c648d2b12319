"""The agent's configuration file: what is good, and one sentence with file and field for what is not."""

from pathlib import Path

import pytest
import yaml

from tidegate.enforce.redirect.engine import BackendChoice
from tidegate.errors import InputError, InputErrors
from tidegate.intent.policy import DEFAULT, Inbound, Mode, Policy, PortRange
from tidegate.node.config import (
    AgentConfig,
    OnFailure,
    Profile,
    RedirectConfig,
    load_config,
)
from tidegate.verdict.steps import Environment

GOOD = {
    "node": "node1",
    "server": "unix:///run/tidegate/server.sock",
    "workloads": "/run/tidegate/workloads",
    "trust_domain": "1a2b.consul",
}


@pytest.fixture
def load(tmp_path):
    def load_one(content) -> AgentConfig:
        path = tmp_path / "agent.yaml"
        raw = content if isinstance(content, bytes) else yaml.safe_dump(content).encode()
        path.write_bytes(raw)
        return load_config(path)

    return load_one


def fault(load, content) -> InputError:
    """The one sentence: names the file, has no second line."""
    with pytest.raises(InputError) as caught:
        load(content)
    assert "agent.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return caught.value


def test_what_is_not_said_has_the_documented_defaults(load):
    config = load(GOOD)
    assert config.node == "node1"
    assert config.workloads == Path("/run/tidegate/workloads")
    assert config.socket == Path("/run/tidegate/agent.sock")
    assert config.window == 86400.0
    assert config.environment is Environment.VM
    assert config.redirect == RedirectConfig(
        backend=BackendChoice.AUTO, adopt=False, on_failure=OnFailure.LEAVE, policy=DEFAULT
    )


def test_all_fields_are_read(load):
    config = load(
        GOOD
        | {
            "node_addresses": ["10.0.0.1", "fd00::1"],
            "run_dir": "/run/a",
            "state_dir": "/var/a",
            "socket": "/run/a/s",
            "bpffs": "/sys/fs/bpf/a",
            "datacenter": "dc2",
            "window": 8,
            "leaf_lifetime": 60.5,
            "environment": "lab",
            "lab": "demo",
            "server": "http://127.0.0.1:8500",
        }
    )
    assert (config.window, config.leaf_lifetime, config.lab) == (8.0, 60.5, "demo")
    assert config.node_addresses == ("10.0.0.1", "fd00::1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nod", "x"),
        ("node", 7),
        ("node", ""),
        ("node", "Node_1"),
        ("node", "../../etc"),
        ("server", "localhost:8500"),
        ("server", "unix://relative"),
        ("workloads", ["/a"]),
        ("workloads", "here"),
        ("node_addresses", "10.0.0.1"),
        ("node_addresses", ["10.0.0.256"]),
        ("run_dir", "run"),
        ("state_dir", ""),
        ("socket", "/" + "s" * 107),
        ("socket", "agent.sock"),
        ("bpffs", "pins"),
        ("trust_domain", "Mesh"),
        ("datacenter", "dc_1"),
        ("environment", "cloud"),
        ("window", 0),
        ("window", -1.5),
        ("window", "24h"),
        ("window", float("nan")),
        ("window", float("inf")),
        ("leaf_lifetime", 0),
        ("leaf_lifetime", float("nan")),
        ("redirect", "nftables"),
        ("redirect", None),
        ("redirect", {"backend": "ebpf"}),
        ("redirect", {"adopt": "yes"}),
        ("redirect", {"on_failure": "drop"}),
        ("redirect", {"on_failures": "block"}),
    ],
)
def test_a_wrong_field_is_named(load, field, value):
    assert field in str(fault(load, GOOD | {field: value}))


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_named(load, field):
    assert field in str(fault(load, {key: value for key, value in GOOD.items() if key != field}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a\n- b\n",
        b"node: [",
        b"a: b: c\n\td",
        b"\xff\xfe\x00x",
        b"node: \x01",
        b"just words",
    ],
)
def test_what_is_no_configuration_at_all_is_one_sentence(load, content):
    fault(load, content)


def test_how_workloads_are_redirected_on_the_node_is_read(load):
    redirect = {
        "backend": "iptables",
        "adopt": True,
        "on_failure": "block",
        "policy": {"mode": "tproxy", "inbound": {"direct_probes": True, "exclude_ports": [9100]}},
    }
    config = load(GOOD | {"node_addresses": ["10.0.0.1", "fe80::1%eth0"], "redirect": redirect})
    assert config.redirect == RedirectConfig(
        backend=BackendChoice.IPTABLES,
        adopt=True,
        on_failure=OnFailure.BLOCK,
        policy=Policy(
            mode=Mode.TPROXY,
            inbound=Inbound(
                direct_probes=True,
                exclude_ports=(PortRange(9100, 9100),),
                node_addresses=("10.0.0.1/32", "fe80::1/128"),
            ),
        ),
    )


@pytest.mark.parametrize("policy", [None, {}])
def test_the_base_policy_knows_the_nodes_addresses(load, policy):
    said = {} if policy is None else {"redirect": {"policy": policy}}
    config = load(GOOD | {"node_addresses": ["fd00:0::1", "::ffff:10.0.0.1"]} | said)
    assert config.redirect.policy.inbound.node_addresses == ("fd00::1/128", "10.0.0.1/32")


def test_users_of_a_policy_are_those_of_this_machine(load):
    config = load(GOOD | {"redirect": {"policy": {"proxy": {"uids": ["root"], "gids": ["root"]}}}})
    assert (config.redirect.policy.proxy.uids, config.redirect.policy.proxy.gids) == ((0,), (0,))


def test_all_faults_of_a_policy_are_told_with_file_line_and_field(load):
    text = yaml.safe_dump(GOOD) + (
        "redirect:\n  policy:\n    mode: ebpf\n    outbound:\n      exclude_ports: [70000]\n"
    )
    with pytest.raises(InputErrors) as caught:
        load(text.encode())
    first, second = str(caught.value).splitlines()
    assert "agent.yaml: line 7: redirect.policy.mode: 'ebpf' is not a mode; expected" in first
    assert "agent.yaml: line 9: redirect.policy.outbound.exclude_ports[0]: there is no" in second


@pytest.mark.parametrize(
    "policy", ["tproxy", [1], 7, "&a {mode: *a}", "{mode: tproxy, mode: redirect}"]
)
def test_what_is_no_policy_is_refused_with_the_file(load, policy):
    text = yaml.safe_dump(GOOD) + f"redirect:\n  policy: {policy}\n"
    fault(load, text.encode())


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=why) as caught:
            load_config(path)
        assert str(path) in str(caught.value)


def test_one_source_of_workloads_is_enough_and_none_is_too_few(load):
    without = {key: value for key, value in GOOD.items() if key != "workloads"}
    for section in (
        {"kubernetes": {"enrol": ["consul", "annotated"]}},
        {"cni": {}},
        {"processes": [{"service": "web", "unit": "web.service"}]},
    ):
        assert load(without | section).workloads is None
    assert "no source of workloads is there" in str(fault(load, without))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"kubernetes": {"token_file": "token"}}, "kubernetes.token_file"),
        ({"kubernetes": {"enrol": "everything"}}, "kubernetes.enrol"),
        ({"cni": {"socket": "cni.sock"}}, "cni.socket"),
        ({"cni": {"sockets": "/cni.sock"}}, "sockets"),
        ({"processes": [{"service": "web", "unit": "web"}]}, "processes[0].unit"),
        ({"metrics": "20200"}, "metrics"),
    ],
)
def test_a_fault_within_a_section_is_named_by_its_whole_path(load, section, field):
    assert field in str(fault(load, GOOD | section))


def test_the_host_is_never_blocked_because_a_service_of_it_cannot_be_redirected(load):
    web = {"service": "web", "port": 80, "host_network": {"user": "www-data"}}
    with_host = GOOD | {"processes": [web]}
    assert load(with_host).processes[0].host_network
    refused = fault(load, with_host | {"redirect": {"on_failure": "block"}})
    assert refused.field == "processes[0].host_network"


def test_others_are_told_where_the_agent_can_be_reached(load):
    assert load(GOOD).agent_api == "unix:///run/tidegate/agent.sock"
    node = GOOD | {"peers": "0.0.0.0:20201", "node_addresses": ["10.0.0.1", "fd00::1"]}
    assert load(node).agent_api == "https://10.0.0.1:20201"
    assert load(node | {"advertise": "fd00::7"}).agent_api == "https://[fd00::7]:20201"
    nowhere = fault(load, GOOD | {"peers": "0.0.0.0:20201"})
    assert nowhere.field == "peers"
    assert fault(load, node | {"advertise": "here"}).field == "advertise"
    assert fault(load, node | {"peers": "20201"}).field == "peers"


def test_whose_mtls_is_the_meshs_is_consuls_istios_or_kumas(load):
    assert load(GOOD).profile is Profile.CONSUL
    assert load(GOOD | {"profile": "istio"}).profile is Profile.ISTIO
    fault(load, GOOD | {"profile": "linkerd"})
