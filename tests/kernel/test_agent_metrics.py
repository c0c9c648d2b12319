"""What an agent that runs tells of real traffic, by its metrics and by `tidegate status`."""

import json
import socket
import urllib.error
import urllib.request

import pytest
from agents import node_in_a_directory
from namespaces import eventually, landing, pair_of, serving
from prometheus_client.parser import text_string_to_metric_families

from tidegate.cli.main import main


@pytest.fixture
def node():
    with node_in_a_directory() as node:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            node.config["metrics"] = f"127.0.0.1:{free.getsockname()[1]}"
        yield node


def get(node, path):
    try:
        with urllib.request.urlopen(f"http://{node.config['metrics']}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(node):
    status, text = get(node, "/metrics")
    assert status == 200
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_agent_tells_what_it_sees_and_names_what_is_wrong(node, capsys):
    plaintext = (("class", "plaintext"), ("direction", "inbound"))
    with pair_of() as pod, serving(pod.pod, "web", [8080]):
        node.put("web", pod, meshed=False)
        node.start()
        eventually(lambda: get(node, "/readyz") == (200, "ok\n"))
        assert get(node, "/healthz") == (200, "ok\n")
        assert get(node, "/v1/status")[0] == 404
        for _ in range(3):
            landing(pod.peer, pod.pod_ipv4, 8080)
        eventually(
            lambda: (
                sum(
                    value
                    for key, value in samples(node).items()
                    if key[0] == "tidegate_observed_connections_total"
                    and dict(key[1:])["class"] != "empty"
                )
                == 3
            )
        )
        told = samples(node)
        assert told["tidegate_workloads", ("redirect", "none"), ("sidecar", "none")] == 1
        assert told["tidegate_workloads_observed",] == 1
        assert told["tidegate_coverage_ratio",] > 0
        assert sum(value for key, value in told.items() if key[0] == "tidegate_edges") >= 1
        assert told["tidegate_workload_problems",] == 0
        assert told["tidegate_round_duration_seconds_count", ("result", "ok")] >= 1
        assert told["tidegate_intent_answered_timestamp_seconds",] > 0
        assert ("tidegate_observed_connections_total", *plaintext) in told

        bad = {"tidegate.io/exclude-outbound-ports": "nonsense"}
        node.put("web", pod, meshed=True, annotations=bad)
        named = ("tidegate_workload_problem", ("namespace", "default"), ("workload", "web"))
        eventually(lambda: named in samples(node))
        assert main(["status", "--json", "--socket", node.config["socket"]]) == 1
        said = json.loads(capsys.readouterr().out)
        assert "nonsense" in said["nodes"][0]["workloads"][0]["problem"]
        assert main(["status", "--quiet", "--socket", node.config["socket"]]) == 0
    node.kill()
    assert main(["status", "--quiet", "--socket", node.config["socket"]]) == 2
