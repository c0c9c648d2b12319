"""What is kept of a pod and how it is treated: the shapes that controllers and webhooks make, and hostile ones."""

import json
from pathlib import Path

import kubernetes_pods as shapes
import msgspec
import pytest
import yaml

from tidegate.errors import InputError
from tidegate.intent.annotations import policy_of
from tidegate.model import ServicePort, Sidecar
from tidegate.workloads.kubernetes import settings
from tidegate.workloads.kubernetes.pods import Kept, Key, Left, Mesh, Pod, Unclear, read_pod, treat
from tidegate.workloads.kubernetes.settings import Enrolment, KubernetesConfig
from tidegate.workloads.source import Treatment

EVERYTHING = KubernetesConfig(enrol=tuple(Enrolment))
WEB = shapes.pod()


def read(made, **options):
    return read_pod(json.dumps(made).encode(), **options)


def treated(made, *rules):
    found = read(made)
    assert isinstance(found, Pod), found
    return treat(found, KubernetesConfig(enrol=rules) if rules else EVERYTHING)


def with_mesh(word, made=WEB):
    return shapes.annotated(made, tidegate_io__mesh=word)


@pytest.mark.parametrize(
    ("made", "treatment"),
    [
        (shapes.host_network(), Treatment.HOST_NETWORK),
        (shapes.static(), Treatment.HOST_NETWORK),
        (shapes.finished_job(), Treatment.FINISHED),
        (shapes.evicted(), Treatment.FINISHED),
    ],
    ids=["hostNetwork", "static", "finished job", "evicted"],
)
def test_a_pod_that_has_no_network_of_its_own_or_has_ended_is_left_alone(made, treatment):
    found = treated(made)
    assert isinstance(found, Left)
    assert found.treatment is treatment
    assert found.reason


@pytest.mark.parametrize(
    ("made", "sidecar", "words"),
    [
        (WEB, None, "it has no sidecar"),
        (shapes.daemon_set(), None, "it has no sidecar"),
        (shapes.user_namespaced(), None, "it has no sidecar"),
        (shapes.running_job(), None, "it has no sidecar"),
        (shapes.terminating(), None, "it has no sidecar"),
        (shapes.consul(), Sidecar.OWN, "with a transparent proxy"),
        (shapes.consul(native=True), Sidecar.OWN, "with a transparent proxy"),
        (shapes.consul(cni=False), None, "Consul's init container redirects it"),
        (shapes.consul_without_transparent_proxy(), None, "without a transparent proxy"),
        (shapes.consul_of_two_services(), None, "without a transparent proxy"),
        (shapes.consul_gateway(), None, "it has no sidecar"),
        (shapes.istio(), Sidecar.OWN, "Istio injected its sidecar"),
        (shapes.istio(native=True), Sidecar.OWN, "Istio injected its sidecar"),
        (shapes.istio(cni=False), None, "Istio's init container redirects it"),
        (shapes.istio_gateway(), None, "it has a proxy of Istio"),
        (shapes.istio_ambient(), None, "Istio's ambient mode"),
        (shapes.linkerd(), None, "it has a proxy of Linkerd"),
        (shapes.linkerd(native=True), None, "it has a proxy of Linkerd"),
        (shapes.kuma(), None, "it has a proxy of Kuma"),
        (shapes.unknown(), None, "it has no sidecar"),
        (with_mesh("own", shapes.unknown()), Sidecar.OWN, 'tidegate.io/mesh is "own"'),
        (shapes.debugged(WEB, "istio-proxy"), None, "it has no sidecar"),
        (shapes.debugged(shapes.consul()), Sidecar.OWN, "with a transparent proxy"),
        (with_mesh("own", shapes.user_namespaced()), Sidecar.OWN, 'tidegate.io/mesh is "own"'),
        (with_mesh("true"), Sidecar.TIDEGATE, 'tidegate.io/mesh is "true"'),
        (with_mesh("own"), Sidecar.OWN, 'tidegate.io/mesh is "own"'),
        (with_mesh("false", shapes.consul()), None, 'tidegate.io/mesh is "false"'),
        (with_mesh("false", shapes.istio()), None, 'tidegate.io/mesh is "false"'),
        (with_mesh("own", shapes.linkerd()), Sidecar.OWN, 'tidegate.io/mesh is "own"'),
    ],
)
def test_a_pod_is_enrolled_by_what_its_mesh_or_its_owner_wrote(made, sidecar, words):
    found = treated(made)
    assert isinstance(found, Kept)
    assert found.sidecar is sidecar
    assert words in found.reason
    assert not found.problem


