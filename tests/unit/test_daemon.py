"""The agent's rounds with a real intent server and real workload files; only the kernel's evidence is a stand-in."""

import asyncio
import concurrent.futures
import contextlib
import time

import msgspec
import pytest

from tidegate.catalog.client import CatalogClient
from tidegate.catalog.server import ServerConfig, running
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.model import Instance, Workload
from tidegate.node import daemon as daemon_module
from tidegate.node.config import AgentConfig
from tidegate.node.daemon import Daemon, run_agent
from tidegate.node.mesh import NodeEvidence, NodeFlows
from tidegate.observe.labels import Labels

DEADLINE_S = 20.0


class Observation:
    """Stands for node.observation: remembers what it was asked to observe."""

    def __init__(self):
        self.labels = Labels()
        self.attached = {}
        self.detached = []
        self.failing = None
        self.closed = False

    def look(self, living):
        pass

    def attach(self, workload):
        self.attached[workload.key] = workload

    def unclaimed(self, living):
        keys = {workload.key for workload in living}
        return tuple(key for key in self.attached if key not in keys)

    def detach(self, key):
        self.detached.append(self.attached.pop(key).name)

    def collect(self, _now, keepers):
        list(keepers)
        if self.failing:
            raise self.failing

    def evidence(self, _service, _since, _until, _keepers):
        return NodeEvidence()

    def flows(self, _since, _until, _keepers):
        return NodeFlows(node="n1")

    def problems(self):
        return ()

    def problem(self, _workload):
        return ""

    def observed_since(self, _workload):
        return 1.0

    def close(self):
        self.closed = True


class Node:
    """One node's agent: its files, its server's address, its observation."""

    def __init__(self, directory):
        self.config = AgentConfig(
            node="n1",
            server=f"unix://{directory}/server.sock",
            workloads=directory / "workloads",
            run_dir=directory / "run",
            state_dir=directory / "state",
            socket=directory / "agent.sock",
            bpffs=directory / "bpf",
            trust_domain="mesh.consul",
        )
        self.server = ServerConfig(
            state_dir=directory / "server", listen=self.config.server, trust_domain="mesh.consul"
        )
        self.observation = Observation()
        self.config.workloads.mkdir()
        self.config.state_dir.mkdir()

    def file(self, name):
        return self.config.workloads / f"{name}.json"

    def put(self, file, **fields):
        whole = {
            "id": f"id-{file}",
            "name": file,
            "service": file,
            "node": "n1",
            "netns": f"/nowhere/{file}",
            "addresses": ("10.0.0.1",),
            "port": 8080,
        }
        workload = Workload(**{**whole, **fields})
        self.file(file).write_bytes(msgspec.json.encode(workload))

    @contextlib.asynccontextmanager
    async def agent(self):
        stop = asyncio.Event()
        async with CatalogClient(self.config.server) as catalog:
            worker = concurrent.futures.ThreadPoolExecutor(1)
            daemon = Daemon(self.config, catalog, worker, self.observation)
            rounds = asyncio.create_task(daemon.run(stop))
            try:
                yield daemon
            finally:
                stop.set()
                await asyncio.wait_for(rounds, DEADLINE_S)
                await daemon.close()


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setattr(daemon_module, "ROUND_S", 0.01)
    return Node(tmp_path)


