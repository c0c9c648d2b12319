"""The names in ClientHellos: puts together what the classifier's programs send of each, and has it read.

Pure. A hello comes in chunks, in the order of its bytes; its names are kept, its bytes only until it is whole.
"""

from collections.abc import Iterable

import msgspec

from tidegate.observe import hello
from tidegate.observe.classifier import HelloChunk

MAX_OPEN = 2048
"""Hellos that are not whole yet, of which the oldest makes room: as many as the kernel follows (TG_PREFIXES_MAX)."""

FlowId = tuple[bytes, int]
"""What tells one flow from all others: its key, and when it was opened in nanoseconds."""


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """What a hello says of itself."""

    sni: str | None = None
    alpn: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


class _Open:
    """A hello that is not known to be whole."""

    __slots__ = ("data", "whole_at")

    def __init__(self) -> None:
        self.data = bytearray()
        self.whole_at = 0
        """How long it is at the least. To read it before would be to no avail: chunks may be of one byte each."""


class HelloBook:
    """The hellos of one observation, of the latest flows up to a limit where there is one."""

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._names: dict[FlowId, Names] = {}
        self._open: dict[FlowId, _Open] = {}

    def take(self, chunks: Iterable[HelloChunk]) -> None:
        """Adds what the programs sent."""
        for chunk in chunks:
            flow = (chunk.key, chunk.opened_ns)
            if chunk.position == 0:
                self._open.pop(flow, None)
                self._open[flow] = _Open()
                if len(self._open) > MAX_OPEN:
                    self._close(next(iter(self._open)))
            one = self._open.get(flow)
            # A gap is what the ring buffer had no room for: the rest would be read as something that it is not.
            if one is None or chunk.position > len(one.data):
                continue
            one.data[chunk.position :] = chunk.bytes
            if len(one.data) < one.whole_at:
                continue
            read = hello.parse(bytes(one.data))
            if read.complete:
                self._close(flow)
            else:
                one.whole_at = len(one.data) + (read.missing or 1)

    def names(self, flow: FlowId) -> Names:
        """What the hello of a flow says, as far as it came; nothing for a flow without one."""
        if flow in self._open:
            return _names(bytes(self._open[flow].data))
        return self._names.get(flow, Names())

    def _close(self, flow: FlowId) -> None:
        self._names[flow] = _names(bytes(self._open.pop(flow).data))
        if self._limit is not None and len(self._names) > self._limit:
            del self._names[next(iter(self._names))]


def _names(data: bytes) -> Names:
    read = hello.parse(data)
    flags = []
    if read.ech:
        flags.append("ech")
    if read.fault is not None:
        flags.append("hello_malformed")
    elif not read.complete:
        flags.append("hello_incomplete")
    return Names(sni=read.sni, alpn=read.alpn or (), flags=tuple(flags))
