"""nf_tables' own messages: what a table holds and counts, in the calling thread's namespace, without a library.

Reading them is safe whatever somebody else put there: nothing is printed and parsed again, and every read has a bound.
Knows the messages of linux/netfilter/nf_tables.h that tell; nf_transaction.py knows those that change. Which tables and
rules there should be is not its business.
"""

import errno
import socket
from collections.abc import Container, Iterable, Iterator
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
    text_of,
    undisturbed,
)

FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
"""NFPROTO_* of linux/netfilter.h, by nft's names."""

TABLE_OWNED = 2
"""NFT_TABLE_F_OWNER: only the socket that made the table may change it."""

# linux/netfilter/nf_tables.h
_NFT_MSG_GETTABLE = 1
_NFT_MSG_GETCHAIN = 4
_NFT_MSG_GETRULE = 7
_NFT_MSG_GETSET = 10
_NFT_MSG_GETSETELEM = 13
_NFT_MSG_GETGEN = 16
_NFTA_LIST_ELEM = 1
_NFTA_TABLE_NAME, _NFTA_TABLE_FLAGS, _NFTA_TABLE_USE, _NFTA_TABLE_HANDLE = 1, 2, 3, 4
_NFTA_TABLE_OWNER = 7
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_HANDLE, _NFTA_CHAIN_NAME, _NFTA_CHAIN_COUNTERS = 1, 2, 3, 8
_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN, _NFTA_RULE_HANDLE, _NFTA_RULE_EXPRESSIONS = 1, 2, 3, 4
_NFTA_RULE_POSITION, _NFTA_RULE_USERDATA = 6, 7
_NFTA_EXPR_NAME, _NFTA_EXPR_DATA = 1, 2
_NFTA_COUNTER_PACKETS = 2
_NFTA_IMMEDIATE_DATA = 2
_NFTA_DATA_VERDICT = 2
_NFTA_VERDICT_CHAIN = 2
_NFTA_SET_TABLE, _NFTA_SET_NAME, _NFTA_SET_HANDLE = 1, 2, 16
_NFTA_SET_ELEM_LIST_TABLE, _NFTA_SET_ELEM_LIST_SET, _NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
_NFTA_SET_ELEM_KEY, _NFTA_SET_ELEM_FLAGS = 1, 3
_NFT_SET_ELEM_INTERVAL_END = 1
_NFTA_GEN_ID = 1
# libnftnl/udata.h
_NFTNL_UDATA_RULE_COMMENT = 0

_COUNTER = b"counter\0"
_IMMEDIATE = b"immediate\0"
_WHAT = "the nftables rules"


class Elements(msgspec.Struct, frozen=True):
    """What a set holds."""

    set_name: bytes
    elements: tuple[bytes, ...]
    """By their keys; where one interval ends and another begins, the end is first."""


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """All that a table is and holds, as the kernel's attributes, without handles and counts.

    To be compared with another one of the same kernel, or to be made again elsewhere (nf_transaction.creation).
    """

    table: bytes
    chains: tuple[bytes, ...]
    rules: tuple[bytes, ...]
    """Of all chains; of each of them in its order."""
    sets: tuple[bytes, ...]
    elements: tuple[Elements, ...]
    complete: bool
    """Whether there was no more than was to be read."""

    @property
    def size(self) -> int:
        """In bytes."""
        objects = (self.table, *self.chains, *self.rules, *self.sets)
        held = sum(len(element) for one in self.elements for element in one.elements)
        return sum(map(len, objects)) + held


class Rule(NamedTuple):
    """A rule with its comment, the packets that its counters counted, and the chains that it jumps or goes to."""

    chain: str
    handle: int
    comment: str
    packets: int
    targets: frozenset[str]


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


def table_owner(family: str, name: str) -> int | None:
    """The netlink port of the socket that a table belongs to; None without a table, and for one that is everybody's."""
    with _conversation(family) as kernel:
        table = _table(kernel, name)
    if table is None or not _flags(table) & TABLE_OWNED:
        return None
    return int.from_bytes(dict(attributes_in(table)).get(_NFTA_TABLE_OWNER, b""), "big")


def object_count(family: str, name: str) -> int | None:
    """How many chains, flowtables, and sets, maps and other objects with a name a table has; None without one."""
    with _conversation(family) as kernel:
        table = _table(kernel, name)
    if table is None:
        return None
    return int.from_bytes(dict(attributes_in(table))[_NFTA_TABLE_USE], "big")


def has_chain(family: str, table: str, name: str) -> bool:
    """Whether a table has a chain of this name."""
    with _conversation(family) as kernel:
        return bool(_chain(kernel, table, name))


def contents(family: str, name: str, chains: Iterable[str], most: int) -> Contents | None:
    """What a table holds, None without a table; what is longer than `most` bytes is not complete.

    Of its chains only those of these names are read: the table itself tells how many objects it has. Each kind of
    objects is as it was at one time, but not all kinds at the same time where somebody changes them meanwhile.
    """
    return undisturbed(_WHAT, _contents, family, name, tuple(chains), most)


def rules(family: str, name: str) -> list[Rule] | None:
    """The rules of a table, in order; None without a table. KernelError when they are longer than 16 MiB."""
    return undisturbed(_WHAT, _rules, family, name)


def _conversation(family: str, most: int = nfnetlink.MOST_BYTES) -> Conversation:
    return Conversation(nfnetlink.SUBSYSTEM_NFTABLES, FAMILIES[family], _WHAT, most)


def _dumped(kernel: Conversation, kind: int, asked: bytes) -> Iterator[bytes]:
    return (answer.attributes for answer in kernel.dump(kind, asked))


