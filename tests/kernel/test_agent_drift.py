"""An agent's rounds and its watch over the kernel, with a real server, namespaces, sidecars and rules."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import pytest
from namespaces import pair_of, set_sysctl

from tidegate.catalog.client import CatalogClient
from tidegate.catalog.server import ServerConfig, running
from tidegate.enforce.redirect.engine import Engine
from tidegate.kernel import links, netns
from tidegate.lab import mounts
from tidegate.model import DEFAULT_PROXY_UID, Workload
from tidegate.node import redirection
from tidegate.node.config import AgentConfig
from tidegate.node.daemon import Daemon

DEADLINE_S = 30.0
NEVER_S = 3600.0


class Node:
    """One node: its files, and its agent while it runs."""

    def __init__(self, directory):
        self.config = AgentConfig(
            node="n1",
            server=f"unix://{directory}/server.sock",
            workloads=directory / "workloads",
            run_dir=directory / "run",
            state_dir=directory / "state",
            socket=directory / "agent.sock",
            bpffs=directory / "bpf" / "agent",
            trust_domain="mesh.consul",
        )
        self.server = ServerConfig(
            state_dir=directory / "server", listen=self.config.server, trust_domain="mesh.consul"
        )
        self.config.workloads.mkdir()
        self.config.state_dir.mkdir()
        self.config.run_dir.mkdir(mode=0o711)

    def put(self, file, pair, **fields):
        workload = Workload(
            id=f"id-{file}",
            name=file,
            service=file,
            node="n1",
            netns=pair.pod,
            addresses=(pair.pod_ipv4, pair.pod_ipv6),
            port=8080,
            meshed=True,
        )
        content = msgspec.json.encode(msgspec.structs.replace(workload, **fields))
        (self.config.workloads / f".{file}").write_bytes(content)
        (self.config.workloads / f".{file}").rename(self.config.workloads / f"{file}.json")

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


@pytest.fixture
def node():
    """The directory is one that the proxy user can pass, which pytest's own are not."""
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    directory.chmod(0o711)
    mounts.mount_bpffs(directory / "bpf")
    try:
        yield Node(directory)
    finally:
        mounts.unmount_below(directory)
        shutil.rmtree(directory)


@pytest.fixture
def pods():
    """Two pods, without what agents leave running in them."""
    with pair_of() as one, pair_of() as other:
        try:
            yield one, other
        finally:
            for pod in (one.pod, other.pod):
                end_sidecars(pod)


