"""The verdict: what blocks, what is missing, what a person does next."""

import re

import msgspec
import pytest

from tidegate.model import (
    Direction,
    Edge,
    EdgeCount,
    EdgeKey,
    FlowClass,
    Hint,
    Instance,
    IntentionRule,
    Interval,
    MutualTLSMode,
    ServiceIntent,
    Sidecar,
)
from tidegate.node import mesh
from tidegate.node.config import AgentConfig
from tidegate.verdict import readiness, steps
from tidegate.verdict.evidence import (
    Caller,
    CallerKind,
    EdgeEvidence,
    InstanceEvidence,
    MissingNode,
    ServiceEvidence,
    WitnessReading,
)
from tidegate.verdict.readiness import Answer, Effect, ReasonKind, Verdict, judge
from tidegate.verdict.steps import Environment, Place, span
from tidegate.workloads.kubernetes.settings import Enrolment, KubernetesConfig

NOW = 1_700_000_000.0
DAY = 86_400.0
NODE = ("10.1.0.1", "fd00:1::1")
BLOCKING = [each for each in FlowClass if each.blocks_strict]


def instance(name, *addresses, meshed=True, service=None, **fields):
    return Instance(
        id=f"id-{name}",
        name=name,
        service=service or name.rsplit("-", 1)[0],
        node=fields.pop("node", "n1"),
        addresses=addresses,
        meshed=meshed,
        **{"seen_from": NOW - 90 * DAY, **fields},
    )


API = instance("api-1", "10.1.0.2", "fd00:1::2", port=8080)
API2 = instance("api-2", "10.2.0.2", port=8080, node="n2")
WEB = instance("web-1", "10.2.0.3", "fd00:2::3", node="n2")
LEGACY = instance("legacy", "10.2.0.4", "fd00:2::4", node="n2", meshed=False)
CATALOG = (API, API2, WEB, LEGACY)
INTENT = ServiceIntent(
    service="api",
    mode=MutualTLSMode.PERMISSIVE,
    intentions=(IntentionRule(source="web", allow=True),),
)


def flow(flow_class=FlowClass.PLAINTEXT, peer="10.2.0.4", port=8080, connections=1, ago=60.0):
    return EdgeEvidence(
        peer=peer,
        port=port,
        flow_class=flow_class,
        connections=connections,
        bytes_to_server=10,
        bytes_to_client=20,
        first_seen=NOW - 2 * DAY,
        last_seen=NOW - ago,
    )


MESH = flow(FlowClass.MESH, peer="10.2.0.3", port=20000, connections=900)


def seen(*edges, of=API, **fields):
    whole = {
        "created_at": NOW - 90 * DAY,
        "inbound_redirected": True,
        "coverage": (Interval(NOW - 30 * DAY, NOW - 0.5),),
        "witness": WitnessReading(agrees=True, detail="agrees", since=NOW - 30 * DAY),
        "node_addresses": NODE,
    }
    return InstanceEvidence(instance=of, edges=edges, **{**whole, **fields})


def verdict(*instances, intent=INTENT, departed=(), missing=(), known=CATALOG, **options):
    evidence = ServiceEvidence(
        service="api", instances=instances, departed=departed, nodes_missing=missing
    )
    return judge(intent, evidence, known=known, **{"window_s": DAY, "now": NOW, **options})


def kinds(judged):
    return [reason.kind for reason in judged.reasons]


# What was seen


def test_a_service_that_gets_only_mesh_traffic_is_ready():
    judged = verdict(seen(MESH))
    assert judged.verdict is Answer.READY
    assert judged.reasons == ()
    assert judged.exit_code == 0
    assert judged.coverage.complete
    assert judged.coverage.share == 1.0
    [caller] = judged.callers
    assert (caller.caller.workload, caller.connections, caller.effect) == (
        "web-1",
        900,
        Effect.MESH,
    )


