"""The legacy tables (ip_tables, ip6_tables) of the current network namespace, through python-iptables.

Rules are written as iptables-restore(8) reads them; `parse` takes the part of it that it knows and nothing else.
`compiled` turns the text into the entries that the kernel takes, once per rule: libxtables does that, which leaks,
keeps state for one family at a time and calls exit(3), so it works in a process of its own. Reading and loading
entries goes to libiptc, which keeps nothing between calls and replaces a table as a whole or not at all; it needs no
process of its own. Which chains there should be is not known here; a caller says by a pattern which ones it owns.

Some of python-iptables 1.2 is gone around, because
- importing it starts ldconfig, gcc and modprobe: it gets the names of its libraries from here;
- Rule6 writes wrong masks for interfaces, and for "not this protocol" a rule for any;
- Rule asks all tables of the machine whether they have a chain, which creates those that were not there;
- Table keeps its handles by name, whatever the namespace, and commits when it is collected.
"""

import ctypes
import enum
import errno
import fcntl
import functools
import importlib
import importlib.util
import ipaddress
import os
import re
import shlex
import socket
import struct
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tidegate.kernel import ipset, isolation, netns
from tidegate.kernel.errors import KernelError

LOCK_WAIT_S = 10.0
"""How long `locked` waits for another program."""

MAX_CHAIN_NAME = 28
"""Most characters of a chain's name (XT_EXTENSION_MAXNAMELEN of linux/netfilter/x_tables.h, less its end)."""


class Family(enum.StrEnum):
    """Each has tables of its own."""

    IPV4 = "ip"
    IPV6 = "ip6"


class Jump(msgspec.Struct, frozen=True, order=True):
    """A rule of a built-in chain that jumps to a chain."""

    chain: str
    position: int
    """From 1 on."""
    rule: str
    """Its words behind the chain, as iptables-restore reads them."""


class Chain(msgspec.Struct, frozen=True):
    """A chain that is not built in."""

    name: str
    rules: tuple[str, ...]
    """The words of each rule, behind the chain."""


class Table(msgspec.Struct, frozen=True):
    """What a text says about one table."""

    name: str
    chains: tuple[Chain, ...]
    jumps: tuple[Jump, ...]


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

_COMMENT = "#"
_CHAIN_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_CHAIN_NAME}}}")
_DECLARATION = re.compile(r":(?P<name>\S+) - \[0:0\]")


def parse(text: str) -> tuple[Table, ...]:
    """The tables of a text for one family. KernelError for what is not understood, with the number of the line.

    A table begins with *NAME and ends with COMMIT. In between are declarations `:CHAIN - [0:0]`, rules
    `-A CHAIN WORDS` of declared chains, and jumps `-I CHAIN POSITION WORDS` from built-in ones. Lines that begin
    with # and empty ones do not matter.
    """
    tables: list[Table] = []
    name, chains, jumps = "", dict[str, list[str]](), list[Jump]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith(_COMMENT):
            continue
        kind, _, rest = line.partition(" ")
        if not name and line.startswith("*") and line[1:].isalnum():
            name, chains, jumps = line[1:], {}, []
        elif name and line == "COMMIT":
            made = tuple(Chain(chain, tuple(rules)) for chain, rules in chains.items())
            tables.append(Table(name, made, tuple(jumps)))
            name = ""
        elif name and (declared := _DECLARATION.fullmatch(line)):
            if not _CHAIN_NAME.fullmatch(declared["name"]):
                raise _not_understood(number, line)
            chains[declared["name"]] = []
        elif name and kind == "-A" and (target := rest.partition(" "))[0] in chains:
            chains[target[0]].append(target[2])
        elif name and kind == "-I" and (place := rest.split(" ", 2))[1:2] and place[1].isdecimal():
            jumps.append(Jump(place[0], int(place[1]), " ".join(place[2:])))
        else:
            raise _not_understood(number, line)
    if name:
        raise KernelError(f"table {name} has no COMMIT", errno.EINVAL)
    return tuple(tables)


def _not_understood(number: int, line: str) -> KernelError:
    return KernelError(f"line {number} of the rules is not understood: {line}", errno.EINVAL)


