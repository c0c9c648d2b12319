#!/usr/bin/python3
"""The first process of the virtual machine: mounts what a system has, runs a command, tells its exit status, ends.

The file /command has the directory to work in and the command, divided by NUL bytes. Uses the standard library only.
"""

import ctypes
import os
import subprocess
from pathlib import Path

_OUTPUT, _STATUS = "/dev/ttyS1", "/dev/ttyS2"
_MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
)
_RB_POWER_OFF = 0x4321FEDC
"""linux/reboot.h LINUX_REBOOT_CMD_POWER_OFF."""


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, path in (("devtmpfs", "/dev"), *_MOUNTS):
        if libc.mount(b"none", path.encode(), kind.encode(), 0, None):
            raise OSError(ctypes.get_errno(), f"mount {kind}", path)
    os.environ.update(
        PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", TERM="dumb", LANG="C.UTF-8"
    )
    Path("/proc/sys/kernel/modprobe").write_text("/usr/sbin/modprobe")
    # Its device node, by which others would load it, comes with it.
    subprocess.run(["modprobe", "tun"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    directory, *command = Path("/command").read_text().split("\0")
    with open(_OUTPUT, "wb", buffering=0) as output:  # noqa: PTH123
        try:
            done = subprocess.run(command, cwd=directory, stdout=output, stderr=output, check=False)
            status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        except OSError as error:
            output.write(f"{command[0]}: {error}\n".encode())
            status = 127
    Path(_STATUS).write_text(f"{status}\n")
    os.sync()
    libc.reboot(_RB_POWER_OFF)


if __name__ == "__main__":
    main()
