"""How glibc hands out memory in this process (mallopt(3))."""

import ctypes

_M_ARENA_MAX = -8
"""malloc.h"""

_libc = ctypes.CDLL(None)


def use_one_arena() -> None:
    """Let all threads share one arena. For a process whose many short-lived threads would each leave one behind.

    Elsewhere than with glibc nothing happens.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)
