"""Sidecar configurations: golden files, what Envoy itself says to them, and what stays the same.

After an intended change write the golden files anew with TIDEGATE_WRITE_GOLDEN=1.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.envoy import binary
from tidegate.enforce.sidecar.spec import (
    CIPHER_SUITES,
    Endpoint,
    LocalService,
    SidecarSpec,
    Upstream,
)
from tidegate.errors import InputError
from tidegate.identity import spiffe
from tidegate.identity.ca import MeshCA
from tidegate.intent.policy import Family
from tidegate.model import IntentionRule, MutualTLSMode, TLSSettings

GOLDEN = Path(__file__).parent / "golden" / "sidecar"
DOMAIN = "0f1e2d3c.consul"


def allow(source: str) -> IntentionRule:
    return IntentionRule(source=source, allow=True)


def deny(source: str) -> IntentionRule:
    return IntentionRule(source=source, allow=False)


def upstream(service: str, *addresses: str, port: int = 8080) -> Upstream:
    endpoints = tuple(Endpoint(address=address, service_port=port) for address in addresses)
    return Upstream(service=service, port=port, endpoints=endpoints)


STRICT = SidecarSpec(service="api", trust_domain=DOMAIN, port=8080, intentions=(allow("web"),))
PERMISSIVE = msgspec.structs.replace(STRICT, mode=MutualTLSMode.PERMISSIVE)
ADMIN = LocalService(
    service="api-admin",
    port=9090,
    mode=MutualTLSMode.PERMISSIVE,
    intentions=(allow("ops"),),
)
SEVERAL = msgspec.structs.replace(PERMISSIVE, more_services=(ADMIN,))
CALLER = SidecarSpec(
    service="web",
    trust_domain=DOMAIN,
    upstreams=(upstream("api", "10.0.0.2", "fd00::2"), upstream("pay", "10.0.0.3", port=8443)),
)
TENANCY = SidecarSpec(
    service="east/shop/api",
    datacenter="dc2",
    trust_domain=DOMAIN,
    port=8080,
    intentions=(
        deny("east/shop/legacy"),
        allow("east/shop/*"),
        deny("east/billing/*"),
        allow("east/*/*"),
        allow("web"),
    ),
    upstreams=(
        msgspec.structs.replace(upstream("east/billing/pay", "10.0.0.3"), datacenter="dc2"),
        msgspec.structs.replace(upstream("shop/pay", "10.0.0.4"), datacenter="dc2"),
    ),
)

SPECS = {
    "strict": STRICT,
    "permissive": PERMISSIVE,
    "several-services": SEVERAL,
    "several-services-one-permissive": msgspec.structs.replace(SEVERAL, mode=MutualTLSMode.STRICT),
    "tenancy": TENANCY,
    "tls-settings": msgspec.structs.replace(
        CALLER,
        incoming_tls=TLSSettings(
            min_version="TLSv1_1",
            max_version="TLSv1_2",
            cipher_suites=tuple(CIPHER_SUITES),
        ),
        outgoing_tls=TLSSettings(min_version="TLSv1_3"),
    ),
    "virtual-addresses": msgspec.structs.replace(
        CALLER,
        upstreams=(
            msgspec.structs.replace(
                upstream("api", "10.0.0.2", "10.0.0.4", "fd00::2"),
                virtual_addresses=("10.96.0.1", "fd00:96::1"),
            ),
        ),
    ),
    "virtual-ports": msgspec.structs.replace(
        CALLER,
        upstreams=(
            msgspec.structs.replace(
                upstream("api", "10.0.0.2", "fd00::2"),
                virtual_addresses=("10.96.0.1", "fd00:96::1"),
                virtual_ports=(80, 8443),
            ),
        ),
    ),
    "access-logs": msgspec.structs.replace(PERMISSIVE, access_logs=True),
    "transparent": msgspec.structs.replace(PERMISSIVE, transparent=True),
    "caller": CALLER,
    "caller-of-mesh-only": msgspec.structs.replace(CALLER, mesh_destinations_only=True),
    "nothing-to-call": SidecarSpec(service="db", trust_domain=DOMAIN, mesh_destinations_only=True),
    "ipv4-only": msgspec.structs.replace(PERMISSIVE, families=(Family.IPV4,)),
    "ipv6-only": msgspec.structs.replace(PERMISSIVE, families=(Family.IPV6,)),
    "default-deny-with-wildcard": msgspec.structs.replace(
        STRICT, intentions=(deny("web"), allow("legacy"), allow("*"))
    ),
    "default-allow": msgspec.structs.replace(
        STRICT, default_allow=True, intentions=(deny("web"), allow("legacy"), deny("*"))
    ),
}


def resources(response: bytes) -> list[dict[str, Any]]:
    return json.loads(response)["resources"]


def listener(spec: SidecarSpec, name: str) -> dict[str, Any]:
    (found,) = [one for one in resources(render.render(spec).lds) if one["name"] == name]
    return found


def chains(spec: SidecarSpec) -> dict[str, dict[str, Any]]:
    outbound = listener(spec, render.OUTBOUND_LISTENER)
    return {chain["name"]: chain for chain in outbound["filter_chains"]}


def rules(spec: SidecarSpec) -> dict[str, Any]:
    (intentions,) = resources(render.render(spec).ecds[render.RBAC_STAT_PREFIX])
    return intentions["typed_config"]["rules"]


def permitted_sources(spec: SidecarSpec) -> str:
    """The principals of the policy, written as an expression over sources."""

    def expression(principal: dict[str, Any]) -> str:
        if "and_ids" in principal:
            return " and ".join(map(expression, principal["and_ids"]["ids"]))
        if "not_id" in principal:
            return f"not {expression(principal['not_id'])}"
        pattern = principal["authenticated"]["principal_name"]["safe_regex"]["regex"]
        source = pattern.removesuffix("$").rsplit("/svc/", 1)[1]
        return "*" if source == "[^/]+" else source

    policies = rules(spec).get("policies", {})
    return ", ".join(
        expression(principal) for policy in policies.values() for principal in policy["principals"]
    )


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_configuration_is_the_golden_one(name: str) -> None:
    rendered = render.render(SPECS[name])
    files = {"lds.json": rendered.lds, "cds.json": rendered.cds}
    files |= {render.intentions_file(kind): text for kind, text in rendered.ecds.items()}
    for file, content in files.items():
        golden = GOLDEN / f"{name}.{file}"
        if os.environ.get("TIDEGATE_WRITE_GOLDEN"):
            golden.write_bytes(content)
        assert content == golden.read_bytes(), f"{golden.name} differs"
        assert json.loads(content)["version_info"] == rendered.version


def test_there_is_no_golden_file_of_a_configuration_that_is_no_more() -> None:
    assert {path.name.split(".")[0] for path in GOLDEN.iterdir()} == set(SPECS) | {"bootstrap"}


def test_the_bootstrap_is_the_golden_one() -> None:
    golden = GOLDEN / "bootstrap.json"
    content = render.bootstrap("node-1/api-1", "api")
    if os.environ.get("TIDEGATE_WRITE_GOLDEN"):
        golden.write_bytes(content)
    assert content == golden.read_bytes()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_envoy_finds_a_configuration_valid(name: str, tmp_path: Path) -> None:
    """As static resources, because Envoy validates only what its bootstrap file holds."""
    working = tmp_path / "envoy"
    working.mkdir()
    ca = MeshCA.create(tmp_path / "ca", DOMAIN)
    spec = SPECS[name]
    leaf = ca.issue(spiffe.service_id(DOMAIN, spec.service), 60)
    certificates = [
        render.ServiceCertificate(
            service=one.service, certificate_pem=leaf.certificate_pem, key_pem=leaf.key_pem
        )
        for one in spec.services
    ]
    secrets = render.render_secrets(certificates, ca.roots_pem)
    rendered = render.render(spec)
    files = {render.leaf_file(name): content for name, content in secrets.leaves.items()}
    files |= {render.ROOTS_FILE: secrets.roots, render.SWITCHES_FILE: rendered.rtds}
    files |= {render.intentions_file(name): text for name, text in rendered.ecds.items()}
    for file, content in files.items():
        (working / file).write_bytes(content)
    bootstrap = json.loads(render.bootstrap("node", "api"))
    del bootstrap["dynamic_resources"]
    bootstrap["static_resources"] = {
        kind: [{key: one[key] for key in one if key != "@type"} for one in resources(content)]
        for kind, content in (("listeners", rendered.lds), ("clusters", rendered.cds))
    }
    (working / "static.json").write_text(json.dumps(bootstrap))
    validated = subprocess.run(
        [binary(), "--mode", "validate", "--log-level", "error", "-c", "./static.json"],
        cwd=working,
        capture_output=True,
        text=True,
    )
    assert validated.returncode == 0, validated.stderr


def test_a_mode_flip_changes_nothing_of_a_listener_but_its_filter_chains() -> None:
    strict, permissive = (listener(spec, render.PUBLIC_LISTENER) for spec in (STRICT, PERMISSIVE))
    mutual_tls = strict.pop("filter_chains")
    assert permissive.pop("filter_chains")[: len(mutual_tls)] == mutual_tls
    assert strict == permissive
    before, after = render.render(STRICT), render.render(PERMISSIVE)
    assert resources(before.cds) == resources(after.cds)
    assert before.version != after.version


def test_logs_are_switched_without_a_change_of_listeners() -> None:
    before, after = render.render(PERMISSIVE), render.render(SPECS["access-logs"])
    assert (before.lds, before.cds, before.ecds) == (after.lds, after.cds, after.ecds)
    assert before.rtds != after.rtds


def test_intentions_change_neither_listeners_nor_clusters() -> None:
    more = msgspec.structs.replace(STRICT, intentions=(allow("legacy"), *STRICT.intentions))
    before, after = render.render(STRICT), render.render(more)
    assert resources(before.lds) == resources(after.lds)
    assert resources(before.cds) == resources(after.cds)
    assert before.version != after.version


def test_another_instance_of_an_upstream_changes_no_chain_and_no_cluster_that_was_there() -> None:
    services = (upstream("pay", "10.0.0.3", port=8443), upstream("api", "10.0.0.9", "10.0.0.2"))
    before = msgspec.structs.replace(CALLER, upstreams=(upstream("api", "10.0.0.2"),))
    after = msgspec.structs.replace(CALLER, upstreams=services)
    assert chains(before).items() <= chains(after).items()
    clusters = resources(render.render(after).cds)
    assert all(cluster in clusters for cluster in resources(render.render(before).cds))


def test_the_order_of_upstreams_and_endpoints_changes_nothing() -> None:
    api = upstream("api", "10.0.0.2", "10.0.0.4")
    pay = upstream("pay", "10.0.0.3")
    one = msgspec.structs.replace(CALLER, upstreams=(api, pay))
    other_api = msgspec.structs.replace(api, endpoints=api.endpoints[::-1])
    other = msgspec.structs.replace(CALLER, upstreams=(pay, other_api))
    assert render.render(one) == render.render(other)


def test_an_address_that_two_upstreams_claim_belongs_to_the_earlier_one() -> None:
    spec = msgspec.structs.replace(
        CALLER, upstreams=(upstream("api", "10.0.0.2"), upstream("stale", "10.0.0.2"))
    )
    assert [name for name in chains(spec) if "10.0.0.2" in name] == [
        "api.default.dc1:10.0.0.2:8080"
    ]


def test_an_instance_with_another_sidecar_port_is_reached_at_that_port() -> None:
    endpoint = Endpoint(address="10.0.0.2", service_port=8081, proxy_port=21000)
    spec = msgspec.structs.replace(
        CALLER, upstreams=(Upstream(service="api", port=8080, endpoints=(endpoint,)),)
    )
    ports = {
        chain["filter_chain_match"]["destination_port"]
        for name, chain in chains(spec).items()
        if name.startswith("api")
    }
    assert ports == {8081}, "on another port it may be another service"
    overrides = [
        cluster["original_dst_lb_config"]["upstream_port_override"]
        for cluster in resources(render.render(spec).cds)
        if "original_dst_lb_config" in cluster
    ]
    assert overrides == [21000]


@pytest.mark.parametrize(
    ("default_allow", "intentions", "action", "expected"),
    [
        (False, (), "ALLOW", ""),
        (False, (allow("web"),), "ALLOW", "web"),
        (False, (deny("web"),), "ALLOW", ""),
        (False, (allow("web"), deny("web")), "ALLOW", "web"),
        (False, (deny("web"), allow("web")), "ALLOW", ""),
        (False, (allow("*"),), "ALLOW", "*"),
        (False, (deny("web"), allow("*")), "ALLOW", "* and not web"),
        (False, (allow("web"), deny("*")), "ALLOW", "web"),
        (False, (deny("*"), allow("web")), "ALLOW", ""),
        (False, (deny("a"), allow("b"), allow("*")), "ALLOW", "b, * and not a and not b"),
        (True, (), "DENY", ""),
        (True, (deny("web"),), "DENY", "web"),
        (True, (allow("web"), deny("*")), "DENY", "* and not web"),
        (True, (allow("web"),), "DENY", ""),
    ],
)
def test_precedence_of_intentions_becomes_exclusion(
    default_allow: bool, intentions: tuple[IntentionRule, ...], action: str, expected: str
) -> None:
    spec = msgspec.structs.replace(STRICT, default_allow=default_allow, intentions=intentions)
    # ALLOW is the default of the field (envoy config.rbac.v3.RBAC.Action).
    assert rules(spec).get("action", "ALLOW") == action
    assert permitted_sources(spec) == expected


def test_a_principal_is_one_service_of_the_mesh_and_dots_are_no_wildcards() -> None:
    (policy,) = rules(STRICT)["policies"].values()
    (principal,) = policy["principals"]
    assert principal["authenticated"]["principal_name"]["safe_regex"]["regex"] == (
        r"^spiffe://0f1e2d3c\.consul/ns/default/dc/[^/]+/svc/web$"
    )


def test_secrets_show_no_key_in_their_repr() -> None:
    certificate = render.ServiceCertificate(
        service="api", certificate_pem="CERTIFICATE", key_pem="THE-KEY"
    )
    secrets = render.render_secrets([certificate], "ROOTS")
    assert b"THE-KEY" in secrets.leaves["leaf"]
    assert "THE-KEY" not in repr(secrets) + repr(certificate)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"service": "Api"}, "service"),
        ({"trust_domain": "x/y"}, "trust_domain"),
        ({"intentions": (allow("a|b"),)}, "intentions.source"),
        ({"intentions": (allow("*/web"),)}, "intentions.source"),
        ({"intentions": (allow("*/*/*"),)}, "intentions.source"),
        ({"port": -1}, "port"),
        ({"port": 65536}, "port"),
        ({"port": 15001}, "port"),
        ({"more_services": (LocalService(service="b", port=8080),)}, "port"),
        ({"more_services": (LocalService(service="api", port=9090),)}, "more_services"),
        ({"more_services": (LocalService(service="b"),)}, "more_services"),
        ({"more_services": (LocalService(service="east/shop/b", port=1),)}, "more_services"),
        ({"families": ()}, "families"),
        (
            {"incoming_tls": TLSSettings(min_version="TLSv1_3", max_version="TLSv1_2")},
            "incoming_tls",
        ),
        ({"outgoing_tls": TLSSettings(cipher_suites=("RC4",))}, "outgoing_tls"),
        (
            {
                "outgoing_tls": TLSSettings(
                    max_version="TLSv1_2", cipher_suites=("TLS_RSA_WITH_AES_128_CBC_SHA",)
                )
            },
            "outgoing_tls",
        ),
    ],
)
def test_a_spec_that_envoy_would_refuse_cannot_be_made(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        SidecarSpec(**(msgspec.structs.asdict(STRICT) | change))
    assert caught.value.field == field


def test_an_endpoint_has_an_address_and_ports() -> None:
    for address in ("api", "", "fd00:0::2", "FD00::2", "fe80::1%eth0", "10.0.0.2/32"):
        with pytest.raises(InputError):
            Endpoint(address=address, service_port=80)
    for change in ({"service_port": 0}, {"proxy_port": 65536}):
        with pytest.raises(InputError):
            Endpoint(**({"address": "10.0.0.2", "service_port": 80} | change))
