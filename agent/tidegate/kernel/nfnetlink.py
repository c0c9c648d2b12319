"""nf_tables' own messages: what a table holds and counts, in the calling thread's namespace, without a library.

Reading them is safe whatever somebody else put there: nothing is printed and parsed again, and every read has a bound.
Knows the messages of linux/netfilter/nf_tables.h; which tables and rules there should be is not its business.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, ParamSpec, Self, TypeVar

import msgspec

from tidegate.kernel.errors import KernelError

_FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}
"""NFPROTO_* of linux/netfilter.h, by nft's names."""

# linux/netlink.h
_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NLM_F_REQUEST = 0x001
_NLM_F_DUMP_INTR = 0x010
_NLM_F_DUMP = 0x300
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLA_TYPE_MASK = 0x3FFF
_NLMSGHDR = struct.Struct("=IHHII")
_NLATTR = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
# linux/netfilter/nfnetlink.h
_NFGENMSG = struct.Struct("=BBH")
_NFNL_SUBSYS_NFTABLES = 10
_NFNLGRP_NFTABLES = 7
# linux/netfilter/nf_tables.h
_NFT_MSG_GETTABLE = 1
_NFT_MSG_GETCHAIN = 4
_NFT_MSG_GETRULE = 7
_NFT_MSG_GETSET = 10
_NFT_MSG_GETSETELEM = 13
_NFT_MSG_GETGEN = 16
_NFTA_LIST_ELEM = 1
_NFTA_TABLE_NAME, _NFTA_TABLE_FLAGS, _NFTA_TABLE_HANDLE = 1, 2, 4
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_HANDLE, _NFTA_CHAIN_NAME, _NFTA_CHAIN_COUNTERS = 1, 2, 3, 8
_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN, _NFTA_RULE_HANDLE, _NFTA_RULE_EXPRESSIONS = 1, 2, 3, 4
_NFTA_RULE_POSITION, _NFTA_RULE_USERDATA = 6, 7
_NFTA_EXPR_NAME, _NFTA_EXPR_DATA = 1, 2
_NFTA_COUNTER_PACKETS = 2
_NFTA_SET_TABLE, _NFTA_SET_NAME, _NFTA_SET_HANDLE = 1, 2, 16
_NFTA_SET_ELEM_LIST_TABLE, _NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
_NFTA_GEN_ID = 1
# libnftnl/udata.h
_NFTNL_UDATA_RULE_COMMENT = 0

_COUNTER = b"counter\0"
_BUFFER = 2**18
"""More than the kernel puts into one answer (NLMSG_GOODSIZE, and 32 KiB for a part of a dump)."""
_TRIES = 10
"""How often a listing is begun again into which a change came."""
_MOST = 2**24
"""Bytes that an answer may have where nothing else is said."""


class Contents(msgspec.Struct, frozen=True):
    """All that a table is and holds, as the kernel's attributes, without handles and counters.

    To be compared with another one of the same kernel; order counts where it means something.
    """

    objects: tuple[bytes, ...]
    size: int
    """Bytes that were read for it."""


class CountedRule(NamedTuple):
    """A rule with its comment and the packets that its counters counted."""

    chain: str
    comment: str
    packets: int


def generation() -> int:
    """The number of the namespace's rule set: 1 where nobody ever changed it, one more with every transaction."""
    with _Conversation(0) as kernel:
        (answer,) = kernel.ask(_NFT_MSG_GETGEN, b"")
    return int.from_bytes(dict(_attributes(answer))[_NFTA_GEN_ID], "big")


def open_monitor() -> socket.socket:
    """A socket that becomes readable with every change of the namespace's tables; non-blocking, to be closed.

    What it says is nfnetlink; ENOBUFS from reading means that changes were lost, which is a change as well.
    """
    netlink = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
    )
    try:
        netlink.bind((0, 0))
        netlink.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
    except OSError as error:
        netlink.close()
        raise _refusal(error.errno or 0) from error
    return netlink


def table_flags(family: str, name: str) -> int | None:
    """Flags of a table (enum nft_table_flags), None without a table."""
    with _Conversation(_FAMILIES[family]) as kernel:
        table = _table(kernel, name)
    return None if table is None else _flags(table)


