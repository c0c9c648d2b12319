"""Config entries: three notations in, Consul's JSON out, Consul's rule about the permissive gate."""

import json

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InputError, InputErrors
from tidegate.intent.entries import (
    Action,
    DirectionalTLS,
    Entry,
    EntryKey,
    Kind,
    Mesh,
    MeshTLS,
    MeshTransparentProxy,
    ProxyDefaults,
    ServiceDefaults,
    ServiceIntentions,
    Source,
    TransparentProxy,
    check_write,
    filter_shape,
    from_consul,
    from_server,
    parse_entries,
    precedence,
    to_consul,
    to_request,
    warning_for,
)
from tidegate.intent.fields import is_name
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.filter import Filter
from tidegate.model import MutualTLSMode, ServiceName

PERMISSIVE = MutualTLSMode.PERMISSIVE
STRICT = MutualTLSMode.STRICT

OPEN_MESH = Mesh(
    allow_enabling_permissive_mutual_tls=True,
    transparent_proxy=MeshTransparentProxy(mesh_destinations_only=True),
)


@pytest.mark.parametrize(
    "text",
    [
        'Kind = "mesh"\nAllowEnablingPermissiveMutualTLS = true\n'
        "TransparentProxy { MeshDestinationsOnly = true }",
        'kind = "mesh" allow_enabling_permissive_mutual_tls = true\n'
        "transparent_proxy = [{ mesh_destinations_only = true }]",
        '{"Kind": "mesh", "AllowEnablingPermissiveMutualTLS": true,'
        ' "TransparentProxy": [{"MeshDestinationsOnly": "true"}]}',
        "KIND: mesh\nALLOWENABLINGPERMISSIVEMUTUALTLS: true\n"
        "transparentproxy: {meshdestinationsonly: true}\n",
        "apiVersion: consul.hashicorp.com/v1alpha1\nkind: Mesh\n"
        "metadata: {name: mesh, namespace: consul, labels: {a: b}}\n"
        "spec:\n  allowEnablingPermissiveMutualTLS: true\n"
        "  transparentProxy:\n    meshDestinationsOnly: true\nstatus: {}\n",
    ],
)
def test_every_notation_gives_the_same_entry(text):
    assert parse_entries(text, "f") == (OPEN_MESH,)


def test_several_entries_in_one_file_are_read_in_order():
    hcl = 'Kind = "mesh"\nKind = "service-defaults"\nName = "api"\n'
    json = '[{"Kind": "mesh"}, {"Kind": "service-defaults", "Name": "api"}]'
    yaml = "kind: mesh\n---\nkind: service-defaults\nname: api\n"
    expected = (Mesh(), ServiceDefaults(name="api"))
    assert [parse_entries(text, "f") for text in (hcl, json, yaml)] == [expected] * 3


def test_intentions_of_a_custom_resource_are_about_its_destination():
    text = """
apiVersion: consul.hashicorp.com/v1alpha1
kind: ServiceIntentions
metadata:
  name: some-name-of-the-resource
spec:
  destination:
    name: api
  sources:
  - name: "*"
    action: deny
  - name: web
    action: allow
    description: the shop
"""
    (entry,) = parse_entries(text, "f")
    assert entry == ServiceIntentions(
        name="api",
        sources=(
            Source(name="web", action=Action.ALLOW, precedence=9, description="the shop"),
            Source(name="*", action=Action.DENY, precedence=8),
        ),
    )


def test_what_kubectl_lists_is_read_as_its_items():
    text = """
apiVersion: v1
kind: List
items:
- apiVersion: consul.hashicorp.com/v1alpha1
  kind: Mesh
  metadata: {name: mesh, namespace: consul}
- apiVersion: consul.hashicorp.com/v1alpha1
  kind: ServiceDefaults
  metadata: {name: api, namespace: shop, uid: 1234}
  spec: {protocol: http}
  status: {conditions: []}
"""
    assert parse_entries(text, "f") == (Mesh(), ServiceDefaults(name="api", protocol="http"))


