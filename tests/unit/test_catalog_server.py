"""Server and client of the catalog over a real unix socket, and the `config` commands on top."""

import argparse
import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import aiohttp
import msgspec
import pytest
from cryptography import x509

from tidegate.catalog import transport as transport_module
from tidegate.catalog.client import CatalogClient, CatalogRefused, CatalogUnreachable, NodeInfo
from tidegate.catalog.server import MAX_BODY, running
from tidegate.catalog.settings import IntentionPolicy, ServerConfig, load_config
from tidegate.cli import config as commands
from tidegate.errors import InputError, TidegateError
from tidegate.intent.entries import EntryKey, Kind, Mesh, ServiceDefaults, parse_entries
from tidegate.model import Instance, MutualTLSMode

PERMISSIVE = MutualTLSMode.PERMISSIVE
NODE = NodeInfo(name="n1", address="10.0.0.1", agent_api="unix:///run/a.sock")
OPEN_GATE = Mesh(allow_enabling_permissive_mutual_tls=True)


@pytest.fixture
def config(tmp_path):
    return ServerConfig(
        state_dir=tmp_path / "state",
        listen=f"unix://{tmp_path}/server.sock",
        trust_domain="mesh.consul",
    )


def with_server(config, scenario):
    """Runs `scenario(client)` against a server that is up meanwhile."""

    async def both():
        async with running(config), CatalogClient(config.listen) as client:
            return await asyncio.wait_for(scenario(client), 60)

    return asyncio.run(both())


async def ask(config, method, path, **more):
    """Status, headers and text of a plain HTTP request, as any Consul tool would make it."""
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(config.listen.removeprefix("unix://"))
        ) as session,
        session.request(method, "http://x" + path, **more) as response,
    ):
        return response.status, response.headers, await response.text()


def pod(name="a", *, meshed=True, **more):
    return Instance(
        id=f"id-{name}",
        name=name,
        service="api",
        node="n1",
        addresses=("10.1.0.1", "fd00::1"),
        port=8080,
        meshed=meshed,
        agent_api="unix:///run/a.sock",
        **more,
    )


# Config entries.


