"""What was seen as rows: ends of connections, names of flags, sums, and what was lost."""

import msgspec
import pytest

from tidegate.model import Direction, Edge, EdgeCount, EdgeKey, FlowClass, Hint
from tidegate.observe import abi
from tidegate.observe.classifier import FlowRecord, Losses
from tidegate.observe.hellos import HelloBook, Names
from tidegate.observe.report import classes, flow_row, report


def record(direction=Direction.OUTBOUND, flags=abi.FlowFlag.SYN_SEEN, local="10.0.0.1", **more):
    fields = {
        "key": b"key",
        "interface": (0, 1),
        "workload": 1,
        "direction": direction,
        "local": local,
        "local_port": 40_000,
        "peer": "10.0.0.2" if "." in local else "fd00::2",
        "peer_port": 80,
        "flow_class": FlowClass.PLAINTEXT,
        "settled": True,
        "decided": True,
        "flags": flags,
        "hint": Hint.HTTP1,
        "bytes_to_server": 10,
        "bytes_to_client": 20,
        "segments": 7,
        "opened": 1.0,
        "opened_ns": 1,
    }
    return FlowRecord(**{**fields, **more})


def edge(port=80, flow_class=FlowClass.PLAINTEXT, connections=1, to_server=10):
    key = EdgeKey(
        workload=1, direction=Direction.OUTBOUND, peer="10.0.0.2", port=port, flow_class=flow_class
    )
    count = EdgeCount(
        connections=connections,
        bytes_to_server=to_server,
        bytes_to_client=0,
        first_seen=0.0,
        last_seen=0.0,
        hints=(Hint.HTTP1,),
    )
    return Edge(key=key, count=count)


def told(**more):
    fields = {"records": (), "hellos": HelloBook(), "edges": (), "losses": Losses()}
    return report(**{**fields, **more})


@pytest.mark.parametrize(
    ("direction", "client", "server"),
    [
        (Direction.OUTBOUND, "10.0.0.1:40000", "10.0.0.2:80"),
        (Direction.INBOUND, "10.0.0.2:80", "10.0.0.1:40000"),
    ],
)
def test_the_client_is_who_opened_the_connection(direction, client, server):
    row = flow_row(record(direction), Names())
    assert (row.direction, row.client, row.server) == (direction, client, server)


def test_ipv6_addresses_stand_in_brackets():
    assert flow_row(record(local="fd00::1"), Names()).client == "[fd00::1]:40000"


def test_a_row_has_the_fields_that_programs_read():
    flags = abi.FlowFlag.SYN_SEEN | abi.FlowFlag.FIRST_BYTE_SEEN | abi.FlowFlag.CLOSED
    names = Names(sni="a.example", alpn=("h2",), flags=("ech",))
    assert msgspec.json.decode(msgspec.json.encode(flow_row(record(flags=flags), names))) == {
        "direction": "outbound",
        "client": "10.0.0.1:40000",
        "server": "10.0.0.2:80",
        "class": "plaintext",
        "hint": "http1",
        "alpn": ["h2"],
        "sni": "a.example",
        "syn_seen": True,
        "first_byte_seen": True,
        "bytes_to_server": 10,
        "bytes_to_client": 20,
        "segments": 7,
        "flags": ["closed", "ech"],
    }


def test_the_bookkeeping_of_the_programs_is_no_flag_of_a_connection():
    everything = abi.FlowFlag(0)
    for flag in abi.FlowFlag:
        everything |= flag
    shown = flow_row(record(flags=everything), Names()).flags
    assert {"server_first", "closed"} <= set(shown)
    assert not {"syn_seen", "client_fin", "tls_headers", "prefix_stored"} & set(shown)


def test_edges_that_every_connection_has_left_are_not_told():
    seen = told(edges=[edge(), edge(flow_class=FlowClass.EMPTY, connections=0, to_server=0)])
    assert [row.flow_class for row in seen.edges] == ["plaintext"]


def test_what_was_not_lost_is_zero_and_everything_has_a_name():
    seen = told()
    assert set(seen.counters.values()) == {0}
    names = {counter.name.lower() for counter in abi.Counter}
    assert set(seen.counters) | set(seen.ignored) == names | {
        "overflow",
        "packet_truncated",
        "link_type_unknown",
    }


def test_other_protocols_are_ignored_and_not_lost():
    seen = told(losses=Losses(not_ip=3, not_tcp=4, bytes_missed=5))
    assert seen.ignored == {"not_ip": 3, "not_tcp": 4}
    assert {name: number for name, number in seen.counters.items() if number} == {"bytes_missed": 5}


def test_connections_without_a_row_are_counted_also_those_without_an_edge():
    losses = Losses(overflow={FlowClass.TLS: 2, FlowClass.MESH: 1})
    seen = told(records=[record()], edges=[edge(connections=4)], losses=losses)
    assert seen.counters["overflow"] == 3
    assert seen.flows_not_listed == 4 + 3 - 1


def test_a_connection_that_opened_between_two_readings_is_not_missed_by_the_sums():
    assert told(records=[record(), record(key=b"new")], edges=[edge()]).flows_not_listed == 0


def test_connections_are_summed_by_class():
    rows = told(edges=[edge(), edge(port=81, connections=2), edge(flow_class=FlowClass.MESH)]).edges
    assert classes(rows) == {FlowClass.MESH: 1, FlowClass.PLAINTEXT: 3}
