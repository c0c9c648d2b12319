"""A Debian 12 with systemd on which tidegate is installed: the disk that a virtual machine boots from.

The system is made of Debian's packages by mmdebstrap, once, and kept below build/; a disk is made of it for each run.
On that, systemd/install.sh installs this checkout from wheels, as it does on any machine, but before the first boot: a
virtual machine without KVM would take minutes for it. What then happens in the machine is in guest/.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import debian

REPOSITORY = Path(__file__).parent.parent.parent
CACHE = REPOSITORY / "build" / "vm"
DISK_BYTES = 3 << 30

_PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "linux-image-cloud-amd64", "initramfs-tools", "zstd"),
    # Of these systemd/install.sh finds what it wants: there is no network.
    *("ca-certificates", "iproute2", "iptables", "libbpf1", "libnftables1"),
    *("procps", "python3", "python3-venv"),
)
_CHECKOUT = ("systemd", "tests/vm/guest")
_SOURCES = ("agent", "pyproject.toml", "README.md", "LICENSE")

_SCENARIO = """\
[Unit]
Description=What the test does
After=multi-user.target
[Service]
Type=exec
ExecStart=/usr/bin/python3 /root/tidegate/tests/vm/guest/scenario.py
StandardOutput=file:/dev/ttyS1
StandardError=file:/dev/ttyS1
"""


class Disk(NamedTuple):
    """What a machine boots."""

    kernel: Path
    initramfs: Path
    disk: Path


@contextlib.contextmanager
def disk() -> Iterator[Disk]:
    """A disk with the system, for as long as the context lasts."""
    system = _system()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="disk-") as directory:
        root = Path(directory) / "root"
        root.mkdir()
        _run("tar", "-C", root, "-xf", system)
        _furnish(root)
        _install(root)
        image = Path(directory) / "disk"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        _run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, image)
        (kernel,) = root.glob("boot/vmlinuz-*")
        (initramfs,) = root.glob("boot/initrd.img-*")
        yield Disk(kernel, initramfs, image)


def _furnish(root: Path) -> None:
    for part in _CHECKOUT:
        shutil.copytree(REPOSITORY / part, root / "root/tidegate" / part)
    (root / "root/wheels").mkdir()
    for wheel in (*_wheels_needed().glob("*.whl"), _own_wheel(root / "root/wheels")):
        if wheel.parent != root / "root/wheels":
            shutil.copy(wheel, root / "root/wheels")
    (root / "var/lib/scenario").mkdir()
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw 0 1\n")
    (root / "etc/hostname").write_text("vm\n")
    units = root / "etc/systemd/system"
    (units / "scenario.service").write_text(_SCENARIO)
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "scenario.service").symlink_to("/etc/systemd/system/scenario.service")


def _install(root: Path) -> None:
    wheels = "TIDEGATE_WHEELS=/root/wheels"
    inside = (
        "chroot",
        root,
        "env",
        "--ignore-environment",
        wheels,
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
    )
    alone = ("unshare", "--mount", "--pid", "--fork", f"--mount-proc={root}/proc")
    _run(*alone, *inside, "/root/tidegate/systemd/install.sh")
    shutil.rmtree(root / "root/wheels")


def _system() -> Path:
    """The archive of the system without anything of ours."""
    archive = CACHE / f"system-{_digest(*_PACKAGES)}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for older in CACHE.glob("system-*.tar"):
            older.unlink()
        beside = archive.with_suffix(".new.tar")
        mmdebstrap = debian.unpacked("mmdebstrap", "mmdebstrap").program("mmdebstrap")
        packages = f"--include={','.join(_PACKAGES)}"
        _run(mmdebstrap, "--variant=minbase", packages, "bookworm", beside)
        beside.rename(archive)
    return archive


def _wheels_needed() -> Path:
    """The wheels of everything that tidegate needs."""
    directory = CACHE / f"wheels-{_digest((REPOSITORY / 'pyproject.toml').read_text())}"
    if not directory.exists():
        for older in CACHE.glob("wheels-*"):
            shutil.rmtree(older)
        with _sources() as sources:
            _run(*_PIP, "wheel", "--quiet", "--wheel-dir", sources / "wheels", f"{sources}[lab]")
            for own in (sources / "wheels").glob("tidegate-*.whl"):
                own.unlink()
            (sources / "wheels").rename(directory)
    return directory


def _own_wheel(directory: Path) -> Path:
    with _sources() as sources:
        _run(
            *_PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", directory, sources
        )
    (wheel,) = directory.glob("tidegate-*.whl")
    return wheel


@contextlib.contextmanager
def _sources() -> Iterator[Path]:
    """A copy of what is built: building leaves things behind, and finds what it left."""
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="sources-") as directory:
        for part in _SOURCES:
            place = REPOSITORY / part
            if place.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", ".mypy_cache")
                shutil.copytree(place, Path(directory, part), ignore=ignored)
            else:
                shutil.copy(place, directory)
        yield Path(directory)


_PIP = (sys.executable, "-m", "pip")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
