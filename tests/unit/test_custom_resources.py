"""Config entries from Kubernetes' custom resources: read as files of the same shape are, followed, and faults told."""

import asyncio
import contextlib
import copy
import functools

import pytest
from kubernetes_api import KubernetesApi, status

from tidegate.catalog import kubernetes
from tidegate.catalog.consul import Snapshot
from tidegate.catalog.kubernetes import CustomResources
from tidegate.catalog.transport import CatalogUnreachable
from tidegate.intent.entries import Kind, Mesh, ServiceDefaults
from tidegate.intent.resolve import resolve
from tidegate.kubeapi import following as following_module
from tidegate.kubeapi.access import ApiAccess
from tidegate.model import MutualTLSMode

PATH = "/apis/consul.hashicorp.com/v1alpha1"
KINDS = {
    f"{PATH}/meshes": "Mesh",
    f"{PATH}/proxydefaults": "ProxyDefaults",
    f"{PATH}/servicedefaults": "ServiceDefaults",
    f"{PATH}/serviceintentions": "ServiceIntentions",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(following_module, "RETRY_S", (0.005, 0.05))


def resource(kind, name, namespace="default", **spec):
    return {
        "apiVersion": "consul.hashicorp.com/v1alpha1",
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"{kind}-{namespace}-{name}",
            "generation": 1,
            "creationTimestamp": "2026-08-22T10:11:12Z",
            "finalizers": ["finalizers.consul.hashicorp.com"],
            "managedFields": [{"manager": "kubectl", "operation": "Apply"}],
        },
        "spec": spec,
        "status": {"conditions": [{"type": "Synced", "status": "True"}], "lastSyncedTime": None},
    }


MESH = resource("Mesh", "mesh", "consul", allowEnablingPermissiveMutualTLS=True)
DEFAULTS = resource("ServiceDefaults", "web", "shop", mutualTLSMode="permissive", protocol="http")
INTENTIONS = resource(
    "ServiceIntentions",
    "web-callers",
    "shop",
    destination={"name": "web"},
    sources=[{"name": "till", "action": "allow"}],
)


class Cluster:
    """Four collections at one address, and what follows them."""

    def __init__(self, api):
        self.api = api
        self.resources = CustomResources(
            ApiAccess(server=api.address, token_file=None, ca_file=None)
        )
        self._news = asyncio.Event()

    @contextlib.asynccontextmanager
    async def following(self):
        stop = asyncio.Event()
        running = asyncio.create_task(self.resources.run(stop, self._news.set))
        try:
            yield
        finally:
            stop.set()
            await running

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def entries(self, number):
        """The entries as soon as there are so many."""
        await self.until(lambda: len(self.known()) == number)
        return {(entry.kind, entry.name): entry for entry in self.known()}

    def known(self):
        try:
            return self.resources.overlay(Snapshot()).entries
        except CatalogUnreachable:
            return ()


def in_a_cluster(scenario):
    @functools.wraps(scenario)
    def run():
        async def go():
            async with KubernetesApi(KINDS) as api:
                await scenario(Cluster(api))

        asyncio.run(asyncio.wait_for(go(), 60))

    del run.__wrapped__
    return run


@in_a_cluster
async def test_resources_of_all_kinds_are_entries_and_their_versions_are_indexes(cluster):
    api = cluster.api
    for one in (MESH, resource("ProxyDefaults", "global", "consul"), DEFAULTS, INTENTIONS):
        await api.put(one)
    async with cluster.following():
        found = await cluster.entries(4)
    mesh = found[Kind.MESH, "mesh"]
    assert isinstance(mesh, Mesh)
    assert mesh.allow_enabling_permissive_mutual_tls
    assert mesh.modify_index == 1003
    defaults = found[Kind.SERVICE_DEFAULTS, "web"]
    assert isinstance(defaults, ServiceDefaults)
    assert defaults.mutual_tls_mode is MutualTLSMode.PERMISSIVE
    assert found[Kind.SERVICE_INTENTIONS, "web"].sources[0].name == "till"
    snapshot = cluster.resources.overlay(Snapshot(index=7))
    assert snapshot.index == 1012
    intent = resolve(snapshot.entries, ["web"], False)["web"]
    assert intent.mode is MutualTLSMode.PERMISSIVE
    assert intent.allows("till")
    assert cluster.resources.problems() == ()


