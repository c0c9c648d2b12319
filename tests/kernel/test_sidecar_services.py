"""What a sidecar does for several services, tenancy, virtual addresses, and destinations outside the mesh."""

import itertools
import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from namespaces import Pair, landing, serving
from sidecars import (
    ADMIN,
    API,
    DOMAIN,
    OTHER_PORT,
    PORT,
    SEVERAL,
    WEB,
    App,
    call,
    calling_api,
    dial,
    echoes,
    echoing,
    sidecar,
    tls,
    until,
)

from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.closed import MOST_DESTINATIONS, ClosedDestinations
from tidegate.enforce.sidecar.files import LARGEST_LOG
from tidegate.enforce.sidecar.spec import Endpoint, SidecarSpec, Upstream
from tidegate.identity import spiffe
from tidegate.identity.ca import MeshCA
from tidegate.intent.policy import Inbound, Policy
from tidegate.kernel import links
from tidegate.model import IntentionRule, MutualTLSMode, TLSSettings

VIRTUAL = ("10.96.0.1", "fd96::1")


@pytest.fixture
def ca(state: Path) -> MeshCA:
    return MeshCA.create(state / "ca", DOMAIN)


@pytest.fixture
def virtual_routes(pair: Pair) -> None:
    """Virtual addresses have a way, as those of a cluster have, though nobody has them."""
    links.add_route(pair.peer, "10.96.0.0/16", gateway=pair.pod_ipv4)
    links.add_route(pair.peer, "fd96::/64", gateway=pair.pod_ipv6)


@pytest.fixture
def app(pair: Pair) -> Iterator[App]:
    with echoing(pair.pod, PORT) as made:
        yield made


@pytest.fixture
def admin_app(pair: Pair) -> Iterator[App]:
    with echoing(pair.pod, OTHER_PORT) as made:
        yield made


def towards(pair: Pair, service: str, port: int, **fields: object) -> Upstream:
    endpoints = tuple(
        Endpoint(address=address, service_port=port) for address in (pair.pod_ipv4, pair.pod_ipv6)
    )
    return Upstream(service=service, port=port, endpoints=endpoints, **fields)


def presented_to(
    state: Path, pair: Pair, ca: MeshCA, server_name: str, caller: str
) -> tuple[str, bool]:
    """Which service's certificate a mesh client is shown that asks for a server name, and whether it is served."""
    leaf = ca.issue(spiffe.service_id(DOMAIN, caller), 60)
    with (
        dial(pair.peer, pair.pod_ipv4, 20000) as connection,
        tls(state, connection, ca, leaf, server_name) as secured,
    ):
        ((_, uri),) = secured.getpeercert()["subjectAltName"]
        return uri, echoes(secured)


def test_services_of_one_workload_are_told_apart_by_server_name(
    state: Path, ca: MeshCA, pair: Pair, app: App, admin_app: App
) -> None:
    def asked(service: str, caller: str) -> tuple[str, bool]:
        return presented_to(state, pair, ca, spiffe.sni(DOMAIN, service), caller)

    api_id, admin_id = (spiffe.service_id(DOMAIN, one) for one in ("api", "api-admin"))
    with sidecar(state, ca, SEVERAL, pair.pod) as api:
        assert asked("api", "web") == (api_id, True)
        assert (app.accepted, admin_app.accepted) == (1, 0)
        assert asked("api-admin", "ops") == (admin_id, True)
        assert (app.accepted, admin_app.accepted) == (1, 1)
        assert asked("api", "ops") == (api_id, False), "each has intentions of its own"
        assert asked("api-admin", "web") == (admin_id, False)
        assert asked("unheard-of", "web") == (api_id, True), "the first takes what names no other"
        stats = api.admin.sidecar_stats()
        assert (stats.public_connections, stats.rbac_denied) == (5, 2)


def test_each_service_of_a_workload_has_its_own_mode(
    state: Path, ca: MeshCA, pair: Pair, app: App, admin_app: App
) -> None:
    def enter() -> tuple[bool, bool]:
        return call(pair.peer, pair.pod_ipv4, PORT), call(pair.peer, pair.pod_ipv6, OTHER_PORT)

    strict = msgspec.structs.replace(ADMIN, mode=MutualTLSMode.STRICT)
    with sidecar(state, ca, SEVERAL, pair.pod) as api:
        assert enter() == (True, True)
        with dial(pair.peer, pair.pod_ipv4, OTHER_PORT) as plaintext:
            assert echoes(plaintext)
            until(
                lambda: api.admin.sidecar_stats().permissive_active_of == {"api-admin": 1},
                "the open connection is the second service's",
            )
            api.apply(msgspec.structs.replace(SEVERAL, more_services=(strict,)))
            assert enter() == (True, False)
            until(lambda: not echoes(plaintext), "it is closed")
        api.apply(msgspec.structs.replace(SEVERAL, mode=MutualTLSMode.STRICT))
        assert enter() == (False, True)
        until(lambda: api.admin.sidecar_stats().permissive_active_of == {}, "none of them is left")


