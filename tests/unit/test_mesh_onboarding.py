"""Where services stand, which steps bring the mesh furthest, plans, suggested intentions, what re-securing breaks."""

import msgspec
import pytest
from meshes import NOW, OPEN, PERMISSIVE, STRICT, Service, facts, mesh, plain, tls

from tidegate.model import FlowClass, MutualTLSMode
from tidegate.verdict.next_steps import StepKind, next_steps
from tidegate.verdict.onboarding import (
    GlobalSettings,
    OutboundCall,
    SidecarProblem,
    calls,
    downstreams,
    service_status,
)
from tidegate.verdict.permission import Permission
from tidegate.verdict.plan import StepName, StepState, order, plan
from tidegate.verdict.readiness import Answer
from tidegate.verdict.resecuring import Hurt, ModeSetting, breakages, proofs
from tidegate.verdict.suggestions import Because, suggestions

CLOSED = GlobalSettings(entry={"Kind": "mesh", "TLS": {"Incoming": {"TLSMinVersion": "TLSv1_2"}}})
SECURE = GlobalSettings(mesh_destinations_only=True)


def states(facts_, service):
    [one] = plan(facts_, [service]).services
    return {step.name: step.state for step in one.steps}


def step(facts_, service, name):
    [one] = plan(facts_, [service]).services
    return next(each for each in one.steps if each.name is name)


# Status


def test_a_downstream_is_told_with_its_classes_its_sidecar_and_its_intention():
    mesh_ = facts(
        Service("api", plain("legacy", 3), mesh("web", 5), mode=PERMISSIVE, allow=["web"]),
        Service("legacy", meshed=False),
        Service("web"),
    )
    legacy, web = downstreams(mesh_.services[0])
    assert (legacy.name, legacy.blocks, legacy.onboarded) == ("legacy", True, False)
    assert (legacy.permission, legacy.not_mesh) == (Permission.MISSING, 3)
    assert (web.name, web.blocks, web.onboarded) == ("web", False, True)
    assert (web.permission, web.not_mesh) == (Permission.ALLOWED, 0)


def test_the_share_of_mesh_is_that_of_connections():
    status = service_status(
        facts(
            Service("api", plain("legacy", 3), mesh("web", 9), mode=PERMISSIVE),
            Service("legacy", meshed=False),
            Service("web"),
        ).services[0]
    )
    assert (status.connections, status.mesh_share) == (12, 0.75)
    assert status.blocking == ("legacy",)
    assert status.verdict is Answer.NOT_READY


def test_a_service_that_nobody_calls_has_no_share_and_one_without_a_sidecar_no_verdict():
    idle, outside = (
        service_status(one) for one in facts(Service("a"), Service("b", meshed=False)).services
    )
    assert (idle.mesh_share, idle.verdict) == (None, Answer.READY)
    assert (outside.verdict, outside.meshed, outside.instances) == (None, 0, 1)


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        ({"allow": ["legacy"]}, Permission.ALLOWED),
        ({"allow": ["*"]}, Permission.ALLOWED),
        ({"deny": ["legacy"]}, Permission.DENIED),
        ({}, Permission.MISSING),
        ({"default_allow": True}, Permission.BY_DEFAULT),
        ({"default_allow": True, "deny": ["*"]}, Permission.DENIED),
    ],
)
def test_intentions_are_evaluated_on_plaintext_by_the_callers_service(service, expected):
    mesh_ = facts(
        Service("api", plain("legacy"), mode=PERMISSIVE, **service),
        Service("legacy", meshed=False),
    )
    [one] = downstreams(mesh_.services[0])
    assert one.permission is expected
    [flow] = mesh_.services[0].verdict.callers
    assert flow.permission is expected
    assert ("would be denied" in flow.note) is expected.would_be_denied


