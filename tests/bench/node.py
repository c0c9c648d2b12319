"""The agent of a node of Kubernetes' size: calls of the CNI plugin, its start among many pods, its memory.

Pods are namespaces with a veth, redirected to sidecars of their own. The plugin is called as a runtime does it, the
others that are compared with it likewise; the processes of a moment are all begun before, and wait for their input.
"""

import contextlib
import json
import os
import selectors
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests import debian
from tests.bench.agent import Agent
from tests.bench.measure import (
    WARM_UPS,
    Alternative,
    Bound,
    Limit,
    Measurement,
    Unit,
    from_samples,
    interleaved,
    milliseconds,
    seconds,
)
from tests.bench.programs import PROCESSES, Variant
from tests.bench.site import REPOSITORY, Site

from tidegate.enforce.redirect.engine import Engine
from tidegate.errors import TidegateError
from tidegate.kernel import netns

PART = "node"

_PLUGIN = REPOSITORY / "agent/tidegate/plugins/tidegate-cni"
_ALONE_ROUNDS = 25
_AT_ONCE = 50
_AT_ONCE_ROUNDS = 3
_PODS = (0, 100, 250)
_STARTS = 3
_READINGS = 3
_ADD = Limit(Bound.MEDIAN_AT_MOST, 20)
_MEMORY = Limit(Bound.MEDIAN_AT_MOST, 100)


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    socket = site.directory / "cni.sock"
    with Agent(site, "cni", cni={"socket": str(socket)}) as agent:
        chain = _Chain(site, agent.node, socket)
        yield _alone(chain)
        yield _at_once(chain)
    with Agent(site, "node") as agent:
        yield _memory(agent)
        yield _starts(agent)


class _Pod(NamedTuple):
    """What a call of a plugin is about."""

    netns: str
    container: str


class _Call:
    """A plugin's process, which waits for its input."""

    def __init__(self, node: str, program: Path, environment: dict[str, str]) -> None:
        self.process = netns.spawn(
            node, [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def give(self, configuration: bytes) -> None:
        """Lets it begin. A configuration is shorter than a pipe is deep."""
        assert self.process.stdin is not None
        self.process.stdin.write(configuration)
        self.process.stdin.close()

    def finish(self) -> None:
        """Waits for its end. TidegateError when it failed."""
        assert self.process.stdout is not None
        answer = self.process.stdout.read().decode()
        self.process.stdout.close()
        if self.process.wait():
            raise TidegateError(f"a plugin failed: {' '.join(answer.split())}")


class _Plugin:
    """One plugin of the node's chain."""

    def __init__(self, node: str, program: Path, configuration: dict[str, object]) -> None:
        self._node = node
        self._program = program
        self._configuration = json.dumps(
            {
                "cniVersion": "1.0.0",
                "name": "bench",
                "type": program.name,
                "prevResult": {"cniVersion": "1.0.0", "interfaces": [], "ips": [], "dns": {}},
                **configuration,
            }
        ).encode()

    def add(self, pod: _Pod) -> float:
        """Milliseconds of one ADD, alone."""
        return self.add_at_once([pod])[0]

    def add_at_once(self, pods: Sequence[_Pod]) -> list[float]:
        """Milliseconds from the moment in which all processes have their input to the answer of each, in that order."""
        calls = [self._begin("ADD", pod) for pod in pods]
        took = []
        with selectors.DefaultSelector() as selector:
            for call in calls:
                assert call.process.stdout is not None
                selector.register(call.process.stdout, selectors.EVENT_READ)
            began = time.perf_counter()
            for call in calls:
                call.give(self._configuration)
            while len(took) < len(calls):
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    took.append((time.perf_counter() - began) * 1e3)
        for call in calls:
            call.finish()
        return took

    def delete(self, pod: _Pod) -> None:
        """Takes away what an ADD has made, if there was one."""
        call = self._begin("DEL", pod)
        call.give(self._configuration)
        call.finish()

    def _begin(self, command: str, pod: _Pod) -> _Call:
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.container,
            "CNI_NETNS": pod.netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self._program.parent),
            "PATH": os.environ.get("PATH", os.defpath),
        }
        return _Call(self._node, self._program, environment)


