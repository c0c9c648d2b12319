"""The ledger's database: its tables, and how old rows become coarser and are forgotten.

Three resolutions of the same sums. Each round is one packed blob, kept for minutes; what the rounds of a minute add
up to is one row per edge as soon as the minute is over, kept for a day; an hour likewise, for a month. So rounds are
details of what minutes have, except those of the present minute, which is not in rows yet. Knows SQL and the bounds
of the history; when to write, and what a fault means, is the ledger's.
"""

import array
import sqlite3
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from tidegate.model import Direction, EdgeKey, FlowClass, Workload
from tidegate.observe.counting import EdgeState

SCHEMA_VERSION = 2

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
    """Entries in the packed rounds, one for each edge that changed in it."""
    minutes: int = 1_000_000
    hours: int = 1_000_000
    intervals: int = 1_000
    """Coverage intervals of one workload."""


DEFAULT_LIMITS = Limits()

FOLDED_AT_ONCE = 10_000
"""Rows that become coarser in one go by their age."""

_ALL = 1 << 62


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """One resolution of the rows. `at` of a row is the start of the minute or hour, in milliseconds."""

    number: int
    span_ms: int
    kept_s: float


MINUTES = Tier(number=1, span_ms=60_000, kept_s=25 * 3600.0)
"""Kept one hour longer than a day, so that a window of 24 h is exact to the minute from end to
end."""
HOURS = Tier(number=2, span_ms=3_600_000, kept_s=30 * 86_400.0)

_EXACT_FROM = "exact_from"
"""State: the moment, in milliseconds, since when every round is kept."""
_GENERATION = "generation"
"""State: the identity of the map whose counters are stored."""
_COUNTED = "counted"
"""State: the entries of all its counters, up to and with the round that is the next."""
_COUNTED_WITH = "counted_with"
"""State: the number of the round up to which rows of minutes have everything."""

_CLASSES = ", ".join(f"'{each}'" for each in FlowClass)
_DIRECTIONS = ", ".join(f"'{each}'" for each in Direction)

_ROUND_TABLES = """
CREATE TABLE round (number INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, entries BLOB NOT NULL);
CREATE INDEX round_at ON round (at);
CREATE TABLE state (name TEXT PRIMARY KEY, value NOT NULL);
"""

_SCHEMA = f"""
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
    hints INTEGER NOT NULL DEFAULT 0,
    UNIQUE (workload, direction, peer, port, class)
);
CREATE INDEX edge_left ON edge (last_seen) WHERE NOT counted;
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
{_ROUND_TABLES}
PRAGMA user_version = {SCHEMA_VERSION};
"""
"""`last_seen` of an edge that is counted is older than that of its latest entry in a round."""

_FROM_LAYOUT_1 = f"""
INSERT INTO delta (tier, at, edge, connections, bytes_to_server, bytes_to_client)
SELECT 1, at - at % 60000, edge, sum(connections), sum(bytes_to_server), sum(bytes_to_client)
FROM delta WHERE tier = 0 GROUP BY 2, 3
ON CONFLICT (tier, at, edge) DO UPDATE SET
    connections = connections + excluded.connections,
    bytes_to_server = bytes_to_server + excluded.bytes_to_server,
    bytes_to_client = bytes_to_client + excluded.bytes_to_client;
DELETE FROM delta WHERE tier = 0;
DELETE FROM loss_counted;
DROP TABLE meta;
ALTER TABLE edge DROP COLUMN connections;
ALTER TABLE edge DROP COLUMN bytes_to_server;
ALTER TABLE edge DROP COLUMN bytes_to_client;
ALTER TABLE edge ADD COLUMN hints INTEGER NOT NULL DEFAULT 0;
UPDATE edge SET counted = 0;
DROP INDEX edge_last_seen;
CREATE INDEX edge_left ON edge (last_seen) WHERE NOT counted;
{_ROUND_TABLES}
INSERT INTO state VALUES ('{_EXACT_FROM}', strftime('%s', 'now') * 1000);
PRAGMA user_version = {SCHEMA_VERSION};
"""  # noqa: S608 - constants
"""Layout 1 had a row for each edge and round, and was kept with a kernel map that nobody counts from any more."""