def test_an_address_that_the_catalog_does_not_know_is_under_no_intention():
    [one] = downstreams(facts(Service("api", plain("192.0.2.9"), mode=PERMISSIVE)).services[0])
    assert (one.name, one.service, one.permission) == ("192.0.2.9", "", Permission.UNKNOWABLE)
    assert not one.onboarded


def test_what_exclusions_keep_away_from_the_sidecar_waits_for_no_intention():
    mesh_ = facts(Service("db", plain("web"), excluded=True), Service("web"))
    [one] = downstreams(mesh_.services[0])
    assert (one.passes_by, one.blocks) == (True, False)
    assert suggestions(mesh_) == ()
    assert states(mesh_, "db")[StepName.INTENTIONS] is StepState.NOT_NEEDED


# The next steps


def test_a_caller_that_alone_blocks_two_services_comes_before_one_that_shares_the_blame_for_three():
    mesh_ = facts(
        Service("a", plain("x"), mode=PERMISSIVE),
        Service("b", plain("x"), mode=PERMISSIVE),
        Service("c", plain("y"), plain("z"), mode=PERMISSIVE),
        Service("d", plain("y"), plain("z"), mode=PERMISSIVE),
        Service("e", plain("y"), plain("z"), mode=PERMISSIVE),
        *(Service(name, meshed=False) for name in "xyz"),
    )
    first, second, third = next_steps(mesh_)
    assert (first.subject, first.moves, first.helps) == ("x", ("a", "b"), ())
    assert [one.subject for one in (second, third)] == ["y", "z"]
    assert second.helps == ("c", "d", "e")
    assert "nothing else blocks a and b" in first.message
    assert first.commands[-1] == "tidegate lab onboard x-1"
    assert "tidegate intentions suggest a --all-callers --write" in first.commands


def test_a_ready_service_is_switched_before_somebody_is_onboarded_for_one_more():
    mesh_ = facts(
        Service("done", mesh("web"), mode=PERMISSIVE, allow=["web"]),
        Service("api", plain("legacy"), mode=PERMISSIVE),
        Service("legacy", meshed=False),
        Service("web"),
    )
    first, second, *_ = next_steps(mesh_)
    assert (first.kind, first.commands) == (StepKind.STRICT, ("tidegate strict done",))
    assert (second.kind, second.subject) == (StepKind.ONBOARD, "legacy")


def test_a_caller_in_the_mesh_without_an_intention_needs_only_that():
    mesh_ = facts(Service("api", plain("web"), mode=PERMISSIVE), Service("web"))
    [one] = next_steps(mesh_)
    assert (one.kind, one.subject, one.moves) == (StepKind.INTENTION, "web", ("api",))
    assert one.commands == ("tidegate intentions suggest api --all-callers --write",)


def test_what_an_intention_denies_is_a_persons_decision():
    mesh_ = facts(Service("api", plain("web"), mode=PERMISSIVE, deny=["web"]), Service("web"))
    [one] = next_steps(mesh_)
    assert one.kind is StepKind.INTENTION
    assert "an intention denies" in one.message
    assert one.commands == ("tidegate config read -kind service-intentions -name api",)
    assert all("--write" not in command for command in one.commands)


def test_an_unknown_address_is_to_be_identified_and_one_in_the_mesh_and_allowed_to_reconnect():
    mesh_ = facts(
        Service("api", plain("192.0.2.9"), mode=PERMISSIVE),
        Service("pay", tls("web"), mode=PERMISSIVE, allow=["web"]),
        Service("web"),
    )
    assert {one.subject: one.kind for one in next_steps(mesh_)} == {
        "192.0.2.9": StepKind.IDENTIFY,
        "web": StepKind.RECONNECT,
    }


