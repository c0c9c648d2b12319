"""The server as Consul's own tools see it: a client library, tenancy, filters, tokens, TLS, error bodies."""

import asyncio
import hashlib
import json
import socket

import aiohttp
import consul
import msgspec
import pytest
from certificates import certificate
from cryptography import x509

from tidegate.catalog.access import Access
from tidegate.catalog.client import CatalogClient, CatalogRefused, CatalogUnreachable
from tidegate.catalog.registration import NodeInfo
from tidegate.catalog.rights import Right, Token, Tokens
from tidegate.catalog.server import running
from tidegate.catalog.settings import (
    IntentionPolicy,
    ServerConfig,
    TLSFiles,
    TokenConfig,
    load_config,
)
from tidegate.errors import InputError
from tidegate.intent.entries import EntryKey, Kind, Mesh, ServiceDefaults
from tidegate.model import Instance, MutualTLSMode, ServicePort

NODE = NodeInfo(name="n1", address="10.0.0.1", agent_api="unix:///a")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def config(tmp_path):
    return ServerConfig(
        state_dir=tmp_path / "state",
        listen=(f"unix://{tmp_path}/server.sock", f"http://127.0.0.1:{free_port()}"),
        trust_domain="mesh.consul",
    )


def unix(config):
    return config.listen[0]


def tcp(config):
    return config.listen[1]


def with_server(config, scenario):
    """Runs `scenario(client)`, a coroutine or not, against a server that is up meanwhile."""

    async def both():
        async with running(config), CatalogClient(unix(config)) as client:
            if asyncio.iscoroutinefunction(scenario):
                return await asyncio.wait_for(scenario(client), 60)
            return await asyncio.wait_for(asyncio.to_thread(scenario, client), 60)

    return asyncio.run(both())


async def ask(config, method, path, **more):
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, tcp(config) + path, **more) as response,
    ):
        return response.status, response.headers, await response.text()


async def get(config, path):
    status, _, text = await ask(config, "GET", path)
    assert status == 200, text
    return json.loads(text)


# A client library of Consul's.


def library(config, **more):
    return consul.Consul(port=int(tcp(config).rpartition(":")[2]), **more)


def test_a_consul_client_library_writes_reads_lists_and_deletes_entries(config):
    def scenario(_):
        client = library(config)
        assert client.config.set("mesh", "mesh", {"AllowEnablingPermissiveMutualTLS": True}) is True
        assert client.config.set("service-defaults", "web", {"MutualTLSMode": "permissive"}) is True
        assert client.config.set("service-defaults", "db", {"Protocol": "tcp"}, cas=0) is True
        assert client.config.set("service-defaults", "db", {"Protocol": "http"}, cas=0) is False
        entry = client.config.get("service-defaults", "web")
        assert (entry["Name"], entry["MutualTLSMode"]) == ("web", "permissive")
        found = client.config.list("service-defaults", filter_expr='MutualTLSMode == "permissive"')
        assert [one["Name"] for one in found] == ["web"]
        assert client.config.get("service-defaults", "nobody") is None
        index = client.config.get("service-defaults", "db")["ModifyIndex"]
        assert client.config.delete("service-defaults", "db", cas=index + 1) is False
        assert client.config.delete("service-defaults", "db", cas=0) is False
        assert client.config.delete("service-defaults", "db", cas=index) is True
        assert client.config.delete("service-defaults", "db") is True
        assert client.config.delete("mesh", "mesh") is True
        with pytest.raises(consul.ConsulException, match="500 cannot set MutualTLSMode=permissive"):
            client.config.set("proxy-defaults", "global", {"MutualTLSMode": "permissive"})
        with pytest.raises(consul.exceptions.BadRequest, match="invalid config entry kind"):
            client.config.list("nonsense")

    with_server(config, scenario)


