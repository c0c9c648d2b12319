"""Envoy's counters against the ledger's: who is believed when."""

import pytest

from tidegate.model import Direction, Edge, EdgeCount, EdgeKey, FlowClass
from tidegate.observe.witness import (
    ChainCounts,
    LedgerCounts,
    SidecarCounts,
    WitnessState,
    advance,
    count_chains,
)

NOTHING = ChainCounts(nonempty=0, all=0)


def play(rounds, state=None, start=0):
    """Each round: (permissive total, nonempty, all), with options as a fourth element. Returns every reading."""
    state = state or WitnessState()
    readings = []
    for number, (total, nonempty, every, *options) in enumerate(rounds, start):
        chosen = {"epoch": "e", "permissive_active": 0, "generation": "g", **(options or [{}])[0]}
        sidecar = SidecarCounts(
            permissive_total=total,
            public_total=0,
            permissive_active=chosen["permissive_active"],
            public_active=0,
            epoch=chosen["epoch"],
        )
        ledger = LedgerCounts(
            permissive=ChainCounts(nonempty=nonempty, all=every),
            public=NOTHING,
            generation=chosen["generation"],
        )
        state = advance(state, float(number), sidecar, ledger)
        readings.append(state.reading)
    return readings, state


@pytest.mark.parametrize(
    ("what", "rounds", "agrees"),
    [
        ("idle", [(0, 0, 0)] * 6, True),
        ("one round says nothing", [(0, 0, 0)], None),
        ("a baseline says nothing", [(0, 0, 0)] * 2, None),
        ("both count the same", [(n, n, n) for n in range(10)], True),
        ("old counts are behind the baseline", [(900 + n, n, n) for n in range(10)], True),
        (
            "envoy lags by a round",
            [(0, 0, 0)] * 3 + [(n, n + 5, n + 5) for n in range(0, 50, 5)],
            True,
        ),
        ("probes without payload", [(n, 0, n) for n in range(10)], True),
        ("refused connections the sidecar never saw", [(0, 0, n) for n in range(10)], True),
        ("traffic that the ledger does not see", [(n, 0, 0) for n in range(8)], False),
        ("traffic that passes the sidecar by", [(0, n, n) for n in range(8)], False),
        ("one missing for ever", [(0, 0, 0)] * 3 + [(4, 5, 5)] * 6, False),
        ("one missing for two rounds", [(0, 0, 0)] * 3 + [(4, 5, 5)] * 3 + [(5, 5, 5)] * 3, True),
    ],
)
def test_the_witnesses_agree_exactly_when_the_counts_can_be_those_of_one_truth(
    what, rounds, agrees
):
    readings, _ = play(rounds)
    assert readings[-1].agrees is agrees, what


def test_a_disagreement_counts_in_the_third_round_in_a_row_and_is_remembered():
    readings, state = play([(0, 0, 0)] * 3 + [(9, 0, 0)] * 3 + [(9, 9, 9)] * 2)
    assert [reading.agrees for reading in readings[2:]] == [True, True, True, False, True, True]
    assert "sidecar counted 9" in readings[5].detail
    assert "at most 0" in readings[5].detail
    assert state.reading.disagreed_at == 5.0


def test_a_disagreement_that_goes_away_starts_its_count_anew():
    twice_wrong_then_right = [(9, 0, 0), (9, 0, 0), (9, 9, 9), (18, 9, 9), (18, 9, 9), (18, 18, 18)]
    readings, _ = play([(0, 0, 0)] * 3 + twice_wrong_then_right)
    assert all(reading.agrees is not False for reading in readings)


@pytest.mark.parametrize(
    ("what", "after", "says"),
    [
        ("another process", (0, 40, 40, {"epoch": "f"}), "restarted"),
        ("counters that went back", (3, 40, 40), "went back"),
        ("another kernel map", (40, 0, 0, {"generation": "h"}), "anew"),
    ],
)
def test_counts_that_cannot_be_compared_get_a_new_baseline_and_it_says_so(what, after, says):
    readings, _ = play([(n, n, n) for n in range(20, 40)] + [after] * 6)
    first = readings[20]
    assert first.agrees is None, what
    assert says in first.detail
    assert readings[-1].agrees is True
    assert says in readings[-1].detail
    assert readings[-1].since == 21.0


def test_a_new_baseline_does_not_forget_that_the_witnesses_disagreed():
    readings, _ = play([(0, 0, 0)] * 3 + [(9, 0, 0)] * 4 + [(0, 0, 0, {"epoch": "f"})] * 4)
    assert readings[-1].agrees is True
    assert readings[-1].disagreed_at == 6.0


def test_connections_that_were_idle_at_the_baseline_may_speak_later():
    idle = {"permissive_active": 2}
    rounds = [(2, 0, 2, idle)] * 3 + [(2, 2, 2, idle)] * 6
    readings, _ = play(rounds)
    assert readings[-1].agrees is True


def test_idle_connections_at_the_baseline_do_not_hide_more_than_themselves():
    idle = {"permissive_active": 2}
    many_probes_before = 1000
    rounds = [(2, 0, many_probes_before, idle)] * 3 + [(2, 3, many_probes_before + 3, idle)] * 6
    readings, _ = play(rounds)
    assert readings[-1].agrees is False
    assert readings[-1].least.permissive == 1


def test_a_connection_on_its_way_at_the_baseline_does_not_count_against_anybody():
    readings, _ = play([(0, 0, 0), (0, 1, 1)] + [(1, 1, 1)] * 6)
    assert readings[-1].agrees is True


def test_only_plaintext_connections_open_over_several_rounds_are_told():
    actives = [0, 3, 1, 2, 0, 4, 4, 4]
    readings, _ = play([(0, 0, 0, {"permissive_active": active}) for active in actives])
    assert [reading.permissive_active for reading in readings] == [0, 0, 0, 1, 0, 0, 0, 4]


def edge(port, flow_class, connections, direction=Direction.INBOUND, peer="10.0.0.1"):
    return Edge(
        key=EdgeKey(workload=1, direction=direction, peer=peer, port=port, flow_class=flow_class),
        count=EdgeCount(
            connections=connections,
            bytes_to_server=0,
            bytes_to_client=0,
            first_seen=0.0,
            last_seen=0.0,
        ),
    )


def test_flows_are_counted_for_the_chain_that_gets_them():
    counts = count_chains(
        [
            edge(8080, FlowClass.PLAINTEXT, 1),
            edge(8080, FlowClass.EMPTY, 2),
            edge(8080, FlowClass.UNKNOWN, 4),
            edge(20000, FlowClass.MESH, 8),
            edge(7070, FlowClass.PLAINTEXT, 16),
            edge(9090, FlowClass.PLAINTEXT, 32),
            edge(8080, FlowClass.PLAINTEXT, 64, Direction.OUTBOUND),
            edge(8080, FlowClass.PLAINTEXT, 128, peer="fd00:9::1"),
        ],
        permissive_ports=(8080,),
        excluded_ports=((9000, 9999), (20000, 20000)),
        excluded_sources=("10.9.0.0/16", "fd00:9::/64"),
        inbound_port=20000,
        generation="g",
    )
    assert counts == LedgerCounts(
        permissive=ChainCounts(nonempty=1, all=7),
        public=ChainCounts(nonempty=24, all=24),
        generation="g",
    )
