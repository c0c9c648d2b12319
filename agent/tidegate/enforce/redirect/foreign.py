"""What other meshes left in a network namespace, told by the names of their chains and tables.

Consul's rules can be taken away: its chains and the jumps to them, nothing else, in one transaction per table.
Those of Istio, Linkerd and Kuma are only reported. Other programs' rules in the same tables stay as they are.
"""

import enum
import errno
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import assert_never

import msgspec

from tidegate.enforce.redirect.text import shown
from tidegate.kernel import chains, isolation, netns, nftables, xtables
from tidegate.kernel.chains import Chain, Store
from tidegate.kernel.errors import KernelError
from tidegate.kernel.nftables import Object


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
_ISTIO_TABLES = "istio-proxy-"
"""What the names of the tables of Istio's nftables backend begin with."""

_ATTEMPTS = 5
"""How often a removal is tried again when somebody else changes the table meanwhile."""


def find(netns_path: str) -> tuple[Foreign, ...]:
    """What other meshes have in the namespace. KernelError when that cannot be told."""
    return recognised(netns.run_in(netns_path, chains.listed))


def recognised(listed: Iterable[Chain]) -> tuple[Foreign, ...]:
    """Those of the chains that are another mesh's."""
    found: defaultdict[tuple[Mesh, Store, str, str], list[str]] = defaultdict(list)
    for chain in listed:
        mesh = _owner(chain)
        if mesh is not None:
            found[mesh, chain.store, chain.family, chain.table].append(chain.name)
    return tuple(Foreign(*place, tuple(sorted(names))) for place, names in sorted(found.items()))


def remove(netns_path: str, found: Iterable[Foreign]) -> None:
    """Take away those of `found` that are removable; what is gone already is no error.

    Open connections stay as they are. KernelError when the kernel refuses; a table is then as it was.
    """
    for foreign in found:
        if foreign.removable:
            place = foreign.family, foreign.table, foreign.chains
            match foreign.store:
                case Store.NF_TABLES:
                    nftables.prepare()
                    isolation.run_in(netns_path, _take_out_of_nf_tables, *place)
                case Store.LEGACY:
                    netns.run_in(netns_path, _take_out_of_legacy_table, *place)
                case _:
                    assert_never(foreign.store)


def _owner(chain: Chain) -> Mesh | None:
    if chain.name in _CONSUL_CHAINS:
        return Mesh.CONSUL
    if chain.store is Store.NF_TABLES and chain.table.startswith(_ISTIO_TABLES):
        return Mesh.ISTIO
    return next((mesh for prefix, mesh in _PREFIXES.items() if chain.name.startswith(prefix)), None)


def _take_out_of_nf_tables(family: str, table: str, names: tuple[str, ...]) -> None:
    for attempt in range(_ATTEMPTS):
        listed = nftables.list_table(family, table)
        commands = _removal(family, table, frozenset(names), listed or [])
        if not commands:
            return
        try:
            nftables.run(commands)
        except KernelError as error:
            # A rule that was listed is gone, or a new one jumps to a chain.
            if error.errno not in (errno.ENOENT, errno.EBUSY) or attempt + 1 == _ATTEMPTS:
                raise
        else:
            return


def _removal(family: str, table: str, names: frozenset[str], listed: list[Object]) -> list[Object]:
    """The commands of one transaction that takes the chains out of a table; [] without any."""
    place = {"family": family, "table": table}
    objects = [
        (kind, content) for item in listed for kind, content in item.items() if kind != "table"
    ]
    going = [
        content["name"] for kind, content in objects if kind == "chain" and content["name"] in names
    ]
    if not going:
        return []
    if table == _CONSUL_TABLE and all(_chain_of(content) in names for _, content in objects):
        return [{"delete": {"table": {"family": family, "name": table}}}]
    jumps = [
        {"delete": {"rule": {**place, "chain": rule["chain"], "handle": rule["handle"]}}}
        for kind, rule in objects
        if kind == "rule" and rule["chain"] not in names and _targets(rule) & names
    ]
    return [
        *jumps,
        *({"flush": {"chain": {**place, "name": name}}} for name in going),
        *({"delete": {"chain": {**place, "name": name}}} for name in going),
    ]


def _chain_of(content: Object) -> str:
    """The chain that an object of a table is, or is in; the name of any other object."""
    return str(content.get("chain", content.get("name")))


def _targets(rule: Object) -> set[str]:
    """The chains that a rule jumps or goes to."""
    return {
        expression[verdict]["target"]
        for expression in rule["expr"]
        for verdict in ("jump", "goto")
        if verdict in expression
    }


def _take_out_of_legacy_table(family: str, table: str, names: tuple[str, ...]) -> None:
    # Asking for a table that is gone would make it.
    if table in xtables.existing(xtables.Family(family)):
        owned = "|".join(re.escape(name) for name in names)
        with xtables.locked():
            xtables.replace(xtables.Family(family), table, owned, xtables.EMPTY, {})
