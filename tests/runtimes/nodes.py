"""A node: a machine of its own for one test, made of namespaces, with a disk that outlives its reboots.

Its network (bridges, iptables rules), its mounts (/run, /etc, /opt, /var/lib, /sys), its cgroups and its processes are
nobody else's, so runtimes work in it as on a machine that they have to themselves, with their usual paths, and nothing
of what they do is left when it goes, also when the test was killed. Process ids are the machine's.
"""

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from debian import Packages
from tidegate.kernel import netns

REPOSITORY = Path(__file__).parents[2]
_BOOT = Path(__file__).with_name("boot.py")
_CGROUPS = Path("/sys/fs/cgroup/unified")
_SPAWN = 'echo $$ > /sys/fs/cgroup/init/cgroup.procs && exec "$@"'

# linux/sched.h
_CLONE_FS = 0x00000200
_CLONE_NEWNS = 0x00020000
_CLONE_NEWCGROUP = 0x02000000
_CLONE_NEWNET = 0x40000000
_CLONE_NEWUTS = 0x04000000

DEADLINE_S = 30.0

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()
_T = TypeVar("_T")


def until(condition: Callable[[], object], what: str, told: Callable[[], str] = str) -> None:
    """Asks again and again until it is so; fails after DEADLINE_S, with what `told` has to say."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}\n{told()}"
        time.sleep(0.02)


class Node:
    """Runs from `boot` until `crash`; `disk` is what stays. Has the packages installed that were unpacked for it."""

    def __init__(self, disk: Path, packages: Packages) -> None:
        self.disk = disk
        self._packages = packages.root
        self._process: subprocess.Popen[str] | None = None
        self._cgroup = Path()

    def __enter__(self) -> "Node":
        self.boot()
        return self

    def __exit__(self, *_: object) -> None:
        self.crash()

    def boot(self) -> None:
        """Returns when the node runs; raises RuntimeError with what the first process had to say otherwise."""
        assert self._process is None
        self.disk.mkdir(exist_ok=True)
        root = _CGROUPS if _CGROUPS.is_dir() else Path("/sys/fs/cgroup")
        self._cgroup = root / f"tg-runtimes-{os.getpid()}-{next(_numbers)}"
        self._cgroup.mkdir()
        enter = f'echo $$ > {self._cgroup}/cgroup.procs && exec unshare -m -n -u -C "$@"'
        argv = [
            "sh",
            "-c",
            enter,
            "sh",
            sys.executable,
            str(_BOOT),
            str(self.disk),
            str(self._packages),
        ]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            _, complaint = self._process.communicate()
            self.crash()
            raise RuntimeError(f"a node did not boot: {complaint}")

    def crash(self) -> None:
        """Kills every process of the node at once; its namespaces and mounts go with them."""
        if self._process is None:
            return
        process, self._process = self._process, None
        (self._cgroup / "cgroup.kill").write_text("1")
        process.communicate()
        until(lambda: not _is_populated(self._cgroup), "the node's processes are gone")
        for directory in sorted(self._cgroup.glob("**/"), reverse=True):
            directory.rmdir()

    @property
    def pid(self) -> int:
        """Of its first process."""
        assert self._process is not None
        return self._process.pid

    @property
    def netns(self) -> str:
        """Path of the node's own network namespace, as the test sees it."""
        return f"/proc/{self.pid}/ns/net"

    def path(self, inside: str | Path) -> Path:
        """Where the test finds a file of the node."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def run(self, function: Callable[..., _T], *arguments: Any, **named: Any) -> _T:
        """Calls a function in a thread that sees the node's files, network and cgroups."""
        outcome: Future[_T] = Future()

        def enter_and_call() -> None:
            try:
                self._enter()
                outcome.set_result(function(*arguments, **named))
            except BaseException as error:  # noqa: BLE001 - it is raised where the work was asked for
                outcome.set_exception(error)

        thread = threading.Thread(target=enter_and_call)
        thread.start()
        thread.join()
        return outcome.result()

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> "subprocess.Popen[Any]":
        """Starts a process of the node."""
        command = ["sh", "-c", _SPAWN, "sh", *map(str, argv)]
        environment = {**os.environ, **(env or {})}
        return self.run(subprocess.Popen, command, env=environment, start_new_session=True, **popen)

    def call(
        self, *argv: str | Path, timeout: float = 60, stdin: str = "", **popen: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command of the node to its end."""
        process = self.spawn(
            [str(word) for word in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **popen,
        )
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{argv} took more than {timeout} s: {out}{err}") from None
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def do(self, *argv: str | Path, **options: Any) -> str:
        """Runs a command of the node that has to succeed; what it printed."""
        done = self.call(*argv, **options)
        assert done.returncode == 0, f"{argv} exited {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def _enter(self) -> None:
        """Takes the calling thread into the node for good."""
        _check(_libc.unshare(_CLONE_FS))
        for kind, flag in (
            ("cgroup", _CLONE_NEWCGROUP),
            ("uts", _CLONE_NEWUTS),
            ("net", _CLONE_NEWNET),
            ("mnt", _CLONE_NEWNS),
        ):
            with netns.opened(f"/proc/{self.pid}/ns/{kind}") as descriptor:
                _check(_libc.setns(descriptor, flag))


def _is_populated(cgroup: Path) -> bool:
    return "populated 1" in (cgroup / "cgroup.events").read_text()


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
