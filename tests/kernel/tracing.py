"""What tests of tracing share: whether it can be had here, and a `tidegate trace` that runs."""

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tidegate.kernel import netns
from tidegate.observe.trace import session
from tidegate.observe.trace.records import Connection, Connections
from tidegate.observe.trace.session import Losses, Missing, Trace

READY = "ready\n"
DEADLINE_S = 60

_PROGRAM_INFO = struct.Struct("=64x16s")
"""The beginning of struct bpf_prog_info (linux/bpf.h), to its name."""


def why_not() -> str:
    """What is missing for tracing here; "" when nothing is."""
    try:
        session.find_headers()
        with session.started([]):
            return ""
    except Missing as error:
        return str(error)


class Tracing:
    """A `tidegate trace --json` that follows."""

    def __init__(self, process: "subprocess.Popen[str]", notes: list[str]) -> None:
        self.process = process
        self.notes = notes
        self.end: dict[str, Any] = {}
        self.told = ""
        """What it wrote to standard error at the end."""

    def stop(self) -> list[dict[str, Any]]:
        """Ends it; the connections that it told."""
        self.process.send_signal(signal.SIGINT)
        out, self.told = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, self.told
        *records, self.end = [json.loads(line) for line in out.splitlines()]
        assert self.end["event"] == "end"
        return records


@contextmanager
def tracing(*arguments: str) -> Iterator[Tracing]:
    """Traces with these arguments; it has begun to follow when this is entered."""
    with subprocess.Popen(
        [sys.executable, "-m", "tidegate.cli.main", "trace", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TIDEGATE_LAB": ""},
    ) as process:
        try:
            notes = []
            for line in process.stderr:
                if line == READY:
                    break
                notes.append(line)
            else:
                pytest.fail(f"tracing did not begin: {''.join(notes)}")
            yield Tracing(process, notes)
        finally:
            process.kill()


class Following:
    """A trace in this process, without what `tidegate trace` asks elsewhere."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.connections = Connections(0.0)
        self.losses = Losses()

    def stop(self) -> list[Connection]:
        """Ends it; the connections that it told."""
        events, self.losses = self.trace.stop()
        self.connections.take(events)
        return self.connections.rest()


@contextmanager
def following(netns_path: str) -> Iterator[Following]:
    """Traces a network namespace."""
    with session.started([netns.identity(netns_path).inode]) as trace:
        yield Following(trace)


def loaded_programs() -> set[tuple[int, str]]:
    """Number and name of every BPF program of this machine."""
    libbpf = ctypes.CDLL("libbpf.so.1")
    found, number = set(), ctypes.c_uint32(0)
    while libbpf.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        descriptor = libbpf.bpf_prog_get_fd_by_id(number)
        if descriptor < 0:
            # It went meanwhile.
            continue
        info, size = ctypes.create_string_buffer(_PROGRAM_INFO.size), ctypes.c_uint32()
        size.value = _PROGRAM_INFO.size
        libbpf.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size))
        os.close(descriptor)
        (name,) = _PROGRAM_INFO.unpack(info.raw)
        found.add((number.value, name.rstrip(b"\0").decode()))
    return found


def only(records: list[dict[str, Any]], **fields: object) -> dict[str, Any]:
    """The one record that has all these values."""
    found = [one for one in records if all(one[name] == value for name, value in fields.items())]
    assert len(found) == 1, f"{fields}: {found or records}"
    return found[0]
