"""What holds for a service, out of several entries: Consul's precedence."""

import pytest

from tidegate.intent.entries import (
    AccessLogs,
    DirectionalTLS,
    Mesh,
    MeshTLS,
    MeshTransparentProxy,
    ProxyDefaults,
    ServiceDefaults,
    TransparentProxy,
    from_consul,
    from_server,
    parse_entries,
)
from tidegate.intent.resolve import effective_mode, resolve, turned_strict, upstreams_of
from tidegate.model import MutualTLSMode, TLSSettings, source_matches

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


@pytest.mark.parametrize(
    ("registered", "service", "proxy", "expected"),
    [
        (None, None, None, STRICT),
        (None, None, PERMISSIVE, PERMISSIVE),
        (None, STRICT, PERMISSIVE, STRICT),
        (PERMISSIVE, STRICT, STRICT, PERMISSIVE),
        (STRICT, PERMISSIVE, PERMISSIVE, STRICT),
    ],
)
def test_what_a_registration_says_is_over_what_entries_say(registered, service, proxy, expected):
    defaults = ServiceDefaults(name="api", mutual_tls_mode=service)
    assert effective_mode(registered, defaults, ProxyDefaults(mutual_tls_mode=proxy)) is expected


def test_entries_hold_in_their_partition_and_service_defaults_in_their_namespace():
    entries = [
        ProxyDefaults(mutual_tls_mode=PERMISSIVE, partition="east"),
        ServiceDefaults(name="api", mutual_tls_mode=STRICT, partition="east", namespace="billing"),
        ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE),
        Mesh(partition="east", transparent_proxy=MeshTransparentProxy(mesh_destinations_only=True)),
    ]
    services = ["api", "billing/api", "east/billing/api", "east/default/api"]
    intents = resolve(entries, services, False)
    assert [intents[one].mode for one in services] == [PERMISSIVE, STRICT, STRICT, PERMISSIVE]
    assert [intents[one].mesh_destinations_only for one in services] == [False, False, True, True]


def test_the_outbound_port_is_the_services_own_or_that_of_its_partition():
    def listening(port):
        return TransparentProxy(outbound_listener_port=port)

    entries = [
        ProxyDefaults(transparent_proxy=listening(15002)),
        ServiceDefaults(name="api", transparent_proxy=listening(15003)),
        ServiceDefaults(name="web"),
    ]
    intents = resolve(entries, ["api", "web", "east/default/web"], False)
    assert [intent.outbound_port for intent in intents.values()] == [15003, 15002, 0]


def test_tls_settings_and_access_logs_are_those_of_the_partition():
    incoming = DirectionalTLS(tls_min_version="TLSv1_2", cipher_suites=("A", "B"))
    outgoing = DirectionalTLS(tls_max_version="TLSv1_3")
    entries = [
        Mesh(tls=MeshTLS(incoming=incoming, outgoing=outgoing)),
        ProxyDefaults(access_logs=AccessLogs(enabled=True), partition="east"),
    ]
    here, east = resolve(entries, ["web", "east/default/web"], False).values()
    assert here.incoming_tls == TLSSettings(min_version="TLSv1_2", cipher_suites=("A", "B"))
    assert here.outgoing_tls == TLSSettings(max_version="TLSv1_3")
    assert (here.access_logs, east.access_logs) == (False, True)
    assert east.incoming_tls == TLSSettings()


def tenant_intentions(destination, namespace, **sources):
    """Intentions by Consul's JSON; a source is `namespace__name` and the action, with x for *."""
    return from_consul(
        {
            "Kind": "service-intentions",
            "Name": destination,
            "Namespace": namespace,
            "Sources": [
                dict(zip(("Namespace", "Name"), source.replace("x", "*").split("__"), strict=True))
                | {"Action": action}
                for source, action in sources.items()
            ],
        }
    )


def test_the_nine_precedences_of_consul_decide_in_their_order():
    destinations = [("api", "shop"), ("*", "shop"), ("*", "*")]
    rules = ["ops__job", "ops__x", "x__x"]
    levels = [(name, namespace, rule) for name, namespace in destinations for rule in rules]
    for highest in range(len(levels)):
        # Every lower level says the opposite.
        entries = [
            tenant_intentions(
                name,
                namespace,
                **{
                    rule: "allow" if (name, namespace, rule) == levels[highest] else "deny"
                    for rule in rules
                    if levels.index((name, namespace, rule)) >= highest
                },
            )
            for name, namespace in destinations[highest // 3 :]
        ]
        intent = resolve(entries, ["shop/api"], False)["shop/api"]
        assert intent.intentions[0].precedence == 9 - highest
        assert intent.allows("ops/job")


def test_the_example_of_consuls_own_source_comes_out_as_there():
    entry = tenant_intentions(
        "payment", "billing", intern__trusted="allow", intern__x="deny", x__x="allow"
    )
    intent = resolve([entry], ["billing/payment"], False)["billing/payment"]
    assert [rule.source for rule in intent.intentions] == ["intern/trusted", "intern/*", "*/*"]
    answers = {
        one: intent.allows(one) for one in ("intern/trusted", "intern/other", "web", "ops/job")
    }
    assert answers == {"intern/trusted": True, "intern/other": False, "web": True, "ops/job": True}
    assert not intent.allows("east/default/web"), "a wildcard is about one partition"


def test_a_wildcard_without_a_namespace_is_about_the_namespace_of_the_destination():
    (entry,) = parse_entries(
        'Kind = "service-intentions" Name = "api" Namespace = "shop" '
        'Sources { Name = "*" Action = "allow" }',
        "f",
    )
    intent = resolve([entry], ["shop/api"], False)["shop/api"]
    assert intent.allows("shop/web")
    assert not intent.allows("web")


def test_intentions_that_only_consul_itself_can_enforce_allow_nobody_here():
    entry = from_server(
        {
            "Kind": "service-intentions",
            "Name": "api",
            "Sources": [
                {"Name": "web", "Permissions": [{"Action": "allow"}]},
                {"Name": "far", "Peer": "other", "Action": "allow"},
                {"Name": "*", "SamenessGroup": "all", "Action": "allow"},
            ],
        }
    )
    assert not resolve([entry], ["api"], True)["api"].allows("web")
    denying = resolve([entry], ["api"], False)["api"]
    assert not denying.allows("far")
    assert not denying.allows("job")


@pytest.mark.parametrize(
    ("pattern", "source", "matches"),
    [
        ("web", "web", True),
        ("web", "shop/web", False),
        ("*", "web", True),
        ("*", "shop/web", False),
        ("shop/*", "shop/web", True),
        ("shop/*", "web", False),
        ("*/*", "shop/web", True),
        ("*/*", "east/shop/web", False),
        ("east/*/*", "east/shop/web", True),
        ("east/shop/*", "east/shop/web", True),
        ("east/*/*", "web", False),
    ],
)
def test_a_source_pattern_is_about_its_tenancy(pattern, source, matches):
    assert source_matches(pattern, source) is matches


def test_explicit_upstreams_are_upstreams_if_they_exist():
    entries = [intentions("api", web="allow")]
    intents = resolve(entries, ["api", "db", "pay"], False)
    assert upstreams_of("web", intents, explicit=("db", "gone")) == ("api", "db")


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
