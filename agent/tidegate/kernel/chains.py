"""Which chains the current network namespace has, whoever made them: names and hooks, read cheaply.

Reads both stores of the kernel, nf_tables and the legacy tables, with a few system calls and no library. Only
looking changes nothing: a legacy table comes to life when somebody asks for it, so only those are asked for that
the namespace has already.

Whoever may change a namespace's rules can put any number of chains there. So there is a bound on what is looked at,
and that there is more is a part of the answer and no error. Chains that a caller seeks by their names are found
however many others there are.
"""

import enum
import errno
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from tidegate.kernel import legacy_tables, nf_tables, nfnetlink
from tidegate.kernel import nf_tables_h as h
from tidegate.kernel.errors import KernelError
from tidegate.kernel.netlink import Disturbed, Enough, attributes_in, number_of, text_of
from tidegate.kernel.nfnetlink import Conversation

MOST = 1000
"""How many chains of nf_tables are looked at."""

MOST_LEGACY_BYTES = 2**20
"""A legacy table with more bytes of rules than that is not looked at."""


class Store(enum.StrEnum):
    """Where the kernel keeps a chain."""

    NF_TABLES = "nf_tables"
    """Where nft and iptables-nft write to."""
    LEGACY = "legacy"
    """ip_tables and ip6_tables, where iptables-legacy writes to."""


class Base(msgspec.Struct, frozen=True, order=True):
    """By what a chain is asked, and when."""

    kind: str
    """nat, filter or route, as nft calls it."""
    hook: str
    """As nft calls it: prerouting, input, forward, output, postrouting, ingress, egress."""
    priority: int
    """Lower ones are asked earlier."""
    drops: bool
    """Whether its policy is to drop what its rules do not decide on."""


class Chain(msgspec.Struct, frozen=True, order=True):
    """A chain that somebody made; the built-in ones of legacy tables do not count."""

    store: Store
    family: str
    """As nft calls it: ip, ip6, inet, ...; of a legacy table ip or ip6."""
    table: str
    name: str
    base: Base | None = None
    """None for a chain that only other chains lead to."""
    is_empty: bool = False
    """Whether it has no rule, and none leads to it. Of a legacy chain that is not told: False."""


class Listing(NamedTuple):
    """The chains of a namespace, as far as they were looked at."""

    chains: tuple[Chain, ...]
    unseen: tuple[str, ...]
    """What was not looked at, and why, one sentence each; () when everything was."""


def listed(sought: Iterable[Chain] = ()) -> Listing:
    """The chains of the current namespace. Those of `sought` (base and is_empty do not matter) are among them if
    they are in nf_tables.

    KernelError when they cannot be read, not for being many or changing all the time.
    """
    return joined((of_nf_tables(sought), of_legacy_tables()))


def joined(listings: Iterable[Listing]) -> Listing:
    """Several listings as one."""
    parts = tuple(listings)
    return Listing(
        tuple(itertools.chain.from_iterable(part.chains for part in parts)),
        tuple(itertools.chain.from_iterable(part.unseen for part in parts)),
    )


_FAMILIES = {number: name for name, number in nf_tables.FAMILIES.items()}
# linux/netfilter.h
_NF_DROP = 0
_IP_HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")
_HOOKS = {"netdev": ("ingress", "egress"), "arp": ("input", "output", "forward")}
"""NF_INET_*, NF_NETDEV_* and NF_ARP_*, by family where they are not those of IP."""
_WHAT = "read the chains of nf_tables"
_MAY_NOT = (errno.EPERM, errno.EACCES)
"""How the kernel refuses to tell who is not root, or has no CAP_NET_RAW."""
_MOST_BYTES = 2**20
_TRIES = 4
"""How often a listing is begun again into which a change came."""


def of_nf_tables(sought: Iterable[Chain] = ()) -> Listing:
    """Those that nft would list; none in a kernel without nf_tables."""
    try:
        return _of_nf_tables(tuple(sought))
    except KernelError as error:
        if error.errno in nfnetlink.NO_SUBSYSTEM:
            return Listing((), ())
        raise


