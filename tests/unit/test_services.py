"""Service definitions in Consul's forms."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.intent.services import (
    Connect,
    Proxy,
    ServiceDefinition,
    SidecarService,
    TaggedAddress,
    Upstream,
    from_consul,
    looks_like_services,
    more_ports,
    parse_services,
    to_consul,
    upstreams_of,
)
from tidegate.model import MutualTLSMode, ServiceName, ServicePort

WEB = ServiceDefinition(
    id="web-1",
    name="web",
    port=8080,
    address="10.0.0.5",
    namespace="shop",
    tags=("v1",),
    meta={"team": "a"},
    tagged_addresses={
        "lan": TaggedAddress(address="10.0.0.5", port=8080),
        "virtual": TaggedAddress(address="10.96.0.7", port=80),
    },
    connect=Connect(
        sidecar_service=SidecarService(
            port=21000,
            proxy=Proxy(
                mode="transparent",
                mutual_tls_mode=MutualTLSMode.PERMISSIVE,
                local_service_address="127.0.0.1",
                local_service_port=8081,
                upstreams=(
                    Upstream(destination_name="db", local_bind_port=9191),
                    Upstream(destination_name="pay", destination_namespace="billing"),
                ),
            ),
        )
    ),
)

HCL = """
service {
  id = "web-1"
  name = "web"
  namespace = "shop"
  address = "10.0.0.5"
  port = 8080
  tags = ["v1"]
  meta { team = "a" }
  tagged_addresses {
    lan { address = "10.0.0.5" port = 8080 }
    virtual { address = "10.96.0.7" port = 80 }
  }
  connect {
    sidecar_service {
      port = 21000
      proxy {
        mode = "transparent"
        mutual_tls_mode = "permissive"
        local_service_address = "127.0.0.1"
        local_service_port = 8081
        upstreams {
          destination_name = "db"
          local_bind_port = 9191
        }
        upstreams {
          destination_name = "pay"
          destination_namespace = "billing"
        }
      }
    }
  }
}
"""
YAML = """
Service:
  ID: web-1
  Name: web
  Namespace: shop
  Address: 10.0.0.5
  Port: 8080
  Tags: [v1]
  Meta: {team: a}
  TaggedAddresses:
    lan: {Address: 10.0.0.5, Port: 8080}
    virtual: {Address: 10.96.0.7, Port: 80}
  Connect:
    SidecarService:
      Port: 21000
      Proxy:
        Mode: transparent
        MutualTLSMode: permissive
        LocalServiceAddress: 127.0.0.1
        LocalServicePort: 8081
        Upstreams:
        - {DestinationName: db, LocalBindPort: 9191}
        - {DestinationName: pay, DestinationNamespace: billing}