def test_the_namespace_of_a_custom_resource_is_not_consuls():
    text = """
apiVersion: consul.hashicorp.com/v1alpha1
kind: ServiceIntentions
metadata: {name: x, namespace: shop}
spec:
  destination: {name: api, namespace: billing}
  sources: [{name: web, action: allow}, {name: job, namespace: ops, action: deny}]
"""
    (entry,) = parse_entries(text, "f")
    assert entry.key == EntryKey(Kind.SERVICE_INTENTIONS, "api", "billing", "default")
    assert [str(source.service) for source in entry.sources] == ["billing/web", "ops/job"]


def test_a_source_inherits_the_tenancy_of_its_entry_but_no_wildcard():
    entry = from_consul(
        {
            "Kind": "service-intentions",
            "Name": "*",
            "Namespace": "*",
            "Partition": "east",
            "Sources": [
                {"Name": "web", "Action": "allow"},
                {"Name": "*", "Namespace": "*", "Action": "deny"},
            ],
        }
    )
    assert [(str(one.service), one.precedence) for one in entry.sources] == [
        ("east/default/web", 3),
        ("east/*/*", 1),
    ]


def test_sources_of_equal_precedence_stay_in_their_order():
    sources = ", ".join(f'{{ Name = "{name}" Action = "allow" }}' for name in "*cab")
    (entry,) = parse_entries(f'Kind = "service-intentions" Name = "x" Sources = [{sources}]', "f")
    assert [source.name for source in entry.sources] == ["c", "a", "b", "*"]


def test_each_entry_has_a_key_of_its_own():
    entries = [
        Mesh(), Mesh(partition="east"), ProxyDefaults(),
        ServiceDefaults(name="a"), ServiceDefaults(name="a", namespace="billing"),
        ServiceDefaults(name="a", partition="east"), ServiceIntentions(name="a"),
    ]  # fmt: skip
    assert len({entry.key for entry in entries}) == len(entries)
    assert entries[5].key == (Kind.SERVICE_DEFAULTS, "a", "default", "east")


KEPT = """
Kind = "service-defaults"
Name = "api"
mesh_gateway { mode = "local" }
upstream_config {
  defaults {
    connect_timeout_ms = 500
    passive_health_check { interval = "10s" max_failures = 3 enforcing_consecutive_5xx = 0 }
  }
  overrides = [
    { name = "db", namespace = "billing", mesh_gateway = { mode = "remote" }, protocol = "HTTP" }
  ]
}
local_connect_timeout_ms = 100
balance_inbound_connections = "exact_balance"
"""


def test_what_changes_nothing_is_kept_and_written_in_consuls_names():
    (entry,) = parse_entries(KEPT, "f")
    written = to_consul(entry)
    assert written["MeshGateway"] == {"Mode": "local"}
    assert written["UpstreamConfig"] == {
        "Defaults": {
            "ConnectTimeoutMs": 500,
            "PassiveHealthCheck": {
                "Interval": "10s",
                "MaxFailures": 3,
                "EnforcingConsecutive5xx": 0,
            },
        },
        "Overrides": [
            {
                "Name": "db",
                "Namespace": "billing",
                "MeshGateway": {"Mode": "remote"},
                "Protocol": "http",
            }
        ],
    }
    assert written["LocalConnectTimeoutMs"] == 100
    assert written["BalanceInboundConnections"] == "exact_balance"
    assert from_consul(written) == entry


