"""The history: nothing lost, nothing counted twice, whatever happens to agent, kernel map and file."""

import random
import resource
import sqlite3
import stat
import zlib
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.model import (
    CountedEdge,
    Direction,
    EdgeCount,
    EdgeKey,
    FlowClass,
    Hint,
    Interval,
    Workload,
    workload_key,
)
from tidegate.observe import coverage, history
from tidegate.observe.counting import HINT_BITS
from tidegate.observe.history import EVICTED_EDGES, Limits
from tidegate.observe.ledger import REFUSED_EDGES, Ledger, LedgerError
from tidegate.verdict.intervals import clip, gaps, total, union

T0 = 1_700_000_000.0
DAY = 86_400.0


def key(peer="10.0.0.1", flow_class=FlowClass.PLAINTEXT, workload=1, direction=Direction.INBOUND):
    return EdgeKey(
        workload=workload, direction=direction, peer=peer, port=80, flow_class=flow_class
    )


def edge(at, connections, edge_key=None, sent=0, first=T0, hints=(), **counter):
    """What the kernel's counter of an edge says; each edge has one of its own unless told otherwise."""
    count = EdgeCount(
        connections=connections,
        bytes_to_server=sent,
        bytes_to_client=2 * sent,
        first_seen=first,
        last_seen=at,
        hints=hints,
    )
    edge_key = edge_key or key()
    own = {"slot": zlib.crc32(repr(edge_key).encode()), "generation": 0, "live": True}
    return CountedEdge(key=edge_key, count=count, **{**own, **counter})


def workload(name="api-1", service="api", **fields):
    return Workload(
        id=f"id-{name}", name=name, service=service, node="n1", netns="/run/netns/x", **fields
    )