def words(text: str) -> list[str]:
    """The words of a rule; those with spaces are between double quotes."""
    return shlex.split(text) if '"' in text or "\\" in text else text.split()


def quoted(word: str) -> str:
    """A word as iptables-restore and `words` read it. KernelError for one that cannot be written there."""
    if not word.isprintable() or word in ("", "!") or word.startswith("-"):
        raise KernelError(f"{word!r} cannot be part of a rule", errno.EINVAL)
    if re.fullmatch(r"[A-Za-z0-9_./:,@%+=-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# Compiling: from words to entries.


def compiled(family: Family, tables: Iterable[Table]) -> dict[str, Content]:
    """What the kernel would have of these tables, by their names. KernelError for a rule that cannot be written.

    May be called from any thread. What was compiled before is remembered.
    """
    wanted = tuple(tables)
    entries = _entries(family, {rule for table in wanted for rule in _rules(table)})
    return {
        table.name: Content(
            chains={
                chain.name: tuple(Counted(entries[rule], 0) for rule in chain.rules)
                for chain in table.chains
            },
            jumps=tuple(
                InstalledJump(jump.chain, jump.position, entries[jump.rule])
                for jump in sorted(table.jumps)
            ),
        )
        for table in wanted
    }


def _rules(table: Table) -> Iterator[str]:
    for chain in table.chains:
        yield from chain.rules
    for jump in table.jumps:
        yield jump.rule


_COMPILE_S = 10.0
_COMPILE_RULE_S = 0.1
"""Most seconds for compiling, and for one rule more; it takes 0.5 ms."""

_MAX_REMEMBERED = 20_000
"""Most rules to remember; an entry is about 1 KB."""

_remembered: dict[tuple[Family, str], Entry] = {}


def _entries(family: Family, rules: set[str]) -> dict[str, Entry]:
    found = {rule: _remembered.get((family, rule)) for rule in rules}
    entries = {rule: entry for rule, entry in found.items() if entry is not None}
    missing = sorted(rules - entries.keys())
    if missing:
        if any(f"--{_MATCH_SET}" in rule for rule in missing):
            answer = netns.run_in_new(_compiled_next_to_a_set, family, missing)
        else:
            answer = _compiled_elsewhere(family, missing)
        if len(_remembered) > _MAX_REMEMBERED:
            _remembered.clear()
        made = msgspec.msgpack.decode(answer, type=list[Entry])
        for rule, entry in zip(missing, made, strict=True):
            entries[rule] = _remembered[family, rule] = entry
    return entries


def _compiled_next_to_a_set(family: Family, rules: list[str]) -> bytes:
    # libxtables asks the kernel for the index of a set, so there has to be one: here, where nobody looks.
    ipset.create([ipset.Set(_ANY_SET, ipset.Kind.PORTS, ())])
    return _compiled_elsewhere(family, rules)


def _compiled_elsewhere(family: Family, rules: list[str]) -> bytes:
    prepare()
    deadline_s = _COMPILE_S + len(rules) * _COMPILE_RULE_S
    answer: bytes = isolation.run_in(netns.CURRENT, _compile, family, rules, deadline_s=deadline_s)
    return answer


def _compile(family: Family, rules: list[str]) -> bytes:
    return msgspec.msgpack.encode([_compiled_rule(family, rule) for rule in rules])


_MATCH_SET = "match-set"
_ANY_SET = "any"


class _Option(NamedTuple):
    """An option of a match or a target, without its dashes."""

    name: str
    inverted: bool
    values: list[str]


class _Extension(NamedTuple):
    """-m for a match, -j for a target, -g for a chain that does not come back here."""

    kind: str
    name: str
    options: list[_Option]


class _Spec(NamedTuple):
    """The words of a rule, sorted."""

    header: dict[str, tuple[str, bool]]
    """What is said about -s, -d, -i, -o and -p, and whether not."""
    extensions: list[_Extension]


_HEADER_OPTIONS = ("-s", "-d", "-i", "-o", "-p")


def _spec(rule: str) -> _Spec:
    header: dict[str, tuple[str, bool]] = {}
    extensions: list[_Extension] = []
    rest = words(rule)[::-1]
    while rest:
        inverted = rest[-1] == "!"
        if inverted:
            rest.pop()
        option = rest.pop()
        if option in _HEADER_OPTIONS and option not in header:
            header[option] = (rest.pop(), inverted)
        elif option in ("-m", "-j", "-g") and not inverted:
            extensions.append(_Extension(option, rest.pop(), []))
        elif option.startswith("--") and extensions:
            values = []
            while rest and rest[-1] != "!" and not rest[-1].startswith("-"):
                values.append(rest.pop())
            extensions[-1].options.append(_Option(option[2:], inverted, values))
        else:
            raise ValueError(f"{option} is not understood")
    if [extension.kind != "-m" for extension in extensions].count(True) != 1:
        raise ValueError("it has not exactly one target")
    return _Spec(header, extensions)


def _compiled_rule(family: Family, rule: str) -> Entry:
    try:
        spec = _spec(rule)
        raw, sets = _raw_entry(family, spec)
    except Exception as error:
        # The library raises what it has at hand: ValueError, AttributeError, XTablesError, ...
        raise KernelError(f"cannot write the rule '{rule}': {error}", errno.EINVAL) from error
    target = next(part.name for part in spec.extensions if part.kind != "-m")
    names = iter(sets)
    return _normal(_LAYOUTS[family], raw, target, lambda _: next(names))


def _raw_entry(family: Family, spec: _Spec) -> tuple[bytes, list[str]]:
    """The entry as python-iptables makes it, and the names of the sets that it asks, in order."""
    rule = _libraries().rules[family]()
    header = _header(_LAYOUTS[family], spec.header)
    ctypes.memmove(ctypes.addressof(rule.entry), header, len(header))
    sets = []
    for kind, name, options in spec.extensions:
        is_match = kind == "-m"
        extension = (
            rule.create_match(name) if is_match else rule.create_target(name, goto=kind == "-g")
        )
        for option in options:
            values = option.values
            if option.name == _MATCH_SET:
                sets.append(values[0])
                values = [_ANY_SET, *values[1:]]
            extension.set_parameter(option.name, ["!", *values] if option.inverted else values)
        # Not the public final_check: that writes the parameters out and reads them in again, all through a pipe.
        extension._final_check()
    return bytes(rule.rule), sets


# linux/netfilter_ipv4/ip_tables.h (struct ipt_ip, struct ipt_entry), linux/netfilter_ipv6/ip6_tables.h (struct
# ip6t_ip6, struct ip6t_entry), linux/netfilter/x_tables.h
class _Layout(NamedTuple):
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


_LAYOUTS = {
    Family.IPV4: _Layout(
        4, struct.Struct("=4s4s4s4s16s16s16s16sHBB"), 92, 112, 0x00, 0x02
    ),
    Family.IPV6: _Layout(
        # The byte before the flags is for a type of service, which nothing here looks at.
        6, struct.Struct("=16s16s16s16s16s16s16s16sHxBB3x"), 144, 168, 0x01, 0x04
    ),
}  # fmt: skip
_INVERTED = {"-i": 0x01, "-o": 0x02, "-s": 0x08, "-d": 0x10, "-p": 0x40}
_EXTENSION = struct.Struct("=H29sB")
"""struct xt_entry_match and xt_entry_target: length with this head, name, revision"""
_OFFSETS = struct.Struct("=HH")
"""In an entry, four bytes behind the header: where the target begins and where the next entry does."""
_STANDARD_TARGET = b""
_SET_INDEX_SIZE = 2
"""struct xt_set_info of linux/netfilter/xt_set.h: index, number of dimensions, flags."""
_SET_INVERTED = 0x01
_INTERFACE_BYTES = 16
_PROTOCOLS = {
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
    "ipv6-icmp": socket.IPPROTO_ICMPV6,
}


def _header(layout: _Layout, said: Mapping[str, tuple[str, bool]]) -> bytes:
    inverted = sum(_INVERTED[option] for option, (_, negated) in said.items() if negated)
    values = {option: value for option, (value, _) in said.items()}
    source, source_mask = _address(layout, values.get("-s"))
    destination, destination_mask = _address(layout, values.get("-d"))
    incoming, incoming_mask = _interface(values.get("-i", ""))
    outgoing, outgoing_mask = _interface(values.get("-o", ""))
    protocol = _PROTOCOLS[values["-p"]] if "-p" in values else 0
    flags = layout.has_protocol if protocol else 0
    return layout.header.pack(
        source, destination, source_mask, destination_mask,
        incoming, outgoing, incoming_mask, outgoing_mask,
        protocol, flags, inverted,
    )  # fmt: skip


def _address(layout: _Layout, network: str | None) -> tuple[bytes, bytes]:
    if network is None:
        return b"", b""
    parsed = ipaddress.ip_network(network)
    if parsed.version != layout.version:
        raise ValueError(f"{network} is of another family")
    return parsed.network_address.packed, parsed.netmask.packed


def _interface(name: str) -> tuple[bytes, bytes]:
    encoded = name.encode()
    if len(encoded) >= _INTERFACE_BYTES or name.endswith("+"):
        raise ValueError(f"{name} is not the name of an interface")
    # The end of the name is compared as well, so that it does not match longer ones.
    return encoded, b"\xff" * (len(encoded) + 1) if encoded else b""


def _normal(layout: _Layout, raw: bytes, target: str, set_name: Callable[[int], str]) -> Entry:
    """An entry without what is not the rule's: counters, the kernel's own fields, garbage behind names."""
    data = bytearray(raw)
    target_at, end = _OFFSETS.unpack_from(data, layout.header.size + 4)
    data[layout.header.size : layout.header.size + 4] = bytes(4)
    data[layout.comefrom : layout.size] = bytes(layout.size - layout.comefrom)
    places = []
    at = layout.size
    while at < end:
        size, name, revision = _EXTENSION.unpack_from(data, at)
        name = name.partition(b"\0")[0]
        body = at + _EXTENSION.size
        if at < target_at and name == b"set":
            index = int.from_bytes(data[body : body + _SET_INDEX_SIZE], sys.byteorder)
            places.append((body, set_name(index)))
            data[body : body + _SET_INDEX_SIZE] = bytes(_SET_INDEX_SIZE)
        if at == target_at and name == _STANDARD_TARGET:
            name = target.encode()
            data[body:end] = bytes(end - body)
        _EXTENSION.pack_into(data, at, size, name, revision)
        at += size
    return Entry(bytes(data), tuple(places))


# The kernel's tables, through libiptc. Everything from here to `locked` is for the current namespace.

_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}


