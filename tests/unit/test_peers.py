"""Agents of several machines among each other: over loopback, by certificates of a real intent server."""

import asyncio
import contextlib
import socket
import ssl
import time
from pathlib import Path

import aiohttp
import pytest

from tidegate.addresses import endpoint
from tidegate.catalog.client import WRONG_CLOCK_S, CatalogClient, NodeInfo, leaf_is_due
from tidegate.catalog.server import ServerConfig, running
from tidegate.errors import InputError, TidegateError
from tidegate.identity.spiffe import AGENT_SERVICE
from tidegate.model import Instance, Workload
from tidegate.node import api
from tidegate.node import mesh as mesh_module
from tidegate.node import peers as peers_module
from tidegate.node.config import AgentConfig
from tidegate.node.exchange import Exchange
from tidegate.node.intent import IntentSource
from tidegate.node.mesh import LocalEvidence, MeshView, NodeEvidence, NodeFlows
from tidegate.node.peers import Peers
from tidegate.node.problems import Problems
from tidegate.verdict.evidence import InstanceEvidence

DEADLINE_S = 10.0


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(peers_module, "LOOK_S", 0.02)


@pytest.fixture
def server(tmp_path):
    return ServerConfig(
        state_dir=tmp_path / "server",
        listen=f"unix://{tmp_path}/server.sock",
        trust_domain="mesh.consul",
    )


class Node:
    """What of an agent has to do with others."""

    def __init__(self, name, server, catalog, directory, address="127.0.0.1"):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        self.config = AgentConfig(
            node=name,
            server=server.listen,
            workloads=Path("/w"),
            peers=endpoint(address, port),
            node_addresses=(address,),
            trust_domain="mesh.consul",
        )
        self.name = name
        self.clock_off_s = 0.0
        self.hangs = False
        self.instance = Instance(
            id=f"id-{name}",
            name=f"api-{name}",
            service="api",
            node=name,
            meshed=True,
            agent_api=self.config.agent_api,
        )
        self.problems = Problems()
        intent = IntentSource(catalog, directory / f"{name}.json")
        self.intent = intent
        self.peers = Peers(self.config, catalog, intent, self.problems)
        local = LocalEvidence(self.evidence, self.flows)
        self.app = api.make_peer_app(local)
        self.mesh = MeshView(self.config, intent, catalog, local, self.peers.towards)

    async def evidence(self, _service, _window_s):
        if self.hangs:
            await asyncio.Event().wait()
        own = InstanceEvidence(instance=self.instance, created_at=0.0, inbound_redirected=True)
        at = time.time() + self.clock_off_s
        return NodeEvidence(node=self.name, at=at, instances=(own,))

    async def flows(self, _window_s):
        return NodeFlows(node=self.name, observed=(self.name,))

    @contextlib.asynccontextmanager
    async def running(self):
        stop = asyncio.Event()
        task = asyncio.create_task(self.peers.run(self.app, stop))
        try:
            await eventually(self.answers)
            yield self
        finally:
            stop.set()
            await task

    async def answers(self):
        await self.intent.refresh()
        return await connects(self.config.agent_api)

    async def knows_both(self):
        return len((await self.intent.refresh()).living()) == 2

    async def missing(self):
        """Why agents did not answer a question about all instances of the service."""
        judged = await self.mesh.judged("api", 60.0)
        return {one.node: one.reason for one in judged.evidence.nodes_missing}


async def connects(api_address):
    host, port = api_address.removeprefix("https://").rsplit(":", 1)
    try:
        _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    writer.close()
    return True


async def eventually(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.01)


def with_nodes(server, directory, scenario, address="127.0.0.1"):
    """Runs a scenario with two agents of different machines, in one mesh."""

    async def both():
        async with running(server), CatalogClient(server.listen) as catalog:
            one = Node("n1", server, catalog, directory, address)
            two = Node("n2", server, catalog, directory, address)
            async with one.running(), two.running():
                for node in (one, two):
                    info = NodeInfo(name=node.name, address=address)
                    await catalog.register(info, [node.instance])
                for node in (one, two):
                    await eventually(node.knows_both)
                await scenario(one, two, catalog)

    asyncio.run(both())


