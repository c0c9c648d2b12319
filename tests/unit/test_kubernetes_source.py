"""The pods of a node as workloads: found, followed, kept over absences of the API server, whatever it says."""

import asyncio
import contextlib
import functools
import gc
import inspect
import json
import stat
import tracemalloc

import kubernetes_pods as shapes
import msgspec
import pytest
from kubernetes_api import KubernetesApi, status

from tidegate.kubeapi import following as following_module
from tidegate.kubeapi.errors import ApiError, ApiRefused, ApiUnreachable
from tidegate.model import Sidecar
from tidegate.workloads.kubernetes import source as source_module
from tidegate.workloads.kubernetes.pods import read_pod
from tidegate.workloads.kubernetes.settings import Enrolment, KubernetesConfig
from tidegate.workloads.kubernetes.source import KubernetesSource
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(following_module, "RETRY_S", (0.005, 0.05))
    monkeypatch.setattr(following_module, "STEADY_S", 0.2)
    monkeypatch.setattr(source_module, "KEEP_S", 0.05)


def in_a_loop(scenario):
    """A test that is a coroutine."""

    @functools.wraps(scenario)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(scenario(*args, **kwargs), 60))

    return run


class Node:
    """A node with an API server: what has been placed on it, and its agent's source of pods."""

    def __init__(self, api, directory, **changes):
        self.api = api
        self.cache = directory / "pods.json"
        self.changes = changes
        self.spaces = directory / "netns"
        self.spaces.mkdir(exist_ok=True)
        self.source = self.new_source()
        self._news = asyncio.Event()

    def new_source(self):
        config = KubernetesConfig(
            **{
                "server": self.api.address,
                "token_file": None,
                "ca_file": None,
                "node": shapes.NODE,
                "enrol": tuple(Enrolment),
                "cgroups": self.spaces,
            }
            | self.changes
        )
        return KubernetesSource(config, "node-1", self.find, self.cache)

    def find(self, uid, namespace, name):
        path = self.spaces / uid
        return str(path) if path.exists() else None

    async def run_pod(self, made):
        """A pod that runs: it has a network namespace, and the server has it."""
        self.place(made)
        await self.api.put(made)
        return made

    def place(self, made):
        # A file stands for a network namespace: only which one it is is asked.
        (self.spaces / made["metadata"]["uid"]).touch()

    def unplace(self, made):
        (self.spaces / made["metadata"]["uid"]).unlink()

    @contextlib.asynccontextmanager
    async def following(self, source=None):
        stop = asyncio.Event()
        running = asyncio.create_task((source or self.source).run(stop, self._news.set))
        try:
            yield
        finally:
            stop.set()
            await running

    async def until(self, condition):
        """Waits until it is so, asked when the source says that there is news."""
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def names(self):
        return sorted(one.name for one in self.source.list())

    async def until_lists(self, *names):
        await self.until(lambda: self.names() == sorted(names))

    async def until_complete(self):
        await self.until(lambda: self.source.list() is not None and self.source.is_complete)


def with_node(scenario):
    @functools.wraps(scenario)
    async def run(tmp_path, **kwargs):
        async with KubernetesApi() as api:
            await scenario(Node(api, tmp_path), **kwargs)

    # What pytest gives it by name: all that the scenario takes but the node.
    taken = inspect.signature(scenario).parameters.values()
    directory = inspect.Parameter("tmp_path", inspect.Parameter.KEYWORD_ONLY)
    parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in taken if one.name != "node"]
    test = in_a_loop(run)
    test.__signature__ = inspect.Signature([directory, *parameters])
    return test


async def soon(condition):
    """Whether it becomes so."""
    for _ in range(2000):
        if condition():
            return True
        await asyncio.sleep(0.005)
    return False


def told(node, words):
    node.source.list()
    return any(words in problem for problem in node.source.problems())


def web(number):
    return shapes.pod(f"web-{number}-aaaaa", uid=f"uid-{number}", ip=f"10.42.2.{number + 1}")