def connections(ledger, since=0.0, until=1e11):
    return {each.key: each.count.connections for each in ledger.window(None, None, since, until)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    opened = Ledger.open(path)
    yield opened
    opened.close()


@contextmanager
def no_room_on_disk():
    """The kernel refuses to write beyond the first byte of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Windows


def test_a_window_has_what_was_added_in_it_exact_to_a_round(ledger):
    for number in range(20):
        now = T0 + number / 2
        ledger.record(now, "g", [edge(now, number + 1, sent=10 * (number + 1))], {})
    [seen] = ledger.window([1], Direction.INBOUND, T0 + 5.0, T0 + 9.5)
    assert seen.count == EdgeCount(
        connections=10,
        bytes_to_server=100,
        bytes_to_client=200,
        first_seen=T0,
        last_seen=T0 + 9.5,
    )


def test_a_connection_opened_before_the_window_and_used_in_it_is_seen_with_no_connections(ledger):
    ledger.record(T0, "g", [edge(T0, 1)], {})
    ledger.record(T0 + 100, "g", [edge(T0 + 100, 1, sent=7)], {})
    [seen] = ledger.window([1], None, T0 + 50, T0 + 100)
    assert (seen.count.connections, seen.count.bytes_to_server) == (0, 7)


def test_a_connection_that_was_not_used_in_the_window_is_not_in_it(ledger):
    ledger.record(T0, "g", [edge(T0, 5)], {})
    assert ledger.window(None, None, T0 + 0.001, T0 + 100) == []


def test_an_edge_recorded_late_belongs_to_when_it_was_last_seen(ledger):
    ledger.record(T0 + 60, "g", [edge(T0, 5)], {})
    assert ledger.window(None, None, T0 + 30, T0 + 60) == []


def test_a_window_in_the_past_has_what_was_in_use_then(ledger):
    for hour in range(5):
        now = T0 + hour * 3600
        ledger.record(now, "g", [edge(now, hour + 1)], {})
    assert connections(ledger, T0 + 3500, T0 + 7300) == {key(): 2}
    [seen] = ledger.window(None, None, T0 + 3500, T0 + 7300)
    assert T0 + 3500 <= seen.count.last_seen <= T0 + 7300


def test_a_window_is_of_the_workloads_and_the_direction_that_were_asked_for(ledger):
    keys = [key(workload=w, direction=d) for w in (1, 2**64 - 1) for d in Direction]
    ledger.record(T0, "g", [edge(T0, 1, each) for each in keys], {})
    found = ledger.window([2**64 - 1], Direction.OUTBOUND, 0, T0)
    assert [each.key for each in found] == [keys[3]]
    assert len(ledger.window([], None, 0, T0)) == 0
    assert len(ledger.window(None, None, 0, T0)) == 4


def test_a_connection_that_is_no_longer_empty_is_taken_from_the_empty_ones(ledger):
    empty, plain = key(flow_class=FlowClass.EMPTY), key()
    ledger.record(T0, "g", [edge(T0, 3, empty)], {})
    ledger.record(T0 + 1, "g", [edge(T0 + 1, 1, empty), edge(T0 + 1, 2, plain)], {})
    assert connections(ledger) == {empty: 1, plain: 2}
    assert connections(ledger, T0 + 0.5) == {empty: -2, plain: 2}


def test_condensing_old_rounds_keeps_sums_and_makes_short_windows_coarser(ledger):
    for number in range(10):
        now = T0 + number * 13 * 60
        ledger.record(now, "g", [edge(now, number + 1)], {})
    assert connections(ledger) == {key(): 10}
    late = T0 + 40 * DAY
    other = key(peer="10.0.0.2")
    ledger.record(late, "g", [edge(late, 1, other)], {})
    assert connections(ledger) == {key(): 0, other: 1}


@pytest.mark.parametrize("later", [400.0, 26 * 3600.0])
def test_a_minute_or_an_hour_counts_whole_in_a_window_that_begins_within_it(ledger, later):
    begun = T0 - T0 % 3600
    ledger.record(begun + 50, "g", [edge(begun + 50, 5)], {})
    ledger.record(begun + later, "g", [], {})
    assert connections(ledger, begun + 40, begun + later) == {key(): 5}


@given(
    st.lists(st.tuples(st.integers(1, 40_000), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(0, 400_000),
)
@settings(max_examples=40, deadline=None)
def test_a_window_never_misses_what_was_added_in_it(tmp_path_factory, rounds, ago):
    ledger = Ledger.open(tmp_path_factory.mktemp("l") / "ledger.db")
    now, cumulative, recorded = T0, 0, []
    for step, added in rounds:
        now += step
        cumulative += added
        recorded.append((now, added))
        ledger.record(now, "g", [edge(now, cumulative)], {})
    since = now - ago
    truth = sum(added for at, added in recorded if at >= since)
    [seen] = ledger.window(None, None, since, now)
    coarse = 3600 if ago > 25 * 3600 else 60 if ago > 300 else 0
    loose = sum(added for at, added in recorded if at >= since - coarse - 10)
    assert truth <= seen.count.connections <= loose
    ledger.close()


def test_any_window_of_the_last_minutes_is_exact_to_a_round(ledger):
    recorded = []
    for number in range(150):
        now = T0 + number * 1.7
        ledger.record(now, "g", [edge(now, (number + 1) ** 2)], {})
        recorded.append((now, (number + 1) ** 2 - number**2))
    for first in range(0, 150, 7):
        for last in range(first, 150, 11):
            since, until = recorded[first][0], recorded[last][0]
            truth = sum(added for at, added in recorded if since <= at <= until)
            assert connections(ledger, since, until) == {key(): truth}


def test_a_clock_that_steps_loses_and_repeats_nothing(ledger):
    now, steps = T0, [1, 1, 7200, 1, -7300, 1, 1, 90, -30, 86_400, 1, -86_500, 2, 400]
    for number, step in enumerate(steps, start=1):
        now += step
        ledger.record(now, "g", [edge(now, number)], {})
    assert connections(ledger) == {key(): len(steps)}
    assert ledger.problems() == ()


def test_hints_are_kept_with_the_edge_and_survive_a_restart(path):
    for now, hints in ((T0, (Hint.HTTP1,)), (T0 + 1, (Hint.HTTP1, Hint.KAFKA)), (T0 + 2, ())):
        ledger = Ledger.open(path)
        ledger.record(now, "g", [edge(now, 1, hints=hints)], {})
        ledger.close()
    ledger = Ledger.open(path)
    ledger.record(T0 + 3, "h", [], {})
    [seen] = ledger.window(None, None, 0, 1e11)
    assert seen.count.hints == (Hint.HTTP1, Hint.KAFKA)
    ledger.close()


def hints(ledger):
    [seen] = ledger.window(None, None, 0, 1e11)
    return seen.count.hints


def test_an_edge_has_the_hints_of_all_its_counters_also_before_the_next_round(path):
    ledger = Ledger.open(path)
    former = {"slot": 1, "hints": (Hint.HTTP1,)}
    ledger.record(T0, "g", [edge(T0, 1, **former)], {})
    both = [edge(T0 + 1, 1, **former, live=False), edge(T0 + 1, 1, slot=2, hints=(Hint.KAFKA,))]
    ledger.record(T0 + 1, "g", both, {})
    assert hints(ledger) == (Hint.HTTP1, Hint.KAFKA)
    ledger.close()
    ledger = Ledger.open(path)
    assert hints(ledger) == (Hint.HTTP1, Hint.KAFKA)
    ledger.close()


def test_hints_are_stored_with_the_round_that_tells_them(path):
    with closing(Ledger.open(path)) as ledger:
        ledger.record(T0, "g", [edge(T0, 1, hints=(Hint.HTTP1,))], {})
    with closing(Ledger.open(path)) as ledger:
        assert hints(ledger) == (Hint.HTTP1,)


def test_an_edge_that_comes_again_has_the_hints_that_it_had(path):
    ledger = Ledger.open(path)
    ledger.record(T0, "g", [edge(T0, 1, hints=(Hint.HTTP1,))], {})
    ledger.record(T0 + 1, "h", [], {})
    ledger.close()
    ledger = Ledger.open(path)
    ledger.record(T0 + 2, "h", [edge(T0 + 2, 1, hints=(Hint.KAFKA,))], {})
    assert hints(ledger) == (Hint.HTTP1, Hint.KAFKA)
    ledger.close()
    ledger = Ledger.open(path)
    assert hints(ledger) == (Hint.HTTP1, Hint.KAFKA)
    ledger.close()


def test_an_edge_that_cannot_be_written_has_its_hints(ledger):
    with no_room_on_disk():
        ledger.record(T0, "g", [edge(T0, 1, hints=(Hint.REDIS,))], {})
        assert hints(ledger) == (Hint.REDIS,)


def test_every_hint_has_a_number_of_its_own():
    assert sorted(HINT_BITS.values()) == [1 << n for n in range(len(Hint))]
    assert list(HINT_BITS) == list(Hint)


def test_an_edge_whose_peer_changed_is_told_in_parts_that_add_up(ledger):
    for number in range(100):
        now = T0 + number
        told = edge(now, number + 1, sent=number + 1, hints=(Hint.REDIS,))
        ledger.record(now, "g", [told], {})
    cuts = {"10.0.0.1": (T0 + 20, T0 + 70.5), "10.0.0.2": (T0 + 30,)}
    parts = ledger.window(None, None, T0 + 5, T0 + 90, cuts)
    assert [part.count.connections for part in parts] == [15, 51, 20]
    assert [part.count.bytes_to_client for part in parts] == [30, 102, 40]
    assert [part.count.last_seen for part in parts] == [T0 + 19, T0 + 70, T0 + 90]
    assert [part.count.first_seen for part in parts] == [T0, T0 + 20, T0 + 70.5]
    assert {part.count.hints for part in parts} == {(Hint.REDIS,)}


def test_parts_of_what_is_in_minutes_and_hours_add_up_too(ledger):
    for number in range(200):
        now = T0 + number * 1000
        ledger.record(now, "g", [edge(now, number + 1)], {})
    cut = T0 + 100 * 1000
    parts = ledger.window(None, None, T0, now, {"10.0.0.1": (cut, T0 + 199_500)})
    before, after, _ = (
        [part.count for part in parts] if len(parts) == 3 else [*[p.count for p in parts], None]
    )
    assert before.connections + after.connections == 200
    assert abs(before.connections - 100) <= 4
    assert before.last_seen < cut <= after.first_seen


# Restarts, takeovers, generations

KEYS = [key("a"), key("b"), key("a", FlowClass.EMPTY)]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("count"), st.sampled_from(KEYS), st.integers(-3, 9)),
        st.tuples(st.just("round")),
        st.tuples(st.just("restart")),
        st.tuples(st.just("new map")),
        st.tuples(st.just("give back"), st.sampled_from(KEYS)),
        st.tuples(st.just("full disk")),
        st.tuples(st.just("idle"), st.sampled_from([1.0, 70.0, 4000.0, 2 * DAY])),
    ),
    max_size=60,
)


@given(STEPS)
@settings(max_examples=80, deadline=None)
def test_the_sum_of_history_is_the_sum_of_what_the_kernel_counted(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("l") / "ledger.db"
    ledger = Ledger.open(path)
    kernel, truth, generation, now = {}, {}, 0, T0
    slots, given_back, taken = {}, [], 0

    def counter(counted):
        """The slot and generation that count an edge; a few slots, so that they are soon another's."""
        nonlocal taken
        if counted not in slots:
            taken += 1
            busy = {slot for slot, _ in (*slots.values(), *(gone[1] for gone in given_back))}
            slots[counted] = (min(set(range(9)) - busy), taken)
        return slots[counted]

    def record():
        told = [
            edge(now, n, k, slot=counter(k)[0], generation=counter(k)[1]) for k, n in kernel.items()
        ]
        last = [
            edge(now, n, k, slot=slot, generation=number, live=False)
            for k, (slot, number), n in given_back
        ]
        ledger.record(now, f"g{generation}", [*last, *told], {})
        if not ledger.problems():
            given_back.clear()

    record()
    for step, *values in steps:
        match step:
            case "count":
                counted, more = values
                if counted.flow_class is not FlowClass.EMPTY:
                    more = abs(more)
                more = max(more, -truth.get(counted, 0))
                kernel[counted] = kernel.get(counted, 0) + more
                truth[counted] = truth.get(counted, 0) + more
            case "round":
                record()
            case "restart":
                record()
                ledger.close()
                ledger = Ledger.open(path)
            case "new map":
                record()
                kernel, generation = {}, generation + 1
                slots, given_back = {}, []
            case "give back":
                if values[0] in kernel and len(given_back) < 3:
                    given_back.append((values[0], counter(values[0]), kernel.pop(values[0])))
                    del slots[values[0]]
            case "full disk":
                with no_room_on_disk():
                    record()
            case "idle":
                now += values[0]
    record()
    assert connections(ledger) == truth
    assert ledger.problems() == ()
    ledger.close()


def test_a_killed_agent_that_comes_back_to_the_same_map_counts_nothing_twice(path):
    first = Ledger.open(path)
    first.record(T0, "g", [edge(T0, 5)], {"edges_full": 2})
    # No close: the process is gone.
    second = Ledger.open(path)
    second.record(T0 + 1, "g", [edge(T0 + 1, 7)], {"edges_full": 3})
    assert connections(second) == {key(): 7}
    assert second.losses(0, 1e11) == {"edges_full": 3}
    assert second.losses(T0 + 0.5, 1e11) == {"edges_full": 1}
    second.close()
    first.close()


def test_a_departed_workload_keeps_its_history_and_frees_its_counters(ledger):
    ledger.record(T0, "g", [edge(T0, 5), edge(T0, 3, key(workload=2))], {})
    ledger.record(T0 + 1, "g", [edge(T0, 5, live=False)], {})
    ledger.record(T0 + 2, "g", [edge(T0 + 2, 4, key(workload=2))], {})
    ledger.record(T0 + 70, "g", [edge(T0 + 70, 5, key(workload=2))], {})
    assert connections(ledger) == {key(): 5, key(workload=2): 5}
    assert ledger._counting.edges.keys() == {key(workload=2)}


def test_counts_of_a_counter_that_began_anew_are_added(ledger):
    ledger.record(T0, "g", [edge(T0, 5, slot=1, generation=1)], {})
    last = edge(T0 + 1, 6, slot=1, generation=1, live=False)
    anew = edge(T0 + 1, 2, slot=2, generation=1)
    ledger.record(T0 + 1, "g", [last, anew], {})
    ledger.record(T0 + 2, "g", [edge(T0 + 2, 4, slot=2, generation=1)], {})
    again = edge(T0 + 3, -1, slot=1, generation=2)
    ledger.record(T0 + 3, "g", [edge(T0 + 3, 4, slot=2, generation=1, live=False), again], {})
    assert connections(ledger) == {key(): 9}


def test_last_counts_that_are_told_again_by_the_next_agent_too_are_not_counted_again(path):
    for now in (T0, T0 + 1, T0 + 2):
        ledger = Ledger.open(path)
        for _ in range(3):
            ledger.record(now, "g", [edge(T0, 5, live=False)], {})
        assert connections(ledger) == {key(): 5}
        ledger.close()


def test_a_round_says_which_edges_connections_came_to_or_left(ledger):
    empty, plain = key(flow_class=FlowClass.EMPTY), key()
    assert ledger.record(T0, "g", [edge(T0, 3, empty)], {}) == [(empty, 3)]
    moved = ledger.record(T0 + 1, "g", [edge(T0 + 1, 1, empty), edge(T0 + 1, 2, plain)], {})
    assert moved == [(empty, -2), (plain, 2)]
    with no_room_on_disk():
        assert ledger.record(T0 + 2, "g", [edge(T0 + 2, 3, plain)], {}) == [(plain, 1)]
    assert not ledger.is_stored
    assert ledger.record(T0 + 3, "g", [edge(T0 + 3, 3, plain)], {}) == []
    assert ledger.is_stored


def test_counters_of_idle_edges_are_dispensable_once_they_are_stored(ledger):
    idle, busy = key(peer="a"), key(peer="b")
    told = [edge(T0, 1, idle, slot=3, generation=7), edge(T0 + 601, 1, busy, slot=4)]
    ledger.record(T0 + 601, "g", told, {})
    assert ledger.dispensable(T0 + 601, 1000) == [(3, 7)]
    ledger.record(T0 + 602, "g", [edge(T0, 1, idle, slot=3, generation=7, live=False)], {})
    assert ledger.dispensable(T0 + 603, 1000) == []


def test_a_flood_of_one_workload_costs_no_other_its_counters(ledger):
    flood = [edge(T0 + n / 10, 1, key(peer=f"f{n}"), slot=n) for n in range(90)]
    quiet = [edge(T0, 1, key(peer=f"q{n}", workload=2), slot=100 + n) for n in range(10)]
    ledger.record(T0 + 30, "g", [*flood, *quiet], {})
    assert ledger.dispensable(T0 + 30, 200) == []
    gone = ledger.dispensable(T0 + 30, 100)
    assert [slot for slot, _ in gone] == list(range(90 - 37)), "the longest idle beyond its share"


# Losses and limits


def test_losses_are_dated_and_start_anew_with_a_new_map(ledger):
    ledger.record(T0, "g", [], {"a": 2, "b": 0})
    ledger.record(T0 + 10, "g", [], {"a": 2, "b": 1})
    ledger.record(T0 + 20, "h", [], {"a": 1})
    assert ledger.losses(T0, T0 + 30) == {"a": 3, "b": 1}
    assert ledger.losses(T0 + 5, T0 + 15) == {"b": 1}
    assert ledger.losses(T0 + 21, T0 + 30) == {}


def test_edges_that_find_no_room_are_a_loss_and_are_taken_when_there_is_room(path):
    ledger = Ledger.open(path, Limits(edges=3))
    many = [edge(T0, 1, key(peer=str(n))) for n in range(5)]
    ledger.record(T0, "g", many, {})
    assert len(connections(ledger)) == 3
    assert ledger.losses(0, 1e11) == {REFUSED_EDGES: 2}
    for other in (2, 3):
        ledger.record(T0 + other, "h", [edge(T0 + other, other, key(peer="x"))], {})
    assert connections(ledger)[key(peer="x")] == 3
    ledger.close()


def test_the_oldest_edges_make_room_and_the_loss_is_dated_when_they_were_seen(path):
    ledger = Ledger.open(path, Limits(edges=3))
    ledger.record(T0, "g", [edge(T0 + n, 1, key(peer=str(n))) for n in range(3)], {})
    now = T0 + 1000
    ledger.record(now, "h", [edge(now, 1, key(peer=f"new {n}")) for n in range(2)], {})
    assert {each.peer for each in connections(ledger)} == {"2", "new 0", "new 1"}
    assert ledger.losses(T0, T0 + 1.5) == {EVICTED_EDGES: 2}
    assert ledger.losses(T0 + 2, 1e11) == {}
    assert "2 of the oldest" in ledger.problems()[0]
    ledger.record(now + 1, "h", [edge(now + 1, 7, key(peer="0"))], {})
    assert connections(ledger)[key(peer="0")] == 7
    ledger.close()


def test_an_edge_that_the_kernel_still_counts_is_not_forgotten_however_old(path):
    ledger = Ledger.open(path, Limits(edges=3))
    counted, departed = [key(peer="a"), key(peer="b")], key(peer="c", workload=2)
    ledger.record(T0, "g", [edge(T0 + 1, 1, departed), *(edge(T0, 1, k) for k in counted)], {})
    ledger.record(T0 + 1, "g", [edge(T0 + 1, 1, departed, live=False)], {})
    ledger.record(T0 + 2, "g", [], {})
    ledger.record(T0 + 20, "g", [edge(T0 + 20, 1, key(peer="d"))], {})
    assert connections(ledger).keys() == {*counted, key(peer="d")}
    ledger.close()


def test_history_stays_within_its_limits_and_keeps_its_sums(path):
    ledger = Ledger.open(path, Limits(rounds=20, minutes=30, hours=1000))
    for number in range(400):
        now = T0 + number * 11
        ledger.record(now, "g", [edge(now, number + 1)], {})
    rows = dict(ledger._db.execute("SELECT tier, count(*) FROM delta GROUP BY tier").fetchall())
    assert history.count_entries(ledger._db) <= 20
    assert rows[1] <= 30
    assert connections(ledger) == {key(): 400}
    ledger.close()


# Coverage


def test_coverage_grows_with_each_round_and_a_new_attachment_is_a_new_interval(ledger):
    api = workload()
    for attached, now in [(T0, T0 + 1), (T0, T0 + 2), (T0 + 5, T0 + 6), (T0 + 5, T0 + 7)]:
        ledger.extend(api, attached, now)
        ledger.record(now, "g", [], {})
    assert ledger.coverage(api.key) == (Interval(T0, T0 + 2), Interval(T0 + 5, T0 + 7))


def test_coverage_claims_nothing_before_the_counts_were_recorded(ledger):
    ledger.extend(workload(), T0, T0 + 1)
    assert ledger.coverage(workload().key) == ()


def test_coverage_goes_on_over_an_agent_restart_when_the_attachment_stayed(path):
    for now in (T0 + 1, T0 + 100):
        ledger = Ledger.open(path)
        ledger.extend(workload(), T0, now)
        ledger.record(now, "g", [], {})
        found = ledger.coverage(workload().key)
        ledger.close()
    assert found == (Interval(T0, T0 + 100),)


def test_a_departed_workload_is_remembered_with_its_service_for_a_month(ledger):
    api = workload(annotations={"a": "b"})
    ledger.extend(api, T0, T0 + 1)
    ledger.record(T0 + 1, "g", [], {})
    assert ledger.workloads("api") == [api]
    assert ledger.workloads("web") == []
    other = workload("web-1", "web")
    for later in (20 * DAY, 40 * DAY):
        ledger.extend(other, T0 + later, T0 + later)
        ledger.record(T0 + later, "g", [], {})
        assert ledger.workloads("api") == ([api] if later == 20 * DAY else [])
    assert ledger.coverage(api.key) == ()


def test_a_workload_that_changes_is_stored_as_it_is_now(ledger):
    for now, meshed in ((T0, False), (T0 + 1, True)):
        ledger.extend(workload(meshed=meshed), T0, now)
        ledger.record(now, "g", [], {})
    assert [each.meshed for each in ledger.workloads("api")] == [True]


def test_annotations_of_any_size_do_not_fill_the_history(ledger):
    ledger.extend(workload(annotations={"a": "x" * (1 << 20)}), T0, T0)
    ledger.record(T0, "g", [], {})
    assert [each.annotations for each in ledger.workloads("api")] == [{}]


def test_an_attachment_that_comes_and_goes_has_a_bounded_number_of_intervals(path):
    ledger = Ledger.open(path, Limits(intervals=5))
    for number in range(20):
        ledger.extend(workload(), T0 + 2 * number, T0 + 2 * number + 1)
        ledger.record(T0 + 2 * number + 1, "g", [], {})
    found = ledger.coverage(workload().key)
    assert len(found) == 5
    assert found[-1] == Interval(T0 + 38, T0 + 39)
    ledger.close()


def test_memory_is_of_the_workloads_of_the_latest_round_and_the_file_goes_on_with_all(ledger):
    api = workload()
    for now in range(1, 20):
        ledger.extend(workload(f"web-{now}", "web"), T0 + now, T0 + now)
        if now != 10:
            ledger.extend(api, T0, T0 + now)
        ledger.record(T0 + now, "g", [], {})
    assert ledger._covered.keys() == {api.key, workload("web-19", "web").key}
    assert ledger.coverage(api.key) == (Interval(T0, T0 + 19),)
    assert len(ledger.workloads("web")) == 19


# Faults


def test_the_file_is_for_its_owner_only(ledger, path):
    ledger.record(T0, "g", [edge(T0, 1)], {})
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_while_the_disk_is_full_evidence_stays_whole_and_it_is_told(ledger, path):
    ledger.extend(workload(), T0, T0)
    ledger.record(T0, "g", [edge(T0, 1)], {})
    with no_room_on_disk():
        for number in (1, 2):
            ledger.extend(workload(), T0, T0 + number)
            ledger.record(T0 + number, "g", [edge(T0 + number, 1 + number)], {"l": number})
        [problem] = ledger.problems()
        assert str(path) in problem
        assert connections(ledger) == {key(): 3}
        assert ledger.losses(T0, T0 + 2) == {"l": 2}
        assert ledger.coverage(workload().key) == (Interval(T0, T0 + 2),)
    ledger.record(T0 + 3, "g", [edge(T0 + 3, 4)], {"l": 2})
    assert ledger.problems() == ()
    assert connections(ledger) == {key(): 4}
    assert ledger.losses(T0, T0 + 3) == {"l": 2}


def test_counts_of_a_map_that_went_away_while_the_disk_was_full_are_kept(ledger, path):
    ledger.record(T0, "g", [], {})
    with no_room_on_disk():
        ledger.record(T0 + 1, "g", [edge(T0 + 1, 5)], {})
        ledger.record(T0 + 2, "h", [edge(T0 + 2, 2)], {})
    ledger.record(T0 + 3, "h", [edge(T0 + 3, 3)], {})
    assert connections(ledger) == {key(): 8}
    with closing(Ledger.open(path)) as again:
        again.record(T0 + 4, "h", [edge(T0 + 4, 4)], {})
        assert connections(again) == {key(): 9}


def failing_once(function, monkeypatch, name):
    """As that function of `history`, but for the first time."""
    left = [1]

    def fails(*arguments):
        if left:
            left.pop()
            raise sqlite3.OperationalError("disk I/O error")
        return function(*arguments)

    monkeypatch.setattr(history, name, fails)


def test_a_round_that_fails_half_way_is_written_whole_with_the_next(ledger, monkeypatch):
    failing_once(history.pack, monkeypatch, "pack")
    ledger.record(T0, "g", [edge(T0, 1)], {})
    assert "disk I/O error" in ledger.problems()[0]
    ledger.record(T0 + 1, "g", [edge(T0 + 1, 2)], {})
    assert ledger.problems() == ()
    assert connections(ledger) == {key(): 2}


def test_a_history_that_cannot_be_condensed_is_told_until_it_can(ledger, monkeypatch):
    failing_once(history.coarsen, monkeypatch, "coarsen")
    ledger.record(T0, "g", [edge(T0, 1)], {})
    assert "cannot be condensed: disk I/O error" in ledger.problems()[0]
    ledger.record(T0 + 20, "g", [edge(T0 + 20, 2)], {})
    assert ledger.problems() == ()
    assert connections(ledger) == {key(): 2}


def test_a_file_that_is_no_database_is_set_aside_and_told(path):
    path.write_bytes(b"not a database " * 1000)
    ledger = Ledger.open(path)
    [problem] = ledger.problems()
    assert "set aside" in problem
    [aside] = path.parent.glob("ledger.db.corrupt-*")
    assert aside.read_bytes().startswith(b"not a database")
    ledger.record(T0, "g", [edge(T0, 5)], {})
    assert connections(ledger) == {key(): 5}
    ledger.close()


def test_a_file_with_damaged_pages_is_replaced_and_the_kernels_counts_come_back(path):
    ledger = Ledger.open(path)
    ledger.record(T0, "g", [edge(T0, 5, key(peer=str(n))) for n in range(500)], {})
    ledger.close()
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    ledger = Ledger.open(path)
    assert "set aside" in ledger.problems()[0]
    everything = [edge(T0 + 1, 6, key(peer=str(n))) for n in range(500)]
    ledger.record(T0 + 1, "g", everything, {})
    assert set(connections(ledger).values()) == {6}
    assert len(connections(ledger)) == 500
    ledger.close()


def test_damage_under_a_running_agent_costs_history_and_nothing_else(path):
    ledger = Ledger.open(path)
    many = [edge(T0, 5, key(peer=f"10.0.{n // 250}.{n % 250}")) for n in range(20_000)]
    ledger.extend(workload(), T0, T0)
    ledger.record(T0, "g", many, {"l": 3})
    ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._db.execute("PRAGMA shrink_memory")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    for now in (T0 + 1, T0 + 2, T0 + 3):
        ledger.extend(workload(), T0, now)
        ledger.record(now, "g", [*many, edge(now, 1, key(peer="new"))], {"l": 5})
    assert "set aside" in ledger.problems()[0]
    assert len(connections(ledger)) == 20_001
    assert ledger.coverage(workload().key) == (Interval(T0, T0 + 3),)
    assert ledger.losses(0, 1e11) == {"l": 5}
    ledger.close()


def spoil(ledger, path, table):
    """Damages the first page of a table, under the agent that has the file open."""
    query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
    [(page,)] = ledger._db.execute(query, (table,)).fetchall()
    ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._db.execute("PRAGMA shrink_memory")
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)