_ADD_MINUTE = """
INSERT INTO delta (tier, at, edge, connections, bytes_to_server, bytes_to_client)
VALUES (1, ?, ?, ?, ?, ?)
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

SUMS = """
SELECT edge, max(at), sum(connections), sum(bytes_to_server), sum(bytes_to_client)
FROM (
    SELECT * FROM delta WHERE tier = 1 AND at >= :minutes_from AND at <= :rows_until
    UNION ALL SELECT * FROM delta WHERE tier = 2 AND at >= :hours_from AND at <= :rows_until
) WHERE edge IN (
    SELECT id FROM edge WHERE (counted OR last_seen >= :since)
    AND (:workloads IS NULL OR workload IN (SELECT value FROM json_each(:workloads)))
    AND (:direction IS NULL OR direction = :direction)
) GROUP BY edge
"""

LEFT = """
SELECT id, workload, direction, peer, port, class, first_seen, last_seen, hints
FROM edge WHERE NOT counted AND last_seen >= :since
AND (:workloads IS NULL OR workload IN (SELECT value FROM json_each(:workloads)))
AND (:direction IS NULL OR direction = :direction)
"""

STEPS = """
SELECT edge, at, connections, bytes_to_server, bytes_to_client
FROM (
    SELECT * FROM delta WHERE tier = 1 AND at >= :minutes_from AND at <= :rows_until
    UNION ALL SELECT * FROM delta WHERE tier = 2 AND at >= :hours_from AND at <= :rows_until
) WHERE edge IN (SELECT value FROM json_each(:edges))
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
        elif version == 1:
            db.executescript(f"BEGIN IMMEDIATE; {_FROM_LAYOUT_1} COMMIT;")
        elif version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"it has layout {version}, not {SCHEMA_VERSION}")
    except sqlite3.Error:
        db.close()
        raise
    return db


Entry = tuple[int, int, int, int, int, int, int, float]
"""What a round, or the sum of all before it, has of one counter: slot, generation, whether it lives, number of the
edge's row, connections, bytes to the server, bytes to the client; when the edge was last seen."""

_NUMBERS = 7
_ENTRY_BYTES = 8 * (_NUMBERS + 1)
_CHECK_BYTES = 4


def pack(numbers: list[int], times: list[float]) -> bytes:
    """Entries as they are stored: first the seven numbers of each, one entry after the other, then all times.

    Behind them a checksum: SQLite has none, and sums that came out of a damaged page would look like sums.
    """
    packed = array.array("q", numbers).tobytes() + array.array("d", times).tobytes()
    return packed + zlib.crc32(packed).to_bytes(_CHECK_BYTES, "little")


def unpack(stored: bytes) -> Iterator[Entry]:
    """The entries of a blob. Raises sqlite3.DatabaseError where it is not as it was stored."""
    numbers, times = _columns(stored)
    columns = (numbers[column::_NUMBERS] for column in range(_NUMBERS))
    return zip(*columns, times, strict=True)


def added_by(stored: bytes, wanted: Container[int]) -> Iterator[tuple[int, int, int, int]]:
    """Of the entries of wanted edges: number of the row, connections and bytes each way."""
    numbers, _ = _columns(stored)
    return _added_by(numbers, wanted)


def _added_by(
    numbers: "array.array[int]", wanted: Container[int]
) -> Iterator[tuple[int, int, int, int]]:
    for entry, number in enumerate(numbers[3::_NUMBERS]):
        if number in wanted:
            at = _NUMBERS * entry
            yield number, numbers[at + 4], numbers[at + 5], numbers[at + 6]


def _columns(stored: bytes) -> tuple["array.array[int]", "array.array[float]"]:
    packed, check = stored[:-_CHECK_BYTES], stored[-_CHECK_BYTES:]
    count, rest = divmod(len(packed), _ENTRY_BYTES)
    if rest or zlib.crc32(packed).to_bytes(_CHECK_BYTES, "little") != check:
        raise sqlite3.DatabaseError("the checksum of a round is wrong")
    numbers, times = array.array("q"), array.array("d")
    numbers.frombytes(packed[: 8 * _NUMBERS * count])
    times.frombytes(packed[8 * _NUMBERS * count :])
    return numbers, times


def entries_in(stored_bytes: int) -> int:
    """How many entries a blob of that size has."""
    return (stored_bytes - _CHECK_BYTES) // _ENTRY_BYTES


def counted_edges(db: sqlite3.Connection) -> Iterator[EdgeState]:
    """The edges that are counted, by their rows."""
    for row in db.execute(
        "SELECT id, workload, direction, peer, port, class, first_seen, last_seen, hints FROM edge WHERE counted"
    ):
        edge = edge_of(row)
        edge.counted = True
        yield edge


def edge_of(row: Sequence[Any]) -> EdgeState:
    """From the columns id, workload, direction, peer, port, class, first_seen, last_seen, hints."""
    return EdgeState(edge_key(row[1:6]), row[6], row[7], row[8], row[0])


def edge_numbered(db: sqlite3.Connection, number: int) -> EdgeState | None:
    """An edge by its row, None where that is gone."""
    row = db.execute(
        "SELECT id, workload, direction, peer, port, class, first_seen, last_seen, hints, counted "
        "FROM edge WHERE id = ?",
        (number,),
    ).fetchone()
    if row is None:
        return None
    edge = edge_of(row)
    edge.counted = bool(row[-1])
    return edge


