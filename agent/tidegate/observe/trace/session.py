"""A running trace: the process that compiles and reads, and what it tells.

Knows what the programs need of the kernel: tracepoints, offsets of fields, system call numbers, headers of any version.
What is missing is a `Missing`, which says what to install, or a note of what cannot be told without it.
"""

import contextlib
import os
import platform
import select
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import IO, NamedTuple

import msgspec

from tidegate.errors import TidegateError
from tidegate.kernel import btf
from tidegate.kernel.errors import KernelError
from tidegate.observe.trace.records import Event

PYTHON = "/usr/bin/python3"
"""Debian's, the only one that sees its packages."""
MOST_NETNS = 1024
"""Network namespaces that one trace can be limited to."""

_HERE = Path(__file__).parent
_PROGRAM = _HERE / "program.c"
_READER = _HERE / "reader.py"
_MODULES = Path("/lib/modules")
_KERNEL_HEADERS = Path("/sys/kernel/kheaders.tar.xz")
_INSTALL = "`apt-get install python3-bpfcc linux-headers-$(dpkg --print-architecture)`"
"""On Debian. The package of headers is that of the distribution's newest kernel."""
_START_S = 180.0
"""Compiling takes half a second on a machine that has nothing else to do, a minute on one that is emulated."""
_END_S = 10.0
_CHUNK = 1 << 16
_SAID_BYTES = 4096

_STATE = "inet_sock_set_state"
_HOOKS: tuple[tuple[str, str], ...] = (
    ("tcp_send_reset", "on_reset"),
    ("tcp_probe", "on_segment"),
    ("tcp_rcv_space_adjust", "on_read"),
    ("sys_enter", "on_call"),
    ("sys_exit", "on_return"),
    # Last: a connection is followed from here on.
    (_STATE, "on_state"),
)
"""Raw tracepoints (include/trace/events/{sock,tcp,syscalls}.h) and the functions of program.c for them."""

_LOST_WITHOUT = {
    "tcp_send_reset": "where a refused connection was redirected to",
    "tcp_probe": "when a first byte arrived (told is when it was read)",
    "tcp_rcv_space_adjust": "a first byte that came with the handshake, and who accepted by io_uring",
    "sys_enter": "what was dialled, where a program of a cgroup changes it",
    "sys_exit": "who accepted (told is who read), and connects that failed before a packet was sent",
}

_FIELDS: dict[str, tuple[str, str]] = {
    "SOCK_FAMILY": ("sock", "__sk_common.skc_family"),
    "SOCK_NET": ("sock", "__sk_common.skc_net"),
    "SOCK_NUMBER": ("sock", "__sk_common.skc_num"),
    "SOCK_PEER_PORT": ("sock", "__sk_common.skc_dport"),
    "SOCK_PEER_IPV4": ("sock", "__sk_common.skc_daddr"),
    "SOCK_LOCAL_IPV4": ("sock", "__sk_common.skc_rcv_saddr"),
    "SOCK_PEER_IPV6": ("sock", "__sk_common.skc_v6_daddr"),
    "SOCK_LOCAL_IPV6": ("sock", "__sk_common.skc_v6_rcv_saddr"),
    "SOCK_LOCAL_PORT": ("inet_sock", "inet_sport"),
    "SOCK_PROTOCOL": ("sock", "sk_protocol"),
    "SOCK_ERROR": ("sock", "sk_err"),
    "NET_NUMBER": ("net", "ns.inum"),
    "PACKET_LENGTH": ("sk_buff", "len"),
    "PACKET_DATA": ("sk_buff", "data"),
    "PACKET_HEAD": ("sk_buff", "head"),
    "PACKET_NETWORK": ("sk_buff", "network_header"),
    "PACKET_TRANSPORT": ("sk_buff", "transport_header"),
    "PACKET_DEVICE": ("sk_buff", "dev"),
    "DEVICE_NET": ("net_device", "nd_net"),
    "TASK_LEADER": ("task_struct", "group_leader"),
    "TASK_NAME": ("task_struct", "comm"),
    "TASK_FILES": ("task_struct", "files"),
    "FILES_TABLE": ("files_struct", "fdt"),
    "TABLE_SIZE": ("fdtable", "max_fds"),
    "TABLE_FILES": ("fdtable", "fd"),
    "FILE_DATA": ("file", "private_data"),
    "SOCKET_SOCK": ("socket", "sk"),
}
"""Constants of program.c that are offsets of fields."""


class _Machine(msgspec.Struct, frozen=True):
    """What differs between processors."""

    architecture: str
    """Its directory below arch/ in the kernel's sources."""
    calls: Mapping[str, int]
    """Numbers of system calls (asm/unistd.h)."""
    registers: Mapping[str, str]
    """Fields of struct pt_regs: of the call's number, first and second argument, at entry and at return."""
    first_of_array: int = 0
    """Bytes to add to the field of the second argument."""


