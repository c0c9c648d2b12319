"""Which chains the current network namespace has, whoever made them: names only, read cheaply.

Reads both stores of the kernel, nf_tables and the legacy tables, with a few system calls and no library. Only
looking changes nothing: a legacy table comes to life when somebody asks for it, so only those are asked for that
the namespace has already.
"""

import ctypes
import enum
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tidegate.kernel import nfnetlink
from tidegate.kernel.errors import KernelError


class Store(enum.StrEnum):
    """Where the kernel keeps a chain."""

    NF_TABLES = "nf_tables"
    """Where nft and iptables-nft write to."""
    LEGACY = "legacy"
    """ip_tables and ip6_tables, where iptables-legacy writes to."""


class Chain(msgspec.Struct, frozen=True, order=True):
    """A chain that somebody made; the built-in ones of legacy tables do not count."""

    store: Store
    family: str
    """As nft calls it: ip, ip6, inet, ...; of a legacy table ip or ip6."""
    table: str
    name: str


def listed() -> tuple[Chain, ...]:
    """The chains of the current namespace. KernelError when they cannot be read."""
    return (*_of_nf_tables(), *_of_legacy_tables())


# linux/netfilter/nf_tables.h
_NFT_MSG_GETCHAIN = 4
_NFTA_CHAIN_TABLE = 1
_NFTA_CHAIN_NAME = 3
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
"""NFPROTO_* of linux/netfilter.h by number."""
_WHAT = "the chains of nf_tables"


def _of_nf_tables() -> tuple[Chain, ...]:
    try:
        return nfnetlink.undisturbed(_WHAT, _dumped)
    except KernelError as error:
        if error.errno in nfnetlink.NO_SUBSYSTEM:
            return ()
        raise
    except nfnetlink.Enough as error:
        problem = f"{_WHAT} are longer than {nfnetlink.MOST_BYTES >> 20} MiB"
        raise KernelError(problem, errno.E2BIG) from error


def _dumped() -> tuple[Chain, ...]:
    with nfnetlink.Conversation(nfnetlink.SUBSYSTEM_NFTABLES, 0, _WHAT) as kernel:
        return tuple(map(_chain, kernel.dump(_NFT_MSG_GETCHAIN)))


def _chain(answer: nfnetlink.Answer) -> Chain:
    attributes = dict(nfnetlink.attributes_in(answer.attributes))
    return Chain(
        Store.NF_TABLES,
        _FAMILIES.get(answer.family, str(answer.family)),
        nfnetlink.text_of(attributes[_NFTA_CHAIN_TABLE]),
        nfnetlink.text_of(attributes[_NFTA_CHAIN_NAME]),
    )


class _Legacy(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two families of legacy tables, and where its entries keep what is read here."""

    family: str
    names: str
    """File below /proc that lists the tables of the namespace."""
    domain: int
    level: int
    target_offset: int
    """Offset of target_offset and next_offset in struct ipt_entry, struct ip6t_entry."""


_LEGACY = (
    _Legacy(
        family="ip",
        names="/proc/thread-self/net/ip_tables_names",
        domain=socket.AF_INET,
        level=socket.IPPROTO_IP,
        target_offset=88,
    ),
    _Legacy(
        family="ip6",
        names="/proc/thread-self/net/ip6_tables_names",
        domain=socket.AF_INET6,
        level=socket.IPPROTO_IPV6,
        target_offset=140,
    ),
)

# linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h
_SO_GET_INFO = 64
_SO_GET_ENTRIES = 65
_INFO = struct.Struct("=32s52x")
"""struct ipt_getinfo; its last field is the size of the entries."""
_ENTRIES = struct.Struct("=32sI4x")
"""struct ipt_get_entries up to the entries"""
_OFFSETS = struct.Struct("=HH")
_ERROR_TARGET = struct.Struct("=H29sB30s")
"""struct xt_error_target: a chain begins with an entry that has one, which bears the chain's name."""
_MOST_BYTES = 2**28
"""More bytes of entries than that are not read but refused; they would be an attempt at this process's memory."""
_ATTEMPTS = 20
"""How often a table is read again that was changed meanwhile."""
_LAST = "ERROR"
"""What the entry that ends a table is called (XT_ERROR_TARGET)."""

_libc = ctypes.CDLL(None, use_errno=True)


def _of_legacy_tables() -> Iterator[Chain]:
    for legacy in _LEGACY:
        try:
            tables = Path(legacy.names).read_text().split()
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = f"cannot read {legacy.names}: {error.strerror}"
            raise KernelError(problem, error.errno or 0) from error
        for table in tables:
            for name in _chains_in(_entries(legacy, table), legacy.target_offset):
                yield Chain(Store.LEGACY, legacy.family, table, name)


def _entries(legacy: _Legacy, table: str) -> bytes:
    with socket.socket(legacy.domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as door:
        for _ in range(_ATTEMPTS):
            info = ctypes.create_string_buffer(_INFO.pack(table.encode()), _INFO.size)
            _ask(door, legacy, table, _SO_GET_INFO, info)
            (size,) = struct.unpack_from("=I", info, _INFO.size - 4)
            if size > _MOST_BYTES:
                problem = f"the legacy table {table} ({legacy.family}) has {size} bytes"
                raise KernelError(f"{problem}, more than {_MOST_BYTES}", errno.E2BIG)
            buffer = ctypes.create_string_buffer(_ENTRIES.size + size)
            _ENTRIES.pack_into(buffer, 0, table.encode(), size)
            try:
                _ask(door, legacy, table, _SO_GET_ENTRIES, buffer)
            except KernelError as error:
                # The table has another size meanwhile.
                if error.errno != errno.EAGAIN:
                    raise
                continue
            return buffer.raw[_ENTRIES.size :]
    raise KernelError(f"table {table} changes faster than it can be read", errno.EBUSY)


def _ask(
    door: socket.socket,
    legacy: _Legacy,
    table: str,
    option: int,
    buffer: "ctypes.Array[ctypes.c_char]",
) -> None:
    length = ctypes.c_uint32(len(buffer))
    answer = ctypes.byref(length)
    if _libc.getsockopt(door.fileno(), legacy.level, option, buffer, answer) != 0:
        number = ctypes.get_errno()
        what = f"cannot read the legacy table {table} ({legacy.family})"
        raise KernelError(f"{what}: {os.strerror(number)}", number)


def _chains_in(entries: bytes, target_offset: int) -> Iterator[str]:
    at = 0
    while at < len(entries):
        target, following = _OFFSETS.unpack_from(entries, at + target_offset)
        if entries[at + target + 2 : at + target + 8] == b"ERROR\0":
            name = nfnetlink.text_of(_ERROR_TARGET.unpack_from(entries, at + target)[3])
            if name != _LAST:
                yield name
        if not following:
            return
        at += following
