"""Edges as people read them: both ends named, each connection told once."""

import msgspec
import pytest

from tidegate.intent.annotations import policy_from_annotations
from tidegate.intent.policy import DEFAULT
from tidegate.model import Direction, Edge, EdgeCount, EdgeKey, FlowClass, Hint, Instance, Workload
from tidegate.node.flows import OUTSIDE_SIDECARS, THROUGH_SIDECAR, named, told_once
from tidegate.observe.labels import Labels

API = Workload(
    id="id-api",
    name="api-1",
    service="api",
    node="n1",
    netns="/run/netns/api",
    port=8080,
    addresses=("10.1.0.2", "fd00:1::2"),
    meshed=True,
)
WEB = Workload(
    id="id-web",
    name="web-1",
    service="web",
    node="n2",
    netns="/run/netns/web",
    addresses=("10.2.0.3", "fd00:2::3"),
)


def instance(workload):
    return Instance(
        id=workload.id,
        name=workload.name,
        service=workload.service,
        node=workload.node,
        addresses=workload.addresses,
        port=workload.port,
        meshed=workload.meshed,
        seen_from=1.0,
    )


@pytest.fixture
def labels():
    known = Labels()
    known.replace((instance(API), instance(WEB)))
    return known


def edge(at=API, direction=Direction.INBOUND, peer="10.2.0.3", port=8080, **fields):
    key = EdgeKey(
        workload=at.key,
        direction=direction,
        peer=peer,
        port=port,
        flow_class=fields.pop("flow_class", FlowClass.PLAINTEXT),
    )
    whole = {
        "connections": 1,
        "bytes_to_server": 10,
        "bytes_to_client": 20,
        "first_seen": 100.0,
        "last_seen": 200.0,
    }
    return Edge(key=key, count=EdgeCount(**{**whole, **fields}))


def outbound(peer="10.1.0.2", **fields):
    return edge(at=WEB, direction=Direction.OUTBOUND, peer=peer, **fields)


def test_an_inbound_edge_names_its_caller_and_an_outbound_one_its_server(labels):
    inbound = named(edge(), API, None, labels)
    assert (inbound.caller.workload, inbound.server.workload) == ("web-1", "api-1")
    assert (inbound.caller.service, inbound.caller.node) == ("web", "n2")
    assert inbound.server.meshed
    assert not inbound.caller.meshed
    other_way = named(outbound(), WEB, None, labels)
    assert (other_way.caller.workload, other_way.server.workload) == ("web-1", "api-1")


def test_a_stranger_has_an_address_and_no_name(labels):
    caller = named(edge(peer="192.0.2.1"), API, None, labels).caller
    assert (caller.address, caller.workload, caller.service) == ("192.0.2.1", "", "")


@pytest.mark.parametrize(
    ("peer", "own"),
    [("10.2.0.3", "10.1.0.2"), ("fd00:2::3", "fd00:1::2"), ("192.0.2.1", "10.1.0.2")],
)
def test_the_workload_has_its_address_of_the_peers_family(labels, peer, own):
    assert named(edge(peer=peer), API, None, labels).server.address == own


def test_a_workload_without_an_address_of_that_family_has_none(labels):
    assert named(outbound(peer="fd00:9::9"), WEB, None, labels).caller.address == "fd00:2::3"
    only_ipv4 = Workload(
        id="x", name="x", service="x", node="n1", netns="", addresses=("10.1.0.9",)
    )
    server = named(edge(peer="fd00:2::3"), only_ipv4, None, labels).server
    assert (server.address, server.addresses) == ("", ())


def test_the_path_is_that_of_the_policy_in_force(labels):
    policy = policy_from_annotations(
        {
            "consul.hashicorp.com/transparent-proxy-exclude-inbound-ports": "9000",
            "consul.hashicorp.com/transparent-proxy-exclude-outbound-ports": "5432",
        }
    )

    def path(one, own, by=policy):
        return named(one, own, by, labels).path

    assert path(edge(port=8080), API) == THROUGH_SIDECAR
    assert path(edge(port=9000), API) == OUTSIDE_SIDECARS
    assert path(edge(port=5432), API) == THROUGH_SIDECAR
    assert path(outbound(port=5432), WEB) == OUTSIDE_SIDECARS
    assert path(outbound(port=9000), WEB) == THROUGH_SIDECAR
    assert path(edge(port=20000), API) == THROUGH_SIDECAR, "the sidecar's own port"
    assert path(edge(port=8080), API, None) == OUTSIDE_SIDECARS