def end_sidecars(netns_path):
    if Path(netns_path).exists():
        for pid in netns.pids(netns_path):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if is_sidecar(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def no_look_by_the_clock(monkeypatch):
    """Whatever is repaired is repaired because the kernel told of it."""
    monkeypatch.setattr(redirection, "LOOKED_S", NEVER_S)


def create(name):
    """A namespace in which a sidecar can listen."""
    path = netns.create(name)
    set_sysctl(path, "net/ipv6/conf/default/accept_dad", "0")
    links.set_up(path, "lo")


def flush(netns_path):
    """What another program does: a process of its own."""
    process = netns.spawn(
        netns_path, ["nft", "flush", "ruleset"], stdout=subprocess.DEVNULL, stderr=None
    )
    assert process.wait(DEADLINE_S) == 0


def has_rules(netns_path):
    return Engine("nftables").current(netns_path) is not None


async def eventually(condition):
    """The first true answer of a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := await asyncio.to_thread(condition)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    return answer


async def status_where(daemon, name, condition):
    deadline = time.monotonic() + DEADLINE_S
    while True:
        status = await daemon._status()
        for one in status.workloads:
            if one.name == name and condition(one):
                return one
        assert time.monotonic() < deadline, msgspec.json.encode(status)
        await asyncio.sleep(0.01)


def is_meshed(workload):
    return workload.meshed and workload.state == "running" and not workload.problem


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 2 * DEADLINE_S))


def test_what_is_deleted_comes_back_because_the_kernel_tells_of_it(
    node, pods, no_look_by_the_clock
):
    pod, _ = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            await status_where(daemon, "api", is_meshed)
            for times in (1, 2, 3):
                await asyncio.to_thread(flush, pod.pod)
                await eventually(lambda: has_rules(pod.pod))
                seen = await status_where(daemon, "api", lambda one, n=times: one.repairs == n)
                assert seen.last_repair == "table inet tidegate is missing"

    run(scenario())


def test_rules_come_back_while_the_agent_waits_for_a_server_that_hangs(
    node, pods, no_look_by_the_clock, monkeypatch
):
    pod, _ = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            await status_where(daemon, "api", is_meshed)
            asked, answered = asyncio.Event(), asyncio.Event()
            refresh = daemon._intent.refresh

            async def hang():
                asked.set()
                await answered.wait()
                return await refresh()

            monkeypatch.setattr(daemon._intent, "refresh", hang)
            try:
                await asyncio.wait_for(asked.wait(), DEADLINE_S)
                await asyncio.to_thread(flush, pod.pod)
                await eventually(lambda: has_rules(pod.pod))
            finally:
                answered.set()

    run(scenario())


def test_a_namespace_in_which_work_hangs_holds_up_no_other(
    node, pods, no_look_by_the_clock, monkeypatch
):
    slow, other = pods
    slow_one = netns.identity(slow.pod)
    released = threading.Event()
    stuck = threading.Event()
    check, apply = Engine.check, Engine.apply

    def hanging(method):
        def wrapped(engine, netns_path, *args, **kwargs):
            if netns.identity(netns_path) == slow_one:
                stuck.set()
                assert released.wait(2 * DEADLINE_S)
            return method(engine, netns_path, *args, **kwargs)

        return wrapped

    monkeypatch.setattr(redirection, "LONG_S", NEVER_S)
    monkeypatch.setattr(Engine, "check", hanging(check))
    monkeypatch.setattr(Engine, "apply", hanging(apply))
    node.put("a-slow", slow)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            try:
                await eventually(stuck.is_set)
                node.put("other", other)
                await status_where(daemon, "other", is_meshed)
                await asyncio.to_thread(flush, other.pod)
                await eventually(lambda: has_rules(other.pod))
                first = await status_where(daemon, "other", lambda one: one.repairs == 1)
                node.put("other", other, annotations={"tidegate.io/exclude-inbound-ports": "9100"})
                await status_where(
                    daemon, "other", lambda one: is_meshed(one) and one.policy != first.policy
                )
                (node.config.workloads / "other.json").unlink()
                await eventually(lambda: not has_rules(other.pod))
            finally:
                released.set()
            await status_where(daemon, "a-slow", is_meshed)

    run(scenario())


def test_a_workload_that_goes_and_returns_while_it_is_being_removed_is_meshed_again(
    node, pods, monkeypatch
):
    pod, _ = pods
    node.put("api", pod)
    released = threading.Event()
    removing = threading.Event()
    remove = Engine.remove

    def slowly(engine, netns_path):
        removing.set()
        assert released.wait(2 * DEADLINE_S)
        return remove(engine, netns_path)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            before = await status_where(daemon, "api", is_meshed)
            with monkeypatch.context() as patched:
                patched.setattr(Engine, "remove", slowly)
                (node.config.workloads / "api.json").unlink()
                try:
                    await eventually(removing.is_set)
                    node.put("api", pod)
                    began = daemon._round_at
                    await eventually(lambda: daemon._round_at != began)
                finally:
                    released.set()
                await status_where(
                    daemon, "api", lambda one: is_meshed(one) and one.pid != before.pid
                )
            assert has_rules(pod.pod)

    run(scenario())


def test_another_namespace_at_the_same_path_gets_a_sidecar_and_rules_of_its_own(
    node, pods, no_look_by_the_clock
):
    pod, _ = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            before = await status_where(daemon, "api", is_meshed)
            name = Path(pod.pod).name
            netns.delete(name)
            create(name)
            after = await status_where(
                daemon, "api", lambda one: one.meshed and one.pid not in (0, before.pid)
            )
            assert has_rules(pod.pod)
            assert after.pid in netns.pids(pod.pod)
            with pytest.raises(ProcessLookupError):
                os.kill(before.pid, 0)

    run(scenario())


def test_a_namespace_that_comes_later_is_taken_up_at_once(
    node, pods, no_look_by_the_clock, monkeypatch
):
    monkeypatch.setattr(redirection, "FIRST_REST_S", NEVER_S)
    monkeypatch.setattr(redirection, "LONGEST_REST_S", NEVER_S)
    pod, _ = pods
    name = Path(pod.pod).name
    node.put("api", pod)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            before = await status_where(daemon, "api", is_meshed)
            netns.delete(name)
            try:
                gone = await status_where(daemon, "api", lambda one: not one.meshed)
                assert f"no network namespace at {pod.pod}" in gone.problem
            finally:
                create(name)
            await status_where(
                daemon, "api", lambda one: one.meshed and one.pid not in (0, before.pid)
            )
            assert has_rules(pod.pod)

    run(scenario())


def sidecars(node):
    return [path.name for path in (node.config.run_dir / "sidecars").iterdir()]


def test_a_workload_with_another_name_gets_another_sidecar_once(node, pods):
    pod, _ = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            before = await status_where(daemon, "api", is_meshed)
            node.put("api", pod, name="renamed")
            after = await status_where(daemon, "renamed", is_meshed)
            assert after.pid != before.pid
            for _ in range(5):
                began = daemon._round_at
                await eventually(lambda at=began: daemon._round_at > at)
                one = await status_where(daemon, "renamed", lambda _: True)
                assert (one.pid, one.restarts, one.repairs) == (after.pid, 0, 0)
            (directory,) = sidecars(node)
            assert directory.startswith("renamed-")
            assert after.pid in netns.pids(pod.pod)
            assert has_rules(pod.pod)

    run(scenario())


def test_a_workload_that_moves_to_another_namespace_takes_its_sidecar_and_its_rules_along(
    node, pods
):
    pod, other = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server), node.agent() as daemon:
            before = await status_where(daemon, "api", is_meshed)
            node.put("api", pod, netns=other.pod)
            after = await status_where(
                daemon, "api", lambda one: is_meshed(one) and one.netns == other.pod
            )
            assert after.pid in netns.pids(other.pod)
            assert has_rules(other.pod)
            assert not has_rules(pod.pod)
            with pytest.raises(ProcessLookupError):
                os.kill(before.pid, 0)
            assert after.repairs == 0
            assert len(sidecars(node)) == 1

    run(scenario())


def test_a_sidecar_whose_directory_somebody_removed_is_replaced_with_rules_in_place(node, pods):
    pod, _ = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server):
            async with node.agent() as daemon:
                first = await status_where(daemon, "api", is_meshed)
                shutil.rmtree(node.config.run_dir / "sidecars")
                second = await status_where(
                    daemon, "api", lambda one: is_meshed(one) and one.pid != first.pid
                )
                assert has_rules(pod.pod)
            shutil.rmtree(node.config.run_dir / "sidecars")
            async with node.agent() as daemon:
                third = await status_where(
                    daemon, "api", lambda one: is_meshed(one) and one.pid != second.pid
                )
                assert third.repairs == 0
                assert [pid for pid in netns.pids(pod.pod) if is_sidecar(pid)] == [third.pid]

    run(scenario())


def is_sidecar(pid):
    return Path(f"/proc/{pid}").stat().st_uid == DEFAULT_PROXY_UID


def test_an_agent_that_returns_to_a_workload_with_another_name_replaces_its_sidecar(node, pods):
    pod, _ = pods
    node.put("api", pod)

    async def scenario():
        async with running(node.server):
            async with node.agent() as daemon:
                before = await status_where(daemon, "api", is_meshed)
            node.put("api", pod, name="renamed")
            async with node.agent() as daemon:
                after = await status_where(daemon, "renamed", is_meshed)
                assert after.pid != before.pid
                assert (after.restarts, after.repairs) == (0, 0)
                (directory,) = sidecars(node)
                assert directory.startswith("renamed-")
                assert has_rules(pod.pod)

    run(scenario())
