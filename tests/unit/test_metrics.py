"""The agent's metrics, read as Prometheus reads them."""

import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tidegate.model import Direction, FlowClass, Sidecar
from tidegate.node.metrics import (
    MOST_NAMED,
    CniResult,
    Metrics,
    NodeState,
    Observed,
    Traffic,
    WatchState,
)
from tidegate.node.status import RedirectState, Status, WorkloadStatus
from tidegate.workloads.source import LeftAlone, Origin, Treatment

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"


def workload(name="web", **fields):
    said = {
        "id": f"id-{name}",
        "name": name,
        "namespace": "default",
        "service": name,
        "wanted_in_mesh": True,
        "meshed": True,
        "netns": f"/run/netns/{name}",
        "annotations": {},
        "namespace_annotations": {},
        "policy": None,
        "redirect": RedirectState.OK,
        "repairs": 0,
        "last_repair": "",
        "notes": (),
        "sidecar": Sidecar.TIDEGATE,
        "state": "running",
        "pid": 1,
        "restarts": 0,
        "last_exit": "",
        "mode": "permissive",
        "observed_since": 1.0,
        "closed": (),
        "reason": "",
        "problem": "",
    }
    return WorkloadStatus(**(said | fields))


def left_alone(name, treatment):
    return LeftAlone(
        origin=Origin.KUBERNETES,
        id=name,
        name=name,
        namespace="kube-system",
        treatment=treatment,
        reason="",
    )


def state(*workloads, left=(), problems=(), **fields):
    status = Status(
        node="n1",
        trust_domain="t.example",
        round_at=12.5,
        workloads=workloads,
        left_alone=left,
        problems=problems,
    )
    return NodeState(status=status, **fields)


EVERYTHING = state(
    workload(),
    workload("db", problem="it is broken"),
    left=(left_alone("lost", Treatment.NOT_FOUND),),
    observed=Observed(lost={"race_lost": 1, "overflow_mesh": 2}, coverage=(1.0, 0.5)),
    watch=WatchState(is_connected=True, answered_at=3.0, failures=1, pods=4),
)


def families(metrics, of):
    text = metrics.exposition(of).decode()
    found = list(text_string_to_metric_families(text))
    names = [family.name for family in found]
    assert len(names) == len(set(names)), "a family is told twice"
    return {family.name: family for family in found}


