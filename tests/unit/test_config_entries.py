"""Config entries: three notations in, Consul's JSON out, Consul's rule about the permissive gate."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import InputError
from tidegate.intent.entries import (
    Action,
    DirectionalTLS,
    Entry,
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
    from_consul,
    parse_entries,
    precedence,
    to_consul,
    warning_for,
)
from tidegate.intent.fields import is_name
from tidegate.model import MutualTLSMode

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
        "Protocol": "http",
        "TransparentProxy": {},
        "MutualTLSMode": "permissive",
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
        ('Kind = "service-router" Name = "x"', ["kind 'service-router' is not supported yet"]),
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
            ["line 3: Expose: Expose is not supported yet"],
        ),
        ('Kind = "service-defaults" Name = "a" name = "b"', ["is set twice, as Name and as name"]),
        ('Kind = "service-defaults" Name = "a" Namespace = "x"', ["'x' is not supported yet"]),
        (
            'Kind = "service-defaults" Name = "a" Protocol = "htp"',
            ["'htp' is not known here; expected http"],
        ),
        ('Kind = "service-defaults" Name = "a" Mode = "direct"', ["'direct' is not supported yet"]),
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
        ('Kind = "service-intentions" Name = "a"', ["Sources: is empty"]),
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
            ["Sources[0].Permissions: Permissions is not supported yet"],
        ),
        (
            "apiVersion: consul.hashicorp.com/v1beta1\nkind: Meshh\nmetadata: {name: mesh}\n",
            [
                "line 1: apiVersion:",
                "line 2: kind: invalid config entry kind: 'Meshh'; expected Mesh",
            ],
        ),
        ("a: &x 1\nb: *x", ["line 2, column 4: an alias"]),
        ("kind: mesh\nkind: mesh", ["line 2, column 1: kind is set twice"]),
        ("kind: !!python/name:os.system x", ["line 1, column 7: the tag"]),
        ('{"Kind": "mesh", "Kind": "mesh"}', ["Kind: is set twice"]),
        ('{"Kind": "mesh"', ["line 1, column 16:", "expected JSON"]),
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
    assert [precedence(*pair) for pair in (("a", "b"), ("a", "*"), ("*", "b"), ("*", "*"))] == [
        9, 8, 6, 5,
    ]  # fmt: skip


names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True).filter(is_name)
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
    name = draw(names | st.just("*"))
    sources = [
        Source(
            name=source,
            action=draw(st.sampled_from(Action)),
            precedence=precedence(name, source),
            description=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=9)),
        )
        for source in draw(st.sets(names | st.just("*"), min_size=1, max_size=4))
    ]
    return ServiceIntentions(
        name=name,
        sources=tuple(sorted(sources, key=lambda source: (-source.precedence, source.name))),
        meta=draw(meta),
        create_index=draw(indexes),
        modify_index=draw(indexes),
    )


common = {"meta": meta, "create_index": indexes, "modify_index": indexes}
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
        protocol=st.sampled_from(["", "tcp", "grpc"]),
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
    try:
        entry = from_consul({"Kind": kind, **fields})
    except InputError:
        return
    assert from_consul(to_consul(entry)) == entry