def test_damage_that_a_question_meets_is_told_and_the_kernels_counts_come_back(ledger, path):
    ledger.record(T0, "g", [edge(T0, 1)], {})
    ledger.record(T0 + 100, "g", [edge(T0 + 100, 2)], {})
    spoil(ledger, path, "delta")
    with pytest.raises(LedgerError, match="damaged"):
        connections(ledger)
    assert "set aside" in ledger.problems()[0]
    ledger.record(T0 + 101, "g", [edge(T0 + 101, 3)], {})
    assert connections(ledger) == {key(): 3}


def test_damage_that_condensing_meets_is_told_and_the_kernels_counts_come_back(ledger, path):
    ledger.record(T0, "g", [edge(T0, 1)], {})
    spoil(ledger, path, "workload")
    ledger.record(T0 + 20, "g", [edge(T0 + 20, 2)], {})
    assert "set aside" in ledger.problems()[0]
    ledger.record(T0 + 21, "g", [edge(T0 + 21, 3)], {})
    assert connections(ledger) == {key(): 3}


def alter_rounds(path):
    """Other numbers in the same places: nothing that SQLite could notice."""
    with closing(sqlite3.connect(path)) as db:
        [(entries,)] = db.execute("SELECT entries FROM round WHERE number = 1")
        db.execute("UPDATE round SET entries = ? WHERE number = 1", (b"\1" + entries[1:],))
        db.commit()