def samples(metrics, of):
    """Value by name and labels of every sample."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families(metrics, of).values()
        for sample in family.samples
    }


def value(metrics, of, name, **labels):
    return samples(metrics, of)[name, *sorted(labels.items())]


# Conventions


def test_every_metric_has_a_help_text_and_a_type():
    for family in families(Metrics(), EVERYTHING).values():
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name


def test_names_follow_the_conventions():
    text = Metrics().exposition(EVERYTHING).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    for name, kind in kinds.items():
        assert re.fullmatch(r"(tidegate|process)_[a-z_]*[a-z]", name)
        assert name.endswith("_total") is (kind == "counter"), name
        assert not re.search(r"_(ms|milliseconds|minutes|kb|percent)(_|$)", name), name
        if kind == "histogram":
            assert name.endswith("_seconds")
    for name, *labels in samples(Metrics(), EVERYTHING):
        assert all(re.fullmatch(r"[a-z_]+", label) for label, _ in labels), name


def test_every_metric_is_there_before_anything_has_happened():
    silent = Metrics()
    busy = Metrics()
    with busy.applying(), busy.round():
        busy.repaired()
        busy.cni_call("ADD", CniResult.OK, 0.1)
    without_watch = state(watch=WatchState(is_connected=False, answered_at=0, failures=0, pods=0))
    named = {key for key in samples(busy, EVERYTHING) if key[0] != "tidegate_workload_problem"}
    lost = {key for key in named if key[0] == "tidegate_observation_losses_total"}
    assert named - lost == set(samples(silent, without_watch))


def test_a_node_without_kubernetes_tells_nothing_of_its_watch():
    assert not [name for name in families(Metrics(), state()) if "kubernetes" in name]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\\nb", "{}", "ä"])
def test_names_of_workloads_are_escaped(name):
    broken = state(workload(name, problem="x"))
    key = {"namespace": "default", "workload": name}
    assert value(Metrics(), broken, "tidegate_workload_problem", **key) == 1


def test_names_of_workloads_are_bounded():
    many = state(*(workload(f"w{n:04}", problem="x") for n in range(MOST_NAMED + 50)))
    found = samples(Metrics(), many)
    named = [key for key in found if key[0] == "tidegate_workload_problem"]
    assert len(named) == MOST_NAMED
    assert found["tidegate_workload_problems",] == MOST_NAMED + 50


def test_the_number_of_series_does_not_depend_on_the_number_of_workloads():
    few = samples(Metrics(), state(workload()))
    many = samples(Metrics(), state(*(workload(f"w{n}") for n in range(500))))
    assert few.keys() == many.keys()
    assert len(many) < 500


def test_the_document_has_every_metric_and_no_other():
    documented = set(
        re.findall(r"^\| `((?:tidegate|process)_[a-z_]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    )
    text = Metrics().exposition(EVERYTHING).decode()
    assert documented == set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))


def test_the_document_has_the_type_of_every_metric():
    documented = set(re.findall(r"^\| `([a-z_]+)` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE))
    text = Metrics().exposition(EVERYTHING).decode()
    assert documented == set(re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE))


def test_the_document_has_the_labels_of_every_metric():
    rows = re.findall(r"^\| `([a-z_]+)` \| \w+ \| ([^|]*)\|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {name: set(re.findall("`([a-z_]+)`", labels)) for name, labels in rows}
    for family in families(Metrics(), EVERYTHING).values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert documented[name] == found, name


def test_the_documents_rules_ask_for_what_is_there():
    rules = "".join(re.findall(r"```yaml\n(groups:.*?)```", DOCUMENT.read_text(), re.DOTALL))
    asked = set(re.findall(r"\b(?:tidegate|process)_[a-z_]+\b", rules))
    assert asked
    assert asked <= {name for name, *_ in samples(Metrics(), EVERYTHING)}


# What is counted where it happens


def test_applies_are_timed_by_how_they_end():
    metrics = Metrics()
    with metrics.applying():
        pass
    with pytest.raises(OSError, match="no"), metrics.applying():
        raise OSError("no")
    for result in ("ok", "failed"):
        name = "tidegate_redirect_apply_duration_seconds_count"
        assert value(metrics, state(), name, result=result) == 1


def test_calls_of_the_plugin_are_timed_by_command_and_result():
    metrics = Metrics()
    metrics.cni_call("ADD", CniResult.FAILED, 0.015)
    metrics.cni_call("NONSENSE-of-somebody", CniResult.REFUSED, 0.0)
    name = "tidegate_cni_request_duration_seconds"
    add = {"command": "ADD", "result": "failed"}
    assert value(metrics, state(), f"{name}_sum", **add) == 0.015
    assert value(metrics, state(), f"{name}_bucket", **add, le="0.01") == 0
    assert value(metrics, state(), f"{name}_bucket", **add, le="0.02") == 1
    assert value(metrics, state(), f"{name}_count", command="other", result="refused") == 1


def test_events_of_many_threads_are_all_counted():
    metrics = Metrics()

    def work():
        for _ in range(500):
            metrics.repaired()
            metrics.cni_call("ADD", CniResult.OK, 0.001)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, state(), "tidegate_redirect_repairs_total") == 4000
    count = "tidegate_cni_request_duration_seconds_count"
    assert value(metrics, state(), count, command="ADD", result="ok") == 4000


# How things are


def test_workloads_are_told_by_redirection_and_sidecar():
    node = state(
        workload("a"),
        workload("b", sidecar=Sidecar.OWN),
        workload("c", redirect=RedirectState.NONE, wanted_in_mesh=False, mode="", meshed=False),
        workload("d", redirect=RedirectState.BLOCKED, observed_since=0.0, mode="strict"),
    )
    found = samples(Metrics(), node)
    told = {
        (dict(key[1:])["redirect"], dict(key[1:])["sidecar"]): count
        for key, count in found.items()
        if key[0] == "tidegate_workloads" and count
    }
    assert told == {
        ("ok", "tidegate"): 1,
        ("ok", "own"): 1,
        ("none", "none"): 1,
        ("blocked", "tidegate"): 1,
    }
    assert found["tidegate_workloads_observed",] == 3
    assert found["tidegate_workloads_by_mode", ("mode", "permissive")] == 2
    assert found["tidegate_workloads_by_mode", ("mode", "strict")] == 1


@pytest.mark.parametrize(
    ("redirect", "is_one"),
    [
        (RedirectState.OK, False),
        (RedirectState.NONE, False),
        (RedirectState.WAITING, False),
        (RedirectState.DRIFTED, True),
        (RedirectState.BLOCKED, True),
        (RedirectState.FAILED, True),
    ],
)
def test_a_redirection_that_is_not_as_it_should_be_is_a_problem_by_name(redirect, is_one):
    found = samples(Metrics(), state(workload(redirect=redirect)))
    key = ("tidegate_workload_problem", ("namespace", "default"), ("workload", "web"))
    assert (key in found) is is_one
    assert found["tidegate_workload_problems",] == is_one


def test_a_pod_that_runs_and_was_not_found_is_a_problem_and_one_left_alone_is_none():
    node = state(
        left=(
            left_alone("lost", Treatment.NOT_FOUND),
            left_alone("proxy", Treatment.HOST_NETWORK),
        )
    )
    found = samples(Metrics(), node)
    named = [dict(key[1:])["workload"] for key in found if key[0] == "tidegate_workload_problem"]
    assert named == ["lost"]
    assert found["tidegate_workloads_left_alone", ("treatment", "host-network")] == 1
    assert found["tidegate_workloads_left_alone", ("treatment", "not-found")] == 1
    assert found["tidegate_workloads_left_alone", ("treatment", "finished")] == 0


def observed(connections, to_server=0, flow_class=FlowClass.PLAINTEXT):
    traffic = (Traffic(Direction.INBOUND, flow_class, connections, to_server, 0),)
    return state(observed=Observed(traffic=traffic))


def test_traffic_is_told_by_direction_and_class():
    found = samples(Metrics(), observed(3, 100))
    kind = (("class", "plaintext"), ("direction", "inbound"))
    assert found["tidegate_observed_connections_total", *kind] == 3
    assert found["tidegate_observed_bytes_total", *kind, ("to", "server")] == 100
    assert found["tidegate_observed_bytes_total", *kind, ("to", "client")] == 0


def test_edges_are_told_by_class():
    node = state(observed=Observed(edges={FlowClass.MESH: 3}, room=10))
    found = samples(Metrics(), node)
    assert found["tidegate_edges", ("class", "mesh")] == 3
    assert found["tidegate_edges", ("class", "plaintext")] == 0
    assert found["tidegate_edges_limit",] == 10


def test_a_count_never_goes_down_when_connections_turn_out_to_be_something_else():
    metrics = Metrics()
    name = "tidegate_observed_connections_total"
    kind = {"direction": "inbound", "class": "plaintext"}
    told = [value(metrics, observed(count), name, **kind) for count in (5, 3, 4, 6)]
    assert told == [5, 5, 5, 6]


def test_coverage_is_the_mean_and_the_lowest_of_all_workloads():
    found = samples(Metrics(), EVERYTHING)
    assert found["tidegate_coverage_ratio",] == 0.75
    assert found["tidegate_coverage_lowest_ratio",] == 0.5


def test_lost_evidence_is_told_by_what_was_lost():
    found = samples(Metrics(), EVERYTHING)
    assert found["tidegate_observation_losses_total", ("what", "race_lost")] == 1
    assert found["tidegate_edge_overflow_total", ("class", "mesh")] == 2
    assert found["tidegate_edge_overflow_total", ("class", "tls")] == 0
    assert ("tidegate_observation_losses_total", ("what", "overflow_mesh")) not in found


def test_the_process_tells_its_memory_and_its_processor_time():
    found = samples(Metrics(), state())
    assert found["process_resident_memory_bytes",] > 1 << 20
    assert found["process_cpu_seconds_total",] > 0
