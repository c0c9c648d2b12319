"""The legacy tables (ip_tables, ip6_tables) of the current network namespace: chains of a caller's own, and their lock.

A rule is an entry, bytes as the kernel takes them; how words become entries is in xtables_rules.py. A table is read
through legacy_tables.py and replaced through libiptc, which keeps nothing between calls and replaces it as a whole or
not at all; it needs no process of its own. Which chains there should be is not known here; a caller says by a pattern
which ones it owns.

A table may be anybody's work. One that is too large is refused before it is read.

python-iptables' Table is not used: it keeps its handles by name, whatever the namespace, and commits when it is
collected.
"""

import ctypes
import errno
import fcntl
import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tidegate.kernel import legacy_tables, libxtables, netlink, processes
from tidegate.kernel.errors import KernelError
from tidegate.kernel.legacy_tables import EXTENSION, LAYOUTS, OFFSETS, Family, Layout, Size
from tidegate.kernel.netlink import text_of

LOCK_WAIT_S = 10.0
"""How long `locked` waits for another program."""

MOST_BYTES = 2**24
MOST_RULES = 2**14
"""Tables that are larger are not worked on; a rule takes 152 bytes or more, one with a comment 448."""

MOST_OWNED = 2**12
MOST_JUMPS = 1000
"""Most rules in chains that are asked for, chains counted as well, and most rules of others that jump there."""


class Entry(msgspec.Struct, frozen=True, order=True):
    """A rule as the kernel takes it (struct ipt_entry, struct ip6t_entry), so that equal rules are equal bytes.

    Its counters are zero, the indexes of sets too, and what its target does is told by a name.
    """

    data: bytes
    sets: tuple[tuple[int, str], ...] = ()
    """Where in `data` the index of a set belongs, and the set's name."""


class Counted(msgspec.Struct, frozen=True):
    """An entry that the kernel has."""

    entry: Entry
    packets: int


class InstalledJump(msgspec.Struct, frozen=True, order=True):
    """A rule of any other chain that jumps to a chain that is asked for."""

    chain: str
    position: int
    entry: Entry