def test_a_workload_with_its_own_sidecar_is_judged_by_what_the_kernel_saw_alone():
    nobody_asked = {"sidecar": Sidecar.OWN, "witness": WitnessReading()}
    judged = verdict(seen(MESH, **nobody_asked))
    assert (judged.verdict, judged.reasons) == (Answer.READY, ())
    assert judged.witness[0].agrees is None
    assert verdict(seen(MESH, flow(), **nobody_asked)).verdict is Answer.NOT_READY
    mixed = verdict(seen(MESH, **nobody_asked), seen(of=API2, witness=WitnessReading()))
    assert mixed.verdict is Answer.UNKNOWN
    assert "no second witness for api-2" in mixed.reasons[0].message


def test_a_service_that_nobody_calls_is_ready():
    assert verdict(seen()).verdict is Answer.READY


@pytest.mark.parametrize("flow_class", BLOCKING)
def test_one_flow_of_a_blocking_class_makes_it_not_ready_and_names_the_caller(flow_class):
    judged = verdict(seen(MESH, flow(flow_class)))
    assert judged.verdict is Answer.NOT_READY
    assert judged.exit_code == 1
    [reason] = judged.reasons
    assert reason.kind is (
        ReasonKind.UNKNOWN_FLOW if flow_class is FlowClass.UNKNOWN else ReasonKind.BLOCKING_FLOW
    )
    assert (reason.caller.workload, reason.caller.service, reason.caller.meshed) == (
        "legacy",
        "legacy",
        False,
    )
    assert (reason.flow_class, reason.port, reason.connections) == (flow_class, 8080, 1)
    assert reason.last_seen == NOW - 60
    assert "legacy (10.2.0.4) calls api:8080" in reason.message
    assert "1 m ago" in reason.message


@pytest.mark.parametrize(
    ("what", "edge", "fields", "effect"),
    [
        ("no payload", flow(FlowClass.EMPTY), {}, Effect.EMPTY),
        ("a probe", flow(peer="10.1.0.1"), {}, Effect.REFUSED_PROBE),
        ("a probe over IPv6", flow(peer="fd00:1:0::1"), {}, Effect.REFUSED_PROBE),
        ("a mapped probe", flow(peer="::ffff:10.1.0.1"), {}, Effect.REFUSED_PROBE),
        ("a probe of the sidecar", flow(peer="10.1.0.1", port=20000), {}, Effect.PROBE),
        (
            "a probe on an excluded port",
            flow(peer="10.1.0.1"),
            {"excluded_inbound_ports": ((8080, 8080),)},
            Effect.PROBE,
        ),
        (
            "an excluded port",
            flow(),
            {"excluded_inbound_ports": ((22, 22), (8000, 8080))},
            Effect.UNPROTECTED,
        ),
        (
            "an excluded source",
            flow(peer="10.9.8.7"),
            {"excluded_sources": ("fd00::/8", "10.9.0.0/16")},
            Effect.UNPROTECTED,
        ),
        (
            "a probe that goes to the application",
            flow(peer="10.1.0.1"),
            {"excluded_sources": ("10.1.0.1/32",)},
            Effect.PROBE,
        ),
        (
            "the sidecar's own port, from an excluded source",
            flow(peer="10.9.8.7", port=20000),
            {"excluded_sources": ("10.9.0.0/16",)},
            Effect.REFUSED_ANYWAY,
        ),
        ("the sidecar's own port", flow(port=20000), {}, Effect.REFUSED_ANYWAY),
        (
            "the sidecar's own port, though excluded",
            flow(port=20000),
            {"excluded_inbound_ports": ((1, 65535),)},
            Effect.REFUSED_ANYWAY,
        ),
        ("a port without a permissive chain", flow(port=9999), {}, Effect.REFUSED_ANYWAY),
        ("mesh traffic", flow(FlowClass.MESH, port=20000), {}, Effect.MESH),
        (
            "mesh traffic to the service's port, where sidecars dial it",
            flow(FlowClass.MESH),
            {"mesh_dials_service_port": True},
            Effect.MESH,
        ),
    ],
)
def test_flows_that_strict_mode_does_not_touch_are_listed_and_do_not_block(
    what, edge, fields, effect
):
    judged = verdict(seen(edge, **fields))
    assert judged.verdict is Answer.READY, what
    [caller] = judged.flows(effect)
    assert caller.unprotected is (effect is Effect.UNPROTECTED)
    assert judged.callers == (caller,)