def store_edges(db: sqlite3.Connection, edges: Iterable[EdgeState]) -> list[EdgeState]:
    """Makes the rows of edges say what the edges say.

    Returns, for edges that did not know their row, what is to be known of it: its number, and what it said before.
    """
    known: list[EdgeState] = []
    new: list[EdgeState] = []
    for edge in edges:
        (known if edge.number else new).append(edge)
    found = _find_edges(db, new)
    merged = [edge_of(row) for row in found.values()]
    for edge in new:
        if edge.key in found:
            known.append(msgspec.structs.replace(edge, number=found[edge.key][0]))
    db.executemany(
        "UPDATE edge SET counted = ?, hints = hints | ?, first_seen = min(first_seen, ?), "
        "last_seen = max(last_seen, ?) WHERE id = ?",
        [
            (edge.counters > 0, edge.hints, edge.first_seen, edge.last_seen, edge.number)
            for edge in known
        ],
    )
    return merged + _add_edges(db, [edge for edge in new if edge.key not in found])


def _find_edges(db: sqlite3.Connection, edges: list[EdgeState]) -> dict[EdgeKey, tuple[Any, ...]]:
    if not edges or db.execute("SELECT id FROM edge LIMIT 1").fetchone() is None:
        return {}
    found = {}
    for edge in edges:
        row = db.execute(
            "SELECT id, workload, direction, peer, port, class, first_seen, last_seen, hints FROM edge "
            "WHERE workload = ? AND direction = ? AND peer = ? AND port = ? AND class = ?",
            _columns_of(edge.key),
        ).fetchone()
        if row is not None:
            found[edge.key] = row
    return found


def _add_edges(db: sqlite3.Connection, edges: list[EdgeState]) -> list[EdgeState]:
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'edge'").fetchone()
    added = [
        msgspec.structs.replace(edge, number=number)
        for number, edge in enumerate(edges, start=row[0] + 1 if row else 1)
    ]
    db.executemany(
        "INSERT INTO edge (workload, direction, peer, port, class, id, first_seen, last_seen, counted, hints) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *_columns_of(edge.key),
                edge.number,
                edge.first_seen,
                edge.last_seen,
                edge.counters > 0,
                edge.hints,
            )
            for edge in added
        ],
    )
    return added


def _columns_of(key: EdgeKey) -> tuple[int, str, str, int, str]:
    """Plain texts: sqlite3 takes long to see what an enum's member is."""
    return (
        signed(key.workload),
        key.direction.value,
        key.peer,
        key.port,
        key.flow_class.value,
    )


def add_minute(db: sqlite3.Connection, minute: int, edges: Iterable[EdgeState]) -> int:
    """Adds what edges got since the last time to the rows of a minute (milliseconds); returns how many there were."""
    rows = sorted(
        (minute, edge.number, edge.connections, edge.to_server, edge.to_client) for edge in edges
    )
    db.executemany(_ADD_MINUTE, rows)
    return len(rows)