def test_who_waits_for_a_greeting_is_not_kept_waiting_for_a_server_name(
    state: Path, ca: MeshCA, pair: Pair
) -> None:
    with serving(pair.pod, "api", [PORT, OTHER_PORT]), sidecar(state, ca, SEVERAL, pair.pod) as api:
        for port in (PORT, OTHER_PORT):
            assert landing(pair.peer, pair.pod_ipv4, port).server == "api"
        timeouts = api.admin.stats(["listener.public_listener.downstream_pre_cx_timeout"])
        assert list(timeouts.values()) == [0]


def test_callers_reach_each_service_of_a_workload_with_mtls(
    state: Path, ca: MeshCA, pair: Pair, app: App, admin_app: App
) -> None:
    allowed = msgspec.structs.replace(ADMIN, intentions=API.intentions)
    api_spec = msgspec.structs.replace(SEVERAL, more_services=(allowed,))
    web_spec = msgspec.structs.replace(
        WEB, upstreams=(towards(pair, "api", PORT), towards(pair, "api-admin", OTHER_PORT))
    )
    with sidecar(state, ca, api_spec, pair.pod) as api, sidecar(state, ca, web_spec, pair.peer):
        assert call(pair.peer, pair.pod_ipv4, PORT)
        assert call(pair.peer, pair.pod_ipv6, OTHER_PORT)
        assert (app.accepted, admin_app.accepted) == (1, 1)
        stats = api.admin.sidecar_stats()
        assert (stats.tls_handshakes, stats.permissive_connections) == (2, 0)