def _contents(family: str, name: str, chains: tuple[str, ...], most: int) -> Contents | None:
    reading = _Reading()
    with _conversation(family, most) as kernel:
        try:
            _read(reading, kernel, name, chains)
        except Enough:
            complete = False
        else:
            complete = True
    if complete and not reading.table:
        return None
    return Contents(
        table=reading.table,
        chains=tuple(reading.chains),
        rules=tuple(reading.rules),
        sets=tuple(reading.sets),
        elements=tuple(reading.elements),
        complete=complete,
    )


class _Reading:
    """What was read of a table so far."""

    def __init__(self) -> None:
        self.table = b""
        self.chains: list[bytes] = []
        self.rules: list[bytes] = []
        self.sets: list[bytes] = []
        self.elements: list[Elements] = []


def _read(reading: _Reading, kernel: Conversation, name: str, chains: tuple[str, ...]) -> None:
    table = _table(kernel, name)
    if table is None:
        return
    reading.table = _without(table, (_NFTA_TABLE_HANDLE,))
    for chain in chains:
        for found in _chain(kernel, name, chain):
            reading.chains.append(_without(found, (_NFTA_CHAIN_HANDLE, _NFTA_CHAIN_COUNTERS)))
    for rule in _dumped(kernel, _NFT_MSG_GETRULE, text_attribute(_NFTA_RULE_TABLE, name)):
        reading.rules.append(_uncounted(rule))
    for found in _dumped(kernel, _NFT_MSG_GETSET, text_attribute(_NFTA_SET_TABLE, name)):
        reading.sets.append(_without(found, (_NFTA_SET_HANDLE,)))
    for found in reading.sets:
        set_name = dict(attributes_in(found))[_NFTA_SET_NAME]
        asked = text_attribute(_NFTA_SET_ELEM_LIST_TABLE, name)
        asked += attribute(_NFTA_SET_ELEM_LIST_SET, set_name)
        # A hash table has an order that means nothing.
        elements = sorted(_elements(_dumped(kernel, _NFT_MSG_GETSETELEM, asked)), key=_place)
        reading.elements.append(Elements(set_name, tuple(elements)))


def _elements(answers: Iterable[bytes]) -> Iterator[bytes]:
    for answer in answers:
        elements = dict(attributes_in(answer)).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        yield from (element for _, element in attributes_in(elements))


def _place(element: bytes) -> tuple[bytes, bool, bytes]:
    parts = dict(attributes_in(element))
    flags = int.from_bytes(parts.get(_NFTA_SET_ELEM_FLAGS, b""), "big")
    is_end = bool(flags & _NFT_SET_ELEM_INTERVAL_END)
    return parts.get(_NFTA_SET_ELEM_KEY, b""), not is_end, element


def _rules(family: str, name: str) -> list[Rule] | None:
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
    return [_rule(answer) for answer in answers]


def _rule(answer: bytes) -> Rule:
    parts = dict(attributes_in(answer))
    packets = 0
    targets = set()
    for _, expression in attributes_in(parts.get(_NFTA_RULE_EXPRESSIONS, b"")):
        inner = dict(attributes_in(expression))
        if inner[_NFTA_EXPR_NAME] == _COUNTER:
            counts = dict(attributes_in(inner[_NFTA_EXPR_DATA]))
            packets += int.from_bytes(counts[_NFTA_COUNTER_PACKETS], "big")
        elif inner[_NFTA_EXPR_NAME] == _IMMEDIATE:
            targets |= _targets(inner[_NFTA_EXPR_DATA])
    return Rule(
        chain=text_of(parts[_NFTA_RULE_CHAIN]),
        handle=int.from_bytes(parts[_NFTA_RULE_HANDLE], "big"),
        comment=_comment(parts.get(_NFTA_RULE_USERDATA, b"")),
        packets=packets,
        targets=frozenset(targets),
    )


def _targets(immediate: bytes) -> set[str]:
    """The chain in a verdict, where there is one."""
    data = dict(attributes_in(immediate)).get(_NFTA_IMMEDIATE_DATA, b"")
    verdict = dict(attributes_in(data)).get(_NFTA_DATA_VERDICT, b"")
    chain = dict(attributes_in(verdict)).get(_NFTA_VERDICT_CHAIN)
    return set() if chain is None else {text_of(chain)}


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
            expressions = (
                attribute(_NFTA_LIST_ELEM, _uncounted_expression(expression))
                for _, expression in attributes_in(value)
            )
            kept.append(attribute(kind, b"".join(expressions)))
        elif kind not in (_NFTA_RULE_HANDLE, _NFTA_RULE_POSITION):
            kept.append(attribute(kind, value))
    return b"".join(kept)


def _uncounted_expression(expression: bytes) -> bytes:
    named = dict(attributes_in(expression)).get(_NFTA_EXPR_NAME) == _COUNTER
    return _without(expression, (_NFTA_EXPR_DATA,)) if named else expression


def _table(kernel: Conversation, name: str) -> bytes | None:
    found = kernel.ask(_NFT_MSG_GETTABLE, text_attribute(_NFTA_TABLE_NAME, name))
    return found[0] if found else None


def _chain(kernel: Conversation, table: str, name: str) -> list[bytes]:
    asked = text_attribute(_NFTA_CHAIN_TABLE, table) + text_attribute(_NFTA_CHAIN_NAME, name)
    return kernel.ask(_NFT_MSG_GETCHAIN, asked)


def _flags(table: bytes) -> int:
    return int.from_bytes(dict(attributes_in(table)).get(_NFTA_TABLE_FLAGS, b""), "big")


def _without(data: bytes, kinds: Container[int]) -> bytes:
    return b"".join(
        attribute(kind, value) for kind, value in attributes_in(data) if kind not in kinds
    )
