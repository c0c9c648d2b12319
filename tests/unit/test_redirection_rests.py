"""When a workload's namespace is left alone: after work there failed, and after it took long."""

import pytest

from tidegate.enforce.redirect.backend import BackendName, Change
from tidegate.enforce.redirect.engine import Applied, Choice
from tidegate.intent.policy import DEFAULT, Mode, Policy
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
        self.asked = 0

    def _work(self):
        self.asked += 1
        self.clock.now += self.takes_s
        if self.refusal:
            raise self.refusal

    def check(self, _netns, _policy):
        self._work()
        return ()

    def apply(self, _netns, _policy, *, adopt):
        self._work()
        return Applied(change=Change.UNCHANGED, backend=BackendName.NFTABLES)

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
    made.keep("/ns", DEFAULT)
    engine.asked = 0
    return made


def looks_until_asked(kept, engine, clock):
    """Seconds until the engine is asked again, by somebody who looks all the time."""
    began = clock.now
    while not engine.asked:
        clock.now += 0.1
        try:
            kept.keep("/ns", DEFAULT, look=True)
        except KernelError:
            continue
    return clock.now - began


def test_quick_work_is_followed_by_no_rest(kept, engine):
    for times in (1, 2, 3):
        kept.look("/ns")
        assert engine.asked == times


def test_after_slow_work_a_namespace_rests_several_times_as_long_as_that_took(kept, engine, clock):
    engine.takes_s = 2 * LONG_S
    kept.look("/ns")
    engine.asked, engine.takes_s = 0, 0.0
    kept.look("/ns")
    assert engine.asked == 0
    assert kept.state is Redirection.APPLIED
    assert looks_until_asked(kept, engine, clock) == pytest.approx(2 * LONG_S * RESTS_FOR, abs=0.2)
    engine.asked = 0
    kept.look("/ns")
    assert engine.asked == 1, "and after quick work there is no rest again"
    engine.takes_s = 2 * LONG_S
    kept.look("/ns")
    engine.asked, engine.takes_s = 0, 0.0
    rest = looks_until_asked(kept, engine, clock)
    assert rest == pytest.approx(2 * LONG_S * RESTS_FOR, abs=0.2), "and the next is not longer"


def test_what_happens_during_a_rest_is_looked_at_after_it_without_being_told_again(
    kept, engine, clock
):
    engine.takes_s = 2 * LONG_S
    kept.look("/ns")
    engine.asked, engine.takes_s = 0, 0.0
    kept.look("/ns")
    clock.now += 2 * LONG_S * RESTS_FOR
    kept.keep("/ns", DEFAULT)
    assert engine.asked == 1


def test_a_namespace_that_stays_slow_is_asked_less_and_less_up_to_a_bound(kept, engine, clock):
    engine.takes_s = 2 * LONG_S
    kept.look("/ns")
    rests = []
    for _ in range(6):
        engine.asked = 0
        began = clock.now
        looks_until_asked(kept, engine, clock)
        rests.append(clock.now - engine.takes_s - began)
    assert rests == sorted(rests)
    assert rests[1] == pytest.approx(2 * rests[0], abs=0.3)
    assert rests[-1] == pytest.approx(LONGEST_REST_S, abs=0.2)


def test_after_a_refusal_it_rests_and_the_refusal_is_told_meanwhile(kept, engine, clock):
    engine.refusal = KernelError("no", 1)
    with pytest.raises(KernelError, match="no"):
        kept.look("/ns")
    engine.asked = 0
    with pytest.raises(KernelError, match="no"):
        kept.keep("/ns", DEFAULT)
    assert engine.asked == 0
    engine.refusal = None
    assert looks_until_asked(kept, engine, clock) == pytest.approx(FIRST_REST_S, abs=0.2)
    assert kept.state is Redirection.APPLIED


def test_another_policy_and_another_namespace_do_not_rest(kept, engine):
    engine.takes_s = 2 * LONG_S
    kept.look("/ns")
    kept.keep("/ns", OTHER)
    assert engine.asked == 2
    kept.forget()
    kept.keep("/ns", OTHER)
    assert engine.asked == 3


def test_a_namespace_whose_sidecar_is_waited_for_rests_as_well(engine):
    waiting = WorkloadRedirection("api", engine, on_failure=OnFailure.LEAVE, adopt=False)
    engine.takes_s = 2 * LONG_S
    assert waiting.is_as_wanted("/ns", DEFAULT)
    assert not waiting.is_as_wanted("/ns", DEFAULT)
    assert engine.asked == 1
