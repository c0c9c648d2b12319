"""What the virtual machine boots from: a kernel of Debian, and an initramfs with this checkout and Python as they are.

The cloud kernel has no 9p, so everything is packed. Paths inside are those outside: the virtual environment works as it
is. Nothing but Debian's packages comes from anywhere else.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests import debian

REPOSITORY = Path(__file__).parent.parent.parent
INIT = Path(__file__).parent / "init.py"

_PROGRAMS = (
    *("sh", "cat", "sleep", "mount", "umount", "readlink", "flock", "nsenter", "env", "ls", "true"),
    *("cp", "rm", "ip", "ss", "tc", "nft", "ipset", "openssl"),
    *("iptables", "iptables-save", "iptables-legacy", "iptables-legacy-save"),
    *("ip6tables", "ip6tables-legacy", "ip6tables-legacy-save"),
)
_COMPILERS = ("clang", "llvm-strip")
_LIBRARIES = (
    "libbpf.so.1",
    "libnftables.so.1",
    "libip4tc.so.2",
    "libip6tc.so.2",
    "libxtables.so.12",
)
_COMPILING_LIBRARIES = ("libbcc.so.0", "librt.so.1")
_HEADERS = ("bpf", "linux", "asm-generic", "x86_64-linux-gnu/asm", "x86_64-linux-gnu/gnu")
_TREES = ("agent", "bpf", "tests", "docs")
_FILES = ("pyproject.toml", "Makefile", "README.md")
_SYSTEM_FILES = (
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/protocols", "/etc/services"),
    *("/etc/ethertypes", "/etc/hosts", "/usr/lib/ssl/openssl.cnf", "/etc/ssl/openssl.cnf"),
)
_MODULES = ("net", "lib", "crypto", "arch/x86/crypto", "drivers/net", "fs/fuse", "fs/overlayfs")
# What the tests in the virtual machine do not use, and what would be most of the image; and what is being written.
_LEFT_OUT = re.compile(
    r"/(envoy|mypy|mypyc|pip|ruff|setuptools|librt|ast_serialize|test|idlelib|tkinter|ensurepip|ethernet|hyperv"
    r"|wwan|infiniband|lib32|config-3\.\d+-[^/]*|\.[a-z]+_cache)$|__mypyc\.|/bin/(ruff|dmypy|mypy)$|\.tmp$"
)


@dataclass(frozen=True)
class Kernel:
    """A kernel and its modules, with what loads them."""

    image: Path
    modules: Path
    release: str
    kmod: debian.Packages


def kernel(meta_package: str) -> Kernel:
    """The kernel that a meta package such as linux-image-cloud-amd64 stands for."""
    name = debian.dependency(meta_package, r"linux-image-\d.*")
    packages = debian.unpacked_alone("kernel", name)
    release = name.removeprefix("linux-image-")
    kmod = debian.unpacked("kmod", "kmod")
    if not (packages.root / "lib/modules" / release / "modules.dep").exists():
        # One program that is what it is called: the package's links to it lead to where it is not installed.
        subprocess.run(
            ["depmod", "-b", packages.root, release],
            executable=kmod.program("kmod"),
            env=kmod.environment,
            check=True,
        )
    return Kernel(
        image=packages.root / "boot" / f"vmlinuz-{release}",
        modules=packages.root / "lib/modules" / release,
        release=release,
        kmod=kmod,
    )


def write(output: BinaryIO, booted: Kernel, command: Sequence[str], *, compilers: bool) -> None:
    """Writes the initramfs that runs a command in the checkout, with all its files as they are at the moment.

    The compilers are most of it where they are wanted.
    """
    image = _Image()
    image.add_text("/command", "\0".join((str(REPOSITORY), *command)))
    image.add_file(INIT, "/init", mode=0o755)
    for directory in ("/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/var/tmp", "/var/run"):
        image.add_directory(directory)
    for path in (
        *map(Path, ("/bin", "/sbin", "/lib", "/lib64", "/usr/bin/python3")),
        *_files(compilers),
    ):
        image.add(path)
    for path in _modules(booted.modules):
        image.add_file(path, f"/lib/modules/{booted.release}/{path.relative_to(booted.modules)}")
    kmod = Path(booted.kmod.program("kmod")).resolve()
    image.add_file(kmod, "/usr/sbin/modprobe", mode=0o755)
    for library in _libraries([kmod], booted.kmod.environment):
        image.add_file(library, f"/usr/lib/x86_64-linux-gnu/{library.name}")
    image.write(output)


def _files(compilers: bool) -> Iterator[Path]:
    """Everything that the guest has at the same place as this machine."""
    python = Path(sys.executable).resolve()
    programs = [python, *(Path(_program(name)) for name in _PROGRAMS)]
    libraries = Path("/usr/lib/x86_64-linux-gnu")
    trees = [
        Path(f"/usr/lib/python3.{sys.version_info.minor}"),
        Path(sys.prefix),
        *(REPOSITORY / each for each in _TREES),
        libraries / "xtables",
    ]
    if compilers:
        programs += [Path(_program(name)) for name in _COMPILERS]
        trees += [Path("/usr/include", each) for each in _HEADERS]
        trees += Path(_program("clang")).resolve().parent.parent.glob("lib/clang/*/include")
        # Of bcc and of some kernel, for `tidegate trace`.
        trees.append(Path("/usr/lib/python3/dist-packages/bcc"))
        trees += Path("/usr/src").glob("linux-headers-*/include")
        trees += Path("/usr/src").glob("linux-headers-*/arch/x86/include")
        yield from Path("/lib/modules").glob("*/build")
        yield from Path("/lib/modules").glob("*/source")
    inside = [each for tree in trees for each in _tree(tree)]
    elf = [each for each in inside if ".so" in each.name and each.is_file()]
    elf += [*programs, *(libraries / name for name in _LIBRARIES)]
    if compilers:
        elf += [libraries / name for name in _COMPILING_LIBRARIES]
    elf += [libraries / "libnss_files.so.2", *libraries.glob("ossl-modules/*.so")]
    yield from inside
    yield from elf
    yield from _libraries(elf, dict(os.environ))
    yield from (REPOSITORY / each for each in _FILES)
    yield from (Path(each) for each in _SYSTEM_FILES if Path(each).exists())


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"the virtual machine needs {name}, which is not installed here")
    return found


def _modules(directory: Path) -> Iterator[Path]:
    yield from directory.glob("modules.*")
    for part in _MODULES:
        yield from (each for each in _tree(directory / "kernel" / part) if each.is_file())


def _tree(directory: Path) -> Iterator[Path]:
    for parent, directories, files in os.walk(directory):
        directories[:] = [each for each in directories if not _LEFT_OUT.search(f"{parent}/{each}")]
        for name in (*directories, *files):
            if not _LEFT_OUT.search(f"{parent}/{name}"):
                yield Path(parent, name)


def _libraries(files: Iterable[Path], environment: dict[str, str]) -> set[Path]:
    """The shared libraries that ELF files need, and the loader."""
    told = subprocess.run(
        ["ldd", *files],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    ).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", told)}


class _Image:
    """A file system tree, written in the cpio format "newc" of the kernel's initramfs (buffer-format.rst)."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, Path | str | None]] = {}
        """By path: the mode and, of a file, what it is a copy of, or else the text of a file or link."""

    def add(self, path: Path) -> None:
        """A file, link or directory, where it is on this machine; a link also with what it points to."""
        at = str(_resolved_parent(path) / path.name)
        if at in self._entries:
            return
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            self._enter(at, status.st_mode, str(path.readlink()))
            if path.exists():
                self.add(path.parent / path.readlink())
        elif stat.S_ISDIR(status.st_mode):
            self.add_directory(at)
        elif stat.S_ISREG(status.st_mode):
            self.add_file(path, at)

    def add_file(self, path: Path, at: str, *, mode: int | None = None) -> None:
        self._enter(at, stat.S_IFREG | (mode or stat.S_IMODE(path.stat().st_mode)), path)

    def add_text(self, at: str, text: str) -> None:
        self._enter(at, stat.S_IFREG | 0o644, text)

    def add_directory(self, at: str) -> None:
        self._enter(at, stat.S_IFDIR | 0o755, None)

    def _enter(self, at: str, mode: int, content: Path | str | None) -> None:
        at = os.path.normpath(at)
        for parent in reversed(Path(at).parents):
            if str(parent) != "/" and str(parent) not in self._entries:
                if parent.is_symlink():
                    self.add(parent)
                else:
                    self._entries[str(parent)] = (stat.S_IFDIR | 0o755, None)
        self._entries.setdefault(at, (mode, content))

    def write(self, output: BinaryIO) -> None:
        for number, (at, (mode, content)) in enumerate(self._entries.items(), start=1):
            match content:
                case Path():
                    data, modified = content.read_bytes(), int(content.stat().st_mtime)
                case str():
                    data, modified = content.encode(), 0
                case None:
                    data, modified = b"", 0
            _write_entry(output, number, at.lstrip("/"), mode, modified, data)
        _write_entry(output, 0, "TRAILER!!!", 0, 0, b"")


def _resolved_parent(path: Path) -> Path:
    """The directory of a path, by its real name: /lib is /usr/lib."""
    return path.parent.resolve()


def _write_entry(
    output: BinaryIO, number: int, name: str, mode: int, modified: int, data: bytes
) -> None:
    encoded = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, modified, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % each for each in fields)
    output.write(header + encoded + bytes(-(len(header) + len(encoded)) % 4))
    output.write(data + bytes(-len(data) % 4))
