"""The history of who talked to whom: kernel counts in, evidence for any window out.

Every round stores what was added since the last one, with the counters that it was computed from, in one transaction,
so that neither a restart nor a takeover of the maps, nor a kill at any moment, loses or repeats anything. Knows nothing
of packets, names or verdicts. What counters mean is in counting.py, tables and their bounds in history.py. A full disk
or a damaged file costs history, never the agent, and is told by `problems`.
"""

import bisect
import os
import sqlite3
import time
from collections import Counter as Tally
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tidegate.errors import TidegateError
from tidegate.model import (
    CountedEdge,
    Direction,
    Edge,
    EdgeCount,
    EdgeKey,
    FlowClass,
    Interval,
    Workload,
)
from tidegate.observe import budget, coverage, history, windows
from tidegate.observe.counting import NO_SLOT, Counting, EdgeState, Total, hints_of
from tidegate.observe.history import (
    DEFAULT_LIMITS,
    MINUTES,
    ROUNDS_KEPT_S,
    Entry,
    Limits,
    ms,
    signed,
)
from tidegate.verdict.intervals import union

MAINTENANCE_S = 10.0
DAMAGED_FILES_KEPT = 3

REFUSED_EDGES = "ledger-edges-refused"
"""Loss: edges that found no room in the ledger, counted in every round in which they are
refused."""


class LedgerError(TidegateError):
    """The history cannot be read at the moment."""


class _Staged(msgspec.Struct):
    """What waits to be written beside counters: normally one round, more while writing fails, then merged and so
    bounded.
    """

    losses: dict[str, int] = {}
    covered: dict[int, tuple[Workload, Interval]] = {}


class _Written(msgspec.Struct, kw_only=True):
    """What is in the file as soon as the transaction is."""

    at: int
    rows: list[EdgeState]
    """Of edges that did not know their row: what is to be known of it."""
    folded: bool
    """Whether the minute before is in rows."""
    entries: int


