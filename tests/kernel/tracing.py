"""What tests of tracing share: whether it can be had here, and a `tidegate trace` that runs."""

import ctypes
import ipaddress
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tidegate.kernel import cgroups, netns
from tidegate.observe.trace import session
from tidegate.observe.trace.records import Connection, Connections
from tidegate.observe.trace.session import Losses, Missing, Trace

READY = "ready\n"
DEADLINE_S = 60

_PROGRAM_INFO = struct.Struct("=64x16s")
"""The beginning of struct bpf_prog_info (linux/bpf.h), to its name."""

# linux/bpf.h
_CGROUP_SOCK_ADDR = 18
_CGROUP_CONNECT = {4: 10, 6: 11}
_MOVE, _STORE, _EXIT = 0xB7, 0x63, 0x95
_USER_ADDRESS = {4: 4, 6: 8}
"""struct bpf_sock_addr: user_ip4, user_ip6."""
_USER_PORT = 24

# linux/io_uring.h, asm-generic/unistd.h
_SETUP, _ENTER = 425, 426
_GETEVENTS = 1
_ACCEPT, _CONNECT = 13, 16
_AT_ENTRIES = 0x10000000
_SUBMISSION = struct.Struct("=BBHiQQII")
"""The beginning of struct io_uring_sqe, to its length and flags."""
_SUBMISSION_BYTES = 64
_COMPLETION_BYTES = 16


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


@contextmanager
def own_cgroup(*names: str) -> Iterator[Path]:
    """A cgroup v2 of this test's, below others if more than one name is given."""
    top = cgroups.mounted_at() / f"tg-trace-{os.getpid()}"
    made = [top, *(top.joinpath(*names[: count + 1]) for count in range(len(names)))]
    for each in made:
        each.mkdir()
    try:
        yield made[-1]
    finally:
        for each in reversed(made):
            each.rmdir()


def in_cgroup(cgroup: Path, *argv: str) -> list[str]:
    """The command that runs a command in a cgroup, in the same process."""
    return ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(cgroup), *argv]


@contextmanager
def connecting_elsewhere(cgroup: Path, address: str, port: int) -> Iterator[None]:
    """Whoever connects in this cgroup, by the address's family, is connected to this address, as Cilium does it."""
    host = ipaddress.ip_address(address)
    words = struct.unpack(f"={len(host.packed) // 4}i", host.packed)
    stores = [(_USER_ADDRESS[host.version] + 4 * index, word) for index, word in enumerate(words)]
    stores.append((_USER_PORT, socket.htons(port)))
    code = [
        instruction
        for offset, word in stores
        for instruction in ((_MOVE, 2, 0, word), (_STORE, 2 << 4 | 1, offset, 0))
    ]
    code += [(_MOVE, 0, 0, 1), (_EXIT, 0, 0, 0)]
    packed = b"".join(struct.pack("=BBhi", *each) for each in code)
    # struct bpf_prog_load_opts of bpf/bpf.h, its beginning: size, attempts, expected_attach_type.
    options = struct.pack("=QiI", 16, 0, _CGROUP_CONNECT[host.version])
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    program = libbpf.bpf_prog_load(
        _CGROUP_SOCK_ADDR, b"elsewhere", b"GPL", packed, ctypes.c_size_t(len(code)), options
    )
    assert program >= 0, os.strerror(-program)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    link = libbpf.bpf_link_create(program, directory, _CGROUP_CONNECT[host.version], None)
    assert link >= 0, os.strerror(-link)
    try:
        yield
    finally:
        for descriptor in (link, directory, program):
            os.close(descriptor)


class Ring:
    """An io_uring that does one thing at a time; io_uring_setup(2), io_uring_enter(2)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        parameters = ctypes.create_string_buffer(120)
        self._descriptor = self._libc.syscall(_SETUP, 1, parameters)
        if self._descriptor < 0:
            pytest.skip(f"no io_uring here: {os.strerror(ctypes.get_errno())}")
        words = struct.unpack("=30I", parameters.raw)
        self._submitted = dict(zip(("head", "tail", "mask"), words[10:13], strict=True))
        self._submitted["array"] = words[16]
        self._completed = dict(zip(("head", "tail", "mask"), words[20:23], strict=True))
        self._completed["array"] = words[25]
        size = max(
            self._submitted["array"] + 4 * words[0], words[25] + _COMPLETION_BYTES * words[1]
        )
        # IORING_FEAT_SINGLE_MMAP, from Linux 5.4 on: both rings are one mapping.
        self._rings = mmap.mmap(self._descriptor, size)
        self._entries = mmap.mmap(self._descriptor, _SUBMISSION_BYTES, offset=_AT_ENTRIES)

    def __enter__(self) -> "Ring":
        return self

    def __exit__(self, *_: object) -> None:
        self._rings.close()
        self._entries.close()
        os.close(self._descriptor)

    def connect(self, connecting: socket.socket, address: str, port: int) -> None:
        """What connect(2) does; IPv4."""
        name = ctypes.create_string_buffer(
            struct.pack("=H", socket.AF_INET)
            + struct.pack("!H4s8x", port, socket.inet_aton(address)),
            16,
        )
        self._do(_CONNECT, connecting.fileno(), len(name), ctypes.addressof(name))

    def accept(self, listener: socket.socket) -> socket.socket:
        """What accept(2) does."""
        return socket.socket(fileno=self._do(_ACCEPT, listener.fileno(), 0, 0))

    def _do(self, operation: int, descriptor: int, offset: int, address: int) -> int:
        """The result of one operation, waited for."""
        _SUBMISSION.pack_into(self._entries, 0, operation, 0, 0, descriptor, offset, address, 0, 0)
        self._rings[self._submitted["array"] : self._submitted["array"] + 4] = bytes(4)
        self._advance(self._submitted["tail"])
        assert self._libc.syscall(_ENTER, self._descriptor, 1, 1, _GETEVENTS, None, 0) == 1
        index = self._word(self._completed["head"]) & self._word(self._completed["mask"])
        at = self._completed["array"] + _COMPLETION_BYTES * index
        _, result, _ = struct.unpack_from("=QiI", self._rings, at)
        self._advance(self._completed["head"])
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def _word(self, at: int) -> int:
        return struct.unpack_from("=I", self._rings, at)[0]

    def _advance(self, at: int) -> None:
        struct.pack_into("=I", self._rings, at, self._word(at) + 1)
