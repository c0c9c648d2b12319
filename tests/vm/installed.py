"""A Debian 12 with systemd on which tidegate is installed: the disk that a virtual machine boots from.

The system is made of Debian's packages by mmdebstrap, once, and kept below build/; a disk is made of it for each run.
On that, systemd/install.sh installs tidegate, as it does on any machine, but before the first boot: a virtual machine
without KVM would take minutes for it. `disk` has it from wheels, on `built_disk` it is compiled out of files that
somebody brings. What then happens in the machine is in guest/.
"""

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import debian

REPOSITORY = Path(__file__).parent.parent.parent
GUEST = Path(__file__).parent / "guest"
CACHE = REPOSITORY / "build" / "vm"
DISK_BYTES = 4 << 30

_PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "linux-image-cloud-amd64", "initramfs-tools", "zstd"),
    # Of these systemd/install.sh finds what it wants: there is no network.
    *("ca-certificates", "iproute2", "iptables", "libbpf1", "libnftables1"),
    *("procps", "python3", "python3-venv"),
)
_INSTALL = (REPOSITORY / "systemd/install.sh").read_text()
_BUILDING = tuple(re.findall(r'^build="(.*)"$', _INSTALL, re.MULTILINE)[0].split())
"""And what it wants where there are no wheels."""
_BUILD_BACKEND = ("setuptools>=77", "wheel")
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
_ORDERS = """\
[Unit]
Description=Does what the test says
[Service]
ExecStart=/usr/bin/python3 /root/guest/orders.py
Restart=always
[Install]
WantedBy=sysinit.target
"""


class Disk(NamedTuple):
    """What a machine boots."""

    kernel: Path
    initramfs: Path
    disk: Path


@contextlib.contextmanager
def disk() -> Iterator[Disk]:
    """A disk with the system, and guest/scenario.py that runs at each boot, for as long as the context lasts."""
    with _system(_PACKAGES) as root:
        for part in _CHECKOUT:
            shutil.copytree(REPOSITORY / part, root / "root/tidegate" / part)
        _add_wheels(root)
        _own_wheel(root / "root/wheels")
        (root / "var/lib/scenario").mkdir()
        _add_unit(root, "scenario", _SCENARIO, "multi-user")
        _inside(root, {"TIDEGATE_WHEELS": "/root/wheels"}, "/root/tidegate/systemd/install.sh")
        shutil.rmtree(root / "root/wheels")
        yield _image(root)


@contextlib.contextmanager
def built_disk(files: Path, install: str) -> Iterator[Disk]:
    """A disk with the system, and guest/orders.py that waits for orders, for as long as the context lasts.

    The tree `files` is put over the system's, and kept in /root/files; `install` is a shell's command that installs out
    of it. What Python needs comes from wheels: there is no network.
    """
    with _system(_PACKAGES + _BUILDING) as root:
        shutil.copytree(GUEST, root / "root/guest")
        for place in (root, root / "root/files"):
            shutil.copytree(files, place, dirs_exist_ok=True)
        _add_wheels(root)
        _add_unit(root, "orders", _ORDERS, "sysinit")
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/root/wheels"}
        _inside(root, pip, "/bin/sh", "-c", install)
        _inside(root, {}, "systemctl", "enable", "systemd-networkd")
        shutil.rmtree(root / "root/wheels")
        yield _image(root)


def _add_wheels(root: Path) -> None:
    (root / "root/wheels").mkdir()
    for wheel in _wheels_needed().glob("*.whl"):
        shutil.copy(wheel, root / "root/wheels")


def _add_unit(root: Path, name: str, text: str, target: str) -> None:
    units = root / "etc/systemd/system"
    (units / f"{name}.service").write_text(text)
    wanted = units / f"{target}.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / f"{name}.service").symlink_to(f"/etc/systemd/system/{name}.service")


def _inside(root: Path, environment: dict[str, str], *command: str) -> None:
    variables = environment | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    alone = ("unshare", "--mount", "--pid", "--fork", f"--mount-proc={root}/proc")
    settings = (f"{name}={text}" for name, text in variables.items())
    _run(*alone, "chroot", root, "env", "--ignore-environment", *settings, *command)


@contextlib.contextmanager
def _system(packages: Sequence[str]) -> Iterator[Path]:
    """The root directory of a system without anything of ours, for as long as the context lasts."""
    archive = _archive(packages)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="disk-") as directory:
        root = Path(directory) / "root"
        root.mkdir()
        _run("tar", "-C", root, "-xf", archive)
        (root / "etc/fstab").write_text("/dev/vda / ext4 rw 0 1\n")
        (root / "etc/hostname").write_text("vm\n")
        yield root


def _image(root: Path) -> Disk:
    image = root.parent / "disk"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    _run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, image)
    (kernel,) = root.glob("boot/vmlinuz-*")
    (initramfs,) = root.glob("boot/initrd.img-*")
    return Disk(kernel, initramfs, image)


def _archive(packages: Sequence[str]) -> Path:
    wanted = {
        each: CACHE / f"system-{_digest(*each)}.tar" for each in (_PACKAGES, _PACKAGES + _BUILDING)
    }
    archive = wanted[tuple(packages)]
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for older in {*CACHE.glob("system-*.tar")} - {*wanted.values()}:
            older.unlink()
        beside = archive.with_suffix(".new.tar")
        mmdebstrap = debian.unpacked("mmdebstrap", "mmdebstrap").program("mmdebstrap")
        include = f"--include={','.join(packages)}"
        _run(mmdebstrap, "--variant=minbase", include, "bookworm", beside)
        beside.rename(archive)
    return archive


def _wheels_needed() -> Path:
    """The wheels of everything that tidegate needs."""
    wanted = _digest((REPOSITORY / "pyproject.toml").read_text(), *_BUILD_BACKEND)
    directory = CACHE / f"wheels-{wanted}"
    if not directory.exists():
        for older in CACHE.glob("wheels-*"):
            shutil.rmtree(older)
        with _sources() as sources:
            wheels = (*_PIP, "wheel", "--quiet", "--wheel-dir", sources / "wheels")
            _run(*wheels, f"{sources}[lab]", *_BUILD_BACKEND)
            for own in (sources / "wheels").glob("tidegate-*.whl"):
                own.unlink()
            (sources / "wheels").rename(directory)
    return directory


def _own_wheel(directory: Path) -> None:
    with _sources() as sources:
        _run(
            *_PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", directory, sources
        )


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
