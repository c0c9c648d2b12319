"""Processes of this machine, named for people."""

from pathlib import Path


def named(pid: int) -> str:
    """Such as "process 71 (nft)"; without the program where the process has ended. What its owner chose is escaped."""
    try:
        name = Path("/proc", str(pid), "comm").read_bytes()
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({ascii(name.decode(errors='replace').strip())[1:-1]})"
