"""Waiting until the kernel has nobody left who saw things as they were: an RCU grace period, asked for from outside."""

import ctypes
import functools
import platform
import time

_MEMBARRIER = {"x86_64": 324, "aarch64": 283}
"""Numbers of membarrier(2), which the C library has no function for."""
_CMD_GLOBAL = 1 << 0
_WITHOUT_S = 0.1


def wait_for_programs() -> None:
    """Returns when every BPF program that was running has ended; takes some milliseconds.

    membarrier(2) waits for a grace period (kernel/sched/membarrier.c, synchronize_rcu), and programs run inside of
    one. Where the kernel does not do it (processors without a clock tick, nohz_full), this waits for longer than a
    program can run.
    """
    number = _MEMBARRIER.get(platform.machine())
    if number is None or _libc().syscall(number, _CMD_GLOBAL, 0) < 0:
        time.sleep(_WITHOUT_S)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long
    return libc