class Content(msgspec.Struct, frozen=True):
    """The chains of one table that are asked for, and the jumps to them."""

    chains: dict[str, tuple[Counted, ...]]
    jumps: tuple[InstalledJump, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing of that."""
        return not self.chains and not self.jumps

    def equals(self, other: "Content") -> bool:
        """Whether the rules are the same; counters may differ."""
        return self.jumps == other.jumps and self.entries() == other.entries()

    def entries(self) -> dict[str, list[Entry]]:
        """The rules of each chain without their counters."""
        return {name: [rule.entry for rule in rules] for name, rules in self.chains.items()}


EMPTY = Content(chains={}, jumps=())


_STANDARD_TARGET = b""
SET_INDEX_SIZE = 2
"""struct xt_set_info of linux/netfilter/xt_set.h begins with the index."""


def normal(layout: Layout, raw: bytes, target: str, set_name: Callable[[int], str]) -> Entry:
    """An entry without what is not the rule's: counters, the kernel's own fields, garbage behind names."""
    data = bytearray(raw)
    target_at, _ = OFFSETS.unpack_from(data, layout.offsets)
    data[layout.header.size : layout.header.size + 4] = bytes(4)
    data[layout.comefrom : layout.size] = bytes(layout.size - layout.comefrom)
    # Long rules are somebody else's, and not worth the memory.
    cleaned = _remembered if len(data) <= _REMEMBERED_BYTES else _cleaned
    entry, indexes = cleaned(bytes(data), layout.size, target_at, target)
    if not indexes:
        return entry
    return Entry(entry.data, tuple((place, set_name(index)) for place, index in indexes))


def _cleaned(
    raw: bytes, first: int, target_at: int, target: str
) -> tuple[Entry, tuple[tuple[int, int], ...]]:
    """An entry, the first of whose parts is at `first`, and the indexes of its sets by their places."""
    data = bytearray(raw)
    indexes = []
    at = first
    while at < len(data):
        size, name, revision = EXTENSION.unpack_from(data, at)
        name = name.partition(b"\0")[0]
        body = at + EXTENSION.size
        if at < target_at and name == b"set":
            index = int.from_bytes(data[body : body + SET_INDEX_SIZE], sys.byteorder)
            indexes.append((body, index))
            data[body : body + SET_INDEX_SIZE] = bytes(SET_INDEX_SIZE)
        if at == target_at and name == _STANDARD_TARGET:
            name = _encoded(target)
            data[body:] = bytes(len(data) - body)
        EXTENSION.pack_into(data, at, size, name, revision)
        at += size
    return Entry(bytes(data)), tuple(indexes)


_REMEMBERED_BYTES = 1024
_remembered = functools.lru_cache(maxsize=1024)(_cleaned)
"""It takes 5 us, and nearly all entries that are read have been read before."""


def comments(family: Family, entry: Entry) -> tuple[str, ...]:
    """The texts of a rule's comments, in order."""
    return tuple(
        text_of(part[EXTENSION.size :])
        for kind, name, part in parts(LAYOUTS[family], entry)
        if (kind, name) == ("-m", "comment")
    )


def target(family: Family, entry: Entry) -> str:
    """The name of a rule's target, or the chain that it leads to."""
    *_, (_, name, _) = parts(LAYOUTS[family], entry)
    return name


def goes_elsewhere(family: Family, entry: Entry) -> bool:
    """Whether a rule continues in another chain that does not come back (-g)."""
    layout = LAYOUTS[family]
    _, flags, _ = layout.header.unpack_from(entry.data)[-3:]
    return bool(flags & layout.goes_to)


def parts(layout: Layout, entry: Entry) -> Iterator[tuple[str, str, bytes]]:
    """Matches (-m) and the target (-j) of an entry, their names, and each as it is in the entry."""
    target_at, end = OFFSETS.unpack_from(entry.data, layout.offsets)
    at = layout.size
    while at < end:
        size, name, _ = EXTENSION.unpack_from(entry.data, at)
        kind = "-m" if at < target_at else "-j"
        yield kind, text_of(name), entry.data[at : at + size]
        at += size


# The kernel's tables. Everything from here to `locked` is for the current namespace.


def content(family: Family, table: str, owned: str, set_names: Mapping[int, str]) -> Content:
    """The chains of a table whose names match the pattern `owned`, and all jumps to them from other chains.

    Makes the table where it is not `existing`. Sets are named by their indexes; one without a name is # and its
    index. KernelError when the table cannot be read, E2BIG when it is too large for that.
    """
    return _content(family, table, re.compile(owned), set_names)


def replace(
    family: Family, table: str, owned: str, wanted: Content, set_indexes: Mapping[str, int]
) -> None:
    """Have the table hold this and nothing else of what matches `owned`, in one step. The rest stays as it is.

    To be called with the lock held. A table that another program changes meanwhile, without the lock, is read and
    changed again, a few times. KernelError when the kernel refuses; the table is then what it was.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            netlink.pause(attempt)
        with _opened(family, table) as handle:
            # What is changed from here on keeps the handle from being loaded.
            _edit(handle, re.compile(owned), wanted, set_indexes)
            if handle.commit():
                return
    problem = f"{legacy_tables.described(family, table)} is being changed by another program, over and over"
    raise KernelError(problem, errno.EAGAIN)


_ATTEMPTS = 12


_CHAIN_BYTES = 512
"""More than the two entries take that a chain begins and ends with (struct ip6t_error, struct ip6t_standard)."""


def _measured(content: Content) -> Size:
    """What the rules take, with those that the chains begin and end with."""
    entries = [entry for rules in content.entries().values() for entry in rules]
    entries += [jump.entry for jump in content.jumps]
    chains = len(content.chains)
    size = sum(len(entry.data) for entry in entries) + chains * _CHAIN_BYTES
    return Size(size, len(entries) + 2 * chains)


def _check_size(what: str, size: Size) -> None:
    if size.length > MOST_BYTES or size.rules > MOST_RULES:
        raise KernelError(f"{what} is too large: {size}", errno.E2BIG)


class _Handle:
    """A table as it was when it was opened, to be changed and loaded again (libiptc/libiptc.h)."""

    def __init__(self, family: Family, table: str) -> None:
        libraries = libxtables.loaded()
        self.family, self.table = family, table
        self._what = legacy_tables.described(family, table)
        self._binding = libraries.ip4tc if family is Family.IPV4 else libraries.ip6tc
        self._size = legacy_tables.size(family, table)
        _check_size(self._what, self._size)
        self._handle = self._binding.iptc_init(table.encode())
        if not self._handle:
            raise self._refusal("open")

    def close(self) -> None:
        self._binding.iptc_free(self._handle)

    def check_size(self, present: Content, wanted: Content) -> None:
        """KernelError when the table would be too large with what is wanted in place of what is there."""
        measures = zip(self._size, _measured(present), _measured(wanted), strict=True)
        size = Size(*(there - going + coming for there, going, coming in measures))
        _check_size(self._what, size)
        if sum(map(len, wanted.chains.values())) + len(wanted.chains) > MOST_OWNED:
            raise _too_many(self._what)

    def flush(self, chain: str) -> None:
        self._changed(self._binding.iptc_flush_entries(_encoded(chain), self._handle))

    def delete(self, chain: str) -> None:
        self._changed(self._binding.iptc_delete_chain(_encoded(chain), self._handle))

    def create(self, chain: str) -> None:
        self._changed(self._binding.iptc_create_chain(_encoded(chain), self._handle))

    def append(self, chain: str, entry: bytes) -> None:
        self._changed(self._binding.iptc_append_entry(_encoded(chain), entry, self._handle))

    def insert(self, chain: str, entry: bytes, at: int) -> None:
        self._changed(self._binding.iptc_insert_entry(_encoded(chain), entry, at, self._handle))

    def remove(self, chain: str, at: int) -> None:
        self._changed(self._binding.iptc_delete_num_entry(_encoded(chain), at, self._handle))

    def commit(self) -> bool:
        """Load it; False when somebody else has changed the table meanwhile."""
        done = self._binding.iptc_commit(self._handle)
        if not done and ctypes.get_errno() == errno.EAGAIN:
            return False
        self._changed(done)
        return True

    def _changed(self, done: int) -> None:
        if not done:
            raise self._refusal("change")

    def _refusal(self, what: str) -> KernelError:
        number = ctypes.get_errno()
        reason = self._binding.iptc_strerror(number).decode()
        return KernelError(f"cannot {what} {self._what}: {reason}", number)


def _encoded(name: str) -> bytes:
    """The bytes of a name as legacy_tables tells it."""
    return name.encode(errors="surrogateescape")


@contextmanager
def _opened(family: Family, table: str) -> Iterator[_Handle]:
    handle = _Handle(family, table)
    try:
        yield handle
    finally:
        handle.close()


def _content(
    family: Family, table: str, owned: re.Pattern[str], set_names: Mapping[int, str]
) -> Content:
    layout, what = LAYOUTS[family], legacy_tables.described(family, table)
    there = legacy_tables.read(family, table, MOST_BYTES, MOST_RULES)
    if isinstance(there, legacy_tables.Unread):
        raise KernelError(there.why, there.errno)

    def entry(at: int) -> Entry:
        return normal(layout, there.raw(at), there.leads_to(at), name_of)

    def name_of(index: int) -> str:
        return set_names.get(index, _UNNAMED.format(index))

    chains: dict[str, tuple[Counted, ...]] = {}
    left = MOST_OWNED
    for name in filter(owned.fullmatch, there.chains()):
        places = itertools.islice(there.places(name), max(left, 0))
        chains[name] = tuple(Counted(entry(at), there.packets(at)) for at in places)
        left -= len(chains[name]) + 1
        if left < 0:
            raise _too_many(what)
    found = tuple(itertools.islice(there.jumps_to(chains), MOST_JUMPS + 1))
    if len(found) > MOST_JUMPS:
        problem = f"{what} has more than {MOST_JUMPS} rules that jump to the chains in question"
        raise KernelError(problem, errno.E2BIG)
    jumps = (InstalledJump(name, position, entry(at)) for name, position, at in found)
    return Content(chains, tuple(sorted(jumps)))


def _too_many(what: str) -> KernelError:
    problem = f"{what} is too large: {MOST_OWNED} rules or more in the chains in question"
    return KernelError(problem, errno.E2BIG)


def _edit(
    handle: _Handle, owned: re.Pattern[str], wanted: Content, set_indexes: Mapping[str, int]
) -> None:
    names = {index: name for name, index in set_indexes.items()}
    present = _content(handle.family, handle.table, owned, names)
    handle.check_size(present, wanted)
    if present.jumps != wanted.jumps:
        for jump in reversed(present.jumps):
            handle.remove(jump.chain, jump.position - 1)
    before, after = present.entries(), wanted.entries()
    changed = [name for name in before if before[name] != after.get(name)]
    for name in changed:
        handle.flush(name)
    for name in before.keys() - after.keys():
        handle.delete(name)
    made = [name for name in after if name not in before]
    for name in made:
        handle.create(name)
    for name in after:
        if name in changed or name in made:
            for entry in after[name]:
                handle.append(name, _loadable(entry, set_indexes))
    if present.jumps != wanted.jumps:
        for jump in wanted.jumps:
            handle.insert(jump.chain, jump.entry.data, jump.position - 1)


def _loadable(entry: Entry, set_indexes: Mapping[str, int]) -> bytes:
    data = bytearray(entry.data)
    for place, name in entry.sets:
        index = _set_index(name, set_indexes).to_bytes(SET_INDEX_SIZE, sys.byteorder)
        data[place : place + SET_INDEX_SIZE] = index
    return bytes(data)


_UNNAMED = "#{}"


def _set_index(name: str, set_indexes: Mapping[str, int]) -> int:
    if name in set_indexes:
        return set_indexes[name]
    if name.startswith("#"):
        return int(name[1:])
    raise KernelError(f"there is no set {name}", errno.ENOENT)


_LOCK_POLL_S = 0.002


def lock_file() -> Path:
    """Where iptables-legacy has the lock (XT_LOCK_NAME), unless XTABLES_LOCKFILE in the environment names another."""
    return Path(os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock"))


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock by which programs that change legacy tables wait for each other, in any namespace.

    KernelError when another one does not let go of it in LOCK_WAIT_S; it says which, where that can be told.
    """
    path = lock_file()
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        problem = f"cannot open the xtables lock {path}: {error.strerror}"
        raise KernelError(problem, error.errno or 0) from error
    try:
        _wait_for(lock, path)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                who = _holder(lock) or "another program"
                problem = f"{who} holds the xtables lock {path} for {LOCK_WAIT_S:g} s or more"
                raise KernelError(problem, errno.EAGAIN) from error
            time.sleep(_LOCK_POLL_S)
        else:
            return


def _holder(lock: int) -> str | None:
    """The process that holds a lock; None where it is in another pid namespace, or has let go.

    A line of /proc/locks is "1: FLOCK ADVISORY WRITE 4711 00:1a:815 0 EOF" (fs/locks.c, lock_get_status).
    """
    inode = os.fstat(lock).st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        _, *fields = line.split()
        if fields[0] == "FLOCK" and fields[4].rpartition(":")[2] == str(inode):
            return processes.named(int(fields[3]))
    return None