def test_a_consul_client_library_registers_finds_and_deregisters_services(config):
    def scenario(_):
        client = library(config)
        service = {"Service": "web", "ID": "web-1", "Tags": ["v1"], "Port": 80, "Meta": {"a": "b"}}
        assert client.catalog.register("n1", "10.0.0.1", service=service)
        assert client.catalog.register("n1", "", service={"Service": "db"}, skip_node_update=True)
        _, nodes = client.catalog.nodes()
        assert [(one["Node"], one["Address"], one["Datacenter"]) for one in nodes] == [
            ("n1", "10.0.0.1", "dc1")
        ]
        assert client.catalog.services()[1] == {"web": ["v1"], "db": []}
        _, (web,) = client.catalog.service("web", tag="v1")
        assert (web["ServiceID"], web["ServicePort"], web["ServiceMeta"]) == (
            "web-1",
            80,
            {"a": "b"},
        )
        assert client.catalog.service("web", tag="v2")[1] == []
        _, on_node = client.catalog.node("n1")
        assert sorted(on_node["Services"]) == ["db", "web-1"]
        assert client.catalog.node("nowhere")[1] is None
        _, (health,) = client.health.service("web", passing=True)
        assert (health["Node"]["Node"], health["Service"]["Tags"]) == ("n1", ["v1"])
        assert client.catalog.datacenters() == ["dc1"]
        assert client.status.leader() == tcp(config).removeprefix("http://")
        assert client.status.peers() == [client.status.leader()]
        assert client.catalog.deregister("n1", check_id="service:web-1")
        assert "web" in client.catalog.services()[1], "a check is no service and no node"
        assert client.catalog.deregister("n1", service_id="web-1")
        assert client.catalog.services()[1] == {"db": []}
        assert client.catalog.deregister("n1")
        assert client.catalog.nodes()[1] == []

    with_server(config, scenario)


def test_a_consul_client_librarys_blocking_query_returns_with_the_change(config):
    async def scenario(ours):
        client = library(config)
        index, nodes = await asyncio.to_thread(client.catalog.nodes)
        assert (int(index), nodes) == (1, [])
        waiting = asyncio.create_task(
            asyncio.to_thread(client.catalog.nodes, index=index, wait="30s")
        )
        await ours.register(NODE, [])
        later, nodes = await asyncio.wait_for(waiting, 20)
        assert int(later) > int(index)
        assert [one["Node"] for one in nodes] == ["n1"]

    with_server(config, scenario)


