"""Builds the image by buildah on a base of Debian's own packages, and runs containers of it by crun.

Neither program is installed (debian.py), nothing of theirs is kept on the machine: images and containers live in a
directory of the test run. Only the base is kept, below build/, until its packages are wanted anew.
"""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from debian import CACHE, Packages, unpacked

REPOSITORY = Path(__file__).parents[2]
CONTAINERFILE = REPOSITORY / "init" / "Containerfile"
BASE, IMAGE = "localhost/tidegate-base", "localhost/tidegate"
BUILD_S, RUN_S = 1200, 60

_AS_INSTALLED = """
mount -t overlay -o lowerdir="$1/usr:/usr" overlay /usr
if [ -d /sys/fs/cgroup/unified ]; then mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup; fi
shift
exec "$@"
"""
"""Unpacked packages lie over the machine's, for one process: buildah starts itself anew with an empty environment.
And crun wants no cgroups of version 1 beside the others."""

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MERGED = "usr/share/mmdebstrap/hooks/merged-usr"
"""Merges from the start, as Debian's images do; a package that does it afterwards would bring Perl along."""
_SLIM = 'rm -rf "$1"/usr/share/doc/* "$1"/usr/share/man/* "$1"/usr/share/locale/*'
"""Leaves out what Debian's slim images do."""
_POLICY = {"default": [{"type": "insecureAcceptAnything"}]}
"""containers-policy.json(5): what is built here is not signed."""


def as_installed(packages: Packages) -> tuple[str, ...]:
    """What comes before a command line whose program is to be found as if its package were installed."""
    return ("unshare", "--mount", "sh", "-ec", _AS_INSTALLED, "sh", str(packages.root))


class Builder:
    """buildah with a store of its own."""

    def __init__(self, directory: Path) -> None:
        self.packages = unpacked("image", "buildah", "crun", "mmdebstrap")
        self._directory = directory
        policy, registries = directory / "policy.json", directory / "registries.conf"
        storage = directory / "storage.conf"
        policy.write_text(json.dumps(_POLICY))
        registries.write_text("unqualified-search-registries = []\n")
        storage.write_text('[storage]\ndriver = "vfs"\n')
        self._options = (
            f"--root={directory / 'store'}",
            f"--runroot={directory / 'run'}",
            "--storage-driver=vfs",
        )
        self._environment = os.environ | {
            "CONTAINERS_REGISTRIES_CONF": str(registries),
            "CONTAINERS_STORAGE_CONF": str(storage),
            "TMPDIR": str(directory),
        }
        self._policy = f"--signature-policy={policy}"

    def buildah(self, *argv: str) -> str:
        command = [*as_installed(self.packages), "buildah", *self._options, *argv]
        return _run(command, self._environment, BUILD_S)

    def make_base(self) -> None:
        """A root file system of Debian's smallest choice, that trusts whom this machine trusts."""
        archive = CACHE / "image-base.tar"
        if not archive.exists():
            _make_root(self.packages, archive)
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(archive), "/")
        root = Path(self.buildah("mount", container).strip())
        shutil.copyfile(_trusted_here(), root / "etc/ssl/certs/ca-certificates.crt")
        self.buildah("umount", container)
        self.buildah("commit", "--quiet", self._policy, container, BASE)
        self.buildah("rm", container)

    def build(self) -> None:
        self.buildah(
            *("build", self._policy, "--layers=false", f"--build-arg=BASE={BASE}"),
            "--isolation=chroot",
            *(f"--file={CONTAINERFILE}", f"--tag={IMAGE}", str(REPOSITORY)),
        )

    def configuration(self) -> dict[str, object]:
        """What the image says of how it is run (OCI image configuration)."""
        return json.loads(self.buildah("inspect", "--type=image", IMAGE))["OCIv1"]["config"]

    def unpack(self) -> Path:
        """The image's file system, as a directory."""
        container = self.buildah("from", self._policy, IMAGE).strip()
        return Path(self.buildah("mount", container).strip())


