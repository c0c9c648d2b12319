"""The legacy tables (ip_tables, ip6_tables) as the kernel gives them out, without a library: chains, rules, policies.

For looking at tables that anybody may have filled: the kernel tells a table's size before it is read, nothing is read
that is larger than the caller wants, and nothing is changed. What is changed goes through kernel/xtables.py.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from tidegate.kernel.errors import KernelError
from tidegate.kernel.nfnetlink import text_of
from tidegate.kernel.xtables import Family


class Unread(msgspec.Struct, frozen=True):
    """A table that could not be read without taking too much or too long."""

    why: str
    """One sentence."""


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


class _Layout(NamedTuple):
    """Where the entries of a family keep what is read here (struct ipt_entry, struct ip6t_entry)."""

    domain: int
    level: int
    address_bytes: int
    inverted: int
    """Offset of invflags"""
    target: int
    """Offset of target_offset and next_offset"""


_LAYOUTS = {
    Family.IPV4: _Layout(socket.AF_INET, socket.IPPROTO_IP, 4, 83, 88),
    Family.IPV6: _Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 16, 132, 140),
}

# linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h
_SO_GET_INFO = 64
_SO_GET_ENTRIES = 65
_INFO = struct.Struct("=32sI5I5III")
"""struct ipt_getinfo: name, valid_hooks, hook_entry, underflow, num_entries, size"""
_ENTRIES = struct.Struct("=32sI4x")
"""struct ipt_get_entries up to the entries"""
_INVERTED_DESTINATION = 0x10
"""IPT_INV_DSTIP"""
_OFFSETS = struct.Struct("=HH")
# linux/netfilter/x_tables.h: struct xt_entry_target, struct xt_standard_target, struct xt_error_target
_TARGET = struct.Struct("=H29sB")
_VERDICT = struct.Struct("=i")
_NAME_BYTES = 30
_ERROR = "ERROR"
"""The target of the entry that a chain begins with, which bears the chain's name, and of a table's last entry."""
_CHAIN_HEAD = b"ERROR\0"
_RETURN = -5
"""XT_RETURN: -NF_REPEAT - 1"""
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
"""NF_INET_*"""
_TRIES = 5
"""How often a table is read again that was changed meanwhile."""

_libc = ctypes.CDLL(None, use_errno=True)


class Table:
    """The entries of one table as they were when it was read."""

    def __init__(
        self,
        family: Family,
        entries: memoryview,
        hooks: dict[str, tuple[int, int]],
    ) -> None:
        """`hooks` tells where the built-in chain of a hook begins, and where its policy is."""
        self._layout = _LAYOUTS[family]
        self._entries = entries
        self._hooks = hooks
        self._begins = {at: name for name, at in self._chains()}
        self._at = {name: at for at, name in self._begins.items()}

    def chains(self) -> tuple[str, ...]:
        """Names of the chains that are not built in."""
        return tuple(self._at)

    def hooks(self) -> tuple[str, ...]:
        """The hooks that the table is asked in, as nft calls them."""
        return tuple(self._hooks)

    def drops(self, hook: str) -> bool:
        """Whether the policy of a hook's built-in chain is to drop."""
        return self._rule(self._hooks[hook][1]).verdict == 0

    def built_in(self, hook: str) -> Iterator[Rule]:
        """The rules of a hook's built-in chain, in order, without its policy."""
        at, policy = self._hooks[hook]
        while at < policy:
            yield self._rule(at)
            at += self._length(at)

    def rules(self, chain: str) -> Iterator[Rule]:
        """The rules of a chain that is not built in, in order, and the return at its end."""
        at = self._at[chain]
        while at < len(self._entries) and self._target(at)[0] != _ERROR:
            yield self._rule(at)
            at += self._length(at)

    def _chains(self) -> Iterator[tuple[str, int]]:
        """Names, and where the rules begin."""
        entries, offsets = self._entries, self._layout.target
        at = 0
        while at < len(entries):
            target, length = _OFFSETS.unpack_from(entries, at + offsets)
            following = at + (length or len(entries))
            named = at + target + 2
            if entries[named : named + len(_CHAIN_HEAD)] == _CHAIN_HEAD and following < len(
                entries
            ):
                info = at + target + _TARGET.size
                yield text_of(bytes(entries[info : info + _NAME_BYTES])), following
            at = following

    def _length(self, at: int) -> int:
        length = _OFFSETS.unpack_from(self._entries, at + self._layout.target)[1]
        return length or len(self._entries)

    def _target(self, at: int) -> tuple[str, bytes]:
        offset, following = _OFFSETS.unpack_from(self._entries, at + self._layout.target)
        _, name, _ = _TARGET.unpack_from(self._entries, at + offset)
        return text_of(name), bytes(self._entries[at + offset + _TARGET.size : at + following])

    def _rule(self, at: int) -> Rule:
        target, info = self._target(at)
        verdict: int | None = None
        goes_to = None
        if not target:
            (told,) = _VERDICT.unpack_from(info)
            if told >= 0:
                # A rule without a target goes on with the next one, which is told as a jump there.
                goes_to = self._begins.get(told) if told != at + self._length(at) else None
            elif told != _RETURN:
                verdict = -told - 1
        return Rule(target, info, verdict, goes_to, self._to_loopback(at))

    def _to_loopback(self, at: int) -> bool:
        size = self._layout.address_bytes
        if self._entries[at + self._layout.inverted] & _INVERTED_DESTINATION:
            return False
        address = self._entries[at + size : at + 2 * size]
        mask = self._entries[at + 3 * size : at + 4 * size]
        if size == len(_LOOPBACK_IPV6):
            return address == _LOOPBACK_IPV6 and mask == b"\xff" * size
        return address[0] == _LOOPBACK_IPV4 and mask[0] == 0xFF


