"""The embedded store: config entries and the catalog in one SQLite file, with one monotonic index.

Every change is one transaction with one index, on disk before it is acknowledged (write-ahead log,
synchronous=FULL). Compare-and-set and the permissive gate are decided inside the transaction. Addresses are
reused, so the catalog keeps spans: which instance had which addresses from when until when, bounded in
number and age. Thread-safe, blocking. Knows nothing of HTTP.
"""

import contextlib
import enum
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tidegate.catalog.registration import (
    CONNECT_PROXY,
    Node,
    Service,
    destination_id,
    instance_of,
    proxy_id,
)
from tidegate.errors import TidegateError
from tidegate.intent.entries import Entry, Kind, Mesh, check_write, from_consul, to_consul
from tidegate.model import Instance

SCHEMA_VERSION = 1

FIRST_INDEX = 1
"""Index of an empty store: Consul's clients take 0 for "do not wait"."""

DEPARTED_KEPT_S = 7 * 86400.0
"""How long the catalog remembers who had an address."""

DEPARTED_KEPT = 4096
"""How many ended spans it remembers at most; the longest ended are forgotten first."""

_BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (topic TEXT PRIMARY KEY, modified INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    kind TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL, modified INTEGER NOT NULL, PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE TABLE nodes (
    node TEXT PRIMARY KEY, body BLOB NOT NULL,
    created INTEGER NOT NULL, modified INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE services (
    node TEXT NOT NULL REFERENCES nodes (node), id TEXT NOT NULL, name TEXT NOT NULL,
    body BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL,
    PRIMARY KEY (node, id)
) WITHOUT ROWID;
CREATE INDEX services_by_name ON services (name);
CREATE TABLE spans (
    span INTEGER PRIMARY KEY, node TEXT NOT NULL, id TEXT NOT NULL, body BLOB NOT NULL,
    seen_from REAL NOT NULL, seen_until REAL NOT NULL
);
CREATE INDEX spans_by_instance ON spans (node, id) WHERE seen_until = 0;
CREATE INDEX spans_by_end ON spans (seen_until) WHERE seen_until > 0;
CREATE TABLE holdings (
    address TEXT NOT NULL, span INTEGER NOT NULL, PRIMARY KEY (address, span)
) WITHOUT ROWID;
"""
"""`holdings` has the addresses of the open spans only."""


class StoreError(TidegateError):
    """The store's file cannot be read or written."""


class Topic(enum.StrEnum):
    """What a reader can wait for."""

    CONFIG = "config"
    CATALOG = "catalog"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A service on its node, with the indexes that it was made and last changed at."""

    node: Node
    service: Service
    create_index: int
    modify_index: int


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    node: Node
    create_index: int
    modify_index: int


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one index."""

    index: int
    entries: tuple[Entry, ...]
    nodes: tuple[Node, ...]
    instances: tuple[Instance, ...]


class Store:
    """One store file, opened by one server process. Methods raise StoreError when the disk fails."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Opens the file, making it (mode 0600) if it is missing. Raises StoreError."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        with self._errors():
            self._db = _open(path)
        try:
            with self._errors():
                self._prepare()
        except TidegateError:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file. What was acknowledged is on disk already."""
        with self._lock:
            self._db.close()

    # Index.

    @property
    def id(self) -> str:
        """Tells this file from one that was made anew in its place."""
        with self._reading() as db:
            return str(_one(db, "SELECT value FROM meta WHERE key = 'id'"))

    def index(self, topic: Topic | None = None) -> int:
        """Index of the last change, of anything or of one topic; FIRST_INDEX before the first."""
        with self._reading() as db:
            return _index(db, topic)

    # Config entries.

    def entries(self, kind: Kind | None = None) -> tuple[Entry, ...]:
        """All entries, or those of a kind, sorted by kind and name."""
        with self._reading() as db:
            return _entries(db, kind)

    def entry(self, kind: Kind, name: str) -> Entry | None:
        """One entry, None when there is none of that name."""
        with self._reading() as db:
            return _entry(db, kind, name)

    def write_entry(self, entry: Entry, cas: int | None = None) -> bool:
        """Creates or replaces an entry. False when `cas` is not its ModifyIndex (0: it must be new).

        Raises InputError when the permissive gate is closed for it. A write that changes nothing
        succeeds and leaves the index alone. Indexes in `entry` are not looked at.
        """
        with self._writing() as db:
            existing = _entry(db, entry.kind, entry.name)
            if cas is not None and cas != (existing.modify_index if existing else 0):
                return False
            mesh = _entry(db, Kind.MESH, Mesh().name)
            check_write(existing, entry, mesh if isinstance(mesh, Mesh) else None)
            if existing is not None and _content(existing) == _content(entry):
                return True
            index = _advance(db, Topic.CONFIG)
            db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)",
                (
                    entry.kind,
                    entry.name,
                    msgspec.json.encode(to_consul(_content(entry))),
                    existing.create_index if existing else index,
                    index,
                ),
            )
        return True

    def delete_entry(self, kind: Kind, name: str, cas: int | None = None) -> bool:
        """Deletes an entry; one that is missing is no error. False when `cas` does not match."""
        with self._writing() as db:
            existing = _entry(db, kind, name)
            if cas is not None and (existing is None or existing.modify_index != cas):
                return False
            if existing is not None:
                _advance(db, Topic.CONFIG)
                db.execute("DELETE FROM entries WHERE kind = ? AND name = ?", (kind, name))
        return True

    # Catalog.

    def nodes(self) -> tuple[NodeRecord, ...]:
        """All nodes, sorted by name."""
        with self._reading() as db:
            rows = db.execute("SELECT body, created, modified FROM nodes ORDER BY node")
            return tuple(
                NodeRecord(node=_node(body), create_index=created, modify_index=modified)
                for body, created, modified in rows
            )

    def services(self, name: str | None = None) -> tuple[Record, ...]:
        """All services on all nodes, or those of one name, sorted by name, node and id."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT nodes.body, services.body, services.created, services.modified"
                " FROM services JOIN nodes USING (node) WHERE ?1 IS NULL OR services.name = ?1"
                " ORDER BY services.name, services.node, services.id",
                (name,),
            )
            return tuple(
                Record(
                    node=_node(node),
                    service=_service(service),
                    create_index=created,
                    modify_index=modified,
                )
                for node, service, created, modified in rows
            )

    def instances(self) -> tuple[Instance, ...]:
        """Living and recently departed instances; a living one's seen_until is 0."""
        with self._reading() as db:
            return _instances(db)

    def contents(self) -> Contents:
        """Everything, at one index."""
        with self._reading() as db:
            nodes = db.execute("SELECT body FROM nodes ORDER BY node")
            return Contents(
                index=_index(db, None),
                entries=_entries(db, None),
                nodes=tuple(_node(body) for (body,) in nodes),
                instances=_instances(db),
            )

    def register(self, node: Node, service: Service | None = None) -> None:
        """Creates or replaces a node, and a service on it. Changes nothing when nothing changed."""
        with self._writing() as db:
            node_changed = _is_new(
                db, "SELECT body FROM nodes WHERE node = ?", (node.node,), _encoded(node)
            )
            service_changed = service is not None and _is_new(
                db,
                "SELECT body FROM services WHERE node = ? AND id = ?",
                (node.node, service.id),
                _encoded(service),
            )
            if not node_changed and not service_changed:
                return
            index = _advance(db, Topic.CATALOG)
            if node_changed:
                db.execute(
                    "INSERT INTO nodes VALUES (?1, ?2, ?3, ?3) ON CONFLICT (node)"
                    " DO UPDATE SET body = excluded.body, modified = excluded.modified",
                    (node.node, _encoded(node), index),
                )
            if service is not None and service_changed:
                db.execute(
                    "INSERT INTO services VALUES (?1, ?2, ?3, ?4, ?5, ?5) ON CONFLICT (node, id)"
                    " DO UPDATE SET name = excluded.name, body = excluded.body,"
                    " modified = excluded.modified",
                    (node.node, service.id, service.service, _encoded(service), index),
                )
                self._follow(db, node, _owner(service))

    def deregister(self, node: str, service_id: str | None = None) -> None:
        """Removes a service, or a node with all its services. What is missing is no error."""
        with self._writing() as db:
            row = db.execute("SELECT body FROM nodes WHERE node = ?", (node,)).fetchone()
            if row is None:
                return
            gone = [
                _service(body)
                for (body,) in db.execute(
                    "SELECT body FROM services WHERE node = ?1 AND (?2 IS NULL OR id = ?2)",
                    (node, service_id),
                )
            ]
            if service_id is not None and not gone:
                return
            _advance(db, Topic.CATALOG)
            for service in gone:
                db.execute("DELETE FROM services WHERE node = ? AND id = ?", (node, service.id))
            for owner in dict.fromkeys(_owner(service) for service in gone):
                self._follow(db, _node(row[0]), owner)
            if service_id is None:
                db.execute("DELETE FROM nodes WHERE node = ?", (node,))

    # Spans.

    def _follow(self, db: sqlite3.Connection, node: Node, instance_id: str) -> None:
        """Brings the open span of an instance in line with its services."""
        now = self._clock()
        open_span = db.execute(
            "SELECT span, body FROM spans WHERE node = ? AND id = ? AND seen_until = 0",
            (node.node, instance_id),
        ).fetchone()
        instance = _instance(db, node, instance_id)
        if instance is None:
            if open_span is not None:
                self._end(db, open_span[0], now)
            return
        if open_span is not None:
            before = msgspec.json.decode(open_span[1], type=_Seen)
            if before.claimed == instance.addresses:
                seen = _Seen(instance=instance, claimed=before.claimed, held=before.held)
                db.execute(
                    "UPDATE spans SET body = ? WHERE span = ?", (_encoded(seen), open_span[0])
                )
                return
            self._end(db, open_span[0], now)
            since = now
        else:
            since = min(instance.seen_from or now, now)
        for address in instance.addresses:
            self._take_away(db, address, since, now)
        self._begin(db, instance, instance.addresses, since)

    def _take_away(self, db: sqlite3.Connection, address: str, since: float, now: float) -> None:
        """Ends at `since` what others held `address` for; their other addresses they keep."""
        holders = db.execute(
            "SELECT span, body, seen_from FROM spans JOIN holdings USING (span)"
            " WHERE holdings.address = ? AND seen_until = 0",
            (address,),
        ).fetchall()
        for span, body, seen_from in holders:
            seen = msgspec.json.decode(body, type=_Seen)
            end = since if since > seen_from else now
            self._end(db, span, end)
            rest = tuple(held for held in seen.held if held != address)
            self._begin(db, seen.instance, rest, end)

    def _begin(
        self, db: sqlite3.Connection, instance: Instance, held: tuple[str, ...], since: float
    ) -> None:
        seen = _Seen(instance=instance, claimed=instance.addresses, held=held)
        span = db.execute(
            "INSERT INTO spans (node, id, body, seen_from, seen_until) VALUES (?, ?, ?, ?, 0)",
            (instance.node, instance.id, _encoded(seen), since),
        ).lastrowid
        db.executemany("INSERT INTO holdings VALUES (?, ?)", [(text, span) for text in held])

    def _end(self, db: sqlite3.Connection, span: int, at: float) -> None:
        db.execute("UPDATE spans SET seen_until = max(?, seen_from) WHERE span = ?", (at, span))
        db.execute("DELETE FROM holdings WHERE span = ?", (span,))
        db.execute(
            "DELETE FROM spans WHERE seen_until > 0 AND seen_until < ?",
            (self._clock() - DEPARTED_KEPT_S,),
        )
        db.execute(
            "DELETE FROM spans WHERE span IN (SELECT span FROM spans WHERE seen_until > 0"
            " ORDER BY seen_until DESC LIMIT -1 OFFSET ?)",
            (DEPARTED_KEPT,),
        )

    # The file.

    def _prepare(self) -> None:
        version = _one(self._db, "PRAGMA user_version")
        if version == 0 and _one(self._db, "SELECT count(*) FROM sqlite_master") == 0:
            with self._writing() as db:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('id', ?)", (secrets.token_hex(8),))
                db.execute("INSERT INTO meta VALUES ('index', ?)", (FIRST_INDEX,))
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise StoreError(
                f"{self._path}: the store has format {version}, made by another version of"
                f" tidegate; expected format {SCHEMA_VERSION}"
            )
        damage = _one(self._db, "PRAGMA quick_check(1)")
        if damage != "ok":
            raise self._damaged(str(damage))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view."""
        with self._lock, self._errors():
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.rollback()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on disk when the block ends, undone when it raises."""
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.commit()
            finally:
                if self._db.in_transaction:
                    self._db.rollback()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self._path}: {error}") from error
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error

    def _damaged(self, detail: str) -> StoreError:
        return StoreError(
            f"{self._path}: the store is damaged ({' '.join(detail.split())}); restore it from a"
            " copy, or move it away to begin with an empty one"
        )