# Requests.


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("GET", "/v1/config/mesh?dc=elsewhere", None, 500, "No path to datacenter"),
        ("GET", "/v1/catalog/nodes?stale&consistent", None, 400, "Cannot specify ?stale with"),
        ("GET", "/v1/kv/x", None, 404, "Invalid URL path: not a recognized HTTP API endpoint"),
        ("POST", "/v1/config", b"{}", 405, "method POST not allowed"),
        ("GET", "/v1/config/mesh?ns=A_B", None, 400, 'Invalid query parameter: "ns"'),
        ("GET", "/v1/config/service-defaults/x?ns=*", None, 400, "a wildcard is not possible"),
        ("GET", "/v1/config/service-defaults?filter=Nmae==web", None, 400, "column 1: "),
        ("GET", "/v1/catalog/nodes?filter=Node", None, 400, "Failed to create filter"),
        ("PUT", "/v1/config?ns=b", b'{"Kind":"service-defaults","Name":"a","namespace":"c"}', 400,
         "Namespace is 'c' in the body and 'b' in the query"),
        ("PUT", "/v1/config?ns=b", b'{"Kind":"mesh"}', 400, "Request decoding failed: Namespace"),
        ("PUT", "/v1/catalog/register", b'{"Node":"n","Address":"a","Datacenter":"x"}', 500,
         "No path to datacenter"),
        ("PUT", "/v1/catalog/register", b'{"Node":"n","Address":"a","Check":{"Name":"c"}}', 400,
         "Health checks are not supported"),
        ("PUT", "/v1/catalog/register", b'{"Node":"n","SkipNodeUpdate":true}', 400, "Must provide"),
        ("PUT", "/v1/catalog/register", b'{"Node":"n","Address":"a","Service":7}', 400, "decoding"),
        ("PUT", "/v1/catalog/register", b'{"Node":7,"Address":"a"}', 400, "Expected `str`"),
        ("PUT", "/v1/catalog/deregister", b'{"Node":7}', 400, "node is no text"),
        ("PUT", "/v1/tidegate/ca/rotate?keep=soon", None, 403, "on the unix socket only"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_gets_consuls_status_and_words(
    config, method, path, body, status, text
):
    async def scenario(client):
        answer = await ask(config, method, path, data=body)
        assert answer[0] == status
        assert text in answer[2]
        assert (await client.snapshot()).index == 1

    with_server(config, scenario)


def test_keys_of_a_registration_are_taken_in_any_case_and_null_is_nothing(config):
    async def scenario(client):
        body = {
            "node": "n1", "ADDRESS": "10.0.0.1", "NodeMeta": None,
            "service": {"service": "web", "id": None, "tags": None, "port": 80,
                        "taggedAddresses": {"virtual": {"address": "10.96.0.1", "port": 443}}},
        }  # fmt: skip
        assert (await ask(config, "PUT", "/v1/catalog/register", json=body))[0] == 200
        (instance,) = await client.instances()
        assert (instance.id, instance.port) == ("web", 80)
        assert (instance.virtual_addresses, instance.virtual_port) == (
            ("10.96.0.1",), 443,
        )  # fmt: skip

    with_server(config, scenario)


def test_pretty_answers_are_indented_and_say_what_holds_without_intentions(config):
    async def scenario(client):
        await client.write_entry(Mesh())
        _, headers, text = await ask(config, "GET", "/v1/config/mesh/mesh?pretty")
        assert text.startswith('{\n    "Kind": "mesh",\n')
        assert headers["X-Consul-Default-Acl-Policy"] == "allow"

    allowing = msgspec.structs.replace(config, default_intention_policy=IntentionPolicy.ALLOW)
    with_server(allowing, scenario)


def test_entries_live_in_namespaces_and_partitions(config):
    async def scenario(client):
        for query in ("", "?ns=b", "?ns=b&partition=east", "?partition=east"):
            body = {"Kind": "service-defaults", "Name": "web"}
            assert (await ask(config, "PUT", f"/v1/config{query}", json=body))[2] == "true"

        async def found(query):
            entries = await get(config, f"/v1/config/service-defaults{query}")
            return [(one["Namespace"], one["Partition"]) for one in entries]

        assert await found("") == [("default", "default")]
        assert await found("?ns=b") == [("b", "default")]
        assert await found("?ns=*&partition=east") == [("b", "east"), ("default", "east")]
        header = {"X-Consul-Namespace": "b", "X-Consul-Partition": "east"}
        _, _, text = await ask(config, "GET", "/v1/config/service-defaults/web", headers=header)
        assert json.loads(text)["Namespace"] == "b"
        assert (await ask(config, "DELETE", "/v1/config/service-defaults/web?ns=b"))[2] == "{}"
        assert await found("?ns=*") == [("default", "default")]
        assert len(await client.read_entries(Kind.SERVICE_DEFAULTS)) == 3

    with_server(config, scenario)


def test_filters_hold_on_every_kind_and_on_the_catalog(config):
    async def scenario(client):
        await client.write_entry(Mesh(allow_enabling_permissive_mutual_tls=True))
        await client.register(NODE, [pod("a", "10.1.0.1"), pod("b", "10.1.0.2", service="db")])
        for path, count in (
            ("/v1/config/mesh?filter=AllowEnablingPermissiveMutualTLS == true", 1),
            ("/v1/config/mesh?filter=AllowEnablingPermissiveMutualTLS == false", 0),
            ("/v1/catalog/nodes?filter=Address matches `^10`", 1),
            ("/v1/catalog/service/web?filter=ServicePort == 80", 1),
            ('/v1/catalog/services?filter=ServiceKind == "connect-proxy"', 2),
            ('/v1/health/service/web?filter=Service.ID == "nobody"', 0),
            ('/v1/catalog/nodes?node-meta=tidegate-agent-api:unix:///a', 1),
            ("/v1/catalog/nodes?node-meta=rack:7", 0),
            ("/v1/catalog/connect/web", 1),
            ("/v1/health/connect/web", 1),
        ):  # fmt: skip
            assert len(await get(config, path)) == count, path
        path = '/v1/catalog/node-services/n1?filter=Kind == ""'
        assert [one["Service"] for one in (await get(config, path))["Services"]] == ["db", "web"]
        assert await get(config, "/v1/catalog/node-services/no") == {"Node": None, "Services": []}

    with_server(config, scenario)


def pod(name, *addresses, service="web", **more):
    return Instance(
        id=name,
        name=name,
        service=service,
        node="n1",
        addresses=addresses,
        port=80,
        meshed=True,
        agent_api="unix:///a",
        **more,
    )


def test_all_that_an_instance_is_survives_the_catalog_and_its_further_ports_are_services(config):
    async def scenario(client):
        instance = pod(
            "p",
            "10.1.0.1",
            service="east/billing/web",
            more_ports=(ServicePort(service="east/billing/admin", port=9090),),
            virtual_addresses=("10.96.0.7", "fd00::7"),
            virtual_port=8000,
            upstreams=("east/billing/db",),
            registered_mode=MutualTLSMode.PERMISSIVE,
        )
        await client.register(NODE, [instance])
        (found,) = await client.instances()
        assert msgspec.structs.replace(found, seen_from=0.0) == instance
        (admin,) = await get(config, "/v1/catalog/service/admin?ns=billing&partition=east")
        assert (admin["ServiceID"], admin["ServicePort"]) == ("p-port-9090", 9090)
        (web,) = await get(config, "/v1/catalog/service/web?ns=billing&partition=east")
        assert web["ServiceTaggedAddresses"]["virtual"] == {"Address": "10.96.0.7", "Port": 8000}
        assert await get(config, "/v1/catalog/service/web") == []
        fewer = msgspec.structs.replace(instance, more_ports=())
        await client.register(NODE, [fewer])
        assert await get(config, "/v1/catalog/service/admin?ns=billing&partition=east") == []
        await client.deregister("n1", "p")
        assert await get(config, "/v1/catalog/services?ns=*&partition=*") == {}
        (departed,) = await client.instances()
        assert departed.seen_until

    with_server(config, scenario)


def test_what_has_not_changed_is_the_same_object_and_what_has_departed_is_kept_once(config):
    async def scenario(client):
        await client.register(NODE, [pod("a", "10.1.0.1"), pod("b", "10.1.0.2")])
        await client.deregister("n1", "a")
        before = {one.id: one for one in await client.instances()}
        await client.register(NODE, [pod("b", "10.1.0.2", upstreams=("db",))])
        after = {one.id: one for one in await client.instances()}
        assert after["a"] is before["a"]
        assert (before["b"].upstreams, after["b"].upstreams) == ((), ("db",))
        assert client._said.keys() == {*map(_digest, after.values())}

    def _digest(instance):
        return hashlib.sha256(msgspec.json.encode(instance)).digest()

    with_server(config, scenario)


def test_whoever_knows_what_the_catalog_has_is_not_sent_it_again(config, monkeypatch):
    async def scenario(client):
        await client.register(NODE, [pod("a", "10.1.0.1")])
        known = await client.snapshot()

        async def nothing():
            raise AssertionError("it was asked for")

        monkeypatch.setattr(client, "snapshot", nothing)
        await client.register(NODE, [pod("a", "10.1.0.1"), pod("b", "10.1.0.2")], known)
        await client.deregister("n1", "a", known)
        monkeypatch.undo()
        found = {one.id: bool(one.seen_until) for one in await client.instances()}
        assert found == {"a": True, "b": False}

    with_server(config, scenario)


def test_an_instance_of_another_mesh_is_known_among_agents_and_found_by_no_caller(config):
    async def scenario(client):
        theirs = pod("p", "10.1.0.1", service="east/billing/web", of_another=True)
        theirs = msgspec.structs.replace(
            theirs, meshed=True, inbound_port=15006, applied_index=7, mode=MutualTLSMode.PERMISSIVE
        )
        await client.register(NODE, [theirs])
        (found,) = await client.instances()
        assert msgspec.structs.replace(found, seen_from=0.0) == theirs
        tenancy = "ns=billing&partition=east"
        assert await get(config, f"/v1/catalog/service/web?{tenancy}") == []
        assert await get(config, f"/v1/catalog/connect/web?{tenancy}") == []
        assert await get(config, f"/v1/health/connect/web?{tenancy}") == []
        # It gets a sidecar of tidegate's, and is one of the service's instances from then on.
        own = msgspec.structs.replace(theirs, of_another=False)
        await client.register(NODE, [own])
        assert len(await get(config, f"/v1/catalog/connect/web?{tenancy}")) == 1
        await client.register(NODE, [theirs])
        assert await get(config, f"/v1/catalog/connect/web?{tenancy}") == []
        await client.deregister("n1", "p")
        assert not (await client.snapshot()).living()

    with_server(config, scenario)


def test_a_leaf_is_of_its_namespace_and_partition(config):
    async def scenario(client):
        leaf = await client.leaf("east/billing/web", 60)
        assert leaf.spiffe_uri == "spiffe://mesh.consul/ap/east/ns/billing/dc/dc1/svc/web"
        assert leaf.service == "east/billing/web"

    with_server(config, scenario)


def test_roots_are_listed_one_by_one_and_can_be_rotated(config):
    async def scenario(client):
        before = await client.roots()
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(unix(config).removeprefix("unix://"))
            ) as session,
            session.put("http://x/v1/tidegate/ca/rotate?keep=1h") as response,
        ):
            assert response.status == 200
        listed = await get(config, "/v1/agent/connect/ca/roots")
        assert [root["Active"] for root in listed["Roots"]] == [True, False]
        assert listed["Roots"][1]["RootCert"].strip() == before.strip()
        leaf = await client.leaf("web", 60)
        issued = x509.load_pem_x509_certificate(leaf.certificate_pem.encode())
        root = x509.load_pem_x509_certificate(listed["Roots"][0]["RootCert"].encode())
        issued.verify_directly_issued_by(root)

    with_server(config, scenario)


