"""nf_tables' transactions: tables and what is in them, made and taken away by the kernel's own messages.

No library: what others have in the namespace is neither read nor parsed, and it does not matter how much that is. One
`run` is one transaction in the calling thread's namespace, taken whole or not at all, and on request only if nobody has
changed anything there since. Knows the messages of linux/netfilter/nf_tables.h that change; which tables and rules
there should be is not its business.
"""

import errno
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tidegate.kernel import nf_tables, nfnetlink
from tidegate.kernel import nf_tables_h as h
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import (
    MOST_VALUE_BYTES,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    attributes_in,
    text_attribute,
    text_of,
)
from tidegate.kernel.nf_tables import FAMILIES, Contents, Elements
from tidegate.kernel.nfnetlink import Refusal, Request

# What the kernel tells of an object and takes for a new one: the rest are numbers of its own.
_OF_TABLE = frozenset({h.NFTA_TABLE_NAME, h.NFTA_TABLE_FLAGS, h.NFTA_TABLE_USERDATA})
_OF_CHAIN = frozenset(
    {
        h.NFTA_CHAIN_TABLE,
        h.NFTA_CHAIN_NAME,
        h.NFTA_CHAIN_HOOK,
        h.NFTA_CHAIN_POLICY,
        h.NFTA_CHAIN_TYPE,
        h.NFTA_CHAIN_FLAGS,
        h.NFTA_CHAIN_USERDATA,
    }
)
_OF_RULE = frozenset(
    {h.NFTA_RULE_TABLE, h.NFTA_RULE_CHAIN, h.NFTA_RULE_EXPRESSIONS, h.NFTA_RULE_USERDATA}
)
_OF_SET = frozenset(
    {
        h.NFTA_SET_TABLE,
        h.NFTA_SET_NAME,
        h.NFTA_SET_FLAGS,
        h.NFTA_SET_KEY_TYPE,
        h.NFTA_SET_KEY_LEN,
        h.NFTA_SET_DATA_TYPE,
        h.NFTA_SET_DATA_LEN,
        h.NFTA_SET_DESC,
        h.NFTA_SET_USERDATA,
    }
)


class Step(NamedTuple):
    """One request of a transaction."""

    request: Request
    what: str
    """What a refusal says could not be done."""


def run(steps: Sequence[Step], generation: int | None = None) -> None:
    """Take all the steps at once, or none.

    With a `generation` (nf_tables.generation), only if nobody has changed any table of the namespace since; errno is
    ERESTART otherwise. KernelError with the step that the kernel refuses.
    """
    requests = [step.request for step in steps]
    refusal = nfnetlink.transact(nfnetlink.SUBSYSTEM_NFTABLES, requests, generation)
    if refusal is not None:
        raise _refused(steps, refusal)


def packed(steps: Iterable[Step], generation: int) -> bytes:
    """The message by which `run` has the steps taken, for who takes them again and again."""
    requests = [step.request for step in steps]
    return nfnetlink.packed(nfnetlink.SUBSYSTEM_NFTABLES, requests, generation)


def creation(family: str, contents: Contents) -> Iterator[Step]:
    """Make a table that is not there, with all that it holds: chains, rules with their counts, sets of plain keys."""
    parts = dict(attributes_in(contents.table))
    name = text_of(parts[h.NFTA_TABLE_NAME])
    place = f"table {family} {name}"
    yield _step(
        h.NFT_MSG_NEWTABLE,
        NLM_F_CREATE | NLM_F_EXCL,
        family,
        _only(parts, _OF_TABLE),
        f"create {place}",
    )
    for number, made in enumerate(contents.sets, 1):
        parts = dict(attributes_in(made))
        said = text_of(parts[h.NFTA_SET_NAME])
        told = _only(parts, _OF_SET) + attribute(h.NFTA_SET_ID, number.to_bytes(4, "big"))
        yield _step(h.NFT_MSG_NEWSET, NLM_F_CREATE, family, told, f"create set {said} of {place}")
    for elements in contents.elements:
        yield from _filling(family, name, elements)
    for made in contents.chains:
        parts = dict(attributes_in(made))
        said = text_of(parts[h.NFTA_CHAIN_NAME])
        told = _only(parts, _OF_CHAIN)
        yield _step(
            h.NFT_MSG_NEWCHAIN, NLM_F_CREATE, family, told, f"create chain {said} of {place}"
        )
    for number, made in enumerate(contents.rules, 1):
        parts = dict(attributes_in(made))
        chain = text_of(parts[h.NFTA_RULE_CHAIN])
        told = _only(parts, _OF_RULE)
        what = f"add a rule to chain {chain} of {place} (its rule number {number})"
        yield _step(h.NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, told, what)


