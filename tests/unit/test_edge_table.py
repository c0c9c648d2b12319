"""The reading side of the classifier's slots, when programs write meanwhile and when this process is killed."""

import struct
import sys
from collections.abc import Callable
from functools import partial

import pytest

from tidegate.model import FlowClass
from tidegate.observe import abi
from tidegate.observe.edges import EdgeTable

SIZE = struct.calcsize("=Q16sHBB4xIIqqqQQQII")
WORKLOAD, GENERATION = 0x7E57, 3


def slot(flow_class: abi.Class, state: abi.EdgeState, connections: int = 2) -> bytes:
    edge = abi.Edge(generation=GENERATION, state=state)
    edge.key.workload = WORKLOAD
    edge.key.flow_class = flow_class
    edge.tally[abi.Tally.CONNECTION] = connections
    return bytes(edge)


class Memory(bytearray):
    """Memory shared with the kernel, whose programs write while it is read."""

    first_read: bytes | None = None

    def __getitem__(self, index):
        read, self.first_read = self.first_read, None
        return super().__getitem__(index) if read is None else read

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *problem: object) -> None:
        pass


class Edges:
    max_entries = abi.EDGES_MAX

    def __init__(self, *slots: bytes) -> None:
        self.memory = Memory(b"".join(slots))

    def mapped(self, size: int | None = None) -> Memory:
        return self.memory


class Pool:
    def __init__(self, used: int) -> None:
        self._used = used

    def lookup(self, key: bytes) -> bytes:
        return self._used.to_bytes(4, sys.byteorder)


class Slots:
    """The seats and the free slots: what is done to them does not matter here."""

    def __init__(self) -> None:
        self.pushed: list[int] = []

    def delete(self, key: bytes) -> bool:
        return True

    def push(self, value: bytes) -> None:
        self.pushed.append(int.from_bytes(value, sys.byteorder))


def maps_of(edges: Edges) -> dict:
    used = len(edges.memory) // SIZE
    return {
        "edges": edges, "edge_slots": Slots(), "edge_pool": Pool(used), "free_slots": Slots(),
    }  # fmt: skip


def told(maps: dict) -> list[tuple[int, int, int]]:
    return [
        (each.slot, each.generation, each.count.connections)
        for each in EdgeTable(maps).changed(0.0)
    ]


def test_an_edge_is_told_by_the_key_that_its_slot_has_when_it_is_in_use() -> None:
    """A slot is taken again while it is copied: its beginning was read before that, its end after."""
    before = slot(abi.Class.MESH, abi.EdgeState.FREE)
    after = slot(abi.Class.PLAINTEXT, abi.EdgeState.LIVE)
    edges = Edges(after)
    edges.memory.first_read = before[:32] + after[32:]
    table = EdgeTable(maps_of(edges))
    for _ in range(2):
        assert [edge.key.flow_class for edge in table.all(0.0)] == [FlowClass.PLAINTEXT]


class Killed(BaseException):
    pass


def killed_at(line: int, action: Callable[[], None]) -> bool:
    """Does something and dies before the given line (by count) of EdgeTable; whether there was such a line."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith("/edges.py"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    sys.settrace(trace)
    try:
        action()
    except Killed:
        return True
    finally:
        sys.settrace(None)
    return False


def test_whenever_an_agent_is_killed_the_next_one_finds_the_same_counters() -> None:
    line, alive = 0, True
    while alive:
        maps = maps_of(Edges(*[slot(abi.Class.MESH, abi.EdgeState.LIVE)] * 2))
        table = EdgeTable(maps)
        table.changed(0.0)
        alive = killed_at(line, partial(table.forget, [(0, GENERATION), (1, GENERATION)]))
        assert told(maps) == [(0, GENERATION, 2), (1, GENERATION, 2)], f"killed at line {line}"
        line += 1
    assert line > 5


def test_an_agent_that_is_killed_while_it_gives_back_keeps_at_most_one_slot() -> None:
    slots, line, alive = 4, 0, True
    while alive:
        maps = maps_of(Edges(*[slot(abi.Class.MESH, abi.EdgeState.LEAVING)] * slots))
        table = EdgeTable(maps)
        table.changed(0.0)
        alive = killed_at(line, partial(table.changed, 0.0))
        later = EdgeTable(maps)
        later.changed(0.0)
        later.changed(0.0)
        given_back = maps["free_slots"].pushed
        assert len(given_back) == len(set(given_back)) >= slots - 1, f"killed at line {line}"
        line += 1
    assert line > 5


@pytest.mark.parametrize("generation", [GENERATION, GENERATION + 2])
def test_a_slot_of_another_generation_or_state_is_not_forgotten(generation: int) -> None:
    state = abi.EdgeState.LEAVING if generation == GENERATION else abi.EdgeState.LIVE
    maps = maps_of(Edges(slot(abi.Class.MESH, state)))
    before = bytes(maps["edges"].memory)
    EdgeTable(maps).forget([(0, generation)])
    assert bytes(maps["edges"].memory) == before