class _Sum(msgspec.Struct, gc=False):
    """What was added to an edge in a span, or in a part of one."""

    at: int = 0
    """When that was last added to, in milliseconds."""
    connections: int = 0
    to_server: int = 0
    to_client: int = 0

    def add(self, at: int, connections: int, to_server: int, to_client: int) -> None:
        if at > self.at:
            self.at = at
        self.connections += connections
        self.to_server += to_server
        self.to_client += to_client


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
        self._counting = Counting(limits.edges)
        self._minute = 0
        """Start of the minute, in milliseconds, whose rounds are not in rows yet: those of `_recent`."""
        self._recent: dict[int, EdgeState] = {}
        """The edges that changed in it, by number."""
        self._exact_from = 0
        """Since when the file has every round, in milliseconds."""
        self._latest_at = 0
        """The date of the latest round."""
        self._losses: dict[str, int] = {}
        self._covered: dict[int, tuple[Workload, Interval]] = {}
        """What the file says of those that were observed in the latest round."""
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

    @property
    def generation(self) -> str:
        """Identity of the map whose counts it has; empty while it has none."""
        return self._generation

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
        counters: Iterable[CountedEdge],
        losses: Mapping[str, int],
    ) -> list[tuple[EdgeKey, int]]:
        """Stores one round: counters and losses are cumulative since `generation` began.

        A generation is the identity of the kernel map; in a new one all counters are new. A counter that is
        absent has not changed; one that is not live is absent from the next round on. Returns the edges whose
        connections have changed since the last round, stored or not, with how many came or (below zero) left.
        """
        moved = self._stage(generation, counters, losses)
        try:
            with self._transaction() as db:
                done = self._write(db, ms(now))
        except sqlite3.OperationalError as failed:
            self._write_problem = (
                f"history cannot be written to {self._path}: {failed}; "
                "it is kept in memory and tried again"
            )
            return moved
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)
            return moved
        self._write_problem = ""
        self._written(done)
        if not 0 <= now - self._maintained_at < MAINTENANCE_S:
            self._maintain(now)
        return moved

    @property
    def is_stored(self) -> bool:
        """Whether everything that was recorded is in the file, or in the memory that stands for it."""
        return not self._write_problem and not self._counting.waiting

    @property
    def totals(self) -> Mapping[tuple[Direction, FlowClass], Total]:
        """What was added to all edges of a direction and class since this ledger was opened."""
        return self._counting.totals

    @property
    def held(self) -> Mapping[FlowClass, int]:
        """How many edges the kernel counts, by class."""
        # One step, which another thread cannot come between.
        counters = tuple(self._counting.counters.values())
        return Tally(one.edge.key.flow_class for one in counters)

    def dispensable(self, now: float, room: int) -> list[tuple[int, int]]:
        """Counters (slot and generation) that the kernel may give back, everything of them being stored: of
        edges long out of use, and of workloads that have more than their share of `room` counters.
        """
        return budget.dispensable(self._counting.counters.values(), now, room)

    # Asking

    def window(
        self,
        workload_keys: Collection[int] | None,
        direction: Direction | None,
        since: float,
        until: float,
        cuts: Mapping[str, Sequence[float]] | None = None,
    ) -> list[Edge]:
        """Edges that were in use in [since, until], with what was added to them in that time.

        None stands for every workload or direction. Counts are exact to one round for the last
        ROUNDS_KEPT_S, else to a minute or an hour, and then rather too high than too low. An edge
        that was in use without a new connection has connections 0. Hints are those of the edge's
        whole life. `cuts` has moments, ascending, by address: an edge whose peer has that address
        is told in parts, one for each span between them in which something was added; a minute
        or hour that a moment divides belongs to the part before it. Raises LedgerError while the
        file cannot be read.
        """
        found = self._edges_of(workload_keys, direction, since)
        span = windows.sources(ms(since), ms(until), self._extent)
        asked = {**_names(workload_keys, direction, since), **_rows(span)}
        sums: dict[int, _Sum] = {}
        for number, *added in self._read(history.SUMS, asked):
            sums[number] = _Sum(*added)
        for number, at, connections, to_server, to_client in self._added_in(span, found):
            known = sums.get(number)
            if known is None:
                sums[number] = _Sum(at, connections, to_server, to_client)
            else:
                known.add(at, connections, to_server, to_client)
        told = {}
        for number, edge in found.items():
            count = _count(edge, sums.get(number), since, until)
            if count is not None:
                told[edge.key] = count
        self._add_waiting(told, workload_keys, direction, since, until)
        edges = [Edge(key=key, count=count) for key, count in told.items()]
        return self._divided(edges, found, since, until, cuts) if cuts else edges

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

    # Inside: asking

    @property
    def _extent(self) -> windows.Extent:
        return windows.Extent(
            exact_from=self._exact_from, latest=self._latest_at, minute=self._minute
        )

    def _edges_of(
        self, workload_keys: Collection[int] | None, direction: Direction | None, since: float
    ) -> dict[int, EdgeState]:
        """Edges that were in use at `since` or later, by number."""
        rows = self._read(history.LEFT, _names(workload_keys, direction, since))
        found = {row[0]: history.edge_of(row) for row in rows}
        for edge in self._counting.edges.values():
            key = edge.key
            if edge.last_seen < since or not edge.number:
                found.pop(edge.number, None)
            elif (workload_keys is None or key.workload in workload_keys) and (
                direction is None or key.direction is direction
            ):
                found[edge.number] = edge
        return found

    def _added_in(
        self, span: windows.Sources, wanted: Container[int]
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """What was added to `wanted` edges apart from rows: number, when (ms), connections, bytes each way."""
        if span.present:
            for number, edge in self._recent.items():
                if number in wanted:
                    yield number, edge.changed_at, edge.connections, edge.to_server, edge.to_client
        for first, last in span.rounds:
            rounds = self._read(
                "SELECT at, entries FROM round WHERE at >= ? AND at <= ? ORDER BY at", (first, last)
            )
            for at, stored in rounds:
                for number, connections, to_server, to_client in self._added_by(stored, wanted):
                    yield number, at, connections, to_server, to_client

    def _add_waiting(
        self,
        told: dict[EdgeKey, EdgeCount],
        workload_keys: Collection[int] | None,
        direction: Direction | None,
        since: float,
        until: float,
    ) -> None:
        """What could not be written yet is evidence too."""
        for counter in self._counting.waiting:
            edge = counter.edge
            asked = workload_keys is None or edge.key.workload in workload_keys
            if (
                asked
                and direction in (None, edge.key.direction)
                and since <= edge.last_seen <= until
            ):
                before = told.get(edge.key) or EdgeCount(
                    connections=0,
                    bytes_to_server=0,
                    bytes_to_client=0,
                    first_seen=edge.first_seen,
                    last_seen=edge.last_seen,
                    hints=hints_of(edge.hints),
                )
                told[edge.key] = EdgeCount(
                    connections=before.connections
                    + counter.connections
                    - counter.stored_connections,
                    bytes_to_server=before.bytes_to_server
                    + counter.to_server
                    - counter.stored_to_server,
                    bytes_to_client=before.bytes_to_client
                    + counter.to_client
                    - counter.stored_to_client,
                    first_seen=min(before.first_seen, edge.first_seen),
                    last_seen=max(before.last_seen, edge.last_seen),
                    hints=before.hints,
                )

    def _divided(
        self,
        edges: list[Edge],
        found: Mapping[int, EdgeState],
        since: float,
        until: float,
        cuts: Mapping[str, Sequence[float]],
    ) -> list[Edge]:
        """The edges, those that are in use on both sides of a cut in parts."""
        moments = {
            edge.key: within
            for edge in edges
            if (
                within := [
                    cut
                    for cut in cuts.get(edge.key.peer, ())
                    if max(edge.count.first_seen, since) < cut <= edge.count.last_seen
                ]
            )
        }
        numbers = {number for number, edge in found.items() if edge.key in moments}
        if not numbers:
            return edges
        span = windows.in_detail(ms(since), ms(until), self._extent)
        asked = {"edges": msgspec.json.encode(sorted(numbers)).decode(), **_rows(span)}
        parts: dict[EdgeKey, dict[int, _Sum]] = {}
        for number, at, *added in (
            *self._read(history.STEPS, asked),
            *self._added_in(span, numbers),
        ):
            key = found[number].key
            part = bisect.bisect_right(moments[key], at / 1000)
            sums = parts.setdefault(key, {})
            sums.setdefault(part, _Sum()).add(at, *added)
        told: list[Edge] = []
        for edge in edges:
            told.extend(
                _parts(edge, moments[edge.key], parts[edge.key]) if edge.key in parts else [edge]
            )
        return told

    # Inside: staging and writing

    def _stage(
        self, generation: str, counters: Iterable[CountedEdge], losses: Mapping[str, int]
    ) -> list[tuple[EdgeKey, int]]:
        """Takes in what the kernel says; all of it waits to be written then."""
        if generation != self._generation:
            self._generation = generation
            self._counting.forget_map()
            self._losses.clear()
        moved, refused = self._counting.take(counters)
        if refused:
            self._lose(REFUSED_EDGES, refused)
        for name, total in losses.items():
            lost = total - self._losses.get(name, 0)
            self._losses[name] = total
            if lost > 0:
                self._lose(name, lost)
        return moved

    def _lose(self, name: str, count: int) -> None:
        self._staged.losses[name] = self._staged.losses.get(name, 0) + count

    def _write(self, db: sqlite3.Connection, at: int) -> _Written:
        """Writes what is staged; memory is left as it is, since the transaction can still fail."""
        new_map = self._generation != self._stored_generation
        if new_map:
            db.execute("DELETE FROM loss_counted")
        folded = new_map or (bool(self._recent) and _minute(at) != self._minute)
        if folded:
            self._fold(db)
        rows = history.store_edges(db, self._counting.altered.values())
        numbers = {row.key: row.number for row in rows}
        counts: list[int] = []
        times: list[float] = []
        for counter in self._counting.waiting:
            edge = counter.edge
            counts += (
                counter.slot,
                counter.generation,
                counter.live,
                edge.number or numbers[edge.key],
                counter.connections - counter.stored_connections,
                counter.to_server - counter.stored_to_server,
                counter.to_client - counter.stored_to_client,
            )
            times.append(edge.last_seen)
        if times:
            db.execute(
                "INSERT INTO round (at, entries) VALUES (?, ?)", (at, history.pack(counts, times))
            )
        self._write_losses(db, at)
        self._write_coverage(db)
        return _Written(at=at, rows=rows, folded=folded, entries=len(times))

    def _fold(self, db: sqlite3.Connection) -> None:
        """Adds the present minute to the rows, and what counters said up to now to what is counted."""
        history.add_minute(db, self._minute, self._recent.values())
        counts: list[int] = []
        times: list[float] = []
        for counter in self._counting.counters.values():
            edge = counter.edge
            if edge.number:
                counts += (
                    counter.slot,
                    counter.generation,
                    counter.live,
                    edge.number,
                    counter.stored_connections,
                    counter.stored_to_server,
                    counter.stored_to_client,
                )
                times.append(edge.last_seen)
        history.store_counted(db, self._generation, history.pack(counts, times))

    def _written(self, done: _Written) -> None:
        """The round is in the file: now memory may say so."""
        for row in done.rows:
            edge = self._counting.altered[row.key]
            edge.number = row.number
            edge.first_seen = min(edge.first_seen, row.first_seen)
            edge.last_seen = max(edge.last_seen, row.last_seen)
            edge.hints |= row.hints
        for edge in self._counting.altered.values():
            edge.counted = edge.counters > 0
        if done.folded:
            self._folded()
        if done.entries:
            self._minute = _minute(done.at)
            self._latest_at = max(self._latest_at, done.at)
        for edge in self._counting.stored(done.at):
            self._recent[edge.number] = edge
        if done.folded:
            self._counting.forget_left(self._recent)
        self._stored_generation = self._generation
        self._covered = self._staged.covered
        self._staged = _Staged()

    def _folded(self) -> None:
        for edge in self._recent.values():
            edge.connections = edge.to_server = edge.to_client = 0
        self._recent = {}

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
        """What keeps the history within its bounds."""
        self._maintained_at = now
        try:
            self._drop_rounds(now)
            self._condense(now)
        except sqlite3.OperationalError as failed:
            self._limit_problem = f"history in {self._path} cannot be condensed: {failed}"
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)

    def _drop_rounds(self, now: float) -> None:
        before = ms(now - ROUNDS_KEPT_S)
        with self._transaction() as db:
            before = max(before, history.excess_rounds(db, self._limits.rounds))
            folded = bool(self._recent) and before > self._minute
            if folded:
                self._fold(db)
            history.drop_rounds(db, before)
            exact_from = history.exact_from(db)
        if folded:
            self._folded()
        self._exact_from = exact_from

    def _condense(self, now: float) -> None:
        with self._transaction() as db:
            history.drop_rounds(db, history.coarsen(db, now, self._limits))
            gone, evicted = history.forget(db, now, self._limits)
            exact_from = history.exact_from(db)
        self._exact_from = exact_from
        for number in gone & self._recent.keys():
            del self._recent[number]
        self._counting.forget_rows(gone)
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
        """Continues where the last agent left off: the counters that its history was computed from."""
        counted = history.counted(db)
        counting = Counting(self._limits.edges)
        by_number = {edge.number: edge for edge in history.counted_edges(db)}
        counting.edges = {edge.key: edge for edge in by_number.values()}
        for entry in counted.entries:
            if entry[3] in by_number:
                _resume(counting, entry, by_number[entry[3]])
        recent: dict[int, EdgeState] = {}
        minute = 0
        for at, entries in history.rounds_after(db, counted.round):
            minute = _minute(at)
            for entry in history.unpack(entries):
                number = entry[3]
                edge = recent.get(number)
                if edge is None:
                    edge = by_number.get(number) or history.edge_numbered(db, number)
                    if edge is None:
                        continue
                    by_number[number] = recent[number] = edge
                    counting.edges[edge.key] = edge
                _resume(counting, entry, edge)
                edge.connections += entry[4]
                edge.to_server += entry[5]
                edge.to_client += entry[6]
                edge.changed_at = at
        counting.altered.update(
            {edge.key: edge for edge in by_number.values() if edge.counted and not edge.counters}
        )
        self._generation = self._stored_generation = counted.generation
        self._counting, self._recent, self._minute = counting, recent, minute
        self._exact_from = history.exact_from(db)
        self._latest_at = history.latest_round(db)
        self._losses = dict(db.execute("SELECT name, count FROM loss_counted").fetchall())
        self._covered = {}

    def _set_aside(self, damaged: sqlite3.DatabaseError) -> None:
        """Begins a new file; what the kernel still counts goes into it whole with the next round."""
        self._db.close()
        self._move_aside(damaged)
        self._staged = _Staged()
        counting, generation = self._counting, self._generation
        self._db = self._connect()
        counting.forget_file()
        self._counting, self._generation = counting, generation

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

    def _added_by(
        self, stored: bytes, wanted: Container[int]
    ) -> Iterator[tuple[int, int, int, int]]:
        try:
            return history.added_by(stored, wanted)
        except sqlite3.DatabaseError as damaged:
            self._set_aside(damaged)
            raise LedgerError(f"history in {self._path} was damaged: {damaged}") from damaged

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


