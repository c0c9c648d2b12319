"""The sources of a node, asked side by side: one that fails or is slow costs no other, and nothing that was known."""

import threading
import time
from pathlib import Path

import msgspec
import pytest

from tidegate.kernel import netns
from tidegate.node import census as census_module
from tidegate.node.census import Census
from tidegate.node.problems import Problems
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment

DEADLINE_S = 20.0
PATH = "/run/netns/a"
LEFT = LeftAlone(
    origin=Origin.KUBERNETES,
    id="uid-2",
    name="proxy",
    namespace="kube-system",
    treatment=Treatment.HOST_NETWORK,
    reason="it shares the node's network namespace",
)


class Source:
    """Tells what a test says."""

    def __init__(self, *descriptions, left=(), problems=(), is_complete=True):
        self.descriptions = descriptions
        self.left, self.told, self.is_complete = left, problems, is_complete
        self.failure = None
        self.waits_for = None
        self.asked = 0

    def list(self):
        self.asked += 1
        if self.waits_for is not None:
            assert self.waits_for.wait(DEADLINE_S)
        if self.failure is not None:
            raise self.failure
        return self.descriptions

    def left_alone(self):
        return self.left

    def problems(self):
        return self.told


def told(origin=Origin.KUBERNETES, **fields):
    return Description(
        origin=origin, **({"id": "uid-1", "netns": PATH, "addresses": ("10.0.0.1",)} | fields)
    )


@pytest.fixture
def places(monkeypatch):
    """Which namespace lies at which path."""
    made = {PATH: netns.Identity(4, 1), netns.CURRENT: netns.Identity(4, 99)}
    real = netns.identity

    def identity(path):
        return made[path] if path in made else real(path)

    monkeypatch.setattr(netns, "identity", identity)
    return made


class Site:
    def __init__(self, directory):
        self.file = directory / "aliases.json"
        self.problems = Problems()
        self.opened = []

    def census(self, **sources):
        made = Census("n1", sources, self.file, self.problems)
        self.opened.append(made)
        return made


@pytest.fixture
def site(tmp_path, places):
    made = Site(tmp_path)
    yield made
    for census in made.opened:
        census.close()


def test_what_all_sources_tell_is_put_together(site):
    pods = Source(told(name="api-1", meshed=True), left=(LEFT,))
    calls = Source(told(Origin.CNI, id="cni-1", interface="eth7"), problems=("a file is broken",))
    census = site.census(pods=pods, calls=calls)
    (workload,) = census.take()
    assert (workload.id, workload.name, workload.interface) == ("uid-1", "api-1", "eth7")
    assert (census.left_alone, census.problems()) == ((LEFT,), ("a file is broken",))
    assert census.is_complete


def test_a_source_with_a_defect_keeps_what_it_told_and_stops_no_other(site):
    pods, files = Source(told(name="api-1")), Source()
    census = site.census(pods=pods, files=files)
    assert [one.name for one in census.take()] == ["api-1"]
    pods.failure = ZeroDivisionError("a bad place")
    files.descriptions = (told(Origin.FILES, id="b", name="b", netns="/nowhere"),)
    for _ in range(2):
        assert {one.name for one in census.take()} == {"api-1", "b"}
        assert not census.is_complete, "nothing that is not listed now is gone"
    (problem,) = site.problems
    assert problem.startswith("the source pods is not worked on, by a defect of the agent")
    assert "a bad place" in problem
    pods.failure = None
    pods.descriptions = ()
    assert [one.name for one in census.take()] == ["b"]
    assert census.is_complete
    assert list(site.problems) == []


def test_a_source_that_hangs_holds_up_no_round_and_is_asked_once(site, monkeypatch):
    monkeypatch.setattr(census_module, "SILENT_S", 0.0)
    pods, files = Source(told(name="api-1")), Source()
    census = site.census(pods=pods, files=files)
    census.take()
    asked, pods.waits_for = pods.asked, threading.Event()
    files.descriptions = (told(Origin.FILES, id="b", name="b", netns="/nowhere"),)
    try:
        for _ in range(3):
            began = time.monotonic()
            assert {one.name for one in census.take()} == {"api-1", "b"}
            assert time.monotonic() - began < DEADLINE_S / 2
            assert not census.is_complete
        assert pods.asked == asked + 1
        assert list(site.problems) == ["pods takes long to tell its workloads"]
    finally:
        pods.waits_for.set()
    pods.descriptions = (told(name="api-2"),)
    deadline = time.monotonic() + DEADLINE_S
    while "api-2" not in {one.name for one in census.take()}:
        assert time.monotonic() < deadline
    assert list(site.problems) == []


