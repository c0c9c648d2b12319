"""The agent's evidence of its workloads: what goes wrong with one is not the others' problem."""

import time

import msgspec
import pytest

from tidegate.enforce.sidecar.envoy import Phase
from tidegate.model import (
    CountedEdge,
    Direction,
    EdgeCount,
    EdgeKey,
    FlowClass,
    Instance,
    MutualTLSMode,
    Workload,
)
from tidegate.node import observation as observation_module
from tidegate.node.config import AgentConfig
from tidegate.node.observation import Observation
from tidegate.observe.classifier import Attachment, Losses
from tidegate.observe.witness import PERSISTENT_ROUNDS


class Classifier:
    """Stands for the kernel: counters that a test sets, and what was asked of it."""

    generation = "g"
    room = 65536
    notes = ()

    def __init__(self):
        self.attached = {}
        self.counters = []
        self.forgotten = []
        self.defects = set()

    def set_profile(self, _profile):
        pass

    def attachments(self):
        return list(self.attached.values())

    def detach_others(self, _workload_key, _ifindex):
        pass

    def attach(self, workload_key, ifindex, side, _ports):
        if workload_key in self.defects:
            raise ZeroDivisionError("attach")
        made = Attachment(
            workload_key=workload_key, ifindex=ifindex, side=side, attached_at=1.0, scope=1
        )
        self.attached[workload_key] = made
        return made

    def detach(self, workload_key):
        if workload_key in self.defects:
            raise ZeroDivisionError("detach")
        self.attached.pop(workload_key, None)

    def changed_edges(self):
        told, self.counters = self.counters, []
        return told

    def forget(self, slots):
        self.forgotten.extend(slots)

    def forget_edges(self, workload_key):
        self.forgotten.append(workload_key)

    def losses(self):
        return Losses()

    def close(self):
        pass


class Stats:
    permissive_connections = public_connections = permissive_active = public_active = 0


class Keeper:
    """Stands for node.keeper: a workload in the mesh, in strict mode, whose sidecar counts what a test says."""

    policy = None
    mode = MutualTLSMode.STRICT
    plaintext_ports = frozenset()
    in_mesh = True
    has_own_sidecar = False
    applied_index = 0
    problems = ()

    class redirection:  # noqa: N801
        def repairs(_since):  # noqa: N805
            return 0

    class sidecar:  # noqa: N801
        phase, pid = Phase.RUNNING, 1

    def __init__(self, name):
        self.workload = Workload(
            id=f"id-{name}", name=name, service=name, node="n1", netns="/nowhere", port=80
        )
        self.stats = Stats()
        self.admin = self

    def sidecar_stats(self):
        if self.stats is None:
            raise ZeroDivisionError("counters")
        return self.stats


@pytest.fixture
def kernel(monkeypatch):
    classifier = Classifier()
    monkeypatch.setattr(observation_module.Classifier, "open", lambda _path: classifier)
    monkeypatch.setattr(observation_module.links, "host_ifindex", lambda _netns, _name: 7)
    return classifier


@pytest.fixture
def observation(kernel, tmp_path):
    config = AgentConfig(
        node="n1",
        server="unix:///nowhere",
        workloads=tmp_path,
        run_dir=tmp_path,
        state_dir=tmp_path,
        socket=tmp_path / "s",
        bpffs=tmp_path,
        trust_domain="mesh.consul",
    )
    made = Observation(config)
    yield made
    made.close()


def counted(workload, connections, slot, at, peer="10.0.0.1", live=True, hints=()):
    key = EdgeKey(
        workload=workload.key,
        direction=Direction.INBOUND,
        peer=peer,
        port=80,
        flow_class=FlowClass.PLAINTEXT,
    )
    count = EdgeCount(
        connections=connections,
        bytes_to_server=connections,
        bytes_to_client=0,
        first_seen=at,
        last_seen=at,
        hints=hints,
    )
    return CountedEdge(slot=slot, generation=1, live=live, key=key, count=count)


def told(observation, keepers, since=0.0, until=1e11):
    keepers = {keeper.workload.id: keeper for keeper in keepers}
    found = observation.flows(since, until, keepers)
    return [(row.caller.workload, row.server.workload, row.connections) for row in found.flows]


def test_a_defect_in_attaching_one_workload_is_its_problem_and_no_others(observation, kernel):
    bad, good = Keeper("bad").workload, Keeper("good").workload
    kernel.defects.add(bad.key)
    for workload in (bad, good):
        observation.attach(workload)
    assert kernel.attached.keys() == {good.key}
    assert "by a defect of the agent" in observation.problem(bad)
    assert observation.problem(good) == ""
    kernel.defects.clear()
    observation.look([bad, good])
    observation.attach(bad)
    assert observation.problems() == ()


def test_the_youngest_is_observed_first_and_what_failed_last(observation, kernel):
    young, old, bad, known = (Keeper(name).workload for name in ("young", "old", "bad", "known"))
    young = msgspec.structs.replace(young, created_at=9.0)
    bad = msgspec.structs.replace(bad, created_at=10.0)
    kernel.defects.add(bad.key)
    for workload in (bad, known):
        observation.attach(workload)
    assert observation.unobserved([known, bad, old, young]) == [young, old, bad]
    described_anew = msgspec.structs.replace(known, port=81)
    assert observation.unobserved([described_anew]) == [described_anew]


def test_a_defect_in_letting_one_workload_go_is_told_and_tried_again(observation, kernel):
    bad, good = Keeper("bad").workload, Keeper("good").workload
    for workload in (bad, good):
        observation.attach(workload)
    kernel.defects.add(bad.key)
    for key in observation.unclaimed([]):
        observation.detach(key)
    observation.look([])
    assert observation.unclaimed([]) == (bad.key,)
    assert len(observation.problems()) == 1
    kernel.defects.clear()
    observation.detach(bad.key)
    observation.look([])
    assert observation.problems() == ()