def test_a_round_that_is_not_as_it_was_written_is_damage(path):
    with closing(Ledger.open(path)) as ledger:
        ledger.record(T0, "g", [edge(T0, 1)], {})
    alter_rounds(path)
    with closing(Ledger.open(path)) as ledger:
        assert "checksum" in ledger.problems()[0]
        assert connections(ledger) == {}


def test_a_round_that_is_not_as_it_was_written_is_damage_when_a_question_meets_it(ledger, path):
    for later in (0, 1):
        ledger.record(T0 + later, "g", [edge(T0 + later, 1 + later)], {})
    alter_rounds(path)
    with pytest.raises(LedgerError, match="checksum"):
        connections(ledger, T0, T0 + 0.5)
    ledger.record(T0 + 2, "g", [edge(T0 + 2, 3)], {})
    assert connections(ledger) == {key(): 3}


@pytest.mark.parametrize("where", ["no/such/directory/ledger.db", "link.db"])
def test_where_no_file_can_be_had_history_is_kept_in_memory(tmp_path, where):
    (tmp_path / "link.db").symlink_to(tmp_path / "elsewhere")
    ledger = Ledger.open(tmp_path / where)
    ledger.record(T0, "g", [edge(T0, 5)], {})
    assert connections(ledger) == {key(): 5}
    assert "cannot be kept" in ledger.problems()[0]
    assert not (tmp_path / "elsewhere").exists()
    ledger.close()