def test_a_service_that_is_no_more_leaves_no_key_and_no_intentions(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    with sidecar(state, ca, SEVERAL, pair.pod) as api:
        files = {path.name for path in api.files.working.iterdir()}
        assert {"leaf.api-admin.json", "ecds.api-admin.json"} <= files
        api.apply(API)
        api.rotate("api")
        left = {path.name for path in api.files.working.iterdir()}
        assert files - left == {"leaf.api-admin.json", "ecds.api-admin.json"}
        assert call(pair.peer, pair.pod_ipv4)


def test_the_names_of_another_namespace_and_partition_are_proven_and_checked(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    everybody_there = IntentionRule(source="east/*/*", allow=True)
    api_spec = msgspec.structs.replace(
        API, service="east/shop/api", intentions=(everybody_there,), mode=MutualTLSMode.STRICT
    )
    upstreams = (towards(pair, "east/shop/api", PORT),)
    with sidecar(state, ca, api_spec, pair.pod) as api:
        for caller, welcome in (("east/billing/web", True), ("billing/web", False)):
            web_spec = SidecarSpec(service=caller, trust_domain=DOMAIN, upstreams=upstreams)
            with sidecar(state, ca, web_spec, pair.peer):
                assert call(pair.peer, pair.pod_ipv4) is welcome
        stats = api.admin.sidecar_stats()
        assert (stats.tls_handshakes, stats.rbac_denied) == (2, 1)


def test_tls_settings_decide_who_can_connect(state: Path, ca: MeshCA, pair: Pair, app: App) -> None:
    only_12 = TLSSettings(
        max_version="TLSv1_2",
        cipher_suites=("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",),
    )
    web_spec = calling_api(pair)
    with (
        sidecar(state, ca, msgspec.structs.replace(API, incoming_tls=only_12), pair.pod),
        sidecar(state, ca, web_spec, pair.peer) as web,
    ):
        assert call(pair.peer, pair.pod_ipv4)
        leaf = ca.issue(spiffe.service_id(DOMAIN, "web"), 60)
        with (
            dial(pair.pod, "127.0.0.1", 20000) as connection,
            tls(state, connection, ca, leaf) as secured,
        ):
            assert secured.version() == "TLSv1.2"
            assert secured.cipher()[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
        only_13 = TLSSettings(min_version="TLSv1_3")
        web.apply(msgspec.structs.replace(web_spec, outgoing_tls=only_13))
        assert not call(pair.peer, pair.pod_ipv4)


@pytest.mark.usefixtures("virtual_routes")
@pytest.mark.parametrize("virtual", VIRTUAL)
@pytest.mark.parametrize("ports", [(), (80, 81)], ids=["its-port", "other-ports"])
def test_a_virtual_address_leads_with_mtls_to_an_instance_that_answers(
    state: Path, ca: MeshCA, pair: Pair, app: App, virtual: str, ports: tuple[int, ...]
) -> None:
    endpoints = (
        *towards(pair, "api", PORT).endpoints,
        # Where nobody listens.
        *(
            Endpoint(address=pair.peer_address(version), service_port=PORT, proxy_port=9)
            for version in (4, 6)
        ),
    )
    upstream = Upstream(
        service="api",
        port=PORT,
        endpoints=endpoints,
        virtual_addresses=VIRTUAL,
        virtual_ports=ports,
    )
    web_spec = msgspec.structs.replace(WEB, upstreams=(upstream,))
    with (
        sidecar(state, ca, API, pair.pod) as api,
        sidecar(state, ca, web_spec, pair.peer) as web,
    ):
        dialled = itertools.islice(itertools.cycle(ports or (PORT,)), 8)
        assert all(call(pair.peer, virtual, port) for port in dialled)
        stats = api.admin.sidecar_stats()
        assert (stats.tls_handshakes, stats.permissive_connections) == (8, 0)
        detection = f"cluster.{spiffe.sni(DOMAIN, 'api')}.outlier_detection"
        left_out = web.admin.stats([f"{detection}.ejections_active"])
        assert list(left_out.values()) == [1], "who did not answer three times is left out"


@pytest.mark.usefixtures("virtual_routes")
def test_a_connection_to_a_virtual_address_stays_when_instances_come_and_go(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    here = Endpoint(address=pair.pod_ipv4, service_port=PORT)
    other = Endpoint(address="10.77.0.99", service_port=PORT)
    upstream = Upstream(service="api", port=PORT, endpoints=(here,), virtual_addresses=VIRTUAL[:1])
    both = msgspec.structs.replace(upstream, endpoints=(here, other))
    without = msgspec.structs.replace(WEB, upstreams=(upstream,))
    with (
        sidecar(state, ca, API, pair.pod),
        sidecar(state, ca, without, pair.peer) as web,
        dial(pair.peer, VIRTUAL[0], PORT) as connection,
    ):
        assert echoes(connection)
        web.apply(msgspec.structs.replace(WEB, upstreams=(both,)))
        web.apply(without)
        assert echoes(connection)


def test_closed_destinations_are_counted(state: Path, ca: MeshCA, pair: Pair, app: App) -> None:
    closed_web = msgspec.structs.replace(calling_api(pair), mesh_destinations_only=True)
    alone = msgspec.structs.replace(WEB, mesh_destinations_only=True)
    with sidecar(state, ca, API, pair.pod), sidecar(state, ca, closed_web, pair.peer) as web:
        assert call(pair.peer, pair.pod_ipv4)
        closed = ClosedDestinations(web.files)
        assert not call(pair.peer, pair.pod_ipv4, OTHER_PORT)
        assert not call(pair.peer, pair.pod_ipv6, OTHER_PORT)
        web.apply(alone)
        assert not call(pair.peer, pair.pod_ipv4, PORT), "without upstreams as well"

        def counted() -> dict[str, int]:
            closed.read(5.0)
            return {one.destination: one.connections for one in closed.found}

        expected = {
            f"{pair.pod_ipv4}:{OTHER_PORT}": 1,
            f"[{pair.pod_ipv6}]:{OTHER_PORT}": 1,
            f"{pair.pod_ipv4}:{PORT}": 1,
        }
        until(lambda: sum(counted().values()) >= 3, "the log has them")
        assert counted() == expected
        assert {one.last_seen for one in closed.found} == {5.0}


def test_counts_of_closed_destinations_are_bounded_and_so_is_their_log(
    state: Path, ca: MeshCA, pair: Pair
) -> None:
    with sidecar(state, ca, WEB, pair.peer) as web:
        log = web.files.log(render.CLOSED_LOG)
        wanted = [f"10.0.{number // 250}.{number % 250}:80" for number in range(2000)]
        text = "".join(json.dumps({"destination": one}) + "\n" for one in wanted)
        log.write_text(f"{text}\xff no JSON\n{text}" + '{"destination": "half')
        closed = ClosedDestinations(web.files)
        closed.read(1.0)
        found = {one.destination: one.connections for one in closed.found}
        assert len(found) == MOST_DESTINATIONS + 1
        assert found[""] == 2 * (2000 - MOST_DESTINATIONS)
        with log.open("a") as file:
            file.write('"}\n' + "x" * LARGEST_LOG + "\n")
        closed.read(2.0)
        assert log.stat().st_size == 0
        assert {one.destination: one.connections for one in closed.found}[""] == found[""] + 1


def test_connections_without_mtls_are_logged_while_that_is_switched_on(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    logged = msgspec.structs.replace(API, access_logs=True)
    with sidecar(state, ca, API, pair.pod) as api:
        log = api.files.log(render.ACCESS_LOG)

        def lines() -> list[dict[str, object]]:
            return [json.loads(line) for line in log.read_text().splitlines()]

        def switched(spec: SidecarSpec) -> None:
            before = api.admin.stats(["runtime.load_success"])
            api.files.write_configuration(render.render(spec))
            until(lambda: api.admin.stats(["runtime.load_success"]) != before, "it is switched")

        with dial(pair.peer, pair.pod_ipv4, PORT) as connection:
            assert echoes(connection)
            switched(logged)
            assert echoes(connection), "a switch disturbs no connection"
        assert call(pair.peer, pair.pod_ipv6)
        until(lambda: len(lines()) >= 3, "both are in the log")
        first, *second = sorted(lines(), key=lambda line: "[" in line["downstream_remote_address"])
        assert first["event"] == "TcpConnectionEnd"
        assert str(first["downstream_remote_address"]).startswith(f"{pair.peer_ipv4}:")
        assert {line["event"] for line in second} == {"TcpUpstreamConnected", "TcpConnectionEnd"}
        assert {line["downstream_local_address"] for line in second} == {
            f"[{pair.pod_ipv6}]:{PORT}"
        }
        switched(API)
        assert call(pair.peer, pair.pod_ipv4)
        api.apply(msgspec.structs.replace(logged, mode=MutualTLSMode.STRICT))
        assert not call(pair.peer, pair.pod_ipv4)
        assert len(lines()) == 3


def test_the_log_of_connections_begins_anew_when_it_is_long(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    logged = msgspec.structs.replace(API, access_logs=True)
    with sidecar(state, ca, logged, pair.pod) as api:
        log = api.files.log(render.ACCESS_LOG)
        with log.open("a") as file:
            file.write("x" * LARGEST_LOG + "the end\n")
        api.envoy.ensure(0.0)
        assert log.stat().st_size == 0
        kept = log.with_name(f"{render.ACCESS_LOG}.1")
        assert kept.read_text().endswith("the end\n")
        assert kept.stat().st_size == LARGEST_LOG
        assert call(pair.peer, pair.pod_ipv4)
        until(lambda: log.read_bytes().startswith(b"{"), "Envoy goes on at its beginning")


def test_in_strict_mode_probes_of_the_node_reach_the_application_and_nobody_else(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    strict = msgspec.structs.replace(API, mode=MutualTLSMode.STRICT)
    node = (f"{pair.peer_ipv4}/32", f"{pair.peer_ipv6}/128")
    policy = Policy(inbound=Inbound(direct_probes=True, node_addresses=node))
    others = ("10.77.0.66", "fd77::66")
    for address, prefix in zip(others, ("/24", "/64"), strict=True):
        links.add_address(pair.peer, "host0", address + prefix)
    with sidecar(state, ca, strict, pair.pod, policy) as api:
        for version, other in zip((4, 6), others, strict=True):
            address = pair.pod_address(version)
            assert call(pair.peer, address, source=pair.peer_address(version)), "the node"
            assert not call(pair.peer, address, source=other), "somebody on the same network"
        assert app.accepted == 2
        until(
            lambda: api.admin.sidecar_stats().tls_handshake_failures == 2,
            "who is not the node came to the sidecar",
        )


def test_a_root_is_rotated_without_a_failed_request(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    with (
        sidecar(state, ca, API, pair.pod) as api,
        sidecar(state, ca, calling_api(pair), pair.peer) as web,
        dial(pair.peer, pair.pod_ipv4, PORT) as connection,
    ):
        assert echoes(connection)
        rotated = ca.rotate(keep_s=3600)
        assert call(pair.peer, pair.pod_ipv4), "neither knows the new root"
        web.ca = rotated
        web.rotate("web")
        assert call(pair.peer, pair.pod_ipv4), "the server does not know it"
        api.ca = rotated
        api.rotate("api")
        assert call(pair.peer, pair.pod_ipv4), "both do"
        api.ca = ca
        api.rotate("api")
        assert call(pair.peer, pair.pod_ipv4), "only the client does"
        for one, service in ((web, "web"), (api, "api")):
            one.ca = MeshCA.load(state / "ca")
            one.rotate(service)
        assert call(pair.peer, pair.pod_ipv4)
        assert echoes(connection)


def test_a_former_root_is_trusted_no_longer_than_it_was_kept(
    state: Path, ca: MeshCA, pair: Pair, app: App
) -> None:
    with sidecar(state, ca, API, pair.pod) as api:
        old = ca.issue(spiffe.service_id(DOMAIN, "web"), 60)
        api.ca = ca.rotate(keep_s=0)
        api.rotate("api")
        with dial(pair.peer, pair.pod_ipv4, 20000) as connection:
            try:
                served = echoes(tls(state, connection, api.ca, old))
            except ssl.SSLError:
                served = False
            assert not served
