"""`tidegate config` and `tidegate services`: Consul's flags, output and exit codes, over a server and over a file."""

import asyncio
import io
import json
import sys
import threading
from pathlib import Path

import pytest

from tidegate.catalog.client import CatalogClient
from tidegate.catalog.server import running
from tidegate.catalog.settings import ServerConfig
from tidegate.catalog.store import Store
from tidegate.cli import target
from tidegate.cli.main import main, make_parser
from tidegate.errors import InputError
from tidegate.intent.entries import EntryKey, Kind

GATE = 'Kind = "mesh" AllowEnablingPermissiveMutualTLS = true'
PERMISSIVE = 'Kind = "service-defaults" Name = "api" MutualTLSMode = "permissive"'


@pytest.fixture
def tidegate(monkeypatch, capsys):
    """Runs one command line: exit code, output, errors."""
    for name in ("TIDEGATE_LAB", "TIDEGATE_HTTP_ADDR", "CONSUL_HTTP_ADDR", "CONSUL_HTTP_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*words, given=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        try:
            status = main(list(words))
        except SystemExit as left:
            status = left.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def server(tmp_path, monkeypatch, tidegate):
    """The address of a server that the commands find by the environment."""
    config = ServerConfig(
        state_dir=tmp_path / "state",
        listen=f"unix://{tmp_path}/server.sock",
        trust_domain="mesh.consul",
    )
    up, stop = threading.Event(), threading.Event()

    async def serve():
        async with running(config):
            up.set()
            await asyncio.to_thread(stop.wait, 60)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert up.wait(30)
        monkeypatch.setenv("TIDEGATE_HTTP_ADDR", config.listen)
        yield config.listen
    finally:
        stop.set()
        thread.join(30)


@pytest.fixture(params=["server", "store"])
def where(request, tmp_path):
    """The options that name where the entries are: a server, or the file of a store."""
    if request.param == "store":
        return ("--store", str(tmp_path / "catalog.db"))
    return ("-http-addr", request.getfixturevalue("server"))


def test_the_documents_commands_work_the_same_over_a_server_and_over_a_file(tidegate, where):
    status, out, err = tidegate("config", "write", *where, "-", given=f"{GATE}\n{PERMISSIVE}")
    assert (status, out) == (
        0, "Config entry written: mesh/mesh\nConfig entry written: service-defaults/api\n",
    )  # fmt: skip
    assert err.count("WARNING: ") == 2
    tidegate("config", "write", *where, "-", given='Kind = "service-defaults" Name = "db"')
    list_ = ("config", "list", *where, "-kind", "service-defaults")
    assert tidegate(*list_) == (0, "api\ndb\n", "")
    assert tidegate(*list_, "-filter", 'MutualTLSMode == "permissive"') == (0, "api\n", "")
    assert tidegate(*list_, '--filter=MutualTLSMode != "permissive"') == (0, "db\n", "")
    read = ("config", "read", *where, "-kind=service-defaults", "--name", "api")
    status, out, _ = tidegate(*read)
    entry = json.loads(out)
    assert (entry["MutualTLSMode"], entry["Namespace"], entry["Partition"]) == (
        "permissive", "default", "default",
    )  # fmt: skip
    stale = ("-cas=true", "-modify-index", str(entry["ModifyIndex"] - 1))
    assert tidegate("config", "write", *where, *stale, "-", given=PERMISSIVE)[0] == 1
    delete = ("config", "delete", *where, "-kind", "service-defaults", "-name", "api")
    assert tidegate(*delete, *stale) == (1, "", "Config entry not deleted: service-defaults/api\n")
    assert tidegate(*delete) == (0, "Config entry deleted: service-defaults/api\n", "")
    assert tidegate(*delete) == (0, "Config entry deleted: service-defaults/api\n", "")
    assert tidegate(*read) == (
        1, "", "Error reading config entry service-defaults/api: Unexpected response code: 404"
        ' (Config entry not found for "service-defaults" / "api")\n',
    )  # fmt: skip


def test_a_closed_gate_refuses_the_same_over_a_server_and_over_a_file(tidegate, where):
    assert tidegate("config", "write", *where, "-", given=PERMISSIVE) == (
        1, "", "Error writing config entry service-defaults/api: Unexpected response code: 500"
        " (cannot set MutualTLSMode=permissive because AllowEnablingPermissiveMutualTLS=false"
        " in the mesh config entry)\n",
    )  # fmt: skip


def test_a_namespace_and_a_partition_hold_for_what_says_none_itself(tidegate, where):
    place = ("-namespace", "billing", "-partition=east")
    intention = (
        'Kind = "service-intentions" Name = "api" Sources = [{ Name = "web" Action = "allow" }]'
    )
    text = f'{intention}\nKind = "proxy-defaults" Name = "global"'
    assert tidegate("config", "write", *where, *place, "-", given=text)[0] == 0
    read = ("config", "read", *where, "-kind", "service-intentions", "-name", "api")
    assert tidegate(*read)[0] == 1
    entry = json.loads(tidegate(*read, *place)[1])
    (source,) = entry["Sources"]
    for raw in (entry, source):
        assert (raw["Namespace"], raw["Partition"]) == ("billing", "east")
    list_ = ("config", "list", *where, "-kind", "service-intentions")
    assert tidegate(*list_)[1] == ""
    assert tidegate(*list_, *place)[1] == "api\n"
    read = ("config", "read", *where, *place, "-kind", "proxy-defaults", "-name", "global")
    assert json.loads(tidegate(*read)[1])["Namespace"] == "default"
    other = 'Kind = "service-defaults" Name = "x" Namespace = "other"'
    status, out, err = tidegate("config", "write", *where, *place, "-", given=other)
    assert (status, out) == (1, "")
    assert "Namespace is 'other' in the body and 'billing' in the query" in err
    status, out, _ = tidegate("config", "delete", *where, *place, "-filename", "-", given=intention)
    assert (status, out) == (0, "Config entry deleted: service-intentions/api\n")
    assert tidegate(*list_, *place)[1] == ""


def test_json_says_the_same_to_a_pipeline(tidegate, where):
    status, out, err = tidegate("config", "write", *where, "--json", "-", given=GATE)
    (written,) = json.loads(out)
    assert (status, written["Kind"], written["Name"], written["Written"]) == (
        0,
        "mesh",
        "mesh",
        True,
    )
    assert err == f"WARNING: {written['Warnings'][0]}\n"
    (entry,) = json.loads(tidegate("config", "list", *where, "-kind", "mesh", "--json")[1])
    assert entry["AllowEnablingPermissiveMutualTLS"] is True
    delete = ("config", "delete", *where, "-kind", "mesh", "-name", "mesh", "--json")
    assert json.loads(tidegate(*delete)[1])["Deleted"] is True


@pytest.mark.parametrize(
    ("words", "given", "error"),
    [
        (("list", "-kind", "nonsense"), "", "invalid config entry kind: nonsense"),
        (("list", "-kind", "mesh", "-filter", "Nmae == x"), "", "column 1"),
        (("list", "-kind", "mesh", "-filter", "Name = mesh"), "", "\nName = mesh\n     ^"),
        (("write", "-"), 'Kind = "mash"', "standard input: "),
        (("write", "-cas", "-"), f"{GATE}\n{PERMISSIVE}", "Cannot specify -cas for several"),
        (("delete", "-filename", "-", "-kind", "mesh"), GATE, "Cannot specify -kind or -name"),
        (("delete", "-filename", "-"), f"{GATE}\n{PERMISSIVE}", "2 entries; expected one"),
        (("read", "-kind", "mesh"), "", "Must specify the -name parameter"),
    ],
)
def test_what_is_wrong_is_one_message_exits_1_and_changes_nothing(
    tidegate, server, words, given, error
):
    status, out, err = tidegate("config", *words, given=given)
    assert (status, out) == (1, "")
    assert error in err

    async def index():
        async with CatalogClient(server) as client:
            return (await client.snapshot()).index

    assert asyncio.run(index()) == 1


def test_a_store_that_a_server_runs_on_is_refused(tidegate, server, tmp_path):
    store = str(tmp_path / "state" / "catalog.db")
    status, out, err = tidegate("config", "list", "--store", store, "-kind", "mesh")
    assert (status, out) == (1, "")
    assert "a tidegate server (process " in err
    assert "uses the store" in err


def test_a_store_that_is_missing_is_made_by_a_write_only(tidegate, tmp_path):
    path = tmp_path / "catalog.db"
    where = ("--store", str(path))
    status, _, err = tidegate("config", "list", *where, "-kind", "mesh")
    assert (status, "there is no store at" in err, path.exists()) == (1, True, False)
    assert tidegate("config", "write", *where, "-", given=GATE)[0] == 0
    store = Store(path)
    assert [entry.key for entry in store.entries()] == [EntryKey(Kind.MESH, "mesh")]
    store.close()


# Which server.


def parsed(*words):
    return make_parser("config").parse_args(["config", "list", *words])


@pytest.fixture
def nothing_runs(tidegate, monkeypatch, tmp_path):
    monkeypatch.setattr(target, "SERVER_SOCKET", tmp_path / "no.sock")
    monkeypatch.setattr(target.state, "labs", list)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("words", "environment", "address"),
    [
        (("-http-addr", "10.0.0.1:8500"), {"CONSUL_HTTP_SSL": ""}, "http://10.0.0.1:8500"),
        (("--http-addr=https://c:8501",), {"TIDEGATE_HTTP_ADDR": "http://t:1"}, "https://c:8501"),
        ((), {"TIDEGATE_HTTP_ADDR": "http://t:1", "CONSUL_HTTP_ADDR": "c:2"}, "http://t:1"),
        ((), {"CONSUL_HTTP_ADDR": "c:8501", "CONSUL_HTTP_SSL": "true"}, "https://c:8501"),
    ],
)
def test_the_server_is_that_of_the_options_then_tidegates_then_consuls(
    monkeypatch, words, environment, address
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert target.server_address(parsed(*words)) == address


@pytest.mark.usefixtures("nothing_runs")
def test_consuls_variables_hold_for_a_server_that_is_named_and_options_win(monkeypatch, tmp_path):
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-the-environment")
    monkeypatch.setenv("CONSUL_CACERT", "/ca.pem")
    monkeypatch.setenv("CONSUL_NAMESPACE", "billing")
    assert target.access(parsed()).token == ""
    named = parsed("-http-addr", "http://c:8500", "-datacenter", "dc2", "-stale")
    access = target.access(named)
    assert (access.token, access.ca_file, access.namespace, access.datacenter, access.stale) == (
        "from-the-environment", Path("/ca.pem"), "billing", "dc2", True,
    )  # fmt: skip
    assert target.access(parsed("-http-addr", "x:1", "-token=mine")).token == "mine"
    file = tmp_path / "token"
    file.write_text("of-a-file\n")
    assert target.access(parsed("-token-file", str(file))).secret() == "of-a-file"
    with pytest.raises(InputError, match="/nowhere: No such file"):
        target.access(parsed("-token-file", "/nowhere")).secret()


# Services.

DEFINITION = """
service {
  name = "web"
  id = "web-1"
  port = 8080
  address = "10.2.0.1"
  tagged_addresses { virtual { address = "10.96.0.7" port = 80 } }
  connect {
    sidecar_service {
      proxy {
        mode = "transparent"
        mutual_tls_mode = "permissive"
        upstreams = [{ destination_name = "api" }]
      }
    }
  }
}
service { name = "admin" port = 9090 address = "10.2.0.1" }
"""


def test_service_definitions_are_registered_and_deregistered(tidegate, server, tmp_path):
    file = tmp_path / "web.hcl"
    file.write_text(DEFINITION)
    register = ("services", "register", "-node", "n1", str(file))
    status, out, err = tidegate(*register)
    assert (status, out) == (1, "")
    assert err.startswith('Error registering service "web-1": Unexpected response code: 400')
    assert tidegate(*register, "-node-address", "10.0.0.1") == (
        0,
        "Registered service: web-1\nRegistered service: web-1-sidecar-proxy\n"
        "Registered service: admin\n",
        "",
    )
    assert tidegate(*register)[0] == 0, "the node is known now"

    async def instances():
        async with CatalogClient(server) as client:
            return await client.instances()

    (web,) = asyncio.run(instances())
    assert (web.id, web.service, web.addresses, web.port) == ("web-1", "web", ("10.2.0.1",), 8080)
    assert (web.virtual_addresses, web.upstreams) == (("10.96.0.7",), ("api",))
    assert web.registered_mode == "permissive"
    assert [(one.service, one.port) for one in web.more_ports] == [("admin", 9090)]
    status, out, _ = tidegate("services", "deregister", "-node", "n1", str(file))
    assert status == 0
    assert out.splitlines()[-1] == "Deregistered service: web-1"
    assert all(one.seen_until for one in asyncio.run(instances()))


def test_services_of_a_wrong_file_are_not_registered(tidegate, server):
    status, out, err = tidegate("services", "register", "-", given="service { nmae = 1 }")
    assert (status, out) == (1, "")
    assert err.startswith("tidegate: standard input: ")


def test_a_root_is_rotated_and_the_former_one_is_trusted_as_long_as_it_is_kept(tidegate, server):
    before = json.loads(tidegate("ca", "roots", "--json")[1])["roots"]
    status, out, _ = tidegate("ca", "rotate", "--keep", "1h")
    assert status == 0
    active, trusted = out.splitlines()
    assert active.startswith("active ")
    assert before[0]["ID"] not in active
    assert trusted.startswith(f"trusted  {before[0]['ID']}  valid until ")
    # Once more, and the former one is not to be trusted at all.
    tidegate("ca", "rotate", "--keep", "0")
    roots = json.loads(tidegate("ca", "roots", "--json")[1])["roots"]
    assert [root["Active"] for root in roots] == [True, False]
    assert roots[1]["ID"] == before[0]["ID"]


def test_a_root_of_consul_is_left_to_consul_and_a_wrong_time_is_told(tidegate, tmp_path):
    assert tidegate("ca", "rotate", "--keep", "soon")[0] == 2

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def both():
        consul = await asyncio.start_unix_server(answer, tmp_path / "consul.sock")
        async with consul:
            address = f"unix://{tmp_path}/consul.sock"
            return await asyncio.to_thread(tidegate, "ca", "rotate", "-http-addr", address)

    status, _, err = asyncio.run(both())
    assert status == 1
    assert "consul connect ca set-config" in err
