"""Control groups, version 2: where one is, as nf_tables and libnftables want to be told.

A rule holds the id of a cgroup, which the library looks up by a path below /sys/fs/cgroup; a cgroup that is made
anew under the same path has another id. Who is in which cgroup is not looked at.
"""

import ctypes
import errno
import os
import stat
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tidegate.kernel.errors import KernelError

_LOOKED_UP_BELOW = Path("/sys/fs/cgroup")
"""Where libnftables looks for cgroups (its SYSFS_CGROUPSV2_PATH)."""

_FILEID_KERNFS = 0xFE
"""linux/exportfs.h: a handle of this type is the id of a cgroup (__kernfs_fh_to_dentry)."""

_libc = ctypes.CDLL(None, use_errno=True)


class Cgroup(NamedTuple):
    """One cgroup, now."""

    id: int
    """Its inode number, which is what the kernel compares (cgroup_id)."""
    path: str
    """Relative to /sys/fs/cgroup."""
    level: int
    """How many cgroups above it there are, the root included."""


def find(path: str) -> Cgroup:
    """The cgroup at a path below the root of cgroup v2, such as pod1/sidecar.

    KernelError when there is none, and when cgroup v2 is not mounted where libnftables looks for it.
    """
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise KernelError(f"{path!r} is no path below the root of cgroup v2", errno.EINVAL)
    place = mounted_at() / PurePosixPath(*parts)
    try:
        found = place.stat()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise KernelError(f"there is no cgroup {path}: {reason}", error.errno or 0) from error
    if not stat.S_ISDIR(found.st_mode):
        raise KernelError(f"{path} is no cgroup but a file of one", errno.ENOTDIR)
    return Cgroup(found.st_ino, str(place.relative_to(_LOOKED_UP_BELOW)), len(parts))


def path_of(cgroup_id: int) -> str | None:
    """The path below the root of cgroup v2 of the cgroup with an id, "" for the root; None when it is gone.

    KernelError when cgroup v2 is not mounted, or who asks may not open files by their handles (CAP_DAC_READ_SEARCH).
    """
    root = mounted_at()
    handle = _FileHandle(ctypes.sizeof(ctypes.c_uint64), _FILEID_KERNFS, cgroup_id)
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        opened = _libc.open_by_handle_at(directory, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC)
        number = ctypes.get_errno()
    finally:
        os.close(directory)
    if opened < 0:
        if number == errno.ESTALE:
            return None
        raise KernelError(f"cannot find cgroup {cgroup_id}: {os.strerror(number)}", number)
    try:
        place = Path(f"/proc/self/fd/{opened}").readlink()
    finally:
        os.close(opened)
    relative = str(place.relative_to(root))
    return "" if relative == "." else relative


class _FileHandle(ctypes.Structure):
    """struct file_handle of linux/fs.h, with a handle of eight bytes."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("cgroup_id", ctypes.c_uint64),
    )


def mounted_at() -> Path:
    """Where cgroup v2 is mounted, below /sys/fs/cgroup. KernelError when it is not."""
    lines = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    for _, place, kind, *_ in lines:
        # A place with blanks is written with backslashes (proc(5)); below /sys/fs/cgroup nobody makes one.
        if kind == "cgroup2" and Path(place).is_relative_to(_LOOKED_UP_BELOW):
            return Path(place)
    raise KernelError(f"cgroup v2 is not mounted below {_LOOKED_UP_BELOW}", errno.ENOENT)
