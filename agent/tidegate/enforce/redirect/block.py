"""Fail closed: nothing but loopback passes a workload's namespace, until it is unblocked.

For a workload that has to be behind its sidecar and cannot be put there. Every packet that arrives or is sent on
another interface than lo is dropped, before any translation, those of open connections too; they go on afterwards,
if their ends have waited so long. Only neighbour discovery passes, so that addresses and routes stay alive. What a
process with CAP_NET_RAW writes past the IP stack is not seen.

Through nftables, in a table of its own, whose messages are those of a twin in a scratch namespace; through the legacy
tables where nf_tables is not there or refuses. Neither touches what redirects, nor do the backends of redirection
touch this.
"""

import errno
import functools
from collections.abc import Iterable
from pathlib import Path

from tidegate.enforce.redirect.backend import Change
from tidegate.kernel import (
    legacy_tables,
    netns,
    nf_tables,
    nf_transaction,
    nfnetlink,
    nftables,
    xtables,
    xtables_rules,
)
from tidegate.kernel.errors import KernelError
from tidegate.kernel.legacy_tables import Family
from tidegate.kernel.nf_tables import Contents
from tidegate.kernel.xtables import Content

TABLE = "tidegate-block"
"""Name of the nftables table, of family inet."""
TABLES = (TABLE, *(f"{TABLE}-{number}" for number in range(1, 8)))
"""Names that it has where another program owns a table of the names before (NFT_TABLE_F_OWNER)."""

_FAMILY = "inet"
_CHAINS = ("arriving", "sent")
# The priority is before that of everything that netfilter itself does (enum nf_ip_hook_priorities).
_RULES = """\
table inet {name} {{
	chain arriving {{
		type filter hook prerouting priority -1000; policy drop;
		iifname "lo" accept
		meta nfproto ipv6 icmpv6 type {{ 133, 134, 135, 136 }} accept
	}}
	chain sent {{
		type filter hook output priority -1000; policy drop;
		oifname "lo" accept
		meta nfproto ipv6 icmpv6 type {{ 133, 134, 135, 136 }} accept
	}}
}}
"""
"""133 to 136: solicitation and advertisement of routers and neighbours (RFC 4861, 4)."""

_LEGACY_TABLE = "raw"
_LEGACY_CHAINS = "TIDEBLOCK_(?:IN|OUT)"
_LEGACY = """\
*raw
:TIDEBLOCK_IN - [0:0]
:TIDEBLOCK_OUT - [0:0]
-I PREROUTING 1 -j TIDEBLOCK_IN
-I OUTPUT 1 -j TIDEBLOCK_OUT
-A TIDEBLOCK_IN -i lo -j RETURN
-A TIDEBLOCK_OUT -o lo -j RETURN
{neighbours}\
-A TIDEBLOCK_IN -j DROP
-A TIDEBLOCK_OUT -j DROP
COMMIT
"""
_NEIGHBOURS = {
    Family.IPV4: "",
    Family.IPV6: "".join(
        f"-A {chain} -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j RETURN\n"
        for chain in ("TIDEBLOCK_IN", "TIDEBLOCK_OUT")
        for kind in (133, 134, 135, 136)
    ),
}

_MOST_BYTES = 2**16
"""More than the table has; a longer one was changed by somebody."""


def block(netns_path: str) -> Change:
    """Let nothing but loopback pass from now on; idempotent.

    KernelError when the namespace is gone, or when the kernel takes neither kind of rules; one family may be blocked
    then, which is better than none.
    """
    netns.identity(netns_path)
    try:
        return _block_by_nftables(netns_path)
    except KernelError as error:
        refused = error
    try:
        return _block_by_legacy_tables(netns_path)
    except KernelError as error:
        problem = f"{netns_path} cannot be blocked: {refused}; {error}"
        raise KernelError(problem, refused.errno or error.errno) from error


def unblock(netns_path: str) -> Change:
    """Let everything pass as before the block; idempotent. Nothing of the block is left.

    KernelError when the kernel refuses one of the two ways of blocking; the other one has then been taken away.
    """
    changes, refusals = [], []
    for unblock_there in (_unblock_by_nftables, _unblock_by_legacy_tables):
        try:
            changes.append(unblock_there(netns_path))
        except KernelError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    return Change.REMOVED if Change.REMOVED in changes else Change.UNCHANGED


def is_blocked(netns_path: str) -> bool:
    """Whether nothing but loopback passes, because of `block`. KernelError when that cannot be told."""
    if netns.run_in(netns_path, _whole_ones):
        return True
    families = netns.run_in(netns_path, _families)
    if netns.run_in(netns_path, _families_with_legacy_table) != families:
        return False
    wanted = _legacy_contents(families)
    return netns.run_in(netns_path, _is_loaded, wanted)


