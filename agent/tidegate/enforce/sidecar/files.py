"""The files through which a sidecar is configured, in a directory that its Envoy works in.

Each is replaced by rename, which Envoy watches for, and only when its content changes. The working
directory belongs to the proxy user, who makes the admin socket in it: nothing in there is trusted,
root only creates new files and renames them. What the agent itself must be able to trust later
(pid file, log) lies one level up, in a directory of root's.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from tidegate.enforce.sidecar import render
from tidegate.errors import TidegateError


class SidecarError(TidegateError):
    """The sidecar cannot be configured, started, stopped or asked."""


class SidecarFiles:
    """The directory of one sidecar. Writing is idempotent and says whether anything changed.

    All methods raise SidecarError when the file system refuses.
    """

    def __init__(self, directory: Path, *, uid: int, gid: int) -> None:
        self.directory = directory
        """Root's, mode 0711: the proxy user passes through it."""
        self.working = directory / "envoy"
        """The proxy user's, mode 0700: Envoy's working directory."""
        self.uid = uid
        self.gid = gid

    def write_bootstrap(self, bootstrap: bytes) -> bool:
        return self._write(render.BOOTSTRAP_FILE, bootstrap)

    def write_secrets(self, secrets: render.Secrets) -> bool:
        roots_changed = self._write(render.ROOTS_FILE, secrets.roots)
        return self._write(render.LEAF_FILE, secrets.leaf) or roots_changed

    def write_configuration(self, configuration: render.Configuration) -> bool:
        """Intentions and clusters come before the listeners that need them."""
        changed = [
            self._write(render.INTENTIONS_FILE, configuration.ecds),
            self._write(render.CLUSTERS_FILE, configuration.cds),
            self._write(render.LISTENERS_FILE, configuration.lds),
        ]
        return any(changed)

    def prepare(self) -> None:
        """Make both directories, with their owners and modes.

        Envoy resolves the paths of its files from the root down, so that it must be able to pass
        every directory above: SidecarError names the one that it cannot.
        """
        for above in self.directory.parents:
            if above.exists() and not above.stat().st_mode & stat.S_IXOTH:
                raise SidecarError(
                    f"{above}: the sidecar's user {self.uid} cannot pass this directory to"
                    f" {self.working}; expected mode 0711 or 0755"
                )
        with _told(self.working):
            self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            self.directory.chmod(0o711)
            with contextlib.suppress(FileExistsError):
                self.working.mkdir(mode=0o700)
            with _directory(self.working) as descriptor:
                os.fchown(descriptor, self.uid, self.gid)
                os.fchmod(descriptor, 0o700)

    def remove(self) -> None:
        """Take everything away, if it is there."""
        with _told(self.directory), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)

    def _write(self, name: str, content: bytes) -> bool:
        self.prepare()
        with _told(self.working / name), _directory(self.working) as descriptor:
            if _read(descriptor, name, len(content) + 1) == content:
                return False
            staging = f".{name}.new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staging, dir_fd=descriptor)
            self._create(descriptor, staging, content)
            os.rename(staging, name, src_dir_fd=descriptor, dst_dir_fd=descriptor)
            return True

    def _create(self, directory: int, name: str, content: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(name, flags, 0o600, dir_fd=directory)
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
            os.fchown(file, self.uid, self.gid)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SidecarError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(directory: int, name: str, limit: int) -> bytes | None:
    """At most `limit` bytes of a regular file; None for anything else that may have that name."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError:  # ELOOP: a symbolic link. ENXIO: a socket or a FIFO.
        return None
    with os.fdopen(file, "rb") as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return None
        return stream.read(limit)
