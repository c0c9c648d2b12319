"""The legacy tables (ip_tables, ip6_tables) of the current network namespace: reading them, replacing them, their lock.

A rule is an entry, bytes as the kernel takes them; how words become entries is in xtables_rules.py. Reading and
loading goes to libiptc, which keeps nothing between calls and replaces a table as a whole or not at all; it needs no
process of its own. Which chains there should be is not known here; a caller says by a pattern which ones it owns.

A table may be anybody's work. One that is too large is refused before it is read.

python-iptables' Table is not used: it keeps its handles by name, whatever the namespace, and commits when it is
collected.
"""

import ctypes
import enum
import errno
import fcntl
import functools
import itertools
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tidegate.kernel import libxtables, nfnetlink
from tidegate.kernel.errors import KernelError

LOCK_WAIT_S = 10.0
"""How long `locked` waits for another program."""

MOST_BYTES = 2**24
MOST_RULES = 2**14
"""Tables that are larger are not worked on; a rule takes 152 bytes or more, one with a comment 448."""

MOST_OWNED = 2**12
MOST_JUMPS = 1000
"""Most rules in chains that are asked for, chains counted as well, and most rules of others that jump there."""


class Family(enum.StrEnum):
    """Each has tables of its own."""

    IPV4 = "ip"
    IPV6 = "ip6"


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


# linux/netfilter_ipv4/ip_tables.h (struct ipt_ip, struct ipt_entry), linux/netfilter_ipv6/ip6_tables.h (struct
# ip6t_ip6, struct ip6t_entry), linux/netfilter/x_tables.h
class Layout(NamedTuple):
    """Where things are in an entry of one family."""

    version: int
    """Of the internet protocol."""
    header: struct.Struct
    """Source, destination, their masks, interface in and out, their masks, protocol, flags, inverted flags."""
    comefrom: int
    """Where the entry has fields of the kernel's own, up to its end."""
    size: int
    """Length of the entry without matches and target."""
    has_protocol: int
    """Flag of an entry that names a protocol; 0 where none is needed."""
    goes_to: int
    """Flag of an entry that goes to a chain and does not come back."""


LAYOUTS = {
    Family.IPV4: Layout(
        4, struct.Struct("=4s4s4s4s16s16s16s16sHBB"), 92, 112, 0x00, 0x02
    ),
    Family.IPV6: Layout(
        # The byte before the flags is for a type of service, which nothing here looks at.
        6, struct.Struct("=16s16s16s16s16s16s16s16sHxBB3x"), 144, 168, 0x01, 0x04
    ),
}  # fmt: skip
EXTENSION = struct.Struct("=H29sB")
"""struct xt_entry_match and xt_entry_target: length with this head, name, revision"""
_OFFSETS = struct.Struct("=HH")
"""In an entry, four bytes behind the header: where the target begins and where the next entry does."""
_STANDARD_TARGET = b""
SET_INDEX_SIZE = 2
"""struct xt_set_info of linux/netfilter/xt_set.h begins with the index."""


def normal(layout: Layout, raw: bytes, target: str, set_name: Callable[[int], str]) -> Entry:
    """An entry without what is not the rule's: counters, the kernel's own fields, garbage behind names."""
    data = bytearray(raw)
    target_at, _ = _OFFSETS.unpack_from(data, layout.header.size + 4)
    data[layout.header.size : layout.header.size + 4] = bytes(4)
    data[layout.comefrom : layout.size] = bytes(layout.size - layout.comefrom)
    entry, indexes = _cleaned(bytes(data), layout.size, target_at, target)
    if not indexes:
        return entry
    return Entry(entry.data, tuple((place, set_name(index)) for place, index in indexes))


@functools.lru_cache(maxsize=1024)
def _cleaned(
    raw: bytes, first: int, target_at: int, target: str
) -> tuple[Entry, tuple[tuple[int, int], ...]]:
    """An entry, the first of whose parts is at `first`, and the indexes of its sets by their places.

    Remembered, as it takes 5 us and nearly all entries that are read have been read before.
    """
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


def comments(family: Family, entry: Entry) -> tuple[str, ...]:
    """The texts of a rule's comments, in order."""
    return tuple(
        part[EXTENSION.size :].partition(b"\0")[0].decode(errors="replace")
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
    target_at, end = _OFFSETS.unpack_from(entry.data, layout.header.size + 4)
    at = layout.size
    while at < end:
        size, name, _ = EXTENSION.unpack_from(entry.data, at)
        kind = "-m" if at < target_at else "-j"
        yield kind, name.partition(b"\0")[0].decode(errors="replace"), entry.data[at : at + size]
        at += size


# The kernel's tables, through libiptc. Everything from here to `locked` is for the current namespace.

_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}
_NAMES_BYTES = 4096
"""More than the names of all tables take; a family has five."""


