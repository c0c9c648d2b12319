"""An agent on a node of Kubernetes: an API server that behaves as documented, pods that are processes in cgroups."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import pytest
from namespaces import eventually

sys.path.append(str(Path(__file__).parent.parent / "unit"))
import kubernetes_pods as shapes
from kubernetes_api import KubernetesApi

from tidegate.catalog.client import CatalogClient
from tidegate.catalog.server import ServerConfig, running
from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import InputError
from tidegate.intent.entries import EntryKey, Kind
from tidegate.kernel import links, netns
from tidegate.kubeapi import following as following_module
from tidegate.lab import mounts
from tidegate.model import MutualTLSMode
from tidegate.node.config import AgentConfig
from tidegate.node.daemon import Daemon
from tidegate.workloads.kubernetes.settings import Enrolment, KubernetesConfig
from tidegate.workloads.source import Treatment

CGROUPS = Path("/sys/fs/cgroup/unified")
RESOURCES = "/apis/consul.hashicorp.com/v1alpha1"
KINDS = {
    "/api/v1/pods": "Pod",
    f"{RESOURCES}/meshes": "Mesh",
    f"{RESOURCES}/proxydefaults": "ProxyDefaults",
    f"{RESOURCES}/servicedefaults": "ServiceDefaults",
    f"{RESOURCES}/serviceintentions": "ServiceIntentions",
}
DEADLINE_S = 30.0


class Node:
    """One node of a cluster: its cgroups, its pods, and its agent while it runs."""

    def __init__(self, directory, api):
        self.api = api
        self.cgroups = CGROUPS / f"tg-agent-{os.getpid()}"
        self.cgroups.mkdir()
        self.stack = contextlib.ExitStack()
        listens = f"unix://{directory}/server.sock"
        self.server = ServerConfig(
            state_dir=directory / "server", listen=listens, trust_domain="mesh.consul"
        )
        self.config = AgentConfig(
            node="n1",
            server=listens,
            run_dir=directory / "run",
            state_dir=directory / "state",
            socket=directory / "agent.sock",
            bpffs=directory / "bpf" / "agent",
            trust_domain="mesh.consul",
            kubernetes=KubernetesConfig(
                server=api.address,
                token_file=directory / "token",
                node=shapes.NODE,
                enrol=Enrolment.ANNOTATED,
                cgroups=self.cgroups,
            ),
        )
        (directory / "token").write_text("token")
        self.config.state_dir.mkdir()
        self.config.run_dir.mkdir(mode=0o711)

    async def run_pod(self, made):
        """Starts a pod's sandbox, without any call of a CNI plugin, and has the server tell of it."""
        name, uid = made["metadata"]["name"], made["metadata"]["uid"]
        namespace = f"tg-test-{os.getpid()}-{name}"
        path = netns.create(namespace)
        self.stack.callback(netns.delete, namespace)
        links.set_up(path, "lo")
        links.add_address(path, "lo", f"{made['status']['podIP']}/32")
        process = netns.spawn(path, ["sleep", "infinity"])
        self.stack.callback(_end, process)
        cgroup = self.cgroups / f"kubepods/burstable/pod{uid}/sandbox"
        cgroup.mkdir(parents=True)
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        await self.api.put(made)
        return path

    def follow_config_entries(self):
        replace = msgspec.structs.replace
        kubernetes = replace(self.config.kubernetes, config_entries=True)
        self.config = replace(self.config, kubernetes=kubernetes)

    @contextlib.asynccontextmanager
    async def agent(self):
        stop = asyncio.Event()
        async with CatalogClient(self.config.server) as catalog:
            daemon = await Daemon.open(self.config, catalog)
            rounds = asyncio.create_task(daemon.run(stop))
            try:
                yield daemon
            finally:
                stop.set()
                await asyncio.wait_for(rounds, DEADLINE_S)
                await daemon.close()

    def close(self):
        self.stack.close()
        for cgroup in sorted(self.cgroups.glob("**/"), reverse=True):
            eventually(lambda cgroup=cgroup: _removed(cgroup))


def _end(process: "subprocess.Popen[bytes]"):
    process.kill()
    process.wait()


def _removed(cgroup):
    """A cgroup is busy for as long as a process that was ended takes to go."""
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


def on_a_node(scenario):
    """A test that is a coroutine, in a directory that the proxy user can pass."""

    def run(monkeypatch):
        monkeypatch.setattr(following_module, "RETRY_S", (0.05, 0.2))
        directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
        directory.chmod(0o711)
        mounts.mount_bpffs(directory / "bpf")

        async def go():
            async with KubernetesApi(KINDS) as api:
                node = Node(directory, api)
                try:
                    async with running(node.server):
                        await scenario(node)
                finally:
                    node.close()

        try:
            asyncio.run(asyncio.wait_for(go(), 4 * DEADLINE_S))
        finally:
            mounts.unmount_below(directory)
            shutil.rmtree(directory)

    run.__name__ = scenario.__name__
    return run


