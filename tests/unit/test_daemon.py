"""The agent's rounds with a real intent server and real workload files; only the kernel's evidence is a stand-in."""

import asyncio
import concurrent.futures
import contextlib
import errno
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from tidegate.catalog.client import CatalogClient
from tidegate.catalog.server import ServerConfig, running
from tidegate.enforce.sidecar import envoy as envoy_module
from tidegate.enforce.sidecar.files import SidecarFiles
from tidegate.enforce.sidecar.spec import SidecarSpec
from tidegate.errors import TidegateError
from tidegate.intent.entries import from_server
from tidegate.kernel.errors import KernelError
from tidegate.model import Instance, MutualTLSMode, ServicePort, Sidecar, Workload
from tidegate.node import daemon as daemon_module
from tidegate.node import intent as intent_module
from tidegate.node import keeper as keeper_module
from tidegate.node.config import AgentConfig
from tidegate.node.daemon import Daemon
from tidegate.node.holding import held_alone
from tidegate.node.mesh import NodeEvidence, NodeFlows
from tidegate.node.metrics import Observed
from tidegate.node.redirection import WorkloadRedirection
from tidegate.node.running import run_agent
from tidegate.observe.labels import Labels

DEADLINE_S = 20.0
NEVER_S = 3600.0


class Observation:
    """Stands for node.observation: remembers what it was asked to observe."""

    def __init__(self):
        self.labels = Labels()
        self.attached = {}
        self.detached = []
        self.failing = None
        self.closed = False
        self.did = []
        """In which order it was asked to attach and to collect."""

    def look(self, living):
        pass

    def unobserved(self, living):
        return [one for one in living if self.attached.get(one.key) != one]

    def attach(self, workload):
        self.did.append("attach")
        self.attached[workload.key] = workload

    def unclaimed(self, living):
        keys = {workload.key for workload in living}
        return tuple(key for key in self.attached if key not in keys)

    def detach(self, key):
        self.detached.append(self.attached.pop(key).name)

    def collect(self, _now, keepers):
        self.did.append("collect")
        list(keepers)
        if self.failing:
            raise self.failing

    def evidence(self, _service, _since, _until, _keepers):
        return NodeEvidence()

    def flows(self, _since, _until, _keepers):
        return NodeFlows(node="n1")

    def observed(self, _workloads):
        return Observed()

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
            await status_where(daemon, lambda _: node.observation.attached)
            assert [one.name for one in node.observation.attached.values()] == ["api"]
            async with running(node.server), CatalogClient(node.config.server) as catalog:

                async def published():
                    return [one.name for one in await catalog.instances()] == ["api"]

                await eventually(published)
                await status_where(daemon, lambda status: not status.problems)
        assert node.observation.closed

    run(scenario())


def test_a_round_goes_on_while_its_workloads_are_begun_to_be_observed(node, monkeypatch):
    monkeypatch.setattr(daemon_module, "OBSERVE_S", 0.0)
    for number in range(100):
        node.put(f"api-{number}")

    async def scenario():
        async with node.agent() as daemon:
            await status_where(daemon, lambda _: len(node.observation.attached) == 100)

    run(scenario())
    did = node.observation.did
    assert did.index("collect") < len(did) - 1 - did[::-1].index("attach")


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


def test_a_sidecar_whose_description_becomes_wrong_stays_as_it_is(node, monkeypatch):
    asked = []
    good = SidecarSpec(service="api", trust_domain="mesh.consul", port=8080)
    monkeypatch.setattr(keeper_module.Keeper, "spec", good)
    monkeypatch.setattr(
        keeper_module.Keeper, "reconcile", lambda _keeper, wanted: asked.append(wanted)
    )
    node.put("api", meshed=True, more_ports=(ServicePort(service="admin", port=8080),))

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            await status_where(daemon, lambda _: asked)
            problems = (await daemon._status()).problems
            assert any(
                problem.startswith("the sidecar of api stays as it is: port: the ports")
                for problem in problems
            )
            assert {wanted.spec for wanted in asked} == {good}

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


def defect(*_args, **_kwargs):
    raise ZeroDivisionError("a bad place")