def existing(family: Family) -> frozenset[str]:
    """Names of the tables that the namespace has. Others come to life when they are asked for, hooks and all."""
    try:
        return frozenset(Path("/proc/thread-self/net", _NAMES[family]).read_text().split())
    except FileNotFoundError:
        return frozenset()


def content(family: Family, table: str, owned: str, set_names: Mapping[int, str]) -> Content:
    """The chains of a table whose names match the pattern `owned`, and all jumps to them from built-in chains.

    Makes the table where it is not `existing`. Sets are named by their indexes; one without a name is "?".
    KernelError when the table cannot be read.
    """
    with _opened(family, table) as handle:
        return _content(handle, re.compile(owned), set_names)


def replace(
    family: Family, table: str, owned: str, wanted: Content, set_indexes: Mapping[str, int]
) -> None:
    """Have the table hold this and nothing else of what matches `owned`, in one step. The rest stays as it is.

    To be called with the lock held. KernelError when the kernel refuses; the table is then what it was.
    """
    for _ in range(_ATTEMPTS):
        with _opened(family, table) as handle:
            _edit(handle, re.compile(owned), wanted, set_indexes)
            if handle.commit():
                return
    problem = f"table {table} of {family} is being changed by another program, over and over"
    raise KernelError(problem, errno.EAGAIN)


