"""The lab file: what is right is understood, what is wrong is told completely."""

import re
from pathlib import Path

import msgspec
import pytest

from tidegate.errors import InputError, InputErrors
from tidegate.intent.entries import ServiceDefaults, parse_entries
from tidegate.lab import spec as lab_spec
from tidegate.lab.spec import AppKind, CallKind, IntentionPolicy, LabSpec, load, parse
from tidegate.model import MutualTLSMode

DEMO = Path(lab_spec.__file__).with_name("demo.yaml")

SMALL = """
lab: small
nodes: [n1]
pods:
  - name: api
    node: n1
    port: 8080
    app: {kind: http}
  - name: web
    node: n1
    app:
      kind: caller
      calls: [{target: api, every: 200ms}]
"""


def faults_of(text: str) -> list[str]:
    with pytest.raises(InputErrors) as caught:
        parse(text, source="lab.yaml")
    return [str(fault) for fault in caught.value.faults]


def only_fault_of(text: str) -> str:
    (fault,) = faults_of(text)
    return fault


def test_a_small_file_means_what_it_says_and_the_rest_has_defaults() -> None:
    spec = parse(SMALL, source="lab.yaml")
    assert (spec.name, spec.nodes) == ("small", ("n1",))
    assert (spec.window_s, spec.leaf_lifetime_s) == (86400.0, 3600.0)
    assert spec.default_intention_policy is IntentionPolicy.DENY
    api, web = spec.pods
    assert (api.service, api.port, api.mesh, api.app.kind) == ("api", 8080, False, AppKind.HTTP)
    (call,) = web.app.calls
    assert (call.target, call.port, call.kind) == ("api", 8080, CallKind.HTTP)
    assert (call.every_s, call.keepalive) == (0.2, 1)


MORE_PORTS = """
lab: small
nodes: [n1]
pods:
  - name: api
    node: n1
    port: 8080
    more_ports: [{service: admin, port: 8081}, {service: metrics, port: 9090}]
    app: {kind: http}
  - name: web
    node: n1
    app:
      kind: caller
      calls: [{target: api, every: 1s}, {target: admin, every: 1s}]
"""


def test_a_pod_can_have_several_services_with_a_port_each() -> None:
    spec = parse(MORE_PORTS, source="lab.yaml")
    api, web = spec.pods
    assert api.ports == {"api": 8080, "admin": 8081, "metrics": 9090}
    assert api.names == ("api", "admin", "metrics")
    assert [call.port for call in web.app.calls] == [8080, 8081]
    assert spec.pods_of("metrics") == (api,)


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ("port: 8081", "port: 8080", "more_ports[0].port (line 8): 8080 is there twice"),
        ("service: admin", "service: api", "more_ports[0].service (line 8): api is there twice"),
        ("service: metrics", "servce: metrics", "more_ports[1].servce (line 8): "),
        ("port: 9090", "port: 90900", "more_ports[1].port (line 8): "),
        ("    port: 8080\n", "", "are further ports, and the pod has no port; expected port"),
    ],
)
def test_wrong_services_of_a_pod_are_refused(good: str, bad: str, expected: str) -> None:
    assert good in MORE_PORTS
    assert any(expected in fault for fault in faults_of(MORE_PORTS.replace(good, bad, 1)))


def test_the_demo_is_the_lab_of_the_story() -> None:
    spec = load(DEMO)
    assert len(spec.nodes) == 2
    assert {pod.name for pod in spec.pods if pod.mesh} == {"api", "web", "pay", "db"}
    assert {pod.name for pod in spec.pods if not pod.mesh} == {"legacy", "tlsonly", "nightly"}
    assert spec.window_s == 8.0
    nightly = spec.pod("nightly")
    assert nightly is not None
    assert nightly.app.calls[0].every_s is None
    entries = [e for text in spec.config for e in parse_entries(text.text, text.source)]
    permissive = {
        entry.name
        for entry in entries
        if isinstance(entry, ServiceDefaults) and entry.mutual_tls_mode is MutualTLSMode.PERMISSIVE
    }
    assert permissive == {"api", "pay"}


def test_another_name_replaces_that_of_the_file() -> None:
    assert load(DEMO, name="other").name == "other"