class _Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What a span is about: the instance, what it says its addresses are, and those it really has.

    An address belongs to whoever claimed it last; who repeats an old claim does not get it back.
    """

    instance: Instance
    claimed: tuple[str, ...]
    held: tuple[str, ...]


def _open(path: Path) -> sqlite3.Connection:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    db = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except sqlite3.Error:
        db.close()
        raise
    return db


def _one(db: sqlite3.Connection, query: str) -> object:
    return db.execute(query).fetchone()[0]


def _index(db: sqlite3.Connection, topic: Topic | None) -> int:
    if topic is None:
        row = db.execute("SELECT value FROM meta WHERE key = 'index'").fetchone()
    else:
        row = db.execute("SELECT modified FROM topics WHERE topic = ?", (topic,)).fetchone()
    return int(row[0]) if row else FIRST_INDEX


def _advance(db: sqlite3.Connection, topic: Topic) -> int:
    index = _index(db, None) + 1
    db.execute("UPDATE meta SET value = ? WHERE key = 'index'", (index,))
    db.execute("INSERT OR REPLACE INTO topics VALUES (?, ?)", (topic, index))
    return index


def _entries(db: sqlite3.Connection, kind: Kind | None) -> tuple[Entry, ...]:
    rows = db.execute(
        "SELECT body, created, modified FROM entries WHERE ?1 IS NULL OR kind = ?1"
        " ORDER BY kind, name",
        (kind,),
    )
    return tuple(_read_entry(*row) for row in rows)


def _entry(db: sqlite3.Connection, kind: Kind, name: str) -> Entry | None:
    row = db.execute(
        "SELECT body, created, modified FROM entries WHERE kind = ? AND name = ?", (kind, name)
    ).fetchone()
    return _read_entry(*row) if row else None


def _read_entry(body: bytes, created: int, modified: int) -> Entry:
    entry = from_consul(msgspec.json.decode(body), "the store")
    return msgspec.structs.replace(entry, create_index=created, modify_index=modified)


def _content(entry: Entry) -> Entry:
    """The entry without its indexes."""
    return msgspec.structs.replace(entry, create_index=0, modify_index=0)


def _encoded(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _node(body: bytes) -> Node:
    return msgspec.json.decode(body, type=Node)


def _service(body: bytes) -> Service:
    return msgspec.json.decode(body, type=Service)


def _is_new(db: sqlite3.Connection, query: str, key: tuple[str, ...], body: bytes) -> bool:
    row = db.execute(query, key).fetchone()
    return row is None or row[0] != body


def _owner(service: Service) -> str:
    """Id of the instance that a service is, or is the sidecar of."""
    if service.kind == CONNECT_PROXY:
        return destination_id(service) or service.id
    return service.id


def _instance(db: sqlite3.Connection, node: Node, instance_id: str) -> Instance | None:
    rows = {
        service_id: _service(body)
        for service_id, body in db.execute(
            "SELECT id, body FROM services WHERE node = ? AND id IN (?, ?)",
            (node.node, instance_id, proxy_id(instance_id)),
        )
    }
    application = rows.get(instance_id)
    if application is None or application.kind:
        return None
    sidecar = rows.get(proxy_id(instance_id))
    if sidecar is not None and sidecar.kind != CONNECT_PROXY:
        sidecar = None
    return instance_of(node, application, sidecar)


def _instances(db: sqlite3.Connection) -> tuple[Instance, ...]:
    rows = db.execute("SELECT body, seen_from, seen_until FROM spans ORDER BY span")
    result = []
    for body, seen_from, seen_until in rows:
        seen = msgspec.json.decode(body, type=_Seen)
        result.append(
            msgspec.structs.replace(
                seen.instance, addresses=seen.held, seen_from=seen_from, seen_until=seen_until
            )
        )
    return tuple(result)