def context_of(leaf, roots, side=ssl.PROTOCOL_TLS_CLIENT):
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=roots)
    with peers_module._in_memory(leaf.certificate_pem + leaf.key_pem) as path:
        context.load_cert_chain(path)
    return context


async def refused(url, tls):
    """Whether whoever comes so gets no answer to what agents may ask."""
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(f"{url}/v1/node/flows", ssl=tls) as response:
                await response.read()
                return False
        except (aiohttp.ClientError, OSError):
            return True


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_an_agent_asks_those_of_other_machines(server, tmp_path, address):
    async def scenario(one, two, _catalog):
        assert await one.missing() == {}
        assert await two.missing() == {}
        judged = await one.mesh.judged("api", 60.0)
        assert {each.instance.node for each in judged.evidence.instances} == {"n1", "n2"}

    with_nodes(server, tmp_path, scenario, address)


def test_nothing_but_evidence_is_told_to_other_machines(server, tmp_path):
    async def scenario(one, two, _catalog):
        async with aiohttp.ClientSession() as session:
            for method, path in (
                ("GET", "/v1/status"),
                ("POST", "/v1/strict"),
                ("GET", "/metrics"),
                ("GET", "/v1/ready"),
            ):
                async with session.request(
                    method, two.config.agent_api + path, ssl=one.peers.towards()
                ) as response:
                    assert response.status == 404, path

    with_nodes(server, tmp_path, scenario)


def test_who_is_no_agent_of_the_mesh_gets_no_answer(server, tmp_path):
    async def scenario(one, two, catalog):
        url, roots = two.config.agent_api, await catalog.roots()
        assert not await refused(url, one.peers.towards())
        workload = context_of(await catalog.leaf("web", 600), roots)
        assert await refused(url, workload), "a workload of the same mesh"
        tenant = context_of(await catalog.leaf(f"east/default/{AGENT_SERVICE}", 600), roots)
        assert await refused(url, tenant), "the same name in another partition"
        nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        nobody.check_hostname = False
        nobody.verify_mode = ssl.CERT_NONE
        assert await refused(url, nobody), "no certificate"
        assert await refused(url.replace("https", "http"), None), "no TLS"

    with_nodes(server, tmp_path, scenario)


def test_an_answer_of_who_is_no_agent_is_not_taken(server, tmp_path):
    async def scenario(one, two, catalog):
        leaf, roots = await catalog.leaf("web", 600), await catalog.roots()
        heard = []

        async def answer(reader, writer):
            heard.append(await reader.read(1000))
            writer.close()

        tls = context_of(leaf, roots, ssl.PROTOCOL_TLS_SERVER)
        liar = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
        port = liar.sockets[0].getsockname()[1]
        async with liar:
            assert await refused(f"https://127.0.0.1:{port}", one.peers.towards())
        assert not any(heard), "it is not even asked"

    with_nodes(server, tmp_path, scenario)


def test_a_node_that_answers_for_another_one_is_missing(server, tmp_path):
    async def scenario(one, two, _catalog):
        two.name = "n3"
        assert "n3 answers at https://" in (await one.missing())["n2"]

    with_nodes(server, tmp_path, scenario)


@pytest.mark.parametrize(
    ("off_s", "words"),
    [(600.0, "its clock is 10 m ahead of"), (-600.0, "its clock is 10 m behind"), (0.5, "")],
)
def test_the_evidence_of_a_node_whose_clock_is_wrong_is_missing(server, tmp_path, off_s, words):
    async def scenario(one, two, _catalog):
        two.clock_off_s = off_s
        assert words in (await one.missing()).get("n2", "")
        assert bool(words) == ("n2" in await one.missing())

    with_nodes(server, tmp_path, scenario)