def test_a_service_without_a_sidecar_that_is_called_is_made_permissive_first_and_the_gate_before():
    mesh_ = facts(
        Service("api", plain("legacy"), meshed=False),
        Service("legacy", meshed=False),
        settings=(CLOSED,),
    )
    first = next_steps(mesh_)[0]
    assert first.subject == "api"
    gate, permissive, suggest, onboard = first.commands
    assert '"AllowEnablingPermissiveMutualTLS": true' in gate
    assert '"TLSMinVersion": "TLSv1_2"' in gate, "the rest of the entry stays"
    assert permissive == "tidegate permissive api"
    assert "suggest api" in suggest
    assert onboard == "tidegate lab onboard api-1"


def test_a_rejected_configuration_is_a_step_in_envoys_own_words():
    broken = facts(Service("api", mode=PERMISSIVE, problem="refuses its configuration: bad"))
    [service] = broken.services
    told = SidecarProblem(workload="api-1", node="n1", problem="refuses its configuration: bad")
    broken = msgspec.structs.replace(
        broken, services=(msgspec.structs.replace(service, sidecar_problems=(told,)),)
    )
    assert service_status(broken.services[0]).sidecar_problems == (told,)
    [one] = next_steps(broken)
    assert (one.kind, one.moves) == (StepKind.SIDECAR, ("api",))
    assert "refuses its configuration: bad" in one.message


def test_when_everything_is_strict_the_mesh_is_to_be_re_secured_and_then_nothing_is_left():
    services = (Service("api", mesh("web"), allow=["web"]), Service("web"))
    [one] = next_steps(facts(*services))
    assert (one.kind, one.commands) == (StepKind.RESECURE, ("tidegate resecure",))
    assert next_steps(facts(*services, settings=(SECURE,))) == ()


def test_there_are_at_most_three_steps_unless_more_are_asked_for():
    mesh_ = facts(*(Service(f"s{number}", meshed=False) for number in range(5)))
    assert len(next_steps(mesh_)) == 3
    assert len(next_steps(mesh_, most=10)) == 5


# Plans


def test_the_plan_of_an_untouched_service_begins_with_the_global_settings():
    mesh_ = facts(
        Service("api", plain("legacy"), meshed=False),
        Service("legacy", meshed=False),
        settings=(CLOSED,),
    )
    found = states(mesh_, "api")
    assert list(found) == list(StepName)
    assert found[StepName.SETTINGS] is StepState.NEXT
    rest = [state for name, state in found.items() if name is not StepName.SETTINGS]
    assert StepState.NEXT not in rest
    assert found[StepName.SIDECAR] is StepState.LATER


def test_each_step_that_is_done_makes_the_following_the_next():
    def after(settings=OPEN, **fields):
        service = {"meshed": False, **fields}
        mesh_ = facts(
            Service("api", plain("legacy"), **service),
            Service("legacy", meshed=False),
            settings=(settings,),
        )
        return next(
            (name for name, state in states(mesh_, "api").items() if state is StepState.NEXT), None
        )

    assert after(settings=CLOSED) is StepName.SETTINGS
    assert after() is StepName.PERMISSIVE
    assert after(mode=PERMISSIVE) is StepName.INTENTIONS
    assert after(mode=PERMISSIVE, allow=["legacy"]) is StepName.SIDECAR
    assert after(mode=PERMISSIVE, allow=["legacy"], meshed=True) is StepName.DOWNSTREAMS


def test_a_service_that_is_ready_is_switched_next_and_one_that_is_strict_waits_for_the_others():
    ready = facts(Service("api", mesh("web"), mode=PERMISSIVE, allow=["web"]), Service("web"))
    assert states(ready, "api")[StepName.STRICT] is StepState.NEXT
    assert states(ready, "web")[StepName.RESECURE] is StepState.LATER
    strict = facts(Service("api", mesh("web"), allow=["web"]), Service("web"))
    assert states(strict, "api")[StepName.STRICT] is StepState.DONE
    assert states(strict, "api")[StepName.RESECURE] is StepState.NEXT
    secure = facts(Service("api", mesh("web"), allow=["web"]), Service("web"), settings=(SECURE,))
    assert set(states(secure, "api").values()) <= {StepState.DONE, StepState.NOT_NEEDED}