async def eventually(condition):
    """The first true answer of an asynchronous condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := await condition()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)
    return answer


async def status_where(daemon, condition):
    async def found():
        status = await daemon._status()
        return status if condition(status) else None

    return await eventually(found)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_an_agent_without_its_server_observes_and_says_so_and_finds_the_server_later(node):
    node.put("api")

    async def scenario():
        async with node.agent() as daemon:
            status = await status_where(daemon, lambda status: status.round_at)
            assert [one.name for one in status.workloads] == ["api"]
            assert any("no server answers" in problem for problem in status.problems)
            assert [one.name for one in node.observation.attached.values()] == ["api"]
            async with running(node.server), CatalogClient(node.config.server) as catalog:

                async def published():
                    return [one.name for one in await catalog.instances()] == ["api"]

                await eventually(published)
                await status_where(daemon, lambda status: not status.problems)
        assert node.observation.closed

    run(scenario())


def test_a_broken_workload_file_is_told_and_stops_no_other(node):
    node.file("broken").write_text('{"id": ')
    node.put("api")

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            status = await status_where(daemon, lambda status: status.workloads)
            assert [one.name for one in status.workloads] == ["api"]
            assert any("broken.json" in problem for problem in status.problems)
            node.put("broken")
            await status_where(daemon, lambda status: len(status.workloads) == 2)

    run(scenario())


def test_a_workload_with_an_invalid_service_name_is_told_and_stops_no_other(node):
    node.put("a-bad", service="Not_A_Name", meshed=True)
    node.put("b-worse", service="x" * 3000, name="../../../b", meshed=True)
    node.put("z-good")

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            async with CatalogClient(node.config.server) as catalog:

                async def published():
                    return "z-good" in [one.name for one in await catalog.instances()]

                await eventually(published)
            problems = (await status_where(daemon, lambda one: one.round_at)).problems
            assert any("a-bad cannot be meshed: " in problem for problem in problems)
            assert any("../../../b cannot be meshed: " in problem for problem in problems)
            assert any("does not take ../../../b: " in problem for problem in problems)
            for name in ("a-bad", "b-worse"):
                node.file(name).unlink()
            await status_where(daemon, lambda status: not status.problems)

    run(scenario())


def test_a_workload_that_goes_leaves_observation_and_catalog(node):
    node.put("api")
    node.put("web")

    async def scenario():
        async with running(node.server), node.agent(), CatalogClient(node.config.server) as catalog:

            async def living():
                return {one.name for one in await catalog.instances() if not one.seen_until}

            async def is_living(names):
                await eventually(lambda: _equal(living(), names))

            await is_living({"api", "web"})
            node.file("web").unlink()
            await is_living({"api"})
        assert node.observation.detached == ["web"]

    run(scenario())


async def _equal(awaited, value):
    return await awaited == value


def test_a_file_that_breaks_while_the_agent_is_away_takes_nothing_away(node):
    node.put("api")
    node.put("web")

    async def scenario():
        async with running(node.server), CatalogClient(node.config.server) as catalog:

            async def living():
                return {one.name for one in await catalog.instances() if not one.seen_until}

            async with node.agent():
                await eventually(lambda: _equal(living(), {"api", "web"}))
            left = node.config.run_dir / "sidecars" / "web-0"
            left.mkdir(parents=True)
            node.file("web").write_text("{")
            async with node.agent() as daemon:
                await status_where(daemon, lambda status: status.workloads)
                first = (await daemon._status()).round_at
                await status_where(daemon, lambda status: status.round_at > first)
                assert await living() == {"api", "web"}
                assert node.observation.detached == []
                assert left.exists()
                node.put("web", id="id-web-anew")
                await status_where(daemon, lambda status: len(status.workloads) == 2)
                await eventually(lambda: _equal(_exists(left), False))
                assert "web" in node.observation.detached

    run(scenario())


async def _exists(path):
    return path.exists()


def test_before_its_first_round_an_agent_has_no_evidence_to_give(node):
    async def scenario():
        async with CatalogClient(node.config.server) as catalog:
            worker = concurrent.futures.ThreadPoolExecutor(1)
            daemon = Daemon(node.config, catalog, worker, node.observation)
            with pytest.raises(TidegateError, match="n1 has not looked around yet"):
                await daemon._evidence("api", 60.0)
            verdict = await daemon._mesh.verdict("api", 60.0)
            assert any("has not looked around" in one.message for one in verdict.reasons)
            await daemon.close()

    run(scenario())


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KernelError("map gone"), "map gone"),
        (OSError(5, "I/O"), "I/O"),
        (RuntimeError("x"), "a defect of the agent"),
    ],
)
def test_a_round_that_fails_is_told_and_tried_again(node, error, told):
    node.observation.failing = error

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            status = await status_where(daemon, lambda status: status.problems)
            assert any(told in problem for problem in status.problems)
            node.observation.failing = None
            await status_where(daemon, lambda status: status.round_at and not status.problems)

    run(scenario())


def test_an_instance_in_the_catalog_that_cannot_be_called_is_told(node):
    node.put("api")
    bad = Instance(
        id="bad", name="bad", service="bad", node="n2", port=80, meshed=True, inbound_port=70000,
        addresses=("10.0.0.9",),
    )  # fmt: skip

    async def scenario():
        async with node.agent() as daemon:
            known = daemon._intent.current()
            daemon._intent._snapshot = msgspec.structs.replace(known, instances=(bad,))
            status = await status_where(daemon, lambda one: any("bad" in p for p in one.problems))
            assert any("not called with mTLS: bad on n2" in one for one in status.problems)

    run(scenario())


@pytest.mark.parametrize("field", ["run_dir", "state_dir"])
def test_a_directory_that_cannot_be_made_is_an_error_for_a_person(node, tmp_path, field):
    (tmp_path / "file").write_text("")
    config = msgspec.structs.replace(node.config, **{field: tmp_path / "file" / "x"})
    with pytest.raises(TidegateError, match="cannot be used"):
        asyncio.run(run_agent(config))