class Container:
    """Runs the image's program as a runtime does: read-only root, default seccomp profile, named capabilities."""

    def __init__(self, builder: Builder, root: Path, directory: Path) -> None:
        self._packages = builder.packages
        self._root = root
        self._directory = directory
        self._numbers = itertools.count()

    def run(self, entrypoint: Sequence[str], *argv: str, **how: Any) -> "Done":
        """Runs to its end; `how` is that of `running`."""
        with self.running(entrypoint, *argv, **how) as process:
            output, problem = process.communicate(timeout=RUN_S)
        return Done(process.returncode, output, problem)

    @contextmanager
    def running(
        self,
        entrypoint: Sequence[str],
        *argv: str,
        netns_path: str = "",
        user: int = 0,
        capabilities: Sequence[str] = (),
        environment: Mapping[str, str] = {},
        mounts: Mapping[str, Path] = {},
        read_only: Collection[str] = (),
        sees_processes: bool = False,
    ) -> "Iterator[subprocess.Popen[str]]":
        """A container until the end of the context, in a network namespace of its own unless one is given."""
        name = f"tg-image-{os.getpid()}-{next(self._numbers)}"
        bundle = self._directory / name
        bundle.mkdir()
        kinds = ("mount", "ipc", "uts") if sees_processes else ("mount", "ipc", "uts", "pid")
        namespaces = [{"type": kind} for kind in kinds]
        namespaces.append({"type": "network"} | ({"path": netns_path} if netns_path else {}))
        specification = {
            "ociVersion": "1.0.2",
            "root": {"path": str(self._root), "readonly": True},
            "process": {
                "args": [*entrypoint, *argv],
                "cwd": "/",
                "user": {"uid": user, "gid": user},
                "env": [f"{key}={value}" for key, value in environment.items()],
                "noNewPrivileges": True,
                "capabilities": {
                    kind: list(capabilities) for kind in ("bounding", "effective", "permitted")
                },
            },
            "mounts": [
                _mount("/proc", "proc"),
                _mount("/dev", "tmpfs", "nosuid", "mode=755", "size=65536k"),
                _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
                *(
                    {
                        "destination": where,
                        "type": "bind",
                        "source": str(what),
                        "options": ["rbind", "rslave", "ro" if where in read_only else "rw"],
                    }
                    for where, what in mounts.items()
                ),
            ],
            "linux": {
                "namespaces": namespaces,
                "seccomp": _seccomp(self._packages, capabilities),
                "readonlyPaths": ["/proc/sys", "/proc/bus", "/proc/fs", "/proc/irq"],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            },
        }
        (bundle / "config.json").write_text(json.dumps(specification))
        crun = (*as_installed(self._packages), "crun", f"--root={self._directory / 'crun'}")
        try:
            with subprocess.Popen(
                [*crun, "--cgroup-manager=disabled", "run", f"--bundle={bundle}", name],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                try:
                    yield process
                finally:
                    # crun hands the signal on.
                    process.terminate()
                    process.wait(RUN_S)
        finally:
            shutil.rmtree(bundle)


class Done(NamedTuple):
    """What came of a container."""

    returncode: int
    stdout: str
    stderr: str


def _mount(where: str, kind: str, *options: str) -> dict[str, object]:
    return {"destination": where, "type": kind, "source": kind, "options": [*options]}


_FOR_ADMINISTRATORS = ("mount", "mount_setattr", "setns", "umount", "umount2", "unshare", "fsopen")
"""What containerd's default profile leaves to CAP_SYS_ADMIN, and this one gives to everybody."""


def _seccomp(packages: Packages, capabilities: Sequence[str]) -> dict[str, object]:
    """The default profile of Debian's runtimes for these capabilities, as OCI's configuration has it."""
    profile = json.loads(packages.path("usr/share/containers/seccomp.json").read_text())
    administers = "CAP_SYS_ADMIN" in capabilities
    syscalls = []
    for rule in profile["syscalls"]:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        if not {*includes.get("caps", ())} <= {*capabilities}:
            continue
        if {*excludes.get("caps", ())} & {*capabilities}:
            continue
        if "arches" in includes and "amd64" not in includes["arches"]:
            continue
        names = [name for name in rule["names"] if administers or name not in _FOR_ADMINISTRATORS]
        told = {"names": names, "action": rule["action"], "args": rule.get("args") or []}
        errno = {"errnoRet": rule["errnoRet"]} if rule.get("errnoRet") is not None else {}
        syscalls.append(told | errno)
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": syscalls,
    }


def _make_root(packages: Packages, archive: Path) -> None:
    part = archive.with_suffix(".part.tar")
    sources = [
        *Path("/etc/apt/sources.list.d").glob("debian.sources"),
        Path("/etc/apt/sources.list"),
    ]
    command = [
        *(packages.program("mmdebstrap"), "--quiet", "--variant=minbase", "--mode=root"),
        *("--include=ca-certificates,usr-is-merged", f"--keyring={_KEYRING}"),
        f"--hook-directory={packages.path(_MERGED)}",
        f"--customize-hook={_SLIM}",
        *("bookworm", str(part)),
        *[str(each) for each in sources if each.exists()][:1],
    ]
    _run(command, packages.environment, BUILD_S)
    part.rename(archive)


def _trusted_here() -> Path:
    """The certificates by which this machine knows others: a build fetches packages as it does."""
    return Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        told = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise RuntimeError(f"{' '.join(command)}:\n{told}")
    return done.stdout