def has_chain(family: str, table: str, name: str) -> bool:
    """Whether a table has a chain of this name."""
    with _Conversation(_FAMILIES[family]) as kernel:
        return bool(_chain(kernel, table, name))


def contents(family: str, name: str, chains: Iterable[str], most: int) -> Contents | None:
    """What a table holds, None without a table; what is longer than `most` bytes is cut off somewhere.

    Of its chains only those of these names are read: the table itself tells how many objects it has.
    """
    return _undisturbed(_contents, family, name, tuple(chains), most)


def rules(family: str, name: str) -> list[CountedRule] | None:
    """The rules of a table, in order; None without a table. KernelError when they are longer than 16 MiB."""
    return _undisturbed(_rules, family, name)


_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Disturbed(Exception):
    """A change came into a listing."""


class _Enough(Exception):
    """The kernel has more to say than was wanted."""


class _Conversation:
    """Questions to nf_tables of one family, whose answers may have so many bytes altogether."""

    def __init__(self, family: int, most: int = _MOST) -> None:
        self._family = family
        self._most = most
        self.received = 0
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._netlink.close()

    def ask(self, kind: int, attributes: bytes) -> list[bytes]:
        """The one answer, as attributes; none when there is no such thing."""
        self._send(kind, 0, attributes)
        return [answer for done, answer in self._receive() if not done]

    def dump(self, kind: int, attributes: bytes) -> Iterator[bytes]:
        """All answers, as attributes."""
        self._send(kind, _NLM_F_DUMP, attributes)
        while True:
            for done, answer in self._receive():
                if done:
                    return
                yield answer

    def _send(self, kind: int, flags: int, attributes: bytes) -> None:
        length = _NLMSGHDR.size + _NFGENMSG.size + len(attributes)
        kind |= _NFNL_SUBSYS_NFTABLES << 8
        header = _NLMSGHDR.pack(length, kind, _NLM_F_REQUEST | flags, 0, 0)
        self._netlink.send(header + _NFGENMSG.pack(self._family, 0, 0) + attributes)

    def _receive(self) -> Iterator[tuple[bool, bytes]]:
        """The messages of one datagram: whether it is the end of a dump, and the attributes."""
        datagram = self._netlink.recv(_BUFFER)
        self.received += len(datagram)
        if self.received > self._most:
            raise _Enough
        at = 0
        while at < len(datagram):
            length, kind, flags, _, _ = _NLMSGHDR.unpack_from(datagram, at)
            if flags & _NLM_F_DUMP_INTR:
                raise _Disturbed
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                (number,) = _ERROR.unpack_from(datagram, at + _NLMSGHDR.size)
                if number not in (0, -errno.ENOENT):
                    raise _refusal(-number)
                yield True, b""
                return
            yield False, datagram[at + _NLMSGHDR.size + _NFGENMSG.size : at + length]
            at += (length + 3) & ~3