@with_node
async def test_pods_that_were_there_before_are_found_with_all_that_is_known_of_them(node):
    made = await node.run_pod(shapes.consul())
    assert node.source.list() == ()
    assert not node.source.is_complete
    async with node.following():
        await node.until_complete()
    (found,) = node.source.list()
    uid = made["metadata"]["uid"]
    assert found.annotations["consul.hashicorp.com/transparent-proxy-status"] == "enabled"
    assert msgspec.structs.replace(found, annotations=None) == Description(
        origin=Origin.KUBERNETES,
        netns=str(node.spaces / uid),
        id=uid,
        name="frontend-7c4d8-b8x2v",
        service="frontend",
        namespace="shop",
        port=8080,
        more_ports=(),
        addresses=("10.42.1.7",),
        meshed=True,
        sidecar=Sidecar.OWN,
        reason="Consul injected its sidecar, with a transparent proxy",
        created_at=1787393473.0,
    )
    assert node.source.problems() == ()


@with_node
async def test_each_kind_of_pod_has_its_treatment(node):
    for made in (
        shapes.host_network(),
        shapes.static(),
        shapes.finished_job(),
        shapes.evicted(),
        shapes.linkerd(),
        shapes.pod(),
        shapes.pending(),
        shapes.static_in_its_own_network(),
    ):
        await node.api.put(made)
    for made in (shapes.linkerd(), shapes.pod()):
        node.place(made)
    (node.spaces / ("0" * 31 + "1")).touch()
    async with node.following():
        await node.until_complete()
    listed = {one.name: one for one in node.source.list()}
    assert {name: one.meshed for name, one in listed.items()} == {
        "voting-5b5d-m2kqz": False,
        "web-6d9f7c5b8-x2x7q": False,
        f"registry-{shapes.NODE}": False,
    }
    assert listed[f"registry-{shapes.NODE}"].id == "0" * 31 + "1"
    assert {one.name: one.treatment for one in node.source.left_alone()} == {
        "node-exporter-9hq2k": Treatment.HOST_NETWORK,
        f"etcd-{shapes.NODE}": Treatment.HOST_NETWORK,
        "backup-29112345-xk2lp": Treatment.FINISHED,
        "greedy-7b9-q2w3e": Treatment.FINISHED,
    }
    assert node.source.problems() == ()


@with_node
async def test_a_pod_that_runs_and_is_nowhere_is_told_by_name_at_once_and_until_it_is_found(node):
    async with node.following():
        await node.until_complete()
        await node.api.put(web(0))
        await node.until(
            lambda: told(node, "pod shop/web-0-aaaaa runs, and its network namespace was not found")
        )
        (left,) = node.source.left_alone()
        assert (left.name, left.treatment) == ("web-0-aaaaa", Treatment.NOT_FOUND)
        assert not node.source.is_complete
        node.place(web(0))
        assert node.names() == ["web-0-aaaaa"]
        assert node.source.problems() == ()
        assert node.source.left_alone() == ()
        assert node.source.is_complete


@with_node
async def test_a_pod_that_is_about_to_begin_or_to_end_is_no_problem(node):
    node.place(shapes.initialising())
    for made in (shapes.pending(), shapes.initialising(), shapes.terminating()):
        await node.api.put(made)
    ending = await node.run_pod(web(0))
    async with node.following():
        await node.until_complete()
        assert node.names() == ["migrating-5f7-aaaaa", "web-0-aaaaa"]
        node.unplace(ending)
        assert node.names() == ["migrating-5f7-aaaaa"]
        assert node.source.problems() == ()


@with_node
async def test_a_pod_that_ended_and_that_the_server_goes_on_telling_of_is_a_problem_after_a_while(
    node, monkeypatch
):
    monkeypatch.setattr(source_module, "ENDING_S", 0.0)
    ending = await node.run_pod(web(0))
    async with node.following():
        await node.until_complete()
        assert node.names() == ["web-0-aaaaa"]
        node.unplace(ending)
        assert node.names() == []
        assert "web-0-aaaaa runs, and" in node.source.problems()[0]