def test_what_a_consul_server_has_is_kept_even_if_nobody_here_knows_it():
    raw = {
        "Kind": "service-intentions",
        "Name": "api",
        "FutureField": {"Mode": [1, 2]},
        "JWT": {"Providers": [{"Name": "okta"}]},
        "Hash": 7,
        "Sources": [
            {"Name": "web", "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]},
            {"Name": "far", "Peer": "other", "Action": "allow"},
        ],
        "CreateIndex": 1,
        "ModifyIndex": 2,
    }
    entry = from_server(raw)
    written = to_consul(entry)
    assert written["FutureField"] == {"Mode": [1, 2]}
    assert written["JWT"] == raw["JWT"]
    assert written["Sources"][0]["Permissions"] == raw["Sources"][0]["Permissions"]
    assert written["Sources"][1]["Peer"] == "other"
    assert from_server(written) == entry
    with pytest.raises(InputError):
        from_consul(raw)
    with pytest.raises(InputError):
        from_server({"Kind": "service-router", "Name": "api"})
    limited = {
        "Kind": "service-defaults",
        "Name": "api",
        "MaxInboundConnections": 5,
        "Mode": "direct",
    }
    assert to_consul(from_server(limited))["MaxInboundConnections"] == 5
    assert from_server(limited).mode == "direct"


def test_what_is_sent_to_a_server_has_no_tenancy_that_is_the_default():
    entry = parse_entries(
        'Kind = "service-intentions" Name = "a" Sources { Name = "b" Action = "allow" }', "f"
    )[0]
    body = to_request(entry)
    assert not {"Namespace", "Partition"} & (body.keys() | body["Sources"][0].keys())
    assert from_consul(body) == entry
    billing = ServiceIntentions(
        name="a",
        namespace="billing",
        sources=(Source(name="b", action=Action.ALLOW, precedence=9),),
    )
    body = to_request(billing)
    assert body["Namespace"] == "billing"
    assert from_consul(body) == billing


def test_filters_are_about_the_fields_that_entries_are_written_with():
    permissive = to_consul(ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE))
    strict = to_consul(ServiceDefaults(name="web", mutual_tls_mode=STRICT))
    shape = filter_shape(Kind.SERVICE_DEFAULTS)
    wanted = Filter(
        'MutualTLSMode == "permissive" and TransparentProxy.DialedDirectly != true', shape
    )
    assert wanted.select([permissive, strict], lambda raw: raw) == [permissive]
    with pytest.raises(FilterError):
        Filter('MutualTlsMode == "permissive"', shape)
    of_sources = 'any Sources as s { s.Action == "allow" and s.Type == "consul" }'
    assert Filter(of_sources, filter_shape(Kind.SERVICE_INTENTIONS))


def test_what_consul_prints_is_read_with_its_empty_fields():
    text = (
        '{ "Kind": "proxy-defaults", "Name": "global", "Partition": "default",'
        ' "Namespace": "default", "TransparentProxy": {}, "MutualTLSMode": "",'
        ' "MeshGateway": {}, "Expose": {}, "AccessLogs": {}, "CreateIndex": 26,'
        ' "ModifyIndex": 30}'
    )
    assert parse_entries(text, "-") == (ProxyDefaults(create_index=26, modify_index=30),)


