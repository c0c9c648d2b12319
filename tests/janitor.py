"""Clears up after a test run that could not: run by conftest.py, waits for the end of the run that it belongs to.

A run that ends by itself says so, and nothing is done. After one that was killed, the labs, network namespaces and
cgroups that it made are removed, with the processes in its namespaces and those that bear its mark elsewhere.

    python janitor.py PID MARK LAB...    LAB...: labs that were there before
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tidegate.kernel import netns

MARK = "TIDEGATE_TEST_RUN"
"""Name of the environment variable that says to which run a process belongs."""
ENDED = "ended"
"""What a run says that cleared up by itself."""

LABS = Path("/run/tidegate/lab")
_CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_TRIES = 50


def labs() -> set[str]:
    """Names of the labs that are there."""
    return {entry.name for entry in LABS.iterdir()} if LABS.is_dir() else set()


def clear(pid: str, mark: str, before: set[str]) -> None:
    marked = [process for process in psutil.process_iter() if _mark(process) == mark]
    # Somebody else may have begun a lab meanwhile.
    for name in {name for name in labs() - before if any(_is_of(each, name) for each in marked)}:
        command = [sys.executable, "-m", "tidegate.cli.main", "lab", "down", "--lab", name]
        subprocess.run(command, check=False, timeout=120)
    for process in marked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for name in netns.names():
        if name.startswith(f"tg-test-{pid}-"):
            for inside in netns.pids(netns.path(name)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(inside, signal.SIGKILL)
            netns.delete(name)
    for root in _CGROUPS:
        for path in sorted(root.glob(f"tg-*-{pid}*/**/"), reverse=True):
            _remove(path)


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        # It has ended.
        return None


def _is_of(process: psutil.Process, lab: str) -> bool:
    """Whether a process works for a lab, as its arguments tell."""
    try:
        return any(f"{LABS / lab}/" in word for word in process.cmdline())
    except psutil.Error:
        return False


def _remove(cgroup: Path) -> None:
    """A cgroup is busy for as long as a process that was killed takes to go."""
    for _ in range(_TRIES):
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return


def main() -> None:
    pid, mark, *before = sys.argv[1:]
    if sys.stdin.read() != ENDED:
        clear(pid, mark, set(before))


if __name__ == "__main__":
    main()