def test_entries_are_written_read_listed_and_deleted(config):
    async def scenario(client):
        assert await client.write_entry(OPEN_GATE)
        assert await client.write_entry(ServiceDefaults(name="api", mutual_tls_mode=PERMISSIVE))
        entry = await client.read_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
        assert entry.mutual_tls_mode is PERMISSIVE
        assert [one.kind for one in await client.read_entries()] == ["mesh", "service-defaults"]
        assert await client.read_entries(Kind.SERVICE_DEFAULTS) == (entry,)
        assert not await client.write_entry(ServiceDefaults(name="api"), cas=entry.modify_index + 1)
        assert await client.write_entry(ServiceDefaults(name="api"), cas=entry.modify_index)
        assert not await client.delete_entry(
            EntryKey(Kind.SERVICE_DEFAULTS, "api"), cas=entry.modify_index
        )
        assert await client.delete_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
        with pytest.raises(CatalogRefused) as caught:
            await client.read_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
        assert caught.value.status == 404

    with_server(config, scenario)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("GET", "/v1/config/service-defaults/x", None, 404,
         'Config entry not found for "service-defaults" / "x"'),
        ("GET", "/v1/config/nonsense", None, 400, "invalid config entry kind: nonsense"),
        ("GET", "/v1/config/mesh?filter=x", None, 400,
         "Failed to create filter: filter: column 2: "),
        ("GET", "/v1/config/mesh?index=x", None, 400, "Invalid index"),
        ("GET", "/v1/config/mesh?index=1&wait=long", None, 400, "Invalid wait time"),
        ("PUT", "/v1/config", b"{", 400, "Request decoding failed: "),
        ("PUT", "/v1/config", b"[" * 100_000, 400, "Request decoding failed: "),
        ("PUT", "/v1/config", b"\xff\xfe", 400, "Request decoding failed: "),
        ("PUT", "/v1/config", b"[]", 400, "Request decoding failed: "),
        ("PUT", "/v1/config", b'{"Kind": "x"}', 400,
         "Request decoding failed: Kind: invalid config entry kind: 'x'"),
        ("PUT", "/v1/config", b'{"Kind": "mesh", "Foo": 1}', 400, "Foo: is not a field here"),
        ("PUT", "/v1/config?cas=-1", b'{"Kind": "mesh"}', 400, "Bad cas value"),
        ("PUT", "/v1/config", b" " * (MAX_BODY + 1), 413, ""),
        ("PUT", "/v1/config",
         b'{"Kind": "service-defaults", "Name": "a", "MutualTLSMode": "permissive"}', 500,
         "cannot set MutualTLSMode=permissive because AllowEnablingPermissiveMutualTLS=false"
         " in the mesh config entry"),
        ("DELETE", "/v1/config/mesh/mesh?cas=x", None, 400, "Bad cas value"),
        ("POST", "/v1/config", b"{}", 405, ""),
        ("GET", "/v1/nothing", None, 404, ""),
        ("PUT", "/v1/catalog/register", b'{"Node": "n"}', 400, "Must provide Address"),
        ("PUT", "/v1/catalog/register", b'{"Node": "n", "Address": "a", "Service": {}}', 400,
         "Request decoding failed"),
        ("PUT", "/v1/catalog/register",
         b'{"Node": "n", "Address": "a", "Service": {"Service": "s", "Port": 70000}}', 400,
         "Invalid Service.Port 70000"),
        ("PUT", "/v1/catalog/deregister", b"{}", 400, "Must provide Node"),
        ("GET", "/v1/agent/connect/ca/leaf/..%2Fx", None, 400, "Invalid service name"),
        ("GET", "/v1/agent/connect/ca/leaf/api?ttl=1000h", None, 400, "Invalid ttl"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_consuls_status_and_text(config, method, path, body, status, text):
    async def scenario(client):
        answer = await ask(config, method, path, data=body)
        assert answer[0] == status
        assert text in answer[2]
        assert (await client.snapshot()).entries == ()

    with_server(config, scenario)


def test_two_clients_racing_with_compare_and_set_cannot_both_win(config):
    async def scenario(client):
        async with CatalogClient(config.listen) as other:
            await client.write_entry(ServiceDefaults(name="api"))
            for number in range(20):
                index = (
                    await client.read_entry(EntryKey(Kind.SERVICE_DEFAULTS, "api"))
                ).modify_index
                won = await asyncio.gather(
                    *(
                        one.write_entry(
                            ServiceDefaults(name="api", meta={"by": f"{number}{who}"}), cas=index
                        )
                        for who, one in enumerate((client, other))
                    )
                )
                assert sorted(won) == [False, True]

    with_server(config, scenario)


# Blocking queries.


def test_a_blocking_query_returns_when_its_topic_changes_and_sleeps_through_others(config):
    async def scenario(client):
        await client.write_entry(ServiceDefaults(name="api"))
        _, headers, _ = await ask(config, "GET", "/v1/config/service-defaults")
        index = headers["X-Consul-Index"]
        waiting = asyncio.create_task(
            ask(config, "GET", f"/v1/config/service-defaults?index={index}&wait=30s")
        )
        await client.register(NODE, [pod()])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.2)
        await client.write_entry(ServiceDefaults(name="web"))
        status, headers, text = await asyncio.wait_for(waiting, 10)
        assert status == 200
        assert int(headers["X-Consul-Index"]) > int(index)
        assert [entry["Name"] for entry in json.loads(text)] == ["api", "web"]

    with_server(config, scenario)


def test_a_blocking_query_returns_unchanged_when_its_time_is_over(config):
    async def scenario(client):
        _, headers, _ = await ask(config, "GET", "/v1/catalog/nodes")
        index = headers["X-Consul-Index"]
        _, after, text = await ask(config, "GET", f"/v1/catalog/nodes?index={index}&wait=50ms")
        assert (after["X-Consul-Index"], text) == (index, "[]")

    with_server(config, scenario)


def test_waiting_for_an_index_that_is_from_another_store_returns_at_once(config):
    async def scenario(client):
        assert await asyncio.wait_for(client.wait(10_000, 300), 10) < 10_000

    with_server(config, scenario)


