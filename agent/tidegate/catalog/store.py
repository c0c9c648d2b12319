"""The embedded store: config entries and the catalog in one SQLite file, with one monotonic index.

Every change is one transaction with one index, on disk before it is acknowledged. Compare-and-set and the
permissive gate are decided inside the transaction. Addresses are reused, so the catalog keeps spans: which
instance had which addresses from when until when, bounded in number and age. Thread-safe, blocking. Knows
nothing of HTTP.

On disk means past a power cut: the log is written ahead (journal_mode=WAL) and synchronous is FULL, so that each commit
waits until the log is on the medium. With NORMAL, SQLite's usual choice for WAL, only checkpoints wait: a process
that is killed loses nothing, but a machine that loses power loses the last commits (SQLite, PRAGMA synchronous).
"""

import contextlib
import enum
import fcntl
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tidegate.catalog.history import DEPARTED_KEPT, DEPARTED_KEPT_S
from tidegate.catalog.registration import (
    CONNECT_PROXY,
    Node,
    Service,
    destination_id,
    instances_of,
    is_by_agent,
)
from tidegate.errors import TidegateError
from tidegate.intent.entries import (
    MESH_NAME,
    Entry,
    EntryKey,
    Kind,
    Mesh,
    check_write,
    from_consul,
    to_consul,
)
from tidegate.model import DEFAULT_TENANT, Instance

SCHEMA_VERSION = 2

LOCK_NAME = "server.lock"
"""File beside the store that whoever uses the store alone has locked."""

FIRST_INDEX = 1
"""Index of an empty store: Consul's clients take 0 for "do not wait"."""

_BUSY_TIMEOUT_S = 5.0

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topics (topic TEXT PRIMARY KEY, modified INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    kind TEXT NOT NULL, name TEXT NOT NULL, namespace TEXT NOT NULL, part TEXT NOT NULL,
    body BLOB NOT NULL, created INTEGER NOT NULL, modified INTEGER NOT NULL,
    PRIMARY KEY (kind, name, namespace, part)
) WITHOUT ROWID;
CREATE TABLE nodes (
    part TEXT NOT NULL, node TEXT NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL, modified INTEGER NOT NULL, PRIMARY KEY (part, node)
) WITHOUT ROWID;
CREATE TABLE services (
    part TEXT NOT NULL, node TEXT NOT NULL, namespace TEXT NOT NULL, id TEXT NOT NULL,
    owner TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
    created INTEGER NOT NULL, modified INTEGER NOT NULL,
    PRIMARY KEY (part, node, namespace, id), FOREIGN KEY (part, node) REFERENCES nodes (part, node)
) WITHOUT ROWID;
CREATE INDEX services_by_name ON services (name);
CREATE INDEX services_by_owner ON services (part, node, namespace, owner);
CREATE TABLE spans (
    span INTEGER PRIMARY KEY, part TEXT NOT NULL, node TEXT NOT NULL, namespace TEXT NOT NULL,
    id TEXT NOT NULL, body BLOB NOT NULL, seen_from REAL NOT NULL, seen_until REAL NOT NULL
);
CREATE INDEX spans_by_instance ON spans (part, node, namespace, id) WHERE seen_until = 0;
CREATE INDEX spans_by_end ON spans (seen_until) WHERE seen_until > 0;
CREATE TABLE holdings (
    address TEXT NOT NULL, span INTEGER NOT NULL, PRIMARY KEY (address, span)
) WITHOUT ROWID;
"""
"""`part` is the admin partition, `owner` the id of the instance that a service belongs to. `holdings` has the addresses
of the open spans only."""

_FROM_FORMAT_1 = """
DROP INDEX services_by_name;
DROP INDEX spans_by_instance;
DROP INDEX spans_by_end;
ALTER TABLE entries RENAME TO entries_1;
ALTER TABLE services RENAME TO services_1;
ALTER TABLE nodes RENAME TO nodes_1;
ALTER TABLE spans RENAME TO spans_1;
ALTER TABLE holdings RENAME TO holdings_1;
ALTER TABLE meta RENAME TO meta_1;
ALTER TABLE topics RENAME TO topics_1;
{schema}
INSERT INTO meta SELECT key, value FROM meta_1;
INSERT INTO topics SELECT topic, modified FROM topics_1;
INSERT INTO entries SELECT kind, name, 'default', 'default', body, created, modified FROM entries_1;
INSERT INTO nodes SELECT 'default', node, body, created, modified FROM nodes_1;
INSERT INTO services SELECT 'default', node, 'default', id,
    CASE WHEN json_extract(body, '$.Kind') = 'connect-proxy'
    THEN ifnull(json_extract(body, '$.Proxy.DestinationServiceID'), id) ELSE id END,
    name, body, created, modified FROM services_1;