def _minute(at: int) -> int:
    return at - at % MINUTES.span_ms


def _names(
    workload_keys: Collection[int] | None, direction: Direction | None, since: float
) -> dict[str, object]:
    """What every question to the edges' rows asks for."""
    keys = None if workload_keys is None else [signed(key) for key in workload_keys]
    return {
        "workloads": None if keys is None else msgspec.json.encode(keys).decode(),
        "direction": direction,
        "since": since,
    }


def _rows(span: windows.Sources) -> dict[str, object]:
    return {
        "minutes_from": span.minutes_from,
        "hours_from": span.hours_from,
        "rows_until": span.rows_until,
    }


def _count(edge: EdgeState, added: _Sum | None, since: float, until: float) -> EdgeCount | None:
    """What an edge got in a window; None where it was not in use then."""
    if added is None and edge.last_seen > until:
        return None
    sums = added or _Sum()
    last = edge.last_seen
    return EdgeCount(
        connections=sums.connections,
        bytes_to_server=sums.to_server,
        bytes_to_client=sums.to_client,
        first_seen=edge.first_seen,
        last_seen=last if last <= until else max(sums.at / 1000, since, edge.first_seen),
        hints=hints_of(edge.hints) if edge.hints else (),
    )


def _parts(edge: Edge, moments: Sequence[float], sums: Mapping[int, _Sum]) -> Iterator[Edge]:
    """An edge in parts: `sums` by how many of the moments are before."""
    for part, added in sorted(sums.items()):
        is_first, is_last = part == 0, part == len(moments)
        first = edge.count.first_seen if is_first else moments[part - 1]
        last = edge.count.last_seen if is_last else max(added.at / 1000, first)
        yield Edge(
            key=edge.key,
            count=EdgeCount(
                connections=added.connections,
                bytes_to_server=added.to_server,
                bytes_to_client=added.to_client,
                first_seen=first,
                last_seen=last,
                hints=edge.count.hints,
            ),
        )


def _resume(counting: Counting, entry: Entry, edge: EdgeState) -> None:
    """Adds a stored entry to its counter, if it has one still."""
    slot, generation, live, _, connections, to_server, to_client, last_seen = entry
    if last_seen > edge.last_seen:
        edge.last_seen = last_seen
    if slot == NO_SLOT:
        return
    counter = counting.counters.get(slot)
    if counter is None or counter.generation != generation or counter.live != live:
        counter = counting.resume(slot, generation, edge, live=bool(live))
    counter.connections += connections
    counter.to_server += to_server
    counter.to_client += to_client
    counter.stored_connections = counter.connections
    counter.stored_to_server = counter.to_server
    counter.stored_to_client = counter.to_client
