"""A virtual machine without KVM: boots a kernel with an initramfs or a disk, streams what it says, gives its result.

Three serial lines: the kernel's log, what is said inside, and the result. Nothing of the machine outlives `run` or
`boot`, and it has no network. A `Told` machine does what it is told instead, and is on a wire with others.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tests import debian
from tests.vm import image

MEMORY = "2048M"
SMALL = "1024M"
"""As much as a machine of Vagrant's has that nobody gave more."""
PROCESSORS = 2
_LAST_WORDS = 4000
_FROM_DISK = "root=/dev/vda rw systemd.show_status=no"


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
        append=_FROM_DISK,
    )


class Done(NamedTuple):
    """What became of an order."""

    status: int
    output: str


class Told:
    """A machine in which guest/orders.py does what it is told, one order at a time."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._log = directory / "log"
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(directory / "orders"))
        self._said = b""

    def until_booted(self, limit_s: float) -> str:
        """Until it waits for orders; the id of this boot. MachineFailed when it does not in that time."""
        deadline = time.monotonic() + limit_s
        while "boot" not in (said := self._read(deadline)):
            continue
        return str(said["boot"])

    def order(self, *command: str, stdin: str = "", limit_s: float = 600.0) -> Done:
        """What became of a command. MachineFailed when the machine does not tell it in that time."""
        text = json.dumps({"command": command, "input": stdin})
        self._line.sendall(f"{text}\n".encode())
        said = self._read(time.monotonic() + limit_s)
        if "boot" in said:
            raise MachineFailed(f"{self.name} was reset while it did {' '.join(command)}")
        return Done(**said)

    def reboot(self) -> None:
        """Returns at once; see `until_booted`."""
        self.order("systemctl", "reboot", "--no-block")

    def _read(self, deadline: float) -> dict[str, Any]:
        while True:
            line, separator, rest = self._said.partition(b"\n")
            if separator:
                self._said = rest
                if line.startswith(b"{"):
                    return dict(json.loads(line))
                continue
            self._line.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                part = self._line.recv(1 << 16)
            except TimeoutError:
                part = b""
            if not part:
                words = self._log.read_text(errors="replace")[-_LAST_WORDS:]
                raise MachineFailed(f"{self.name} says nothing; its kernel's last words:\n{words}")
            self._said += part


@contextlib.contextmanager
def told(
    name: str, kernel: Path, initramfs: Path, disk: Path, wire: tuple[Path, Path], directory: Path
) -> Iterator[Told]:
    """A machine with the disk as it is now: what it writes is gone with it.

    `wire` is where it takes frames and where it leaves those for the other one, who need not be there; `directory` is
    the machine's own.
    """
    packages = debian.unpacked("qemu", "qemu-system-x86")
    here, there = wire
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "orders"))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        boots = (
            *("-kernel", str(kernel), "-initrd", str(initramfs)),
            *("-drive", f"file={disk},if=virtio,format=raw,snapshot=on"),
            "-netdev",
            f"dgram,id=wire,local.type=unix,local.path={here},remote.type=unix,remote.path={there}",
            *("-device", f"virtio-net-pci,netdev=wire,romfile=,mac={_mac(name)}"),
            *("-chardev", f"socket,id=orders,fd={listener.fileno()},server=on,wait=off"),
        )
        serials = (f"file:{directory / 'log'}", "chardev:orders")
        command = _command(packages, boots, f"{_FROM_DISK} net.ifnames=0", serials, SMALL)
        process = subprocess.Popen(
            command,
            env=packages.environment | {"TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
    try:
        yield Told(name, directory)
    finally:
        process.kill()
        process.wait()


def _mac(name: str) -> str:
    """A locally administered address."""
    return "02:" + ":".join(f"{each:02x}" for each in name.encode()[-5:].rjust(5, b"\0"))


def _run(
    limit_s: float, boots: Sequence[str], *, append: str, files: Sequence[BinaryIO] = ()
) -> str:
    """What a machine tells as its result; MachineFailed when it tells nothing."""
    packages = debian.unpacked("qemu", "qemu-system-x86")
    with _file("log") as log, _file("result") as result:
        serials = (f"file:{_path(log)}", "stdio", f"file:{_path(result)}")
        with subprocess.Popen(
            _command(packages, boots, append, serials, MEMORY),
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
    packages: debian.Packages,
    boots: Sequence[str],
    append: str,
    serials: Sequence[str],
    memory: str,
) -> list[str]:
    firmware = [packages.path(f"/usr/share/{each}") for each in ("qemu", "seabios")]
    return [
        # Whatever becomes of this process, the machine ends with it.
        *(packages.program("setpriv"), "--pdeathsig", "KILL"),
        packages.program("qemu-system-x86_64"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-machine", "pc"),
        *("-m", memory, "-smp", str(PROCESSORS)),
        *(argument for each in firmware for argument in ("-L", str(each))),
        *("-nodefaults", "-no-user-config", "-nographic"),
        *boots,
        *("-append", f"console=ttyS0 loglevel=4 random.trust_cpu=on {append}"),
        *(argument for each in serials for argument in ("-serial", each)),
    ]