def test_an_entry_is_written_in_consuls_json():
    entry = ServiceDefaults(name="api", protocol="http", mutual_tls_mode=PERMISSIVE, modify_index=7)
    assert to_consul(entry) == {
        "Kind": "service-defaults",
        "Name": "api",
        "Partition": "default",
        "Namespace": "default",
        "Protocol": "http",
        "TransparentProxy": {},
        "MutualTLSMode": "permissive",
        "MeshGateway": {},
        "Expose": {},
        "CreateIndex": 0,
        "ModifyIndex": 7,
    }


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ['f: no config entry; expected an entry such as `Kind = "mesh"`']),
        ('Name = "x"', ["does not contain a kind/Kind key at the top level"]),
        ("Kind = 3", ["Kind value in payload is not a string"]),
        (
            'Kind = "service-default"',
            ["line 1: Kind: invalid config entry kind", "expected service-defaults"],
        ),
        (
            'Kind = "service-router" Name = "x"',
            ["kind 'service-router' is not supported: tidegate does nothing with it"],
        ),
        ('Kind = "service-defaults"', ["Name: is missing"]),
        ('Kind = "service-defaults" Name = "a b"', ["'a b' is not a service name"]),
        ('Kind = "service-defaults" Name = "*"', ["'*' is not a service name"]),
        ('Kind = "proxy-defaults" Name = "x"', ["invalid name ('x')", 'expected "global"']),
        ('Kind = "proxy-defaults"', ["Name: is missing", 'expected "global"']),
        ('Kind = "mesh" Name = "x"', ["invalid name ('x')", 'expected "mesh"']),
        (
            'Kind = "service-defaults"\nName = "a"\nMutualTlsMod = "strict"\n',
            ["f: line 3: MutualTlsMod: is not a field here; expected MutualTLSMode"],
        ),
        (
            'Kind = "service-defaults"\nName = "a"\nMutualTLSMode = "loose"\n',
            [
                'line 3: MutualTLSMode: Invalid MutualTLSMode "loose". Must be one of "", "strict", or "permissive".'
            ],
        ),
        (
            'Kind = "service-defaults"\nName = "a"\nExpose { Checks = true }',
            ["line 3: Expose.Checks: is not supported: tidegate opens no listeners"],
        ),
        ('Kind = "service-defaults" Name = "a" name = "b"', ["is set twice, as Name and as name"]),
        (
            'Kind = "mesh" Namespace = "x"',
            ["'x' is not possible for what holds for a whole partition"],
        ),
        (
            'Kind = "service-defaults" Name = "a" Protocol = "htp"',
            ["'htp' is not known here; expected http"],
        ),
        (
            'Kind = "service-defaults" Name = "a" Mode = "direct"',
            ["'direct' is not supported: tidegate redirects"],
        ),
        (
            'Kind = "service-defaults" Name = "a" TransparentProxy { OutboundListenerPort = 70000 }',
            ["TransparentProxy.OutboundListenerPort: 70000 is out of range", "0 to 65535"],
        ),
        ('Kind = "mesh" TransparentProxy = true', ["TransparentProxy: true is not an object"]),
        (
            'Kind = "mesh" TransparentProxy { MeshDestinationsOnly = "maybe" }',
            ["TransparentProxy.MeshDestinationsOnly: 'maybe' is not a bool"],
        ),
        ('Kind = "mesh" Meta { a = { b = 1 } }', ["Meta.a: an object is not text"]),
        (
            'Kind = "mesh" TLS { Incoming { TLSMinVersion = "TLSv1_3" TLSMaxVersion = "TLSv1_2" } }',
            ["TLS.Incoming.TLSMaxVersion: TLSv1_2 is less than TLSMinVersion TLSv1_3"],
        ),
        (
            'Kind = "mesh" TLS { Incoming { CipherSuites = ["x"] } }',
            ["CipherSuites[0]: 'x' is not known"],
        ),
        (
            'Kind = "service-intentions" Name = "a"',
            ["Sources: is missing; expected at least one source"],
        ),
        (
            'Kind = "service-intentions" Name = "a" Sources { Name = "b" Action = "permit" }',
            ['Sources[0].Action: Invalid Action "permit". Must be "allow" or "deny".'],
        ),
        (
            'Kind = "service-intentions" Name = "a" Sources { Name = "b" }',
            ["Sources[0].Action: is missing"],
        ),
        (
            'Kind = "service-intentions" Name = "a" Sources { Action = "deny" }',
            ["Sources[0].Name: is missing"],
        ),
        (
            'Kind = "service-intentions" Name = "a"\n'
            'Sources { Name = "b" Action = "deny" }\nSources { Name = "b" Action = "allow" }',
            ["Sources[1].Name: b is there twice"],
        ),
        (
            'Kind = "service-intentions" Name = "a" Sources { Name = "b*" Action = "deny" }',
            ["'b*' is not a service name"],
        ),
        (
            'Kind = "service-intentions" Name = "a" Sources '
            '{ Name = "b" Permissions { Action = "allow" } }',
            ["Sources[0].Permissions: is not supported: tidegate's sidecars do not look into HTTP"],
        ),
        (
            "apiVersion: consul.hashicorp.com/v1beta1\nkind: Meshh\nmetadata: {name: mesh}\n",
            [
                "line 1: apiVersion:",
                "line 2: kind: invalid config entry kind: 'Meshh'; expected Mesh",
            ],
        ),
        ("a: &x 1\nb: *x", ["line 2, column 4: an alias"]),
        (
            "kind: mesh\nkind: mesh",
            ["line 2: kind: is set twice; expected one value (the first is on line 1)"],
        ),
        ("kind: !!python/name:os.system x", ["line 1, column 7: the tag"]),
        ('{"Kind": "mesh", "Kind": "mesh"}', ["Kind: is set twice"]),
        (
            '{"Kind": "mesh"',
            [
                "line 1, column 16: found the end of the text; expected ',' or '}' for the '{' on line 1"
            ],
        ),
        ('{"Kind": "mesh", "Meta": {"a": "\\ud800"}}', ["Meta.a: a lone surrogate"]),
        ("[" * 100_000, ["nested too deeply"]),
        ("a: " + "[" * 10_000, ["nested too deeply"]),
        ("x" * (600 << 10), ["at most 524288 characters"]),
    ],
)
def test_a_wrong_entry_is_refused_and_says_why(text, faults):
    with pytest.raises(InputError) as caught:
        parse_entries(text, "f")
    for fault in faults:
        assert fault in str(caught.value)


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError) as caught:
        parse_entries('Kind = "service-defaults"\nName = "a b"\nFoo = 1\nProtocol = "x"', "f")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == [
        " line 2", " line 3", " line 4",
    ]  # fmt: skip