def test_rows_that_no_ledger_wrote_are_damage(path):
    ledger = Ledger.open(path)
    ledger.record(T0, "g", [edge(T0, 5)], {})
    ledger._db.execute("PRAGMA ignore_check_constraints = ON")
    ledger._db.execute("UPDATE edge SET class = 'strange', counted = 0")
    ledger.close()
    ledger = Ledger.open(path)
    assert "set aside" in ledger.problems()[0]
    assert connections(ledger) == {}
    ledger.close()


def test_of_many_damaged_files_the_newest_are_kept(path):
    for number in range(6):
        path.write_bytes(bytes([number]) * 5000)
        Ledger.open(path).close()
        path.with_name("ledger.db-wal").unlink(missing_ok=True)
    kept = sorted(path.parent.glob("*.corrupt-*"))
    assert [each.read_bytes()[0] for each in kept] == [3, 4, 5]


def test_a_file_of_another_layout_is_set_aside(path):
    ledger = Ledger.open(path)
    ledger._db.execute("PRAGMA user_version = 99")
    ledger.close()
    ledger = Ledger.open(path)
    assert "layout 99" in ledger.problems()[0]
    ledger.close()


def write_former_layout(path):
    with closing(sqlite3.connect(path)) as db:
        db.executescript((Path(__file__).parent / "golden" / "ledger-layout-1.sql").read_text())


