"""What a workload's sidecar is told to do: which instances it calls with mTLS, and from when on."""

from pathlib import Path

import msgspec
import pytest

from tidegate.enforce.sidecar.spec import Endpoint, SidecarSpec
from tidegate.errors import InputError
from tidegate.intent.policy import DEFAULT, Inbound, Mode, Outbound, Policy, PortRange
from tidegate.model import (
    Instance,
    IntentionRule,
    MutualTLSMode,
    ServiceIntent,
    ServicePort,
    TLSSettings,
    Workload,
)
from tidegate.node.config import AgentConfig
from tidegate.node.wanted import agreed_policy, neighbours, sidecar_spec

CONFIG = AgentConfig(
    node="n1",
    server="unix:///run/s.sock",
    workloads=Path("/run/w"),
    trust_domain="mesh.consul",
    datacenter="dc2",
)
WEB = Workload(id="id-web", name="web", service="web", node="n1", netns="/run/netns/web", port=8000)
ALLOW_WEB = IntentionRule(source="web", allow=True)
WEB_INTENT = ServiceIntent(service="web", mode=MutualTLSMode.PERMISSIVE, index=3)
API_INTENT = ServiceIntent(service="api", intentions=(ALLOW_WEB,), index=10)
INTENTS = {"web": WEB_INTENT, "api": API_INTENT}


def api(name="api-1", *addresses, **fields):
    whole = {
        "id": f"id-{name}",
        "name": name,
        "service": "api",
        "node": "n2",
        "addresses": addresses or ("10.2.0.2", "fd00:2::2"),
        "port": 8080,
        "meshed": True,
        "applied_index": 10,
    }
    return Instance(**{**whole, **fields})


def spec_for(
    *instances, workload=WEB, intents=INTENTS, present=None, policy=DEFAULT
) -> SidecarSpec:
    return sidecar_spec(CONFIG, workload, policy, intents, neighbours(instances), present)


def called(spec):
    return {
        (upstream.service, endpoint.address)
        for upstream in spec.upstreams
        for endpoint in upstream.endpoints
    }


BOTH = {("api", "10.2.0.2"), ("api", "fd00:2::2")}


def test_the_sidecar_is_the_services_own():
    spec = spec_for()
    assert (spec.service, spec.mode, spec.port) == ("web", MutualTLSMode.PERMISSIVE, 8000)
    assert (spec.trust_domain, spec.datacenter) == ("mesh.consul", "dc2")
    assert spec.upstreams == ()


def test_the_sidecar_listens_where_the_policy_sends_connections():
    policy = Policy(inbound=Inbound(port=20001), outbound=Outbound(port=15002), mode=Mode.TPROXY)
    spec = spec_for(policy=policy)
    assert (spec.inbound_port, spec.outbound_port, spec.transparent) == (20001, 15002, True)
    usual = spec_for(policy=None)
    assert (usual.inbound_port, usual.outbound_port, usual.transparent) == (20000, 15001, False)


def test_who_may_call_is_taken_over_from_the_intent():
    intent = ServiceIntent(
        service="web", intentions=(ALLOW_WEB,), default_allow=True, mesh_destinations_only=True
    )
    spec = spec_for(intents={"web": intent})
    assert spec.intentions == (ALLOW_WEB,)
    assert spec.default_allow
    assert spec.mesh_destinations_only


def test_a_workload_that_only_calls_has_no_service_port():
    caller = msgspec.structs.replace(WEB, port=0)
    assert spec_for(workload=caller).port == 0


def test_an_instance_that_enforces_the_intention_is_called_in_both_families():
    spec = spec_for(api())
    assert called(spec) == BOTH
    [upstream] = spec.upstreams
    assert (upstream.port, upstream.datacenter) == (8080, "dc2")
    assert upstream.endpoints[0] == Endpoint(
        address="10.2.0.2", service_port=8080, proxy_port=20000
    )


@pytest.mark.parametrize("applied", [0, 9])
def test_an_instance_that_does_not_enforce_the_intention_yet_is_not_called(applied):
    assert spec_for(api(applied_index=applied)).upstreams == ()


@pytest.mark.parametrize("applied", [10, 11])
def test_an_instance_is_called_from_the_index_of_its_services_intent_on(applied):
    assert called(spec_for(api(applied_index=applied))) == BOTH


def test_one_instance_that_lags_behind_does_not_hold_the_others_back():
    spec = spec_for(api(), api("api-2", "10.2.0.9", applied_index=9))
    assert called(spec) == BOTH


