"""Which containers CNI has attached to which networks on this node, as the plugin's calls told: a source of workloads.

One file for each attachment, so that the next agent knows them too. What is told of a container is what the call went
by: where another source knows better, that is believed. An attachment ends with DEL, or with its network namespace: a
runtime that was killed never says so, and the path of a namespace may come to be that of another one.
"""

import contextlib
import errno
import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec

from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError
from tidegate.state_files import write_atomically
from tidegate.workloads.cni import AttachmentKey
from tidegate.workloads.source import Description, LeftAlone

_MAX_FILE_BYTES = 1 << 20

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESRCH)

LEAVING_S = 30.0
"""How long after DEL a container's network namespace may be there and is nobody's any more."""

_Pod: TypeAlias = str | tuple[str, str]
"""What a pod is asked for by: its UID, or its namespace and name."""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """One container in one network."""

    key: AttachmentKey
    place: netns.Identity
    """Which network namespace it is: its path may come to be another one's."""
    description: Description
    """What was known of the workload when it was attached."""
    pod_uid: str = ""
    pod_namespace: str = ""
    pod_name: str = ""

    @property
    def netns(self) -> str:
        """Path of the network namespace."""
        return self.description.netns

    @property
    def is_alive(self) -> bool:
        """Whether its network namespace still lies at its path. KernelError when that cannot be told."""
        try:
            return netns.identity(self.netns) == self.place
        except KernelError as error:
            if error.errno in _GONE:
                return False
            raise


class Attachments:
    """All attachments of this node (a source.Source). May be used from any thread."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made where it is missing. OSError when it cannot be, or cannot be read."""
        self._directory = directory
        self._lock = threading.Lock()
        self._known: dict[AttachmentKey, Attachment] = {}
        self._of_pods: Mapping[_Pod, Sequence[Attachment]] | None = None
        """All that are known, by the UID of their pod and by its namespace and name; None: to be made anew."""
        self._left_at: dict[netns.Identity, float] = {}
        """When, by the monotonic clock, `leave` was called for a namespace."""
        self._problems: tuple[str, ...] = ()
        self._unreadable: tuple[str, ...] = ()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load()

    def list(self) -> tuple[Description, ...]:
        """Each network namespace once, as its oldest attachment has it; attachments whose namespace is gone end."""
        found: dict[netns.Identity, Description] = {}
        problems: list[str] = []
        # Somebody may have cleared the directory of what runs: the next agent knows of no other.
        is_cleared = not self._directory.exists()
        for attachment in self.all:
            try:
                if not attachment.is_alive:
                    self._end(attachment)
                    continue
                if is_cleared:
                    self._write(attachment)
            except (KernelError, OSError) as error:
                problems.append(str(error))
            found.setdefault(attachment.place, attachment.description)
        self._problems = tuple(problems)
        return tuple(found.values())

    def left_alone(self) -> tuple[LeftAlone, ...]:
        """Nothing: what is to be left alone is not recorded."""
        return ()

    def problems(self) -> tuple[str, ...]:
        """One sentence for each file that could not be read, and namespace that could not be looked at."""
        return (*self._unreadable, *self._problems)

    @property
    def is_complete(self) -> bool:
        """False when a file could not be read: whose it is nobody knows."""
        return not self._unreadable

    def find(self, pod_uid: str, namespace: str, name: str) -> str | None:
        """Path of a pod's network namespace: by its UID, by namespace and name where that is not known.

        Of several the latest: a pod whose sandbox is made anew may have the old one for a while.
        """
        with self._lock:
            if self._of_pods is None:
                self._of_pods = _by_pod(self._known.values())
            found = (
                *reversed(self._of_pods.get(pod_uid, ())),
                *reversed(self._of_pods.get((namespace, name), ())),
            )
        for attachment in found:
            if pod_uid and attachment.pod_uid not in ("", pod_uid):
                continue
            with contextlib.suppress(KernelError):
                if attachment.is_alive:
                    return attachment.netns
        return None

    @property
    def all(self) -> tuple[Attachment, ...]:
        with self._lock:
            return tuple(self._known.values())

    def get(self, key: AttachmentKey) -> Attachment | None:
        with self._lock:
            return self._known.get(key)

    def of_network(self, network: str) -> tuple[Attachment, ...]:
        with self._lock:
            return tuple(one for one in self._known.values() if one.key.network == network)

    def others_in(self, attachment: Attachment) -> bool:
        """Whether other attachments lead into the same network namespace."""
        return any(one.key != attachment.key for one in self.within(attachment.place))

    def within(self, place: netns.Identity) -> tuple[Attachment, ...]:
        """Those that lead into a network namespace."""
        with self._lock:
            return tuple(one for one in self._known.values() if one.place == place)

    def put(self, attachment: Attachment) -> None:
        """Takes an attachment in, or what is known of it by now. OSError when it cannot be written: it counts then
        until the agent ends.
        """
        with self._lock:
            self._known[attachment.key] = attachment
            self._of_pods = None
            self._left_at.pop(attachment.place, None)
        self._write(attachment)

    def leave(self, place: netns.Identity) -> None:
        """The container of a network namespace ends: whoever else knows of it may not have heard so yet."""
        now = time.monotonic()
        with self._lock:
            latest = {one: at for one, at in self._left_at.items() if now - at < LEAVING_S}
            self._left_at = {**latest, place: now}

    def is_leaving(self, place: netns.Identity) -> bool:
        """Whether that was said of a namespace not long ago."""
        at = self._left_at.get(place)
        return at is not None and time.monotonic() - at < LEAVING_S

    def remove(self, key: AttachmentKey) -> Attachment | None:
        """Ends an attachment; None when there is none. OSError when its file cannot be removed: it stays then."""
        self._path(key).unlink(missing_ok=True)
        with self._lock:
            self._of_pods = None
            return self._known.pop(key, None)

    def _end(self, attachment: Attachment) -> None:
        with self._lock:
            # It may have been attached anew, elsewhere.
            if self._known.get(attachment.key) != attachment:
                return
            self._path(attachment.key).unlink(missing_ok=True)
            self._of_pods = None
            del self._known[attachment.key]

    def _write(self, attachment: Attachment) -> None:
        path, content = self._path(attachment.key), msgspec.json.encode(attachment)
        try:
            write_atomically(path, content)
        except FileNotFoundError:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, content)

    def _path(self, key: AttachmentKey) -> Path:
        digest = hashlib.sha256("\n".join(key).encode(errors="surrogateescape")).hexdigest()
        return self._directory / f"{digest[:32]}.json"

    def _load(self) -> None:
        unreadable = []
        found = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                found.append((_read(path), path.stat().st_mtime_ns))
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or error
                unreadable.append(f"{path} is not the record of an attachment: {reason}")
        found.sort(key=lambda each: (each[0].description.created_at or 0.0, each[1]))
        self._known = {one.key: one for one, _ in found}
        self._unreadable = tuple(unreadable)


def _by_pod(attachments: Iterable[Attachment]) -> Mapping[_Pod, Sequence[Attachment]]:
    found: dict[_Pod, list[Attachment]] = {}
    for attachment in attachments:
        if attachment.pod_uid:
            found.setdefault(attachment.pod_uid, []).append(attachment)
        if attachment.pod_name:
            pod = (attachment.pod_namespace, attachment.pod_name)
            found.setdefault(pod, []).append(attachment)
    return found


def _read(path: Path) -> Attachment:
    with path.open("rb") as stream:
        return msgspec.json.decode(stream.read(_MAX_FILE_BYTES), type=Attachment)