def test_a_file_of_the_former_layout_gets_the_tables_of_a_new_one(path, tmp_path):
    def columns(file):
        Ledger.open(file).close()
        with closing(sqlite3.connect(file)) as db:
            names = db.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
            return {
                name: {row[1] for row in db.execute(f"PRAGMA table_xinfo({name})")}
                for (name,) in names.fetchall()
            }

    write_former_layout(path)
    assert columns(path) == columns(tmp_path / "new.db")


def test_history_of_the_former_layout_goes_on(path):
    write_former_layout(path)
    ledger = Ledger.open(path)
    assert ledger.problems() == ()
    found = {edge.key.peer: edge.count for edge in ledger.window(None, None, 0, 1e11)}
    assert {
        peer: (count.connections, count.bytes_to_server, count.bytes_to_client)
        for peer, count in found.items()
    } == {"10.0.0.1": (14, 140, 1400), "10.0.0.2": (5, 50, 500)}
    assert ledger.coverage(workload().key) == (Interval(T0, T0 + 90),)
    assert ledger.losses(0, 1e11) == {"flow_not_stored": 1}
    assert connections(ledger, T0 + 50)[key()] == 4, "minutes count whole where there are no rounds"
    ledger.record(T0 + 100, "a new map", [edge(T0 + 100, 3)], {"flow_not_stored": 2})
    assert connections(ledger)[key()] == 17
    assert ledger.losses(0, 1e11) == {"flow_not_stored": 3}
    ledger.close()
    ledger = Ledger.open(path)
    assert connections(ledger)[key()] == 17
    assert {row[0] for row in ledger._db.execute("SELECT tier FROM delta")} == {1, 2}
    ledger.close()


