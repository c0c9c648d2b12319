"""The ledger's database: its tables, and how old rows become coarser and are forgotten.

Three resolutions of the same sums: one row per edge and round for minutes, per minute for a day,
per hour for a month. Knows SQL and the bounds of the history; when to write, and what a fault
means, is the ledger's.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any

import msgspec

from tidegate.model import Direction, EdgeCount, EdgeKey, FlowClass, Workload

SCHEMA_VERSION = 1

ROUNDS_KEPT_S = 300.0
"""How long history is exact to the round in which it was recorded."""

WAL_LIMIT_BYTES = 16 << 20
MAX_WORKLOAD_JSON = 64 << 10
"""A workload whose annotations make it larger is remembered without them."""

EVICTED_EDGES = "ledger-edges-evicted"
"""Loss: edges that were forgotten before their time to make room; dated when they were last
seen."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the history, in rows. What exceeds one is made coarser, then forgotten, oldest
    first."""

    edges: int = 100_000
    rounds: int = 200_000
    minutes: int = 1_000_000
    hours: int = 1_000_000
    intervals: int = 1_000
    """Coverage intervals of one workload."""


DEFAULT_LIMITS = Limits()


class _Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One resolution of the history. `at` of a row is the moment of the round, or the start of
    the minute or hour."""

    number: int
    span_ms: int
    kept_s: float


_ROUNDS = _Tier(number=0, span_ms=0, kept_s=ROUNDS_KEPT_S)
_MINUTES = _Tier(number=1, span_ms=60_000, kept_s=25 * 3600.0)
"""Kept one hour longer than a day, so that a window of 24 h is exact to the minute from end to
end."""
_HOURS = _Tier(number=2, span_ms=3_600_000, kept_s=30 * 86_400.0)

_CLASSES = ", ".join(f"'{each}'" for each in FlowClass)
_DIRECTIONS = ", ".join(f"'{each}'" for each in Direction)