def _undisturbed(read: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    for _ in range(_TRIES):
        try:
            return read(*args, **kwargs)
        except _Disturbed:
            continue
    raise KernelError("the nftables rules change all the time", errno.EAGAIN)


def _contents(family: str, name: str, chains: tuple[str, ...], most: int) -> Contents | None:
    objects: list[bytes] = []
    with _Conversation(_FAMILIES[family], most) as kernel:
        try:
            objects.extend(_objects(kernel, name, chains))
        except _Enough:
            objects.append(b"")
        return Contents(tuple(objects), kernel.received) if objects else None


def _objects(kernel: _Conversation, name: str, chains: tuple[str, ...]) -> Iterator[bytes]:
    table = _table(kernel, name)
    if table is None:
        return
    yield _without(table, _NFTA_TABLE_HANDLE)
    for chain in chains:
        for found in _chain(kernel, name, chain):
            yield _without(found, _NFTA_CHAIN_HANDLE, _NFTA_CHAIN_COUNTERS)
    for rule in kernel.dump(_NFT_MSG_GETRULE, _text(_NFTA_RULE_TABLE, name)):
        yield _uncounted(rule)
    sets = list(kernel.dump(_NFT_MSG_GETSET, _text(_NFTA_SET_TABLE, name)))
    for found in sets:
        yield _without(found, _NFTA_SET_HANDLE)
    for found in sets:
        set_name = dict(_attributes(found))[_NFTA_SET_NAME]
        asked = _text(_NFTA_SET_ELEM_LIST_TABLE, name)
        asked += _attribute(_NFTA_SET_ELEM_LIST_SET, set_name)
        # A hash table has an order that means nothing.
        yield from sorted(_elements(kernel.dump(_NFT_MSG_GETSETELEM, asked)))


def _elements(answers: Iterable[bytes]) -> Iterator[bytes]:
    for answer in answers:
        elements = dict(_attributes(answer)).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        yield from (element for _, element in _attributes(elements))


def _rules(family: str, name: str) -> list[CountedRule] | None:
    with _Conversation(_FAMILIES[family]) as kernel:
        if _table(kernel, name) is None:
            return None
        try:
            answers = list(kernel.dump(_NFT_MSG_GETRULE, _text(_NFTA_RULE_TABLE, name)))
        except _Enough as enough:
            problem = f"the rules of table {family} {name} are longer than {_MOST // 2**20} MiB"
            raise KernelError(problem, errno.E2BIG) from enough
    return [_counted(answer) for answer in answers]


def _counted(rule: bytes) -> CountedRule:
    parts = dict(_attributes(rule))
    packets = 0
    for _, expression in _attributes(parts.get(_NFTA_RULE_EXPRESSIONS, b"")):
        inner = dict(_attributes(expression))
        if inner[_NFTA_EXPR_NAME] == _COUNTER:
            counts = dict(_attributes(inner[_NFTA_EXPR_DATA]))
            packets += int.from_bytes(counts[_NFTA_COUNTER_PACKETS], "big")
    chain = parts[_NFTA_RULE_CHAIN].rstrip(b"\0").decode(errors="replace")
    return CountedRule(chain, _comment(parts.get(_NFTA_RULE_USERDATA, b"")), packets)


def _comment(userdata: bytes) -> str:
    """The comment in what libnftnl keeps with a rule: entries of a byte kind, a byte length and a value."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == _NFTNL_UDATA_RULE_COMMENT:
            return userdata[at + 2 : at + 2 + length].rstrip(b"\0").decode(errors="replace")
        at += 2 + length
    return ""


def _uncounted(rule: bytes) -> bytes:
    """A rule without its handle, place and counts."""
    kept: list[bytes] = []
    for kind, value in _attributes(rule):
        if kind == _NFTA_RULE_EXPRESSIONS:
            kept.extend(_uncounted_expression(expression) for _, expression in _attributes(value))
        elif kind not in (_NFTA_RULE_HANDLE, _NFTA_RULE_POSITION):
            kept.append(_attribute(kind, value))
    return b"".join(kept)


def _uncounted_expression(expression: bytes) -> bytes:
    named = dict(_attributes(expression)).get(_NFTA_EXPR_NAME) == _COUNTER
    return _without(expression, _NFTA_EXPR_DATA) if named else expression


def _table(kernel: _Conversation, name: str) -> bytes | None:
    found = kernel.ask(_NFT_MSG_GETTABLE, _text(_NFTA_TABLE_NAME, name))
    return found[0] if found else None


def _chain(kernel: _Conversation, table: str, name: str) -> list[bytes]:
    asked = _text(_NFTA_CHAIN_TABLE, table) + _text(_NFTA_CHAIN_NAME, name)
    return kernel.ask(_NFT_MSG_GETCHAIN, asked)


def _flags(table: bytes) -> int:
    return int.from_bytes(dict(_attributes(table)).get(_NFTA_TABLE_FLAGS, b""), "big")


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind = _NLATTR.unpack_from(data, at)
        yield kind & _NLA_TYPE_MASK, data[at + _NLATTR.size : at + length]
        at += (length + 3) & ~3


def _without(data: bytes, *kinds: int) -> bytes:
    return b"".join(
        _attribute(kind, value) for kind, value in _attributes(data) if kind not in kinds
    )


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return _NLATTR.pack(_NLATTR.size + len(value), kind) + value + padding


def _refusal(number: int) -> KernelError:
    return KernelError(f"cannot read nftables: {os.strerror(number)}", number)