@with_node
async def test_a_pod_that_is_declared_failed_while_it_goes_on_stays_until_it_ends(node):
    """Past its deadline, or by podgc on a node that was cut off: its containers run on."""
    made = await node.run_pod(shapes.annotated(web(0), tidegate_io__mesh="own"))
    kept = await node.run_pod(shapes.annotated(web(1), tidegate_io__mesh="own"))
    async with node.following():
        await node.until_lists("web-0-aaaaa", "web-1-aaaaa")
        await node.api.until_watched()
        for one in (made, kept):
            one["status"] |= {"phase": "Failed", "reason": "DeadlineExceeded"}
            await node.api.put(one)
        await node.api.delete(kept)
        await node.until(lambda: node.source.watch.pods == 1)
        assert [one.meshed for one in node.source.list()] == [True, True]
        for one in (made, kept):
            node.unplace(one)
        assert node.source.list() == ()
        assert [one.treatment for one in node.source.left_alone()] == [Treatment.FINISHED]
        node.place(made)
        assert node.source.list() == (), "what had ended does not begin again"


@with_node
async def test_a_pod_that_is_made_anew_while_no_watch_is_there_is_another(node):
    """As of a StatefulSet on a node that has lost the API server."""
    old, new = shapes.stateful("uid-old"), shapes.stateful("uid-new")
    await node.run_pod(old)
    async with node.following():
        await node.until_lists("db-0")
        await node.api.until_watched()
        await node.api.stop()
        await node.run_pod(new)
        await node.api.compact()
        await node.api.start()
        await node.until(lambda: len(node.source.list()) == 2)
        assert {one.id for one in node.source.list()} == {"uid-old", "uid-new"}
        node.unplace(old)
        assert [one.id for one in node.source.list()] == ["uid-new"]


@with_node
async def test_a_sandbox_that_is_made_anew_is_the_same_pod_in_another_place(node):
    made = await node.run_pod(web(0))
    places = ["/first", "/second"]
    for path in places:
        (node.spaces / path[1:]).touch()
    node.find = lambda *_: str(node.spaces / places[0][1:])
    node.source = node.new_source()
    async with node.following():
        await node.until_lists("web-0-aaaaa")
        (before,) = node.source.list()
        places.pop(0)
        (after,) = node.source.list()
    assert before.id == after.id == made["metadata"]["uid"]
    assert (before.netns[-6:], after.netns[-7:]) == ("/first", "/second")


@with_node
async def test_changes_of_annotations_arrive_and_a_pod_that_did_not_change_is_the_same_object(node):
    first, second = await node.run_pod(web(0)), await node.run_pod(web(1))
    async with node.following():
        await node.until_complete()
        before = {one.name: one for one in node.source.list()}
        await node.api.until_watched()
        await node.api.put(shapes.annotated(first, tidegate_io__mesh="own"))
        await node.api.put(second)
        await node.until(lambda: any(one.meshed for one in node.source.list()))
    after = {one.name: one for one in node.source.list()}
    assert after["web-0-aaaaa"].sidecar is Sidecar.OWN
    assert after["web-1-aaaaa"] is before["web-1-aaaaa"]


@with_node
async def test_a_pod_that_is_made_anew_under_its_name_is_another_and_the_old_one_ends_when_it_ends(
    node,
):
    old, new = shapes.stateful("uid-old"), shapes.stateful("uid-new")
    await node.run_pod(old)
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        await node.run_pod(new)
        await node.until(lambda: len(node.source.list()) == 2)
        assert {one.id for one in node.source.list()} == {"uid-old", "uid-new"}
        node.unplace(old)
        assert [one.id for one in node.source.list()] == ["uid-new"]
        assert node.source.problems() == ()


@with_node
async def test_a_pod_whose_end_nobody_told_stays_when_its_name_is_anothers_as_long_as_it_runs(node):
    await node.run_pod(shapes.stateful("uid-old"))
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        new = shapes.stateful("uid-new")
        node.place(new)
        await node.api.send(json.dumps({"type": "ADDED", "object": new}).encode() + b"\n")
        await node.until(lambda: len(node.source.list()) == 2)
        node.unplace(shapes.stateful("uid-old"))
        assert [one.id for one in node.source.list()] == ["uid-new"]


