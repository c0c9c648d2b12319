"""What other meshes left in a network namespace, told by the names of their chains and tables.

Consul's rules can be taken away: its chains and the jumps to them, nothing else, in one transaction per table.
Those of Istio, Linkerd and Kuma are only reported. Other programs' rules in the same tables stay as they are.
"""

import enum
import errno
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import assert_never

import msgspec

from tidegate.enforce.redirect.text import shown
from tidegate.kernel import (
    chains,
    legacy_tables,
    netlink,
    netns,
    nf_tables,
    nf_transaction,
    xtables,
)
from tidegate.kernel.chains import Chain, Store
from tidegate.kernel.errors import KernelError
from tidegate.kernel.nf_transaction import Step


class Mesh(enum.StrEnum):
    """Whose rules they are."""

    CONSUL = "Consul"
    ISTIO = "Istio"
    LINKERD = "Linkerd"
    KUMA = "Kuma"


_NAMED = 5
"""Most chains that a sentence names."""


class Foreign(msgspec.Struct, frozen=True):
    """The chains of one mesh in one table."""

    mesh: Mesh
    store: Store
    family: str
    """As nft calls it; of a legacy table ip or ip6."""
    table: str
    chains: tuple[str, ...]

    @property
    def removable(self) -> bool:
        """Whether `remove` takes them away."""
        return self.mesh is Mesh.CONSUL

    def __str__(self) -> str:
        kind = "the legacy table" if self.store is Store.LEGACY else "the nftables table"
        named = ", ".join(self.chains[:_NAMED])
        more = len(self.chains) - _NAMED
        others = f" and {more} more" if more > 0 else ""
        return shown(f"{self.mesh} redirects in {kind} {self.family} {self.table}: {named}{others}")


class Left(msgspec.Struct, frozen=True):
    """What another mesh has in a namespace and keeps there."""

    found: Foreign
    reason: str | None = None
    """Why it could not be taken away; None when that was not tried."""

    def __str__(self) -> str:
        if self.reason is None:
            return str(self.found)
        return f"{self.found}; it cannot be taken away: {shown(self.reason)}"


# Consul sdk/iptables/iptables.go and sdk/nftables/nftables.go
_CONSUL_TABLE = "consul_tproxy"
_CONSUL_CHAINS = frozenset(
    {
        "CONSUL_PROXY_INBOUND",
        "CONSUL_PROXY_IN_REDIRECT",
        "CONSUL_PROXY_OUTPUT",
        "CONSUL_PROXY_REDIRECT",
        "CONSUL_DNS_REDIRECT",
        "CONSUL_NAT_OUTPUT",
        "CONSUL_NAT_PREROUTING",
    }
)
_PREFIXES = {
    "ISTIO_": Mesh.ISTIO,  # istio tools/istio-iptables/pkg/constants
    "PROXY_INIT_": Mesh.LINKERD,  # linkerd2-proxy-init pkg/iptables/iptables.go
    "KUMA_MESH_": Mesh.KUMA,  # kuma pkg/transparentproxy/consts
}
_OTHERS_CHAINS = (
    "ISTIO_INBOUND",
    "ISTIO_IN_REDIRECT",
    "ISTIO_OUTPUT",
    "ISTIO_PRERT",
    "ISTIO_REDIRECT",
    "ISTIO_TPROXY",
    "KUMA_MESH_INBOUND",
    "KUMA_MESH_OUTBOUND",
    "PROXY_INIT_OUTPUT",
    "PROXY_INIT_REDIRECT",
)
_ISTIO_TABLES = "istio-proxy-"
"""What the names of the tables of Istio's nftables backend begin with."""


def _sought() -> Iterator[Chain]:
    for family in ("ip", "ip6", "inet"):
        for table in ("nat", _CONSUL_TABLE):
            yield from (Chain(Store.NF_TABLES, family, table, name) for name in _CONSUL_CHAINS)
    for family in ("ip", "ip6"):
        for table in ("nat", "mangle", "raw"):
            yield from (Chain(Store.NF_TABLES, family, table, name) for name in _OTHERS_CHAINS)
    for table in ("nat", "mangle", "raw"):
        for name in ("prerouting", "output"):
            yield Chain(Store.NF_TABLES, "inet", f"{_ISTIO_TABLES}{table}", name)


SOUGHT = tuple(_sought())
"""What the meshes are known to make in nf_tables, to be found however many chains there are."""