@pytest.mark.parametrize(
    ("what", "edge", "fields"),
    [
        ("beside an excluded range", flow(), {"excluded_inbound_ports": ((8081, 9000),)}),
        ("beside an excluded source", flow(), {"excluded_sources": ("192.0.2.0/24", "fd00:9::/64")}),
        ("TLS with the mesh's name that comes to the service's port", flow(FlowClass.MESH), {}),
        ("to another port, where strict mode holds on all", flow(port=9999), {"mesh_dials_service_port": True}),
        ("from the node of another instance", flow(peer="10.2.0.1"), {}),
        ("to an instance whose port nobody knows", flow(port=5), {"of": msgspec.structs.replace(API, port=0)}),
    ],
)  # fmt: skip
def test_what_is_not_proven_safe_blocks(what, edge, fields):
    assert verdict(seen(edge, **fields)).verdict is Answer.NOT_READY, what


def test_a_caller_that_nothing_in_the_catalog_names_blocks_too():
    [reason] = verdict(seen(flow(peer="192.0.2.1"))).reasons
    assert (reason.caller.kind, reason.caller.workload) == (CallerKind.OUTSIDE, "")
    assert "192.0.2.1, which the catalog does not know" in reason.message
    assert 'exclude-inbound-ports: "8080"' in reason.next_step


@pytest.mark.parametrize(("ago", "blocks"), [(DAY - 1, True), (DAY, True), (DAY + 1, False)])
def test_only_the_window_counts(ago, blocks):
    assert (verdict(seen(flow(ago=ago))).verdict is Answer.NOT_READY) is blocks


def test_a_connection_opened_before_the_window_and_used_in_it_blocks():
    [reason] = verdict(seen(flow(connections=0))).reasons
    assert reason.connections == 0
    assert "on connections opened before" in reason.message


@pytest.mark.parametrize("connections", [0, -1])
def test_a_class_that_all_its_connections_have_left_was_not_seen(connections):
    left = msgspec.structs.replace(
        flow(FlowClass.UNKNOWN, connections=connections), bytes_to_server=0, bytes_to_client=0
    )
    judged = verdict(seen(MESH, left))
    assert judged.verdict is Answer.READY
    assert [each.flow_class for each in judged.callers] == [FlowClass.MESH]


def test_one_line_for_one_caller_over_instances_and_address_families():
    judged = verdict(
        seen(flow(connections=2, ago=90), flow(peer="fd00:2::4", connections=3, ago=30)),
        seen(flow(connections=4, ago=60), of=API2, node_addresses=("10.2.0.1",)),
    )
    [reason] = judged.reasons
    assert reason.connections == 9
    assert reason.caller.address == "fd00:2::4"
    assert reason.caller.addresses == ("10.2.0.4", "fd00:2::4")
    assert reason.last_seen == NOW - 30


def test_one_caller_has_a_line_for_each_class_and_port():
    judged = verdict(seen(flow(), flow(FlowClass.TLS), flow(port=9999)))
    assert len(judged.reasons) == 2
    assert len(judged.callers) == 3


def test_a_caller_has_the_name_that_its_address_had_when_it_called():
    before = instance("old", "10.9.0.1", meshed=False, seen_until=NOW - 3600)
    after = instance("young", "10.9.0.1", meshed=False, seen_from=NOW - 1800)
    judged = verdict(
        seen(flow(peer="10.9.0.1", ago=7200), flow(FlowClass.TLS, peer="10.9.0.1")),
        known=(*CATALOG, before, after),
    )
    assert [reason.caller.workload for reason in judged.reasons] == ["young", "old"]