@with_node
async def test_an_old_event_of_a_name_does_not_take_the_new_pod_away(node):
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        await node.run_pod(shapes.stateful("uid-new"))
        await node.until_lists("db-0")
        late = {"type": "DELETED", "object": shapes.stateful("uid-old")}
        await node.api.send(json.dumps(late).encode() + b"\n")
        await node.run_pod(web(0))
        await node.until_lists("db-0", "web-0-aaaaa")
        assert node.source.watch.pods == 2


@with_node
async def test_a_pod_that_was_deleted_by_force_stays_as_long_as_it_runs(node):
    made = await node.run_pod(shapes.annotated(web(0), tidegate_io__mesh="own"))
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        await node.api.delete(made)
        await node.run_pod(web(1))
        await node.until_lists("web-0-aaaaa", "web-1-aaaaa")
        assert {one.name: one.meshed for one in node.source.list()}["web-0-aaaaa"]
        node.unplace(made)
        assert node.names() == ["web-1-aaaaa"]
        node.place(made)
        assert node.names() == ["web-1-aaaaa"], "it does not come back"


@with_node
async def test_a_server_that_has_lost_its_memory_takes_no_pod_away_that_runs(node):
    for number in range(3):
        await node.run_pod(web(number))
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        node.api.objects.clear()
        await node.api.compact()
        await node.api.end_watches()
        await node.until(lambda: node.source.watch.pods == 0)
        assert len(node.names()) == 3
        assert node.source.is_complete


@with_node
async def test_a_node_without_any_pod_is_told_by_the_name_that_was_asked_for(node):
    """A wrong name would else leave all pods of a node unnoticed."""
    await node.api.put(shapes.pod("web-0-aaaaa", node="ip-10-0-3-17"))
    async with node.following():
        await node.until(lambda: node.source.list() == () and node.source.problems() != ())
        (problem,) = node.source.problems()
        assert f"no pods on node {shapes.NODE}; expected the metadata.name" in problem
        await node.api.put(shapes.host_network())
        await node.until(lambda: node.source.list() == () and node.source.problems() == ())


@with_node
async def test_pods_of_another_node_are_told_and_not_taken(node):
    node.api.serves_others = True
    await node.run_pod(web(0))
    await node.run_pod(shapes.pod("stranger-0-aaaaa", node="another"))
    async with node.following():
        await node.until_lists("web-0-aaaaa")
        assert "shop/stranger-0-aaaaa, which is not on node" in node.source.problems()[0]
        await node.api.until_watched()
        await node.api.delete(shapes.pod("stranger-0-aaaaa", node="another"))
        await node.until(lambda: node.source.list() is not None and node.source.problems() == ())


@with_node
async def test_of_two_pods_with_one_uid_the_first_is_looked_after_and_both_are_named(node):
    await node.run_pod(web(0))
    await node.run_pod(shapes.pod("web-9-aaaaa", uid="uid-0"))
    async with node.following():
        await node.until_lists("web-0-aaaaa")
        assert (
            "pods shop/web-0-aaaaa and shop/web-9-aaaaa have one uid" in node.source.problems()[0]
        )


@with_node
async def test_a_pod_that_cannot_be_understood_stops_no_other_and_stays_as_it_was(node):
    known = await node.run_pod(shapes.annotated(web(0), tidegate_io__mesh="own"))
    broken = web(1)
    broken["spec"]["containers"] = "none"
    await node.run_pod(broken)
    await node.run_pod(web(2))
    async with node.following():
        await node.until_lists("web-0-aaaaa", "web-2-aaaaa")
        assert "pod shop/web-1-aaaaa cannot be understood" in node.source.problems()[0]
        assert not node.source.is_complete, "it may be anything"
        await node.api.until_watched()
        known["metadata"]["labels"] = [1, 2]
        await node.api.put(known)
        await node.until(
            lambda: node.source.list() is not None and len(node.source.problems()) == 2
        )
        assert {one.name: one.meshed for one in node.source.list()} == {
            "web-0-aaaaa": True,
            "web-2-aaaaa": False,
        }
        asked = len(node.api.asked("list"))
        await node.api.compact()
        await node.api.end_watches()
        assert await soon(
            lambda: len(node.api.asked("list")) > asked and node.source.watch.is_connected
        )
        assert node.source.watch.pods == 2
        for number in (0, 1):
            await node.api.put(web(number))
        await node.until_complete()
        assert node.source.problems() == ()
        assert len(node.names()) == 3