@pytest.mark.parametrize(
    ("made", "rules", "words"),
    [
        (shapes.consul(), (Enrolment.ISTIO,), "a proxy of Consul; pods are enrolled by istio"),
        (shapes.istio(), (Enrolment.CONSUL,), "a proxy of Istio; pods are enrolled by consul"),
        (with_mesh("true"), (Enrolment.CONSUL,), "'true', but pods are enrolled by consul"),
        (with_mesh("own", shapes.istio()), (Enrolment.CONSUL,), "enrolled by consul"),
    ],
)
def test_a_rule_that_is_not_chosen_enrols_nobody_and_the_reason_says_so(made, rules, words):
    found = treated(made, *rules)
    assert isinstance(found, Kept)
    assert found.sidecar is None
    assert words in found.reason


def test_without_rules_all_pods_are_only_observed():
    for made in (shapes.consul(), shapes.istio(), with_mesh("true")):
        found = treat(read(made), KubernetesConfig(enrol=()))
        assert isinstance(found, Kept)
        assert found.sidecar is None
        assert "nothing" in found.reason


@pytest.mark.parametrize("word", ["yes", "True", "1", "\n", "ö" * 1000])
def test_a_word_for_the_mesh_that_is_none_is_a_problem_and_enrols_nobody(word):
    found = treated(with_mesh(word))
    assert found.sidecar is None
    if word.strip():
        assert 'expected "true", "own" or "false"' in found.problem
        assert len(found.problem) < 600
        assert found.problem.isascii()


def test_a_second_sidecar_beside_that_of_a_mesh_is_a_problem_with_the_word_that_would_be_right():
    found = treated(with_mesh("true", shapes.istio()))
    assert found.sidecar is None
    assert 'expected "own"' in found.problem


def test_a_sidecar_from_outside_in_a_pod_with_users_of_its_own_is_a_problem():
    """It would be redirected itself: its user is none in there."""
    found = treated(with_mesh("true", shapes.user_namespaced()))
    assert found.sidecar is None
    assert "hostUsers: false" in found.problem
    assert found.problem.endswith('expected "own"')


def test_pods_of_excluded_namespaces_are_left_alone_before_anything_else_is_looked_at():
    config = KubernetesConfig(enrol=tuple(Enrolment), exclude_namespaces=("shop", "monitoring"))
    for made in (shapes.consul(), shapes.host_network()):
        found = treat(read(made), config)
        assert isinstance(found, Left)
        assert found.treatment is Treatment.EXCLUDED


@pytest.mark.parametrize(
    ("made", "has_sandbox"),
    [
        (shapes.pending(), False),
        (shapes.initialising(), True),
        (WEB, True),
        (shapes.terminating(), True),
    ],
    ids=["pending", "initialising", "running", "terminating"],
)
def test_a_pod_has_a_sandbox_as_soon_as_its_status_lets_one_see_it(made, has_sandbox):
    assert read(made).has_sandbox is has_sandbox


def test_addresses_are_canonical_and_of_both_families():
    assert read(shapes.dual_stack()).addresses == ("10.42.1.7", "fd00:42:0:1::7")
    made = shapes.dual_stack()
    made["status"]["podIPs"][1]["ip"] = "FD00:0042:0:1:0:0:0:7"
    assert read(made).addresses == ("10.42.1.7", "fd00:42:0:1::7")
    del made["status"]["podIPs"]
    assert read(made).addresses == ("10.42.1.7",)
    assert read(shapes.ipv6_only()).addresses == ("fd00:42:0:1::7",)
    assert read(shapes.pending()).addresses == ()


def test_a_pod_begins_when_the_kubelet_took_it_up():
    assert read(WEB).started_at == 1787393473.0
    assert read(shapes.pending()).started_at == 1787393472.0


def test_a_static_pod_goes_by_the_kubelets_uid_of_which_no_other_pod_can_have_one():
    assert read(shapes.static()).uid == "a3f8c0d1e2b3a4958677685941322110"
    made = shapes.pod()
    victim = shapes.stateful()["metadata"]["uid"]
    made["metadata"]["annotations"] |= {
        "kubernetes.io/config.mirror": victim,
        "kubernetes.io/config.hash": victim,
    }
    assert read(made).uid == made["metadata"]["uid"]