def test_a_node_that_takes_the_question_and_never_answers_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(mesh_module, "PEER_TIMEOUT_S", 0.2)

    async def scenario(one, two, _catalog):
        two.hangs = True
        assert "n2" in await one.missing()

    with_nodes(server, tmp_path, scenario)


def test_questions_go_on_while_the_root_is_exchanged_and_the_former_one_is_trusted(
    server, tmp_path
):
    async def scenario(one, two, catalog):
        before = {node.name: node.peers.towards() for node in (one, two)}
        await catalog.rotate_root(3600)

        async def renewed():
            for node in (one, two):
                await node.intent.refresh()
                assert await node.missing() == {}
            return all(node.peers.towards() is not before[node.name] for node in (one, two))

        await eventually(renewed)
        assert await one.missing() == {}

    with_nodes(server, tmp_path, scenario)


def test_a_certificate_is_renewed_before_it_ends(server, tmp_path, monkeypatch):
    async def scenario(one, _two, _catalog):
        first = one.peers.towards()
        began = peers_module.time.time()
        monkeypatch.setattr(peers_module.time, "time", lambda: began + 0.7 * 3600)

        async def renewed():
            return one.peers.towards() is not first

        await eventually(renewed)

    with_nodes(server, tmp_path, scenario)


@pytest.mark.parametrize(
    ("now", "not_after", "is_due"),
    [
        (1000.0, 4600.0, False),
        (1000.0 + 0.6 * 3600, 4600.0, False),
        (1000.0 + 0.7 * 3600, 4600.0, True),
        # The clock was set back since, by little or by much: of the leaf's life nothing is known.
        (999.0, 4600.0, True),
        (-86400.0, 4600.0, True),
        # The clock is ahead of the server's: it would be due at every look.
        (1000.0, 500.0, False),
        (1000.0 + WRONG_CLOCK_S, 500.0, True),
    ],
)
def test_a_leaf_that_was_fetched_by_a_wrong_clock_is_renewed_and_not_at_every_look(
    now, not_after, is_due
):
    assert leaf_is_due(now, 1000.0, not_after) is is_due


def test_a_port_that_is_taken_is_told_and_tried_again(server, tmp_path):
    async def both():
        async with running(server), CatalogClient(server.listen) as catalog:
            node = Node("n1", server, catalog, tmp_path)
            place = node.config.agent_api.removeprefix("https://").rsplit(":", 1)
            stop = asyncio.Event()
            await node.intent.refresh()
            with socket.create_server((place[0], int(place[1]))):
                task = asyncio.create_task(node.peers.run(node.app, stop))

                async def told():
                    return any("are not answered at" in problem for problem in node.problems)

                await eventually(told)

            async def well():
                return not list(node.problems)

            await eventually(well)
            assert await node.answers()
            stop.set()
            await task

    asyncio.run(both())


def test_without_a_place_for_others_nobody_is_asked_over_the_network(server, tmp_path):
    config = AgentConfig(node="n1", server=server.listen, trust_domain="mesh.consul")
    alone = Peers(config, None, None, Problems())
    asyncio.run(alone.run(None, asyncio.Event()))
    with pytest.raises(TidegateError, match="has no `peers`"):
        alone.towards()
    assert config.agent_api == "unix:///run/tidegate/agent.sock"


def test_no_workload_gets_the_certificate_of_agents(server, tmp_path):
    config = AgentConfig(node="n1", server=server.listen, trust_domain="mesh.consul")
    exchange = Exchange(config, None, None, Problems(), lambda: None)
    pod = Workload(id="p", name="p", service=AGENT_SERVICE, node="n1", netns="/n", meshed=True)
    with pytest.raises(InputError, match="that of the agents themselves"):
        exchange._identities(pod)
