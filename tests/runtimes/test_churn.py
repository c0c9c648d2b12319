"""A node full of pods that come and go: nobody is missed, and the agent stays small.

Twenty seconds of it; five minutes where TIDEGATE_SOAK is set.
"""

import collections
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
from clusters import Cluster
from namespaces import tell
from nodeagents import Agent
from nodes import until
from sandboxes import Sandbox, greeted
from worlds import PORT, Wire, World

from tidegate.kernel import netns

PODS = 250
PER_SECOND = 10
SECONDS = 300 if os.environ.get("TIDEGATE_SOAK") else 20
KUBELETS_HANDS = 4
"""How many pods are started and stopped at a time."""
MEGABYTES = 100
OF_WORKLOADS = (
    "/run/tidegate/attachments",
    "/run/tidegate/sidecars",
    "/sys/fs/bpf/tidegate/classifier/links",
)
"""Where the agent keeps something for each workload."""
GROWTH_MEGABYTES = 3
"""Less than what 250 pods that nobody forgets would hold."""


@pytest.mark.timeout(SECONDS + 240)
def test_250_pods_with_a_churn_of_ten_a_second(
    cluster: Cluster, outside: World, pytestconfig: pytest.Config
) -> None:
    agent = cluster.agent()
    held: list[float] = []
    descriptors: list[int] = []
    with (
        Wire(cluster.node) as wire,
        agent.running(),
        ThreadPoolExecutor(KUBELETS_HANDS) as hands,
    ):
        start = partial(_started, cluster, outside)
        living = collections.deque(hands.submit(start, number) for number in range(PODS))
        _all_are_looked_after(agent, living)
        stopped: list[Future[None]] = []
        began = time.monotonic()
        for number in range(PER_SECOND * SECONDS):
            _wait(began + number / PER_SECOND)
            stopped.append(hands.submit(_stop, cluster, living.popleft()))
            living.append(hands.submit(start, PODS + number))
            if number % PER_SECOND == 0:
                held.append(agent.process.memory_info().rss / 1e6)
                descriptors.append(agent.process.num_fds())
        for stop in stopped:
            stop.result()
        took = time.monotonic() - began
        tell(
            pytestconfig,
            f"{len(stopped)} pods replaced in {took:.0f} s; the agent held {held[0]:.0f} to {max(held):.0f} MB, "
            f"{held[-1]:.0f} MB in the end, with {descriptors[0]} to {max(descriptors)} descriptors",
        )
        _all_are_looked_after(agent, living)
        assert agent.is_running
        for pod in living:
            pod.result().remove()
        until(lambda: agent.workloads() == {}, "all are forgotten", agent.last_words)
        for directory in OF_WORKLOADS:
            left = cluster.node.path(directory)
            until(lambda left=left: [*left.iterdir()] == [], f"nothing is left in {directory}")
    observed = {
        line["workload"]
        for line in map(json.loads, agent.lines())
        if line["message"] == "observing"
    }
    assert observed == {f"web-{number}" for number in range(PODS + PER_SECOND * SECONDS)}
    assert wire.begun_by_pods() == []
    assert [line for line in agent.lines() if "redirected while it ran" in line] == []
    assert max(held) < MEGABYTES, held
    early, late = _quarters(held)
    assert late < early + GROWTH_MEGABYTES, held
    early, late = _quarters(descriptors)
    assert late < early + PER_SECOND, descriptors


def _started(cluster: Cluster, outside: World, number: int) -> Sandbox:
    """A pod that has been called and has called: both were redirected, to a sidecar that does not listen."""
    sandbox, answer = cluster.start(f"web-{number}", process=False)
    assert answer.code == 0, answer
    assert sandbox.reaches() == "refused"
    with sandbox.serve(PORT, "application"):
        assert netns.run_in(outside.netns, greeted, sandbox.address, PORT) == "refused"
    return sandbox


def _stop(cluster: Cluster, pod: Future[Sandbox]) -> None:
    assert cluster.stop(pod.result()).code == 0


def _all_are_looked_after(agent: Agent, living: Iterable[Future[Sandbox]]) -> None:
    names = {pod.result().name for pod in living}

    def are_looked_after() -> bool:
        workloads = agent.workloads().values()
        found = {
            one["name"].rpartition("/")[2]
            for one in workloads
            if one["redirect"] == "ok" and one["observed_since"] and not one["problem"]
        }
        return found == names and len(workloads) == len(names)

    until(are_looked_after, "every pod is observed and redirected", agent.last_words)


def _wait(moment: float) -> None:
    """Until the clock says so: a rate is kept, nothing is waited for."""
    time.sleep(max(0.0, moment - time.monotonic()))


def _quarters(samples: Sequence[float]) -> tuple[float, float]:
    """The medians of the second and of the last quarter."""
    quarter = len(samples) // 4
    return statistics.median(samples[quarter : 2 * quarter]), statistics.median(samples[-quarter:])