def test_what_a_departed_instance_received_still_counts():
    departed = msgspec.structs.replace(API2, seen_until=NOW - 3600)
    gone = seen(flow(ago=7200), of=departed, coverage=(Interval(NOW - 9 * DAY, NOW - 3600),))
    judged = verdict(seen(MESH), departed=(gone,))
    assert kinds(judged) == [ReasonKind.BLOCKING_FLOW]


def test_a_reason_names_the_protocols_that_were_recognised():
    first = msgspec.structs.replace(flow(), hints=(Hint.REDIS,))
    other = msgspec.structs.replace(flow(peer="fd00:2::4"), hints=(Hint.HTTP1, Hint.REDIS))
    judged = verdict(seen(first, other, flow(FlowClass.SERVER_FIRST)))
    by_class = {reason.flow_class: reason for reason in judged.reasons}
    plaintext = by_class[FlowClass.PLAINTEXT]
    assert plaintext.hints == (Hint.HTTP1, Hint.REDIS)
    assert "calls api:8080 in plaintext (HTTP/1, Redis): 2 connections" in plaintext.message
    assert "in plaintext in which the server speaks first: 1" in (
        by_class[FlowClass.SERVER_FIRST].message
    )


def test_the_evidence_of_an_edge_says_all_that_the_edge_does():
    key = EdgeKey(
        workload=1, direction=Direction.INBOUND, peer="10.0.0.9", port=80, flow_class=FlowClass.TLS
    )
    count = EdgeCount(
        connections=2,
        bytes_to_server=3,
        bytes_to_client=4,
        first_seen=5.0,
        last_seen=6.0,
        hints=(Hint.H2C,),
    )
    said = msgspec.structs.asdict(EdgeEvidence.of(Edge(key=key, count=count)))
    assert said == {
        "peer": key.peer,
        "port": key.port,
        "flow_class": key.flow_class,
        **msgspec.structs.asdict(count),
    }


@pytest.mark.parametrize("hint", Hint)
def test_every_protocol_has_a_name_in_reasons(hint):
    [reason] = verdict(seen(msgspec.structs.replace(flow(), hints=(hint,)))).reasons
    assert re.search(r"in plaintext \([A-Z]\w+(/\d)?\): ", reason.message)


def test_a_strict_service_is_not_ready_while_callers_are_refused():
    strict = msgspec.structs.replace(INTENT, mode=MutualTLSMode.STRICT)
    judged = verdict(seen(flow()), intent=strict)
    assert judged.mode is MutualTLSMode.STRICT
    assert judged.verdict is Answer.NOT_READY
    assert "in plaintext" in judged.reasons[0].message
    assert verdict(seen(MESH), intent=strict).verdict is Answer.READY


def test_plaintext_connections_still_open_block_though_they_are_idle():
    open_ = seen(MESH, witness=WitnessReading(agrees=True, permissive_active=2))
    judged = verdict(open_)
    assert judged.verdict is Answer.NOT_READY
    [reason] = judged.reasons
    assert (reason.kind, reason.connections) == (ReasonKind.OPEN_PLAINTEXT, 2)
    both = verdict(seen(flow(), witness=WitnessReading(agrees=True, permissive_active=2)))
    assert kinds(both) == [ReasonKind.BLOCKING_FLOW]


# What is missing


