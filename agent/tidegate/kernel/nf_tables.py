"""nf_tables' own messages: what a table holds and counts, in the calling thread's namespace, without a library.

Reading them is safe whatever somebody else put there: nothing is printed and parsed again, and every read has a bound.
Knows the messages of linux/netfilter/nf_tables.h; which tables and rules there should be is not its business.
"""

import errno
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from tidegate.kernel import nfnetlink
from tidegate.kernel.errors import KernelError
from tidegate.kernel.nfnetlink import (
    Conversation,
    Enough,
    attribute,
    attributes_in,
    text_attribute,
    undisturbed,
)

_FAMILIES = {"inet": 1, "ip": 2, "ip6": 10}
"""NFPROTO_* of linux/netfilter.h, by nft's names."""

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
_WHAT = "the nftables rules"


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
    with Conversation(nfnetlink.SUBSYSTEM_NFTABLES, 0, _WHAT) as kernel:
        (answer,) = kernel.ask(_NFT_MSG_GETGEN, b"")
    return int.from_bytes(dict(attributes_in(answer))[_NFTA_GEN_ID], "big")


def open_monitor() -> socket.socket:
    """A socket that becomes readable with every change of the namespace's tables; non-blocking, to be closed.

    What it says is nfnetlink; ENOBUFS from reading means that changes were lost, which is a change as well.
    """
    return nfnetlink.open_monitor(nfnetlink.GROUP_NFTABLES, _WHAT)


def table_flags(family: str, name: str) -> int | None:
    """Flags of a table (enum nft_table_flags), None without a table."""
    with _conversation(family) as kernel:
        table = _table(kernel, name)
    return None if table is None else _flags(table)


def has_chain(family: str, table: str, name: str) -> bool:
    """Whether a table has a chain of this name."""
    with _conversation(family) as kernel:
        return bool(_chain(kernel, table, name))


def contents(family: str, name: str, chains: Iterable[str], most: int) -> Contents | None:
    """What a table holds, None without a table; what is longer than `most` bytes is cut off somewhere.

    Of its chains only those of these names are read: the table itself tells how many objects it has.
    """
    return undisturbed(_WHAT, _contents, family, name, tuple(chains), most)


def rules(family: str, name: str) -> list[CountedRule] | None:
    """The rules of a table, in order; None without a table. KernelError when they are longer than 16 MiB."""
    return undisturbed(_WHAT, _rules, family, name)


def _conversation(family: str, most: int = nfnetlink.MOST_BYTES) -> Conversation:
    return Conversation(nfnetlink.SUBSYSTEM_NFTABLES, _FAMILIES[family], _WHAT, most)


def _dumped(kernel: Conversation, kind: int, asked: bytes) -> Iterator[bytes]:
    return (answer.attributes for answer in kernel.dump(kind, asked))


def _contents(family: str, name: str, chains: tuple[str, ...], most: int) -> Contents | None:
    objects: list[bytes] = []
    with _conversation(family, most) as kernel:
        try:
            objects.extend(_objects(kernel, name, chains))
        except Enough:
            objects.append(b"")
        return Contents(tuple(objects), kernel.received) if objects else None


def _objects(kernel: Conversation, name: str, chains: tuple[str, ...]) -> Iterator[bytes]:
    table = _table(kernel, name)
    if table is None:
        return
    yield _without(table, _NFTA_TABLE_HANDLE)
    for chain in chains:
        for found in _chain(kernel, name, chain):
            yield _without(found, _NFTA_CHAIN_HANDLE, _NFTA_CHAIN_COUNTERS)
    for rule in _dumped(kernel, _NFT_MSG_GETRULE, text_attribute(_NFTA_RULE_TABLE, name)):
        yield _uncounted(rule)
    sets = list(_dumped(kernel, _NFT_MSG_GETSET, text_attribute(_NFTA_SET_TABLE, name)))
    for found in sets:
        yield _without(found, _NFTA_SET_HANDLE)
    for found in sets:
        set_name = dict(attributes_in(found))[_NFTA_SET_NAME]
        asked = text_attribute(_NFTA_SET_ELEM_LIST_TABLE, name)
        asked += attribute(_NFTA_SET_ELEM_LIST_SET, set_name)
        # A hash table has an order that means nothing.
        yield from sorted(_elements(_dumped(kernel, _NFT_MSG_GETSETELEM, asked)))


def _elements(answers: Iterable[bytes]) -> Iterator[bytes]:
    for answer in answers:
        elements = dict(attributes_in(answer)).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        yield from (element for _, element in attributes_in(elements))


def _rules(family: str, name: str) -> list[CountedRule] | None:
    with _conversation(family) as kernel:
        if _table(kernel, name) is None:
            return None
        try:
            answers = list(
                _dumped(kernel, _NFT_MSG_GETRULE, text_attribute(_NFTA_RULE_TABLE, name))
            )
        except Enough as enough:
            problem = f"the rules of table {family} {name} are longer than {nfnetlink.MOST_BYTES // 2**20} MiB"
            raise KernelError(problem, errno.E2BIG) from enough
    return [_counted(answer) for answer in answers]


def _counted(rule: bytes) -> CountedRule:
    parts = dict(attributes_in(rule))
    packets = 0
    for _, expression in attributes_in(parts.get(_NFTA_RULE_EXPRESSIONS, b"")):
        inner = dict(attributes_in(expression))
        if inner[_NFTA_EXPR_NAME] == _COUNTER:
            counts = dict(attributes_in(inner[_NFTA_EXPR_DATA]))
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
    for kind, value in attributes_in(rule):
        if kind == _NFTA_RULE_EXPRESSIONS:
            kept.extend(_uncounted_expression(expression) for _, expression in attributes_in(value))
        elif kind not in (_NFTA_RULE_HANDLE, _NFTA_RULE_POSITION):
            kept.append(attribute(kind, value))
    return b"".join(kept)


def _uncounted_expression(expression: bytes) -> bytes:
    named = dict(attributes_in(expression)).get(_NFTA_EXPR_NAME) == _COUNTER
    return _without(expression, _NFTA_EXPR_DATA) if named else expression


def _table(kernel: Conversation, name: str) -> bytes | None:
    found = kernel.ask(_NFT_MSG_GETTABLE, text_attribute(_NFTA_TABLE_NAME, name))
    return found[0] if found else None


def _chain(kernel: Conversation, table: str, name: str) -> list[bytes]:
    asked = text_attribute(_NFTA_CHAIN_TABLE, table) + text_attribute(_NFTA_CHAIN_NAME, name)
    return kernel.ask(_NFT_MSG_GETCHAIN, asked)


def _flags(table: bytes) -> int:
    return int.from_bytes(dict(attributes_in(table)).get(_NFTA_TABLE_FLAGS, b""), "big")


def _without(data: bytes, *kinds: int) -> bytes:
    return b"".join(
        attribute(kind, value) for kind, value in attributes_in(data) if kind not in kinds
    )