def _block_by_nftables(netns_path: str) -> Change:
    return netns.run_in(netns_path, _create)


def _create() -> Change:
    present = _present()
    if _whole_ones():
        return Change.UNCHANGED
    refusal = KernelError(f"there is no name for the table {TABLE}")
    for name in TABLES:
        steps = (
            nf_transaction.clearance(_FAMILY, name),
            *nf_transaction.creation(_FAMILY, _whole(name)),
        )
        try:
            nf_transaction.run(steps)
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
            refusal = error
        else:
            return Change.REPLACED if name in present else Change.CREATED
    raise refusal


def _unblock_by_nftables(netns_path: str) -> Change:
    return netns.run_in(netns_path, _clear)


def _clear() -> Change:
    going = [name for name in _present() if nf_tables.table_owner(_FAMILY, name) is None]
    if not going:
        return Change.UNCHANGED
    nf_transaction.run([nf_transaction.clearance(_FAMILY, name) for name in going])
    return Change.REMOVED


def _present() -> list[str]:
    """Which tables of these names the current namespace has, whosever they are; none without nf_tables."""
    try:
        return [name for name in TABLES if nf_tables.table_flags(_FAMILY, name) is not None]
    except KernelError as error:
        if error.errno in nfnetlink.NO_SUBSYSTEM:
            return []
        raise


def _whole_ones() -> list[str]:
    """Which tables of the current namespace let nothing but loopback pass."""
    return [name for name in _present() if _contents(name) == _whole(name)]


def _contents(name: str) -> Contents | None:
    return nf_tables.contents(_FAMILY, name, _CHAINS, _MOST_BYTES)


@functools.cache
def _whole(name: str) -> Contents:
    """What the table holds where it was just loaded. KernelError where it cannot be loaded."""

    def load() -> Contents:
        nftables.load(_RULES.format(name=name))
        made = _contents(name)
        if made is None or not made.complete:
            raise KernelError(f"the table {name} cannot be read back", errno.EPROTO)
        return made

    return netns.run_in_new(load)


def _block_by_legacy_tables(netns_path: str) -> Change:
    wanted = _legacy_contents(netns.run_in(netns_path, _families))
    return _loaded(netns_path, wanted)


def _unblock_by_legacy_tables(netns_path: str) -> Change:
    families = netns.run_in(netns_path, _families_with_legacy_table)
    if not families:
        return Change.UNCHANGED
    return _loaded(netns_path, dict.fromkeys(families, xtables.EMPTY))


def _families() -> tuple[Family, ...]:
    """The families that the current namespace can have packets of."""
    six = Path("/proc/thread-self/net/if_inet6").exists()
    return (Family.IPV4, Family.IPV6) if six else (Family.IPV4,)


def _families_with_legacy_table() -> tuple[Family, ...]:
    return tuple(family for family in Family if _LEGACY_TABLE in legacy_tables.existing(family))


def _legacy_contents(families: Iterable[Family]) -> dict[Family, Content]:
    """What the table should hold. KernelError where the libraries for that are missing."""
    tables = {family: xtables_rules.parse(_legacy_text(family)) for family in families}
    return {
        family: xtables_rules.compiled(family, parsed)[_LEGACY_TABLE]
        for family, parsed in tables.items()
    }


def _legacy_text(family: Family) -> str:
    return _LEGACY.format(neighbours=_NEIGHBOURS[family])


def _loaded(netns_path: str, wanted: dict[Family, Content]) -> Change:
    """Have the legacy tables of the namespace hold this of the block, and say what that changed."""
    changes = netns.run_in(netns_path, _load, wanted)
    for change in (Change.REPLACED, Change.CREATED, Change.REMOVED):
        if change in changes:
            return change
    return Change.UNCHANGED


def _load(wanted: dict[Family, Content]) -> list[Change]:
    changes = []
    with xtables.locked():
        for family, content in wanted.items():
            present = xtables.content(family, _LEGACY_TABLE, _LEGACY_CHAINS, {})
            if present.equals(content):
                changes.append(Change.UNCHANGED)
                continue
            xtables.replace(family, _LEGACY_TABLE, _LEGACY_CHAINS, content, {})
            if content.is_empty:
                changes.append(Change.REMOVED)
            elif present.is_empty:
                changes.append(Change.CREATED)
            else:
                changes.append(Change.REPLACED)
    return changes


def _is_loaded(wanted: dict[Family, Content]) -> bool:
    return all(
        xtables.content(family, _LEGACY_TABLE, _LEGACY_CHAINS, {}).equals(content)
        for family, content in wanted.items()
    )