def test_of_very_many_faults_the_first_hundred_are_told():
    text = 'Kind = "mesh"\n' + "\n".join(f"x{number} = 1" for number in range(5000))
    with pytest.raises(InputErrors) as caught:
        parse_entries(text, "f")
    *first, last = caught.value.faults
    assert len(first) == 100
    assert str(last) == "f: and 4900 more faults"


@pytest.mark.parametrize(
    ("existing", "proposed", "mesh", "allowed"),
    [
        (None, PERMISSIVE, None, False),
        (None, PERMISSIVE, Mesh(), False),
        (None, PERMISSIVE, OPEN_MESH, True),
        (None, STRICT, None, True),
        (None, None, None, True),
        (STRICT, PERMISSIVE, Mesh(), False),
        (PERMISSIVE, PERMISSIVE, Mesh(), True),
        (PERMISSIVE, STRICT, Mesh(), True),
        (PERMISSIVE, None, None, True),
    ],
)
@pytest.mark.parametrize("make", [ProxyDefaults, ServiceDefaults])
def test_an_entry_becomes_permissive_only_through_the_open_gate(
    existing, proposed, mesh, allowed, make
):
    before = None if existing is None else make(mutual_tls_mode=existing)
    after = make(mutual_tls_mode=proposed)
    if allowed:
        check_write(before, after, mesh)
    else:
        with pytest.raises(InputError) as caught:
            check_write(before, after, mesh)
        assert str(caught.value) == (
            "cannot set MutualTLSMode=permissive because AllowEnablingPermissiveMutualTLS=false"
            " in the mesh config entry"
        )


def test_insecure_entries_come_with_a_warning_and_others_without():
    permissive = ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE)
    assert warning_for(permissive).startswith("MutualTLSMode=permissive is insecure.")
    assert "every service" in warning_for(ProxyDefaults(mutual_tls_mode=PERMISSIVE))
    assert warning_for(OPEN_MESH).startswith("AllowEnablingPermissiveMutualTLS=true allows")
    assert warning_for(Mesh()) is None
    assert warning_for(ServiceDefaults(name="api", mutual_tls_mode=STRICT)) is None


def test_precedence_is_consuls():
    exact, name, both = ServiceName("a", "n"), ServiceName("*", "n"), ServiceName("*", "*")
    table = [
        (exact, exact, 9), (exact, name, 8), (exact, both, 7),
        (name, exact, 6), (name, name, 5), (name, both, 4),
        (both, exact, 3), (both, name, 2), (both, both, 1),
    ]  # fmt: skip
    for destination, source, expected in table:
        assert precedence(destination, source) == expected


