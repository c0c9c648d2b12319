"""Whatever happens to the agent while connections run, the ledger has each of them, and every byte, once.

What is killed is the observing side of the agent (`Observation`), on real maps and a real file, in a process of its own
for which time flies: a minute of the history is over in a second. The clients are in the test's process and count for
themselves. TIDEGATE_SEED is the seed (0), TIDEGATE_SOAK=1 makes it twenty times as long.
"""

import contextlib
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from classifying import bpffs
from conversations import TRUST_DOMAIN, Caller, Counted, Progress, node_for_pods
from namespaces import DEADLINE_S, tell

from tidegate.kernel import netns
from tidegate.kernel.bpf import Map
from tidegate.model import EdgeKey, FlowClass, Workload
from tidegate.node import observation
from tidegate.node.config import AgentConfig
from tidegate.node.observation import Observation
from tidegate.observe import abi, budget, edges, history
from tidegate.observe.classifier import Classifier
from tidegate.observe.counting import Counting
from tidegate.observe.edges import CLASSES, EdgeTable
from tidegate.observe.ledger import Ledger

SEED = int(os.environ.get("TIDEGATE_SEED", "0"))
LENGTH = 20 if os.environ.get("TIDEGATE_SOAK") else 1
KILLS = 24 * LENGTH
CONVERSATIONS = 240 * LENGTH
"""Of each caller."""
PODS = ((0,), (1,), range(2, 2 + 4 * LENGTH), range(100, 100 + 4 * LENGTH))
"""Of each caller: two that stay, and those that are there for a while."""
PLENTY, SCARCE = abi.EDGES_MAX, 100
"""Slots for edges."""
FLIES = 60.0
"""How many seconds pass in one."""
STEPS = (
    (EdgeTable, "changed"), (EdgeTable, "forget"), (EdgeTable, "forget_all"), (edges, "wait_for_programs"),
    (Map, "delete"), (Map, "push"), (Ledger, "record"), (history, "store_edges"), (history, "add_minute"),
    (history, "store_counted"), (history, "drop_rounds"), (Counting, "stored"), (Classifier, "attach"),
    (Classifier, "detach"),
)  # fmt: skip
"""Before and behind which an agent can be killed."""


def config_in(directory: Path) -> AgentConfig:
    return AgentConfig(
        node="n",
        server="unix:///none",
        workloads=directory / "workloads",
        state_dir=directory,
        bpffs=directory / "bpf",
        trust_domain=TRUST_DOMAIN,
    )


# The process that is killed


def observe(directory: Path, began: float, chance: random.Random, *, may_die: bool) -> None:
    """Rounds as fast as they go; after each it says whom it observes. Behind the first it may die at a step."""
    observation.GIVE_BACK_S = 0.0
    config = config_in(directory)
    observed = Observation(config)
    for rounds in itertools.count():
        passed = time.time() - began
        now = began + FLIES * passed
        # Kernel time does not fly. In some rounds no edge has been out of use for long enough to go, in some all have.
        budget.IDLE_S = (FLIES - 1) * passed + chance.choice((1e9, 0.5, 0.0))
        if rounds == 1 and may_die and chance.random() < 0.7:
            die_at(*chance.choice(STEPS), chance)
        living = []
        for file in config.workloads.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                living.append(msgspec.json.decode(file.read_bytes(), type=Workload))
        observed.look(living)
        for workload in living:
            observed.attach(workload)
        for key in observed.unclaimed(living):
            observed.detach(key)
        observed.collect(now, ())
        say("round", *(each.key for each in living if observed.observed_since(each)))


