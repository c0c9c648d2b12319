"""Workloads from a directory of JSON files, one model.Workload each, named <anything>.json.

Whoever makes workloads replaces the files by rename. A file that cannot be used is told as a problem and
leaves its workload as it was last understood: half-written input never takes a workload out of the mesh.
"""

import os
import stat
from pathlib import Path

import msgspec

from tidegate.model import Workload

MAX_FILE_BYTES = 64 << 10
MAX_FILES = 4096


class FileSource:
    """The workloads that the files of a directory describe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Workload] = {}
        self._problems: tuple[str, ...] = ()

    def list(self) -> tuple[Workload, ...]:
        """Read the directory; workloads in the order of their file names.

        A directory that is not there, or cannot be read, is a problem and leaves all as they were: an empty one has
        no workloads, a missing one is a mistake.
        """
        problems: list[str] = []
        try:
            names = sorted(
                entry.name
                for entry in self._directory.iterdir()
                if entry.suffix == ".json" and not entry.name.startswith(".")
            )
        except OSError as error:
            self._problems = (f"{self._directory} cannot be read: {error.strerror}",)
            return tuple(self._known.values())
        if len(names) > MAX_FILES:
            problems.append(
                f"{self._directory} has {len(names)} files; only the first {MAX_FILES} are used"
            )
        found: dict[str, Workload] = {}
        owners: dict[str, str] = {}
        for name in names[:MAX_FILES]:
            try:
                workload = _read(self._directory / name)
            except _UnusableError as error:
                problems.append(str(error))
                workload = self._known.get(name)
            if workload is None:
                continue
            if workload.id in owners:
                problems.append(
                    f"{self._directory / name}: id {workload.id} is already that of "
                    f"{owners[workload.id]}; expected an id of its own"
                )
                continue
            owners[workload.id] = name
            found[name] = workload
        self._known = found
        self._problems = tuple(problems)
        return tuple(found.values())

    def problems(self) -> tuple[str, ...]:
        """One sentence for each file that the last `list` could not use."""
        return self._problems


class _UnusableError(Exception):
    """A file cannot be used; the message is a whole sentence."""


def _read(path: Path) -> Workload | None:
    """The workload in a file, None when the file is gone. Raises _UnusableError."""
    try:
        return msgspec.json.decode(_content(path), type=Workload)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _UnusableError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise _UnusableError(f"{path} is not a workload: {error}") from error


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return content