def test_a_service_stands_for_all_of_its_pods() -> None:
    text = SMALL.replace("- name: api", "- name: api-1\n    service: api")
    text += "  - {name: api-2, node: n1, service: api, port: 8080, app: {kind: http}}\n"
    spec = parse(text, source="lab.yaml")
    assert [pod.name for pod in spec.pods_of("api")] == ["api-1", "api-2"]
    assert [pod.name for pod in spec.pods_of("api-2")] == ["api-2"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("lab: small", "lab: Small_Lab"), ("lab (line 2)", "'Small_Lab'", "a-z and 0-9")),
        (("nodes: [n1]", "nodes: []"), ("nodes (line 3)", "at least one node")),
        (("nodes: [n1]", "nodes: [n1, n1]"), ("nodes[1] (line 3)", "named twice")),
        (("nodes: [n1]", "nodes: [n1, outside]"), ("nodes[1] (line 3)", "reserved")),
        (("nodes: [n1]", "nodes: [n1]\nwindow: 8"), ("window (line 4)", "8s")),
        (("nodes: [n1]", "nodes: [n1]\nwindwo: 8s"), ("windwo (line 4)", "expected window")),
        (("nodes: [n1]", "nodes: [n1]\nconfig: [3]"), ("config[0] (line 4)", "a number")),
        (("node: n1\n    port", "node: n2\n    port"), ("pods[0].node (line 6)", "no node n2")),
        (("port: 8080", "port: 70000"), ("pods[0].port (line 7)", "70000", "1 to 65535")),
        (("port: 8080", "port: 15001"), ("pods[0].port (line 7)", "15001 and 20000")),
        (("port: 8080", "port: true"), ("pods[0].port (line 7)", "True")),
        (("port: 8080", "mesh: 'yes'\n    port: 8080"), ("pods[0].mesh", "true or false")),
        (("port: 8080", "prot: 8080\n    port: 8080"), ("pods[0].prot", "expected port")),
        (("kind: http", "kind: htpt"), ("pods[0].app.kind (line 8)", "http, tls, tcp")),
        (("name: web", "name: api"), ("pods[1].name (line 9)", "already the name of pods[0]")),
        (("name: web", "name: n1"), ("pods[1].name (line 9)", "name of a node")),
        (("name: web", "name: -web"), ("pods[1].name (line 9)", "DNS label")),
        (("target: api", "target: app"), ("pods[1].app.calls[0].target (line 13)", "api")),
        (("every: 200ms", "every: often"), ("pods[1].app.calls[0].every", "manual")),
        (("every: 200ms", "keepalive: 0"), ("pods[1].app.calls[0].keepalive", "from 1")),
        (("lab: small", "lab: small\nlab: big"), ("lab (line 3)", "written twice")),
        (
            ("port: 8080", "port: 8080\n    annotations: {a: 5432}"),
            ("pods[0].annotations.a (line 8)", '"5432"'),
        ),
        (
            ("port: 8080", "port: 8080\n    annotations: {a: [80, 443]}"),
            ("pods[0].annotations.a (line 8)", "is a list", 'expected "80,443"'),
        ),
    ],
)
def test_a_fault_is_told_with_file_line_field_and_what_would_be_right(
    change: tuple[str, str], expected: tuple[str, ...]
) -> None:
    fault = only_fault_of(SMALL.replace(*change, 1))
    assert fault.startswith("lab.yaml: ")
    for words in expected:
        assert words in fault


def test_an_application_that_serves_needs_a_port() -> None:
    faults = faults_of(SMALL.replace("    port: 8080\n", ""))
    assert any("pods[0].port" in fault and "app http serves" in fault for fault in faults)


def test_every_fault_is_told_at_once() -> None:
    text = SMALL.replace("port: 8080", "port: 0").replace("nodes: [n1]", "nodes: [n1, N2]")
    text = text.replace("target: api", "target: nobody")
    fields = [re.findall(r": ([a-z0-9.\[\]]+) \(line", fault)[0] for fault in faults_of(text)]
    assert fields == ["nodes[1]", "pods[0].port", "pods[1].app.calls[0].target"]


@pytest.mark.parametrize(
    "text",
    ["lab: [", "- a\n- b", "lab: !!python/object:os.system {}", "\t", "? [a]\n: b", "12", "a: *b"],
)
def test_what_is_no_lab_file_is_an_input_error(text: str) -> None:
    assert faults_of(text)


def test_aliases_that_multiply_are_refused_before_they_do() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    assert "more than" in only_fault_of(bomb)


def test_a_list_in_itself_is_refused() -> None:
    assert faults_of("nodes: &n [*n]")


def test_too_many_nodes_or_pods_are_refused() -> None:
    many = ", ".join(f"n{number}" for number in range(17))
    assert "at most 16" in only_fault_of(f"nodes: [{many}]")
    pods = "".join(f"- {{name: p{number}, node: n1}}\n" for number in range(201))
    assert "at most 200" in only_fault_of(f"nodes: [n1]\npods:\n{pods}")


def test_a_pod_may_not_be_named_like_a_service_that_is_not_its_own() -> None:
    text = "nodes: [n]\npods:\n- {name: a, node: n, service: b}\n- {name: b, node: n, service: c}\n"
    assert "also the service of pods[0]" in only_fault_of(text)


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "none.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (lab_spec.MAX_FILE_BYTES + 1))
    with pytest.raises(InputError, match="too large"):
        load(large)
    large.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load(large)


def test_config_entries_are_kept_as_text_with_their_place() -> None:
    text = SMALL + 'config:\n  - {Kind: mesh}\n  - |\n    Kind = "mesh"\n'
    first, second = parse(text, source="lab.yaml").config
    assert first.text == '{"Kind": "mesh"}'
    assert first.source == "lab.yaml: config[0] (line 15)"
    assert second.text == 'Kind = "mesh"\n'


def test_an_empty_file_names_what_is_missing() -> None:
    assert "nodes: is missing" in only_fault_of("")


def test_a_spec_survives_being_written_down() -> None:
    spec = load(DEMO)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=LabSpec) == spec