def die_at(where: Any, name: str, chance: random.Random) -> None:
    """Before or behind one of the next times that this is called."""
    function, behind, left = getattr(where, name), chance.random() < 0.5, [chance.randint(1, 8)]

    def dying(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if not left[0] and not behind:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = function(*args, **kwargs)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(where, name, dying)


def say(*words: object) -> None:
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def serve(directory: Path, began: float) -> None:
    """For each line, a seed, a process that observes, and word of its end."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            try:
                observe(directory, began, random.Random(line), may_die="True" in line)
            finally:
                traceback.print_exc()
                os._exit(1)
        say("began", pid)
        os.waitpid(pid, 0)
        say("ended")


class Agents:
    """The observing side of an agent, in one process after the other."""

    def __init__(self, node: str, directory: Path, began: float, told: threading.Condition) -> None:
        self._workloads = config_in(directory).workloads
        self._workloads.mkdir()
        command = [sys.executable, __file__, str(directory), str(began)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = netns.run_in(
            node,
            lambda: subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            ),
        )
        self._told = told
        self._pid = 0
        self._observed: set[int] = set()
        self._over = False
        self.rounds = 0
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def start(self, seed: str, *, may_die: bool) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed} {may_die}\n")
        self.until(lambda: self.is_alive)

    def kill(self) -> None:
        """If it has not died by itself."""
        pid = self._pid
        if pid:
            with contextlib.suppress(ProcessLookupError):
                # It may have died just now, and word of that be on its way.
                os.kill(pid, signal.SIGKILL)
            self.until(lambda: not self.is_alive)

    @property
    def is_alive(self) -> bool:
        return bool(self._pid)

    def announce(self, workload: Workload) -> None:
        """Returns when it is observed."""
        file = self._file(workload)
        unfinished = file.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(workload))
        unfinished.rename(file)
        self.until(lambda: workload.key in self._observed)

    def withdraw(self, workload: Workload) -> None:
        self._file(workload).unlink()

    def close(self) -> None:
        self.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._listener.join()
        self._process.wait()

    def _file(self, workload: Workload) -> Path:
        return self._workloads / f"{workload.id}.json"

    def until(self, condition: Callable[[], object]) -> None:
        with self._told:
            assert self._told.wait_for(lambda: condition() or self._over, 6 * DEADLINE_S)
            assert not self._over

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            what, *numbers = line.split()
            with self._told:
                match what:
                    case "began":
                        self._pid = int(numbers[0])
                    case "ended":
                        self._pid = 0
                    case "round":
                        self.rounds += 1
                        self._observed = {int(number) for number in numbers}
                self._told.notify_all()
        with self._told:
            self._over = True
            self._told.notify_all()


# The test's own part


class Outcome(NamedTuple):
    """What should be counted in the end, and what is."""

    expected: dict[EdgeKey, Counted]
    edges: dict[EdgeKey, Counted]
    """In the ledger, those of which anything is left."""
    overflow: dict[FlowClass, Counted]
    """In the kernel."""
    losses: dict[str, int]
    rounds: int


def watched(directory: Path, slots: int) -> Outcome:
    """Callers are in conversation while agents come and go."""
    began = time.time()
    told = threading.Condition()
    progress = Progress(told)
    with ExitStack() as stack:
        bpf = stack.enter_context(bpffs(directory / "bpf"))
        node = stack.enter_context(node_for_pods())
        agents = stack.enter_context(contextlib.closing(Agents(node, directory, began, told)))
        agents.start("first", may_die=False)
        agents.until(lambda: agents.rounds)
        with Map.open_pinned(bpf / "classifier" / "maps" / "edge_pool") as taken:
            taken.update(bytes(4), struct.pack("=I", abi.EDGES_MAX - slots))
        callers = [
            Caller(node, number, agents, progress, random.Random(f"{SEED} {number}"))
            for number in range(len(PODS))
        ]
        with ThreadPoolExecutor(len(callers)) as pool:
            calls = [
                pool.submit(caller.call, pods, CONVERSATIONS // len(pods))
                for caller, pods in zip(callers, PODS, strict=True)
            ]
            try:
                kill_now_and_then(agents, progress, random.Random(SEED))
            finally:
                for call in calls:
                    call.result()
        agents.kill()
        netns.run_in(node, last_rounds, directory, began + FLIES * (time.time() - began))
        with contextlib.closing(netns.run_in(node, Classifier.open, bpf)) as classifier:
            losses = classifier.losses().lost_by_name()
        return Outcome(
            {key: counted for caller in callers for key, counted in caller.edges.items()},
            edges_of_ledger(directory),
            overflow_in(bpf),
            {name: count for name, count in losses.items() if count},
            agents.rounds,
        )


def kill_now_and_then(agents: Agents, progress: Progress, chance: random.Random) -> None:
    """At any moment, some not before their first round; if they have not died by themselves."""
    every = len(PODS) * CONVERSATIONS
    for number in range(KILLS):
        rounds = agents.rounds + chance.randrange(2)
        ended = min(progress.ended + chance.randrange(2 * every // KILLS), every)
        agents.until(
            lambda rounds=rounds, ended=ended: (
                (agents.rounds >= rounds and progress.ended >= ended) or not agents.is_alive
            )
        )
        agents.kill()
        agents.start(f"{SEED} {number}", may_die=number + 1 < KILLS)
    while (so_far := progress.ended) < every:
        agents.until(lambda so_far=so_far: progress.ended > so_far)


def last_rounds(directory: Path, now: float) -> None:
    """What was in the kernel when the last agent died, also of edges that are on their way back to it."""
    observed = Observation(config_in(directory))
    for later in range(3):
        observed.collect(now + later, ())
    observed.close()


def edges_of_ledger(directory: Path) -> dict[EdgeKey, Counted]:
    with contextlib.closing(Ledger.open(directory / "ledger.sqlite")) as ledger:
        assert ledger.problems() == ()
        found = {
            edge.key: Counted(
                edge.count.connections, edge.count.bytes_to_server, edge.count.bytes_to_client
            )
            for edge in ledger.window(None, None, 0.0, 1e11)
        }
    return {key: counted for key, counted in found.items() if counted != Counted()}


def overflow_in(bpf: Path) -> dict[FlowClass, Counted]:
    found = {}
    with Map.open_pinned(bpf / "classifier" / "maps" / "overflow") as overflow:
        for number, flow_class in CLASSES.items():
            tally = abi.Edge.from_buffer_copy(overflow.lookup(struct.pack("=I", number))).tally
            found[flow_class] = Counted(
                tally[abi.Tally.CONNECTION], tally[abi.Role.CLIENT], tally[abi.Role.SERVER]
            )
    return found


def sums(*parts: Iterable[tuple[FlowClass, Counted]]) -> dict[FlowClass, Counted]:
    found = dict.fromkeys(FlowClass, Counted())
    for part in parts:
        for flow_class, counted in part:
            found[flow_class] = found[flow_class].plus(counted)
    return found


def by_class(edges: dict[EdgeKey, Counted]) -> Iterable[tuple[FlowClass, Counted]]:
    return [(key.flow_class, counted) for key, counted in edges.items()]


def story(outcome: Outcome) -> str:
    connections = sum(counted.connections for counted in outcome.expected.values())
    overflow = sum(counted.connections for counted in outcome.overflow.values())
    return (
        f"seed {SEED}: {connections} connections on {len(outcome.expected)} edges, {KILLS} agents killed in "
        f"{outcome.rounds} rounds, {overflow} connections in the overflow"
    )


def test_every_edge_has_what_its_clients_did_although_agents_are_killed_meanwhile(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    outcome = watched(tmp_path, PLENTY)
    tell(pytestconfig, story(outcome))
    assert outcome.edges == outcome.expected
    assert outcome.losses == {}


def test_edges_and_overflow_have_what_clients_did_where_few_edges_fit(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    outcome = watched(tmp_path, SCARCE)
    tell(pytestconfig, story(outcome))
    counted = sums(by_class(outcome.edges), outcome.overflow.items())
    assert counted == sums(by_class(outcome.expected))
    assert outcome.losses["edge_not_stored"]
    assert any(each.connections for each in outcome.overflow.values())


if __name__ == "__main__":
    serve(Path(sys.argv[1]), float(sys.argv[2]))