"""


@pytest.mark.parametrize(
    "text",
    [
        HCL,
        YAML,
        msgspec.json.encode(to_consul(WEB)).decode(),
        msgspec.json.encode({"service": [to_consul(WEB)]}).decode(),
        msgspec.json.encode({"services": [to_consul(WEB)]}).decode(),
    ],
    ids=["hcl", "yaml", "alone", "one-element-list", "list"],
)
def test_every_form_gives_the_same_definition(text):
    assert parse_services(text, "f") == (WEB,)


def test_what_is_derived_from_a_definition():
    assert str(WEB.service) == "shop/web"
    assert WEB.virtual_addresses == ("10.96.0.7",)
    assert upstreams_of(WEB.service, WEB.sidecar.proxy) == ("shop/db", "billing/pay")
    assert upstreams_of(ServiceName("web"), None) == ()


def test_several_definitions_in_one_file_are_read_in_order():
    hcl = 'services { name = "a" } services { name = "b" id = "b-1" } service { name = "c" }'
    assert [one.id for one in parse_services(hcl, "f")] == ["a", "b-1", "c"]


def test_a_sidecar_of_which_nothing_is_said_is_one_too():
    (definition,) = parse_services('service { name = "a" connect { sidecar_service {} } }', "f")
    assert definition.sidecar == SidecarService()
    assert to_consul(definition)["Connect"] == {"SidecarService": {}}
    (without,) = parse_services('service { name = "a" connect {} }', "f")
    assert without.sidecar is None
    assert "Connect" not in to_consul(without)


def test_a_proxy_registers_itself():
    text = """
    {"Kind": "connect-proxy", "Name": "web-proxy", "Port": 20000, "proxy": {
       "destination_service_name": "web", "DestinationServiceID": "web-1",
       "transparent_proxy": {"outbound_listener_port": 15002}}}
    """
    (proxy,) = parse_services(text, "f")
    assert proxy.proxy.destination_service_id == "web-1"
    assert proxy.proxy.transparent_proxy.outbound_listener_port == 15002
    assert proxy.id == "web-proxy"


def test_what_consul_does_with_health_is_kept():
    text = 'service { name = "a" token = "secret" check { http = "http://x" } weights { passing = 5 } }'
    (definition,) = parse_services(text, "f")
    written = to_consul(definition)
    assert written["Check"] == {"http": "http://x"}
    assert written["Weights"] == {"Passing": 5}
    assert "secret" not in str(written), "a token is nothing to be stored"


def test_services_of_one_address_share_the_sidecar_of_the_one_that_has_it():
    text = """
    service { name = "web" port = 80 address = "10.0.0.5" connect { sidecar_service {} } }
    service { name = "admin" port = 81 address = "10.0.0.5" namespace = "ops" }
    service { name = "other" port = 82 address = "10.0.0.6" }
    service { name = "own" port = 83 address = "10.0.0.5" connect { sidecar_service {} } }
    service { name = "client" address = "10.0.0.5" }
    """
    definitions = parse_services(text, "f")
    web = definitions[0]
    assert more_ports(web, definitions) == (ServicePort(service="ops/admin", port=81),)
    assert more_ports(definitions[1], definitions) == ()


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"service": {}}, True),
        ({"Services": []}, True),
        ({"Name": "web", "Port": 80}, True),
        ({"Kind": "connect-proxy", "Name": "p"}, True),
        ({"Kind": "service-defaults", "Name": "web"}, False),
        ({"kind": "mesh"}, False),
        ({}, False),
    ],
)
def test_definitions_are_told_from_config_entries(document, expected):
    assert looks_like_services(document) is expected


names = st.text("abz09", min_size=1, max_size=5)
tenants = st.just("default") | names
ports = st.integers(0, 19999)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
addresses = st.sampled_from(["", "10.1.2.3", "fd00::1"])
upstreams = st.lists(
    st.builds(
        Upstream,
        destination_name=names,
        destination_namespace=st.just("") | names,
        local_bind_address=addresses,
        rest=st.sampled_from([{}, {"Datacenter": "dc1", "Config": {"a_b": [1, {"c": None}]}}]),
    ),
    max_size=3,
    unique_by=lambda one: one.destination_name,
).map(tuple)
sidecars = st.builds(
    SidecarService,
    port=st.just(0) | st.integers(20000, 65535),
    proxy=st.builds(
        Proxy,
        mode=st.sampled_from(["", "transparent"]),
        mutual_tls_mode=st.none() | st.sampled_from(MutualTLSMode),
        local_service_port=ports,
        upstreams=upstreams,
    ),
)


@given(
    st.builds(
        ServiceDefinition,
        id=st.text("abc-_./", min_size=1, max_size=5),
        name=names,
        namespace=names.filter(lambda name: name != "default") | st.just("default"),
        partition=tenants,
        address=texts,
        port=ports,
        tags=st.lists(texts, max_size=2).map(tuple),
        connect=st.builds(Connect, sidecar_service=st.none() | sidecars),
    )
)
def test_a_definition_survives_consuls_json(definition):
    assert from_consul(to_consul(definition)) == definition
    text = msgspec.json.encode(to_consul(definition)).decode()
    assert parse_services(text, "f") == (definition,)
