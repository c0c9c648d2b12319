"""Directories in which something changes (inotify(7))."""

import ctypes
import errno
import os
import select
from pathlib import Path

from tidegate.kernel.errors import KernelError

# sys/inotify.h
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_DELETE = 0x200
_IN_ONLYDIR = 0x1000000

_CHANGES = _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_DELETE | _IN_ONLYDIR
_EVENTS_BYTES = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Waits for changes in directories: files that come, go, are replaced, or were written to the end."""

    def __init__(self) -> None:
        """KernelError when the kernel has no more of them for this user (fs.inotify.max_user_instances)."""
        self._descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            number = ctypes.get_errno()
            raise KernelError(f"cannot watch files: {os.strerror(number)}", number)

    def cover(self, directory: Path) -> bool:
        """Watches a directory, again if it was replaced; False where there is none. KernelError when refused."""
        if _libc.inotify_add_watch(self._descriptor, os.fsencode(directory), _CHANGES) >= 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise KernelError(f"cannot watch {directory}: {os.strerror(number)}", number)

    def wait(self, timeout_s: float, *others: int) -> None:
        """Waits for a change, for one of these descriptors to become readable, or until the time is over."""
        readable, _, _ = select.select((self._descriptor, *others), (), (), timeout_s)
        if self._descriptor in readable:
            os.read(self._descriptor, _EVENTS_BYTES)

    def close(self) -> None:
        os.close(self._descriptor)