# Tokens.

SECRETS = {"reader": "r" * 20, "agent": "a" * 20, "admin": "o" * 20}


@pytest.fixture
def guarded(config, tmp_path):
    rights = {
        "reader": (Right.CONFIG_READ, Right.CATALOG_READ),
        "agent": (Right.CONFIG_READ, Right.CATALOG_WRITE, Right.IDENTITY_WRITE),
        "admin": (Right.CONFIG_WRITE, Right.CATALOG_WRITE, Right.OPERATOR_WRITE),
    }
    tokens = []
    for name, secret in SECRETS.items():
        file = tmp_path / name
        file.write_text(secret + "\n")
        file.chmod(0o600)
        tokens.append(TokenConfig(name=name, secret_file=file, rights=rights[name]))
    return msgspec.structs.replace(config, tokens=tuple(tokens))


def test_a_token_allows_what_its_rights_say_and_a_refusal_is_in_consuls_words(guarded):
    async def scenario(local):
        async def refused(name, request):
            secret = SECRETS.get(name, name)
            async with CatalogClient(tcp(guarded), Access(token=secret)) as client:
                try:
                    await request(client)
                except CatalogRefused as error:
                    return error.text if error.status == 403 else str(error)
            return ""

        def write(client):
            return client.write_entry(Mesh())

        def read(client):
            return client.snapshot()

        def publish(client):
            return client.register(NODE, [])

        def leaf(client):
            return client.leaf("web", 60)

        lacks = "Permission denied: token with AccessorID '{}' lacks permission '{}'"
        assert await refused("reader", read) == ""
        assert await refused("reader", write) == lacks.format("reader", "config:write")
        assert await refused("reader", publish) == lacks.format("reader", "catalog:write")
        assert await refused("agent", publish) == ""
        assert await refused("agent", leaf) == ""
        assert await refused("admin", leaf) == lacks.format("admin", "identity:write")
        assert await refused("admin", write) == ""
        assert await refused("nonsense", read) == "ACL not found"
        assert await refused("", read) == (
            "Permission denied: anonymous token lacks permission 'config:read'. The anonymous token"
            " is used implicitly when a request does not specify a token."
        )
        assert await refused("", lambda client: client.roots()) == ""
        assert (await local.leaf("web", 60)).key_pem, "the unix socket needs none"

    with_server(guarded, scenario)