def edge_key(row: Sequence[Any]) -> EdgeKey:
    """From the columns workload, direction, peer, port and class."""
    workload, direction, peer, port, flow_class = row
    return EdgeKey(
        workload=workload % (1 << 64),
        direction=Direction(direction),
        peer=peer,
        port=port,
        flow_class=FlowClass(flow_class),
    )


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows of minutes were computed from."""

    generation: str = ""
    """Identity of the map."""
    round: int = 0
    """Number of the latest round that they have."""
    entries: tuple[Entry, ...] = ()
    """What counters had counted with it."""


def counted(db: sqlite3.Connection) -> Counted:
    """What was counted when the rows of minutes were written last."""
    state = dict(db.execute("SELECT name, value FROM state").fetchall())
    if not state.keys() >= {_GENERATION, _COUNTED_WITH, _COUNTED}:
        return Counted()
    return Counted(
        generation=state[_GENERATION],
        round=state[_COUNTED_WITH],
        entries=tuple(unpack(state[_COUNTED])),
    )


def store_counted(db: sqlite3.Connection, generation: str, entries: bytes) -> None:
    """What counters say with the latest round; all rounds are in rows."""
    row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'round'").fetchone()
    for name, value in (
        (_GENERATION, generation),
        (_COUNTED_WITH, row[0] if row else 0),
        (_COUNTED, entries),
    ):
        db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))


def exact_from(db: sqlite3.Connection) -> int:
    """The moment, in milliseconds, since when every round is kept."""
    row = db.execute("SELECT value FROM state WHERE name = ?", (_EXACT_FROM,)).fetchone()
    return int(row[0]) if row else 0


def rounds_after(db: sqlite3.Connection, number: int) -> Iterator[tuple[int, bytes]]:
    """Date (ms) and entries of the rounds after that one, in the order in which they were recorded."""
    yield from db.execute(
        "SELECT at, entries FROM round WHERE number > ? ORDER BY number", (number,)
    )


def latest_round(db: sqlite3.Connection) -> int:
    """The latest date of a round, 0 where there is none."""
    return int(db.execute("SELECT coalesce(max(at), 0) FROM round").fetchone()[0])


def count_entries(db: sqlite3.Connection) -> int:
    """How many entries all rounds have together."""
    rows = db.execute("SELECT length(entries) FROM round").fetchall()
    return sum(entries_in(row[0]) for row in rows)


def excess_rounds(db: sqlite3.Connection, limit: int) -> int:
    """The moment before which rounds must go so that their entries are within the limit."""
    kept = 0
    for at, size in db.execute("SELECT at, length(entries) FROM round ORDER BY at DESC"):
        kept += entries_in(size)
        if kept > limit:
            return int(at) + 1
    return 0


def drop_rounds(db: sqlite3.Connection, before: int) -> None:
    """Forgets the details of rounds dated before that, of which minutes have the sums."""
    dropped = db.execute(
        "DELETE FROM round WHERE at < ? AND number <= (SELECT value FROM state WHERE name = ?)",
        (before, _COUNTED_WITH),
    ).rowcount
    if dropped and before > exact_from(db):
        db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (_EXACT_FROM, before))


def coarsen(db: sqlite3.Connection, now: float, limits: Limits) -> int:
    """Makes old and excess minutes hours; returns the moment before which it did."""
    return _fold(db, MINUTES, HOURS, now, limits.minutes)


def forget(db: sqlite3.Connection, now: float, limits: Limits) -> tuple[set[int], int]:
    """Forgets what is older than the history reaches, and excess; returns which edges went, and how many of
    them before their time.
    """
    oldest = now - HOURS.kept_s
    before = max(ms(oldest), _excess(db, HOURS, limits.hours))
    db.execute("DELETE FROM delta WHERE tier = ? AND at < ?", (HOURS.number, before))
    aged = db.execute(
        "DELETE FROM edge WHERE NOT counted AND last_seen < ? RETURNING id", (oldest,)
    ).fetchall()
    db.execute("DELETE FROM loss WHERE at < ?", (ms(oldest),))
    db.execute('DELETE FROM coverage WHERE "end" < ?', (oldest,))
    db.execute("DELETE FROM workload WHERE key NOT IN (SELECT workload FROM coverage)")
    evicted = _evict_edges(db, limits.edges)
    return {row[0] for row in aged} | evicted, len(evicted)


def _fold(db: sqlite3.Connection, fine: Tier, coarse: Tier, now: float, limit: int) -> int:
    """Moves rows that are too old, or too many, to the next resolution: some at a time, so that no round waits
    long for it. Returns the moment before which rows were moved."""
    old = min(ms(now - fine.kept_s), _after(db, fine, FOLDED_AT_ONCE))
    names = {
        "fine": fine.number,
        "coarse": coarse.number,
        "span": coarse.span_ms,
        "before": max(old, _excess(db, fine, limit)),
    }
    db.execute(_FOLD, names)
    moved = db.execute("DELETE FROM delta WHERE tier = :fine AND at < :before", names).rowcount
    return int(names["before"]) if moved else 0


def _evict_edges(db: sqlite3.Connection, limit: int) -> set[int]:
    """Forgets edges over the limit: of those that the kernel no longer counts, the least recently
    seen. Returns their numbers.
    """
    excess = db.execute("SELECT count(*) FROM edge").fetchone()[0] - limit
    if excess <= 0:
        return set()
    evicted = db.execute(
        "SELECT id, last_seen FROM edge WHERE NOT counted ORDER BY last_seen LIMIT ?", (excess,)
    ).fetchall()
    db.executemany("DELETE FROM edge WHERE id = ?", [(row[0],) for row in evicted])
    db.executemany(
        "INSERT INTO loss VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1",
        [(ms(row[1]), EVICTED_EDGES) for row in evicted],
    )
    return {row[0] for row in evicted}


def _excess(db: sqlite3.Connection, tier: Tier, limit: int) -> int:
    """The moment before which rows must go so that `limit` remain, 0 when there are not too many."""
    rows = db.execute("SELECT count(*) FROM delta WHERE tier = ?", (tier.number,)).fetchone()[0]
    return _after(db, tier, rows - limit) if rows > limit else 0


def _after(db: sqlite3.Connection, tier: Tier, rows: int) -> int:
    """A moment before which a tier has that many rows or a few more: a minute or hour goes whole."""
    row = db.execute(
        "SELECT at FROM delta WHERE tier = ? ORDER BY at LIMIT 1 OFFSET ?", (tier.number, rows - 1)
    ).fetchone()
    return int(row[0]) + 1 if row else _ALL


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
