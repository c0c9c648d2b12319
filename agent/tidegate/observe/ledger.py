"""The history of who talked to whom: kernel counts in, evidence for any window out.

The kernel counts each edge since its map was made (a generation); every round stores what was added
since the last one, with the counts it was computed from, in one transaction, so that neither a
restart nor a takeover of the maps loses or repeats anything. Knows nothing of packets, names or
verdicts; tables and their bounds are in history.py. A full disk or a damaged file costs history,
never the agent, and is told by `problems`.
"""

import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tidegate.errors import TidegateError
from tidegate.model import Direction, Edge, EdgeCount, EdgeKey, Interval, Workload
from tidegate.observe import coverage, history
from tidegate.observe.history import DEFAULT_LIMITS, ROUNDS_KEPT_S, Limits, ms, signed
from tidegate.verdict.intervals import union

MAINTENANCE_S = 10.0
DAMAGED_FILES_KEPT = 3

REFUSED_EDGES = "ledger-edges-refused"
"""Loss: edges that found no room in the ledger, counted in every round in which they are
refused."""


class LedgerError(TidegateError):
    """The history cannot be read at the moment."""


class _Added(msgspec.Struct):
    """What was added to one edge since the last successful write."""

    connections: int
    bytes_to_server: int
    bytes_to_client: int
    first_seen: float
    last_seen: float


class _Staged(msgspec.Struct):
    """What waits to be written: normally one round, more while writing fails, then merged and so
    bounded.
    """

    added: dict[EdgeKey, _Added] = {}
    losses: dict[str, int] = {}
    covered: dict[int, tuple[Workload, Interval]] = {}