def test_both_families_of_a_pair_are_one_row(labels):
    four = named(edge(first_seen=50.0), API, None, labels)
    six = named(edge(peer="fd00:2::3", connections=4, last_seen=300.0), API, None, labels)
    for order in ((four, six), (six, four)):
        [merged] = told_once(order, {("api-1", "n1")})
        assert (merged.connections, merged.bytes_to_server, merged.bytes_to_client) == (5, 20, 40)
        assert (merged.first_seen, merged.last_seen) == (50.0, 300.0)
        assert merged.caller.address == "fd00:2::3", "the address that was used last"
        assert merged.caller.addresses == ("10.2.0.3", "fd00:2::3")
        assert merged.server.addresses == ("10.1.0.2", "fd00:1::2")


def test_what_differs_in_class_port_path_or_stranger_stays_apart(labels):
    rows = [
        named(edge(), API, None, labels),
        named(edge(), API, DEFAULT, labels),
        named(edge(port=8081), API, None, labels),
        named(edge(flow_class=FlowClass.MESH), API, None, labels),
        named(edge(peer="192.0.2.1"), API, None, labels),
        named(edge(peer="192.0.2.2"), API, None, labels),
    ]
    assert len(told_once(rows, ())) == len(rows)


def test_a_flow_between_observed_workloads_is_told_from_the_servers_side(labels):
    rows = [named(edge(), API, None, labels), named(outbound(), WEB, None, labels)]
    [told] = told_once(rows, {("api-1", "n1"), ("web-1", "n2")})
    assert told.observed_at is Direction.INBOUND


def test_the_callers_view_stays_where_the_server_is_not_observed(labels):
    rows = [
        named(outbound(), WEB, None, labels),
        named(outbound(peer="192.0.2.1"), WEB, None, labels),
    ]
    assert len(told_once(rows, {("web-1", "n2")})) == 2


def test_a_namesake_on_another_node_does_not_hide_a_flow(labels):
    rows = [named(outbound(), WEB, None, labels)]
    assert len(told_once(rows, {("api-1", "n9")})) == 1


@pytest.mark.parametrize("flow_class", [FlowClass.EMPTY, FlowClass.UNKNOWN])
def test_connections_that_turned_out_to_be_something_else_are_not_shown(labels, flow_class):
    left = {"flow_class": flow_class, "bytes_to_server": 0, "bytes_to_client": 0}
    gone = named(edge(connections=0, **left), API, None, labels)
    corrected = named(edge(connections=-2, **left), API, None, labels)
    assert corrected.connections == 0, "a count is never below zero"
    assert told_once([gone, corrected], ()) == ()


def test_a_correction_in_one_family_takes_nothing_from_the_other(labels):
    four = named(edge(flow_class=FlowClass.EMPTY, connections=3), API, None, labels)
    six = named(
        edge(flow_class=FlowClass.EMPTY, connections=-2, peer="fd00:2::3"), API, None, labels
    )
    [told] = told_once([four, six], ())
    assert told.connections == 3


def test_a_connection_that_was_opened_before_the_window_is_shown(labels):
    [told] = told_once([named(edge(connections=0), API, None, labels)], ())
    assert told.connections == 0


def test_the_order_does_not_depend_on_the_order_of_the_nodes_answers(labels):
    rows = [
        named(edge(peer=f"192.0.2.{n}", port=port), API, None, labels)
        for n in range(3)
        for port in (8080, 8081)
    ]
    assert told_once(rows, ()) == told_once(reversed(rows), ())


def test_the_hints_of_all_that_is_told_as_one_are_united_in_their_order(labels):
    four = named(edge(hints=(Hint.KAFKA,)), API, None, labels)
    six = named(edge(peer="fd00:2::3", hints=(Hint.HTTP1, Hint.KAFKA)), API, None, labels)
    assert four.hints == (Hint.KAFKA,)
    for order in ((four, six), (six, four)):
        [merged] = told_once(order, ())
        assert merged.hints == (Hint.HTTP1, Hint.KAFKA)
        assert b'"hints":["http1","kafka"]' in msgspec.json.encode(merged)
