"""The first process of a Node (nodes.py): mounts what is its own, then waits until the test lets go of it.

    python boot.py DISK PACKAGES    in mount, network, cgroup and UTS namespaces and a cgroup that are the node's

What a runtime writes goes to DISK, which outlives a reboot, or to /run, which does not. PACKAGES is a directory of
unpacked Debian packages, which the node has where packages are. When the test closes standard
input, or dies, every process of the node is killed by its cgroup; its mounts and namespaces go with the last of them.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

# linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def forget_foreign_mounts() -> None:
    """The copies of what others have mounted below /run and /tmp would keep their namespaces alive."""
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point.startswith(("/run/", "/tmp/")):
            # One may be gone with the one that it was mounted on.
            subprocess.run(["umount", "--lazy", point], check=False, stderr=subprocess.DEVNULL)


def lay_over(packages: Path) -> None:
    """The files of the packages are found where they would be installed, on a system whose /bin is /usr/bin."""
    for name in ("usr", "bin", "sbin", "lib"):
        above, below = packages / name, Path("/", name).resolve()
        if above.is_dir():
            mount("-t", "overlay", "-o", f"lowerdir={above}:{below}", "overlay", str(below))


def mount_own(disk: Path, packages: Path) -> None:
    mount("-t", "tmpfs", "-o", "mode=0755", "run", "/run")
    Path("/run/netns").mkdir()
    mount("--bind", "/run/netns", "/run/netns")
    mount("--make-shared", "/run/netns")
    # A runtime writes its configuration, its plugins and its state where it is used to.
    for directory in ("/etc", "/opt", "/var/lib"):
        upper = disk / directory[1:].replace("/", "-")
        work = disk / f"{upper.name}.work"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        given = packages / directory[1:]
        lower = f"{given}:{directory}" if given.is_dir() else directory
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        mount("-t", "overlay", "-o", options, "overlay", directory)
    # Layers of images cannot be on an overlay themselves.
    for name in ("containerd", "containers"):
        (disk / name).mkdir(exist_ok=True)
        Path("/var/lib", name).mkdir(exist_ok=True)
        mount("--bind", str(disk / name), f"/var/lib/{name}")
    # Only so does /sys/class/net show the node's interfaces, and has the node one hierarchy of cgroups.
    mount("-t", "sysfs", "sysfs", "/sys")
    mount("-t", "cgroup2", "cgroup2", str(CGROUPS))
    mount("-t", "bpf", "bpf", "/sys/fs/bpf")


def reap(_number: int, _frame: object) -> None:
    """Containers outlive who started them, and end as children of the first process."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> None:
    disk, packages = map(Path, sys.argv[1:])
    forget_foreign_mounts()
    lay_over(packages)
    mount_own(disk, packages)
    # A cgroup that has processes of its own cannot hand controllers to those below.
    (CGROUPS / "init").mkdir()
    (CGROUPS / "init/cgroup.procs").write_text(str(os.getpid()))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGCHLD, reap)
    print("ready", flush=True)
    sys.stdin.read()
    (CGROUPS / "cgroup.kill").write_text("1")


if __name__ == "__main__":
    main()