class _Chain:
    """The node's plugins, and the pods that they are called for."""

    def __init__(self, site: Site, node: str, socket: Path) -> None:
        self._site = site
        plugins = debian.unpacked("plugins", "containernetworking-plugins").path("usr/lib/cni")
        ranges = [[{"subnet": "10.96.0.0/12"}]]
        state = str(site.directory / "addresses")
        ipam = {"type": "host-local", "dataDir": state, "ranges": ranges}
        self.bridge = _Plugin(node, plugins / "bridge", {"bridge": "bench0", "ipam": ipam})
        own = {"socket": str(socket), "mesh": True, "sidecar": "own"}
        self.tidegate = _Plugin(node, _PLUGIN, {"tidegate": own})

    @contextlib.contextmanager
    def pods(self, number: int) -> Iterator[Sequence[_Pod]]:
        """New ones without a network; what a plugin has made for them is taken away in the end."""
        made = [_Pod(self._site.namespace(), os.urandom(8).hex()) for _ in range(number)]
        try:
            yield made
        finally:
            for pod in made:
                self.tidegate.delete(pod)
                self.bridge.delete(pod)
                self._site.remove_namespace(pod.netns)


def _alone(chain: _Chain) -> Measurement:
    number = 3 * (_ALONE_ROUNDS + WARM_UPS)
    with chain.pods(number) as pods:
        fresh = iter(pods)
        programs = Variant.NFT

        def one_by_one() -> float:
            pod = next(fresh)
            return milliseconds(lambda: programs.one_by_one(pod.netns))

        return interleaved(
            PART,
            "a CNI ADD, from the plugin's input to its answer",
            Unit.MILLISECONDS,
            _ALONE_ROUNDS,
            [
                Alternative(
                    "bridge, of containernetworking-plugins", lambda: chain.bridge.add(next(fresh))
                ),
                Alternative("tidegate-cni", lambda: chain.tidegate.add(next(fresh)), _ADD),
                Alternative(f"one iptables process per rule: {PROCESSES}", one_by_one),
            ],
        )


def _at_once(chain: _Chain) -> Measurement:
    """As many for each way in each round, those of one way after those of another."""

    def one_by_one(pods: Sequence[_Pod]) -> list[float]:
        def apply(pod: _Pod) -> float:
            Variant.NFT.one_by_one(pod.netns)
            return (time.perf_counter() - began) * 1e3

        with ThreadPoolExecutor(len(pods)) as threads:
            began = time.perf_counter()
            return sorted(threads.map(apply, pods))

    ways: list[tuple[str, Callable[[Sequence[_Pod]], list[float]], Limit | None]] = [
        ("bridge", chain.bridge.add_at_once, None),
        ("tidegate-cni", chain.tidegate.add_at_once, _ADD),
        ("one iptables process per rule", one_by_one, None),
    ]
    medians: list[list[float]] = [[] for _ in ways]
    slowest: list[list[float]] = [[] for _ in ways]
    for number in range(-WARM_UPS, _AT_ONCE_ROUNDS):
        for (_, add, _), middle, last in zip(ways, medians, slowest, strict=True):
            with chain.pods(_AT_ONCE) as pods:
                took = add(pods)
            if number >= 0:
                middle.append(statistics.median(took))
                last.append(took[-1])
    sampled = [
        (_named(f"{name}, {which}", limit), samples[at])
        for which, samples in (("the median", medians), ("the slowest", slowest))
        for at, (name, _, limit) in enumerate(ways)
    ]
    return from_samples(PART, f"{_AT_ONCE} CNI ADDs at once", Unit.MILLISECONDS, sampled)


def _memory(agent: Agent) -> Measurement:
    sampled = []
    for number in _PODS:
        agent.have_workloads(number, redirected=True)
        held = []
        for _ in range(_READINGS):
            agent.round_cost()
            held.append(agent.memory().rss / 1e6)
        limit = _MEMORY if number == _PODS[-1] else None
        sampled.append((_named(f"{number} redirected pods", limit), held))
    return from_samples(PART, "resident memory of an agent", Unit.MEGABYTES, sampled)


def _starts(agent: Agent) -> Measurement:
    """Among the pods that the agent has."""

    def again() -> float:
        agent.stop()
        return _start(agent)

    def anew() -> float:
        agent.stop()
        agent.forget_programs()
        engine = Engine()
        for pod in agent.pods:
            engine.remove(pod)
        return _start(agent)

    number = len(agent.pods)
    return interleaved(
        PART,
        f"start of an agent until {number} pods are observed and redirected",
        Unit.SECONDS,
        _STARTS,
        [
            Alternative("after another one, which has left all in place", again),
            Alternative("where no agent has been", anew),
        ],
    )


def _start(agent: Agent) -> float:
    def start() -> None:
        agent.start()
        agent.is_as_it_should_be()

    return seconds(start)


def _named(name: str, limit: Limit | None = None) -> Alternative:
    """A line whose samples are taken elsewhere."""
    return Alternative(name, lambda: 0.0, limit)