@pytest.mark.parametrize(
    ("made", "service", "port", "more"),
    [
        (WEB, "web", 8080, ()),
        (shapes.consul(), "frontend", 8080, ()),
        (shapes.consul_of_two_services(), "web", 8080, (("web-admin", 9090),)),
        (shapes.istio(), "reviews", 8080, ()),
        (shapes.daemon_set(), "fluent-bit", 0, ()),
        (shapes.stateful(), "db", 8080, ()),
        (shapes.running_job(), "backup", 0, ()),
        (shapes.annotated(WEB, tidegate_io__service="Shop_Front"), "shop-front", 8080, ()),
        (shapes.annotated(WEB, tidegate_io__port="metrics"), "web", 9090, ()),
        (
            shapes.annotated(WEB, tidegate_io__service="a, b", tidegate_io__port="http, 9"),
            "a",
            8080,
            (("b", 9),),
        ),
        (
            shapes.annotated(WEB, consul_hashicorp_com__consul_namespace="billing"),
            "billing/web",
            8080,
            (),
        ),
    ],
)
def test_services_and_ports_are_those_of_annotations_then_labels_then_owner_and_containers(
    made, service, port, more
):
    found = read(made)
    assert (found.service, found.port) == (service, port)
    assert found.more_ports == tuple(ServicePort(service=name, port=p) for name, p in more)
    assert not found.faults


def test_a_deployment_without_labels_names_its_pods_without_the_hash_of_their_template():
    made = shapes.pod("api-6d9f7c5b8-x2x7q")
    del made["metadata"]["labels"]["app"]
    assert read(made).service == "api"
    del made["metadata"]["ownerReferences"]
    assert read(made).service == "api-6d9f7c5b8-x2x7q"


def test_namespaces_are_part_of_services_where_they_are_mirrored():
    assert read(WEB, mirror_namespaces=True).service == "shop/web"
    made = shapes.pod(namespace="default")
    assert read(made, mirror_namespaces=True).service == "web"


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({"tidegate_io__port": "https"}, "neither a port nor the name"),
        ({"tidegate_io__port": "0"}, "neither a port"),
        ({"tidegate_io__port": "70000"}, "neither a port"),
        ({"tidegate_io__port": "9" * 5000}, "neither a port"),
        ({"tidegate_io__port": "80,81"}, "2 ports for 1 services"),
        ({"tidegate_io__service": "a,b"}, "0 ports for 2 services"),
    ],
)
def test_a_port_that_is_none_is_told_with_its_annotation_and_the_pod_is_looked_after(
    annotations, words
):
    found = read(shapes.annotated(WEB, **annotations))
    assert isinstance(found, Pod)
    assert "tidegate.io/port" in found.faults[0]
    assert words in found.faults[0]
    assert len(found.faults[0]) < 300


def test_of_a_pod_only_what_is_read_is_kept():
    found = read(shapes.consul())
    assert all(name.startswith("consul.hashicorp.com/") for name in found.annotations)
    assert "consul.hashicorp.com/original-pod" not in found.annotations
    assert "consul.hashicorp.com/redirect-traffic-config" in found.annotations
    assert len(msgspec.json.encode(found)) < 2000


@pytest.mark.parametrize(
    "made",
    [
        shapes.consul(),
        shapes.consul(native=True),
        shapes.istio(),
        shapes.istio(native=True),
        shapes.linkerd(native=True),
        WEB,
    ],
)
def test_the_annotations_that_are_kept_make_a_policy_without_faults(made):
    policy_of({}, read(made).annotations)


def test_annotations_of_64_kb_are_no_burden_unless_they_are_for_a_mesh():
    made = shapes.annotated(WEB, example_org__blob="x" * 65536)
    assert read(made) == read(WEB)
    made = shapes.annotated(WEB, tidegate_io__blob="x" * 65536)
    found = read(made)
    assert isinstance(found, Unclear)
    assert str(Key("shop", "web-6d9f7c5b8-x2x7q")) in found.problem
    assert "expected at most" in found.problem


def changed(path, value):
    made = shapes.pod()
    *parents, last = path
    place = made
    for name in parents:
        place = place[name]
    place[last] = value
    return made


