"""A virtual machine without KVM: boots a kernel with an initramfs or a disk, streams what it says, gives its result.

Three serial lines: the kernel's log, what is said inside, and the result. Nothing of the machine outlives `run` or
`boot`, and it has no network.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tests import debian
from tests.vm import image

MEMORY = "2048M"
PROCESSORS = 2
_LAST_WORDS = 4000


class MachineFailed(Exception):
    """The machine did not come as far as to tell an exit status."""


def run(
    booted: image.Kernel, command: Sequence[str], limit_s: float, *, compilers: bool = False
) -> int:
    """Exit status of a command inside, run as root in the checkout; MachineFailed after limit_s seconds."""
    with _file("initramfs") as initramfs:
        image.write(initramfs, booted, command, compilers=compilers)
        initramfs.flush()
        told = _run(
            limit_s,
            ("-kernel", str(booted.image), "-initrd", _path(initramfs), "-no-reboot"),
            append="panic=-1",
            files=(initramfs,),
        )
    return int(told)


def boot(kernel: Path, initramfs: Path, disk: Path, limit_s: float) -> str:
    """What a system on a disk tells as its result until it switches itself off; it may reboot.

    MachineFailed after limit_s seconds, or when it tells nothing.
    """
    drive = f"file={disk},if=virtio,format=raw,cache=unsafe"
    return _run(
        limit_s,
        ("-kernel", str(kernel), "-initrd", str(initramfs), "-drive", drive),
        append="root=/dev/vda rw systemd.show_status=no",
    )


def _run(
    limit_s: float, boots: Sequence[str], *, append: str, files: Sequence[BinaryIO] = ()
) -> str:
    """What a machine tells as its result; MachineFailed when it tells nothing."""
    packages = debian.unpacked("qemu", "qemu-system-x86")
    with _file("log") as log, _file("result") as result:
        with subprocess.Popen(
            _command(packages, boots, append, *map(_path, (log, result))),
            env=packages.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=[each.fileno() for each in (log, result, *files)],
        ) as machine:
            timer = threading.Timer(limit_s, machine.kill)
            timer.start()
            try:
                _stream(machine)
                machine.wait()
            finally:
                timer.cancel()
                machine.kill()
        told = Path(_path(result)).read_text().strip()
        if told:
            return told
        killed = machine.returncode == -signal.SIGKILL
        why = f"was killed after {limit_s:.0f} s" if killed else "ended"
        words = Path(_path(log)).read_text(errors="replace")[-_LAST_WORDS:]
        raise MachineFailed(f"{why} without a result; its kernel's last words:\n{words}")


def _file(name: str) -> BinaryIO:
    """A file in memory, which is gone with the last process that has it open."""
    return open(os.memfd_create(name), "wb")  # noqa: PTH123


def _path(file: BinaryIO) -> str:
    return f"/proc/self/fd/{file.fileno()}"


def _stream(machine: subprocess.Popen[bytes]) -> None:
    assert machine.stdout is not None
    while said := os.read(machine.stdout.fileno(), 4096):
        sys.stdout.buffer.write(said.replace(b"\r\n", b"\n"))
        sys.stdout.buffer.flush()


def _command(
    packages: debian.Packages, boots: Sequence[str], append: str, log: str, result: str
) -> list[str]:
    firmware = [packages.path(f"/usr/share/{each}") for each in ("qemu", "seabios")]
    return [
        # Whatever becomes of this process, the machine ends with it.
        *(packages.program("setpriv"), "--pdeathsig", "KILL"),
        packages.program("qemu-system-x86_64"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "pc"),
        *("-m", MEMORY, "-smp", str(PROCESSORS)),
        *(argument for each in firmware for argument in ("-L", str(each))),
        *("-nodefaults", "-no-user-config", "-nographic"),
        *boots,
        *("-append", f"console=ttyS0 loglevel=4 random.trust_cpu=on {append}"),
        *("-serial", f"file:{log}", "-serial", "stdio", "-serial", f"file:{result}"),
    ]
