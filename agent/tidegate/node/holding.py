"""One agent at a time for each of its directories: two would undo each other's work."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tidegate.errors import TidegateError

LINGER_S = 2.0
"""How long a child may outlive an agent that was killed; it holds what the agent held alone."""


@contextlib.contextmanager
def held_alone(directory: Path) -> Iterator[None]:
    """Nobody else holds the directory meanwhile. TidegateError when another agent does: two undo each other.

    The kernel lets go of it with the process, however that ends (flock(2)). A BPF file system has no files, so what is
    locked is the directory itself; who has it stands in a file beside, where there can be one.
    """
    holder = directory / "agent.pid"
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TidegateError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            who = f" (process {pid})" if (pid := _written(holder)) else ""
            raise TidegateError(f"another agent{who} uses {directory}; end it first") from error
        except OSError as error:
            raise TidegateError(f"{directory} cannot be locked: {error.strerror}") from error
        with contextlib.suppress(OSError):
            holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        os.close(descriptor)


def _written(holder: Path) -> str:
    """The process that a directory's holder has written down; empty where that cannot be told."""
    try:
        told = holder.read_text(errors="replace")[:20].strip()
    except OSError:
        return ""
    return told if told.isdecimal() else ""


def _lock(descriptor: int) -> None:
    until = time.monotonic() + LINGER_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