class Ledger:
    """One agent's history. Used by one caller at a time; any thread may be that caller."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._limits = limits
        self._staged = _Staged()
        self._damage: list[str] = []
        self._write_problem = ""
        self._limit_problem = ""
        self._maintained_at = 0.0
        self._generation = ""
        self._stored_generation = ""
        self._counts: dict[EdgeKey, EdgeCount] = {}
        self._ids: dict[EdgeKey, int] = {}
        self._losses: dict[str, int] = {}
        self._covered: dict[int, tuple[Workload, Interval]] = {}
        self._db = self._connect()

    @classmethod
    def open(cls, path: Path, limits: Limits = DEFAULT_LIMITS) -> "Ledger":
        """Opens or begins the history at `path` (file mode 0600); never fails.

        A damaged file is set aside beside the new one; where no file can be had, history is kept in
        memory. Both are told by `problems`.
        """
        return cls(path, limits)

    def close(self) -> None:
        """Ends the use of the file. Everything recorded is in it already."""
        self._db.close()

    def problems(self) -> tuple[str, ...]:
        """What costs history at present, one sentence each; empty when nothing does."""
        present = (*self._damage, self._write_problem, self._limit_problem)
        return tuple(problem for problem in present if problem)

    # Recording

    def extend(self, workload: Workload, attached_at: float, now: float) -> None:
        """Says that the observation of `workload` is in place at `now` and has counted since
        `attached_at`.

        `attached_at` is when both the attachment and the present map (generation) were there. Takes
        effect with the next `record`: coverage never claims time whose counts were not read.
        """
        known = self._staged.covered.get(workload.key) or self._covered.get(workload.key)
        last = known[1] if known else self._last_interval(workload.key)
        self._staged.covered[workload.key] = (workload, coverage.extend(last, attached_at, now))

    def record(
        self,
        now: float,
        generation: str,
        edges: Sequence[Edge],
        losses: Mapping[str, int],
    ) -> None:
        """Stores one round: counts and losses are cumulative since `generation` began.

        A generation is the identity of the kernel map; in a new one all counts start at 0. Counts
        may go down where a connection moved from one class to another. An edge that is absent has
        not changed.
        """
        self._stage(generation, edges, losses)
        try:
            with self._transaction() as db:
                ids = self._write(db, now)
        except sqlite3.OperationalError as failed:
            self._write_problem = (
                f"history cannot be written to {self._path}: {failed}; "
                "it is kept in memory and tried again"
            )
            return
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)
            return
        self._write_problem = ""
        self._ids.update(ids)
        self._stored_generation = generation
        self._covered.update(self._staged.covered)
        self._staged = _Staged()
        if not 0 <= now - self._maintained_at < MAINTENANCE_S:
            self._maintain(now)

    def forget(self, workload_key: int) -> None:
        """Says that the edges of a departed workload were taken out of the kernel map; their
        history stays.
        """
        for key in [key for key in self._counts if key.workload == workload_key]:
            del self._counts[key]
            self._ids.pop(key, None)
        self._covered.pop(workload_key, None)
        self._change(
            "UPDATE edge SET counted = 0, connections = 0, bytes_to_server = 0, bytes_to_client = 0 "
            "WHERE workload = ?",
            (signed(workload_key),),
        )

    # Asking

    def window(
        self,
        workload_keys: Collection[int] | None,
        direction: Direction | None,
        since: float,
        until: float,
    ) -> list[Edge]:
        """Edges that were in use in [since, until], with what was added to them in that time.

        None stands for every workload or direction. Counts are exact to one round for the last
        ROUNDS_KEPT_S, else to a minute or an hour, and then rather too high than too low. An edge
        that was in use without a new connection has connections 0. Raises LedgerError while the
        file cannot be read.
        """
        keys = None if workload_keys is None else [signed(key) for key in workload_keys]
        rows = self._read(
            history.WINDOW,
            {
                "workloads": None if keys is None else msgspec.json.encode(keys).decode(),
                "direction": direction,
                "since": since,
                "until": until,
                "since_ms": ms(since),
                "until_ms": ms(until),
            },
        )
        found: dict[EdgeKey, EdgeCount] = {}
        for row in rows:
            first, last, at, connections, to_server, to_client = row[5:]
            found[history.edge_key(row[:5])] = EdgeCount(
                connections=connections,
                bytes_to_server=to_server,
                bytes_to_client=to_client,
                first_seen=first,
                last_seen=last if last <= until else max(at, since, first),
            )
        for key, added in self._staged.added.items():
            asked = workload_keys is None or key.workload in workload_keys
            if asked and direction in (None, key.direction) and since <= added.last_seen <= until:
                found[key] = _sum(found.get(key), added)
        return [Edge(key=key, count=count) for key, count in found.items()]

    def losses(self, since: float, until: float) -> dict[str, int]:
        """What observation lost in [since, until], by name, only names with losses. Raises
        LedgerError.
        """
        rows = self._read(
            "SELECT name, sum(count) FROM loss WHERE at >= ? AND at <= ? GROUP BY name",
            (ms(since), ms(until)),
        )
        found = {name: count for name, count in rows if count}
        for name, count in self._staged.losses.items():
            found[name] = found.get(name, 0) + count
        return found

    def coverage(self, workload_key: int) -> tuple[Interval, ...]:
        """When a workload was observed, as far back as history goes. Raises LedgerError."""
        rows = self._read(
            'SELECT start, "end" FROM coverage WHERE workload = ?', (signed(workload_key),)
        )
        found = [Interval(start, end) for start, end in rows]
        if self._write_problem and workload_key in self._staged.covered:
            found.append(self._staged.covered[workload_key][1])
        return union(found)

    def workloads(self, service: str) -> list[Workload]:
        """Every workload of a service that was ever observed, living or not. Raises LedgerError."""
        rows = self._read("SELECT json FROM workload WHERE service = ?", (service,))
        return [msgspec.json.decode(row[0], type=Workload) for row in rows]

    # Inside: staging and writing

    def _stage(self, generation: str, edges: Sequence[Edge], losses: Mapping[str, int]) -> None:
        """Compares cumulative counts with those of the last round and adds the differences to what
        is staged.
        """
        if generation != self._generation:
            self._generation = generation
            self._counts.clear()
            self._ids.clear()
            self._losses.clear()
        refused = 0
        counts, added, limit = self._counts, self._staged.added, self._limits.edges
        for edge in edges:
            key, count = edge.key, edge.count
            before = counts.get(key)
            if before == count:
                continue
            if (before is None and len(counts) >= limit) or (
                len(added) >= limit and key not in added
            ):
                refused += 1
                continue
            counts[key] = count
            _add(added, key, before, count)
        if refused:
            self._lose(REFUSED_EDGES, refused)
        for name, total in losses.items():
            lost = total - self._losses.get(name, 0)
            self._losses[name] = total
            if lost > 0:
                self._lose(name, lost)

    def _lose(self, name: str, count: int) -> None:
        self._staged.losses[name] = self._staged.losses.get(name, 0) + count

    def _write(self, db: sqlite3.Connection, now: float) -> dict[EdgeKey, int]:
        """Writes what is staged; returns the ids of edges that were not known in this
        generation."""
        if self._generation != self._stored_generation:
            db.execute(
                "UPDATE edge SET counted = 0, connections = 0, bytes_to_server = 0, bytes_to_client = 0 "
                "WHERE counted"
            )
            db.execute("DELETE FROM loss_counted")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('generation', ?)", (self._generation,))
        new_ids: dict[EdgeKey, int] = {}
        updates: list[tuple[object, ...]] = []
        deltas: list[tuple[int, ...]] = []
        at = ms(now)
        for key, added in self._staged.added.items():
            edge_id = self._ids.get(key)
            if edge_id is None:
                edge_id = history.edge_id(db, key, added.first_seen, added.last_seen)
                new_ids[key] = edge_id
            total = self._counts.get(key)
            updates.append(
                (
                    added.first_seen,
                    added.last_seen,
                    total is not None,
                    total.connections if total else 0,
                    total.bytes_to_server if total else 0,
                    total.bytes_to_client if total else 0,
                    edge_id,
                )
            )
            deltas.append(
                (
                    at,
                    edge_id,
                    added.connections,
                    added.bytes_to_server,
                    added.bytes_to_client,
                )
            )
        db.executemany(
            "UPDATE edge SET first_seen = min(first_seen, ?), last_seen = max(last_seen, ?), counted = ?, "
            "connections = ?, bytes_to_server = ?, bytes_to_client = ? WHERE id = ?",
            updates,
        )
        db.executemany(history.ADD_DELTA, deltas)
        self._write_losses(db, at)
        self._write_coverage(db)
        return new_ids

    def _write_losses(self, db: sqlite3.Connection, at: int) -> None:
        db.executemany(
            "INSERT INTO loss VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count",
            [(at, name, count) for name, count in self._staged.losses.items()],
        )
        if self._staged.losses:
            db.executemany(
                "INSERT OR REPLACE INTO loss_counted VALUES (?, ?)", list(self._losses.items())
            )

    def _write_coverage(self, db: sqlite3.Connection) -> None:
        for key, (workload, interval) in self._staged.covered.items():
            known = self._covered.get(key)
            if known is None or known[0] != workload:
                db.execute(
                    "INSERT OR REPLACE INTO workload VALUES (?, ?, ?)",
                    (signed(key), workload.service, history.workload_json(workload)),
                )
            db.execute(
                'INSERT INTO coverage VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "end" = max("end", excluded."end")',
                (signed(key), interval.start, interval.end),
            )
            if known is None or known[1].start != interval.start:
                db.execute(
                    "DELETE FROM coverage WHERE workload = ?1 AND start < coalesce((SELECT start FROM coverage "
                    "WHERE workload = ?1 ORDER BY start DESC LIMIT 1 OFFSET ?2), 0)",
                    (signed(key), self._limits.intervals - 1),
                )

    def _maintain(self, now: float) -> None:
        self._maintained_at = now
        try:
            with self._transaction() as db:
                evicted = history.condense(db, now, self._limits)
        except sqlite3.OperationalError as failed:
            self._limit_problem = f"history in {self._path} cannot be condensed: {failed}"
            return
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)
            return
        for key in [
            key for key, (_, last) in self._covered.items() if now - last.end > ROUNDS_KEPT_S
        ]:
            del self._covered[key]
        self._limit_problem = (
            f"more than {self._limits.edges} edges: {evicted} of the oldest were forgotten"
            if evicted
            else ""
        )

    # Inside: the file

    def _connect(self) -> sqlite3.Connection:
        """The history's file, a new one where it is damaged, memory where no file can be had."""
        try:
            db = self._open_file()
        except OSError as failed:
            db = self._in_memory(failed.strerror or str(failed))
        except sqlite3.OperationalError as failed:
            db = self._in_memory(str(failed))
        except sqlite3.DatabaseError as damaged:
            self._move_aside(damaged)
            try:
                db = self._open_file()
            except (OSError, sqlite3.DatabaseError) as failed:
                db = self._in_memory(str(failed))
        return db

    def _open_file(self) -> sqlite3.Connection:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        db = history.connect(str(self._path))
        try:
            self._take_up(db)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _in_memory(self, why: str) -> sqlite3.Connection:
        self._damage.append(
            f"history cannot be kept in {self._path}: {why}; it lasts only as long as this agent"
        )
        db = history.connect(":memory:")
        self._take_up(db)
        return db

    def _take_up(self, db: sqlite3.Connection) -> None:
        """Continues where the last agent left off: the counts that its history was computed
        from."""
        row = db.execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()
        self._generation = self._stored_generation = row[0] if row else ""
        self._counts, self._ids = {}, {}
        for number, key, count in history.counted_edges(db):
            self._counts[key] = count
            self._ids[key] = number
        self._losses = dict(db.execute("SELECT name, count FROM loss_counted").fetchall())
        self._covered = {}

    def _set_aside(self, damaged: sqlite3.DatabaseError) -> None:
        """Begins a new file; what the kernel still counts comes back whole with the next round."""
        self._db.close()
        self._move_aside(damaged)
        self._staged = _Staged()
        self._db = self._connect()

    def _move_aside(self, damaged: sqlite3.DatabaseError) -> None:
        aside = self._path.with_name(f"{self._path.name}.corrupt-{time.time_ns()}")
        kept = f"it was set aside as {aside.name}"
        try:
            self._path.rename(aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            earlier = sorted(self._path.parent.glob(f"{self._path.name}.corrupt-*"))
            for old in earlier[:-DAMAGED_FILES_KEPT]:
                old.unlink(missing_ok=True)
        except OSError as failed:
            kept = f"it could not be set aside: {failed.strerror}"
        self._damage = [
            *self._damage[1 - DAMAGED_FILES_KEPT :],
            f"history in {self._path} was damaged ({damaged}): {kept}, and what it held is lost",
        ]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _change(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            with self._transaction() as db:
                db.execute(statement, values)
        except sqlite3.OperationalError as failed:
            self._write_problem = f"history cannot be written to {self._path}: {failed}"
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)

    def _read(self, statement: str, values: tuple[object, ...] | dict[str, object]) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.OperationalError as failed:
            raise LedgerError(f"history in {self._path} cannot be read: {failed}") from failed
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)
            raise LedgerError(f"history in {self._path} was damaged: {damaged}") from damaged

    def _last_interval(self, workload_key: int) -> Interval | None:
        try:
            rows = self._read(
                'SELECT start, "end" FROM coverage WHERE workload = ? ORDER BY start DESC LIMIT 1',
                (signed(workload_key),),
            )
        except LedgerError:
            return None
        return Interval(*rows[0]) if rows else None


