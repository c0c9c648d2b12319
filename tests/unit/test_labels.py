"""Names for addresses that are reused."""

import pytest

from tidegate.model import Direction, Edge, EdgeCount, EdgeKey, FlowClass, Instance
from tidegate.observe.labels import Labels


def instance(name, addresses, seen_from, seen_until=0.0):
    return Instance(
        id=f"{name}-{seen_from}",
        name=name,
        service=name,
        node="n1",
        addresses=tuple(addresses),
        seen_from=seen_from,
        seen_until=seen_until,
    )


OLD = instance("old", ["10.0.0.7", "fd00::7"], 100.0, 200.0)
NEW = instance("new", ["10.0.0.7"], 300.0)
MAPPED = instance("mapped", ["::ffff:10.0.0.9"], 0.0)
LABELS = Labels([OLD, NEW, MAPPED])


@pytest.mark.parametrize(
    ("address", "when", "name"),
    [
        ("10.0.0.7", 150.0, "old"),
        ("10.0.0.7", 100.0, "old"),
        ("10.0.0.7", 200.0, "old"),
        ("10.0.0.7", 1e9, "new"),
        ("10.0.0.7", 203.0, "old"),  # its last packets
        ("10.0.0.7", 298.0, "new"),  # called before it was published
        ("10.0.0.7", 250.0, None),
        ("10.0.0.7", 90.0, None),
        ("::ffff:10.0.0.7", 150.0, "old"),
        ("::ffff:a00:7", 150.0, "old"),
        ("FD00:0:0::7", 150.0, "old"),
        ("10.0.0.9", 5.0, "mapped"),
        ("10.0.0.8", 150.0, None),
        ("not an address", 150.0, None),
    ],
)
def test_an_address_has_the_name_of_who_had_it_at_that_time(address, when, name):
    found = LABELS.at(address, when)
    assert (found.name if found else None) == name


def test_where_two_claim_one_address_the_later_one_has_it():
    earlier = instance("earlier", ["10.0.0.1"], 100.0)
    later = instance("later", ["10.0.0.1"], 200.0)
    for order in ([earlier, later], [later, earlier]):
        assert Labels(order).at("10.0.0.1", 250.0) == later
        assert Labels(order).at("10.0.0.1", 150.0) == earlier


def test_a_new_catalog_replaces_the_old_one():
    labels = Labels([OLD])
    labels.replace([NEW])
    assert labels.at("10.0.0.7", 150.0) is None
    assert labels.at("10.0.0.7", 350.0) == NEW


@pytest.mark.parametrize("direction", list(Direction))
def test_an_edge_names_client_and_server_by_its_direction(direction):
    own = instance("own", ["10.0.0.1"], 0.0)
    key = EdgeKey(
        workload=1, direction=direction, peer="10.0.0.7", port=80, flow_class=FlowClass.TLS
    )
    count = EdgeCount(
        connections=1, bytes_to_server=0, bytes_to_client=0, first_seen=150.0, last_seen=350.0
    )
    labelled = LABELS.label(Edge(key=key, count=count), own)
    ends = (labelled.client, labelled.server)
    assert ends == ((NEW, own) if direction is Direction.INBOUND else (own, NEW))


def test_the_moments_at_which_an_address_changes_its_owner_are_known():
    assert LABELS.changes(0.0, 1e9) == {"10.0.0.7": (295.0,)}
    assert LABELS.changes(0.0, 294.0) == {}
    assert LABELS.changes(295.0, 1e9) == {}


@pytest.mark.parametrize(
    ("seen_until", "seen_from", "moment"),
    [
        (200.0, 300.0, 295.0),
        (200.0, 206.0, 203.0),
        (200.0, 200.0, 200.0),
        (200.0, 150.0, 150.0),
        (0.0, 150.0, 150.0),
    ],
)
def test_right_after_that_moment_the_address_is_the_later_owners(seen_until, seen_from, moment):
    former = instance("former", ["10.0.0.1"], 100.0, seen_until)
    later = instance("later", ["10.0.0.1"], seen_from)
    labels = Labels([later, former])
    assert labels.changes(0.0, 1e9) == {"10.0.0.1": (moment,)}
    assert labels.at("10.0.0.1", moment + 0.01) == later
    assert labels.at("10.0.0.1", moment - 0.01) != later