@pytest.mark.parametrize(
    "request_of",
    [
        lambda secret: {"headers": {"X-Consul-Token": secret}},
        lambda secret: {"headers": {"Authorization": f"Bearer {secret}"}},
        lambda secret: {"params": {"token": secret}},
    ],
)
def test_a_token_is_found_where_consul_looks_for_it(guarded, request_of):
    async def scenario(_):
        path = "/v1/catalog/nodes"
        assert (await ask(guarded, "GET", path, **request_of(SECRETS["reader"])))[0] == 200
        assert (await ask(guarded, "GET", path, **request_of("x" * 20)))[0] == 403

    with_server(guarded, scenario)


def test_a_consul_client_library_is_told_that_it_lacks_a_token(guarded):
    def scenario(_):
        with pytest.raises(consul.ACLPermissionDenied, match="anonymous token lacks"):
            library(guarded).catalog.nodes()
        assert library(guarded, token=SECRETS["agent"]).catalog.register("n1", "10.0.0.1")

    with_server(guarded, scenario)


def test_without_tokens_the_right_to_write_includes_the_right_to_read_and_keys_stay_local():
    writer = Token(name="w", secret="s", rights=frozenset([Right.CONFIG_WRITE]))
    assert writer.allows(Right.CONFIG_READ)
    assert not writer.allows(Right.CATALOG_READ)
    assert "s'" not in repr(writer).replace("Token('w')", "")
    nobody = Tokens()
    assert nobody.refusal(Right.CONFIG_WRITE, "anything", local=False) == ""
    assert nobody.refusal(Right.IDENTITY_WRITE, "", local=False).startswith("Permission denied")
    assert nobody.refusal(Right.IDENTITY_WRITE, "", local=True) == ""


