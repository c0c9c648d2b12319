"""One agent after another, over workloads of every source, under traffic: what is redirected stays so all the time."""

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import pytest
from cni_agent import Runtime
from namespaces import landing, pair_of, serving

from tidegate.kernel import netns
from tidegate.lab import mounts
from tidegate.model import Sidecar, Workload
from tidegate.node.client import AgentClient
from tidegate.node.status import Status
from tidegate.state_files import write_atomically

sys.path.append(str(Path(__file__).parent.parent / "unit"))

from kubernetes_api import KubernetesApi
from kubernetes_pods import annotated, pod

DEADLINE_S = 60.0
PORT, INBOUND = 8080, 20000
UID = "5d1f6d1e-0000-4000-8000-000000000001"
NAMES = ("by-file", "by-process", "by-call", "by-kubernetes")


class Cluster:
    """An API server in a thread of its own, with one pod."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.api = KubernetesApi()

    def __enter__(self):
        self._thread.start()
        self._do(self.api.start())
        made = annotated(pod("by-kubernetes", uid=UID, node="n1"), tidegate_io__mesh="own")
        self._do(self.api.put(made))
        return self

    def __exit__(self, *_):
        self._do(self.api.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)


class Machine:
    """A node with a workload of each source, and one agent after another."""

    def __init__(self, directory, pairs, cluster):
        self.directory = directory
        self.pairs = dict(zip(NAMES, pairs, strict=True))
        self.socket = directory / "agent.sock"
        self.agent = None
        (directory / "workloads").mkdir()
        (directory / "token").write_text("token")
        (directory / "main.pid").write_text(f"{self._process.pid}")
        self.config = {
            "node": "n1",
            "server": f"unix://{directory}/nobody.sock",
            "workloads": f"{directory}/workloads",
            "processes": [
                {"service": "by-process", "pid": f"{directory}/main.pid", "sidecar": "own"}
            ],
            "cni": {"socket": f"{directory}/cni.sock"},
            "kubernetes": {
                "server": cluster.api.address,
                "token_file": f"{directory}/token",
                "ca_file": f"{directory}/token",
                "enrol": "annotated",
            },
            "run_dir": f"{directory}/run",
            "state_dir": f"{directory}/state",
            "socket": str(self.socket),
            "bpffs": f"{directory}/bpf/agent",
            "trust_domain": "mesh.consul",
        }

    @property
    def _process(self):
        if not hasattr(self, "_sleeping"):
            self._sleeping = netns.spawn(self.pairs["by-process"].pod, ["sleep", "600"])
        return self._sleeping

    def write(self, **changes):
        whole = {**self.config, **changes}
        content = {name: value for name, value in whole.items() if value is not None}
        write_atomically(self.directory / "agent.yaml", json.dumps(content).encode())

    def start(self):
        command = [sys.executable, "-m", "tidegate.cli.main", "agent", "run"]
        with (self.directory / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [*command, "--config", self.directory / "agent.yaml"], stderr=log
            )

    def end(self, number=signal.SIGTERM):
        if self.agent is not None:
            self.agent.send_signal(number)
            self.agent.wait(DEADLINE_S)
            self.agent = None

    def close(self):
        self.end()
        self._process.kill()
        self._process.wait()

    def status(self):
        async def ask():
            async with AgentClient(f"unix://{self.socket}") as client:
                return await client.get("/v1/status")

        try:
            return msgspec.convert(asyncio.run(ask()), Status)
        except Exception:  # noqa: BLE001 - nobody answers yet
            return None

    def status_where(self, condition):
        until = time.monotonic() + DEADLINE_S
        while True:
            assert self.agent is None or self.agent.poll() is None, self.log()
            status = self.status()
            if status is not None and condition(status):
                return {one.name: one for one in status.workloads}
            assert time.monotonic() < until, (status, self.log())
            time.sleep(0.05)

    def log(self):
        return (self.directory / "agent.log").read_text()

    @property
    def starts(self):
        """How often an agent began, by whatever configuration."""
        return self.log().count('"agent started"')

    def all_redirected(self):
        """Every workload by name, once there is one of each source and all are redirected and observed."""
        return self.status_where(
            lambda status: (
                {
                    one.name
                    for one in status.workloads
                    if one.redirect == "ok" and one.observed_since and not one.problem
                }
                == set(NAMES)
            )
        )

    def put_file(self):
        pair = self.pairs["by-file"]
        made = Workload(
            id="id-file",
            name="by-file",
            service="by-file",
            node="n1",
            netns=pair.pod,
            addresses=(pair.pod_ipv4,),
            meshed=True,
            sidecar=Sidecar.OWN,
        )
        write_atomically(self.directory / "workloads/by-file.json", msgspec.json.encode(made))

    def call(self, command):
        """What the runtime calls for its two containers; the one in no cluster is called so by its name."""
        runtime = Runtime(self.directory / "cni.sock")
        errors = [
            runtime.call(
                command,
                self.pairs["by-call"].pod,
                "c1",
                arguments="IgnoreUnknown=1;K8S_POD_NAME=by-call",
            ),
            runtime.call(
                command,
                self.pairs["by-kubernetes"].pod,
                "c2",
                arguments=f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=by-kubernetes;K8S_POD_UID={UID}",
            ),
        ]
        assert errors == [{}, {}], self.log()


class Callers:
    """Somebody who calls every workload over and over, and where he comes out."""

    def __init__(self, pairs):
        self._pairs = pairs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.landed = dict.fromkeys(pairs, 0)
        self.astray = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.is_set():
            for name, pair in self._pairs.items():
                try:
                    at = landing(pair.peer, pair.pod_ipv4, PORT).port
                except OSError as error:
                    at = repr(error)
                if at == INBOUND:
                    self.landed[name] += 1
                else:
                    self.astray.append((name, at))

    def go_on(self):
        """Until each has been called some more times."""
        before, until = dict(self.landed), time.monotonic() + DEADLINE_S
        while any(self.landed[name] < before[name] + 5 for name in before):
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def machine():
    directory = Path(tempfile.mkdtemp(prefix="tidegate-test-"))
    directory.chmod(0o711)
    mounts.mount_bpffs(directory / "bpf")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        stack.callback(mounts.unmount_below, directory)
        cluster = stack.enter_context(Cluster())
        pairs = [stack.enter_context(pair_of()) for _ in NAMES]
        for pair in pairs:
            stack.enter_context(serving(pair.pod, "pod", [PORT, INBOUND]))
        made = Machine(directory, pairs, cluster)
        stack.callback(made.close)
        yield made


def test_one_agent_after_another_keeps_every_workload_redirected_observed_and_what_it_was(machine):
    machine.write()
    machine.start()
    machine.status_where(lambda status: status.round_at)
    machine.put_file()
    machine.call("ADD")
    first = machine.all_redirected()
    assert first["by-kubernetes"].id == UID
    with Callers(machine.pairs) as callers:
        callers.go_on()
        # Killed, and another one over what it left.
        machine.end(signal.SIGKILL)
        callers.go_on()
        machine.start()
        second = machine.all_redirected()
        callers.go_on()
        # By another configuration, in which only the runtime's calls are left of Kubernetes.
        machine.write(kubernetes=None, window=60.0)
        machine.agent.send_signal(signal.SIGHUP)
        machine.status_where(lambda _: machine.starts == 3)
        third = machine.all_redirected()
        callers.go_on()
        # A restart with the same.
        machine.end()
        machine.start()
        fourth = machine.all_redirected()
        callers.go_on()
        machine.call("CHECK")
    assert callers.astray == []
    for name, one in first.items():
        for later in (second, third, fourth):
            assert (later[name].id, later[name].netns) == (one.id, one.netns)
            assert later[name].observed_since == pytest.approx(one.observed_since, abs=0.01)
            assert later[name].repairs == 0
    machine.call("DEL")
    machine.status_where(
        lambda status: {one.name for one in status.workloads} == {"by-file", "by-process"}
    )