@pytest.mark.parametrize(
    ("kind", "instances", "options", "says"),
    [
        (ReasonKind.NO_INSTANCE, (), {}, "no instance of api"),
        (
            ReasonKind.NOT_MESHED,
            (seen(of=msgspec.structs.replace(API, meshed=False)),),
            {},
            "api-1 has no sidecar",
        ),
        (ReasonKind.NOT_MESHED, (seen(inbound_redirected=False),), {}, "api-1 has no sidecar"),
        (
            ReasonKind.EVIDENCE_MISSING,
            (seen(),),
            {"missing": (MissingNode(node="n2", reason="no answer"),)},
            "node n2 could not be read: no answer",
        ),
        (
            ReasonKind.EVIDENCE_MISSING,
            (),
            {"missing": (MissingNode(node="n2", reason="no answer"),)},
            "node n2",
        ),
        (
            ReasonKind.EVIDENCE_MISSING,
            (seen(sidecar_problem="exits with 1"),),
            {},
            "exits with 1",
        ),
        (ReasonKind.EVIDENCE_MISSING, (seen(witness=WitnessReading()),), {}, "no second witness"),
        (
            ReasonKind.EVIDENCE_LOST,
            (seen(losses={"edges_full": 3, "late": 0}),),
            {},
            "lost something: edges_full 3",
        ),
        (
            ReasonKind.EVIDENCE_LOST,
            (seen(losses={"redirection_repaired": 2}),),
            {},
            "another program changed the redirection of api-1 2 times",
        ),
        (
            ReasonKind.WITNESS_DISAGREES,
            (seen(witness=WitnessReading(agrees=False, detail="9 and 5")),),
            {},
            "disagree: 9 and 5",
        ),
        (
            ReasonKind.WITNESS_DISAGREES,
            (seen(witness=WitnessReading(agrees=True, disagreed_at=NOW - 3600)),),
            {},
            "disagreed 1 h ago",
        ),
        (
            ReasonKind.CALLER_UNKNOWN,
            (seen(),),
            {
                "intent": msgspec.structs.replace(
                    INTENT, intentions=(IntentionRule(source="ghost", allow=True),)
                )
            },
            "lets ghost call api",
        ),
    ],
)
def test_whatever_is_missing_makes_it_unknown_and_is_told(kind, instances, options, says):
    judged = verdict(*instances, **options)
    assert judged.verdict is Answer.UNKNOWN
    assert judged.exit_code == 2
    assert kinds(judged) == [kind]
    assert says in judged.reasons[0].message
    assert judged.reasons[0].next_step


@pytest.mark.parametrize(
    "rule",
    [
        IntentionRule(source="*", allow=True),
        IntentionRule(source="ghost", allow=False),
        IntentionRule(source="legacy", allow=True),
    ],
)
def test_only_an_intention_that_allows_a_service_nobody_knows_is_a_reason(rule):
    intent = msgspec.structs.replace(INTENT, intentions=(rule,))
    assert verdict(seen(), intent=intent).verdict is Answer.READY


def test_a_disagreement_before_the_window_is_over():
    old = WitnessReading(agrees=True, disagreed_at=NOW - 2 * DAY)
    assert verdict(seen(witness=old)).verdict is Answer.READY


def test_a_blocking_flow_outranks_whatever_is_missing():
    judged = verdict(seen(flow(), losses={"a": 1}, witness=WitnessReading(agrees=False)))
    assert judged.verdict is Answer.NOT_READY
    assert kinds(judged) == [
        ReasonKind.BLOCKING_FLOW,
        ReasonKind.EVIDENCE_LOST,
        ReasonKind.WITNESS_DISAGREES,
    ]


# Coverage


