"""Capabilities of the calling thread and of the processes that it starts (capabilities(7))."""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from tidegate.kernel.errors import KernelError

# linux/capability.h
CAP_NET_ADMIN = 12
CAP_NET_RAW = 13

# linux/prctl.h, linux/securebits.h, linux/capability.h
_PR_SET_SECUREBITS = 28
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct"""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    """struct __user_cap_data_struct: the capabilities 0 to 31, or 32 to 63"""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def hand_down(capabilities: Iterable[int]) -> None:
    """Let programs that this thread starts keep these capabilities, and no others, when they change their user.

    For a thread that ends afterwards: it cannot be undone. KernelError when the thread does not have one of them,
    or may not decide this (CAP_SETPCAP).
    """
    header = _Header(_LINUX_CAPABILITY_VERSION_3, 0)
    sets = (_Sets * 2)()
    _checked(_libc.capget(ctypes.byref(header), sets))
    numbers = tuple(capabilities)
    for number in numbers:
        sets[number // 32].inheritable |= 1 << number % 32
    _checked(_libc.capset(ctypes.byref(header), sets))
    for number in numbers:
        _checked(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0))
    _checked(_libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))


def has(pid: int, capability: int) -> bool:
    """Whether a capability is in effect for a process's main thread; False for one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> capability & 1)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot hand down capabilities: {os.strerror(number)}", number)