@pytest.mark.parametrize(
    "made",
    [
        changed(("metadata", "annotations"), ["a"]),
        changed(("metadata", "annotations"), {"a": 3}),
        changed(("metadata", "labels"), "app"),
        changed(("metadata", "uid"), 7),
        changed(("metadata", "uid"), "../../../etc"),
        changed(("metadata", "uid"), ""),
        changed(("metadata", "ownerReferences"), [None]),
        changed(("status", "startTime"), "yesterday"),
        changed(("status", "startTime"), "9999-99-99T00:00:00Z"),
        changed(("spec",), None),
        changed(("spec", "containers"), {}),
        changed(("spec", "containers", 0, "ports"), [{"containerPort": "http"}]),
        changed(("spec", "hostNetwork"), "yes"),
        changed(("status", "podIPs"), [{"ip": "not an address"}]),
        changed(("status", "podIP"), {"ip": "10.0.0.1"}),
        changed(("status", "phase"), 5),
    ],
)
def test_a_pod_that_cannot_be_understood_is_a_problem_by_name(made):
    found = read(made)
    assert isinstance(found, Unclear)
    assert found.key == Key("shop", "web-6d9f7c5b8-x2x7q")
    assert "pod shop/web-6d9f7c5b8-x2x7q cannot be understood: " in found.problem
    assert len(found.problem) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"pod"',
        b"{}",
        b'{"metadata": {}}',
        b'{"metadata": {"name": "\xff"}}',
        b'{"metadata": {"name": "a\\nb", "namespace": "c", "uid": "1"}, "spec": {}}',
        b'{"metadata": {"name": "../a", "namespace": "c", "uid": "1"}, "spec": {}}',
        b'{"metadata": ' + b"[" * 60_000,
        json.dumps(WEB).encode()[:500],
    ],
)
def test_what_is_no_pod_is_a_problem_too(content):
    found = read_pod(content)
    assert isinstance(found, Unclear)
    assert found.key is None
    assert found.problem.startswith("a pod without a name cannot be understood: ")
    assert found.problem.isascii()
    assert found.problem.isprintable()


def test_what_is_null_in_gos_json_is_as_if_it_were_not_there():
    made = shapes.pod()
    for field in ("annotations", "labels", "ownerReferences", "creationTimestamp"):
        made["metadata"][field] = None
    made["spec"] |= {"initContainers": None, "hostNetwork": None}
    made["spec"]["containers"][0]["ports"] = None
    made["status"] |= {"podIPs": None, "containerStatuses": None, "startTime": None}
    found = read(made)
    assert isinstance(found, Pod)
    assert found.service == made["metadata"]["name"]


def test_proxies_are_known_by_whole_words():
    made = shapes.pod()
    made["spec"]["containers"][0]["name"] = "istio-proxying"
    assert read(made).meshes == ()
    assert read(shapes.consul_of_two_services()).meshes == (Mesh.CONSUL,)


def test_what_is_kept_survives_being_written_down():
    for made in (shapes.consul(), shapes.istio(native=True), shapes.dual_stack(), shapes.static()):
        found = read(made)
        assert msgspec.json.decode(msgspec.json.encode(found), type=Pod) == found


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"server": "kubernetes.default"}, "server"),
        ({"token_file": "token"}, "token_file"),
        ({"cgroups": "sys/fs/cgroup"}, "cgroups"),
        ({"node": "Node 1"}, "node"),
        ({"exclude_namespaces": ["kube_system"]}, "exclude_namespaces"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_field(changes, field):
    config = msgspec.convert(changes, KubernetesConfig, dec_hook=lambda kind, text: kind(text))
    with pytest.raises(InputError) as refusal:
        settings.check(config)
    assert refusal.value.field == field


def test_one_rule_need_not_be_a_list():
    assert msgspec.convert({"enrol": "consul"}, KubernetesConfig).enrolments == (Enrolment.CONSUL,)
    assert msgspec.convert({"enrol": []}, KubernetesConfig).enrolments == ()
    with pytest.raises(msgspec.ValidationError, match="enrol"):
        msgspec.convert({"enrol": "everything"}, KubernetesConfig)


def test_the_settings_of_the_documentation_are_settings():
    text = (Path(__file__).parents[2] / "docs/kubernetes.md").read_text()
    block = text.split("```yaml\n", 1)[1].split("```", 1)[0]
    said = yaml.safe_load(block)["kubernetes"]
    config = msgspec.convert(said, KubernetesConfig, dec_hook=lambda kind, text: kind(text))
    settings.check(config)
    assert set(said) == set(KubernetesConfig.__struct_fields__)