def test_the_client_waits_for_the_first_change_of_all(config):
    async def scenario(client):
        waiting = asyncio.create_task(client.wait((await client.snapshot()).index, 30))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting), 0.2)
        await client.write_entry(Mesh())
        assert await asyncio.wait_for(waiting, 10) == (await client.snapshot()).index

    with_server(config, scenario)


def test_a_server_that_stops_answers_the_queries_that_wait(config):
    async def both():
        async with CatalogClient(config.listen) as client:
            async with running(config):
                waiting = asyncio.create_task(client.wait(1, 500))
                await client.snapshot()
            assert await asyncio.wait_for(waiting, 20) == 1

    asyncio.run(both())


# The catalog.


def test_an_instance_is_published_with_its_sidecar_and_taken_back(config):
    async def scenario(client):
        await client.register(NODE, [pod(meshed=False)])
        (plain,) = await client.instances()
        meshed = pod(mode=PERMISSIVE, applied_index=3)
        await client.register(NODE, [meshed])
        (instance,) = await client.instances()
        assert await client.nodes() == (NODE,)
        assert not plain.meshed
        assert msgspec.structs.replace(instance, seen_from=0.0) == meshed
        assert instance.seen_from == plain.seen_from > 0
        await client.register(NODE, [pod(meshed=False)])
        assert not (await client.instances())[0].meshed
        await client.deregister("n1", "id-a")
        (departed,) = await client.instances()
        assert departed.seen_until >= departed.seen_from
        assert (await client.snapshot()).living() == {}

    with_server(config, scenario)


def test_publishing_the_same_again_sends_and_changes_nothing(config, monkeypatch):
    async def scenario(client):
        await client.register(NODE, [pod()])
        before = (await client.snapshot()).index
        await client.register(NODE, [pod()])
        async with CatalogClient(config.listen) as fresh:
            await fresh.register(NODE, [pod()])
            monkeypatch.setattr(fresh, "_put", None)
            await fresh.register(NODE, [pod()])
        assert (await client.snapshot()).index == before

    with_server(config, scenario)


def test_the_catalog_answers_in_consuls_json(config):
    async def scenario(client):
        await client.register(NODE, [pod(mode=PERMISSIVE)])

        async def get(path):
            return json.loads((await ask(config, "GET", path))[2])

        (node,) = await get("/v1/catalog/nodes")
        assert (node["Node"], node["Address"], node["Datacenter"]) == ("n1", "10.0.0.1", "dc1")
        assert await get("/v1/catalog/services") == {"api": [], "api-sidecar-proxy": []}
        (service,) = await get("/v1/catalog/service/api")
        assert service["ServiceTaggedAddresses"] == {
            "lan_ipv4": {"Address": "10.1.0.1", "Port": 8080},
            "lan_ipv6": {"Address": "fd00::1", "Port": 8080},
        }
        (proxy,) = await get("/v1/catalog/service/api-sidecar-proxy")
        assert (proxy["ServiceKind"], proxy["ServicePort"]) == ("connect-proxy", 20000)
        assert proxy["ServiceProxy"] == {
            "DestinationServiceName": "api",
            "DestinationServiceID": "id-a",
            "LocalServicePort": 8080,
            "Mode": "transparent",
            "MutualTLSMode": "permissive",
        }
        (health,) = await get("/v1/health/service/api")
        assert (health["Node"]["Node"], health["Service"]["ID"]) == ("n1", "id-a")
        assert await get("/v1/status/leader")

    with_server(config, scenario)


def test_a_snapshot_is_everything_and_is_not_sent_again_unchanged(config):
    async def scenario(client):
        await client.write_entry(Mesh())
        await client.register(NODE, [pod()])
        first = await client.snapshot()
        assert await client.snapshot() is first
        assert [entry.name for entry in first.entries] == ["mesh"]
        assert first.nodes == (NODE,)
        assert (first.trust_domain, first.datacenter, first.default_allow) == (
            "mesh.consul", "dc1", False,
        )  # fmt: skip
        await client.delete_entry(EntryKey(Kind.MESH, "mesh"))
        assert (await client.snapshot()).entries == ()

    with_server(config, scenario)


