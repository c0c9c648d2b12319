"""nf_tables' own messages: what a table holds and counts, in the calling thread's namespace, without a library.

Reading them is safe whatever somebody else put there: nothing is printed and parsed again, and every read has a bound.
Knows the messages of linux/netfilter/nf_tables.h that tell; nf_transaction.py knows those that change. Which tables and
rules there should be is not its business.
"""

import errno
import functools
import socket
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import msgspec

from tidegate.kernel import netlink, nfnetlink
from tidegate.kernel import nf_tables_h as h
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    MOST_BYTES,
    Enough,
    attribute,
    attributes_in,
    number_of,
    text_attribute,
    text_of,
    undisturbed,
)
from tidegate.kernel.nfnetlink import Conversation

FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
"""NFPROTO_* of linux/netfilter.h, by nft's names."""

UNTOUCHED = 1
"""The generation of a namespace whose rule set nobody ever changed (nf_tables_api.c, nf_tables_init_net)."""

_COUNTER = b"counter\0"
_IMMEDIATE = b"immediate\0"
_WHAT = "read the nftables rules"


class Elements(msgspec.Struct, frozen=True):
    """What a set holds."""

    set_name: bytes
    elements: tuple[bytes, ...]
    """By their keys; where one interval ends and another begins, the end is first."""


class Contents(msgspec.Struct, frozen=True, kw_only=True, eq=False, dict=True):
    """All that a table is and holds, as the kernel's attributes.

    Equal to another one of the same kernel that differs in handles and counts only; can be made again elsewhere
    (nf_transaction.creation).
    """

    table: bytes
    chains: tuple[bytes, ...]
    rules: tuple[bytes, ...]
    """Of all chains; of each of them in its order."""
    sets: tuple[bytes, ...]
    elements: tuple[Elements, ...]
    complete: bool
    """Whether there was no more than was to be read."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and self._settled == other._settled

    @functools.cached_property
    def _settled(self) -> tuple[object, ...]:
        """What does not change while nobody changes the table. Taking the rest out costs more than reading it."""
        return (
            _without(self.table, (h.NFTA_TABLE_HANDLE,)),
            [_without(one, (h.NFTA_CHAIN_HANDLE, h.NFTA_CHAIN_COUNTERS)) for one in self.chains],
            [_uncounted(one) for one in self.rules],
            [_without(one, (h.NFTA_SET_HANDLE,)) for one in self.sets],
            self.elements,
            self.complete,
        )

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
    """The number of the namespace's rule set: UNTOUCHED at first, one more with every transaction."""
    with Conversation(nfnetlink.SUBSYSTEM_NFTABLES, 0, _WHAT) as kernel:
        answer = kernel.ask(h.NFT_MSG_GETGEN, b"") or b""
    return number_of(dict(attributes_in(answer))[h.NFTA_GEN_ID])


def open_monitor() -> socket.socket:
    """A socket that becomes readable with every change of the namespace's tables; non-blocking, to be closed.

    ENOBUFS from reading means that changes were lost, which is a change as well. Others can make it readable too.
    """
    return netlink.open_monitor(
        netlink.NETLINK_NETFILTER, nfnetlink.GROUP_NFTABLES, "changes of the nftables rules"
    )


def table_flags(family: str, name: str) -> int | None:
    """Flags of a table (enum nft_table_flags), None without a table."""
    with _conversation(family) as kernel:
        table = asked_table(kernel, name)
    return None if table is None else _flags(table)


def table_owner(family: str, name: str) -> int | None:
    """The netlink port of the socket that a table belongs to; None without a table, and for one that is everybody's."""
    with _conversation(family) as kernel:
        table = asked_table(kernel, name)
    if table is None or not _flags(table) & h.NFT_TABLE_F_OWNER:
        return None
    return number_of(dict(attributes_in(table)).get(h.NFTA_TABLE_OWNER, b""))