def test_permissive_mode_is_not_needed_for_a_service_that_nobody_calls():
    mesh_ = facts(Service("batch", meshed=False), settings=(CLOSED,))
    found = states(mesh_, "batch")
    assert found[StepName.SETTINGS] is StepState.NOT_NEEDED
    assert found[StepName.PERMISSIVE] is StepState.NOT_NEEDED
    assert found[StepName.SIDECAR] is StepState.NEXT


def test_a_closed_way_out_of_the_mesh_is_a_step_only_for_a_service_that_calls_out_of_it():
    services = (Service("db", plain("api"), meshed=False), Service("api", meshed=False))
    settings = (GlobalSettings(gate_open=True, mesh_destinations_only=True),)
    needed = step(facts(*services, settings=settings), "api", StepName.SETTINGS)
    assert needed.state is StepState.NEXT
    assert '"MeshDestinationsOnly": false' in needed.commands[0]
    assert "db" in needed.detail
    alone = facts(Service("api", meshed=False), settings=settings)
    assert states(alone, "api")[StepName.SETTINGS] is StepState.NOT_NEEDED


def test_the_answers_to_the_documents_questions_stand_at_the_downstreams():
    mesh_ = facts(
        Service("api", plain("legacy"), tls("web"), mode=PERMISSIVE, allow=["web"]),
        Service("legacy", meshed=False),
        Service("web"),
    )
    told = step(mesh_, "api", StepName.DOWNSTREAMS)
    assert "legacy (plaintext) is not in the mesh, has no intention" in told.detail
    assert "web (tls) is in the mesh, has an intention" in told.detail
    assert told.commands[-1] == "tidegate lab onboard legacy-1"


def test_commands_look_at_the_window_that_a_person_chose():
    mesh_ = facts(Service("api", plain("web"), mode=PERMISSIVE), Service("web"), window_named=True)
    assert next_steps(mesh_)[0].commands == (
        "tidegate intentions suggest api --all-callers --write --window 60s",
    )


def test_callers_come_before_those_whom_they_call():
    targets = {"web": frozenset({"api"}), "api": frozenset({"db"}), "cron": frozenset({"db"})}
    assert order(["db", "api", "web", "cron"], targets) == (("cron",), ("web",), ("api",), ("db",))


def test_services_that_call_each_other_are_one_group_and_the_plan_says_so():
    targets = {
        "a": frozenset({"b"}),
        "b": frozenset({"c"}),
        "c": frozenset({"a", "d"}),
        "w": frozenset({"a"}),
    }
    assert order("abcdw", targets) == (("w",), ("a", "b", "c"), ("d",))
    mesh_ = facts(
        Service("a", plain("b"), meshed=False),
        Service("b", plain("a"), meshed=False),
    )
    found = plan(mesh_, ["a", "b"])
    assert found.groups == (("a", "b"),)
    assert "a and b call each other in a circle" in found.notes[0]
    assert calls(mesh_) == {"a": {"b"}, "b": {"a"}}


# Suggested intentions


def test_intentions_are_suggested_for_exactly_the_mesh_callers_that_none_is_about():
    mesh_ = facts(
        Service(
            "api",
            mesh("web"),
            mesh("shop"),
            mesh("bad"),
            plain("legacy"),
            plain("192.0.2.9"),
            mode=PERMISSIVE,
            allow=["shop", "gone"],
            deny=["bad"],
        ),
        *(Service(name) for name in ("web", "shop", "bad")),
        Service("legacy", meshed=False),
    )
    [one] = suggestions(mesh_)
    assert one.named(all_callers=False) == ("web",)
    assert set(one.named(all_callers=True)) == {"web", "legacy"}
    assert {each.source: each.because for each in one.sources} == {
        "web": Because.MESH,
        "legacy": Because.ONBOARDING,
    }
    assert (one.denied, one.unnameable, one.unseen) == (("bad",), ("192.0.2.9",), ("gone",))


