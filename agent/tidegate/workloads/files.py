"""Workloads from a directory of JSON files, one model.Workload each, named <anything>.json.

Whoever makes workloads replaces the files by rename. A file that cannot be used is told as a problem and
leaves its workload as it was last understood: half-written input never takes a workload out of the mesh.
A file says all of its workload: what it leaves out is as model.Workload has it, whatever other sources know.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from tidegate.model import Workload
from tidegate.workloads.source import Description, LeftAlone, Origin

MAX_FILE_BYTES = 64 << 10
MAX_FILES = 4096
_MAX_TOLD = 20
"""Most wrong annotations of one file that are told one by one."""

_SHOWN = 60
"""Most characters of a name or a value that a problem repeats."""


class FileSource:
    """The workloads that the files of a directory describe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Workload] = {}
        self._problems: tuple[str, ...] = ()

    def list(self) -> tuple[Description, ...]:
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
            return self._descriptions()
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
        return self._descriptions()

    def _descriptions(self) -> tuple[Description, ...]:
        return tuple(_description(workload) for workload in self._known.values())

    def left_alone(self) -> tuple[LeftAlone, ...]:
        """None: each file is a workload."""
        return ()

    @property
    def is_complete(self) -> bool:
        """A workload whose file cannot be read is not in the list of an agent that has just started."""
        return not self._problems

    def problems(self) -> tuple[str, ...]:
        """One sentence for each file that the last `list` could not use."""
        return self._problems


def _description(workload: Workload) -> Description:
    said = msgspec.structs.asdict(workload)
    del said["node"]
    return Description(origin=Origin.FILES, **said)


class _UnusableError(Exception):
    """A file cannot be used; the message is a whole sentence."""


def _read(path: Path) -> Workload | None:
    """The workload in a file, None when the file is gone. Raises _UnusableError."""
    content = b""
    try:
        content = _content(path)
        return msgspec.json.decode(content, type=Workload)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _UnusableError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.ValidationError as error:
        reason = _wrong_annotations(content) or error
        raise _UnusableError(f"{path} is not a workload: {reason}") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _UnusableError(f"{path} is not a workload: {error}") from error


def _wrong_annotations(content: bytes) -> str:
    """Which annotations of a JSON object are no strings, and what they should be; "" when there are none to name."""
    try:
        document = msgspec.json.decode(content)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # A value of a wrong type is found before what stands behind it is read.
        return ""
    faults = []
    for field in ("annotations", "namespace_annotations"):
        annotations = document.get(field) if isinstance(document, dict) else None
        for name, value in annotations.items() if isinstance(annotations, dict) else ():
            if not isinstance(value, str):
                faults.append(f"{field}.{_name(name)} is not a string; expected {_string(value)}")
    more = len(faults) - _MAX_TOLD
    return "; ".join([*faults[:_MAX_TOLD], *([f"and {more} more"] if more > 0 else [])])


def _name(name: str) -> str:
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return shown if shown.isprintable() else repr(shown)


def _string(value: Any) -> str:
    """The JSON string that a value should have been, as far as that is clear."""
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | dict) for item in items):
        return "text in quotes"
    texts = [
        "" if item is None else item if isinstance(item, str) else json.dumps(item)
        for item in items
    ]
    text = json.dumps(",".join(texts))
    return text if len(text) <= _SHOWN else "text in quotes"


def _content(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    return content