_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE edge (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    workload INTEGER NOT NULL,
    direction TEXT NOT NULL CHECK (direction IN ({_DIRECTIONS})),
    peer TEXT NOT NULL,
    port INTEGER NOT NULL,
    class TEXT NOT NULL CHECK (class IN ({_CLASSES})),
    first_seen REAL NOT NULL,
    last_seen REAL NOT NULL,
    counted INTEGER NOT NULL,
    connections INTEGER NOT NULL,
    bytes_to_server INTEGER NOT NULL,
    bytes_to_client INTEGER NOT NULL,
    UNIQUE (workload, direction, peer, port, class)
);
CREATE INDEX edge_last_seen ON edge (last_seen);
CREATE TABLE delta (
    tier INTEGER NOT NULL,
    at INTEGER NOT NULL,
    edge INTEGER NOT NULL,
    connections INTEGER NOT NULL,
    bytes_to_server INTEGER NOT NULL,
    bytes_to_client INTEGER NOT NULL,
    PRIMARY KEY (tier, at, edge)
) WITHOUT ROWID;
CREATE TABLE loss (
    at INTEGER NOT NULL, name TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (at, name)
) WITHOUT ROWID;
CREATE TABLE loss_counted (name TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE workload (key INTEGER PRIMARY KEY, service TEXT NOT NULL, json BLOB NOT NULL);
CREATE TABLE coverage (
    workload INTEGER NOT NULL, start REAL NOT NULL, "end" REAL NOT NULL, PRIMARY KEY (workload, start)
) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""

ADD_DELTA = """
INSERT INTO delta (tier, at, edge, connections, bytes_to_server, bytes_to_client)
VALUES (0, ?, ?, ?, ?, ?)
ON CONFLICT (tier, at, edge) DO UPDATE SET
    connections = connections + excluded.connections,
    bytes_to_server = bytes_to_server + excluded.bytes_to_server,
    bytes_to_client = bytes_to_client + excluded.bytes_to_client
"""

_FOLD = """
INSERT INTO delta (tier, at, edge, connections, bytes_to_server, bytes_to_client)
SELECT :coarse, at - at % :span, edge, sum(connections), sum(bytes_to_server), sum(bytes_to_client)
FROM delta WHERE tier = :fine AND at < :before GROUP BY 2, 3
ON CONFLICT (tier, at, edge) DO UPDATE SET
    connections = connections + excluded.connections,
    bytes_to_server = bytes_to_server + excluded.bytes_to_server,
    bytes_to_client = bytes_to_client + excluded.bytes_to_client
"""

WINDOW = """
WITH wanted AS (
    SELECT * FROM edge WHERE last_seen >= :since
    AND (:workloads IS NULL OR workload IN (SELECT value FROM json_each(:workloads)))
    AND (:direction IS NULL OR direction = :direction)
), sums AS (
    SELECT edge, max(at) AS at, sum(connections) AS connections,
        sum(bytes_to_server) AS bytes_to_server, sum(bytes_to_client) AS bytes_to_client
    FROM (
        SELECT * FROM delta WHERE tier = 0 AND at >= :since_ms AND at <= :until_ms
        UNION ALL SELECT * FROM delta WHERE tier = 1 AND at > :since_ms - 60000 AND at <= :until_ms
        UNION ALL SELECT * FROM delta WHERE tier = 2 AND at > :since_ms - 3600000 AND at <= :until_ms
    ) WHERE edge IN (SELECT id FROM wanted) GROUP BY edge
)
SELECT wanted.workload, wanted.direction, wanted.peer, wanted.port, wanted.class,
    wanted.first_seen, wanted.last_seen, coalesce(sums.at, 0) / 1000.0,
    coalesce(sums.connections, 0), coalesce(sums.bytes_to_server, 0), coalesce(sums.bytes_to_client, 0)
FROM wanted LEFT JOIN sums ON sums.edge = wanted.id
WHERE wanted.last_seen <= :until OR sums.edge IS NOT NULL
"""


def connect(database: str) -> sqlite3.Connection:
    """Opens a history, checks it, and begins it where it is new. ":memory:" is one that ends with its connection.

    Raises sqlite3.OperationalError where the file cannot be used, sqlite3.DatabaseError where it is damaged or not a
    history of this layout.
    """
    db = sqlite3.connect(database, timeout=1.0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("its check fails")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it has layout {version}, not {SCHEMA_VERSION}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def counted_edges(db: sqlite3.Connection) -> Iterator[tuple[int, EdgeKey, EdgeCount]]:
    """The edges of the stored generation, with the cumulative counts that were last written."""
    for row in db.execute(
        "SELECT workload, direction, peer, port, class, first_seen, last_seen, "
        "connections, bytes_to_server, bytes_to_client, id FROM edge WHERE counted"
    ):
        first, last, connections, to_server, to_client, number = row[5:]
        count = EdgeCount(
            connections=connections,
            bytes_to_server=to_server,
            bytes_to_client=to_client,
            first_seen=first,
            last_seen=last,
        )
        yield number, edge_key(row[:5]), count


def edge_id(db: sqlite3.Connection, key: EdgeKey, first_seen: float, last_seen: float) -> int:
    """The row of an edge that the kernel counts, made where there is none."""
    row = db.execute(
        "INSERT INTO edge (workload, direction, peer, port, class, first_seen, last_seen, counted, "
        "connections, bytes_to_server, bytes_to_client) VALUES (?, ?, ?, ?, ?, ?, ?, 1, 0, 0, 0) "
        "ON CONFLICT (workload, direction, peer, port, class) DO UPDATE SET counted = 1 RETURNING id",
        (
            signed(key.workload),
            key.direction,
            key.peer,
            key.port,
            key.flow_class,
            first_seen,
            last_seen,
        ),
    ).fetchone()
    return int(row[0])


def edge_key(row: tuple[Any, ...]) -> EdgeKey:
    """From the columns workload, direction, peer, port and class."""
    workload, direction, peer, port, flow_class = row
    return EdgeKey(
        workload=workload % (1 << 64),
        direction=Direction(direction),
        peer=peer,
        port=port,
        flow_class=FlowClass(flow_class),
    )


def condense(db: sqlite3.Connection, now: float, limits: Limits) -> int:
    """Makes old and excess rows coarser, forgets what is older than the history reaches; returns
    how many edges had to be forgotten before their time.
    """
    _fold(db, _ROUNDS, _MINUTES, now, limits.rounds)
    _fold(db, _MINUTES, _HOURS, now, limits.minutes)
    oldest = now - _HOURS.kept_s
    before = max(ms(oldest), _excess(db, _HOURS, limits.hours))
    db.execute("DELETE FROM delta WHERE tier = ? AND at < ?", (_HOURS.number, before))
    db.execute("DELETE FROM edge WHERE NOT counted AND last_seen < ?", (oldest,))
    db.execute("DELETE FROM loss WHERE at < ?", (ms(oldest),))
    db.execute('DELETE FROM coverage WHERE "end" < ?', (oldest,))
    db.execute("DELETE FROM workload WHERE key NOT IN (SELECT workload FROM coverage)")
    return _evict_edges(db, limits.edges)


def _fold(db: sqlite3.Connection, fine: _Tier, coarse: _Tier, now: float, limit: int) -> None:
    """Moves rows that are too old, or too many, to the next resolution."""
    names = {
        "fine": fine.number,
        "coarse": coarse.number,
        "span": coarse.span_ms,
        "before": max(ms(now - fine.kept_s), _excess(db, fine, limit)),
    }
    db.execute(_FOLD, names)
    db.execute("DELETE FROM delta WHERE tier = :fine AND at < :before", names)


def _evict_edges(db: sqlite3.Connection, limit: int) -> int:
    """Forgets edges over the limit: of those that the kernel no longer counts, the least recently
    seen.
    """
    excess = db.execute("SELECT count(*) FROM edge").fetchone()[0] - limit
    if excess <= 0:
        return 0
    evicted = db.execute(
        "SELECT id, last_seen FROM edge WHERE NOT counted ORDER BY last_seen LIMIT ?", (excess,)
    ).fetchall()
    db.executemany("DELETE FROM edge WHERE id = ?", [(row[0],) for row in evicted])
    db.executemany(
        "INSERT INTO loss VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1",
        [(ms(row[1]), EVICTED_EDGES) for row in evicted],
    )
    return len(evicted)


def _excess(db: sqlite3.Connection, tier: _Tier, limit: int) -> int:
    """The moment before which rows must go so that half of `limit` remain, 0 when there are not too
    many.
    """
    rows = db.execute("SELECT count(*) FROM delta WHERE tier = ?", (tier.number,)).fetchone()[0]
    if rows <= limit:
        return 0
    row = db.execute(
        "SELECT at FROM delta WHERE tier = ? ORDER BY at LIMIT 1 OFFSET ?",
        (tier.number, rows - limit // 2),
    ).fetchone()
    return int(row[0])


def workload_json(workload: Workload) -> bytes:
    """A workload as it is remembered after it has gone."""
    encoded = msgspec.json.encode(workload)
    if len(encoded) > MAX_WORKLOAD_JSON:
        return msgspec.json.encode(
            msgspec.structs.replace(workload, annotations={}, namespace_annotations={})
        )
    return encoded


def signed(key: int) -> int:
    """SQLite's integers are signed: the same 64 bits."""
    return key - (1 << 64) if key >= 1 << 63 else key


def ms(seconds: float) -> int:
    """Seconds since the epoch as the milliseconds that rows are dated with."""
    return int(seconds * 1000)
