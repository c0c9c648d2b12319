"""The legacy tables (ip_tables, ip6_tables) of the current namespace as the kernel gives them out, without a library.

A table may be anybody's work: it is measured before it is read, nothing is read that is larger than the caller wants,
and nothing is changed. What is changed goes through kernel/xtables.py.
"""

import bisect
import ctypes
import enum
import errno
import itertools
import os
import socket
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

import msgspec

from tidegate.kernel.errors import KernelError


class Family(enum.StrEnum):
    """Each has tables of its own."""

    IPV4 = "ip"
    IPV6 = "ip6"


# linux/netfilter_ipv4/ip_tables.h (struct ipt_ip, struct ipt_entry), linux/netfilter_ipv6/ip6_tables.h (struct
# ip6t_ip6, struct ip6t_entry), linux/netfilter/x_tables.h
class Layout(NamedTuple):
    """Where things are in an entry of one family, and where the kernel is asked for entries."""

    version: int
    """Of the internet protocol."""
    domain: int
    level: int
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

    @property
    def offsets(self) -> int:
        """Where an entry tells where its target begins, and where the next entry does (OFFSETS)."""
        return self.header.size + _NFCACHE_BYTES


_NFCACHE_BYTES = 4
LAYOUTS = {
    Family.IPV4: Layout(
        4, socket.AF_INET, socket.IPPROTO_IP,
        struct.Struct("=4s4s4s4s16s16s16s16sHBB"), 92, 112, 0x00, 0x02,
    ),
    Family.IPV6: Layout(
        # The byte before the flags is for a type of service, which nothing here looks at.
        6, socket.AF_INET6, socket.IPPROTO_IPV6,
        struct.Struct("=16s16s16s16s16s16s16s16sHxBB3x"), 144, 168, 0x01, 0x04,
    ),
}  # fmt: skip
OFFSETS = struct.Struct("=HH")
EXTENSION = struct.Struct("=H29sB")
"""struct xt_entry_match and xt_entry_target: length with this head, name, revision"""


class Size(NamedTuple):
    """How large a table is."""

    length: int
    """In bytes."""
    rules: int
    """With those that chains begin and end with."""

    def __str__(self) -> str:
        return f"{self.length} bytes, {self.rules} rules"


class Unread(msgspec.Struct, frozen=True):
    """A table that could not be read without taking too much or too long."""

    why: str
    """One sentence."""
    errno: int
    """E2BIG, or EAGAIN where it changes all the time."""


class Rule(NamedTuple):
    """One entry of a table."""

    target: str
    """What it does, as iptables calls it; "" for a verdict, a jump, or nothing."""
    info: bytes
    """What the target is told."""
    verdict: int | None
    """What it decides (NF_DROP, NF_ACCEPT, ... of linux/netfilter.h); None for a return, a jump, or nothing."""
    goes_to: str | None
    """The chain that it jumps or goes to."""
    to_loopback: bool
    """Whether it is only for destinations that are loopback addresses."""


# linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h
_SO_GET_INFO = 64
_SO_GET_ENTRIES = 65
_INFO = struct.Struct("=32sI5I5III")
"""struct ipt_getinfo: name, valid_hooks, hook_entry, underflow, num_entries, size"""
_ENTRIES = struct.Struct("=32sI4x")
"""struct ipt_get_entries up to the entries"""
_INVERTED_DESTINATION = 0x10
"""IPT_INV_DSTIP"""
_PACKETS = struct.Struct("=Q8x")
"""struct xt_counters, with which an entry ends"""
# linux/netfilter/x_tables.h: struct xt_standard_target, struct xt_error_target
_VERDICT = struct.Struct("=i")
_NAME_AT = 2
"""Where in struct xt_entry_target the name is"""
_NAME_BYTES = 30
_CHAIN_HEAD = b"ERROR\0"
"""The target of the entry that a chain begins with, which bears the chain's name, and of a table's last entry."""
_RETURN = -5
"""XT_RETURN: -NF_REPEAT - 1"""
_VERDICTS = {-1: "DROP", -2: "ACCEPT", -4: "QUEUE", _RETURN: "RETURN"}
"""What iptables calls the verdicts that the kernel takes (verdict_ok of net/netfilter/x_tables.c)"""
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
"""NF_INET_*"""
_TRIES = 5
"""How often a table is read again that was changed meanwhile."""

_libc = ctypes.CDLL(None, use_errno=True)

_NAMES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}
_NAMES_BYTES = 4096
"""More than the names of all tables take; a family has five."""