_ATTEMPTS = 10


class _Handle:
    """A table as it was when it was opened, to be changed and loaded again (libiptc/libiptc.h)."""

    def __init__(self, family: Family, table: str) -> None:
        self.layout = _LAYOUTS[family]
        self._binding = _libraries().bindings[family]
        self._table = f"table {table} of {family}"
        size = _size(family, table)
        if size > _MOST:
            problem = f"{self._table} has {size >> 20} MiB of rules, too much to be read"
            raise KernelError(problem, errno.E2BIG)
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
            kinds[not self._binding.iptc_builtin(name, self._handle)].append(name.decode())
        return kinds

    def rules(self, chain: str) -> Iterator[tuple[Any, str]]:
        """The entries of a chain, as pointers, and the names of their targets."""
        entry = self._binding.iptc_first_rule(chain.encode(), self._handle)
        while entry:
            target = self._binding.iptc_get_target(entry, self._handle) or b""
            yield entry, target.decode()
            entry = self._binding.iptc_next_rule(entry, self._handle)

    def flush(self, chain: str) -> None:
        self._changed(self._binding.iptc_flush_entries(chain.encode(), self._handle))

    def delete(self, chain: str) -> None:
        self._changed(self._binding.iptc_delete_chain(chain.encode(), self._handle))

    def create(self, chain: str) -> None:
        self._changed(self._binding.iptc_create_chain(chain.encode(), self._handle))

    def append(self, chain: str, entry: bytes) -> None:
        self._changed(self._binding.iptc_append_entry(chain.encode(), entry, self._handle))

    def insert(self, chain: str, entry: bytes, at: int) -> None:
        self._changed(self._binding.iptc_insert_entry(chain.encode(), entry, at, self._handle))

    def remove(self, chain: str, at: int) -> None:
        self._changed(self._binding.iptc_delete_num_entry(chain.encode(), at, self._handle))

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
        return KernelError(f"cannot {what} {self._table}: {reason}", number)