_MACHINES = {
    "x86_64": _Machine(
        "x86",
        {"CALL_CONNECT": 42, "CALL_ACCEPT": 43, "CALL_ACCEPT4": 288},
        {"REGISTERS_CALL": "orig_ax", "REGISTERS_FIRST": "di", "REGISTERS_SECOND": "si"},
    ),
    "aarch64": _Machine(
        "arm64",
        {"CALL_CONNECT": 203, "CALL_ACCEPT": 202, "CALL_ACCEPT4": 242},
        # The first register holds the result at return; the kernel keeps the argument for restarts.
        {"REGISTERS_CALL": "syscallno", "REGISTERS_FIRST": "orig_x0", "REGISTERS_SECOND": "regs"},
        first_of_array=8,
    ),
}


class Missing(TidegateError):
    """Tracing needs something that is not here; the message says what, and how to get it."""


class Headers(msgspec.Struct, frozen=True):
    """Headers of a kernel, of whatever version."""

    source: str | None
    """Directory with include/linux, for bcc; None where bcc finds them itself."""
    flags: tuple[str, ...] = ()
    """For the compiler: where the files are that a build generates."""


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace missed."""

    events: int = 0
    """There was no room in the ring buffer."""
    sockets: int = 0
    """More connections were open at a time than could be followed."""

    def sentences(self) -> tuple[str, ...]:
        """One for each that is not 0."""
        told = (
            (self.events, "events lost, because there were more at a time than could be read"),
            (self.sockets, "connections not followed, because too many were open at a time"),
        )
        return tuple(f"{what}: {count}" for count, what in told if count)


def find_headers(modules: Path = _MODULES, archive: Path = _KERNEL_HEADERS) -> Headers:
    """The headers to compile with: the running kernel's if they are here, else any. Missing when there are none."""
    release = os.uname().release
    if (modules / release / "build").exists() or archive.exists():
        return Headers(None)
    machine = _machine()
    for build in sorted(modules.glob("*/build"), reverse=True):
        # Debian keeps what a build generates apart from what all builds share.
        source = next(
            (
                place
                for place in (build.parent / "source", build)
                if (place / "include/linux/kconfig.h").exists()
            ),
            None,
        )
        if source is not None and (build / "include/generated/autoconf.h").exists():
            generated = (
                "include",
                f"arch/{machine.architecture}/include/generated",
                f"arch/{machine.architecture}/include/generated/uapi",
                "include/generated/uapi",
            )
            return Headers(
                str(source.resolve()), tuple(f"-I{build.resolve()}/{one}" for one in generated)
            )
    raise Missing(
        f"tracing compiles with kernel headers, of whatever kernel, and there are none in {modules}: {_INSTALL}"
    )


def _machine() -> _Machine:
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise Missing(
            f"tracing is not known for processors of type {platform.machine()}; "
            f"expected one of {', '.join(_MACHINES)}"
        )
    return machine


def _defines() -> dict[str, int]:
    """The constants of program.c. Missing for a kernel that does not tell its layout."""
    machine = _machine()
    fields = _FIELDS | {name: ("pt_regs", field) for name, field in machine.registers.items()}
    try:
        found = btf.offsets_in_kernel(fields.values())
    except KernelError as error:
        raise Missing(f"tracing needs to know the kernel's structures: {error}") from error
    unknown = sorted(f"{kind}.{path}" for (kind, path), offset in found.items() if offset is None)
    if unknown:
        raise Missing(f"tracing does not know this kernel: it has no {', '.join(unknown)}")
    defines = {name: found[field] or 0 for name, field in fields.items()}
    defines["REGISTERS_SECOND"] += machine.first_of_array
    return defines | dict(machine.calls)


class _Failure(msgspec.Struct, frozen=True):
    what: str
    reason: str


class _Answer(msgspec.Struct, frozen=True):
    """A line of the reader that is no event: the first or the last."""

    ready: dict[str, str] = {}
    """Tracepoints that could not be attached to, and why."""
    failed: _Failure | None = None
    losses: tuple[int, int] | None = None
    """In the order of enum loss of program.c."""