def test_while_somebody_else_holds_the_file_history_waits(ledger, path):
    ledger.record(T0, "g", [edge(T0, 1)], {})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    ledger.record(T0 + 1, "g", [edge(T0 + 1, 2)], {})
    assert "locked" in ledger.problems()[0]
    assert connections(ledger) == {key(): 2}
    other.execute("ROLLBACK")
    other.close()
    ledger.record(T0 + 2, "g", [edge(T0 + 2, 3)], {})
    assert ledger.problems() == ()
    assert connections(ledger) == {key(): 3}


def test_whichever_page_is_damaged_the_agent_goes_on(path, tmp_path):
    ledger = Ledger.open(path)
    many = [key(peer=f"10.0.{n // 250}.{n % 250}") for n in range(400)]
    for number in range(8):
        now = T0 + number * 20
        ledger.extend(workload(), T0, now)
        ledger.record(now, "g", [edge(now, number + 1, each) for each in many], {"l": number})
    ledger.close()
    whole = path.read_bytes()
    told = [edge(now + 1, 9, each) for each in many]
    pages = len(whole) // 4096
    for page in sorted({*range(12), *range(12, pages, 9), pages - 1}):
        damaged = tmp_path / f"{page}" / "ledger.db"
        damaged.parent.mkdir()
        noise = random.Random(page).randbytes(4096)
        damaged.write_bytes(whole[: page * 4096] + noise + whole[(page + 1) * 4096 :])
        ledger = Ledger.open(damaged)
        for later in (1, 2, 3):
            ledger.extend(workload(), T0, now + later)
            ledger.record(now + later, "g", told, {"l": 8})
            with suppress(LedgerError):
                ledger.window(None, None, 0, 1e11)
                ledger.losses(0, 1e11)
                ledger.coverage(workload().key)
        assert set(connections(ledger).values()) == {9}, page
        ledger.close()