def test_a_store_made_anew_is_not_taken_for_the_old_one(config, tmp_path):
    async def both():
        async with CatalogClient(config.listen) as client:
            async with running(config):
                await client.write_entry(ServiceDefaults(name="old"))
                before = await client.snapshot()
            (tmp_path / "state" / "catalog.db").unlink()
            async with running(config):
                await client.write_entry(ServiceDefaults(name="new"))
                after = await client.snapshot()
        assert before.index == after.index
        assert [entry.name for entry in after.entries] == ["new"]

    asyncio.run(both())


def test_the_default_action_is_the_servers_to_say(config):
    allow = msgspec.structs.replace(config, default_intention_policy=IntentionPolicy.ALLOW)

    async def scenario(client):
        assert (await client.snapshot()).default_allow

    with_server(allow, scenario)


# Certificates.


def test_a_leaf_names_its_service_and_chains_to_the_roots(config):
    async def scenario(client):
        first, second = await client.leaf("api", 60), await client.leaf("api", 60)
        root = x509.load_pem_x509_certificate((await client.roots()).encode())
        leaf = x509.load_pem_x509_certificate(first.certificate_pem.encode())
        leaf.verify_directly_issued_by(root)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
            "spiffe://mesh.consul/ns/default/dc/dc1/svc/api"
        ]
        assert first.spiffe_uri == "spiffe://mesh.consul/ns/default/dc/dc1/svc/api"
        assert first.not_after == leaf.not_valid_after_utc.timestamp()
        assert first.serial != second.serial
        assert first.key_pem != second.key_pem
        assert "PRIVATE" not in repr(first)

    with_server(config, scenario)


def test_over_tcp_no_keys_are_handed_out(config):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tcp = msgspec.structs.replace(config, listen=f"http://127.0.0.1:{port}")

    async def scenario(client):
        assert await client.write_entry(Mesh())
        with pytest.raises(CatalogRefused) as caught:
            await client.leaf("api", 60)
        assert caught.value.status == 403

    with_server(tcp, scenario)


def test_the_certificate_authority_survives_a_restart_and_keeps_its_trust_domain(config):
    async def roots(client):
        return await client.roots()

    assert with_server(config, roots) == with_server(config, roots)
    other = msgspec.structs.replace(config, trust_domain="other.consul")
    with pytest.raises(InputError, match=r"'other.consul' is not the trust domain .* mesh.consul"):
        with_server(other, roots)


# Starting and stopping.


