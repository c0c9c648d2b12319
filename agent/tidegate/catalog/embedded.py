"""An embedded store with no server before it, behind what the commands need of a client.

Refuses as the server does, with the same words. Nobody else uses the store meanwhile.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tidegate.catalog import answers
from tidegate.catalog.client import CatalogRefused, Snapshot, tenancy_for
from tidegate.catalog.registration import info_of
from tidegate.catalog.requests import Tenancy, in_tenancy
from tidegate.catalog.store import Store, held_alone
from tidegate.errors import InputError
from tidegate.intent.entries import (
    Entry,
    EntryKey,
    Kind,
    filter_shape,
    from_consul,
    to_consul,
    to_request,
)
from tidegate.model import DEFAULT_TENANT


class EmbeddedClient:
    """A store as its server would answer from it. Methods raise CatalogRefused, and StoreError when the disk fails."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read_entries(self) -> tuple[Entry, ...]:
        """All entries, sorted by kind and name."""
        return self._store.entries()

    async def list_entries(
        self, kind: Kind, expression: str = "", *, namespace: str = "", partition: str = ""
    ) -> tuple[Entry, ...]:
        """The entries of a kind in one namespace, or in all ("*"), that a filter expression is true of."""
        tenancy = _tenancy(kind, namespace, partition)
        raw = [
            to_consul(entry)
            for entry in self._store.entries(kind)
            if tenancy.has(entry.namespace, entry.partition)
        ]
        found = answers.selected(raw, expression, filter_shape(kind))
        return tuple(from_consul(one, "the store") for one in found)

    async def read_entry(self, key: EntryKey) -> Entry:
        """One entry; CatalogRefused with status 404 when there is none."""
        entry = self._store.entry(key)
        if entry is None:
            raise CatalogRefused(404, answers.not_found(key))
        return entry

    async def write_entry(
        self, entry: Entry, cas: int | None = None, *, namespace: str = "", partition: str = ""
    ) -> bool:
        """Writes an entry; False when `cas` is not its ModifyIndex (0: it must not exist)."""
        said = tenancy_for(entry.kind, namespace, partition)
        try:
            fields = {"Namespace": said.get("ns"), "Partition": said.get("partition")}
            raw = in_tenancy(to_request(entry), {key: one for key, one in fields.items() if one})
            entry = from_consul(raw)
        except InputError as error:
            raise CatalogRefused(400, f"Request decoding failed: {error}") from error
        try:
            return self._store.write_entry(entry, cas)
        except InputError as error:
            raise CatalogRefused(500, str(error)) from error

    async def delete_entry(self, key: EntryKey, cas: int | None = None) -> bool:
        """Deletes an entry; False when `cas` is not its ModifyIndex."""
        return self._store.delete_entry(key, cas)

    async def snapshot(self) -> Snapshot:
        """Config entries, nodes and instances; what only a server knows is empty."""
        contents = self._store.contents()
        return Snapshot(
            index=contents.index,
            entries=contents.entries,
            instances=contents.instances,
            nodes=tuple({node.node: info_of(node) for node in contents.nodes}.values()),
        )


@contextlib.contextmanager
def embedded(path: Path, who: str, *, make: bool) -> Iterator[EmbeddedClient]:
    """The store at `path` as long as the block runs; one that is missing is made, or else an InputError.

    StoreError when a server runs on it.
    """
    if not make and not path.exists():
        raise InputError(f"there is no store at {path}", field="--store")
    with held_alone(path, who), contextlib.closing(Store(path)) as store:
        yield EmbeddedClient(store)


def _tenancy(kind: Kind, namespace: str, partition: str) -> Tenancy:
    said = tenancy_for(kind, namespace, partition)
    return Tenancy(said.get("ns", DEFAULT_TENANT), said.get("partition", DEFAULT_TENANT))
