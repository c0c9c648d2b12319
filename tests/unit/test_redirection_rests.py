"""When a workload's namespace is left alone: after work there failed, and after it took long."""

import pytest

from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Applied, Choice
from tidegate.intent.policy import DEFAULT, Mode, Policy
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError
from tidegate.node import redirection
from tidegate.node.config import OnFailure
from tidegate.node.redirection import (
    FIRST_REST_S,
    LONG_S,
    LONGEST_REST_S,
    RESTS_FOR,
    Redirection,
    WorkloadRedirection,
)

HERE = netns.CURRENT
OTHER = Policy(mode=Mode.TPROXY)


class Clock:
    """Stands for the module `time`: it stands still but for what the engine takes."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now


class Engine:
    """Stands for the engine: says how often it was asked, and takes its time."""

    choice = Choice(BackendName.NFTABLES, "")

    def __init__(self, clock):
        self.clock = clock
        self.takes_s = 0.0
        self.refusal = None
        self.differences = ()
        self.asked = 0

    def _work(self):
        self.asked += 1
        self.clock.now += self.takes_s
        if self.refusal:
            raise self.refusal

    def check(self, _netns, _policy):
        self._work()
        return self.differences

    def apply(self, _netns, _policy, *, adopt):
        self._work()
        change = Change.REPLACED if self.differences else Change.UNCHANGED
        self.differences = ()
        return Applied(change=change, backend=BackendName.NFTABLES)

    def remove(self, _netns):
        self._work()
        return Change.REMOVED

    def gaps(self, _netns, _policy):
        return ()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(redirection, "time", made)
    monkeypatch.setattr(redirection.block, "unblock", lambda _netns: Change.UNCHANGED)
    return made


@pytest.fixture
def engine(clock):
    return Engine(clock)


@pytest.fixture
def kept(engine):
    """A redirection that is in place."""
    made = WorkloadRedirection("api", engine, on_failure=OnFailure.LEAVE, adopt=False)
    made.enter(netns.identity(HERE))
    made.keep(HERE, DEFAULT)
    engine.asked = 0
    return made


def looks_until_asked(kept, engine, clock):
    """Seconds until the engine is asked again, by somebody who looks all the time."""
    began = clock.now
    while not engine.asked:
        clock.now += 0.1
        try:
            kept.keep(HERE, DEFAULT, look=True)
        except KernelError:
            continue
    return clock.now - began


def test_quick_work_is_followed_by_no_rest(kept, engine):
    for times in (1, 2, 3):
        kept.look(HERE)
        assert engine.asked == times


def test_after_slow_work_a_namespace_rests_several_times_as_long_as_that_took(kept, engine, clock):
    engine.takes_s = 2 * LONG_S
    kept.look(HERE)
    engine.asked, engine.takes_s = 0, 0.0
    kept.look(HERE)
    assert engine.asked == 0
    assert kept.state is Redirection.APPLIED
    assert looks_until_asked(kept, engine, clock) == pytest.approx(2 * LONG_S * RESTS_FOR, abs=0.2)
    engine.asked = 0
    kept.look(HERE)
    assert engine.asked == 1, "and after quick work there is no rest again"
    engine.takes_s = 2 * LONG_S
    kept.look(HERE)
    engine.asked, engine.takes_s = 0, 0.0
    rest = looks_until_asked(kept, engine, clock)
    assert rest == pytest.approx(2 * LONG_S * RESTS_FOR, abs=0.2), "and the next is not longer"


def test_what_happens_during_a_rest_is_looked_at_after_it_without_being_told_again(
    kept, engine, clock
):
    engine.takes_s = 2 * LONG_S
    kept.look(HERE)
    engine.asked, engine.takes_s = 0, 0.0
    kept.look(HERE)
    clock.now += 2 * LONG_S * RESTS_FOR
    kept.keep(HERE, DEFAULT)
    assert engine.asked == 1


def test_a_namespace_that_stays_slow_rests_no_longer_each_time(kept, engine, clock):
    engine.takes_s = 2 * LONG_S
    kept.look(HERE)
    for _ in range(4):
        engine.asked = 0
        began = clock.now
        looks_until_asked(kept, engine, clock)
        rest = clock.now - engine.takes_s - began
        assert rest == pytest.approx(2 * LONG_S * RESTS_FOR, abs=0.2)
    engine.asked, engine.takes_s = 0, LONGEST_REST_S
    looks_until_asked(kept, engine, clock)
    engine.asked, engine.takes_s = 0, 0.0
    assert looks_until_asked(kept, engine, clock) == pytest.approx(LONGEST_REST_S, abs=0.2)


def test_a_namespace_that_goes_on_refusing_is_asked_less_and_less_up_to_a_bound(
    kept, engine, clock
):
    engine.refusal = KernelError("no", 1)
    with pytest.raises(KernelError):
        kept.look(HERE)
    rests = []
    for _ in range(9):
        engine.asked = 0
        rests.append(looks_until_asked(kept, engine, clock))
    assert rests == sorted(rests)
    assert rests[1] == pytest.approx(2 * rests[0], abs=0.3)
    assert rests[-1] == pytest.approx(LONGEST_REST_S, abs=0.2)


def test_after_a_success_the_next_refusal_is_followed_by_a_short_rest_again(kept, engine, clock):
    rests = []
    for _ in range(2):
        engine.refusal = KernelError("no", 1)
        with pytest.raises(KernelError):
            kept.look(HERE)
        engine.asked, engine.refusal = 0, None
        rests.append(looks_until_asked(kept, engine, clock))
    assert rests == pytest.approx([FIRST_REST_S] * 2, abs=0.15)


def test_what_happens_during_a_rest_is_told_until_it_has_been_looked_at(kept, engine, clock):
    engine.takes_s = 2 * LONG_S
    kept.look(HERE)
    assert kept.unseen == ""
    engine.takes_s = 0.0
    kept.keep(HERE, DEFAULT)
    assert kept.unseen == "", "nothing has happened"
    kept.look(HERE)
    clock.now += 3.0
    kept.look(HERE)
    assert "3 s ago" in kept.unseen, "since the first of what happened"
    assert "the redirection may be gone" in kept.unseen
    assert kept.state is Redirection.APPLIED
    engine.differences = ("gone",)
    clock.now += 2 * LONG_S * RESTS_FOR
    kept.keep(HERE, DEFAULT)
    assert kept.unseen == ""
    assert kept.repairs(0.0) == 1


def test_who_changes_the_rules_again_and_again_is_told_and_logged_once_in_a_while(
    kept, engine, clock, caplog
):
    for _ in range(100):
        engine.differences = ("table inet tidegate is missing",)
        kept.look(HERE)
    assert "100 times in the last 60 s" in kept.contested
    assert "table inet tidegate is missing" in kept.contested
    assert len(caplog.records) == redirection.CONTESTED + 1
    clock.now += redirection.CONTESTED_S + 1
    assert kept.contested == ""
    engine.differences = ("table inet tidegate is missing",)
    kept.look(HERE)
    assert len(caplog.records) == redirection.CONTESTED + 2


def test_what_was_not_looked_at_is_forgotten_with_the_namespace_and_with_the_rules(kept, engine):
    for leave in (lambda: kept.remove(HERE), lambda: kept.enter(None)):
        engine.takes_s = 2 * LONG_S
        kept.keep(HERE, OTHER if kept.state is Redirection.APPLIED else DEFAULT, look=True)
        engine.takes_s = 0.0
        kept.look(HERE)
        assert kept.unseen
        leave()
        assert kept.unseen == ""


def test_another_namespace_at_the_path_is_not_touched(kept, engine):
    kept.enter(netns.Identity(0, 1))
    with pytest.raises(KernelError, match="another network namespace has come"):
        kept.keep(HERE, DEFAULT)
    with pytest.raises(KernelError, match="another network namespace has come"):
        kept.is_as_wanted(HERE, DEFAULT)
    assert kept.state is Redirection.NONE, "and nothing of it is blocked"
    kept.enter(netns.Identity(0, 2))
    with pytest.raises(KernelError, match="another network namespace has come"):
        kept.note_loss(HERE, DEFAULT)
    assert engine.asked == 0
    assert kept.repairs(0.0) == 0


def test_rules_that_cannot_be_removed_are_tried_again_after_rests_and_not_put_back(
    kept, engine, clock
):
    engine.refusal = KernelError("no", 1)
    for _ in range(3):
        with pytest.raises(KernelError, match="no"):
            kept.remove(HERE)
    assert engine.asked == 1
    assert kept.state is Redirection.FAILED
    kept.look(HERE)
    assert engine.asked == 1
    engine.refusal = None
    clock.now += FIRST_REST_S
    kept.remove(HERE)
    assert engine.asked == 2
    assert kept.state is Redirection.NONE


def test_a_workload_that_cannot_be_blocked_is_tried_again_after_rests(engine, clock, monkeypatch):
    asked, refusals = [], [KernelError("no", 1)]

    def block(_netns):
        asked.append(clock.now)
        if refusals:
            raise refusals[0]
        return Change.CREATED

    monkeypatch.setattr(redirection.block, "block", block)
    blocked = WorkloadRedirection("api", engine, on_failure=OnFailure.BLOCK, adopt=False)
    blocked.enter(netns.identity(HERE))
    for _ in range(3):
        with pytest.raises(KernelError, match="no"):
            blocked.fail(HERE)
    assert len(asked) == 1
    refusals.clear()
    clock.now += FIRST_REST_S
    blocked.fail(HERE)
    assert blocked.state is Redirection.BLOCKED


def test_after_a_refusal_it_rests_and_the_refusal_is_told_meanwhile(kept, engine, clock):
    engine.refusal = KernelError("no", 1)
    with pytest.raises(KernelError, match="no"):
        kept.look(HERE)
    engine.asked = 0
    with pytest.raises(KernelError, match="no"):
        kept.keep(HERE, DEFAULT)
    assert engine.asked == 0
    engine.refusal = None
    assert looks_until_asked(kept, engine, clock) == pytest.approx(FIRST_REST_S, abs=0.2)
    assert kept.state is Redirection.APPLIED


def test_another_policy_and_another_namespace_do_not_rest(kept, engine):
    engine.takes_s = 2 * LONG_S
    kept.look(HERE)
    kept.keep(HERE, OTHER)
    assert engine.asked == 2
    kept.enter(None)
    kept.enter(netns.identity(HERE))
    kept.keep(HERE, OTHER)
    assert engine.asked == 3


def test_a_namespace_whose_sidecar_is_waited_for_rests_as_well(engine):
    waiting = WorkloadRedirection("api", engine, on_failure=OnFailure.LEAVE, adopt=False)
    waiting.enter(netns.identity(HERE))
    engine.takes_s = 2 * LONG_S
    assert waiting.is_as_wanted(HERE, DEFAULT)
    assert not waiting.is_as_wanted(HERE, DEFAULT)
    assert engine.asked == 1