@in_a_cluster
async def test_entries_follow_their_resources_and_take_the_place_of_the_servers(cluster):
    server = Snapshot(entries=(ServiceDefaults(name="old"),), default_allow=True)
    await cluster.api.put(DEFAULTS)
    async with cluster.following():
        await cluster.entries(1)
        first = cluster.resources.overlay(server)
        assert [entry.name for entry in first.entries] == ["web"]
        assert first.default_allow
        assert cluster.resources.overlay(server) is first
        await cluster.api.until_watched(4)
        changed = copy.deepcopy(DEFAULTS)
        changed["spec"]["mutualTLSMode"] = "strict"
        await cluster.api.put(changed)
        await cluster.until(lambda: cluster.known()[0].mutual_tls_mode is MutualTLSMode.STRICT)
        second = cluster.resources.overlay(server)
        assert second.index > first.index
        leaving = copy.deepcopy(changed)
        leaving["metadata"]["deletionTimestamp"] = "2026-08-22T11:00:00Z"
        await cluster.api.put(leaving)
        await cluster.entries(0)
        await cluster.api.delete(leaving)
        await cluster.api.put(INTENTIONS)
        await cluster.entries(1)


@in_a_cluster
async def test_before_everything_is_known_nothing_is(cluster):
    with pytest.raises(CatalogUnreachable, match="not known: the Kubernetes API server has not"):
        cluster.resources.overlay(Snapshot())
    cluster.api.failing = status(
        404, "NotFound", "the server could not find the requested resource"
    )
    async with cluster.following():
        await cluster.until(lambda: len(cluster.resources.problems()) == 4)
        for path, problem in zip(KINDS, cluster.resources.problems(), strict=True):
            assert problem.endswith(f"could not find the requested resource ({path})")
        with pytest.raises(CatalogUnreachable, match="could not find the requested resource"):
            cluster.resources.overlay(Snapshot())
        cluster.api.failing = None
        await cluster.api.put(DEFAULTS)
        await cluster.entries(1)


@in_a_cluster
async def test_a_resource_that_is_wrong_is_told_by_name_and_stays_as_it_was(cluster):
    await cluster.api.put(DEFAULTS)
    await cluster.api.put(INTENTIONS)
    async with cluster.following():
        await cluster.entries(2)
        await cluster.api.until_watched(4)
        wrong = copy.deepcopy(DEFAULTS)
        wrong["spec"]["mutualTLSMode"] = "lenient"
        await cluster.api.put(wrong)
        await cluster.until(lambda: cluster.resources.problems() != ())
        (problem,) = cluster.resources.problems()
        assert problem.startswith("servicedefaults shop/web: ")
        assert "lenient" in problem
        found = await cluster.entries(2)
        assert found[Kind.SERVICE_DEFAULTS, "web"].mutual_tls_mode is MutualTLSMode.PERMISSIVE
        never = resource("ServiceDefaults", "never", mutualTLSMode={"a": 1})
        await cluster.api.put(never)
        await cluster.until(lambda: len(cluster.resources.problems()) == 2)
        assert len(cluster.known()) == 2
        await cluster.api.put(DEFAULTS)
        await cluster.api.delete(never)
        await cluster.until(lambda: cluster.resources.problems() == ())


@in_a_cluster
async def test_two_resources_that_say_the_same_entry_are_told_and_the_first_by_name_is_taken(
    cluster,
):
    other = resource("ServiceDefaults", "web", "billing", mutualTLSMode="strict")
    for one in (DEFAULTS, other):
        await cluster.api.put(one)
    async with cluster.following():
        found = await cluster.entries(1)
        assert found[Kind.SERVICE_DEFAULTS, "web"].mutual_tls_mode is MutualTLSMode.STRICT
        assert cluster.resources.problems() == (
            "servicedefaults billing/web and shop/web say the same entry; billing/web is taken",
        )
        await cluster.api.until_watched(4)
        await cluster.api.delete(other)
        await cluster.until(lambda: cluster.resources.problems() == ())
        assert cluster.known()[0].mutual_tls_mode is MutualTLSMode.PERMISSIVE


@in_a_cluster
async def test_what_is_known_stays_while_the_server_is_away(cluster):
    await cluster.api.put(DEFAULTS)
    async with cluster.following():
        await cluster.entries(1)
        await cluster.api.until_watched(4)
        await cluster.api.stop()
        await cluster.until(lambda: cluster.resources.problems() != ())
        assert len(cluster.known()) == 1
        await cluster.api.compact()
        await cluster.api.put(INTENTIONS)
        await cluster.api.start()
        await cluster.entries(2)


def test_the_kinds_that_are_followed_are_those_that_are_known():
    assert len(kubernetes._PLURALS) == len(Kind)
