"""Mounts of a lab: its private bpf file system, and the hosts file that a command in a pod sees.

Speaks mount(2), umount2(2), setns(2) and unshare(2) through libc, since Python 3.11 has none of them. What
is mounted is read from /proc/self/mountinfo.
"""

import ctypes
import errno
import os
from pathlib import Path

from tidegate.kernel.errors import KernelError

# linux/mount.h
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_BIND = 4096
_MS_REC = 16384
_MS_SLAVE = 1 << 19
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

# linux/sched.h
_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def mount_bpffs(directory: Path) -> None:
    """Mount a new bpf file system, for root only, unless one is mounted there already."""
    if str(directory) in below(directory):
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _check(
        _libc.mount(b"bpf", os.fsencode(directory), b"bpf", flags, b"mode=0700"),
        f"cannot mount a bpf file system at {directory}",
    )


def below(directory: Path) -> tuple[str, ...]:
    """Mount points at or below a directory, the innermost first."""
    prefix = f"{directory}/"
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = _unescaped(line.split(" ")[4])
        if point == str(directory) or point.startswith(prefix):
            found.append(point)
    return tuple(reversed(found))


def unmount_below(directory: Path) -> None:
    """Unmount everything at or below a directory."""
    for point in below(directory):
        if _libc.umount2(os.fsencode(point), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EINVAL, errno.ENOENT):
                raise KernelError(f"cannot unmount {point}: {os.strerror(number)}", number)


def enter_pod(netns_path: str, hosts: Path) -> None:
    """Move this process into a network namespace, where /etc/hosts is `hosts`. There is no way back.

    Only for a single-threaded process that will become something else. Unmounts on the machine still
    reach the process's own mount namespace, so that it keeps nothing alive.
    """
    descriptor = os.open(netns_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(descriptor, _CLONE_NEWNET), f"cannot enter {netns_path}")
    finally:
        os.close(descriptor)
    _check(_libc.unshare(_CLONE_NEWNS), "cannot make a mount namespace")
    _check(
        _libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None), "cannot make mounts private"
    )
    _check(
        _libc.mount(os.fsencode(hosts), b"/etc/hosts", None, _MS_BIND, None),
        f"cannot show {hosts} as /etc/hosts",
    )


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise KernelError(f"{what}: {os.strerror(number)}", number)


def _unescaped(text: str) -> str:
    """A path of mountinfo: space, tab, newline and backslash stand there as octal escapes."""
    return text.encode().decode("unicode_escape").encode("latin-1").decode()