names = st.text("abz09-", min_size=1, max_size=8).filter(is_name)
tenants = st.just("default") | names
wildcards = st.tuples(names | st.just("*"), tenants) | st.just(("*", "*"))
meta = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    max_size=3,
)
indexes = st.integers(0, 2**40)
modes = st.none() | st.sampled_from(MutualTLSMode)
proxies = st.builds(
    TransparentProxy, outbound_listener_port=st.integers(0, 65535), dialed_directly=st.booleans()
)
tls = st.builds(
    DirectionalTLS,
    tls_min_version=st.sampled_from(["", "TLS_AUTO", "TLSv1_2"]),
    tls_max_version=st.sampled_from(["", "TLSv1_3"]),
    cipher_suites=st.sampled_from([(), ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",)]),
)


@st.composite
def intentions(draw):
    destination = ServiceName(*draw(wildcards), draw(tenants))
    whose = st.builds(lambda names, partition: ServiceName(*names, partition), wildcards, tenants)
    sources = [
        Source(
            name=source.name,
            namespace=source.namespace,
            partition=source.partition,
            action=draw(st.sampled_from(Action)),
            precedence=precedence(destination, source),
            description=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=9)),
        )
        for source in draw(st.sets(whose, min_size=1, max_size=4))
    ]
    return ServiceIntentions(
        name=destination.name,
        namespace=destination.namespace,
        partition=destination.partition,
        sources=tuple(sorted(sources, key=lambda source: -source.precedence)),
        meta=draw(meta),
        create_index=draw(indexes),
        modify_index=draw(indexes),
    )


common = {"partition": tenants, "meta": meta, "create_index": indexes, "modify_index": indexes}
any_entry = st.one_of(
    st.builds(
        Mesh,
        allow_enabling_permissive_mutual_tls=st.booleans(),
        transparent_proxy=st.builds(MeshTransparentProxy, mesh_destinations_only=st.booleans()),
        tls=st.builds(MeshTLS, incoming=tls, outgoing=tls),
        **common,
    ),
    st.builds(
        ProxyDefaults,
        mode=st.sampled_from(["", "transparent"]),
        transparent_proxy=proxies,
        mutual_tls_mode=modes,
        config=st.dictionaries(names, st.integers(0, 9) | st.lists(st.booleans()), max_size=2),
        **common,
    ),
    st.builds(
        ServiceDefaults,
        name=names,
        namespace=tenants,
        protocol=st.sampled_from(["", "tcp", "grpc"]),
        rest=st.sampled_from([{}, {"LocalConnectTimeoutMs": 0, "MeshGateway": {"Mode": "local"}}]),
        transparent_proxy=proxies,
        mutual_tls_mode=modes,
        **common,
    ),
    intentions(),
)


@given(any_entry)
def test_an_entry_survives_consuls_json(entry):
    text = msgspec.json.encode(to_consul(entry)).decode()
    assert from_consul(msgspec.json.decode(text)) == entry
    assert parse_entries(text, "f") == (entry,)


@given(any_entry)
def test_an_entry_survives_yaml_and_hcl(entry):
    raw = to_consul(entry)
    assert parse_entries(yaml.safe_dump(raw), "f") == (entry,)
    lines = (f"{name} = {hcl_of(value)}" for name, value in raw.items())
    assert parse_entries("\n".join(lines), "f") == (entry,)


def hcl_of(value):
    match value:
        case dict():
            inside = ", ".join(f"{hcl_of(key)} = {hcl_of(one)}" for key, one in value.items())
            return "{" + inside + "}"
        case list():
            return "[" + ", ".join(map(hcl_of, value)) + "]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return json.dumps(value)


@given(any_entry)
def test_an_entry_survives_its_own_json(entry):
    assert msgspec.json.decode(msgspec.json.encode(entry), type=Entry) == entry
    assert entry.kind in Kind


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2)
)
field_names = st.sampled_from(
    ["Name", "Sources", "TLS", "Meta", "Config", "MutualTLSMode", "TransparentProxy", "Expose",
     "apiVersion", "metadata", "spec", "CreateIndex", "Namespace", "x"]
)  # fmt: skip


@given(st.sampled_from([*Kind, "Mesh", "x", 3]), st.dictionaries(field_names, anything, max_size=4))
def test_any_object_is_read_or_refused_with_an_input_error(kind, fields):
    for read in (from_consul, from_server):
        try:
            entry = read({"Kind": kind, **fields})
        except InputError:
            continue
        assert read(to_consul(entry)) == entry
