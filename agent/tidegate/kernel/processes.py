"""Processes of this machine, named for people."""

import os
from pathlib import Path


def named(pid: int) -> str:
    """Such as "process 71 (nft)"; without the program where the process has ended. What its owner chose is escaped."""
    try:
        name = Path("/proc", str(pid), "comm").read_bytes()
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({ascii(name.decode(errors='replace').strip())[1:-1]})"


def holding(path: Path) -> tuple[int, ...]:
    """Processes that hold a file or a directory by flock(2), of those that this one may see (/proc/locks, proc(5))."""
    at = path.stat()
    place = os.major(at.st_dev), os.minor(at.st_dev), at.st_ino
    found = []
    for line in Path("/proc/locks").read_text().splitlines():
        # Such as "1: FLOCK  ADVISORY  WRITE 4711 00:18:2301 0 EOF"; behind the number of who waits is an arrow.
        _, kind, _, _, pid, where, *_ = line.split()
        if kind == "FLOCK":
            major, minor, inode = where.split(":")
            if (int(major, 16), int(minor, 16), int(inode)) == place:
                found.append(int(pid))
    return tuple(found)
