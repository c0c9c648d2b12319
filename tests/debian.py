"""Debian packages for tests, unpacked below build/: nothing is installed, no service starts, no user is made.

Programs of an unpacked package find their libraries by `environment`. What the machine has installed already is not
fetched again. `make clean` removes it all.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(__file__).parent.parent / "build" / "debian"

_PROGRAMS = ("usr/bin", "usr/sbin", "bin", "sbin", "usr/games")
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib")


class Packages:
    """A directory of unpacked packages; make one with `unpacked`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a program out of these packages."""
        path = [str(self.root / each) for each in _PROGRAMS]
        libraries = [str(self.root / each) for each in _LIBRARIES]
        return os.environ | {
            "PATH": ":".join([*path, os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]),
            "LD_LIBRARY_PATH": ":".join(libraries),
        }

    def program(self, name: str) -> str:
        """Path of a program of these packages or, where that was installed already, of the machine."""
        path = shutil.which(name, path=self.environment["PATH"])
        if path is None:
            raise FileNotFoundError(f"no program {name} in {self.root} and none installed")
        return path

    def path(self, name: str) -> Path:
        """A file or directory of these packages or, where that was installed already, of the machine."""
        inside = self.root / name.lstrip("/")
        return inside if inside.exists() else Path("/", name)


def unpacked(directory: str, *packages: str) -> Packages:
    """Packages and what they depend on, as far as the machine does not have it."""
    return _unpacked(
        directory,
        packages,
        "apt-get",
        "install",
        "--yes",
        "--download-only",
        "--no-install-recommends",
    )


def unpacked_alone(directory: str, *packages: str) -> Packages:
    """Packages without what they depend on."""
    return _unpacked(directory, packages, "apt-get", "download")


def dependency(package: str, pattern: str) -> str:
    """The one package that a package depends on and whose name matches, such as what a meta package stands for."""
    told = _run(["apt-cache", "depends", "--important", package], Path())
    names = {each for each in re.findall(r"Depends: (\S+)", told) if re.fullmatch(pattern, each)}
    (name,) = names
    return name


def _unpacked(directory: str, packages: Sequence[str], *command: str) -> Packages:
    root = CACHE / directory
    stamp, wanted = root / ".packages", "\n".join(packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(root, ignore_errors=True)
        archives = CACHE / f"{directory}.archives"
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
            _run(["apt-get", "-qq", "update"], archives)
        options = (
            f"--option=Dir::Cache::archives={archives}",
            # As root, apt would fetch as a user of its own, who may not be able to write here.
            "--option=APT::Sandbox::User=root",
        )
        _run([*command, "--quiet", *options, *packages], archives)
        root.mkdir(parents=True)
        for archive in sorted(archives.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(archive), str(root)], archives)
        shutil.rmtree(archives)
        stamp.write_text(wanted)
    return Packages(root)


def _run(command: Sequence[str], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