def test_a_month_keeps_minutes_for_a_day_and_hours_for_thirty_days_in_bounds(path):
    """One edge that is always in use, and another one each hour, from 32 days ago until now."""
    ledger = Ledger.open(path)
    end, number, now = T0 + 32 * DAY, 0, T0
    recorded = []
    while now < end:
        number += 1
        hour = key(peer=f"h{int(now - T0) // 3600}")
        told = [
            edge(now, number, slot=1),
            edge(now, 1, hour, first=now, slot=2, generation=zlib.crc32(repr(hour).encode())),
        ]
        ledger.record(now, "g", told, {})
        recorded.append(now)
        now += 1800 if now < end - 26 * 3600 else 120
    now = recorded[-1]

    def truth(since):
        return sum(at >= since for at in recorded)

    for ago, span in ((3600, 60), (DAY, 60), (3 * DAY, 3600), (29 * DAY, 3600)):
        found = connections(ledger, now - ago, now)[key()]
        assert truth(now - ago) <= found <= truth(now - ago - span)
    rows = dict(ledger._db.execute("SELECT tier, count(*) FROM delta GROUP BY tier").fetchall())
    assert 1000 < rows[1] <= 25 * 60 + 60
    assert 1000 < rows[2] <= 3 * (30 * 24 + 2)
    edges = ledger._db.execute("SELECT count(*) FROM edge").fetchone()[0]
    assert edges <= 30 * 24 + 3
    assert path.stat().st_size < 2 << 20
    ledger.close()


# Intervals

INTERVALS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(-3, 20)).map(
        lambda pair: Interval(float(pair[0]), float(pair[0] + pair[1]))
    ),
    max_size=12,
)


def moments(intervals):
    """The half units that lie in any of them."""
    return {h for h in range(-10, 200) for i in intervals if i.start <= h / 2 <= i.end}


@given(INTERVALS)
def test_a_union_is_sorted_disjoint_and_has_the_same_moments(intervals):
    merged = union(intervals)
    assert all(a.end < b.start for a, b in pairwise(merged))
    assert moments(merged) == moments([i for i in intervals if i.end >= i.start])
    assert union(merged) == merged


@given(INTERVALS, st.integers(0, 60), st.integers(1, 30))
def test_coverage_and_gaps_fill_any_span_between_them(intervals, start, length):
    end = start + length
    holes = gaps(intervals, start, end)
    covered = clip(intervals, start, end)
    assert total(holes) + total(covered) == pytest.approx(length)
    assert union((*holes, *covered)) == (Interval(start, end),)
    assert all(hole.end > hole.start for hole in holes)


@pytest.mark.parametrize(
    ("what", "last", "attached_at", "now", "expected"),
    [
        ("the first", None, 5.0, 9.0, Interval(5.0, 9.0)),
        ("the same attachment", Interval(5.0, 9.0), 5.0, 12.0, Interval(5.0, 12.0)),
        ("one that took over", Interval(5.0, 9.0), 8.0, 12.0, Interval(5.0, 12.0)),
        ("one after a gap", Interval(5.0, 9.0), 10.0, 12.0, Interval(10.0, 12.0)),
        ("a clock that stepped back", Interval(5.0, 9.0), 5.0, 7.0, Interval(5.0, 9.0)),
        ("an attachment in the future", None, 9.0, 7.0, Interval(9.0, 9.0)),
        ("one that is older than the history", Interval(5.0, 9.0), 4.0, 9.0, Interval(5.0, 9.0)),
        ("a clock that stepped behind it", Interval(5.0, 9.0), 2.0, 3.0, Interval(2.0, 3.0)),
    ],
)
def test_an_attachment_continues_what_it_began_within(what, last, attached_at, now, expected):
    assert coverage.extend(last, attached_at, now) == expected, what


def test_workloads_of_any_id_fit_into_the_history(ledger):
    names = [f"w{n}" for n in range(50)]
    for name in names:
        ledger.extend(workload(name), T0, T0 + 1)
    edges = [edge(T0, 1, key(workload=workload_key(f"id-{name}"))) for name in names]
    ledger.record(T0 + 1, "g", edges, {})
    assert {each.workload for each in connections(ledger)} == {workload(n).key for n in names}
    assert all(ledger.coverage(workload(name).key) for name in names)