def test_what_only_the_default_allows_needs_an_intention_for_its_upstream():
    mesh_ = facts(Service("api", mesh("web"), default_allow=True), Service("web"))
    assert suggestions(mesh_)[0].named(all_callers=False) == ("web",)
    wild = facts(Service("api", mesh("web"), allow=["*"]), Service("web"))
    assert suggestions(wild) == ()


# Re-securing


def outbound(caller="web", address="192.0.2.1", **fields):
    return OutboundCall(
        caller=f"{caller}-1",
        caller_service=caller,
        node="n1",
        address=address,
        port=443,
        flow_class=FlowClass.TLS,
        connections=7,
        last_seen=NOW - 5,
        **fields,
    )


def said(kind="service-defaults", name="api", mode=MutualTLSMode.PERMISSIVE, **fields):
    tenancy = {"namespace": "default", "partition": "default", **fields}
    return ModeSetting(kind=kind, name=name, mode=mode, **tenancy)


def test_what_is_called_outside_the_mesh_would_break_and_says_who_calls_it():
    mesh_ = facts(
        Service("web"),
        outbound=(
            outbound(),
            outbound(address="10.9.9.9", destination="old"),
            outbound(address="10.9.9.8", destination="api", destination_meshed=True),
        ),
    )
    broken = breakages(mesh_, ())
    assert [one.kind for one in broken] == [Hurt.CALL] * 3
    assert "web-1 calls 192.0.2.1:443, outside the mesh, with its own TLS: 7" in broken[0].message
    assert "web-1 calls old:443, not in the mesh" in broken[1].message
    assert "no intention" in broken[2].message


def test_where_the_way_out_is_closed_already_no_call_breaks():
    mesh_ = facts(Service("web"), outbound=(outbound(),), settings=(SECURE,))
    assert breakages(mesh_, ()) == ()


def test_everybody_who_is_permissive_stands_against_it_wherever_it_is_said():
    found = breakages(
        facts(Service("web")),
        (
            said(),
            said(name="pay", namespace="billing", partition="east"),
            said("proxy-defaults", "global"),
            said("registration", "web-1"),
            said(name="ok", mode=STRICT),
            said(name="silent", mode=None),
        ),
    )
    assert [one.kind for one in found] == [Hurt.PERMISSIVE] * 4
    assert "`tidegate strict api`" in found[0].next_step
    assert "(namespace billing, partition east)" in found[1].message
    assert "`tidegate strict east/billing/pay`" in found[1].next_step


def test_a_node_that_does_not_answer_is_not_taken_for_silence():
    [one] = breakages(facts(Service("web"), problems=("n2 does not answer",)), ())
    assert one.kind is Hurt.UNSEEN


def test_the_proof_goes_through_every_partition_and_namespace():
    found = proofs(
        (SECURE, GlobalSettings(partition="east", gate_open=True)),
        (
            said(mode=STRICT),
            said(name="pay", namespace="billing"),
            said("proxy-defaults", "global", mode=None),
        ),
        ("web-1",),
        3,
    )
    holds = {(one.partition, one.namespace, one.message): one.holds for one in found}
    assert [key for key, value in holds.items() if not value] == [
        (
            "default",
            "billing",
            "service-defaults and registrations: 1 looked at, permissive: pay",
        ),
        ("east", "", "mesh: AllowEnablingPermissiveMutualTLS is true"),
        ("east", "", "mesh: MeshDestinationsOnly is false"),
        ("", "", "2 of 3 sidecars run it; not yet: web-1"),
    ]
    assert ("default", "", 'proxy-defaults/global: MutualTLSMode is ""') in holds
    assert ("east", "", "proxy-defaults: there is no entry, so strict is the default") in holds