def existing(family: Family) -> frozenset[str]:
    """Names of the tables that the namespace has. Others come to life when they are asked for, hooks and all.

    KernelError with EACCES for who is not root there: only root may read them.
    """
    # Not by Path: this is part of every look, and would take 20 us more.
    try:
        names = os.open(f"/proc/thread-self/net/{_NAMES[family]}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return frozenset()
    except PermissionError as error:
        problem = f"only root may ask which legacy tables of {family} there are"
        raise KernelError(problem, errno.EACCES) from error
    try:
        return frozenset(os.read(names, _NAMES_BYTES).decode().split())
    finally:
        os.close(names)


def described(family: Family, table: str) -> str:
    """What sentences call a table."""
    return f"the legacy table {table} of {family}"


class Span(NamedTuple):
    """Where the rules of a chain are, in bytes from the first entry on."""

    begin: int
    end: int
    """Where its policy is, or the return with which it ends."""


class Table:
    """The entries of one table as they were when it was read. A rule is known by where it is.

    The kernel takes any bytes for the name of a chain; those that are no text become surrogates in the names here.
    """

    def __init__(self, family: Family, entries: bytes, hooks: dict[str, Span]) -> None:
        """`hooks` tells where the built-in chain of each hook is."""
        self._layout = LAYOUTS[family]
        self._entries = entries
        self._hooks = hooks
        self._spans: dict[str, Span] = {}
        self._jumps: list[tuple[int, int]] = []
        """Where a rule without an extension as its target is, and where it goes on."""
        self._walk()
        self._begins = {span.begin: name for name, span in self._spans.items()}

    def chains(self) -> tuple[str, ...]:
        """Names of the chains that are not built in; of chains of the same name, all but one bear a number behind #."""
        return tuple(self._spans)

    def hooks(self) -> tuple[str, ...]:
        """The hooks that the table is asked in, as nft calls them."""
        return tuple(self._hooks)

    def drops(self, hook: str) -> bool:
        """Whether the policy of a hook's built-in chain is to drop."""
        return self._rule(self._hooks[hook].end).verdict == 0

    def built_in(self, hook: str) -> Iterator[Rule]:
        """The rules of a hook's built-in chain, in order, without its policy."""
        return map(self._rule, self._within(self._hooks[hook]))

    def rules(self, chain: str) -> Iterator[Rule]:
        """The rules of a chain that is not built in, in order, without the return at its end."""
        return map(self._rule, self.places(chain))

    def places(self, chain: str) -> Iterator[int]:
        """Where the rules of a chain are that is not built in, in order."""
        return self._within(self._spans[chain])

    def jumps_to(self, chains: Collection[str]) -> Iterator[tuple[str, int, int]]:
        """The rules of all other chains that lead to one of these: chain, position from 1 on, and place of each."""
        goals = {self._spans[name].begin for name in chains}
        found = [at for at, goes_on in self._jumps if goes_on in goals]
        built_in = ((hook.upper(), span) for hook, span in self._hooks.items())
        others = ((name, span) for name, span in self._spans.items() if name not in chains)
        for name, span in itertools.chain(built_in, others) if found else ():
            first, last = (bisect.bisect_left(found, edge) for edge in span)
            of_chain = set(found[first:last])
            for position, at in enumerate(self._within(span) if of_chain else (), 1):
                if at in of_chain:
                    yield name, position, at

    def raw(self, at: int) -> bytes:
        """A rule as the kernel has it."""
        return self._entries[at : at + self._length(at)]

    def packets(self, at: int) -> int:
        """How many packets a rule has matched."""
        (packets,) = _PACKETS.unpack_from(self._entries, at + self._layout.size - _PACKETS.size)
        return int(packets)

    def leads_to(self, at: int) -> str:
        """What a rule does without an extension, as iptables calls it: a chain or a verdict; "" for nothing."""
        told = self._told(at)
        if told is None or told == at + self._length(at):
            return ""
        return _VERDICTS.get(told) or self._begins.get(told, f"#{told}")

    def _within(self, span: Span) -> Iterator[int]:
        at = span.begin
        while at < span.end:
            yield at
            at += self._length(at)

    def _walk(self) -> None:
        """Find the chains and the jumps. Tables of others may be long: so nothing is called here that need not be."""
        entries, offsets, end = self._entries, self._layout.offsets, len(self._entries)
        unpack, named = OFFSETS.unpack_from, _NAME_AT
        chain, begin, before, at = "", 0, 0, 0
        while at < end:
            target, length = unpack(entries, at + offsets)
            target += at
            following = at + (length or end)
            first = entries[target + named]
            if first == 0:
                (told,) = _VERDICT.unpack_from(entries, target + EXTENSION.size)
                if told >= 0 and told != following:
                    self._jumps.append((at, told))
            elif first == _CHAIN_HEAD[0] and entries.startswith(_CHAIN_HEAD, target + named):
                if begin:
                    self._spans[chain] = Span(begin, before)
                info = target + EXTENSION.size
                chain, begin = _decoded(entries[info : info + _NAME_BYTES]), following
                if chain in self._spans:
                    chain = f"{chain}#{at}"
            before, at = at, following

    def _length(self, at: int) -> int:
        length: int = OFFSETS.unpack_from(self._entries, at + self._layout.offsets)[1]
        return length or len(self._entries)

    def _target(self, at: int) -> tuple[str, int]:
        """The name of a rule's target, and where the target begins."""
        target = at + OFFSETS.unpack_from(self._entries, at + self._layout.offsets)[0]
        _, name, _ = EXTENSION.unpack_from(self._entries, target)
        return _decoded(name), target

    def _told(self, at: int) -> int | None:
        """What a rule without an extension as its target is told: a verdict, or where it goes on."""
        name, target = self._target(at)
        if name:
            return None
        told: int = _VERDICT.unpack_from(self._entries, target + EXTENSION.size)[0]
        return told

    def _rule(self, at: int) -> Rule:
        name, target = self._target(at)
        info = self._entries[target + EXTENSION.size : at + self._length(at)]
        verdict: int | None = None
        goes_to = None
        told = self._told(at)
        if told is not None and told >= 0:
            # A rule without a target goes on with the next one, which is told as a jump there.
            goes_to = self._begins.get(told) if told != at + self._length(at) else None
        elif told is not None and told != _RETURN:
            verdict = -told - 1
        return Rule(name, info, verdict, goes_to, self._to_loopback(at))

    def _to_loopback(self, at: int) -> bool:
        _, address, _, mask, *_, inverted = self._layout.header.unpack_from(self._entries, at)
        if inverted & _INVERTED_DESTINATION:
            return False
        if len(address) == len(_LOOPBACK_IPV6):
            return bool(address == _LOOPBACK_IPV6 and mask == b"\xff" * len(address))
        return bool(address[0] == _LOOPBACK_IPV4 and mask[0] == 0xFF)


_LOOPBACK_IPV4 = 127
_LOOPBACK_IPV6 = bytes(15) + b"\1"


def _decoded(name: bytes) -> str:
    return name.partition(b"\0")[0].decode(errors="surrogateescape")


def size(family: Family, table: str) -> Size:
    """How large a table is. Makes it where it is not `existing`. KernelError as `read`."""
    with _door(family) as door:
        *_, rules, length = _told_of(door, family, table)
    return Size(length, rules)


def read(
    family: Family, table: str, most_bytes: int, most_rules: int | None = None
) -> Table | Unread:
    """A table as it was at one moment, if it is not larger than that. Makes it where it is not `existing`.

    KernelError when the kernel refuses, or has no such table.
    """
    what = described(family, table)
    with _door(family) as door:
        for _ in range(_TRIES):
            _, valid, *hooks, rules, length = _told_of(door, family, table)
            if length > most_bytes or (most_rules is not None and rules > most_rules):
                return Unread(f"{what} is too large: {Size(length, rules)}", errno.E2BIG)
            buffer = ctypes.create_string_buffer(_ENTRIES.size + length)
            _ENTRIES.pack_into(buffer, 0, table.encode(), length)
            try:
                _ask(door, family, table, _SO_GET_ENTRIES, buffer)
            except KernelError as error:
                # The table has another size meanwhile.
                if error.errno != errno.EAGAIN:
                    raise
                continue
            begins, policies = hooks[: len(_HOOKS)], hooks[len(_HOOKS) :]
            asked = {
                hook: Span(begins[number], policies[number])
                for number, hook in enumerate(_HOOKS)
                if valid & 1 << number
            }
            return Table(family, buffer.raw[_ENTRIES.size :], asked)
    return Unread(f"{what} changes faster than it can be read", errno.EAGAIN)


def _door(family: Family) -> socket.socket:
    try:
        return socket.socket(LAYOUTS[family].domain, socket.SOCK_RAW, socket.IPPROTO_RAW)
    except OSError as error:
        problem = f"cannot ask for the legacy tables of {family}: {error.strerror}"
        raise KernelError(problem, error.errno or 0) from error


def _told_of(door: socket.socket, family: Family, table: str) -> tuple[int, ...]:
    info = ctypes.create_string_buffer(table.encode(), _INFO.size)
    _ask(door, family, table, _SO_GET_INFO, info)
    return _INFO.unpack(info.raw)


_NONE = frozenset({errno.ENOENT, errno.ENOPROTOOPT})
"""What is answered where the kernel lacks a table, or all of the family."""


def _ask(
    door: socket.socket,
    family: Family,
    table: str,
    option: int,
    buffer: "ctypes.Array[ctypes.c_char]",
) -> None:
    length = ctypes.c_uint32(len(buffer))
    level, answer = LAYOUTS[family].level, ctypes.byref(length)
    if _libc.getsockopt(door.fileno(), level, option, buffer, answer) != 0:
        number = ctypes.get_errno()
        why = "this kernel has none" if number in _NONE else os.strerror(number)
        raise KernelError(f"cannot read {described(family, table)}: {why}", number)
