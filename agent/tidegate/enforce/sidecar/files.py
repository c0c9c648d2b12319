"""The files through which a sidecar is configured, in a directory that its Envoy works in.

Each is replaced by rename, which Envoy watches for, and only when its content changes. The working
directory belongs to the proxy user, who makes the admin socket in it: nothing in there is trusted,
root only creates new files and renames them. What the agent itself must be able to trust later
(pid file, logs) lies one level up, in a directory of root's.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from tidegate.enforce.sidecar import render
from tidegate.errors import TidegateError

LARGEST_LOG = 1024 * 1024
"""Bytes. A log that is longer is emptied, and kept beside as its end."""

_OWN_LOGS = (render.ACCESS_LOG, render.CLOSED_LOG)
"""Written by Envoy, which cannot make them itself: their directory is root's."""


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
        files = {render.leaf_file(name): content for name, content in secrets.leaves.items()}
        changed = [self._write(render.ROOTS_FILE, secrets.roots)]
        changed += [self._write(name, content) for name, content in files.items()]
        self._remove_others(render.LEAF_FILE, files)
        return any(changed)

    @property
    def has_secrets(self) -> bool:
        """Whether certificates were written, and are still there."""
        return (self.working / render.ROOTS_FILE).exists()

    def write_configuration(self, configuration: render.Configuration) -> bool:
        """Intentions and clusters come before the listeners that need them."""
        files = {render.intentions_file(name): text for name, text in configuration.ecds.items()}
        changed = [
            self._write(render.SWITCHES_FILE, configuration.rtds),
            *(self._write(name, content) for name, content in files.items()),
            self._write(render.CLUSTERS_FILE, configuration.cds),
            self._write(render.LISTENERS_FILE, configuration.lds),
        ]
        self._remove_others(render.INTENTIONS_FILE, files)
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
            for name in _OWN_LOGS:
                self._make_log(self.directory / name)

    def remove(self) -> None:
        """Take everything away, if it is there."""
        with _told(self.directory), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)

    def log(self, name: str) -> Path:
        """One of the logs that Envoy writes in the directory of root's."""
        return self.directory / name

    def _make_log(self, path: Path) -> None:
        if not path.exists():
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.fchown(file, self.uid, self.gid)
            finally:
                os.close(file)

    def _remove_others(self, kind: str, kept: Collection[str]) -> None:
        """Takes away the files of further services that the workload does not have any more."""
        stem, _, suffix = kind.rpartition(".")
        with _told(self.working), _directory(self.working) as descriptor:
            # By its descriptor: the name could be a link by now.
            for name in os.listdir(descriptor):  # noqa: PTH208
                mine = name.startswith(f"{stem}.") and name.endswith(f".{suffix}")
                if mine and name not in kept:
                    os.unlink(name, dir_fd=descriptor)

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


def bound_log(path: Path, kept: int = LARGEST_LOG) -> None:
    """Empties a log that has grown too long; its last `kept` bytes stay beside it, as `.1`.

    Whoever writes it appends, and goes on at the beginning of the emptied file.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LARGEST_LOG:
            path.with_name(f"{path.name}.1").write_bytes(log_end(path, kept))
            os.truncate(path, 0)


def log_end(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file; none of one that is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except FileNotFoundError:
        return b""


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