def test_the_socket_and_the_state_are_for_their_owner_only(config, tmp_path):
    async def scenario(client):
        await client.write_entry(Mesh())
        assert stat.S_IMODE((tmp_path / "server.sock").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700

    with_server(config, scenario)
    assert not (tmp_path / "server.sock").exists()


SERVER = """
import asyncio, sys
from pathlib import Path
from tidegate.catalog.server import serve
from tidegate.catalog.settings import load_config
asyncio.run(serve(load_config(Path(sys.argv[1]))))
"""


@contextlib.contextmanager
def server_process(config, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text(
        f"state_dir: {config.state_dir}\nlisten: {config.listen}\n"
        f"trust_domain: {config.trust_domain}\nleaf_lifetime: 30m\n"
    )
    with subprocess.Popen([sys.executable, "-c", SERVER, str(file)]) as process:
        try:
            deadline = time.monotonic() + 30
            while not answers(config):
                assert process.poll() is None
                assert time.monotonic() < deadline
            yield process
        finally:
            process.kill()


def answers(config):
    async def once():
        async with CatalogClient(config.listen) as client:
            try:
                await client.snapshot()
            except CatalogUnreachable:
                await asyncio.sleep(0.02)
                return False
            return True

    return asyncio.run(once())


def test_a_killed_server_is_replaced_and_what_it_acknowledged_is_there(config, tmp_path):
    async def write(client):
        await client.write_entry(ServiceDefaults(name="api"))

    async def talk():
        async with CatalogClient(config.listen) as client:
            await write(client)

    with server_process(config, tmp_path) as process:
        asyncio.run(talk())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    assert (tmp_path / "server.sock").exists()

    async def names(client):
        return [entry.name for entry in await client.read_entries()]

    assert with_server(config, names) == ["api"]


def test_the_server_ends_on_sigterm_and_takes_its_socket_along(config, tmp_path):
    with server_process(config, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not (tmp_path / "server.sock").exists()


def test_a_second_server_is_refused_and_the_first_goes_on(config, tmp_path):
    elsewhere = msgspec.structs.replace(config, state_dir=tmp_path / "other")
    same_state = msgspec.structs.replace(config, listen=f"unix://{tmp_path}/other.sock")

    async def scenario(client):
        with pytest.raises(TidegateError, match="another server listens on"):
            async with running(elsewhere):
                pass
        with pytest.raises(TidegateError, match=r"tidegate server .* uses the store"):
            async with running(same_state):
                pass
        assert await client.write_entry(Mesh())

    with_server(config, scenario)


def test_a_file_in_the_place_of_the_socket_is_left_alone(config, tmp_path):
    (tmp_path / "server.sock").write_text("precious")

    async def scenario(client):
        raise AssertionError("it started")

    with pytest.raises(TidegateError, match="is no socket"):
        with_server(config, scenario)
    assert (tmp_path / "server.sock").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("trust_domain: a.consul", "state_dir"),
        ("state_dir: /x\ntrust_domain: a.consul\nlisten_on: x", "listen_on"),
        ("state_dir: /x\ntrust_domain: A_B", "trust_domain: 'A_B' is not a trust domain"),
        ("state_dir: /x\ntrust_domain: a\nlisten: http://0.0.0.0:8500", "listen: "),
        ("state_dir: /x\ntrust_domain: a\nlisten: unix:///" + "x" * 120, "at most 107"),
        ("state_dir: /x\ntrust_domain: a\nleaf_lifetime: soon", "leaf_lifetime: 'soon'"),
        ("state_dir: /x\ntrust_domain: a\nleaf_lifetime: 0", "leaf_lifetime: 0"),
        ("state_dir: /x\ntrust_domain: a\ndatacenter: D C", "datacenter: 'D C' is not a name"),
        ("state_dir: /x\ntrust_domain: a\ndefault_intention_policy: maybe", "maybe"),
        (": : :", "server.yaml"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_server_configuration_is_refused_and_says_why(tmp_path, text, fault):
    file = tmp_path / "server.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert fault in str(caught.value)


# The client on its own.


def test_without_a_server_the_client_says_where_it_looked(tmp_path):
    async def ask_nobody():
        async with CatalogClient(f"unix://{tmp_path}/nobody.sock") as client:
            await client.snapshot()

    with pytest.raises(
        CatalogUnreachable,
        match=r"no server answers at .*/nobody\.sock \(No such file or directory\)",
    ):
        asyncio.run(ask_nobody())
    with pytest.raises(InputError):
        CatalogClient("/just/a/path")


EMPTY = (
    '{"Index": 1, "Datacenter": "", "TrustDomain": "", "DefaultAllow": false,'
    ' "Entries": [], "Nodes": [], "Instances": []}'
)


ODD = EMPTY.replace('"Instances": []', '"Instances": [{"id": 7}]')


@pytest.mark.parametrize("answer", ["not JSON", '{"Index": "x"}', ODD, EMPTY + " " * 5000])
def test_an_answer_that_makes_no_sense_or_is_too_long_is_refused(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(transport_module, "MAX_ANSWER_BYTES", 1000)

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\n\r\n"
        writer.write((head + answer).encode())
        await writer.drain()
        writer.close()

    async def scenario():
        path = tmp_path / "odd.sock"
        async with (
            await asyncio.start_unix_server(handle, path),
            CatalogClient(f"unix://{path}") as client,
        ):
            await client.snapshot()

    with pytest.raises((CatalogRefused, CatalogUnreachable)):
        asyncio.run(scenario())


def test_a_server_that_does_not_answer_is_given_up_on(tmp_path, monkeypatch):
    async def handle(reader, writer):
        await reader.read()
        writer.close()

    async def scenario():
        path = tmp_path / "mute.sock"
        async with (
            await asyncio.start_unix_server(handle, path),
            CatalogClient(f"unix://{path}") as client,
        ):
            await client._transport.ask("GET", "/v1/config/mesh", limit_s=0.1)

    with pytest.raises(CatalogUnreachable):
        asyncio.run(scenario())


# The commands.


@pytest.fixture
def command(config, monkeypatch, capsys):
    """Runs `tidegate config ...` against a server of its own: exit code, output, errors."""
    monkeypatch.setenv("TIDEGATE_HTTP_ADDR", config.listen)
    parser = argparse.ArgumentParser()
    commands.add_parser(parser.add_subparsers(dest="command"))

    def run(*words, given=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        args = parser.parse_args(["config", *words])
        status = args.run(args)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    up, stop = threading.Event(), threading.Event()

    async def server():
        async with running(config):
            up.set()
            await asyncio.to_thread(stop.wait, 60)

    thread = threading.Thread(target=lambda: asyncio.run(server()))
    thread.start()
    try:
        assert up.wait(30)
        yield run
    finally:
        stop.set()
        thread.join(30)


def test_the_commands_write_read_list_and_delete_as_consuls(command, tmp_path):
    gate = 'Kind = "mesh" AllowEnablingPermissiveMutualTLS = trueTransparentProxy { MeshDestinationsOnly = false}'
    status, out, err = command("write", "-", given=gate)
    assert (status, out) == (0, "Config entry written: mesh/mesh\n")
    assert err.startswith("WARNING: AllowEnablingPermissiveMutualTLS=true")
    file = tmp_path / "api.hcl"
    file.write_text('Kind = "service-defaults"Name = "api" MutualTLSMode = "permissive"')
    assert command("write", str(file))[0] == 0
    assert command("list", "-kind", "service-defaults") == (0, "api\n", "")
    status, out, _ = command("read", "-kind=service-defaults", "-name", "api")
    assert status == 0
    assert out.startswith('{\n    "Kind": "service-defaults",\n')
    index = json.loads(out)["ModifyIndex"]
    assert parse_entries(out, "-")[0].mutual_tls_mode is PERMISSIVE
    stale = ("-cas", "-modify-index", str(index - 1))
    assert command("write", *stale, "-", given='{"Kind": "service-defaults", "Name": "api"}') == (
        1, "", "Config entry not updated: service-defaults/api\n",
    )  # fmt: skip
    where = ("-kind", "service-defaults", "-name", "api")
    assert command("delete", *where, *stale) == (
        1, "", "Config entry not deleted: service-defaults/api\n",
    )  # fmt: skip
    assert command("delete", *where, "-cas", "-modify-index", str(index)) == (
        0, "Config entry deleted: service-defaults/api\n", "",
    )  # fmt: skip
    assert command("read", *where) == (
        1, "", "Error reading config entry service-defaults/api: Unexpected response code: 404"
        ' (Config entry not found for "service-defaults" / "api")\n',
    )  # fmt: skip


def test_a_closed_gate_is_told_in_consuls_words(command):
    text = 'Kind = "service-defaults" Name = "api" MutualTLSMode = "permissive"'
    assert command("write", "-", given=text) == (
        1, "", "Error writing config entry service-defaults/api: Unexpected response code: 500"
        " (cannot set MutualTLSMode=permissive because AllowEnablingPermissiveMutualTLS=false"
        " in the mesh config entry)\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("list",), "Must specify the -kind parameter"),
        (("read", "-kind", "mesh"), "Must specify the -name parameter"),
        (("delete", "-name", "x"), "Must specify the -kind parameter"),
        (("delete", "-kind", "mesh", "-name", "mesh", "-cas"), "-modify-index greater than 0"),
        (("write", "-modify-index", "3", "-"), "Cannot specify -modify-index without -cas"),
        (("list", "-kind", "mesh", "-http-addr", "unix:///nowhere"), "no server answers at"),
    ],
)
def test_a_command_that_lacks_something_exits_1(command, words, error):
    status, out, err = command(*words)
    assert (status, out) == (1, "")
    assert error in err


def test_a_wrong_file_is_bad_input(command, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"Kind = \xff")
    huge = tmp_path / "huge"
    huge.write_bytes(b"#" * (10 << 20))
    for file, fault in (
        (binary, "byte 7 is not UTF-8"),
        (huge, "is too large"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(InputError, match=fault) as caught:
            command("write", str(file))
        assert caught.value.exit_code == 1
