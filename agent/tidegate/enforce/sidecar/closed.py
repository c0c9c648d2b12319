"""Which destinations a sidecar keeps closed, and how often they were wanted: what its log of closed connections says.

Where only mesh destinations are allowed, the application's other connections end in the sidecar and never
reach an interface, so that only Envoy can tell them. Counts are bounded in number, the log in size.
"""

import contextlib
import os

import msgspec

from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.files import LARGEST_LOG, SidecarFiles

MOST_DESTINATIONS = 1024
"""Destinations that are told apart; connections to others are counted together."""

_LONGEST_READ = 4 * LARGEST_LOG
"""Bytes that are taken from the log in one go. What an application adds beyond that is lost."""


class ClosedDestination(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Something outside the mesh that the application tried to reach."""

    destination: str
    """Address and port as Envoy writes them, such as 10.0.0.9:5432 or [fd00::9]:5432; "" for all further ones."""
    connections: int
    last_seen: float
    """When its last connection was read, seconds since the epoch."""


class _Line(msgspec.Struct):
    destination: str


class ClosedDestinations:
    """Counts of one sidecar's log since this agent looks after it, and of what the log held before."""

    def __init__(self, files: SidecarFiles) -> None:
        self._path = files.log(render.CLOSED_LOG)
        self._position = 0
        self._counts: dict[str, tuple[int, float]] = {}

    def read(self, now: float) -> None:
        """Takes in what has been added to the log; OSError when it cannot be read."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._position:
                    self._position = 0
                file.seek(self._position)
                lines, newline, _ = file.read(_LONGEST_READ).rpartition(b"\n")
        except FileNotFoundError:
            return
        self._position += len(lines) + len(newline)
        for line in lines.split(b"\n"):
            # Whoever holds the proxy's user can write into the log, and all that can come of it are wrong counts.
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                self._count(msgspec.json.decode(line, type=_Line).destination, now)
        if self._position > LARGEST_LOG:
            os.truncate(self._path, 0)
            self._position = 0

    def _count(self, destination: str, now: float) -> None:
        if destination not in self._counts and len(self._counts) >= MOST_DESTINATIONS:
            destination = ""
        connections, _ = self._counts.get(destination, (0, 0.0))
        self._counts[destination] = (connections + 1, now)

    @property
    def found(self) -> tuple[ClosedDestination, ...]:
        """All of them, by destination."""
        return tuple(
            ClosedDestination(destination=destination, connections=connections, last_seen=last_seen)
            for destination, (connections, last_seen) in sorted(self._counts.items())
        )