def test_an_instance_that_is_called_stays_called_while_it_takes_in_a_later_intent():
    present = spec_for(api())
    later = INTENTS | {"api": msgspec.structs.replace(API_INTENT, index=20)}
    assert called(spec_for(api(), intents=later, present=present)) == BOTH
    assert called(spec_for(api(), intents=later)) == set()


def test_an_instance_that_comes_later_is_not_called_because_others_are():
    present = spec_for(api())
    later = INTENTS | {"api": msgspec.structs.replace(API_INTENT, index=20)}
    spec = spec_for(api(), api("api-2", "10.2.0.9"), intents=later, present=present)
    assert called(spec) == BOTH


def test_without_the_intention_the_service_is_no_upstream_any_more():
    present = spec_for(api())
    for intentions in ((), (IntentionRule(source="web", allow=False),)):
        gone = INTENTS | {"api": msgspec.structs.replace(API_INTENT, intentions=intentions)}
        assert spec_for(api(), intents=gone, present=present).upstreams == ()


@pytest.mark.parametrize(
    "change",
    [{"seen_until": 5.0}, {"meshed": False}, {"port": 0}],
    ids=["departed", "left the mesh", "has no port"],
)
def test_an_instance_that_cannot_be_called_is_dropped_also_where_it_was_called(change):
    present = spec_for(api())
    assert spec_for(msgspec.structs.replace(api(), **change), present=present).upstreams == ()
    assert spec_for(present=present).upstreams == ()


def test_an_address_that_another_service_has_now_is_not_called_as_the_former():
    present = spec_for(api())
    other = api(service="db")
    intents = INTENTS | {
        "api": msgspec.structs.replace(API_INTENT, index=20),
        "db": ServiceIntent(service="db", intentions=(ALLOW_WEB,), index=30),
    }
    assert spec_for(other, intents=intents, present=present).upstreams == ()


def test_a_workload_never_calls_itself_but_its_siblings():
    intents = {"web": msgspec.structs.replace(WEB_INTENT, intentions=(ALLOW_WEB,))}
    own = api("web", "10.1.0.1", service="web", id="id-web", port=8000)
    sibling = api("web-2", "10.1.0.2", service="web", port=8000)
    assert called(spec_for(own, sibling, intents=intents)) == {("web", "10.1.0.2")}


def test_an_instance_with_a_fault_is_told_and_the_others_are_called():
    bad = [
        api("port", "10.9.0.1", port=70000),
        api("proxy", "10.9.0.2", inbound_port=-1),
        api("address", "10.9.0.300"),
        api("name", "10.9.0.4", service="Not_A_Name"),
    ]
    known = neighbours([*bad, api()])
    assert called(spec_for(*bad, api())) == BOTH
    faults = known.faults
    assert len(faults) == len(bad)
    for one, told in zip(sorted(bad, key=lambda one: one.id), faults, strict=True):
        assert told.startswith(f"{one.name} on n2: ")


def test_workloads_that_only_call_or_are_not_meshed_are_no_fault():
    others = [api(port=0), api(meshed=False), api(seen_until=5.0, inbound_port=-1)]
    assert neighbours(others).faults == ()
    assert spec_for(*others).upstreams == ()


def test_the_order_in_which_the_catalog_answers_changes_nothing():
    first, second = api(), api("api-2", "10.2.0.9")
    assert spec_for(first, second) == spec_for(second, first)


def test_a_workload_that_cannot_have_a_sidecar_is_an_error_for_a_person():
    odd = msgspec.structs.replace(WEB, service="Not_A_Name")
    with pytest.raises(InputError, match="Not_A_Name"):
        spec_for(workload=odd, intents={"Not_A_Name": ServiceIntent(service="Not_A_Name")})


def test_all_services_of_a_workload_and_of_the_instances_that_it_calls_are_in():
    admin = ServicePort(service="api-admin", port=9090)
    intents = INTENTS | {
        "api-admin": ServiceIntent(
            service="api-admin",
            mode=MutualTLSMode.PERMISSIVE,
            intentions=(ALLOW_WEB,),
            index=12,
        )
    }
    several = api(more_ports=(admin,))
    spec = spec_for(several, intents=intents)
    assert [(one.service, one.port) for one in spec.upstreams] == [("api", 8080)]
    spec = spec_for(msgspec.structs.replace(several, applied_index=12), intents=intents)
    assert [(one.service, one.port) for one in spec.upstreams] == [
        ("api", 8080),
        ("api-admin", 9090),
    ]
    itself = msgspec.structs.replace(WEB, service="api", port=8080, more_ports=(admin,))
    first, second = spec_for(workload=itself, intents=intents).services
    assert (first.service, first.port, first.mode) == ("api", 8080, MutualTLSMode.STRICT)
    assert (second.service, second.port, second.mode) == (
        "api-admin",
        9090,
        MutualTLSMode.PERMISSIVE,
    )
    assert second.intentions == (ALLOW_WEB,)