@pytest.mark.parametrize(
    ("what", "fields", "says"),
    [
        ("whole", {}, None),
        ("last observed within the tolerance", {"coverage": (Interval(0, NOW - 5),)}, None),
        (
            "not observed now",
            {"coverage": (Interval(0, NOW - 60),)},
            "api-1 is not observed, for 1 m now",
        ),
        ("never", {"coverage": ()}, "api-1 is not observed, for 24 h now"),
        (
            "younger than the window",
            {"coverage": (Interval(NOW - 180, NOW),)},
            "api-1 observed for 3 m of 24 h",
        ),
        (
            "younger by less than a second",
            {"coverage": (Interval(NOW - DAY + 0.4, NOW),)},
            "api-1 observed for 23 h 59 m of 24 h",
        ),
        (
            "a hole",
            {"coverage": (Interval(0, NOW - 72), Interval(NOW - 60, NOW))},
            "api-1 was not observed for 12 s, until 1 m ago",
        ),
        (
            "a hole before the window",
            {"coverage": (Interval(0, NOW - 3 * DAY), Interval(NOW - 2 * DAY, NOW))},
            None,
        ),
        (
            "a hole that adjoins the window",
            {"coverage": (Interval(0, NOW - 2 * DAY), Interval(NOW - DAY, NOW))},
            None,
        ),
        (
            "a young service, observed since it was created",
            {"created_at": NOW - 182, "coverage": (Interval(NOW - 180, NOW),)},
            "api observed for 3 m of 24 h",
        ),
    ],
)
def test_every_living_instance_must_have_been_observed_for_the_whole_window(what, fields, says):
    judged = verdict(seen(MESH, **fields))
    if says is None:
        assert judged.verdict is Answer.READY, what
        assert judged.coverage.complete
    else:
        assert judged.verdict is Answer.UNKNOWN, what
        assert kinds(judged) == [ReasonKind.COVERAGE_GAP]
        assert says in judged.reasons[0].message
        assert not judged.coverage.complete


def test_an_instance_must_have_been_observed_since_soon_after_its_creation():
    late = seen(of=API2, created_at=NOW - 3600, coverage=(Interval(NOW - 180, NOW),))
    [reason] = verdict(seen(MESH), late).reasons
    assert reason.message == "api-2 was not observed for 56 m 55 s, until 3 m ago"


def test_one_instance_that_was_not_observed_is_enough():
    judged = verdict(seen(), seen(of=API2, coverage=(Interval(NOW - 3600, NOW),)))
    assert kinds(judged) == [ReasonKind.COVERAGE_GAP]
    assert [each.complete for each in judged.coverage.instances] == [True, False]


def test_an_instance_created_in_the_window_continues_what_departed_ones_covered():
    departed = msgspec.structs.replace(API2, seen_until=NOW - 3600)
    young = seen(MESH, created_at=NOW - 1800, coverage=(Interval(NOW - 1799, NOW),))
    gone = seen(of=departed, coverage=(Interval(NOW - 9 * DAY, NOW - 3600),))
    assert verdict(young, departed=(gone,)).verdict is Answer.READY
    blind = seen(
        of=departed,
        coverage=(Interval(NOW - 9 * DAY, NOW - 7200), Interval(NOW - 5400, NOW - 3600)),
    )
    assert kinds(verdict(young, departed=(blind,))) == [ReasonKind.COVERAGE_GAP]


def test_a_short_window_is_not_swallowed_by_the_tolerances():
    born = seen(MESH, created_at=NOW - 3, coverage=())
    assert verdict(born, window_s=4.0).verdict is Answer.UNKNOWN
    stale = seen(MESH, coverage=(Interval(0, NOW - 3),))
    assert verdict(stale, window_s=8.0).verdict is Answer.UNKNOWN
    assert verdict(seen(MESH), window_s=8.0).verdict is Answer.READY


def test_the_share_says_how_much_of_the_window_is_observed():
    judged = verdict(
        seen(created_at=NOW - 6 * 3600, coverage=(Interval(NOW - 6 * 3600, NOW),)),
    )
    assert judged.coverage.share == pytest.approx(0.25)
    assert judged.coverage.since == NOW - 6 * 3600


# What to do next