# TLS.


def test_https_is_for_clients_that_trust_it_and_that_it_trusts(guarded, tmp_path):
    authority = certificate(tmp_path, "ca")
    (ca_file, _), _, _ = authority
    (cert, key), _, _ = certificate(tmp_path, "server", authority)
    (client_cert, client_key), _, _ = certificate(tmp_path, "client", authority)
    address = f"https://127.0.0.1:{free_port()}"
    secure = msgspec.structs.replace(
        guarded,
        listen=(unix(guarded), address),
        tls=TLSFiles(cert_file=cert, key_file=key, client_ca_file=ca_file),
    )

    async def scenario(_):
        trusting = Access(token=SECRETS["agent"], ca_file=ca_file)
        known = msgspec.structs.replace(trusting, client_cert=client_cert, client_key=client_key)
        async with CatalogClient(address, known) as client:
            assert (await client.leaf("web", 60)).key_pem
        for access, reason in ((Access(), "certificate is not trusted"), (trusting, "no server")):
            async with CatalogClient(address, access) as client:
                with pytest.raises(CatalogUnreachable, match=reason):
                    await client.roots()

    with_server(secure, scenario)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("listen: https://10.0.0.1:8501", "tls: is missing, and https needs it"),
        ("listen: https://10.0.0.1:8501\ntls: {cert_file: /c, key_file: /k}",
         "tokens: are missing, and others than this machine reach 10.0.0.1"),
        ("listen: http://10.0.0.1:8500", "listen: 'http://10.0.0.1:8500' is no address to listen on"),
        ("listen: []", "listen: is empty"),
        ("tokens: [{name: a, secret_file: /nowhere, rights: []}]", "tokens[0].secret_file: /nowhere"),
        ("tokens: [{name: a, secret_file: SECRET, rights: [config:own]}]", "Invalid enum value"),
        ("tokens: [{name: a, secret_file: OPEN, rights: []}]", "has mode 0644"),
        ("tokens: [{name: a, secret_file: SHORT, rights: []}]", "holds no secret; expected 16"),
        ("tokens: [{name: a, secret_file: SECRET, rights: []}, {name: b, secret_file: SECRET, rights: []}]",
         "tokens[1].secret_file: holds the secret of another token"),
    ],
)  # fmt: skip
def test_a_configuration_that_would_open_the_server_is_refused(tmp_path, text, fault):
    for name, content, mode in (
        ("SECRET", "s" * 16, 0o600), ("OPEN", "s" * 16, 0o644), ("SHORT", "s", 0o600),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
        text = text.replace(name, str(tmp_path / name))
    file = tmp_path / "server.yaml"
    file.write_text(f"state_dir: /x\ntrust_domain: a.consul\n{text}\n")
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert fault in str(caught.value)


def test_a_tls_file_that_is_none_is_told_when_the_server_starts(config, tmp_path):
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    broken = msgspec.structs.replace(config, tls=TLSFiles(cert_file=wrong, key_file=wrong))
    with pytest.raises(InputError, match=r"tls: cannot be used: .*; expected PEM files"):
        with_server(broken, lambda _: None)


def test_an_entry_of_another_partition_is_read_by_its_key(config):
    async def scenario(client):
        entry = ServiceDefaults(name="web", namespace="b", partition="east")
        assert await client.write_entry(entry)
        key = EntryKey(Kind.SERVICE_DEFAULTS, "web", "b", "east")
        assert (await client.read_entry(key)).key == key
        assert await client.delete_entry(key)
        assert await client.read_entries() == ()

    with_server(config, scenario)
