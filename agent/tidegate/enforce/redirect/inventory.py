"""Whose rules a network namespace has: tidegate's, by backend, and those that other meshes left.

Told by the names of chains. What nf_tables has is remembered until the kernel counts another transaction in the
namespace, so that asking again costs next to nothing; the legacy tables count nothing and are read each time.
"""

import re
from typing import NamedTuple

from tidegate.enforce.redirect import foreign
from tidegate.enforce.redirect.backend import BackendName
from tidegate.enforce.redirect.foreign import Foreign
from tidegate.enforce.redirect.iptables_rules import OWNED, SET_PREFIX
from tidegate.enforce.redirect.nftables_rules import FAMILIES, TABLE
from tidegate.enforce.redirect.recent import Recent
from tidegate.enforce.redirect.rules import Hook
from tidegate.kernel import chains, ipset, netns, nf_tables, nfnetlink
from tidegate.kernel.chains import Chain, Listing, Store
from tidegate.kernel.errors import KernelError


class Inventory(NamedTuple):
    """What was found in a namespace."""

    backends: frozenset[BackendName]
    """Those that have rules there."""
    foreign: tuple[Foreign, ...]
    unseen: tuple[str, ...]
    """What was not looked at, one sentence each."""


_NOTHING = Inventory(frozenset(), (), ())

_SOUGHT = (
    *(Chain(Store.NF_TABLES, family, TABLE, hook) for family in FAMILIES for hook in Hook),
    *foreign.SOUGHT,
)
"""What is found however many chains there are."""

_MOST_SEARCHED_BYTES = 2**26
"""How large a legacy table may be that is searched for what is left in it: as long as that is not known, nothing is
known to be removed."""


class _Seen(NamedTuple):
    generation: int
    inventory: Inventory


_seen: Recent[int, _Seen] = Recent(1024)
"""What nf_tables had when it was last listed, by the cookie of the namespace."""


def taken(netns_path: str) -> Inventory:
    """What the namespace has. KernelError when it is gone, or the kernel refuses."""
    return netns.run_in(netns_path, _taken)


def traces(netns_path: str) -> frozenset[BackendName]:
    """The backends of which anything can be left in the namespace, an empty table for one. KernelError as above."""
    return netns.run_in(netns_path, _traces)


def owner(chain: Chain) -> BackendName | None:
    """The backend that a chain belongs to; None for one that is not tidegate's redirection."""
    match chain.store:
        case Store.LEGACY:
            return BackendName.IPTABLES if re.fullmatch(OWNED, chain.name) else None
        case Store.NF_TABLES:
            own = chain.table == TABLE and chain.family in FAMILIES
            return BackendName.NFTABLES if own else None


def _taken() -> Inventory:
    nf_tables_have, legacy_tables_have = _of_nf_tables(), _told(chains.of_legacy_tables())
    return Inventory(
        nf_tables_have.backends | legacy_tables_have.backends,
        nf_tables_have.foreign + legacy_tables_have.foreign,
        nf_tables_have.unseen + legacy_tables_have.unseen,
    )


def _traces() -> frozenset[BackendName]:
    found = set()
    if _generation() != nf_tables.UNTOUCHED:
        found.add(BackendName.NFTABLES)
    legacy = _told(chains.of_legacy_tables(_MOST_SEARCHED_BYTES))
    # A set that a rule uses goes with the rule.
    has_sets = any(not one.in_use for one in ipset.found(SET_PREFIX))
    if legacy.backends or legacy.unseen or has_sets:
        found.add(BackendName.IPTABLES)
    return frozenset(found)


def _generation() -> int:
    """As nf_tables.generation; in a kernel without nf_tables, nobody has ever changed it."""
    try:
        return nf_tables.generation()
    except KernelError as error:
        if error.errno in nfnetlink.NO_SUBSYSTEM:
            return nf_tables.UNTOUCHED
        raise


def _of_nf_tables() -> Inventory:
    generation = _generation()
    if generation == nf_tables.UNTOUCHED:
        return _NOTHING
    cookie = netns.cookie(netns.CURRENT)
    seen = _seen.get(cookie)
    if seen is not None and seen.generation == generation:
        return seen.inventory
    inventory = _told(chains.of_nf_tables(_SOUGHT))
    # If somebody came between, this is of a later generation, and nobody asks for this one again.
    _seen.put(cookie, _Seen(generation, inventory))
    return inventory


def _told(listing: Listing) -> Inventory:
    owners = frozenset(whose for chain in listing.chains if (whose := owner(chain)) is not None)
    return Inventory(owners, foreign.recognised(listing.chains), listing.unseen)