def existing(family: Family) -> frozenset[str]:
    """Names of the tables that the namespace has. Others come to life when they are asked for, hooks and all."""
    # Not by Path: this is part of every look, and would take 20 us more.
    try:
        names = os.open(f"/proc/thread-self/net/{_NAMES[family]}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return frozenset()
    try:
        return frozenset(os.read(names, _NAMES_BYTES).decode().split())
    finally:
        os.close(names)


def content(family: Family, table: str, owned: str, set_names: Mapping[int, str]) -> Content:
    """The chains of a table whose names match the pattern `owned`, and all jumps to them from other chains.

    Makes the table where it is not `existing`. Sets are named by their indexes; one without a name is # and its
    index. KernelError when the table cannot be read, E2BIG when it is too large for that.
    """
    with _opened(family, table) as handle:
        return _content(handle, re.compile(owned), set_names)


def replace(
    family: Family, table: str, owned: str, wanted: Content, set_indexes: Mapping[str, int]
) -> None:
    """Have the table hold this and nothing else of what matches `owned`, in one step. The rest stays as it is.

    To be called with the lock held. A table that another program changes meanwhile, without the lock, is read and
    changed again, a few times. KernelError when the kernel refuses; the table is then what it was.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            nfnetlink.pause(attempt)
        with _opened(family, table) as handle:
            _edit(handle, re.compile(owned), wanted, set_indexes)
            if handle.commit():
                return
    problem = f"{_described(family, table)} is being changed by another program, over and over"
    raise KernelError(problem, errno.EAGAIN)


_ATTEMPTS = 12


def _described(family: Family, table: str) -> str:
    return f"table {table} of {family}"


_CHAIN_BYTES = 512
"""More than the two entries take that a chain begins and ends with (struct ip6t_error, struct ip6t_standard)."""


def _measured(content: Content) -> tuple[int, int]:
    """Bytes and number of the rules, with those that the chains begin and end with."""
    entries = [entry for rules in content.entries().values() for entry in rules]
    entries += [jump.entry for jump in content.jumps]
    chains = len(content.chains)
    size = sum(len(entry.data) for entry in entries) + chains * _CHAIN_BYTES
    return size, len(entries) + 2 * chains


def _check_size(what: str, size: int, rules: int) -> None:
    if size > MOST_BYTES or rules > MOST_RULES:
        problem = f"{what} is too large to be worked on: {size} bytes, {rules} rules"
        raise KernelError(problem, errno.E2BIG)


class _Handle:
    """A table as it was when it was opened, to be changed and loaded again (libiptc/libiptc.h)."""

    def __init__(self, family: Family, table: str) -> None:
        libraries = libxtables.loaded()
        self.layout = LAYOUTS[family]
        self.table = _described(family, table)
        self._binding = libraries.ip4tc if family is Family.IPV4 else libraries.ip6tc
        self.measured = _size(family, table)
        _check_size(self.table, *self.measured)
        self._handle = self._binding.iptc_init(table.encode())
        if not self._handle:
            raise self._refusal("read")

    def close(self) -> None:
        self._binding.iptc_free(self._handle)

    def chains(self) -> tuple[list[str], list[str]]:
        """The built-in ones, and the others."""
        names = [self._binding.iptc_first_chain(self._handle)]
        while names[-1]:
            names.append(self._binding.iptc_next_chain(self._handle))
        kinds: tuple[list[str], list[str]] = ([], [])
        for name in names[:-1]:
            kinds[not self._binding.iptc_builtin(name, self._handle)].append(_decoded(name))
        return kinds

    def rules(self, chain: str) -> Iterator[tuple[Any, str]]:
        """The entries of a chain, as pointers, and the names of their targets."""
        entry = self._binding.iptc_first_rule(_encoded(chain), self._handle)
        while entry:
            target = self._binding.iptc_get_target(entry, self._handle) or b""
            yield entry, _decoded(target)
            entry = self._binding.iptc_next_rule(entry, self._handle)

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
        return KernelError(f"cannot {what} {self.table}: {reason}", number)


def _decoded(name: bytes) -> str:
    """The name of a chain or a target; the kernel takes any bytes for one."""
    return name.decode(errors="surrogateescape")


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


# linux/netfilter_ipv4/ip_tables.h (IPT_SO_GET_INFO, struct ipt_getinfo), the same for IPv6
_SO_GET_INFO = 64
_INFO = struct.Struct("=32s44xII")
"""Name of the table; number and bytes of its entries."""
_LEVELS = {
    Family.IPV4: (socket.AF_INET, socket.IPPROTO_IP),
    Family.IPV6: (socket.AF_INET6, socket.IPPROTO_IPV6),
}

_libc = ctypes.CDLL(None, use_errno=True)


def _size(family: Family, table: str) -> tuple[int, int]:
    """How many bytes a table's rules take, and how many they are; nothing for a table that the kernel lacks."""
    protocol, level = _LEVELS[family]
    info = ctypes.create_string_buffer(table.encode(), _INFO.size)
    length = ctypes.c_uint32(_INFO.size)
    with socket.socket(protocol, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        answered = _libc.getsockopt(raw.fileno(), level, _SO_GET_INFO, info, ctypes.byref(length))
    if answered:
        return 0, 0
    _, rules, size = _INFO.unpack(info.raw)
    return size, rules


@contextmanager
def _opened(family: Family, table: str) -> Iterator[_Handle]:
    handle = _Handle(family, table)
    try:
        yield handle
    finally:
        handle.close()


def _content(handle: _Handle, owned: re.Pattern[str], set_names: Mapping[int, str]) -> Content:
    def read(pointer: Any, target: str) -> Entry:
        entry = pointer.contents
        raw = ctypes.string_at(ctypes.addressof(entry), entry.next_offset)
        return normal(
            handle.layout, raw, target, lambda index: set_names.get(index, _UNNAMED.format(index))
        )

    built_in, others = handle.chains()
    chains: dict[str, tuple[Counted, ...]] = {}
    left = MOST_OWNED
    for name in filter(owned.fullmatch, others):
        entries = itertools.islice(handle.rules(name), max(left, 0))
        chains[name] = tuple(
            Counted(read(pointer, target), int(pointer.contents.counters.pcnt))
            for pointer, target in entries
        )
        left -= len(chains[name]) + 1
        if left < 0:
            raise _too_many(handle.table)
    found = (
        InstalledJump(name, position, read(pointer, target))
        for name in (*built_in, *(other for other in others if other not in chains))
        if chains
        for position, (pointer, target) in enumerate(handle.rules(name), 1)
        if target in chains
    )
    jumps = sorted(itertools.islice(found, MOST_JUMPS + 1))
    if len(jumps) > MOST_JUMPS:
        problem = (
            f"{handle.table} has more than {MOST_JUMPS} rules that jump to the chains in question"
        )
        raise KernelError(problem, errno.E2BIG)
    return Content(chains, tuple(jumps))


def _too_many(table: str) -> KernelError:
    problem = f"{table} is too large to be worked on: {MOST_OWNED} rules or more in the chains in question"
    return KernelError(problem, errno.E2BIG)


def _edit(
    handle: _Handle, owned: re.Pattern[str], wanted: Content, set_indexes: Mapping[str, int]
) -> None:
    present = _content(handle, owned, {index: name for name, index in set_indexes.items()})
    if present.jumps != wanted.jumps:
        for jump in reversed(present.jumps):
            handle.remove(jump.chain, jump.position - 1)
    if sum(map(len, wanted.chains.values())) + len(wanted.chains) > MOST_OWNED:
        raise _too_many(handle.table)
    measures = zip(handle.measured, _measured(present), _measured(wanted), strict=True)
    _check_size(handle.table, *(there - going + coming for there, going, coming in measures))
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


_LOCK_FILE = "/run/xtables.lock"
"""Where iptables-legacy has it (XT_LOCK_NAME), unless XTABLES_LOCKFILE in the environment names another."""
_LOCK_POLL_S = 0.002


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock by which programs that change legacy tables wait for each other, in any namespace.

    KernelError when another one does not let go of it in LOCK_WAIT_S; it says which, where that can be told.
    """
    path = os.environ.get("XTABLES_LOCKFILE", _LOCK_FILE)
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


def _wait_for(lock: int, path: str) -> None:
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
            return f"process {fields[3]}{_program(fields[3])}"
    return None


def _program(pid: str) -> str:
    try:
        name = Path("/proc", pid, "comm").read_bytes()
    except OSError:
        return ""
    return f" ({ascii(name.decode(errors='replace').strip())[1:-1]})"