def test_a_source_that_cannot_see_all_makes_the_census_incomplete(site):
    census = site.census(pods=Source(is_complete=False), files=Source())
    census.take()
    assert not census.is_complete


def test_before_it_was_asked_nothing_is_complete(site):
    assert not site.census(pods=Source()).is_complete


def test_what_an_id_stands_for_outlives_the_agent_and_the_source_that_told_it(site):
    pods, calls = Source(told(name="api-1")), Source(told(Origin.CNI, id="cni-1"))
    (workload,) = site.census(pods=pods, calls=calls).take()
    assert workload.id == "uid-1"
    assert site.file.stat().st_mode & 0o777 == 0o600
    (alone,) = site.census(calls=calls).take()
    assert alone.id == "uid-1"


def test_ids_of_workloads_that_are_gone_are_forgotten_once_that_is_known(site, places):
    pods, calls = Source(told(name="api-1")), Source(told(Origin.CNI, id="cni-1"))
    census = site.census(pods=pods, calls=calls)
    census.take()
    pods.descriptions = calls.descriptions = ()
    calls.is_complete = False
    census.take()
    assert b"cni-1" in site.file.read_bytes()
    calls.is_complete = True
    census.take()
    assert site.file.read_bytes() == b"{}"


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": 3}', b"\xff"])
def test_a_damaged_file_of_ids_costs_the_ids_only(site, content):
    site.file.write_bytes(content)
    census = site.census(pods=Source(told(name="api-1")))
    assert [one.id for one in census.take()] == ["uid-1"]


def test_ids_that_cannot_be_written_are_told_and_hold_all_the_same(site):
    site.file = Path("/nonexistent/aliases.json")
    pods, calls = Source(told(name="api-1")), Source(told(Origin.CNI, id="cni-1"))
    census = site.census(pods=pods, calls=calls)
    census.take()
    pods.descriptions = ()
    assert [one.id for one in census.take()] == ["uid-1"]
    assert list(site.problems) == [
        "/nonexistent/aliases.json cannot be written: No such file or directory"
    ]


def test_a_pod_in_the_agents_own_namespace_is_left_alone(site, places):
    places[PATH] = places[netns.CURRENT]
    census = site.census(pods=Source(told(name="api-1")))
    assert census.take() == ()
    (left,) = census.left_alone
    assert (left.name, left.treatment) == ("api-1", Treatment.HOST_NETWORK)


def test_what_is_excluded_by_now_is_no_workload_although_a_call_once_told_of_it(site, places):
    excluded = msgspec.structs.replace(LEFT, id="uid-1", treatment=Treatment.EXCLUDED)
    calls = Source(told(Origin.CNI, meshed=True))
    census = site.census(pods=Source(left=(excluded,)), calls=calls)
    assert census.take() == ()
    ended = msgspec.structs.replace(excluded, treatment=Treatment.FINISHED)
    (workload,) = site.census(pods=Source(left=(ended,)), calls=calls).take()
    assert workload.meshed, "one that ends is let go by its own DEL"


def test_a_namespace_that_cannot_be_looked_at_is_not_gone(site, places, monkeypatch):
    census = site.census(pods=Source(told(name="api-1")))
    census.take()

    def refuse(path):
        raise census_module.KernelError("not allowed", 13)

    monkeypatch.setattr(netns, "identity", refuse)
    assert [one.name for one in census.take()] == ["api-1"]


def test_addresses_that_no_source_knows_are_the_kernels(site, places, monkeypatch):
    asked = []

    def addresses(path, interface):
        asked.append((path, interface))
        return ("10.9.9.9",) if len(asked) > 1 else ()

    monkeypatch.setattr(census_module.links, "addresses", addresses)
    census = site.census(pods=Source(told(name="api-1", addresses=None)))
    assert [census.take()[0].addresses for _ in range(4)] == [(), *([("10.9.9.9",)] * 3)]
    assert asked == [(PATH, "eth0")] * 2, "it is asked again only while there are none"
    places[PATH] = netns.Identity(4, 2)
    census.take()
    assert len(asked) == 3, "and in another namespace"


def test_what_is_wrong_and_what_is_left_alone_is_logged_once(site, caplog):
    caplog.set_level("INFO", "tidegate.census")
    census = site.census(pods=Source(left=(LEFT,), problems=("shop/api-3 runs and was not found",)))
    for _ in range(3):
        census.take()
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("WARNING", "shop/api-3 runs and was not found"),
        ("INFO", "left alone"),
    ]
    assert caplog.records[1].fields["workload"] == "proxy"