@pytest.mark.parametrize(
    ("target", "attribute"), [(keeper_module.Keeper, "reconcile"), (keeper_module, "policy_for")]
)
def test_a_defect_in_the_work_for_one_workload_is_its_own_problem(
    node, monkeypatch, target, attribute
):
    node.put("bad")
    node.put("good")
    whole = getattr(target, attribute)

    def sometimes(*args):
        workload = getattr(args[0], "workload", args[0])
        return defect() if workload.name == "bad" else whole(*args)

    async def scenario():
        with monkeypatch.context() as patched:
            patched.setattr(target, attribute, sometimes)
            async with running(node.server), node.agent() as daemon:
                status = await status_where(
                    daemon, lambda one: any("by a defect" in problem for problem in one.problems)
                )
                (problem,) = status.problems
                assert problem.startswith("bad is not worked on, by a defect of the agent")
                assert "a bad place" in problem
                began = status.round_at
                await status_where(daemon, lambda status: status.round_at > began)
                async with CatalogClient(node.config.server) as catalog:

                    async def published():
                        return "good" in [one.name for one in await catalog.instances()]

                    await eventually(published)
                patched.undo()
                await status_where(daemon, lambda status: not status.problems)

    run(scenario())


def left_behind(node, name):
    """What an agent leaves of a workload whose file goes while no agent runs."""
    directory = node.config.run_dir / "sidecars" / name
    directory.mkdir(parents=True)
    return directory


def test_what_was_left_behind_is_removed_beside_the_rounds(node, monkeypatch):
    left = left_behind(node, "old-0")
    node.put("api")
    released, removing = threading.Event(), threading.Event()
    remove = keeper_module.Keeper.remove

    def slowly(keeper):
        removing.set()
        assert released.wait(DEADLINE_S)
        remove(keeper)

    monkeypatch.setattr(keeper_module.Keeper, "remove", slowly)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            try:
                await eventually(lambda: _equal(_is_set(removing), True))
                await status_where(daemon, lambda status: status.round_at)
                assert left.exists()
            finally:
                released.set()
            await eventually(lambda: _equal(_exists(left), False))

    run(scenario())


async def _is_set(event):
    return event.is_set()


def test_what_was_left_behind_and_cannot_be_removed_is_told_and_tried_again(node, monkeypatch):
    left = left_behind(node, "old-0")

    def refuse(_files):
        raise OSError(errno.EBUSY, "busy", str(left))

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            with monkeypatch.context() as patched:
                patched.setattr(SidecarFiles, "remove", refuse)
                told = "what was left of old-0 cannot be removed: [Errno 16] busy"
                await status_where(
                    daemon, lambda one: any(problem.startswith(told) for problem in one.problems)
                )
            await eventually(lambda: _equal(_exists(left), False))
            await status_where(daemon, lambda status: not status.problems)

    run(scenario())


def test_a_workload_that_returns_waits_until_what_was_left_of_it_is_removed(node, monkeypatch):
    node.put("api")
    released, removing, made = threading.Event(), threading.Event(), []
    remove, update = keeper_module.Keeper.remove, keeper_module.Keeper.update

    def slowly(keeper):
        removing.set()
        assert released.wait(DEADLINE_S)
        remove(keeper)

    def note(keeper, workload):
        made.append(released.is_set())
        update(keeper, workload)

    monkeypatch.setattr(keeper_module.Keeper, "remove", slowly)
    monkeypatch.setattr(keeper_module.Keeper, "update", note)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            (directory,) = (
                daemon._keepers._directory(workload)
                for workload in await daemon._work(daemon._census.take)
            )
            await status_where(daemon, lambda status: status.workloads)
        made.clear()
        node.file("api").rename(node.config.state_dir / "api.json")
        directory.mkdir(parents=True, exist_ok=True)
        async with running(node.server), node.agent() as daemon:
            try:
                await eventually(lambda: _equal(_is_set(removing), True))
                (node.config.state_dir / "api.json").rename(node.file("api"))
                # The first of them may have begun before.
                for _ in range(2):
                    began = daemon._round_at
                    await status_where(daemon, lambda status, last=began: status.round_at > last)
            finally:
                released.set()
            await status_where(daemon, lambda status: status.workloads)
        assert made
        assert all(made)

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


def test_an_agent_that_waits_for_its_server_stops_at_once(node, monkeypatch):
    node.put("api")
    never = asyncio.Event()

    async def scenario():
        for method in ("snapshot", "register"):
            asked = asyncio.Event()

            async def hang(*_args, asked=asked):
                asked.set()
                await never.wait()

            with monkeypatch.context() as patched:
                patched.setattr(CatalogClient, method, hang)
                patched.setattr(intent_module, "ANSWER_S", NEVER_S)
                async with running(node.server), node.agent():
                    await asyncio.wait_for(asked.wait(), DEADLINE_S)

    run(scenario())


