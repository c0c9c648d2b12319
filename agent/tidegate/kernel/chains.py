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


# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST = 0x01
_NLM_F_DUMP_INTR = 0x10
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NFT_MSG_GETCHAIN = 10 << 8 | 4
_NFTA_CHAIN_TABLE = 1
_NFTA_CHAIN_NAME = 3
_NLA_TYPE_MASK = 0x3FFF
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
"""NFPROTO_* of linux/netfilter.h by number."""
_MESSAGE = struct.Struct("=IHHII")
"""struct nlmsghdr"""
_NFGENMSG = 4
_ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr"""
_ANSWER = 65536
_ATTEMPTS = 20
"""How often a dump is begun again that a change of the rules interrupted."""

_MOST = 100_000
"""More chains than that are not listed but refused; they would be somebody's attempt at this process's memory."""

_NO_NF_TABLES = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT})
"""What a kernel without nf_tables answers (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg)."""


def _of_nf_tables() -> tuple[Chain, ...]:
    try:
        for _ in range(_ATTEMPTS):
            chains = _dumped()
            if chains is not None:
                return chains
    except OSError as error:
        if error.errno in _NO_NF_TABLES:
            return ()
        raise KernelError(
            f"cannot list the chains of nf_tables: {error.strerror}", error.errno or 0
        ) from error
    raise KernelError("the chains of nf_tables change faster than they can be listed", errno.EBUSY)


def _dumped() -> tuple[Chain, ...] | None:
    """All chains; None when they changed meanwhile. OSError when the kernel refuses."""
    found: list[Chain] = []
    whole = True
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        size = _MESSAGE.size + _NFGENMSG
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        netlink.send(_MESSAGE.pack(size, _NFT_MSG_GETCHAIN, flags, 0, 0) + bytes(_NFGENMSG))
        while True:
            answer = netlink.recv(_ANSWER)
            at = 0
            while at < len(answer):
                length, kind, flags, _, _ = _MESSAGE.unpack_from(answer, at)
                whole = whole and not flags & _NLM_F_DUMP_INTR
                if kind == _NLMSG_DONE:
                    return tuple(found) if whole else None
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", answer, at + _MESSAGE.size)[0]
                    raise OSError(number, os.strerror(number))
                found.append(_chain(answer[at + _MESSAGE.size : at + length]))
                if len(found) > _MOST:
                    raise OSError(errno.E2BIG, f"there are more than {_MOST}")
                at += (length + 3) & ~3


def _chain(body: bytes) -> Chain:
    attributes = dict(_attributes(body[_NFGENMSG:]))
    family = _FAMILIES.get(body[0], str(body[0]))
    return Chain(
        Store.NF_TABLES,
        family,
        _text(attributes[_NFTA_CHAIN_TABLE]),
        _text(attributes[_NFTA_CHAIN_NAME]),
    )


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & _NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="backslashreplace")


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
"""As _MOST, of the entries of one table."""
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
            name = _text(_ERROR_TARGET.unpack_from(entries, at + target)[3])
            if name != _LAST:
                yield name
        if not following:
            return
        at += following