@with_node
async def test_faults_in_annotations_are_told_with_the_pod_which_is_looked_after(node):
    await node.run_pod(shapes.annotated(web(0), tidegate_io__port="https"))
    await node.run_pod(shapes.annotated(web(1), tidegate_io__mesh="yes"))
    async with node.following():
        await node.until_lists("web-0-aaaaa", "web-1-aaaaa")
    first, second = node.source.problems()
    assert first.startswith("pod shop/web-0-aaaaa: tidegate.io/port: 'https' is neither a port")
    assert second.startswith("pod shop/web-1-aaaaa: tidegate.io/mesh is 'yes'; expected")


@with_node
async def test_very_many_problems_are_told_in_part(node):
    async with node.following():
        for number in range(80):
            await node.api.put(web(number))
        await node.until(lambda: node.source.list() == () and len(node.source.left_alone()) == 80)
    assert len(node.source.problems()) == 51
    assert node.source.problems()[-1] == "and 30 more problems with pods"


@with_node
async def test_while_the_server_is_away_nothing_changes_and_how_old_it_is_is_told(node):
    await node.run_pod(web(0))
    gone = await node.run_pod(web(1))
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        before = node.source.list()
        assert await soon(lambda: node.source.watch.is_connected)
        await node.api.stop()
        await node.until(lambda: node.source.list() is not None and node.source.problems() != ())
        (problem,) = node.source.problems()
        assert "no Kubernetes API server answers at http://127.0.0.1" in problem
        assert "; pods are known as of 20" in problem
        assert node.source.list() == before
        assert node.source.is_complete
        assert not node.source.watch.is_connected
        assert node.source.watch.failures > 0
        # What an hour brings: a pod ends, another comes, and what happened in between is forgotten.
        await node.api.delete(gone)
        await node.run_pod(web(2))
        node.unplace(gone)
        await node.api.compact()
        await node.api.start()
        await node.until_lists("web-0-aaaaa", "web-2-aaaaa")
        await node.until(lambda: node.source.list() is not None and node.source.problems() == ())


@with_node
async def test_an_agent_that_starts_while_the_server_is_away_knows_its_pods(node):
    await node.run_pod(shapes.consul())
    forced = await node.run_pod(web(0))
    ended = await node.run_pod(web(1))
    async with node.following():
        await node.until_complete()
        await node.api.until_watched()
        await node.api.delete(forced)
        await node.until(lambda: node.source.watch.pods == 2)
        before = node.source.list()
    assert stat.S_IMODE(node.cache.stat().st_mode) == 0o600
    version = json.loads(node.cache.read_bytes())["version"]
    await node.api.stop()
    node.unplace(ended)
    later = node.source = node.new_source()
    assert {one.id: one for one in later.list()} == {
        one.id: one for one in before if one.name != "web-1-aaaaa"
    }
    assert later.problems() == (), "a pod that may have ended meanwhile is not missed"
    async with node.following():
        await node.until(lambda: later.list() is not None and later.problems() != ())
        assert "; pods are known as of 20" in later.problems()[0]
        assert not later.is_complete
        await node.api.start()
        node.api.requests.clear()
        await node.api.delete(ended)
        await node.until_complete()
    assert node.api.asked("list")[0]["resourceVersion"] == version
    assert node.names() == ["frontend-7c4d8-b8x2v", "web-0-aaaaa"]


@pytest.mark.parametrize("content", [b"", b'{"node": 1}', b"\xff", b"[" * 60_000])
@with_node
async def test_a_cache_that_is_of_no_use_is_told_and_written_anew(node, content):
    node.cache.write_bytes(content)
    await node.run_pod(web(0))
    node.source = node.new_source()
    assert node.source.list() == ()
    assert f"{node.cache} is of no use" in node.source.problems()[0]
    async with node.following():
        await node.until_complete()
    assert node.source.list() != ()
    assert node.source.problems() == ()
    assert json.loads(node.cache.read_bytes())["node"] == shapes.NODE


