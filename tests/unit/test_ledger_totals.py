"""The ledger's sums by direction and class, which the metrics are made from."""

from contextlib import closing

import pytest

from tidegate.model import CountedEdge, Direction, EdgeCount, EdgeKey, FlowClass
from tidegate.observe.ledger import Ledger

NOW = 1_700_000_000.0
PLAINTEXT = (Direction.INBOUND, FlowClass.PLAINTEXT)
EMPTY = (Direction.INBOUND, FlowClass.EMPTY)


def counted(slot, connections, to_server, to_client, flow_class=FlowClass.PLAINTEXT, live=True):
    return CountedEdge(
        slot=slot,
        generation=1,
        live=live,
        key=EdgeKey(
            workload=1,
            direction=Direction.INBOUND,
            peer=f"10.0.0.{slot}",
            port=80,
            flow_class=flow_class,
        ),
        count=EdgeCount(
            connections=connections,
            bytes_to_server=to_server,
            bytes_to_client=to_client,
            first_seen=NOW,
            last_seen=NOW,
        ),
    )


def sums(ledger, kind=PLAINTEXT):
    total = ledger.totals[kind]
    return total.connections, total.to_server, total.to_client


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def test_all_edges_of_a_class_are_one_sum(path):
    with closing(Ledger.open(path)) as ledger:
        ledger.record(NOW, "map", [counted(1, 2, 10, 20), counted(2, 1, 1, 2)], {})
        ledger.record(NOW, "map", [counted(1, 5, 11, 25)], {})
        assert sums(ledger) == (6, 12, 27)
        assert ledger.held == {FlowClass.PLAINTEXT: 2}


def test_a_connection_that_turns_out_otherwise_leaves_the_sum_of_its_class(path):
    with closing(Ledger.open(path)) as ledger:
        ledger.record(NOW, "map", [counted(1, 1, 0, 0, FlowClass.EMPTY)], {})
        ledger.record(NOW, "map", [counted(1, 0, 0, 0, FlowClass.EMPTY), counted(2, 1, 5, 0)], {})
        assert sums(ledger, EMPTY) == (0, 0, 0)
        assert sums(ledger) == (1, 5, 0)


def test_what_a_former_agent_has_recorded_is_not_counted_again(path):
    with closing(Ledger.open(path)) as ledger:
        ledger.record(NOW, "map", [counted(1, 2, 10, 20)], {})
    with closing(Ledger.open(path)) as ledger:
        ledger.record(NOW, "map", [counted(1, 3, 10, 21)], {})
        assert sums(ledger) == (1, 0, 1)


def test_an_edge_that_leaves_the_kernel_stays_in_the_sum(path):
    with closing(Ledger.open(path)) as ledger:
        ledger.record(NOW, "map", [counted(1, 2, 10, 20)], {})
        ledger.record(NOW, "map", [counted(1, 2, 10, 20, live=False)], {})
        ledger.record(NOW, "map", [], {})
        assert ledger.held == {}
        assert sums(ledger) == (2, 10, 20)
        ledger.record(NOW, "map", [counted(1, 1, 1, 1)], {})
        assert sums(ledger) == (3, 11, 21)
