"""An init container's policy is what its pod is told, by environment, labels and annotations."""

import json
import re
from pathlib import Path

import pytest

from tidegate.cli import init as command
from tidegate.errors import InputErrors
from tidegate.intent.policy import DEFAULT, PortRange
from tidegate.node import init
from tidegate.node.init import Failure, Pod, policy_of

CONSUL = {
    "ProxyUserID": "5995",
    "ProxyInboundPort": 20000,
    "ProxyOutboundPort": 15001,
    "ExcludeInboundPorts": ["20300"],
    "ExcludeOutboundPorts": [],
    "ExcludeOutboundCIDRs": [],
    "ExcludeUIDs": ["5996"],
}


def policy(environment=(), annotations=(), labels=()):
    return policy_of(
        Pod(environment=dict(environment), annotations=dict(annotations), labels=dict(labels))
    )


def faults(*args, **kwargs):
    with pytest.raises(InputErrors) as told:
        policy(*args, **kwargs)
    return [str(fault) for fault in told.value.faults]


class TestTheEnvironment:
    def test_without_a_word_of_tidegate_gives_the_built_in_policy(self):
        assert policy({"PATH": "/bin", "HOME": "/"}) == DEFAULT

    def test_has_a_variable_for_every_annotation_of_tidegate(self):
        assert (
            init.SETTINGS["TIDEGATE_EXCLUDE_INBOUND_PORTS"] == "tidegate.io/exclude-inbound-ports"
        )
        assert init.SETTINGS["TIDEGATE_REDIRECT"] == "tidegate.io/redirect"
        found = policy({"TIDEGATE_EXCLUDE_INBOUND_PORTS": "9000", "TIDEGATE_DNS": "all"})
        assert found.inbound.exclude_ports == (PortRange(9000, 9000),)
        assert found.dns.enabled

    def test_may_have_a_whole_document_that_single_variables_change(self):
        document = "inbound: {port: 21000}\noutbound: {port: 16001}"
        found = policy({"TIDEGATE_POLICY": document, "TIDEGATE_OUTBOUND_PORT": "17001"})
        assert (found.inbound.port, found.outbound.port) == (21000, 17001)

    def test_tells_the_addresses_of_the_node(self):
        found = policy(
            {"TIDEGATE_NODE_ADDRESSES": "10.0.0.7,fd00::7", "TIDEGATE_DIRECT_PROBES": "true"}
        )
        assert found.inbound.node_addresses == ("10.0.0.7/32", "fd00::7/128")

    def test_of_services_with_such_names_says_nothing(self):
        of_services = {
            "TIDEGATE_SERVER_SERVICE_HOST": "10.96.0.7",
            "TIDEGATE_SERVER_SERVICE_PORT_HTTP": "8500",
            "TIDEGATE_SERVER_PORT": "tcp://10.96.0.7:8500",
            "TIDEGATE_SERVER_PORT_8500_TCP_ADDR": "10.96.0.7",
        }
        assert policy(of_services) == DEFAULT

    def test_with_mistyped_variables_and_values_has_all_faults_told(self):
        told = faults(
            {
                "TIDEGATE_EXCLUDE_INBOUND_PORT": "1",
                "TIDEGATE_OUTBOUND_PORT": "x",
                "TIDEGATE_NODE_ADDRESSES": "here",
                "TIDEGATE_PROXY_UIDS": "envoy",
            },
            {"tidegate.io/mode": "sideways"},
        )
        assert [fault.partition(":")[0] for fault in told] == [
            "TIDEGATE_NODE_ADDRESSES",
            "TIDEGATE_PROXY_UIDS",
            "TIDEGATE_OUTBOUND_PORT",
            "tidegate.io/mode",
            "TIDEGATE_EXCLUDE_INBOUND_PORT",
        ]
        assert "TIDEGATE_EXCLUDE_INBOUND_PORTS" in told[-1]


class TestConsulsConfiguration:
    def test_is_read_from_the_variable_that_consul_sets(self):
        found = policy({"CONSUL_REDIRECT_TRAFFIC_CONFIG": json.dumps(CONSUL)})
        assert found.inbound.exclude_ports == (PortRange(20300, 20300),)
        assert str(found.outbound.exclude_uids[0]) == "5996"

    def test_is_added_to_by_consuls_single_annotations(self):
        found = policy(
            {"CONSUL_REDIRECT_TRAFFIC_CONFIG": json.dumps(CONSUL)},
            {"consul.hashicorp.com/transparent-proxy-exclude-inbound-ports": "8200"},
        )
        assert [str(one) for one in found.inbound.exclude_ports] == ["20300", "8200"]

    def test_of_the_annotation_wins_over_that_of_the_environment(self):
        annotated = json.dumps(CONSUL | {"ExcludeInboundPorts": ["20400"]})
        found = policy(
            {"CONSUL_REDIRECT_TRAFFIC_CONFIG": json.dumps(CONSUL)},
            {"consul.hashicorp.com/redirect-traffic-config": annotated},
        )
        assert [str(one) for one in found.inbound.exclude_ports] == ["20400"]

    def test_that_is_faulty_is_told_by_the_name_of_the_variable(self):
        broken = json.dumps(CONSUL | {"ProxyInboundPort": 70000})
        (told,) = faults({"CONSUL_REDIRECT_TRAFFIC_CONFIG": broken})
        assert told.startswith("CONSUL_REDIRECT_TRAFFIC_CONFIG.ProxyInboundPort: ")


class TestThePod:
    def test_wins_over_the_environment_and_annotations_over_labels(self):
        environment = {"TIDEGATE_OUTBOUND_PORT": "16001", "TIDEGATE_INBOUND_PORT": "21000"}
        labels = {"tidegate.io/outbound-port": "17001", "tidegate.io/inbound-port": "22000"}
        found = policy(environment, {"tidegate.io/inbound-port": "23000"}, labels)
        assert (found.outbound.port, found.inbound.port) == (17001, 23000)

    def test_may_have_labels_of_everybody_else(self):
        labels = {"app": "web", "consul.hashicorp.com/connect-inject-status": "injected"}
        assert policy(labels=labels) == DEFAULT


class TestExitCodes:
    def test_are_all_in_the_help_with_their_numbers(self):
        told = [line.split()[0] for line in command._CODES.splitlines()]
        assert told == [str(code) for code in (0, *map(int, Failure))]

    def test_are_all_in_the_document(self):
        text = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text()
        _, table = text.split("| exit code | meaning |\n| --- | --- |\n")
        told = re.findall(r"^\| (\d) \| \S", table, re.MULTILINE)
        assert told == [str(code) for code in (0, *map(int, Failure))]