@pytest.mark.parametrize("field", ["run_dir", "state_dir", "bpffs"])
def test_a_second_agent_with_a_directory_of_the_first_is_refused_and_named_the_first(
    node, tmp_path, field
):
    held = getattr(node.config, field)
    held.mkdir(exist_ok=True)
    others = {each: tmp_path / f"{each}-2" for each in ("run_dir", "state_dir", "bpffs")}
    del others[field]
    second = msgspec.structs.replace(node.config, socket=tmp_path / "agent-2.sock", **others)
    code = (
        "import sys; from pathlib import Path; from tidegate.node.holding import held_alone\n"
        "with held_alone(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(held)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"\n"
        with pytest.raises(TidegateError) as refused:
            asyncio.run(run_agent(second))
        first.stdin.close()
    assert str(refused.value) == f"another agent (process {first.pid}) uses {held}; end it first"
    with held_alone(held):
        pass


@pytest.mark.parametrize("changed", [{"name": "renamed"}, {"netns": "/nowhere/else"}])
def test_a_workload_with_another_name_or_path_is_removed_before_it_is_kept_anew(
    node, monkeypatch, changed
):
    node.put("api")
    released, removing, removed, made = threading.Event(), threading.Event(), [], []
    remove, init = keeper_module.Keeper.remove, keeper_module.Keeper.__init__

    def slowly(keeper):
        removing.set()
        assert released.wait(DEADLINE_S)
        removed.append((keeper.workload.name, keeper.workload.netns))
        remove(keeper)

    def note(keeper, workload, *args):
        made.append((workload.name, workload.netns, released.is_set()))
        init(keeper, workload, *args)

    monkeypatch.setattr(keeper_module.Keeper, "remove", slowly)
    monkeypatch.setattr(keeper_module.Keeper, "__init__", note)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            await status_where(daemon, lambda status: status.workloads)
            node.put("api", **changed)
            try:
                await eventually(lambda: _equal(_is_set(removing), True))
                for _ in range(3):
                    began = daemon._round_at
                    await status_where(daemon, lambda status, at=began: status.round_at > at)
                (kept,) = (await daemon._status()).workloads
                assert (kept.name, kept.netns) == ("api", "/nowhere/api")
            finally:
                released.set()
            await status_where(
                daemon,
                lambda status: (
                    all(
                        getattr(one, field) == value
                        for one in status.workloads
                        for field, value in changed.items()
                    )
                    and status.workloads
                ),
            )
            began = daemon._round_at
            await status_where(daemon, lambda status: status.round_at > began)
        assert removed == [("api", "/nowhere/api")], "once, and by the description of before"
        whole = {"name": "api", "netns": "/nowhere/api", **changed}
        assert made == [
            ("api", "/nowhere/api", False),
            (whole["name"], whole["netns"], True),
        ]
        assert node.observation.detached == []

    run(scenario())


def test_two_workloads_of_one_namespace_follow_each_other(node, monkeypatch):
    """A pod that is made anew has another id, and may have the path of the former one."""
    node.put("old", netns="/nowhere/same")
    released, removing = threading.Event(), threading.Event()
    remove = keeper_module.Keeper.remove

    def slowly(keeper):
        removing.set()
        assert released.wait(DEADLINE_S)
        remove(keeper)

    monkeypatch.setattr(keeper_module.Keeper, "remove", slowly)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            await status_where(daemon, lambda status: status.workloads)
            node.file("old").unlink()
            node.put("new", netns="/nowhere/same")
            try:
                await eventually(lambda: _equal(_is_set(removing), True))
                for _ in range(3):
                    began = daemon._round_at
                    status = await status_where(
                        daemon, lambda status, at=began: status.round_at > at
                    )
                    assert [one.name for one in status.workloads] == ["old"]
            finally:
                released.set()
            await status_where(
                daemon, lambda status: [one.name for one in status.workloads] == ["new"]
            )

    run(scenario())


def test_a_gone_workload_that_cannot_be_removed_is_told_not_published_and_tried_again(
    node, monkeypatch, tmp_path
):
    # It lies there, and nobody could get into it.
    namespace = tmp_path / "namespace"
    namespace.touch()
    node.put("api", netns=str(namespace))

    def refuse(*_args):
        raise KernelError("not now", errno.EBUSY)

    monkeypatch.setattr(WorkloadRedirection, "remove", refuse)

    async def scenario():
        async with (
            running(node.server),
            node.agent() as daemon,
            CatalogClient(node.config.server) as catalog,
        ):

            async def living():
                return [one.name for one in await catalog.instances() if not one.seen_until]

            await eventually(lambda: _equal(living(), ["api"]))
            node.file("api").unlink()
            await eventually(lambda: _equal(living(), []))
            (left,) = (await daemon._status()).workloads
            assert "not now" in left.problem
            monkeypatch.setattr(WorkloadRedirection, "remove", lambda *_: None)
            await status_where(daemon, lambda status: not status.workloads)

    run(scenario())


# Workloads that bring their own sidecar, and servers that are away.


def asked_of_keepers(monkeypatch):
    """What is wanted of each workload, by name, as often as it is."""
    asked = {}
    reconcile = keeper_module.Keeper.reconcile

    def note(keeper, wanted):
        asked.setdefault(keeper.workload.name, []).append(wanted)
        reconcile(keeper, wanted)

    monkeypatch.setattr(keeper_module.Keeper, "reconcile", note)
    return asked


def test_rules_for_a_sidecar_of_its_own_wait_for_no_server_and_need_no_envoy(node, monkeypatch):
    monkeypatch.setattr(envoy_module, "binary", defect)
    asked = asked_of_keepers(monkeypatch)
    node.put("own", meshed=True, sidecar=Sidecar.OWN, reason="it has Consul's sidecar")
    node.put("ours", meshed=True)

    async def scenario():
        async with node.agent() as daemon:
            # There is no such namespace.
            status = await status_where(
                daemon, lambda status: "failed" in [one.redirect for one in status.workloads]
            )
            assert isinstance(asked["own"][0], keeper_module.WantedRules)
            assert "ours" not in asked, "what its sidecar should do nobody has said"
            (own,) = (one for one in status.workloads if one.name == "own")
            assert (own.sidecar, own.wanted_in_mesh, own.state) == (Sidecar.OWN, True, "")
            assert own.reason == "it has Consul's sidecar"
            assert own.redirect == "failed"

    run(scenario())


def test_a_sidecar_of_its_own_is_taken_to_run_what_the_server_says(node, monkeypatch):
    asked = asked_of_keepers(monkeypatch)
    node.put("own", meshed=True, sidecar=Sidecar.OWN)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            async with CatalogClient(node.config.server) as catalog:
                mesh = {"Kind": "mesh", "AllowEnablingPermissiveMutualTLS": True}
                assert await catalog.write_entry(from_server(mesh, "-"), None)
                entry = {
                    "Kind": "service-defaults",
                    "Name": "own",
                    "MutualTLSMode": "permissive",
                    "TransparentProxy": {"OutboundListenerPort": 15101},
                }
                assert await catalog.write_entry(from_server(entry, "-"), None)
            await status_where(daemon, lambda _: asked["own"][-1].mode is MutualTLSMode.PERMISSIVE)
            wanted = asked["own"][-1]
            assert wanted.index > 0
            assert wanted.policy.outbound.port == 15101

    run(scenario())


def test_a_server_that_never_answers_holds_up_no_round(node, monkeypatch):
    monkeypatch.setattr(intent_module, "ANSWER_S", NEVER_S)

    async def scenario():
        taken = []

        async def take(_reader, writer):
            taken.append(writer)
            await asyncio.sleep(NEVER_S)

        path = node.config.server.removeprefix("unix://")
        server = await asyncio.start_unix_server(take, path)
        async with server, node.agent() as daemon:
            await status_where(daemon, lambda _: taken)
            began = daemon._round_at
            node.put("api")
            await status_where(daemon, lambda status: status.workloads and status.round_at > began)
            for writer in taken:
                writer.close()

    run(scenario())


def test_whoever_has_news_wakes_the_agent_from_any_thread(node, monkeypatch):
    monkeypatch.setattr(daemon_module, "ROUND_S", NEVER_S)

    async def scenario():
        async with node.agent() as daemon:
            await status_where(daemon, lambda status: status.round_at)
            node.put("api")
            await asyncio.to_thread(daemon.wake)
            await status_where(daemon, lambda status: status.workloads)

    run(scenario())


def test_an_agent_is_ready_once_it_has_looked_at_every_workload(node, monkeypatch):
    released, began = threading.Event(), threading.Event()
    reconcile = keeper_module.Keeper.reconcile

    def slowly(keeper, wanted):
        began.set()
        assert released.wait(DEADLINE_S)
        reconcile(keeper, wanted)

    monkeypatch.setattr(keeper_module.Keeper, "reconcile", slowly)
    node.put("api")

    async def scenario():
        async with node.agent() as daemon:
            try:
                await status_where(daemon, lambda status: began.is_set() and status.round_at)
                assert daemon.pulse.unready() == "no round has been completed yet"
                assert daemon.pulse.unwell() == ""
            finally:
                released.set()
            await status_where(daemon, lambda _: not daemon.pulse.unready())

    run(scenario())


def test_the_metrics_tell_what_the_status_tells(node):
    node.put("api")

    async def scenario():
        async with node.agent() as daemon:
            await status_where(daemon, lambda status: status.workloads)
            text = (await daemon.exposition()).decode()
            assert 'tidegate_workloads{redirect="none",sidecar="none"} 1.0' in text

    run(scenario())
