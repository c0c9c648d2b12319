"""What holds for a service, out of several entries: Consul's precedence."""

import pytest

from tidegate.intent.entries import (
    Mesh,
    MeshTransparentProxy,
    ProxyDefaults,
    ServiceDefaults,
    parse_entries,
)
from tidegate.intent.resolve import resolve, turned_strict, upstreams_of
from tidegate.model import MutualTLSMode

PERMISSIVE = MutualTLSMode.PERMISSIVE
STRICT = MutualTLSMode.STRICT


def intentions(destination, **actions):
    sources = ", ".join(
        f'{{ Name = "{"*" if name == "all" else name}", Action = "{action}" }}'
        for name, action in actions.items()
    )
    text = f'Kind = "service-intentions" Name = "{destination}" Sources = [{sources}]'
    return parse_entries(text, "f")[0]


@pytest.mark.parametrize(
    ("proxy", "service", "expected"),
    [
        (None, None, STRICT),
        (None, PERMISSIVE, PERMISSIVE),
        (PERMISSIVE, None, PERMISSIVE),
        (PERMISSIVE, STRICT, STRICT),
        (STRICT, PERMISSIVE, PERMISSIVE),
        (STRICT, None, STRICT),
    ],
)
def test_the_services_own_mode_is_over_the_mesh_wide_one_and_strict_is_the_default(
    proxy, service, expected
):
    entries = [
        ProxyDefaults(mutual_tls_mode=proxy),
        ServiceDefaults(name="api", mutual_tls_mode=service),
    ]
    assert resolve(entries, ["api"], False)["api"].mode is expected


def test_without_entries_a_service_is_strict():
    assert resolve([], ["api"], False)["api"].mode is STRICT


def test_a_closed_gate_changes_no_service_that_is_permissive():
    entries = [Mesh(), ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE)]
    assert resolve(entries, ["api"], False)["api"].mode is PERMISSIVE


def test_intentions_are_sorted_by_precedence_and_the_higher_hides_the_lower_of_a_source():
    entries = [
        intentions("*", web="deny", job="allow", all="deny"),
        intentions("api", web="allow", all="allow"),
    ]
    rules = resolve(entries, ["api"], False)["api"].intentions
    assert [(rule.source, rule.allow, rule.precedence) for rule in rules] == [
        ("web", True, 9),
        ("*", True, 8),
        ("job", True, 6),
    ]


@pytest.mark.parametrize(
    ("entries", "web", "job"),
    [
        ([], None, None),
        ([intentions("api", web="allow")], True, None),
        ([intentions("api", all="deny")], False, False),
        ([intentions("api", all="deny", web="allow")], True, False),
        ([intentions("*", web="allow"), intentions("api", all="deny")], False, False),
        ([intentions("*", all="allow"), intentions("api", web="deny")], False, True),
        ([intentions("other", all="allow")], None, None),
    ],
)
@pytest.mark.parametrize("default_allow", [False, True])
def test_the_first_intention_by_precedence_decides_and_else_the_default(
    entries, web, job, default_allow
):
    intent = resolve(entries, ["api"], default_allow)["api"]
    assert intent.allows("web") is (default_allow if web is None else web)
    assert intent.allows("job") is (default_allow if job is None else job)


def test_the_index_is_that_of_the_latest_entry_that_matters_to_the_service():
    entries = [
        Mesh(modify_index=3),
        ServiceDefaults(name="api", modify_index=5),
        ServiceDefaults(name="web", modify_index=9),
    ]
    intents = resolve(entries, ["api", "web", "job"], False)
    assert [intents[name].index for name in ("api", "web", "job")] == [5, 9, 3]


def test_mesh_destinations_only_holds_for_every_service():
    mesh = Mesh(transparent_proxy=MeshTransparentProxy(mesh_destinations_only=True))
    intents = resolve([mesh], ["api", "web"], False)
    assert all(intent.mesh_destinations_only for intent in intents.values())
    assert not resolve([], ["api"], False)["api"].mesh_destinations_only


def test_upstreams_are_what_an_intention_allows_and_not_what_the_default_allows():
    entries = [
        intentions("api", web="allow"),
        intentions("db", all="allow", web="deny"),
        intentions("pay", all="allow"),
    ]
    intents = resolve(entries, ["api", "db", "pay", "other"], default_allow=True)
    assert upstreams_of("web", intents) == ("api", "pay")
    assert upstreams_of("job", intents) == ("db", "pay")


def test_a_change_that_makes_services_strict_is_found_whatever_entry_made_it():
    loose = MutualTLSMode.PERMISSIVE
    defaults = ProxyDefaults(mutual_tls_mode=loose)
    api = ServiceDefaults(name="api", mutual_tls_mode=loose)
    bare = ServiceDefaults(name="api", protocol="grpc")
    strict = ServiceDefaults(name="api", mutual_tls_mode=MutualTLSMode.STRICT)
    assert turned_strict([api], [bare], ["api", "web"]) == ("api",)
    assert turned_strict([api], [], ["api"]) == ("api",)
    assert turned_strict([defaults], [], ["web", "api"]) == ("api", "web")
    assert turned_strict([defaults, api], [defaults, bare], ["api"]) == ()
    assert turned_strict([defaults], [defaults, strict], ["api", "web"]) == ("api",)
    assert turned_strict([], [api], ["api"]) == ()
