"""Processes of a lab: started in a namespace, recognised later, ended for certain.

A process is known by pid and start time, so a reused pid is never taken for it, and is signalled through a
pidfd, so a signal never hits another process. Knows nothing of what the processes are for.
"""

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from tidegate.kernel import netns
from tidegate.lab.state import LabError, LabPaths, ProcessRecord, read, write

PYTHON = str(Path(sys.prefix, "bin", "python3"))
"""This interpreter, by whichever of its names it was called: another name is no reason to start a process anew."""

POLL_S = 0.02
GRACE_S = 2.0
"""How long a process may take to end before it is forced to."""
FORCED_S = 10.0
MAX_LOG_TAIL_BYTES = 16 << 10


def digest(*parts: bytes | str) -> str:
    """One text that stands for everything that a process is started with."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "big") + raw)
    return total.hexdigest()


def start(
    paths: LabPaths, name: str, namespace: str, argv: Sequence[str], start_digest: str
) -> ProcessRecord:
    """Start a process in a namespace, its output appended to its log, and record it.

    Raises KernelError when the namespace is gone, LabError when the program cannot be started.
    """
    descriptor = os.open(
        paths.log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    with os.fdopen(descriptor, "ab") as log:
        try:
            process = netns.spawn(
                netns.path(namespace),
                argv,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise LabError(f"cannot start {name} ({argv[0]}): {error.strerror}") from error
    _children[process.pid] = process
    record = ProcessRecord(
        pid=process.pid, started_ticks=_started_ticks(process.pid) or 0, digest=start_digest
    )
    write(paths.process(name), record)
    return record


def runs_just_so(paths: LabPaths, name: str, start_digest: str) -> bool:
    """Whether the process runs, and was started with all that the digest stands for."""
    record = recorded(paths, name)
    return record is not None and record.digest == start_digest and alive(record)


def recorded(paths: LabPaths, name: str) -> ProcessRecord | None:
    """The process that was last started under a name."""
    return read(paths.process(name), ProcessRecord)


def alive(record: ProcessRecord | None) -> bool:
    """Whether that very process still runs."""
    if record is None:
        return False
    _reap(record.pid)
    ticks = _started_ticks(record.pid)
    return ticks is not None and ticks == record.started_ticks


def send(record: ProcessRecord, number: signal.Signals) -> bool:
    """Signal that very process; False when it is gone."""
    with contextlib.ExitStack() as descriptors:
        descriptor = _hold(record.pid, descriptors)
        if descriptor is None or not alive(record):
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
            return True
    return False


def stop(paths: LabPaths, name: str) -> None:
    """End a recorded process, by force where it takes too long, and forget it."""
    record = recorded(paths, name)
    if record is not None:
        _end(lambda: (record.pid,), lambda pid: alive(record))
    paths.process(name).unlink(missing_ok=True)


def end_all(namespaces: Iterable[str]) -> None:
    """End every process in the namespaces, by force where one takes too long.

    Returns when none is left, also of those that were started meanwhile. LabError when some will
    not go.
    """
    wanted = {_identity(netns.path(name)) for name in namespaces} - {None}
    _end(
        lambda: tuple(pid for pid in psutil.pids() if _netns_of(pid) in wanted),
        lambda pid: _netns_of(pid) in wanted and pid != os.getpid(),
    )


def wait_until(
    condition: Callable[[], bool],
    deadline_s: float,
    failure: Callable[[], str],
    *,
    poll_s: float = POLL_S,
) -> None:
    """Wait for a condition. LabError with the words of `failure` after `deadline_s` seconds."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() >= end:
            raise LabError(failure())
        time.sleep(poll_s)


def log_tail(paths: LabPaths, name: str, lines: int = 10) -> str:
    """The last lines of a process's log, indented; "" when it wrote none."""
    try:
        with paths.log(name).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - MAX_LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def with_log(paths: LabPaths, name: str, problem: str) -> str:
    """A problem with a process, with the last lines of its log."""
    tail = log_tail(paths, name)
    return f"{problem}; its last words:\n{tail}" if tail else f"{problem}, and logged nothing"


_children: dict[int, "subprocess.Popen[bytes]"] = {}
"""Processes whose parent we are ourselves: they stay zombies until somebody waits for them."""


def _end(find: Callable[[], tuple[int, ...]], belongs: Callable[[int], bool]) -> None:
    """End the processes that `find` names, until it names none that `belongs` confirms.

    `belongs` is asked while the process is held by a pidfd, when its pid cannot be reused any more.
    """
    gentle_until = time.monotonic() + GRACE_S
    forced_until = gentle_until + FORCED_S
    asked: set[int] = set()
    while True:
        with contextlib.ExitStack() as descriptors:
            held = {
                pid: descriptor
                for pid in find()
                if (descriptor := _hold(pid, descriptors)) is not None and belongs(pid)
            }
            if not held:
                return
            now = time.monotonic()
            if now >= forced_until:
                raise LabError(f"processes {', '.join(map(str, held))} do not end")
            if now >= gentle_until:
                _signal_all(held.values(), signal.SIGKILL)
            else:
                _signal_all((held[pid] for pid in held if pid not in asked), signal.SIGTERM)
                asked.update(held)
            poll = select.poll()
            for descriptor in held.values():
                poll.register(descriptor, select.POLLIN)
            poll.poll(POLL_S * 1000)
        for pid in held:
            _reap(pid)


def _hold(pid: int, descriptors: contextlib.ExitStack) -> int | None:
    """A pidfd that is closed with `descriptors`, None when the process is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    descriptors.callback(os.close, descriptor)
    return descriptor


def _signal_all(pidfds: Iterable[int], number: signal.Signals) -> None:
    for descriptor in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)


def _netns_of(pid: int) -> netns.Identity | None:
    """None for a process that is gone or that even root may not look at: none of ours is such."""
    return _identity(f"/proc/{pid}/ns/net")


def _identity(path: str) -> netns.Identity | None:
    try:
        found = Path(path).stat()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return netns.Identity(found.st_dev, found.st_ino)


def _reap(pid: int) -> None:
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]


def _started_ticks(pid: int) -> int | None:
    """Start time of a process that is not a zombie (proc(5): state is field 3, starttime field 22)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