_MOST_JUMPS = 1000
"""Of more rules that lead to a mesh's chains nobody but an attacker is the author."""
_ATTEMPTS = 5
"""How often a removal is tried again when somebody else changes the tables meanwhile."""


def find(netns_path: str) -> tuple[Foreign, ...]:
    """What other meshes have in the namespace. KernelError when that cannot be told."""
    return recognised(netns.run_in(netns_path, chains.listed, SOUGHT).chains)


def recognised(listed: Iterable[Chain]) -> tuple[Foreign, ...]:
    """Those of the chains that are another mesh's."""
    found: defaultdict[tuple[Mesh, Store, str, str], list[str]] = defaultdict(list)
    for chain in listed:
        mesh = mesh_of(chain)
        if mesh is not None:
            found[mesh, chain.store, chain.family, chain.table].append(chain.name)
    return tuple(Foreign(*place, tuple(sorted(names))) for place, names in sorted(found.items()))


def mesh_of(chain: Chain) -> Mesh | None:
    """Whose chain it is; None for one that no mesh is known by."""
    if chain.name in _CONSUL_CHAINS:
        return Mesh.CONSUL
    if chain.store is Store.NF_TABLES and chain.table.startswith(_ISTIO_TABLES):
        return Mesh.ISTIO
    return next((mesh for prefix, mesh in _PREFIXES.items() if chain.name.startswith(prefix)), None)


def remove(netns_path: str, foreign: Foreign) -> None:
    """Take away what is removable; what is gone already is no error.

    Open connections stay as they are. KernelError when the kernel refuses, or when there is so much in the table that
    it is not searched for jumps; the table is then as it was.
    """
    if foreign.removable:
        place = foreign.family, foreign.table, foreign.chains
        match foreign.store:
            case Store.NF_TABLES:
                netns.run_in(netns_path, _take_out_of_nf_tables, *place)
            case Store.LEGACY:
                netns.run_in(netns_path, _take_out_of_legacy_table, *place)
            case _:
                assert_never(foreign.store)


_RACES = frozenset({errno.ERESTART, errno.ENOENT, errno.EBUSY, errno.EINTR})
"""How the kernel refuses a transaction that was made for what somebody else has changed meanwhile."""


def _take_out_of_nf_tables(family: str, table: str, names: tuple[str, ...]) -> None:
    for attempt in range(_ATTEMPTS):
        is_last = attempt + 1 == _ATTEMPTS
        try:
            if is_last or not _delete_if_theirs(family, table, names):
                nf_transaction.run(_removal(family, table, names))
        except KernelError as error:
            if error.errno not in _RACES or is_last:
                raise
            netlink.pause(attempt)
        else:
            return


def _delete_if_theirs(family: str, table: str, names: tuple[str, ...]) -> bool:
    """Delete a table that is only Consul's, if it is; whether nothing is left to do."""
    generation = nf_tables.generation()
    there = [name for name in names if nf_tables.has_chain(family, table, name)]
    is_theirs = table == _CONSUL_TABLE and nf_tables.object_count(family, table) == len(there)
    if is_theirs:
        # Of nobody who puts something there from now on anything is deleted.
        nf_transaction.run((nf_transaction.deletion(family, table),), generation)
    return is_theirs or not there


def _removal(family: str, table: str, names: tuple[str, ...]) -> tuple[Step, ...]:
    """The transaction that takes the chains, and the jumps to them, out of a table."""
    going = [name for name in names if nf_tables.has_chain(family, table, name)]
    jumps = [
        nf_transaction.rule_deletion(family, table, rule.chain, rule.handle)
        for rule in nf_tables.rules(family, table) or ()
        if rule.chain not in going and rule.targets.intersection(going)
    ]
    if len(jumps) > _MOST_JUMPS:
        problem = f"more than {_MOST_JUMPS} rules of the table {family} {table} lead to {going[0]}"
        raise KernelError(shown(problem), errno.E2BIG)
    return (
        *jumps,
        *(nf_transaction.chain_flush(family, table, name) for name in going),
        *(nf_transaction.chain_deletion(family, table, name) for name in going),
    )


def _take_out_of_legacy_table(family: str, table: str, names: tuple[str, ...]) -> None:
    # Asking for a table that is gone would make it.
    if table in legacy_tables.existing(legacy_tables.Family(family)):
        owned = "|".join(re.escape(name) for name in names)
        with xtables.locked():
            xtables.replace(legacy_tables.Family(family), table, owned, xtables.EMPTY, {})