def object_count(family: str, name: str) -> int | None:
    """How many chains, flowtables, and sets, maps and other objects with a name a table has; None without one."""
    with _conversation(family) as kernel:
        table = asked_table(kernel, name)
    if table is None:
        return None
    return number_of(dict(attributes_in(table))[h.NFTA_TABLE_USE])


def has_chain(family: str, table: str, name: str) -> bool:
    """Whether a table has a chain of this name."""
    with _conversation(family) as kernel:
        return asked_chain(kernel, table, name) is not None


def contents(family: str, name: str, chains: Iterable[str], most: int) -> Contents | None:
    """What a table holds, None without a table; what is longer than `most` bytes is not complete.

    Of its chains only those of these names are read: the table itself tells how many objects it has. Each kind of
    objects is as it was at one time, but not all kinds at the same time where somebody changes them meanwhile.
    """
    return undisturbed(_contents, family, name, tuple(chains), most)


def rules(family: str, name: str) -> list[Rule] | None:
    """The rules of a table, in order; None without a table. KernelError when they are longer than 16 MiB."""
    return undisturbed(_rules, family, name)


def _conversation(family: str, most: int = MOST_BYTES) -> Conversation:
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
    table = asked_table(kernel, name)
    if table is None:
        return
    reading.table = table
    for chain in chains:
        found = asked_chain(kernel, name, chain)
        if found is not None:
            reading.chains.append(found)
    reading.rules.extend(
        _dumped(kernel, h.NFT_MSG_GETRULE, text_attribute(h.NFTA_RULE_TABLE, name))
    )
    reading.sets.extend(_dumped(kernel, h.NFT_MSG_GETSET, text_attribute(h.NFTA_SET_TABLE, name)))
    for found in reading.sets:
        set_name = dict(attributes_in(found))[h.NFTA_SET_NAME]
        asked = elements_of(name, set_name)
        # A hash table has an order that means nothing.
        elements = sorted(_elements(_dumped(kernel, h.NFT_MSG_GETSETELEM, asked)), key=_place)
        reading.elements.append(Elements(set_name, tuple(elements)))


def elements_of(table: str, set_name: bytes) -> bytes:
    """What a question for the elements of a set says, as attributes."""
    asked = text_attribute(h.NFTA_SET_ELEM_LIST_TABLE, table)
    return asked + attribute(h.NFTA_SET_ELEM_LIST_SET, set_name)