def test_a_defect_in_one_sidecars_counters_costs_no_other_its_round(observation, kernel):
    bad, good = Keeper("bad"), Keeper("good")
    for keeper in (bad, good):
        observation.attach(keeper.workload)
    bad.stats = None
    now = time.time()
    kernel.counters = [counted(bad.workload, 3, 1, now), counted(good.workload, 5, 2, now)]
    observation.collect(now, [bad, good])
    assert sorted(told(observation, [bad, good])) == [("", "bad", 3), ("", "good", 5)]
    assert "its sidecar's counters" in observation.problem(bad.workload)
    assert observation.problem(good.workload) == ""
    bad.stats = Stats()
    observation.collect(now + 1, [bad, good])
    assert observation.problems() == ()


def test_a_defect_in_naming_one_workloads_flows_leaves_the_others(observation, kernel):
    bad, good = Keeper("bad"), Keeper("good")
    now = time.time()
    kernel.counters = [counted(bad.workload, 3, 1, now), counted(good.workload, 5, 2, now)]
    observation.collect(now, [bad, good])
    bad.policy = "not a policy"
    assert told(observation, [bad, good]) == [("", "good", 5)]
    assert "is not told of" in observation.problem(bad.workload)


def test_a_workloads_counters_are_forgotten_when_its_last_counts_are_stored(observation, kernel):
    keeper = Keeper("api")
    observation.attach(keeper.workload)
    observation.detach(keeper.workload.key)
    assert kernel.forgotten == []
    now = time.time()
    kernel.counters = [counted(keeper.workload, 3, 1, now)]
    observation.collect(now, [])
    assert kernel.forgotten == [keeper.workload.key]
    observation.collect(now + 1, [])
    assert kernel.forgotten == [keeper.workload.key]


def test_counters_of_idle_edges_are_given_back_and_sums_stay(observation, kernel):
    keeper = Keeper("api")
    now = time.time()
    kernel.counters = [
        counted(keeper.workload, 3, 1, now - 700),
        counted(keeper.workload, 1, 2, now, "b"),
    ]
    observation.collect(now, [keeper])
    assert kernel.forgotten == [(1, 1)]
    kernel.counters = [counted(keeper.workload, 4, 1, now, live=False)]
    observation.collect(now + 1, [keeper])
    kernel.counters = [counted(keeper.workload, 2, 9, now + 2)]
    observation.collect(now + 2, [keeper])
    assert sorted(told(observation, [keeper])) == [("", "api", 1), ("", "api", 6)]


def test_the_witness_goes_on_where_counters_began_anew(observation, kernel):
    keeper = Keeper("api")
    observation.attach(keeper.workload)
    now = time.time()
    for number in range(PERSISTENT_ROUNDS + 4):
        keeper.stats.public_connections = number
        # A counter for each connection: the one before it was given back.
        kernel.counters = [counted(keeper.workload, 1, number, now + number)]
        if number:
            kernel.counters.append(counted(keeper.workload, 1, number - 1, now, live=False))
        observation.collect(now + number, [keeper])
    evidence = observation.evidence("api", 0.0, 1e11, {"api": keeper})
    [instance] = evidence.instances
    assert instance.witness.agrees is True
    assert instance.witness.sidecar.public > 2


def test_an_address_that_changed_its_owner_names_each_for_its_own_time(observation, kernel):
    keeper = Keeper("api")
    now = time.time() - 100
    owners = [("old", now - 50, now + 10), ("new", now + 30, 0.0)]
    observation.labels.replace(
        Instance(
            id=name,
            name=name,
            service=name,
            node="n2",
            addresses=("10.0.0.1",),
            seen_from=since,
            seen_until=until,
        )
        for name, since, until in owners
    )
    for step, connections in ((0, 3), (8, 5), (40, 6), (60, 9)):
        kernel.counters = [counted(keeper.workload, connections, 1, now + step)]
        observation.collect(now + step, [keeper])
    assert sorted(told(observation, [keeper])) == [("new", "api", 4), ("old", "api", 5)]
    evidence = observation.evidence("api", 0.0, 1e11, {"api": keeper}).instances[0].edges
    assert sorted((edge.connections, edge.last_seen < now + 10) for edge in evidence) == [
        (4, False),
        (5, True),
    ]


def test_what_the_classifier_notes_is_logged_once(observation, kernel, caplog):
    for notes in (("begun anew",), ("begun anew",), ("begun anew", "a filter comes first")):
        kernel.notes = notes
        observation.look([])
    assert caplog.messages == ["begun anew", "a filter comes first"]


def test_coverage_does_not_begin_before_the_history_that_it_is_of(kernel, tmp_path):
    """Who had another one may have had counters given back that are in that alone."""
    keeper, now = Keeper("a"), time.time()

    def covered(state):
        config = AgentConfig(
            node="n1",
            server="unix:///nowhere",
            run_dir=tmp_path,
            state_dir=tmp_path / state,
            bpffs=tmp_path,
            trust_domain="mesh.consul",
        )
        config.state_dir.mkdir(exist_ok=True)
        observation = Observation(config)
        observation.attach(keeper.workload)
        observation.collect(now + 60.0, [keeper])
        (interval,) = observation._ledger.coverage(keeper.workload.key)
        assert observation.observed_since(keeper.workload) == 1.0
        observation.close()
        return interval

    first = covered("first")
    assert now <= first.start < now + 60.0
    assert covered("first") == first, "it is continued"
    assert covered("another").start >= first.start