_LOOPBACK_IPV4 = 127
_LOOPBACK_IPV6 = bytes(15) + b"\1"


def read(family: Family, table: str, most: int) -> Table | Unread:
    """A table of the current namespace that is there (xtables.existing), if it has no more bytes than `most`.

    KernelError when the kernel refuses.
    """
    layout = _LAYOUTS[family]
    what = f"the legacy table {table} ({family})"
    with socket.socket(layout.domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as door:
        for _ in range(_TRIES):
            info = ctypes.create_string_buffer(table.encode(), _INFO.size)
            _ask(door, layout, what, _SO_GET_INFO, info)
            _, valid, *hooks, _, size = _INFO.unpack(info.raw)
            if size > most:
                return Unread(f"{what} has {size >> 10} KiB of rules, more than {most >> 10}")
            buffer = ctypes.create_string_buffer(_ENTRIES.size + size)
            _ENTRIES.pack_into(buffer, 0, table.encode(), size)
            try:
                _ask(door, layout, what, _SO_GET_ENTRIES, buffer)
            except KernelError as error:
                # The table has another size meanwhile.
                if error.errno != errno.EAGAIN:
                    raise
                continue
            begins, policies = hooks[: len(_HOOKS)], hooks[len(_HOOKS) :]
            asked = {
                hook: (begins[number], policies[number])
                for number, hook in enumerate(_HOOKS)
                if valid & 1 << number
            }
            return Table(family, memoryview(buffer).cast("B")[_ENTRIES.size :], asked)
    return Unread(f"{what} changes faster than it can be read")


def _ask(
    door: socket.socket,
    layout: _Layout,
    what: str,
    option: int,
    buffer: "ctypes.Array[ctypes.c_char]",
) -> None:
    length = ctypes.c_uint32(len(buffer))
    answer = ctypes.byref(length)
    if _libc.getsockopt(door.fileno(), layout.level, option, buffer, answer) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot read {what}: {os.strerror(number)}", number)
