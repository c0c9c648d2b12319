"""The classifier's flow map: connections by a hash of what makes them one (bpf/flows.h tells both sides).

The hash depends on a seed that is made with the maps and stays with them. Knows keys and values as bytes: struct
tg_flow_key, struct tg_flow.
"""

import ctypes
import secrets
import struct
import sys
from collections.abc import Iterator

from tidegate.kernel.bpf import Map
from tidegate.observe import abi

_WORDS = struct.Struct(f"={abi.FLOW_KEY_WORDS}Q")
_SEED = bytes(4)
"""The key of the only entry of flow_seed."""
_KEY = slice(abi.Flow.key.offset, abi.Flow.key.offset + abi.Flow.key.size)
_WORKLOAD = slice(abi.Flow.workload.offset, abi.Flow.workload.offset + abi.Flow.workload.size)
_ALL = (1 << 64) - 1
_HALF = (1 << 32) - 1


class FlowMap:
    """The connections of the maps that a classifier was opened with."""

    def __init__(self, maps: dict[str, Map]) -> None:
        """Makes the seed, where these maps have none: before any program runs."""
        self._flows = maps["flows"]
        stored = maps["flow_seed"].lookup(_SEED)
        if not stored or not any(stored):
            stored = secrets.token_bytes(ctypes.sizeof(abi.FlowSeed))
            maps["flow_seed"].update(_SEED, stored)
        self._seed = _WORDS.unpack(stored)

    def values(self) -> Iterator[bytes]:
        """All connections, open and closed."""
        for _, value in self._flows.items():
            yield value

    def take(self, key: bytes) -> bytes | None:
        """Takes a connection out; None where there is none."""
        name = self._hash(key)
        value = self._flows.lookup(name)
        if value is None or key_of(value) != key:
            return None
        self._flows.delete(name)
        return value

    def put(self, value: bytes) -> None:
        """Puts back what `take` gave."""
        self._flows.update(self._hash(key_of(value)), value)

    def forget(self, workload_key: int) -> None:
        """Takes all connections of a workload out."""
        workload = workload_key.to_bytes(abi.Flow.workload.size, sys.byteorder)
        for name in [name for name, value in self._flows.items() if value[_WORKLOAD] == workload]:
            self._flows.delete(name)

    def _hash(self, key: bytes) -> bytes:
        """flow_hash of bpf/flows.h."""
        total = 0
        for word, seed in zip(_WORDS.unpack(key), self._seed, strict=True):
            added = (word + seed) & _ALL
            total += (added >> 32) * (added & _HALF)
        return (total & _ALL).to_bytes(8, sys.byteorder)


def key_of(value: bytes) -> bytes:
    """What the connection of a struct tg_flow is known by."""
    return value[_KEY]