INSERT INTO spans SELECT span, 'default', node, 'default', id, body, seen_from, seen_until FROM spans_1;
INSERT INTO holdings SELECT address, span FROM holdings_1;
DROP TABLE services_1;
DROP TABLE nodes_1;
DROP TABLE entries_1;
DROP TABLE spans_1;
DROP TABLE holdings_1;
DROP TABLE meta_1;
DROP TABLE topics_1
"""
"""Format 1 knew neither namespaces nor partitions."""


class StoreError(TidegateError):
    """The store's file cannot be read or written."""


@contextlib.contextmanager
def held_alone(store: Path, who: str) -> Iterator[None]:
    """Nobody else who asks by this function uses the store at that path meanwhile; `who` is told to whoever tries.

    Raises StoreError. The kernel lets go of the lock with the process, however that ends (flock(2)).
    """
    path = store.with_name(LOCK_NAME)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
            raise StoreError(f"{holder or 'another process'} uses the store {store}") from error
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        # A full disk has no room for who it is; the lock holds all the same.
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{who} (process {os.getpid()})\n".encode(), 0)
        yield
    finally:
        os.close(lock)


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
        """All entries, or those of a kind, sorted by kind, name, namespace and partition."""
        with self._reading() as db:
            return _entries(db, kind)

    def entry(self, key: EntryKey) -> Entry | None:
        """One entry, None when there is none of that key."""
        with self._reading() as db:
            return _entry(db, key)

    def write_entry(self, entry: Entry, cas: int | None = None) -> bool:
        """Creates or replaces an entry. False when `cas` is not its ModifyIndex (0: it must be new).

        Raises InputError when the permissive gate is closed for it. A write that changes nothing
        succeeds and leaves the index alone. Indexes in `entry` are not looked at.
        """
        key = entry.key
        with self._writing() as db:
            existing = _entry(db, key)
            if cas is not None and cas != (existing.modify_index if existing else 0):
                return False
            mesh = _entry(db, EntryKey(Kind.MESH, MESH_NAME, DEFAULT_TENANT, key.partition))
            check_write(existing, entry, mesh if isinstance(mesh, Mesh) else None)
            if existing is not None and _content(existing) == _content(entry):
                return True
            index = _advance(db, Topic.CONFIG)
            db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    msgspec.json.encode(to_consul(_content(entry))),
                    existing.create_index if existing else index,
                    index,
                ),
            )
        return True

    def delete_entry(self, key: EntryKey, cas: int | None = None) -> bool:
        """Deletes an entry; one that is missing is no error. False when `cas` does not match."""
        with self._writing() as db:
            existing = _entry(db, key)
            if cas is not None and (existing is None or existing.modify_index != cas):
                return False
            if existing is not None:
                _advance(db, Topic.CONFIG)
                db.execute(
                    "DELETE FROM entries WHERE kind = ? AND name = ? AND namespace = ? AND part = ?",
                    key,
                )
        return True

    # Catalog.

    def nodes(self) -> tuple[NodeRecord, ...]:
        """All nodes, sorted by name and partition."""
        with self._reading() as db:
            rows = db.execute("SELECT body, created, modified FROM nodes ORDER BY node, part")
            return tuple(
                NodeRecord(node=_node(body), create_index=created, modify_index=modified)
                for body, created, modified in rows
            )

    def services(self, name: str | None = None) -> tuple[Record, ...]:
        """All services on all nodes, or those of one name, sorted by name, node and id."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT nodes.body, services.body, services.created, services.modified"
                " FROM services JOIN nodes USING (part, node) WHERE ?1 IS NULL OR services.name = ?1"
                " ORDER BY services.name, services.node, services.id, services.namespace",
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
            nodes = db.execute("SELECT body FROM nodes ORDER BY node, part")
            return Contents(
                index=_index(db, None),
                entries=_entries(db, None),
                nodes=tuple(_node(body) for (body,) in nodes),
                instances=_instances(db),
            )

    def register(self, node: Node, service: Service | None = None) -> None:
        """Creates or replaces a node, and a service on it, in its partition. Changes nothing when nothing changed."""
        with self._writing() as db:
            place = (node.partition, node.node)
            node_changed = _is_new(
                db, "SELECT body FROM nodes WHERE part = ? AND node = ?", place, _encoded(node)
            )
            service_changed = service is not None and _is_new(
                db,
                "SELECT body FROM services WHERE part = ? AND node = ? AND namespace = ? AND id = ?",
                (*place, service.namespace, service.id),
                _encoded(service),
            )
            if not node_changed and not service_changed:
                return
            index = _advance(db, Topic.CATALOG)
            if node_changed:
                db.execute(
                    "INSERT INTO nodes VALUES (?1, ?2, ?3, ?4, ?4) ON CONFLICT (part, node)"
                    " DO UPDATE SET body = excluded.body, modified = excluded.modified",
                    (*place, _encoded(node), index),
                )
            if service is not None and service_changed:
                self._put(db, node, service, index)

    def _put(self, db: sqlite3.Connection, node: Node, service: Service, index: int) -> None:
        place = (node.partition, node.node, service.namespace)
        before = db.execute(
            "SELECT owner FROM services WHERE part = ? AND node = ? AND namespace = ? AND id = ?",
            (*place, service.id),
        ).fetchone()
        db.execute(
            "INSERT INTO services VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)"
            " ON CONFLICT (part, node, namespace, id) DO UPDATE SET owner = excluded.owner,"
            " name = excluded.name, body = excluded.body, modified = excluded.modified",
            (*place, service.id, _owner(service), service.service, _encoded(service), index),
        )
        for owner in dict.fromkeys([_owner(service), *(before or ())]):
            self._follow(db, node, service.namespace, owner)

    def deregister(
        self,
        node: str,
        service_id: str | None = None,
        *,
        namespace: str = DEFAULT_TENANT,
        partition: str = DEFAULT_TENANT,
    ) -> None:
        """Removes a service, or a node with the services of all its namespaces. What is missing is no error."""
        with self._writing() as db:
            row = db.execute(
                "SELECT body FROM nodes WHERE part = ? AND node = ?", (partition, node)
            ).fetchone()
            if row is None:
                return
            gone = db.execute(
                "SELECT namespace, id, owner FROM services WHERE part = ?1 AND node = ?2"
                " AND (?3 IS NULL OR (id = ?3 AND namespace = ?4))",
                (partition, node, service_id, namespace),
            ).fetchall()
            if service_id is not None and not gone:
                return
            _advance(db, Topic.CATALOG)
            for space, one, _ in gone:
                db.execute(
                    "DELETE FROM services WHERE part = ? AND node = ? AND namespace = ? AND id = ?",
                    (partition, node, space, one),
                )
            for space, owner in dict.fromkeys((space, owner) for space, _, owner in gone):
                self._follow(db, _node(row[0]), space, owner)
            if service_id is None:
                db.execute("DELETE FROM nodes WHERE part = ? AND node = ?", (partition, node))

    # Spans.

    def _follow(self, db: sqlite3.Connection, node: Node, namespace: str, instance_id: str) -> None:
        """Brings the open span of an instance in line with its services."""
        now = self._clock()
        place = (node.partition, node.node, namespace, instance_id)
        open_span = db.execute(
            "SELECT span, body FROM spans WHERE part = ? AND node = ? AND namespace = ? AND id = ?"
            " AND seen_until = 0",
            place,
        ).fetchone()
        found = _found(db, node, namespace, instance_id)
        if found is None:
            if open_span is not None:
                self._end(db, open_span[0], now)
            return
        if open_span is not None:
            before = msgspec.json.decode(open_span[1], type=_Seen)
            if before.claimed == found.claimed:
                seen = msgspec.structs.replace(found, held=before.held)
                db.execute(
                    "UPDATE spans SET body = ? WHERE span = ?", (_encoded(seen), open_span[0])
                )
                return
            self._end(db, open_span[0], now)
            since = now
        else:
            since = min(found.instance.seen_from or now, now)
        for address in found.claimed:
            self._take_away(db, address, found, since, now)
        self._begin(db, place, found, since)

    def _take_away(
        self, db: sqlite3.Connection, address: str, taker: "_Seen", since: float, now: float
    ) -> None:
        """Ends at `since` what others held `address` for; their other addresses they keep."""
        holders = db.execute(
            "SELECT part, node, namespace, id, span, body, seen_from FROM spans"
            " JOIN holdings USING (span) WHERE holdings.address = ? AND seen_until = 0",
            (address,),
        ).fetchall()
        for *place, span, body, seen_from in holders:
            seen = msgspec.json.decode(body, type=_Seen)
            if seen.is_same_workload(taker):
                continue
            end = since if since > seen_from else now
            self._end(db, span, end)
            rest = tuple(held for held in seen.held if held != address)
            self._begin(db, tuple(place), msgspec.structs.replace(seen, held=rest), end)

    def _begin(
        self, db: sqlite3.Connection, place: tuple[str, ...], seen: "_Seen", since: float
    ) -> None:
        span = db.execute(
            "INSERT INTO spans (part, node, namespace, id, body, seen_from, seen_until)"
            " VALUES (?, ?, ?, ?, ?, ?, 0)",
            (*place, _encoded(seen), since),
        ).lastrowid
        db.executemany("INSERT INTO holdings VALUES (?, ?)", [(text, span) for text in seen.held])

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
        # Whoever else opens the file waits meanwhile, and finds it made.
        with self._writing() as db:
            version = _one(db, "PRAGMA user_version")
            if version == 0 and _one(db, "SELECT count(*) FROM sqlite_master") == 0:
                _run(db, _SCHEMA)
                db.execute("INSERT INTO meta VALUES ('id', ?)", (secrets.token_hex(8),))
                db.execute("INSERT INTO meta VALUES ('index', ?)", (FIRST_INDEX,))
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version == 1:
                _run(db, _FROM_FORMAT_1.format(schema=_SCHEMA))
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise StoreError(
                    f"{self._path}: the store has format {version}, made by another version of"
                    f" tidegate; expected format {SCHEMA_VERSION}"
                )
        self._db.execute("PRAGMA foreign_keys = ON")
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
    by_agent: bool = True

    def is_same_workload(self, other: "_Seen") -> bool:
        """Whether an agent and a person have registered the same: neither takes the address from the other."""
        return (
            self.by_agent != other.by_agent
            and self.instance.node == other.instance.node
            and self.instance.service == other.instance.service
        )


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
    except sqlite3.Error:
        db.close()
        raise
    return db


def _run(db: sqlite3.Connection, statements: str) -> None:
    """Runs statements inside the transaction that is open; executescript would end it."""
    for statement in statements.split(";"):
        db.execute(statement)


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
        " ORDER BY kind, name, namespace, part",
        (kind,),
    )
    return tuple(_read_entry(*row) for row in rows)


def _entry(db: sqlite3.Connection, key: EntryKey) -> Entry | None:
    row = db.execute(
        "SELECT body, created, modified FROM entries"
        " WHERE kind = ? AND name = ? AND namespace = ? AND part = ?",
        key,
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


def _found(db: sqlite3.Connection, node: Node, namespace: str, instance_id: str) -> _Seen | None:
    """What the services say of an instance, None when they are gone."""
    rows = db.execute(
        "SELECT body FROM services WHERE part = ? AND node = ? AND namespace = ? AND owner = ?",
        (node.partition, node.node, namespace, instance_id),
    )
    services = tuple(_service(body) for (body,) in rows)
    for instance in instances_of(node, services):
        return _Seen(
            instance=instance,
            claimed=instance.addresses,
            held=instance.addresses,
            by_agent=any(is_by_agent(one) for one in services),
        )
    return None


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