@with_node
async def test_the_cache_of_another_node_is_none_of_ours(node):
    await node.run_pod(web(0))
    async with node.following():
        await node.until_complete()
    node.cache.write_bytes(node.cache.read_bytes().replace(shapes.NODE.encode(), b"another"))
    assert node.new_source().list() == ()


@with_node
async def test_a_cache_that_cannot_be_written_is_told_until_it_can(node):
    node.cache.mkdir()
    node.source = node.new_source()
    await node.run_pod(web(0))
    async with node.following():
        await node.until_complete()
        node.source.list()
        assert await soon(lambda: told(node, "cannot be written"))
        assert node.names() == ["web-0-aaaaa"]
        node.cache.rmdir()
        assert await soon(lambda: not told(node, "cannot be written"))
    assert node.cache.is_file()


@with_node
async def test_a_pod_is_looked_up_in_what_is_known_without_a_question(node):
    await node.run_pod(shapes.consul())
    await node.api.put(shapes.host_network())
    async with node.following():
        await node.until_complete()
        uid = shapes.consul()["metadata"]["uid"]
        found = await node.source.look_up("shop", "frontend-7c4d8-b8x2v", uid, "/run/netns/cni-1")
        assert isinstance(found, Description)
        assert (found.id, found.netns, found.sidecar) == (uid, "/run/netns/cni-1", Sidecar.OWN)
        assert await node.source.look_up("shop", "frontend-7c4d8-b8x2v", "") is not None
        assert node.source.known("shop", "frontend-7c4d8-b8x2v", uid, "/run/netns/cni-1") == found
        assert node.source.known("shop", "frontend-7c4d8-b8x2v", "another") is None
        left = await node.source.look_up("monitoring", "node-exporter-9hq2k", "")
        assert isinstance(left, LeftAlone)
        assert left.treatment is Treatment.HOST_NETWORK
        assert not node.api.asked("get")


@with_node
async def test_a_pod_that_is_not_known_yet_is_asked_for_and_one_of_another_uid_is_not_it(node):
    await node.api.put(shapes.stateful("uid-new"))
    look_up = node.source.look_up
    found = await look_up("shop", "db-0", "uid-new")
    assert found.id == "uid-new"
    assert await look_up("shop", "db-0", "uid-old") is None
    assert await look_up("shop", "db-1", "uid-9") is None
    assert await look_up("..", "../../nodes", "") is None
    static = shapes.static_in_its_own_network()
    await node.api.put(static)
    found = await look_up("kube-system", static["metadata"]["name"], "0" * 31 + "1")
    assert found.id == "0" * 31 + "1"


@with_node
async def test_a_pod_of_which_nobody_can_say_anything_is_an_error_and_not_no_pod(node, monkeypatch):
    monkeypatch.setattr(source_module, "LOOK_UP_S", 0.1)
    look_up = functools.partial(node.source.look_up, "shop", "web-0-aaaaa", "uid-0")
    node.api.failing = status(500, "InternalError", "etcd")
    with pytest.raises(ApiRefused, match="refuses with 500"):
        await look_up()
    node.api.failing = None
    node.api.held = asyncio.Event()
    with pytest.raises(ApiUnreachable, match="not in time"):
        await look_up()
    node.api.held.set()
    node.api.held = None
    broken = web(0)
    broken["spec"] = 3
    await node.api.put(broken)
    with pytest.raises(ApiError, match="pod shop/web-0-aaaaa cannot be understood"):
        await look_up()
    await node.api.stop()
    with pytest.raises(ApiUnreachable, match="no Kubernetes API server answers"):
        await look_up()


@with_node
async def test_250_pods_with_annotations_of_64_kb_are_held_in_2_mb(node):
    contents = []
    for number in range(250):
        made = shapes.annotated(shapes.consul(), example_org__blob="x" * 65536)
        made["metadata"] |= {"name": f"web-{number}-aaaaa", "uid": f"uid-{number}"}
        node.place(made)
        contents.append(json.dumps(made).encode())
    gc.collect()
    tracemalloc.start()
    try:
        node.source.listed([read_pod(content) for content in contents])
        assert len(node.source.list()) == 250
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2_000_000
