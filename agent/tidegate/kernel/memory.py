"""How glibc hands out memory in this process (mallopt(3), malloc_trim(3)); elsewhere nothing happens."""

import ctypes

_M_ARENA_MAX = -8
"""malloc.h"""

_libc = ctypes.CDLL(None)


def use_one_arena() -> None:
    """Let all threads share one arena. For a process whose many short-lived threads would each leave one behind."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the kernel what is free, wherever it lies; for after a piece of work of a size that does not last."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