def in_mesh(name, ip):
    made = shapes.pod(f"{name}-0-aaaaa", uid=f"uid-{name}", ip=ip)
    return shapes.annotated(made, tidegate_io__mesh="own")


def has_rules(netns_path):
    return Engine("nftables").current(netns_path) is not None


async def status_where(daemon, condition):
    until = time.monotonic() + DEADLINE_S
    while not condition(status := await daemon._status()):
        assert time.monotonic() < until, msgspec.json.encode(status)
        await asyncio.sleep(0.01)
    return status


def shows(name, redirect):
    return lambda status: any(
        (one.name, one.redirect) == (name, redirect) for one in status.workloads
    )


@pytest.mark.skipif(not (CGROUPS / "cgroup.procs").exists(), reason="no cgroups of version 2")
@on_a_node
async def test_pods_that_were_there_before_the_agent_are_redirected_in_place_and_stay_so(node):
    web = in_mesh("web", "10.42.3.1")
    path = await node.run_pod(web)
    plain = await node.run_pod(shapes.pod("plain-0-aaaaa", uid="uid-plain", ip="10.42.3.2"))
    async with node.agent() as daemon:
        status = await status_where(daemon, shows("web-0-aaaaa", "ok"))
        assert has_rules(path)
        found = {one.name: one for one in status.workloads}
        assert found["web-0-aaaaa"].sidecar == "own"
        assert found["web-0-aaaaa"].reason.startswith('tidegate.io/mesh is "own"; it had run for')
        assert found["web-0-aaaaa"].netns == path
        await status_where(daemon, lambda status: len(status.workloads) == 2)
        assert not has_rules(plain)
        # The server goes, and the agent is started again without it.
        await node.api.stop()
        await status_where(
            daemon, lambda status: any("no Kubernetes" in one for one in status.problems)
        )
        assert has_rules(path)
    async with node.agent() as daemon:
        await status_where(daemon, shows("web-0-aaaaa", "ok"))
        await status_where(
            daemon, lambda status: any("no Kubernetes" in one for one in status.problems)
        )
        assert has_rules(path)
        web["metadata"]["annotations"]["tidegate.io/mesh"] = "false"
        await node.api.put(web)
        await node.api.start()
        await status_where(daemon, shows("web-0-aaaaa", "none"))
        assert not has_rules(path)


@pytest.mark.skipif(not (CGROUPS / "cgroup.procs").exists(), reason="no cgroups of version 2")
@on_a_node
async def test_a_pod_that_runs_and_is_nowhere_is_in_the_status_by_name_until_it_is_found(node):
    async with node.agent() as daemon:
        await status_where(daemon, lambda status: status.round_at > 0)
        await node.api.until_watched()
        lost = in_mesh("lost", "10.42.3.3")
        await node.api.put(lost)
        status = await status_where(daemon, lambda status: status.left_alone != ())
        (left,) = status.left_alone
        assert (left.name, left.treatment) == ("lost-0-aaaaa", Treatment.NOT_FOUND)
        assert any("pod shop/lost-0-aaaaa runs, and" in one for one in status.problems)
        path = await node.run_pod(lost)
        status = await status_where(daemon, shows("lost-0-aaaaa", "ok"))
        assert has_rules(path)
        assert status.left_alone == ()


@pytest.mark.skipif(not (CGROUPS / "cgroup.procs").exists(), reason="no cgroups of version 2")
@on_a_node
async def test_an_agent_goes_by_the_custom_resources_of_its_cluster_and_changes_none(node):
    node.follow_config_entries()
    defaults = {
        "apiVersion": "consul.hashicorp.com/v1alpha1",
        "kind": "ServiceDefaults",
        "metadata": {"name": "web", "namespace": "shop", "uid": "uid-defaults"},
        "spec": {"mutualTLSMode": "permissive"},
    }
    await node.api.put(defaults)
    async with node.agent() as daemon:
        mesh = daemon._mesh
        key = EntryKey(Kind.SERVICE_DEFAULTS, "web")
        until = time.monotonic() + DEADLINE_S
        while (entry := await mesh.read_entry(key)) is None:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        assert entry.mutual_tls_mode is MutualTLSMode.PERMISSIVE
        with pytest.raises(
            InputError, match="service-defaults/web is a custom resource of the cluster"
        ):
            await mesh.write_entry(entry)
        assert await daemon._intent._catalog.read_entries() == ()
        await node.api.stop()
        await status_where(
            daemon, lambda status: any("no Kubernetes" in one for one in status.problems)
        )
        assert "no Kubernetes API server answers" in mesh.outdated
        assert await mesh.read_entry(key) == entry
