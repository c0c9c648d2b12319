"""The classifier's edges as they are in memory shared with the kernel: what they count, and their slots.

The programs take a slot for each edge and count in it; this reads the slots without a system call, tells those that
changed, and gives back those that nobody needs (bpf/edges.h tells both sides). One process at a time may give back.
"""

import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator

from tidegate.kernel.bpf import Map
from tidegate.kernel.grace import wait_for_programs
from tidegate.model import CountedEdge, Direction, Edge, EdgeCount, EdgeKey, FlowClass, Hint
from tidegate.observe import abi

CLASSES: dict[int, FlowClass] = {
    abi.Class.EMPTY: FlowClass.EMPTY,
    abi.Class.PLAINTEXT: FlowClass.PLAINTEXT,
    abi.Class.TLS: FlowClass.TLS,
    abi.Class.MESH: FlowClass.MESH,
    abi.Class.SERVER_FIRST: FlowClass.SERVER_FIRST,
    abi.Class.STARTTLS: FlowClass.STARTTLS,
    abi.Class.UNKNOWN: FlowClass.UNKNOWN,
}
DIRECTIONS: dict[int, Direction] = {
    abi.Direction.INBOUND: Direction.INBOUND,
    abi.Direction.OUTBOUND: Direction.OUTBOUND,
}
HINTS: dict[int, Hint] = {
    each: Hint(each.name.lower()) for each in abi.Hint if each is not abi.Hint.NONE
}

_EDGE = struct.Struct("=Q16sHBBIIIqqqQQQII")
"""struct tg_edge; abi.Edge names the fields."""
_SIZE = _EDGE.size
_KEY_SIZE = 32
_CHUNK = 64 * _SIZE
"""Compared at once: most edges have not changed since they were last looked at."""
_GENERATION, _STATE = abi.Edge.generation.offset, abi.Edge.state.offset
_GENERATIONS = 1 << 32


class EdgeTable:
    """The slots of the maps that a classifier was opened with. Times are told with the Unix time of the boot."""

    def __init__(self, maps: dict[str, Map]) -> None:
        self._edges = maps["edges"]
        self._seats = maps["edge_slots"]
        self._pool = maps["edge_pool"]
        self._free = maps["free_slots"]
        self._told = b""
        self._keys: dict[int, tuple[int, EdgeKey]] = {}
        """By slot: the generation that the key is of, and the key."""
        self._leaving: list[int] = []
        """Slots whose last counts have been told."""

    def all(self, boot: float) -> list[Edge]:
        """Every edge, also those that every connection has left."""
        return [
            Edge(key=edge.key, count=edge.count)
            for edge in self._parsed(self._read(), b"", boot)
            if edge.live
        ]

    def changed(self, boot: float) -> list[CountedEdge]:
        """Slots that are not as the last call told them; at first all. Those that were forgotten come once more.

        A slot whose last counts the call before this one has told is given back.
        """
        self._give_back()
        raw = self._read()
        changed = list(self._parsed(raw, self._told, boot))
        self._leaving = [edge.slot for edge in changed if not edge.live]
        self._told = raw
        return changed

    def forget(self, slots: Iterable[tuple[int, int]]) -> None:
        """Takes edges, by slot and generation, away from the programs; others than these generations are left alone.

        A connection that goes on is counted in another slot. Waits some milliseconds: what `changed` tells after
        it has returned is final.
        """
        forgotten = False
        with self._edges.mapped() as memory, memoryview(memory) as view, view.cast("I") as words:
            for slot, generation in slots:
                at = slot * _SIZE
                state = at + _STATE
                if words[state // 4] != abi.EdgeState.LIVE:
                    continue
                if words[(at + _GENERATION) // 4] != generation:
                    continue
                # In this order: whoever finds another generation makes the edge anew, which its key would prevent.
                self._seats.delete(memory[at : at + _KEY_SIZE])
                words[(at + _GENERATION) // 4] = (generation + 1) % _GENERATIONS
                words[state // 4] = abi.EdgeState.LEAVING
                forgotten = True
        if forgotten:
            wait_for_programs()

    def forget_all(self, which: Callable[[int], bool]) -> None:
        """Forgets the edges of the workloads that are meant, by their keys."""
        self.forget(
            [
                (edge.slot, edge.generation)
                for edge in self._parsed(self._read(), b"", 0.0)
                if which(edge.key.workload)
            ]
        )

    def _used(self) -> int:
        """How many slots there are to look at, in bytes."""
        raw = self._pool.lookup(bytes(4)) or bytes(4)
        return min(int.from_bytes(raw, sys.byteorder), self._edges.max_entries) * _SIZE

    def _read(self) -> bytes:
        # Mapped for as long as it takes: what is mapped counts as this process's own memory.
        used = self._used()
        if not used:
            return b""
        with self._edges.mapped(used) as memory:
            return memory[:used]

    def _give_back(self) -> None:
        if not self._leaving:
            return
        with self._edges.mapped() as memory, memoryview(memory) as view, view.cast("I") as words:
            for slot in self._leaving:
                words[(slot * _SIZE + _STATE) // 4] = abi.EdgeState.FREE
        for slot in self._leaving:
            self._keys.pop(slot, None)
            self._free.push(slot.to_bytes(4, sys.byteorder))
        self._leaving.clear()

    def _parsed(self, raw: bytes, before: bytes, boot: float) -> Iterator[CountedEdge]:
        """The edges in slots that are not the same in both. One of ten thousand takes two microseconds."""
        keys, unpack = self._keys, _EDGE.unpack
        free, live = int(abi.EdgeState.FREE), int(abi.EdgeState.LIVE)
        for at, one in _differences(raw, before):
            (
                workload, peer, port, direction, flow_class, _, generation, state,
                to_server, to_client, connections, first_seen, last_seen, _, hints, _,
            ) = unpack(one)  # fmt: skip
            if state == free:
                continue
            if state != live:
                generation = (generation - 1) % _GENERATIONS
            slot = at // _SIZE
            known = keys.get(slot)
            if known is None or known[0] != generation:
                key = EdgeKey(
                    workload=workload,
                    direction=DIRECTIONS[direction],
                    peer=address(peer),
                    port=port,
                    flow_class=CLASSES[flow_class],
                )
                keys[slot] = known = generation, key
            yield CountedEdge(
                slot=slot,
                generation=generation,
                live=state == live,
                key=known[1],
                count=EdgeCount(
                    connections=connections,
                    bytes_to_server=to_server,
                    bytes_to_client=to_client,
                    first_seen=first_seen / 1e9 + boot,
                    last_seen=last_seen / 1e9 + boot,
                    hints=_hints(hints) if hints else (),
                ),
            )


def _differences(raw: bytes, before: bytes) -> Iterator[tuple[int, bytes]]:
    """Where slots begin that are not the same in both, and what is in them."""
    for start in range(0, len(raw), _CHUNK):
        chunk, old = raw[start : start + _CHUNK], before[start : start + _CHUNK]
        if chunk == old:
            continue
        for at in range(0, len(chunk), _SIZE):
            one = chunk[at : at + _SIZE]
            if one != old[at : at + _SIZE]:
                yield start + at, one


def _hints(bits: int) -> tuple[Hint, ...]:
    return tuple(hint for number, hint in HINTS.items() if bits & 1 << (number - 1))


def address(raw: bytes) -> str:
    """Canonical text of 16 bytes; IPv4-mapped as IPv4."""
    if raw.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)