class Trace:
    """What the programs tell; make one with `started`."""

    def __init__(self, reader: "_Reader", said: IO[bytes]) -> None:
        self._reader = reader
        self._said = said
        self._rest = b""
        self.notes = self._await_ready()
        """What cannot be told on this kernel, one sentence each."""

    def events(self, timeout_s: float) -> list[Event]:
        """What was told since, after at most so many seconds. TidegateError when the reader ended by itself."""
        lines, ended = self._lines(timeout_s)
        if ended:
            raise TidegateError(f"tracing ended by itself: {self._last_words()}")
        return [msgspec.json.decode(line, type=Event) for line in lines]

    def stop(self) -> tuple[list[Event], Losses]:
        """Ends the trace; what it had told until then, and what it missed. TidegateError when it does not end."""
        self._reader.questions.close()
        events: list[Event] = []
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            lines, ended = self._lines(deadline - time.monotonic())
            for line in lines:
                losses = msgspec.json.decode(line, type=_Answer).losses
                if losses is not None:
                    return events, Losses(events=losses[0], sockets=losses[1])
                events.append(msgspec.json.decode(line, type=Event))
            if ended:
                break
        raise TidegateError(f"what was lost is not known: {self._last_words()}")

    def _lines(self, timeout_s: float) -> tuple[list[bytes], bool]:
        """Whole lines, and whether there will be no more."""
        answers = self._reader.answers
        if not select.select([answers], [], [], max(timeout_s, 0.0))[0]:
            return [], False
        chunk = answers.read(_CHUNK) or b""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return lines, not chunk

    def _await_ready(self) -> tuple[str, ...]:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            lines, ended = self._lines(deadline - time.monotonic())
            if lines:
                # Until it is ready there is one line, and this was all that came with it.
                self._rest = b"\n".join([*lines[1:], self._rest])
                return _notes(self._refusals(msgspec.json.decode(lines[0], type=_Answer)))
            if ended:
                raise TidegateError(f"tracing did not begin: {self._last_words()}")
        raise TidegateError(f"tracing did not begin within {_START_S:g} s")

    def _refusals(self, answer: _Answer) -> dict[str, str]:
        match answer.failed:
            case None:
                return answer.ready
            case _Failure("bcc", reason):
                raise Missing(
                    f"tracing needs bcc, which {PYTHON} cannot import ({reason}): {_INSTALL}"
                )
            case _Failure(_, reason):
                raise TidegateError(f"bcc cannot compile the trace: {reason}: {self._last_words()}")

    def _last_words(self) -> str:
        """What bcc and the compiler printed last, in one line."""
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - _SAID_BYTES))
        words = self._said.read().decode(errors="replace")
        return "; ".join(line.strip() for line in words.splitlines() if line.strip()) or "no reason"


def _notes(refusals: Mapping[str, str]) -> tuple[str, ...]:
    """What cannot be told without these tracepoints. Missing when it is nothing at all."""
    if _STATE in refusals:
        raise Missing(
            f"tracing needs the kernel's tracepoint {_STATE}, from Linux 4.16 on, as a raw tracepoint: "
            f"{refusals[_STATE]}"
        )
    return tuple(
        f"this kernel cannot tell {_LOST_WITHOUT[tracepoint]}: no tracepoint {tracepoint}"
        for tracepoint in refusals
    )


@contextlib.contextmanager
def started(
    netns: Collection[int] | None = None,
    *,
    python: str = PYTHON,
    headers: Headers | None = None,
) -> Iterator[Trace]:
    """A trace of these network namespaces (inode numbers), or of all; ended with the context, or with this process.

    Missing when something has to be installed first, TidegateError when it cannot be begun.
    """
    flags = [f"-D{name}={value}" for name, value in _defines().items()]
    found = headers or find_headers()
    if netns is not None:
        if len(netns) > MOST_NETNS:
            raise TidegateError(
                f"{len(netns)} network namespaces are more than the {MOST_NETNS} that a trace can be limited to"
            )
        flags.append(f"-DCHOSEN={MOST_NETNS}")
    question = {
        "text": _PROGRAM.read_text(),
        "flags": [*flags, *found.flags],
        "headers": found.source,
        "hooks": _HOOKS,
        "chosen": sorted(netns or ()),
    }
    with tempfile.TemporaryFile() as said, _reader(python, said) as reader:
        with contextlib.suppress(BrokenPipeError):
            reader.questions.write(msgspec.json.encode(question) + b"\n")
        yield Trace(reader, said)


class _Reader(NamedTuple):
    """The process that compiles and reads, from outside."""

    questions: FileIO
    answers: FileIO


@contextlib.contextmanager
def _reader(python: str, said: IO[bytes]) -> Iterator[_Reader]:
    """Starts it; it ends with the context."""
    with contextlib.ExitStack() as pipes:
        asked, ask = _pipe(pipes)
        answered, answer = _pipe(pipes)
        try:
            process = subprocess.Popen(
                # Isolated: nothing of the environment, nor of the current directory, is imported.
                [python, "-I", str(_READER)],
                stdin=asked,
                stdout=answer,
                stderr=said,
                # An interrupt from the terminal is for this process, which then ends that one.
                start_new_session=True,
            )
        except OSError as error:
            raise Missing(
                f"tracing needs {python}, which has Debian's bcc ({os.strerror(error.errno or 0)}): {_INSTALL}"
            ) from error
        asked.close()
        answer.close()
        try:
            yield _Reader(ask, answered)
        finally:
            process.kill()
            process.wait()


def _pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """The ends to read from and to write to."""
    reading, writing = os.pipe()
    return stack.enter_context(FileIO(reading)), stack.enter_context(FileIO(writing, "w"))
