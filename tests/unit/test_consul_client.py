"""The client, and what an agent goes by, against a Consul server: documented behaviour, and every fault of it."""

import asyncio
import functools
import json
import re
from pathlib import Path

import pytest
from consul_double import ConsulDouble

from tidegate.catalog import consul as consul_module
from tidegate.catalog import history as history_module
from tidegate.catalog.access import Access
from tidegate.catalog.client import CatalogClient, CatalogRefused, CatalogUnreachable
from tidegate.catalog.consul import next_index
from tidegate.catalog.history import History
from tidegate.catalog.registration import NodeInfo
from tidegate.catalog.settings import IntentionPolicy, ServerConfig
from tidegate.cli.main import main
from tidegate.errors import InputError
from tidegate.identity.ca import MeshCA
from tidegate.intent.entries import Action, EntryKey, Kind, ServiceIntentions, Source
from tidegate.model import Instance, MutualTLSMode
from tidegate.node import intent as intent_module
from tidegate.node import running as running_module
from tidegate.node.config import load_config
from tidegate.node.intent import IntentSource

WEB = {
    "ID": "web-1",
    "Service": "web",
    "Address": "10.2.0.1",
    "Port": 80,
    "TaggedAddresses": {"virtual": {"Address": "10.96.0.7", "Port": 80}},
}
WEB_PROXY = {
    "ID": "web-1-proxy",
    "Service": "web-sidecar-proxy",
    "Kind": "connect-proxy",
    "Address": "10.2.0.1",
    "Port": 20000,
    "Proxy": {
        "DestinationServiceName": "web",
        "DestinationServiceID": "web-1",
        "MutualTLSMode": "permissive",
        "Upstreams": [{"DestinationType": "service", "DestinationName": "api"}],
    },
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(consul_module, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(consul_module, "PACE_S", 0.01)
    monkeypatch.setattr(consul_module, "WAIT_S", 0.5)


def in_a_loop(scenario):
    """A test that is a coroutine."""

    @functools.wraps(scenario)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(scenario(*args, **kwargs), 60))

    return run


async def until(condition, deadline_s=20):
    """Waits until the coroutine function answers something that is true, and returns that."""
    async with asyncio.timeout(deadline_s):
        while not (found := await condition()):  # noqa: ASYNC110 - what it waits for rings no bell
            await asyncio.sleep(0.01)
        return found


async def names(client):
    return [entry.name for entry in (await client.snapshot()).entries]


# What is there.


@in_a_loop
async def test_everything_is_put_together_from_consuls_own_endpoints():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.write(
            Kind="service-defaults", Name="web", Protocol="http", RateLimits={"X": 1}
        )
        await server.write(
            Kind="service-intentions",
            Name="api",
            Sources=[{"Name": "web", "Action": "allow", "Precedence": 9, "Type": "consul"}],
        )
        await server.add("n1", "10.0.0.1", WEB, WEB_PROXY)
        await server.add("n2", "10.0.0.2")
        snapshot = await client.snapshot()
        assert [entry.key for entry in snapshot.entries] == [
            EntryKey(Kind.SERVICE_DEFAULTS, "web"),
            EntryKey(Kind.SERVICE_INTENTIONS, "api"),
        ]
        assert snapshot.nodes == (
            NodeInfo(name="n1", address="10.0.0.1"),
            NodeInfo(name="n2", address="10.0.0.2"),
        )
        (web,) = snapshot.instances
        assert (web.id, web.service, web.node, web.addresses) == (
            "web-1",
            "web",
            "n1",
            ("10.2.0.1",),
        )
        assert (web.meshed, web.mode, web.registered_mode) == (
            True, MutualTLSMode.PERMISSIVE, MutualTLSMode.PERMISSIVE,
        )  # fmt: skip
        assert (web.virtual_addresses, web.upstreams) == (("10.96.0.7",), ("api",))
        assert (snapshot.trust_domain, snapshot.datacenter) == ("east.consul", "east")
        assert not snapshot.default_allow


@in_a_loop
async def test_between_services_without_intention_holds_what_the_server_says_or_the_configuration():
    async with ConsulDouble() as server:
        server.policy = "allow"
        async with CatalogClient(server.address) as client:
            assert (await client.snapshot()).default_allow
        denying = Access(default_intention_policy=IntentionPolicy.DENY)
        async with CatalogClient(server.address, denying) as client:
            assert not (await client.snapshot()).default_allow


@in_a_loop
async def test_entries_are_written_in_a_form_that_the_community_edition_takes():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        key = EntryKey(Kind.SERVICE_INTENTIONS, "api")
        allow = ServiceIntentions(name="api", sources=(Source(name="web", action=Action.ALLOW),))
        assert await client.write_entry(allow)
        entry = await client.read_entry(key)
        assert not await client.write_entry(entry, cas=entry.modify_index - 1)
        assert await client.write_entry(entry, cas=entry.modify_index)
        assert [one.key for one in await client.read_entries()] == [key]
        assert not await client.delete_entry(key, cas=1)
        assert await client.delete_entry(key)
        with pytest.raises(CatalogRefused, match='Config entry not found for "service-intentions"'):
            await client.read_entry(key)


@in_a_loop
async def test_a_workload_is_published_once_and_its_leaf_is_consuls(tmp_path):
    ca = MeshCA.create(tmp_path / "ca", "east.consul")
    async with ConsulDouble(ca) as server, CatalogClient(server.address) as client:
        node = NodeInfo(name="n1", address="10.0.0.1", agent_api="unix:///a")
        pod = Instance(
            id="p",
            name="p",
            service="web",
            node="n1",
            addresses=("10.2.0.1",),
            port=80,
            meshed=True,
            agent_api="unix:///a",
        )
        await client.register(node, [pod])

        async def published():
            living = (await client.snapshot()).living()
            return "p" in living and living["p"].meshed

        await until(published)
        before = len(server.requests)
        await client.register(node, [pod])
        assert [request for request in server.requests[before:] if request[0] == "PUT"] == []
        assert node in await client.nodes()
        leaf = await client.leaf("web", 60)
        assert leaf.spiffe_uri == "spiffe://east.consul/ns/default/dc/east/svc/web"
        assert await client.roots() == ca.roots_pem
        await client.deregister("n1", "p")

        async def departed():
            return (await client.instances())[0].seen_until

        assert await until(departed) >= (await client.instances())[0].seen_from


# Following it.


@in_a_loop
async def test_a_change_is_followed_without_asking_for_the_rest_again():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.add("n1", "10.0.0.1", WEB)
        first = await client.snapshot()
        assert await client.snapshot() is first
        waiting = asyncio.create_task(client.wait(first.index, 30))
        await server.write(Kind="mesh", Name="mesh")
        assert await waiting > first.index
        assert await until(lambda: names(client)) == ["mesh"]
        asked = {path for method, path, query in server.requests if "index" in query}
        assert {"/v1/config/mesh", "/v1/catalog/nodes", "/v1/catalog/node-services/n1"} <= asked


@in_a_loop
async def test_nodes_and_instances_come_and_go_and_who_was_there_is_remembered():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.add("n1", "10.0.0.1", WEB)
        assert list((await client.snapshot()).living()) == ["web-1"]
        await server.add("n2", "10.0.0.2", WEB | {"ID": "web-2", "Address": "10.2.0.2"})

        async def living(*ids):
            return sorted((await client.snapshot()).living()) == sorted(ids)

        await until(lambda: living("web-1", "web-2"))
        await server.remove("n1")
        await until(lambda: living("web-2"))
        (gone,) = [one for one in await client.instances() if one.seen_until]
        assert (gone.id, gone.addresses) == ("web-1", ("10.2.0.1",))
        assert [node.name for node in await client.nodes()] == ["n2"]


@in_a_loop
async def test_an_index_that_goes_backwards_is_begun_anew():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.write(Kind="mesh", Name="mesh")
        await client.snapshot()
        del server.entries["mesh", "mesh"]
        await server.restore(3)
        await server.write(Kind="service-defaults", Name="old")

        async def is_old():
            return await names(client) == ["old"]

        await until(is_old)
        await server.write(Kind="service-defaults", Name="new")

        async def has_new():
            return await names(client) == ["old", "new"]

        await until(has_new)
        assert (await client.snapshot()).index == server.index


@pytest.mark.parametrize(
    ("asked", "answered", "following"),
    [(0, 7, 7), (7, 9, 9), (7, 7, 7), (9, 7, 0), (0, 0, 1), (7, 0, 0)],
)
def test_the_next_index_is_by_consuls_rules(asked, answered, following):
    assert next_index(asked, answered) == following


# Faults.


@in_a_loop
async def test_a_server_that_fails_is_told_in_its_words_and_followed_again_afterwards():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.write(Kind="mesh", Name="mesh")
        assert await names(client) == ["mesh"]
        await server.fail(500)

        async def refused():
            try:
                await client.snapshot()
            except CatalogRefused as error:
                return str(error)
            return ""

        told = await until(refused)
        assert told == "Unexpected response code: 500 (rpc error: No cluster leader)"
        await server.fail(0)
        await server.write(Kind="service-defaults", Name="api")

        async def followed():
            return not await refused() and await names(client) == ["mesh", "api"]

        await until(followed)


@in_a_loop
async def test_an_answer_that_is_not_consuls_is_told_until_it_is_again():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.write(Kind="mesh", Name="mesh")
        await client.snapshot()
        server.text = "<html>Sign in</html>"
        await server.fail(0)

        async def refused():
            try:
                await client.snapshot()
            except CatalogRefused as error:
                return str(error)
            return ""

        assert "answers something else than expected" in await until(refused)
        assert await refused(), "it is told for as long as it lasts"
        server.text = None

        async def followed():
            return not await refused()

        await until(followed)
        assert await names(client) == ["mesh"]


@in_a_loop
async def test_a_server_that_is_gone_is_unreachable_and_followed_when_it_is_back():
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        await server.write(Kind="mesh", Name="mesh")
        await client.snapshot()
        await server.stop()

        async def unreachable():
            try:
                await client.snapshot()
            except CatalogUnreachable:
                return True
            return False

        await until(unreachable)
        server.index = 3
        await server.start()

        async def back():
            return not await unreachable()

        await until(back)
        assert await names(client) == ["mesh"]


@in_a_loop
async def test_a_token_is_needed_and_one_that_was_replaced_is_read_again(tmp_path):
    file = tmp_path / "token"
    async with ConsulDouble(token="good-token") as server:
        async with CatalogClient(server.address) as client:
            with pytest.raises(CatalogRefused, match="anonymous token lacks permission"):
                await client.read_entries()
        file.write_text("stale-token\n")
        async with CatalogClient(server.address, Access(token_file=file)) as client:
            with pytest.raises(CatalogRefused, match="ACL not found"):
                await client.read_entries()
            file.write_text("good-token\n")
            assert await client.read_entries() == ()
            await client.snapshot()
        async with CatalogClient(server.address, Access(token="good-token")) as client:
            await client.snapshot()


@pytest.mark.parametrize(
    ("access", "fault"),
    [
        (Access(token_file=Path("/nowhere/token")), "token_file: /nowhere/token: No such file"),
        (Access(ca_file=Path("/nowhere/ca.pem")), "cannot be used: No such file"),
        (Access(client_cert=Path("/x.pem")), "client_cert, client_key: one of them is missing"),
    ],
)
def test_files_that_are_wrong_are_told_before_anything_is_asked(access, fault):
    with pytest.raises(InputError, match=fault):
        CatalogClient("https://consul.example:8501", access)


def test_what_is_said_of_datacenter_and_partition_is_in_every_query_and_no_secret_in_a_repr():
    access = Access(token="secret", datacenter="dc2", partition="east", stale=True)
    assert access.query == {"dc": "dc2", "partition": "east", "stale": ""}
    assert "secret" not in repr(access)


# What an agent goes by.


@in_a_loop
async def test_an_agent_keeps_to_the_last_good_answer_over_a_restart_and_says_how_old_it_is(
    tmp_path, monkeypatch
):
    path = tmp_path / "intent.json"
    async with ConsulDouble() as server:
        await server.write(Kind="service-defaults", Name="web")
        await server.add("n1", "10.0.0.1", WEB)
        async with CatalogClient(server.address) as client:
            source = IntentSource(client, path)
            good = await source.refresh()
            assert source.problems() == ()
            await server.stop()

            async def is_told():
                return await source.refresh() == good and source.problems()

            (problem,) = await until(is_told)
            assert problem.startswith("no server answers at http://127.0.0.1:")
            assert "intent is 0 s old" in problem
        now = intent_module.time.time()
        monkeypatch.setattr(intent_module.time, "time", lambda: now + 90)
        async with CatalogClient(server.address) as client:
            restarted = IntentSource(client, path)
            assert restarted.current() == good
            assert await restarted.refresh() == good
            (problem,) = restarted.problems()
            assert "intent is 90 s old" in problem or "intent is 91 s old" in problem
            await server.start()
            await server.remove("n1", "web-1")

            async def follows():
                return not (await restarted.refresh()).living() and not restarted.problems()

            await until(follows)
            (gone,) = restarted.current().instances
            assert (gone.id, bool(gone.seen_until)) == ("web-1", True)


@in_a_loop
async def test_a_server_that_answers_slowly_holds_no_round_up(tmp_path, monkeypatch):
    monkeypatch.setattr(intent_module, "ANSWER_S", 0.05)
    async with ConsulDouble() as server, CatalogClient(server.address) as client:
        source = IntentSource(client, tmp_path / "intent.json")
        server.held = asyncio.Event()
        await source.refresh()
        assert not source.known
        assert source.problems() == ("the intent server does not answer within 0 s",)
        server.held.set()

        async def known():
            await source.refresh()
            return source.known and not source.problems()

        await until(known)


@in_a_loop
async def test_the_config_commands_work_against_consul(capsys, tmp_path):
    file = tmp_path / "api.hcl"
    file.write_text('Kind = "service-defaults" Name = "api" Protocol = "http"')
    async with ConsulDouble(token="good-token") as server:

        async def tidegate(*words):
            where = ("-http-addr", server.address, "-token", "good-token")
            status = await asyncio.to_thread(main, ["config", words[0], *where, *words[1:]])
            return status, capsys.readouterr()

        status, said = await tidegate("write", str(file))
        assert (status, said) == (0, ("Config entry written: service-defaults/api\n", ""))
        assert (await tidegate("list", "-kind", "service-defaults"))[1].out == "api\n"
        entry = json.loads(
            (await tidegate("read", "-kind", "service-defaults", "-name", "api"))[1].out
        )
        assert (entry["Protocol"], entry["ModifyIndex"]) == ("http", server.index)
        delete = ("delete", "-kind", "service-defaults", "-name", "api")
        assert (await tidegate(*delete, "-cas", "-modify-index", "1"))[0] == 1
        assert (await tidegate(*delete))[1].out == "Config entry deleted: service-defaults/api\n"
        assert server.entries == {}


def test_what_the_agents_configuration_says_of_consul_is_checked_before_anything_is_touched(
    tmp_path,
):
    document = (Path(__file__).parents[2] / "docs" / "catalog.md").read_text()
    said = re.search(r"^```yaml\n(server: https.*?)^```$", document, re.MULTILINE | re.DOTALL)[1]
    file = tmp_path / "agent.yaml"
    file.write_text(f"node: n1\nworkloads: /w\ntrust_domain: a.consul\n{said}")
    with pytest.raises(
        InputError, match=r"consul.token_file: /etc/tidegate/consul.token: No such file"
    ):
        load_config(file)
    file.write_text(file.read_text().replace("/etc/tidegate/", f"{tmp_path}/"))
    (tmp_path / "consul.token").write_text("secret")
    with pytest.raises(InputError, match="cannot be used: No such file"):
        load_config(file)
    kept = [
        line for line in file.read_text().splitlines() if ".pem" not in line and ".key" not in line
    ]
    file.write_text("\n".join(kept))
    access = load_config(file).consul
    assert (access.secret(), access.namespace, access.datacenter) == ("secret", "*", "dc1")
    assert access.default_intention_policy is IntentionPolicy.DENY


@in_a_loop
async def test_the_server_inside_an_agent_answers_as_any_other(tmp_path):
    config = ServerConfig(
        state_dir=tmp_path / "state", listen=f"unix://{tmp_path}/s.sock", trust_domain="a.consul"
    )
    async with running_module._embedded(config), CatalogClient(config.listen) as client:
        allow = Source(name="web", action=Action.ALLOW)
        assert await client.write_entry(ServiceIntentions(name="api", sources=(allow,)))
        assert (await client.snapshot()).trust_domain == "a.consul"


EMBEDDED = """
node: n1
workloads: /w
trust_domain: a.consul
server: unix:///run/tidegate/server.sock
embedded_server:
  state_dir: /var/lib/tidegate/server
  listen: [unix:///run/tidegate/server.sock, http://127.0.0.1:8500]
  trust_domain: a.consul
"""


@pytest.mark.parametrize(
    ("former", "later", "fault"),
    [
        ("", "", None),
        ("  trust_domain: a.consul", "  trust_domain: b.consul", "'b.consul' is not the agent's"),
        ("server: unix:///run", "server: unix:///elsewhere", "is not where the embedded server"),
        ("http://127.0.0.1:8500", "http://10.0.0.1:8500", "embedded_server.listen: "),
        ("state_dir", "state_directory", "embedded_server"),
    ],
)
def test_an_agent_that_is_the_server_too_says_what_of_that_cannot_be(
    tmp_path, former, later, fault
):
    file = tmp_path / "agent.yaml"
    file.write_text(EMBEDDED.replace(former, later))
    if fault is None:
        assert load_config(file).embedded_server.datacenter == "dc1"
        return
    with pytest.raises(InputError, match=fault):
        load_config(file)


# Who had which address.


def seen(name, *addresses, **more):
    return Instance(id=name, name=name, service="api", node="n", addresses=addresses, **more)


def test_history_tells_who_had_an_address_one_after_the_other():
    history = History()
    history.update([seen("a", "10.0.0.1", seen_from=5.0)], 10.0)
    history.update([seen("b", "10.0.0.1")], 20.0)
    found = history.update([seen("b", "10.0.0.2")], 30.0)
    assert [(one.id, one.addresses, one.seen_from, one.seen_until) for one in found] == [
        ("a", ("10.0.0.1",), 5.0, 20.0),
        ("b", ("10.0.0.1",), 20.0, 30.0),
        ("b", ("10.0.0.2",), 30.0, 0.0),
    ]
    again = History(found).update([seen("b", "10.0.0.2", meshed=True)], 40.0)
    assert [(one.id, one.seen_from, one.seen_until) for one in again] == [
        ("a", 5.0, 20.0),
        ("b", 20.0, 30.0),
        ("b", 30.0, 0.0),
    ]


def test_history_forgets_what_is_long_ago(monkeypatch):
    monkeypatch.setattr(history_module, "DEPARTED_KEPT", 2)
    history = History()
    for number in range(5):
        history.update([seen(f"p{number}", "10.0.0.1")], float(number))
    assert [one.id for one in history.update([], 5.0)] == ["p3", "p4"]
    assert history.update([], 5.5 + history_module.DEPARTED_KEPT_S) == ()
