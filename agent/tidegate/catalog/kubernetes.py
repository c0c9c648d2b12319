"""Config entries from Kubernetes: Consul's custom resources, in the place of what the intent server has of them.

Instances, nodes and certificates are the server's in any case. All agents see the same resource versions, so these are
the indexes of the entries. What admission let in is taken as it is: whether a service may be permissive is asked where
entries are written, which here is not tidegate's server.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from tidegate.catalog.consul import Snapshot
from tidegate.catalog.transport import CatalogUnreachable
from tidegate.errors import InputError
from tidegate.intent.entries import CRD_API_VERSION, MAX_INDEX, Entry, EntryKey, from_server
from tidegate.kubeapi.access import ApiAccess
from tidegate.kubeapi.client import ApiClient
from tidegate.kubeapi.errors import UNREADABLE
from tidegate.kubeapi.following import Following

_PLURALS = ("meshes", "proxydefaults", "servicedefaults", "serviceintentions")
"""How the resources are called in paths (consul-k8s charts/consul/templates/crd-*.yaml)."""
_MAX_TOLD = 200
"""Most characters of what is wrong with a resource that are told."""


class _Name(NamedTuple):
    """What a resource of a kind is called; at one time one has it."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Resource(msgspec.Struct, frozen=True, kw_only=True):
    """One custom resource, as it was understood."""

    name: _Name
    entry: Entry | None
    """None for one that cannot be understood, or is being deleted."""
    problem: str = ""


class CustomResources:
    """The config entries in a cluster. Belongs to the event loop that runs it."""

    def __init__(self, access: ApiAccess) -> None:
        self._client = ApiClient(access)
        self._kinds = [_OfKind(self._client, plural) for plural in _PLURALS]
        self._assembled: tuple[object, tuple[Entry, ...]] = (None, ())
        self._overlaid: tuple[Snapshot | None, tuple[Entry, ...], Snapshot | None] = None, (), None

    async def run(self, stop: asyncio.Event, wake: Callable[[], None]) -> None:
        """Follows the API server until `stop`; `wake` is called after each change."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for kind in self._kinds:
                    tasks.create_task(kind.following.run(stop, wake))
        finally:
            await self._client.close()

    def overlay(self, snapshot: Snapshot) -> Snapshot:
        """The server's snapshot with these entries instead of its own; the same object while nothing has changed.

        CatalogUnreachable before all of them are known.
        """
        for kind in self._kinds:
            if not kind.is_synced:
                reason = kind.following.problem or "the Kubernetes API server has not answered yet"
                raise CatalogUnreachable(f"config entries are not known: {reason}")
        entries = self._entries()
        base, former, made = self._overlaid
        if made is None or base is not snapshot or former is not entries:
            index = max([snapshot.index, *(entry.modify_index for entry in entries)])
            made = msgspec.structs.replace(snapshot, entries=entries, index=index)
            self._overlaid = snapshot, entries, made
        return made

    @property
    def outdated(self) -> str:
        """Why they may be others by now; empty while all are followed."""
        return next((kind.following.problem for kind in self._kinds if kind.following.problem), "")

    def problems(self) -> tuple[str, ...]:
        """One sentence for each kind that cannot be followed, and for each resource that is not taken."""
        found = [kind.following.problem for kind in self._kinds if kind.following.problem]
        for kind in self._kinds:
            found += [one.problem for _, one in sorted(kind.resources.items()) if one.problem]
        found += (problem for _, problem in self._each() if problem)
        return tuple(dict.fromkeys(found))

    def _entries(self) -> tuple[Entry, ...]:
        """The same object while nothing has changed."""
        versions = tuple(kind.changes for kind in self._kinds)
        if self._assembled[0] != versions:
            entries = tuple(entry for entry, problem in self._each() if not problem)
            self._assembled = versions, entries
        return self._assembled[1]

    def _each(self) -> Iterator[tuple[Entry, str]]:
        """Entries in the order of their kinds and names, and why one is not taken."""
        owners: dict[EntryKey, _Name] = {}
        for kind in self._kinds:
            for name, one in sorted(kind.taken.items()):
                owner = owners.setdefault(one.key, name)
                problem = f"{kind.plural} {owner} and {name} say the same entry; {owner} is taken"
                yield one, "" if owner == name else problem


class _OfKind:
    """The resources of one kind."""

    def __init__(self, client: ApiClient, plural: str) -> None:
        self.plural = plural
        self.following = Following(
            client, f"/apis/{CRD_API_VERSION}/{plural}", {}, self._read, self
        )
        self.resources: dict[_Name, _Resource] = {}
        self.taken: dict[_Name, Entry] = {}
        """Entries as they were understood last."""
        self.is_synced = False
        self.changes = 0
        """How often anything has changed."""

    def listed(self, items: Sequence[_Resource]) -> None:
        """These are all."""
        self.resources = {}
        former, self.taken = self.taken, {}
        for item in items:
            self._take_in(item, former)
        self.is_synced = True
        self.changes += 1

    def changed(self, item: _Resource) -> None:
        """This one is new, or is so from now on."""
        self._take_in(item, self.taken)
        self.changes += 1

    def gone(self, item: _Resource) -> None:
        """The server has this one no more."""
        self.resources.pop(item.name, None)
        self.taken.pop(item.name, None)
        self.changes += 1

    def _take_in(self, item: _Resource, former: dict[_Name, Entry]) -> None:
        """One that cannot be understood stays as it was in `former`."""
        self.resources[item.name] = item
        entry = item.entry or (former.get(item.name) if item.problem else None)
        if entry is None:
            self.taken.pop(item.name, None)
        else:
            self.taken[item.name] = entry

    def _read(self, content: bytes) -> _Resource:
        name = _Name("", "")
        try:
            raw: dict[str, Any] = msgspec.json.decode(content, type=dict[str, Any])
            metadata = msgspec.convert(raw.get("metadata"), type=_Metadata)
            name = _Name(metadata.namespace, metadata.name)
            if metadata.deletion_timestamp is not None:
                # It waits for somebody's finalizer; for consul-k8s it is gone by now too.
                return _Resource(name=name, entry=None)
            entry = from_server(raw, f"{self.plural} {name}")
        except InputError as error:
            return _Resource(name=name, entry=None, problem=_plain(str(error)))
        except UNREADABLE as error:
            problem = f"{self.plural} {name} cannot be understood: {error}"
            return _Resource(name=name, entry=None, problem=_plain(problem))
        return _Resource(
            name=name,
            entry=msgspec.structs.replace(entry, modify_index=_index(metadata.resource_version)),
        )


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    namespace: str = "default"
    resource_version: str = ""
    deletion_timestamp: str | None = None


def _index(version: str) -> int:
    """A resource version is opaque by contract and a decimal number in every API server there is."""
    return min(int(version), MAX_INDEX) if version.isdecimal() and len(version) < 20 else 0


def _plain(text: str) -> str:
    return ascii(text[:_MAX_TOLD])[1:-1]