def test_a_service_of_another_namespace_is_called_by_its_whole_name():
    intents = {
        "web": WEB_INTENT,
        "shop/api": msgspec.structs.replace(API_INTENT, service="shop/api"),
    }
    spec = spec_for(api(service="shop/api", namespace="k8s-namespace"), intents=intents)
    assert called(spec) == {("shop/api", "10.2.0.2"), ("shop/api", "fd00:2::2")}


def test_a_virtual_address_is_used_once_all_its_instances_are_called_with_mtls():
    virtual = {"virtual_addresses": ("10.96.0.1",)}
    one, other = api(**virtual), api("api-2", "10.2.0.9", meshed=False, **virtual)
    assert [each.virtual_addresses for each in spec_for(one, other).upstreams] == [()]
    both = spec_for(one, msgspec.structs.replace(other, meshed=True))
    assert [each.virtual_addresses for each in both.upstreams] == [("10.96.0.1",)]
    again = spec_for(one, other, present=both)
    assert [each.virtual_addresses for each in again.upstreams] == [("10.96.0.1",)], "it stays"


def test_a_sidecar_of_another_mesh_is_not_called_with_mtls_of_this_one():
    assert called(spec_for(api(of_another=True))) == set()


def test_at_a_virtual_address_its_own_port_is_dialled_where_it_has_one():
    virtual = {"virtual_addresses": ("10.96.0.1",)}
    assert [one.virtual_ports for one in spec_for(api(**virtual)).upstreams] == [()]
    one, other = api(**virtual, virtual_port=443), api("api-2", "10.2.0.9", virtual_port=80)
    assert [each.virtual_ports for each in spec_for(one, other).upstreams] == [(80, 443)]


def test_what_a_person_registered_at_an_address_of_an_instance_is_no_further_instance():
    registered = api("api-by-hand", meshed=False, virtual_addresses=("10.96.0.1",))
    [upstream] = spec_for(api(), registered).upstreams
    assert upstream.virtual_addresses == ("10.96.0.1",)


def test_an_explicit_upstream_is_called_without_an_intention():
    intents = INTENTS | {"api": msgspec.structs.replace(API_INTENT, intentions=())}
    assert spec_for(api(), intents=intents).upstreams == ()
    own = Instance(id="id-web", name="web", service="web", node="n1", upstreams=("api", "gone"))
    assert called(spec_for(api(), own, intents=intents)) == BOTH
    at = msgspec.structs.replace(WEB, addresses=("10.1.0.1",))
    by_hand = Instance(
        id="by-hand",
        name="web",
        service="web",
        node="n1",
        addresses=("10.1.0.1",),
        upstreams=("api",),
    )
    assert called(spec_for(api(), by_hand, intents=intents, workload=at)) == BOTH
    assert spec_for(api(), by_hand, intents=intents).upstreams == (), "another workload's"


def test_the_mode_of_a_registration_wins_over_config_entries():
    own = Instance(
        id="id-web", name="web", service="web", node="n1", registered_mode=MutualTLSMode.STRICT
    )
    assert spec_for(own).mode is MutualTLSMode.STRICT


def test_tls_settings_and_access_logs_are_taken_over_from_the_intent():
    old, new = TLSSettings(max_version="TLSv1_2"), TLSSettings(min_version="TLSv1_3")
    intent = msgspec.structs.replace(
        WEB_INTENT, incoming_tls=old, outgoing_tls=new, access_logs=True
    )
    spec = spec_for(intents={"web": intent})
    assert (spec.incoming_tls, spec.outgoing_tls, spec.access_logs) == (old, new, True)


def test_the_port_of_the_outbound_listener_is_the_config_entries_where_the_policy_says_none():
    says = msgspec.structs.replace(WEB_INTENT, outbound_port=16000)
    assert agreed_policy(DEFAULT, WEB_INTENT) == DEFAULT
    assert agreed_policy(DEFAULT, says).outbound.port == 16000
    same = Policy(outbound=Outbound(port=16000))
    assert agreed_policy(same, says) == same


def test_two_ports_for_the_outbound_listener_are_a_contradiction_for_a_person():
    says = msgspec.structs.replace(WEB_INTENT, outbound_port=16000)
    with pytest.raises(InputError, match=r"say 16000 for web.* 15002"):
        agreed_policy(Policy(outbound=Outbound(port=15002)), says)
    excluded = Policy(outbound=Outbound(exclude_ports=(PortRange(16000, 16000),)))
    with pytest.raises(InputError, match="16000"):
        agreed_policy(excluded, says)
