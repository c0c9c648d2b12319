"""Work on several workloads at once, and on each by one thread at a time."""

import threading

import pytest

from tidegate.node.pool import Pool

DEADLINE_S = 10.0


@pytest.fixture
def pool():
    made = Pool(2)
    yield made
    made.close()


def test_a_workload_that_is_worked_on_is_not_worked_on_by_another_thread(pool):
    go_on, did = threading.Event(), []
    assert pool.submit("a", lambda: go_on.wait(DEADLINE_S))
    assert pool.is_busy("a")
    assert not pool.submit("a", lambda: did.append("a"))
    go_on.set()
    pool.wait(["a"], DEADLINE_S)
    assert did == []
    assert not pool.is_busy("a")
    assert pool.submit("a", lambda: did.append("a"))
    pool.wait(["a"], DEADLINE_S)
    assert did == ["a"]


def test_others_are_worked_on_meanwhile_and_only_those_asked_for_are_waited_for(pool):
    go_on, did = threading.Event(), []
    pool.submit("slow", lambda: go_on.wait(DEADLINE_S))
    pool.submit("b", lambda: did.append("b"))
    pool.wait(["b"], DEADLINE_S)
    assert did == ["b"]
    pool.wait(["slow"], 0.01)
    assert pool.is_busy("slow")
    go_on.set()


def test_a_defect_is_told_once_with_the_workload_that_it_came_out_of(pool):
    defect = RuntimeError("a defect")

    def fail():
        raise defect

    pool.submit("a", fail)
    pool.submit("b", lambda: None)
    pool.wait(["a", "b"], DEADLINE_S)
    assert pool.defects() == {"a": defect}
    assert pool.defects() == {}


def test_nothing_is_kept_of_work_that_has_ended(pool):
    def fail():
        raise RuntimeError

    for number in range(20):
        pool.submit(f"{number}", fail if number % 2 else lambda: None)
    pool.wait([*map(str, range(20)), "never there"], DEADLINE_S)
    assert pool._begun == {}


def test_closing_ends_what_goes_on_and_begins_nothing_that_waited():
    pool, go_on, did = Pool(1), threading.Event(), []
    pool.submit("a", lambda: did.append(go_on.wait(DEADLINE_S)))
    pool.submit("b", lambda: did.append("b"))
    threading.Timer(0.05, go_on.set).start()
    pool.close()
    assert did == [True]
