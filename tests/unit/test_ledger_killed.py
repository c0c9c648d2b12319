"""An agent that is killed at any moment: no count is lost, none is stored twice.

The kernel is a file that is mapped: what it counts, and which counters it gave back, outlives the process that keeps
the ledger, as the real maps do.
"""

import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tidegate.model import CountedEdge, Direction, EdgeCount, EdgeKey, FlowClass
from tidegate.observe.ledger import Ledger

SLOTS = 24
PEERS = 9
SLOT = struct.Struct("<QQQQ")
"""Peer, generation, connections; whether it is free, live, forgotten, or has been told for the last time."""
ROUNDS = struct.Struct("<Q")
FREE, LIVE, FORGOTTEN, TOLD = range(4)
DEADLINE_S = 20.0


class Kernel:
    """Counters in a file; the last number in it is how many rounds were recorded."""

    def __init__(self, path):
        self.file = path.open("r+b")
        self.memory = mmap.mmap(self.file.fileno(), 0)

    @contextmanager
    def alone(self):
        """One process at a time; one that is killed lets go."""
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    @staticmethod
    def make(path):
        path.write_bytes(bytes(SLOT.size * SLOTS + ROUNDS.size))

    def slot(self, number):
        return SLOT.unpack_from(self.memory, SLOT.size * number)

    def put(self, number, *values):
        SLOT.pack_into(self.memory, SLOT.size * number, *values)

    def rounds(self, more=0):
        at = SLOT.size * SLOTS
        (count,) = ROUNDS.unpack_from(self.memory, at)
        ROUNDS.pack_into(self.memory, at, count + more)
        return count + more

    def connect(self, peer):
        """One more connection, counted by the peer's live counter or by a free one that is taken."""
        slots = [self.slot(number) for number in range(SLOTS)]
        live = [n for n, (of, _, _, state) in enumerate(slots) if state == LIVE and of == peer]
        number = live[0] if live else next(n for n, each in enumerate(slots) if each[3] == FREE)
        _, generation, connections, _ = slots[number]
        if live:
            self.put(number, peer, generation, connections + 1, LIVE)
        else:
            self.put(number, peer, generation + 1, 1, LIVE)

    def changed(self):
        """As Classifier.changed_edges, all of them each time."""
        told = []
        for number in range(SLOTS):
            peer, generation, connections, state = self.slot(number)
            if state == TOLD:
                self.put(number, peer, generation, 0, FREE)
            elif state in (LIVE, FORGOTTEN):
                told.append(counted(number, peer, generation, connections, state == LIVE))
            if state == FORGOTTEN:
                self.put(number, peer, generation, connections, TOLD)
        return told

    def take_over(self):
        """A new process does not know what the one before it told."""
        for number in range(SLOTS):
            peer, generation, connections, state = self.slot(number)
            if state == TOLD:
                self.put(number, peer, generation, connections, FORGOTTEN)

    def forget(self, slots):
        for number, generation in slots:
            peer, present, connections, state = self.slot(number)
            if state == LIVE and present == generation:
                self.put(number, peer, generation, connections, FORGOTTEN)


def counted(slot, peer, generation, connections, live):
    key = EdgeKey(
        workload=1,
        direction=Direction.INBOUND,
        peer=f"10.0.0.{peer}",
        port=80,
        flow_class=FlowClass.MESH,
    )
    count = EdgeCount(
        connections=connections,
        bytes_to_server=10 * connections,
        bytes_to_client=0,
        first_seen=1.7e9,
        last_seen=1.7e9,
    )
    return CountedEdge(slot=slot, generation=generation, live=live, key=key, count=count)


def agent(directory, seed):
    """Records rounds as fast as it can, while time flies: minutes are over every few rounds."""
    chance = random.Random(seed)
    kernel = Kernel(directory / "kernel")
    with kernel.alone():
        kernel.take_over()
    ledger = Ledger.open(directory / "ledger.db")
    assert not ledger.problems(), ledger.problems()
    while True:
        with kernel.alone():
            told = kernel.changed()
        ledger.record(1.7e9 + 9.0 * kernel.rounds(), "map", told, {})
        kernel.rounds(1)
        idle = ledger.dispensable(1.7e9 + 1e6, 100)
        if idle and ledger.is_stored and chance.random() < 0.3:
            with kernel.alone():
                kernel.forget([chance.choice(idle)])


def test_an_agent_killed_at_any_moment_loses_and_repeats_nothing(tmp_path):
    Kernel.make(tmp_path / "kernel")
    kernel = Kernel(tmp_path / "kernel")
    chance = random.Random(4)
    made = {}
    for seed in range(12):
        before = kernel.rounds()
        process = subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(seed)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        deadline = time.monotonic() + DEADLINE_S
        wanted = before + chance.randrange(1, 60)
        while kernel.rounds() < wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline
            peer = chance.randrange(PEERS)
            with kernel.alone():
                kernel.connect(peer)
            made[f"10.0.0.{peer}"] = made.get(f"10.0.0.{peer}", 0) + 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    kernel.take_over()
    ledger = Ledger.open(tmp_path / "ledger.db")
    for step in range(2):
        ledger.record(1.7e9 + 9.0 * (kernel.rounds() + step), "map", kernel.changed(), {})
    assert ledger.problems() == ()
    found = {edge.key.peer: edge.count.connections for edge in ledger.window(None, None, 0, 1e11)}
    assert found == made
    ledger.close()


if __name__ == "__main__":
    agent(Path(sys.argv[1]), int(sys.argv[2]))