def _of_nf_tables(sought: tuple[Chain, ...]) -> Listing:
    for _ in range(_TRIES):
        try:
            found, is_all = _dumped()
        except Disturbed:
            continue
        if is_all:
            return Listing(tuple(found), ())
        unseen = f"there are more than {MOST} chains in nf_tables, and not all were looked at"
        break
    else:
        found, unseen = [], "the chains of nf_tables change faster than they can be listed"
    return Listing(tuple(dict.fromkeys((*found, *_asked_for(sought)))), (unseen,))


def _dumped() -> tuple[list[Chain], bool]:
    """As many chains as are looked at, and whether that is all."""
    found: list[Chain] = []
    with Conversation(nfnetlink.SUBSYSTEM_NFTABLES, 0, _WHAT, _MOST_BYTES) as kernel:
        try:
            for answer in kernel.dump(h.NFT_MSG_GETCHAIN):
                if len(found) == MOST:
                    return found, False
                found.append(_chain(answer.family, answer.attributes))
        except Enough:
            return found, False
    return found, True


def _asked_for(sought: Iterable[Chain]) -> Iterator[Chain]:
    """Those of the chains that are there, each asked for by its name."""
    of_table: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for chain in sought:
        of_table[chain.family, chain.table].append(chain.name)
    for (family, table), names in of_table.items():
        number = nf_tables.FAMILIES[family]
        with Conversation(nfnetlink.SUBSYSTEM_NFTABLES, number, _WHAT) as kernel:
            if nf_tables.asked_table(kernel, table) is None:
                continue
            for name in names:
                answer = nf_tables.asked_chain(kernel, table, name)
                if answer is not None:
                    yield _chain(number, answer)


def _chain(family: int, attributes: bytes) -> Chain:
    parts = dict(attributes_in(attributes))
    family_name = _FAMILIES.get(family, str(family))
    return Chain(
        Store.NF_TABLES,
        family_name,
        text_of(parts[h.NFTA_CHAIN_TABLE]),
        text_of(parts[h.NFTA_CHAIN_NAME]),
        _base(family_name, parts),
        is_empty=number_of(parts[h.NFTA_CHAIN_USE]) == 0,
    )


def _base(family: str, chain: dict[int, bytes]) -> Base | None:
    if h.NFTA_CHAIN_HOOK not in chain:
        return None
    hook = dict(attributes_in(chain[h.NFTA_CHAIN_HOOK]))
    names = _HOOKS.get(family, _IP_HOOKS)
    number = number_of(hook[h.NFTA_HOOK_HOOKNUM])
    return Base(
        text_of(chain[h.NFTA_CHAIN_TYPE]),
        names[number] if number < len(names) else str(number),
        int.from_bytes(hook[h.NFTA_HOOK_PRIORITY], "big", signed=True),
        drops=number_of(chain[h.NFTA_CHAIN_POLICY]) == _NF_DROP,
    )


def any_legacy() -> bool:
    """Whether the legacy tables have a chain, or may have one that cannot be seen."""
    return of_legacy_tables() != Listing((), ())


def of_legacy_tables(most: int = MOST_LEGACY_BYTES) -> Listing:
    """Those that iptables-legacy and ip6tables-legacy would list, of all tables with at most so many bytes of rules."""
    found: list[Chain] = []
    unseen: list[str] = []
    for family in legacy_tables.Family:
        try:
            for table in sorted(legacy_tables.existing(family)):
                read = legacy_tables.read(family, table, most)
                if isinstance(read, legacy_tables.Unread):
                    unseen.append(f"{read.why}; it was not looked at")
                else:
                    found += (Chain(Store.LEGACY, family, table, name) for name in read.chains())
        except KernelError as error:
            if error.errno not in _MAY_NOT:
                raise
            unseen.append(f"{error}; they were not looked at")
    return Listing(tuple(found), tuple(unseen))