def renamed(contents: Contents, name: str) -> Contents:
    """The same table under another name, and without flags: for one that was dormant under its own."""

    def of(kind: int, held: bytes) -> bytes:
        return b"".join(
            text_attribute(kind, name) if each == kind else attribute(each, value)
            for each, value in attributes_in(held)
        )

    table = b"".join(
        attribute(kind, bytes(len(value)) if kind == h.NFTA_TABLE_FLAGS else value)
        for kind, value in attributes_in(of(h.NFTA_TABLE_NAME, contents.table))
    )
    return Contents(
        table=table,
        chains=tuple(of(h.NFTA_CHAIN_TABLE, chain) for chain in contents.chains),
        rules=tuple(of(h.NFTA_RULE_TABLE, rule) for rule in contents.rules),
        sets=tuple(of(h.NFTA_SET_TABLE, one) for one in contents.sets),
        elements=contents.elements,
        complete=contents.complete,
    )


def deletion(family: str, table: str) -> Step:
    """Take a table away that is there, with all that it holds."""
    named = text_attribute(h.NFTA_TABLE_NAME, table)
    return _step(h.NFT_MSG_DELTABLE, 0, family, named, f"delete table {family} {table}")


def clearance(family: str, table: str) -> Step:
    """Have no table of this name, whether or not there is one."""
    named = text_attribute(h.NFTA_TABLE_NAME, table)
    return _step(h.NFT_MSG_DESTROYTABLE, 0, family, named, f"delete table {family} {table}")


def chain_deletion(family: str, table: str, chain: str) -> Step:
    """Take away an empty chain that no rule jumps to."""
    named = text_attribute(h.NFTA_CHAIN_TABLE, table) + text_attribute(h.NFTA_CHAIN_NAME, chain)
    what = f"delete chain {chain} of table {family} {table}"
    return _step(h.NFT_MSG_DELCHAIN, 0, family, named, what)


def chain_flush(family: str, table: str, chain: str) -> Step:
    """Take away all rules of a chain."""
    what = f"flush chain {chain} of table {family} {table}"
    return _step(h.NFT_MSG_DELRULE, 0, family, _rules_of(table, chain), what)


def rule_deletion(family: str, table: str, chain: str, handle: int) -> Step:
    """Take away the rule with this handle (nf_tables.Rule)."""
    told = _rules_of(table, chain) + attribute(h.NFTA_RULE_HANDLE, handle.to_bytes(8, "big"))
    what = f"delete a rule of chain {chain} of table {family} {table}"
    return _step(h.NFT_MSG_DELRULE, 0, family, told, what)


def _filling(family: str, table: str, elements: Elements) -> Iterator[Step]:
    set_name = text_of(elements.set_name)
    for part in _parts(elements.elements):
        told = text_attribute(h.NFTA_SET_ELEM_LIST_TABLE, table)
        told += attribute(h.NFTA_SET_ELEM_LIST_SET, elements.set_name)
        told += attribute(h.NFTA_SET_ELEM_LIST_ELEMENTS, part)
        what = f"add elements to set {set_name} of table {family} {table}"
        yield _step(h.NFT_MSG_NEWSETELEM, NLM_F_CREATE, family, told, what)


def _parts(elements: Iterable[bytes]) -> Iterator[bytes]:
    """The elements in lists that fit into an attribute each."""
    part: list[bytes] = []
    length = 0
    for element in elements:
        packed = attribute(h.NFTA_LIST_ELEM, element)
        if length + len(packed) > MOST_VALUE_BYTES:
            yield b"".join(part)
            part, length = [], 0
        part.append(packed)
        length += len(packed)
    if part:
        yield b"".join(part)


def _rules_of(table: str, chain: str) -> bytes:
    return text_attribute(h.NFTA_RULE_TABLE, table) + text_attribute(h.NFTA_RULE_CHAIN, chain)


def _step(kind: int, flags: int, family: str, attributes: bytes, what: str) -> Step:
    return Step(Request(kind, flags, FAMILIES[family], attributes), what)


def _only(parts: Mapping[int, bytes], kinds: Collection[int]) -> bytes:
    return b"".join([attribute(kind, value) for kind, value in parts.items() if kind in kinds])


def _refused(steps: Sequence[Step], refusal: Refusal) -> KernelError:
    what, owner = "change the nftables rules", ""
    if refusal.request is not None and refusal.request < len(steps):
        step = steps[refusal.request]
        what = step.what
        owner = _owner(step.request) if refusal.errno == errno.EPERM else ""
    if refusal.errno == errno.ERESTART:
        reason = "somebody else has changed them meanwhile"
    else:
        reason = os.strerror(refusal.errno)
    said = f" ({refusal.said})" if refusal.said else ""
    return KernelError(f"nftables: cannot {what}: {reason}{said}{owner}", refusal.errno)


def _owner(refused: Request) -> str:
    """Whose the table is that only its owner may change, as the end of a sentence."""
    name = text_of(dict(attributes_in(refused.attributes))[h.NFTA_TABLE_NAME])
    family = next(family for family, number in FAMILIES.items() if number == refused.family)
    port = nf_tables.table_owner(family, name)
    if port is None:
        return ""
    process = nfnetlink.holder(port) or f"the netlink socket {port} of an unknown process"
    return f", because table {family} {name} belongs to {process}, and only that may change it"