@pytest.mark.parametrize(
    ("enrolment", "template"),
    [
        (Enrolment.CONSUL, 'the annotation consul.hashicorp.com/connect-inject: "true"'),
        (Enrolment.ISTIO, 'the label sidecar.istio.io/inject: "true"'),
    ],
)
def test_where_the_mesh_injects_its_sidecar_that_is_what_a_pod_template_says(enrolment, template):
    place = Place(environment=Environment.KUBERNETES, injected_by=enrolment.injection)
    said = f"put {template} into the pod template of legacy in the namespace default"
    caller = Caller(address="10.0.0.9", workload="legacy")
    for told in (steps.onboard(place, caller), *steps.onboard_all(place, [caller])):
        assert told.startswith(said)


@pytest.mark.parametrize(
    ("enrol", "has_envoy", "injected_by"),
    [
        (Enrolment.ANNOTATED, True, ""),
        (Enrolment.ANNOTATED, False, mesh.OWN_SIDECAR),
        (Enrolment.CONSUL, False, Enrolment.CONSUL.injection),
    ],
)
def test_nobody_is_told_to_have_the_agent_start_an_envoy_that_it_has_not(
    monkeypatch, enrol, has_envoy, injected_by
):
    monkeypatch.setattr(mesh.envoy, "is_installed", lambda: has_envoy)
    config = AgentConfig(
        node="n1",
        server="unix:///s",
        trust_domain="mesh.consul",
        kubernetes=KubernetesConfig(enrol=enrol),
    )
    assert mesh.MeshView(config, None, None, None).place.injected_by == injected_by


@pytest.mark.parametrize(
    ("what", "catalog", "edge", "environment", "says"),
    [
        ("onboard in a lab", LEGACY, flow(), Environment.LAB, "`tidegate lab onboard legacy`"),
        (
            "onboard in Kubernetes",
            LEGACY,
            flow(),
            Environment.KUBERNETES,
            "`kubectl --namespace default annotate pod legacy tidegate.io/mesh=true`",
        ),
        (
            "onboard on a VM",
            LEGACY,
            flow(),
            Environment.VM,
            "set meshed: true for legacy on n2, in its workload file, or under `processes`",
        ),
        (
            "and allow, keeping what is allowed",
            LEGACY,
            flow(),
            Environment.LAB,
            'echo \'{"Kind": "service-intentions", "Name": "api", "Sources": '
            '[{"Name": "legacy", "Action": "allow"}, {"Name": "web", "Action": "allow"}]}\''
            " | tidegate config write -",
        ),
        ("own TLS", LEGACY, flow(FlowClass.TLS), Environment.LAB, "TLS inside mTLS"),
        (
            "meshed, not allowed",
            msgspec.structs.replace(LEGACY, meshed=True),
            flow(),
            Environment.LAB,
            "no intention lets legacy call api",
        ),
        (
            "meshed and allowed",
            WEB,
            flow(peer="10.2.0.3"),
            Environment.LAB,
            "web-1 is in the mesh and allowed: wait",
        ),
        (
            "older than the observation",
            LEGACY,
            flow(FlowClass.UNKNOWN),
            Environment.LAB,
            "restart legacy",
        ),
    ],
)
def test_the_next_step_is_the_one_for_this_caller(what, catalog, edge, environment, says):
    known = (API, catalog) if catalog is WEB else (API, WEB, catalog)
    [reason] = verdict(seen(edge), known=known, place=Place(environment=environment)).reasons
    assert says in reason.next_step, what


def test_names_in_commands_are_quoted():
    hostile = instance("x'; reboot #", "10.2.0.4", service="x'; reboot #", meshed=False)
    [reason] = verdict(
        seen(flow()), known=(API, WEB, hostile), place=Place(environment=Environment.LAB)
    ).reasons
    assert "onboard 'x'\"'\"'; reboot #'" in reason.next_step


# Form