def _add(
    added: dict[EdgeKey, _Added], key: EdgeKey, before: EdgeCount | None, count: EdgeCount
) -> None:
    """Adds what came to an edge between two cumulative counts to what waits to be written."""
    more = added.get(key)
    if more is None:
        more = added[key] = _Added(0, 0, 0, count.first_seen, count.last_seen)
    more.connections += count.connections - (before.connections if before else 0)
    more.bytes_to_server += count.bytes_to_server - (before.bytes_to_server if before else 0)
    more.bytes_to_client += count.bytes_to_client - (before.bytes_to_client if before else 0)
    more.first_seen = min(more.first_seen, count.first_seen)
    more.last_seen = max(more.last_seen, count.last_seen)


def _sum(stored: EdgeCount | None, added: _Added) -> EdgeCount:
    if stored is None:
        return EdgeCount(
            connections=added.connections,
            bytes_to_server=added.bytes_to_server,
            bytes_to_client=added.bytes_to_client,
            first_seen=added.first_seen,
            last_seen=added.last_seen,
        )
    return EdgeCount(
        connections=stored.connections + added.connections,
        bytes_to_server=stored.bytes_to_server + added.bytes_to_server,
        bytes_to_client=stored.bytes_to_client + added.bytes_to_client,
        first_seen=min(stored.first_seen, added.first_seen),
        last_seen=max(stored.last_seen, added.last_seen),
    )