# linux/netfilter_ipv4/ip_tables.h (IPT_SO_GET_INFO, struct ipt_getinfo), the same for IPv6
_SO_GET_INFO = 64
_INFO = struct.Struct("=32sI5I5III")
_LEVELS = {
    Family.IPV4: (socket.AF_INET, socket.IPPROTO_IP),
    Family.IPV6: (socket.AF_INET6, socket.IPPROTO_IPV6),
}
_MOST = 2**24
"""Bytes of rules that a table may have to be read."""

_libc = ctypes.CDLL(None, use_errno=True)


def _size(family: Family, table: str) -> int:
    """How many bytes a table's rules take; 0 for one that the kernel does not have."""
    protocol, level = _LEVELS[family]
    info = ctypes.create_string_buffer(table.encode(), _INFO.size)
    length = ctypes.c_uint32(_INFO.size)
    with socket.socket(protocol, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        answered = _libc.getsockopt(raw.fileno(), level, _SO_GET_INFO, info, ctypes.byref(length))
    return 0 if answered else int(_INFO.unpack(info.raw)[-1])


@contextmanager
def _opened(family: Family, table: str) -> Iterator[_Handle]:
    handle = _Handle(family, table)
    try:
        yield handle
    finally:
        handle.close()


def _content(handle: _Handle, owned: re.Pattern[str], set_names: Mapping[int, str]) -> Content:
    def normal(pointer: Any, target: str) -> Entry:
        entry = pointer.contents
        raw = ctypes.string_at(ctypes.addressof(entry), entry.next_offset)
        return _normal(handle.layout, raw, target, lambda index: set_names.get(index, "?"))

    built_in, others = handle.chains()
    chains = {
        name: tuple(
            Counted(normal(pointer, target), int(pointer.contents.counters.pcnt))
            for pointer, target in handle.rules(name)
        )
        for name in others
        if owned.fullmatch(name)
    }
    jumps = tuple(
        InstalledJump(name, position, normal(pointer, target))
        for name in (*built_in, *(other for other in others if other not in chains))
        for position, (pointer, target) in enumerate(handle.rules(name), 1)
        if target in chains
    )
    return Content(chains, tuple(sorted(jumps)))


def _edit(
    handle: _Handle, owned: re.Pattern[str], wanted: Content, set_indexes: Mapping[str, int]
) -> None:
    names = {index: name for name, index in set_indexes.items()}
    present = _content(handle, owned, names)
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
        if name not in set_indexes:
            raise KernelError(f"there is no set {name}", errno.ENOENT)
        index = set_indexes[name].to_bytes(_SET_INDEX_SIZE, sys.byteorder)
        data[place : place + _SET_INDEX_SIZE] = index
    return bytes(data)


_LOCK_FILE = "/run/xtables.lock"
"""Where iptables-legacy has it (XT_LOCK_NAME), unless XTABLES_LOCKFILE in the environment names another."""
_LOCK_POLL_S = 0.002


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock by which programs that change legacy tables wait for each other, in any namespace.

    KernelError when another one does not let go of it in LOCK_WAIT_S.
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
                problem = (
                    f"another program holds the xtables lock {path} for {LOCK_WAIT_S:g} s or more"
                )
                raise KernelError(problem, errno.EAGAIN) from error
            time.sleep(_LOCK_POLL_S)
        else:
            return


# Spelling: from entries to words, for people.


def comments(family: Family, entry: Entry) -> tuple[str, ...]:
    """The texts of a rule's comments, in order."""
    return tuple(
        part[_EXTENSION.size :].partition(b"\0")[0].decode(errors="replace")
        for kind, name, part in _parts(_LAYOUTS[family], entry)
        if (kind, name) == ("-m", "comment")
    )


def goes_elsewhere(family: Family, entry: Entry) -> bool:
    """Whether a rule continues in another chain that does not come back (-g)."""
    layout = _LAYOUTS[family]
    _, flags, _ = layout.header.unpack_from(entry.data)[-3:]
    return bool(flags & layout.goes_to)


def spelled(family: Family, entries: Iterable[Entry]) -> list[str]:
    """The words of rules as iptables-save(8) would write them. From any thread; KernelError."""
    prepare()
    answer = isolation.run_in(netns.CURRENT, _spelled, family, tuple(entries))
    return [str(words) for words in answer]


def _spelled(family: Family, entries: tuple[Entry, ...]) -> list[str]:
    return [" ".join(_spell(family, entry)) for entry in entries]


def _spell(family: Family, entry: Entry) -> Iterator[str]:
    layout = _LAYOUTS[family]
    rule = _libraries().rules[family]()
    ctypes.memmove(ctypes.addressof(rule.entry), entry.data, layout.size)
    yield from _spelled_header(layout, entry)
    sets = iter(name for _, name in entry.sets)
    for kind, name, part in _parts(layout, entry):
        body = part[_EXTENSION.size :]
        goes = kind == "-j" and goes_elsewhere(family, entry)
        yield f"-g {name}" if goes else f"{kind} {name}"
        if name == "set":
            inverted = "! " if body[_SET_INDEX_SIZE + 1] & _SET_INVERTED else ""
            yield f"{inverted}--{_MATCH_SET} {next(sets)} dst"
        elif body.strip(b"\0"):
            yield _saved(rule, kind, part)


def _spelled_header(layout: _Layout, entry: Entry) -> Iterator[str]:
    fields = layout.header.unpack_from(entry.data)
    inverted = fields[-1]

    def said(option: str, value: str) -> str:
        return f"! {option} {value}" if inverted & _INVERTED[option] else f"{option} {value}"

    for option, address, mask in (("-s", fields[0], fields[2]), ("-d", fields[1], fields[3])):
        if any(mask):
            prefix = int.from_bytes(mask, "big").bit_count()
            yield said(option, f"{ipaddress.ip_address(address)}/{prefix}")
    for option, name, mask in (("-i", fields[4], fields[6]), ("-o", fields[5], fields[7])):
        if any(mask):
            shown = name.partition(b"\0")[0].decode(errors="replace")
            yield said(option, shown if mask[len(shown.encode())] else f"{shown}+")
    if fields[8]:
        names = {number: name for name, number in _PROTOCOLS.items()}
        yield said("-p", names.get(fields[8], str(fields[8])))


def _parts(layout: _Layout, entry: Entry) -> Iterator[tuple[str, str, bytes]]:
    """Matches (-m) and the target (-j) of an entry, their names, and each as it is in the entry."""
    target_at, end = _OFFSETS.unpack_from(entry.data, layout.header.size + 4)
    at = layout.size
    while at < end:
        size, name, _ = _EXTENSION.unpack_from(entry.data, at)
        kind = "-m" if at < target_at else "-j"
        yield kind, name.partition(b"\0")[0].decode(errors="replace"), entry.data[at : at + size]
        at += size


def _saved(rule: Any, kind: str, part: bytes) -> str:
    """The options of a match or a target; "" when nobody knows how to write them."""
    libraries = _libraries()
    buffer = ctypes.create_string_buffer(part, len(part))
    try:
        if kind == "-m":
            raw = ctypes.cast(buffer, ctypes.POINTER(libraries.xtables.xt_entry_match)).contents
            extension = libraries.iptc.Match(rule, match=raw)
        else:
            raw = ctypes.cast(buffer, ctypes.POINTER(libraries.xtables.xt_entry_target)).contents
            extension = libraries.iptc.Target(rule, target=raw)
    except libraries.iptc.XTablesError:
        return ""
    # Not the public get_all_parameters: that sorts out what is in the text, and the text is what is wanted.
    text: bytes = extension._get_saved_buf(rule.get_ip()) or b""
    return text.decode(errors="replace").strip()


# The libraries.


class _Libraries(NamedTuple):
    """What is used of python-iptables."""

    iptc: types.ModuleType
    xtables: types.ModuleType
    bindings: dict[Family, Any]
    """The functions of libiptc."""
    rules: dict[Family, Any]
    """Classes for rules that are being made."""


_SHARED = {
    "xtables": ("libxtables.so.12", 12),
    "ip4tc": ("libip4tc.so.2", 2),
    "ip6tc": ("libip6tc.so.2", 2),
}
"""The libraries that python-iptables asks for, and the versions of their interfaces."""
_WRAPPER = "xtwrapper"
"""Its own, which comes with it."""

_loading = threading.Lock()


# A child that forks off must find them loaded or not, but not half (isolation.py).
os.register_at_fork(
    before=_loading.acquire, after_in_parent=_loading.release, after_in_child=_loading.release
)


def prepare() -> None:
    """Load the libraries, as has to be done before isolation.run_in. KernelError when one is missing."""
    _libraries()


def _libraries() -> _Libraries:
    with _loading:
        return _loaded()


@functools.cache
def _loaded() -> _Libraries:
    try:
        helpers = types.ModuleType("iptc.util")
        vars(helpers).update(
            find_library=_find_library,
            find_libc=lambda: ctypes.CDLL(None, mode=ctypes.RTLD_GLOBAL),
            load_kernel=lambda *_: None,
        )
        sys.modules.setdefault("iptc.util", helpers)
        with _extensions_named():
            iptc = importlib.import_module("iptc")
    except OSError as error:
        raise KernelError(f"cannot load the libraries of iptables: {error}") from error
    xtables = importlib.import_module("iptc.xtables")
    made = {"tables": (_Chains(Path(xtables._xtables_libdir)),)}
    return _Libraries(
        iptc=iptc,
        xtables=xtables,
        bindings={
            Family.IPV4: importlib.import_module("iptc.ip4tc").iptc,
            Family.IPV6: importlib.import_module("iptc.ip6tc").ip6tc,
        },
        rules={
            Family.IPV4: type("Rule", (iptc.Rule,), made),
            Family.IPV6: type("Rule6", (iptc.Rule6,), made),
        },
    )


class _Chains:
    """Stands for all tables when python-iptables asks whether a target is a chain: what is no extension is one."""

    def __init__(self, extensions: Path) -> None:
        self._extensions = extensions

    def is_chain(self, name: str) -> bool:
        kinds = ("libxt", "libipt", "libip6t")
        return not any((self._extensions / f"{kind}_{name}.so").exists() for kind in kinds)


def _find_library(*names: str) -> tuple[ctypes.CDLL, int]:
    if names[0] == _WRAPPER:
        spec = importlib.util.find_spec(f"lib{_WRAPPER}")
        if spec is None or spec.origin is None:
            raise OSError(f"lib{_WRAPPER} is not installed")
        return ctypes.CDLL(spec.origin, mode=ctypes.RTLD_GLOBAL), 0
    name, version = _SHARED[names[0]]
    return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL, use_errno=True), version


_EXTENSIONS = "XTABLES_LIBDIR"
"""Where the environment tells libxtables to look for its extensions."""


@contextmanager
def _extensions_named() -> Iterator[None]:
    """Tells python-iptables where the extensions are; libxtables finds them next to itself."""
    if _EXTENSIONS in os.environ:
        yield
        return
    _find_library("xtables")
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next(line.split()[-1] for line in maps if "/libxtables.so." in line)
    os.environ[_EXTENSIONS] = str(Path(library).parent / "xtables")
    try:
        yield
    finally:
        del os.environ[_EXTENSIONS]