def test_the_json_has_the_fields_that_pipelines_read():
    judged = verdict(seen(MESH, flow()))
    plain = msgspec.json.decode(judged.to_json())
    assert {
        "service", "verdict", "mode", "window_s", "reasons", "callers", "coverage", "witness",
    } <= plain.keys()  # fmt: skip
    assert plain["verdict"] == "NOT READY"
    [reason] = plain["reasons"]
    assert {
        "kind", "caller", "class", "port", "connections", "last_seen", "next_step", "message",
    } <= reason.keys()  # fmt: skip
    assert {"address", "workload", "service", "meshed"} <= reason["caller"].keys()
    assert reason["class"] == "plaintext"
    assert plain["callers"][1]["class"] == "mesh"
    assert plain["witness"][0]["agrees"] is True
    assert msgspec.json.decode(judged.to_json(), type=Verdict) == judged


def test_evidence_travels_as_json():
    evidence = ServiceEvidence(
        service="api", instances=(seen(MESH, flow(), excluded_inbound_ports=((1, 2),)),)
    )
    assert msgspec.json.decode(msgspec.json.encode(evidence), type=ServiceEvidence) == evidence


def test_a_verdict_has_a_bounded_number_of_callers_and_those_that_block_come_first(monkeypatch):
    monkeypatch.setattr(readiness, "MAX_CALLERS", 3)
    scanned = [flow(FlowClass.EMPTY, peer=f"192.0.2.{n}") for n in range(9)]
    judged = verdict(seen(*scanned, flow()))
    assert judged.verdict is Answer.NOT_READY
    assert judged.callers[0].caller.workload == "legacy"
    assert (len(judged.callers), judged.callers_omitted) == (3, 7)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (8.4, "8 s"),
        (200, "3 m 20 s"),
        (3600, "1 h"),
        (DAY, "24 h"),
        (2 * DAY + 3661, "2 d 1 h"),
        (3 * DAY, "3 d"),
    ],
)
def test_spans_are_told_in_their_two_largest_units(seconds, text):
    assert span(seconds) == text


def test_the_steps_for_two_callers_do_not_take_back_each_other():
    cron = instance("cron", "10.2.0.9", meshed=False)
    edges = (flow(), flow(peer="10.2.0.9"))
    one, other = verdict(seen(*edges), known=(*CATALOG, cron)).reasons
    [written] = {reason.next_step.partition("allow it: ")[2] for reason in (one, other)}
    for source in ("cron", "legacy", "web"):
        assert f'"Name": "{source}"' in written


def test_a_command_of_a_lab_names_the_lab():
    place = Place(environment=Environment.LAB, lab="second")
    [reason] = verdict(seen(flow()), place=place).reasons
    assert "`tidegate lab onboard legacy --lab second`" in reason.next_step
    assert "| tidegate config write - --lab second`" in reason.next_step


@pytest.mark.parametrize(
    ("mode", "edges", "first"),
    [
        (MutualTLSMode.STRICT, (flow(),), True),
        (MutualTLSMode.STRICT, (), False),
        (MutualTLSMode.PERMISSIVE, (flow(),), False),
    ],
)
def test_onboarding_a_service_does_not_cut_off_its_plaintext_callers(mode, edges, first):
    bare = msgspec.structs.replace(API, meshed=False)
    intent = msgspec.structs.replace(INTENT, mode=mode)
    judged = verdict(seen(*edges, of=bare, inbound_redirected=False), intent=intent)
    [step] = [one.next_step for one in judged.reasons if one.kind is ReasonKind.NOT_MESHED]
    assert ("First make api permissive, or its sidecar refuses legacy" in step) is first
    assert f"nboard {API.name}: " in step


def test_an_intent_that_may_be_out_of_date_is_never_ready():
    evidence = ServiceEvidence(
        service="api", instances=(seen(MESH),), intent_problem="no server answers; 40 s old"
    )
    judged = judge(INTENT, evidence, known=CATALOG, window_s=DAY, now=NOW)
    assert judged.verdict is Answer.UNKNOWN
    assert "no server answers; 40 s old" in judged.reasons[0].message
