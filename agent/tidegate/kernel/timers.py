"""Timers as descriptors (timerfd_create(2)), which Python has from 3.13 on."""

import ctypes
import os
import time

from tidegate.kernel.errors import KernelError

# sys/timerfd.h
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = os.O_CLOEXEC

_NANOSECONDS = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


def open_timer() -> int:
    """A descriptor that becomes readable when the time of `start` has passed; to be closed. KernelError without one."""
    flags = _TFD_NONBLOCK | _TFD_CLOEXEC
    return _checked(_libc.timerfd_create(time.CLOCK_MONOTONIC, flags), "make a timer")


def start(timer: int, seconds: float) -> None:
    """Let the timer expire once, `seconds` (> 0) from now; what it was doing before is forgotten."""
    whole, nanoseconds = divmod(round(seconds * _NANOSECONDS), _NANOSECONDS)
    once = _Itimerspec(_Timespec(0, 0), _Timespec(whole, nanoseconds))
    _checked(_libc.timerfd_settime(timer, 0, ctypes.byref(once), None), "start a timer")


def take(timer: int) -> bool:
    """Whether the timer has expired since it was asked last."""
    try:
        return bool(os.read(timer, 8))
    except BlockingIOError:
        return False


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot {what}: {os.strerror(number)}", number)
    return result
