"""Which services of a machine are workloads, as its agent's configuration says, and what is refused of that."""

from typing import Any

import msgspec
import pytest

from tidegate.enforce.redirect.rules import LEAVE, Connection, Redirect, explain, rules_for
from tidegate.errors import InputError
from tidegate.intent.annotations import policy_from_annotations
from tidegate.intent.policy import DEFAULT, Dns, Mode
from tidegate.model import Direction, ServicePort
from tidegate.workloads.processes.settings import ProcessConfig, check

NOBODY = 65534
OWN = {"network": {"addresses": ["10.1.0.2"]}}
ON_HOST = {"host_network": {"user": "nobody"}}


def process(**fields: Any) -> ProcessConfig:
    return msgspec.convert({"service": "web", **fields}, ProcessConfig)


@pytest.mark.parametrize(
    "fields",
    [
        OWN,
        {"network": {"addresses": ["10.1.0.2", "fd00::2"]}},
        {"unit": "web.service"},
        {"unit": "web@1.service", "port": 80},
        {"pid": 71},
        {"pid": "/run/web.pid"},
        {"listens": 8080, "interface": "ens3"},
        ON_HOST,
        {"service": "east/billing/web", **OWN},
    ],
)
def test_a_service_is_found_in_one_way(fields: dict[str, Any]) -> None:
    check((process(**fields),))


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "[0]", "it is not said where it is; expected exactly one of"),
        ({"unit": "web.service", "listens": 80}, "[0]", "unit and listens are said"),
        ({"service": "", **OWN}, "[0].service", "is empty"),
        ({"name": "Web_1", **OWN}, "[0].name", "'Web_1' is no name"),
        ({"unit": "web"}, "[0].unit", "such as web.service"),
        ({"unit": "../web.service"}, "[0].unit", "is no unit"),
        ({"pid": -1}, "[0].pid", "is no process"),
        ({"pid": "web.pid"}, "[0].pid", "depends on where the agent is started"),
        ({"listens": 70000}, "[0].listens", "no port 70000"),
        ({"port": -1, **OWN}, "[0].port", "no port -1"),
        ({"interface": "lo", **OWN}, "[0].interface", "'lo' is never redirected"),
        ({"network": {"addresses": []}}, "[0].network.addresses", "has 0 addresses"),
        ({"network": {"addresses": ["::1", "::2"]}}, "[0].network.addresses", "has 2 addresses"),
        ({"network": {"addresses": ["web"]}}, "[0].network.addresses", "is not an address"),
        ({"host_network": {"user": "root"}}, "[0].host_network.user", "is root"),
        ({"host_network": {"user": "5995"}}, "[0].host_network.user", "is the sidecar's"),
        ({"host_network": {"user": "tg-none"}}, "[0].host_network.user", "there is no user"),
        (
            {**ON_HOST, "annotations": {"tidegate.io/exclude-uids": "7"}},
            "[0].host_network",
            "tidegate.io/exclude-uids cannot be chosen",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(
    fields: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InputError) as refused:
        check((process(**fields),))
    assert refused.value.field == field
    assert words in str(refused.value)


def test_two_services_cannot_have_one_name_and_only_one_is_in_the_hosts_namespace() -> None:
    with pytest.raises(InputError, match="twice") as refused:
        check((process(**OWN), process(unit="other.service")))
    assert refused.value.field == "[1].name"
    check((process(**OWN), process(name="other", unit="other.service")))
    with pytest.raises(InputError, match="can have one sidecar") as refused:
        check((process(**ON_HOST), process(service="db", **ON_HOST)))
    assert refused.value.field == "[1].host_network"


def explained(one: ProcessConfig, **connection: Any) -> object:
    base = msgspec.structs.replace(
        DEFAULT, drop_invalid=True, mode=Mode.TPROXY, dns=Dns(enabled=True)
    )
    policy = policy_from_annotations(one.redirected_by, base)
    assert policy.mode is Mode.REDIRECT
    assert not policy.drop_invalid
    return explain(rules_for(policy), Connection(destination="192.0.2.1", **connection)).action


def test_in_the_hosts_namespace_only_the_services_ports_and_user_are_redirected() -> None:
    further = ServicePort(service="admin", port=9000)
    one = process(port=8080, more_ports=[msgspec.to_builtins(further)], **ON_HOST)
    inbound = {"direction": Direction.INBOUND}
    for port in (8080, 9000):
        assert explained(one, port=port, **inbound) == Redirect(20000)
    for port in (22, 443, 8081, 8501):
        assert explained(one, port=port, **inbound) == LEAVE
    outbound = {"direction": Direction.OUTBOUND, "port": 443}
    assert explained(one, uid=NOBODY, **outbound) == Redirect(15001)
    # The agent and the server, the sidecar, whoever comes by ssh, and those on both sides of the user.
    for uid in (0, 5995, 1000, NOBODY - 1, NOBODY + 1, 2**32 - 2):
        assert explained(one, uid=uid, **outbound) == LEAVE
    assert explained(one, uid=1000, direction=Direction.OUTBOUND, port=53, protocol="udp") == LEAVE


def test_a_service_of_the_host_that_only_calls_takes_nothing_in() -> None:
    one = process(**ON_HOST)
    for port in (22, 80, 8080):
        assert explained(one, port=port, direction=Direction.INBOUND) == LEAVE
    assert explained(one, uid=NOBODY, direction=Direction.OUTBOUND, port=80) == Redirect(15001)