def _elements(answers: Iterable[bytes]) -> Iterator[bytes]:
    for answer in answers:
        elements = dict(attributes_in(answer)).get(h.NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        yield from (element for _, element in attributes_in(elements))


def _place(element: bytes) -> tuple[bytes, bool, bytes]:
    parts = dict(attributes_in(element))
    flags = number_of(parts.get(h.NFTA_SET_ELEM_FLAGS, b""))
    is_end = bool(flags & h.NFT_SET_ELEM_INTERVAL_END)
    return parts.get(h.NFTA_SET_ELEM_KEY, b""), not is_end, element


def _rules(family: str, name: str) -> list[Rule] | None:
    with _conversation(family) as kernel:
        if asked_table(kernel, name) is None:
            return None
        try:
            answers = list(
                _dumped(kernel, h.NFT_MSG_GETRULE, text_attribute(h.NFTA_RULE_TABLE, name))
            )
        except Enough as enough:
            problem = (
                f"the rules of table {family} {name} are longer than {MOST_BYTES // 2**20} MiB"
            )
            raise KernelError(problem, errno.E2BIG) from enough
    return [_rule(answer) for answer in answers]


def _rule(answer: bytes) -> Rule:
    parts = dict(attributes_in(answer))
    packets = 0
    targets = set()
    for _, expression in attributes_in(parts.get(h.NFTA_RULE_EXPRESSIONS, b"")):
        inner = dict(attributes_in(expression))
        if inner[h.NFTA_EXPR_NAME] == _COUNTER:
            counts = dict(attributes_in(inner[h.NFTA_EXPR_DATA]))
            packets += number_of(counts[h.NFTA_COUNTER_PACKETS])
        elif inner[h.NFTA_EXPR_NAME] == _IMMEDIATE:
            verdict = verdict_in(dict(attributes_in(inner[h.NFTA_EXPR_DATA])))
            if verdict is not None and verdict.chain is not None:
                targets.add(verdict.chain)
    return Rule(
        chain=text_of(parts[h.NFTA_RULE_CHAIN]),
        handle=number_of(parts[h.NFTA_RULE_HANDLE]),
        comment=_comment(parts.get(h.NFTA_RULE_USERDATA, b"")),
        packets=packets,
        targets=frozenset(targets),
    )


class Verdict(NamedTuple):
    """What a rule decides on."""

    code: int
    """NF_* of linux/netfilter.h, or below 0 NFT_* of linux/netfilter/nf_tables.h (enum nft_verdicts)."""
    chain: str | None
    """Where to, for a jump or a goto."""


def verdict_in(immediate: dict[int, bytes]) -> Verdict | None:
    """What an expression "immediate" decides; None when it loads a value into a register."""
    if number_of(immediate[h.NFTA_IMMEDIATE_DREG]) != h.NFT_REG_VERDICT:
        return None
    data = dict(attributes_in(immediate[h.NFTA_IMMEDIATE_DATA]))
    told = dict(attributes_in(data[h.NFTA_DATA_VERDICT]))
    code = int.from_bytes(told[h.NFTA_VERDICT_CODE], "big", signed=True)
    chain = told.get(h.NFTA_VERDICT_CHAIN)
    return Verdict(code, None if chain is None else text_of(chain))


def _comment(userdata: bytes) -> str:
    """The comment in what libnftnl keeps with a rule: entries of a byte kind, a byte length and a value."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == h.NFTNL_UDATA_RULE_COMMENT:
            return userdata[at + 2 : at + 2 + length].rstrip(b"\0").decode(errors="replace")
        at += 2 + length
    return ""


def _uncounted(rule: bytes) -> bytes:
    """A rule without its handle, place and counts."""
    kept: list[bytes] = []
    for kind, value in attributes_in(rule):
        if kind == h.NFTA_RULE_EXPRESSIONS:
            expressions = (
                attribute(h.NFTA_LIST_ELEM, _uncounted_expression(expression))
                for _, expression in attributes_in(value)
            )
            kept.append(attribute(kind, b"".join(expressions)))
        elif kind not in (h.NFTA_RULE_HANDLE, h.NFTA_RULE_POSITION):
            kept.append(attribute(kind, value))
    return b"".join(kept)


def _uncounted_expression(expression: bytes) -> bytes:
    named = dict(attributes_in(expression)).get(h.NFTA_EXPR_NAME) == _COUNTER
    return _without(expression, (h.NFTA_EXPR_DATA,)) if named else expression


def asked_table(kernel: Conversation, name: str) -> bytes | None:
    """A table of the conversation's family, as attributes; None without one."""
    return kernel.ask(h.NFT_MSG_GETTABLE, text_attribute(h.NFTA_TABLE_NAME, name))


def asked_chain(kernel: Conversation, table: str, name: str) -> bytes | None:
    """A chain of a table of the conversation's family, as attributes; None without one."""
    asked = text_attribute(h.NFTA_CHAIN_TABLE, table) + text_attribute(h.NFTA_CHAIN_NAME, name)
    return kernel.ask(h.NFT_MSG_GETCHAIN, asked)


def _flags(table: bytes) -> int:
    return number_of(dict(attributes_in(table)).get(h.NFTA_TABLE_FLAGS, b""))


def _without(data: bytes, kinds: Container[int]) -> bytes:
    return b"".join(
        attribute(kind, value) for kind, value in attributes_in(data) if kind not in kinds
    )
