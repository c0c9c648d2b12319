"""The classifier's edges as they are in memory shared with the kernel: what they count, and their slots.

The programs take a slot for each edge and count in it; this reads the slots without a system call, tells those that
changed, and gives back those that nobody needs (bpf/edges.h tells both sides). One process at a time may give back.
"""

import mmap
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

_KEY = struct.Struct("=Q16sHBB")
"""struct tg_edge_key without its padding."""
_KEY_SIZE = 32
_EDGE = struct.Struct(f"={_KEY_SIZE}xIIqqqQQQII")
"""struct tg_edge, its key apart; abi.Edge names the fields."""
_SIZE = _EDGE.size
_CHUNK = 64 * _SIZE
"""Compared at once: most edges have not changed since they were last looked at."""
_STATE = abi.Edge.state.offset
_WORD = 8
_LIFE = abi.Edge.generation.offset // _WORD
"""The word of a slot that has its generation and its state: whoever dies leaves both as they were, or neither."""
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
        _, edges = self._read(b"", boot)
        return [Edge(key=edge.key, count=edge.count) for edge in edges if edge.live]

    def changed(self, boot: float) -> list[CountedEdge]:
        """Slots that are not as the last call told them; at first all. Those that were forgotten come once more.

        A slot whose last counts the call before this one has told is given back.
        """
        self._give_back()
        self._told, changed = self._read(self._told, boot)
        self._leaving = [edge.slot for edge in changed if not edge.live]
        return changed

    def forget(self, slots: Iterable[tuple[int, int]]) -> None:
        """Takes edges, by slot and generation, away from the programs; others than these generations are left alone.

        A connection that goes on is counted in another slot. Waits some milliseconds: what `changed` tells after
        it has returned is final.
        """
        forgotten = False
        with self._edges.mapped() as memory, memoryview(memory) as view, view.cast("Q") as words:
            for slot, generation in slots:
                at = slot * _SIZE
                if words[at // _WORD + _LIFE] != _life(generation, abi.EdgeState.LIVE):
                    continue
                # In this order: whoever finds another generation makes the edge anew, which its key would prevent.
                self._seats.delete(memory[at : at + _KEY_SIZE])
                following = (generation + 1) % _GENERATIONS
                words[at // _WORD + _LIFE] = _life(following, abi.EdgeState.LEAVING)
                forgotten = True
        if forgotten:
            wait_for_programs()

    def forget_all(self, which: Callable[[int], bool]) -> None:
        """Forgets the edges of the workloads that are meant, by their keys."""
        _, edges = self._read(b"", 0.0)
        self.forget((edge.slot, edge.generation) for edge in edges if which(edge.key.workload))

    def _used(self) -> int:
        """How many slots there are to look at, in bytes."""
        raw = self._pool.lookup(bytes(4)) or bytes(4)
        return min(int.from_bytes(raw, sys.byteorder), self._edges.max_entries) * _SIZE

    def _read(self, before: bytes, boot: float) -> tuple[bytes, list[CountedEdge]]:
        """What is in the slots, and the edges in those that are not as before."""
        # Mapped for as long as it takes: what is mapped counts as this process's own memory.
        used = self._used()
        if not used:
            return b"", []
        with self._edges.mapped(used) as memory:
            raw = memory[:used]
            return raw, list(self._parsed(raw, before, memory, boot))

    def _give_back(self) -> None:
        if not self._leaving:
            return
        with self._edges.mapped() as memory, memoryview(memory) as view, view.cast("I") as words:
            for slot in self._leaving:
                # In this order, or a program that takes the slot could find it free when it has just made it live.
                words[(slot * _SIZE + _STATE) // 4] = abi.EdgeState.FREE
                self._keys.pop(slot, None)
                self._free.push(slot.to_bytes(4, sys.byteorder))
        self._leaving.clear()

    def _parsed(
        self, raw: bytes, before: bytes, memory: mmap.mmap, boot: float
    ) -> Iterator[CountedEdge]:
        """The edges in slots that are not the same in both. One of ten thousand takes two microseconds.

        `raw` was read while programs were writing. Numbers are whole, and those that come late come next time. A key
        stays: it is read once more, now that its slot is known to be in use, because what was read of it first
        could be of the edge before.
        """
        keys, unpack = self._keys, _EDGE.unpack
        free, live = int(abi.EdgeState.FREE), int(abi.EdgeState.LIVE)
        for at, one in _differences(raw, before):
            (
                generation, state, to_server, to_client, connections,
                first_seen, last_seen, _, hints, _,
            ) = unpack(one)  # fmt: skip
            if state == free:
                continue
            if state != live:
                generation = (generation - 1) % _GENERATIONS
            slot = at // _SIZE
            known = keys.get(slot)
            if known is None or known[0] != generation:
                workload, peer, port, direction, flow_class = _KEY.unpack_from(memory, at)
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


def _life(generation: int, state: abi.EdgeState) -> int:
    """A slot's generation and state, as the two 32 bit numbers are in one word."""
    return int.from_bytes(struct.pack("=II", generation, state), sys.byteorder)


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
