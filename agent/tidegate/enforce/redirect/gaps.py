"""Ways around the sidecar that stay open although the rules are as they should be, one sentence each.

Left open by the policy itself, by settings and listeners of the workload, or by rules of other programs that the kernel
asks before tidegate's. Which of those really takes something away depends on the packet; the sentences say what can
happen. Rules of other meshes are differences that the engine's `check` tells.
"""

import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path

from tidegate.enforce.redirect import block, foreign, inventory
from tidegate.enforce.redirect.families import HEADER, LABEL, VERSION
from tidegate.enforce.redirect.inventory import Inventory
from tidegate.enforce.redirect.rules import POINTS, Hook, Point, Rules
from tidegate.enforce.redirect.text import shown
from tidegate.intent.policy import Family, Mode, Policy
from tidegate.kernel import chains, effects, links, netns, sockets
from tidegate.kernel.chains import Base, Chain, Store
from tidegate.kernel.effects import Asked, Effect
from tidegate.kernel.netlink import Enough

_TRACKED_AT = -200
"""Where connection tracking begins (NF_IP_PRI_CONNTRACK)."""
_LOOSE = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
MOST_TOLD = 20
"""Most chains of other programs that are told one by one."""


def of_policy(netns_path: str, policy: Policy) -> Iterator[str]:
    """What the policy leaves open for the workload of a namespace. KernelError when it is gone."""
    # Asking for addresses and routes takes longer than everything else here.
    if policy.dns.enabled or len(policy.families) < len(Family):
        reach = links.reach(netns_path)
        yield from _families(policy, reach)
        yield from _dns(policy, reach)
    yield from _directions(policy)


def of_namespace(netns_path: str, policy: Policy, rules: Rules) -> tuple[str, ...]:
    """What the namespace leaves open where `rules`, those of the policy, are in place.

    KernelError when it is gone, or cannot be looked at.
    """
    return netns.run_in(netns_path, lambda: tuple(_of_namespace(policy, rules)))


def of_unseen(found: Inventory) -> Iterator[str]:
    """What was not looked at."""
    yield from (f"rules of others may be there that nobody sees: {one}" for one in found.unseen)


def _of_namespace(policy: Policy, rules: Rules) -> Iterator[str]:
    if not rules.lists:
        return
    yield from _others(policy, rules)
    if policy.drop_invalid and rules.lines(Hook.INVALID) and _is_strict():
        yield (
            "connections that are older than the rules end: connection tracking does not pick them up "
            "(net.netfilter.nf_conntrack_tcp_loose is 0), and what it cannot place is dropped (drop_invalid)"
        )
    if policy.inbound.enabled:
        yield from _listeners(policy.inbound.port, policy.mode)


def _families(policy: Policy, reach: links.Reach) -> Iterator[str]:
    for family in (family for family in Family if family not in policy.families):
        name, version = LABEL[family], VERSION[family]
        has = [
            address
            for address in reach.addresses
            if ipaddress.ip_address(address).version == version
        ]
        if not has and version in reach.default_routes:
            has = [f"a default route of {name}"]
        if has:
            yield (
                f"{name} is off in the policy and the workload has {', '.join(has)}: "
                f"its {name} traffic goes around the sidecar"
            )


def _directions(policy: Policy) -> Iterator[str]:
    inbound, outbound = policy.inbound, policy.outbound
    if not inbound.enabled or inbound.include_ports == ():
        yield "inbound redirection is off in the policy: connections to the workload go around the sidecar"
    if not outbound.enabled or (outbound.include_cidrs == () and not outbound.include_ports):
        yield "outbound redirection is off in the policy: connections of the workload go around the sidecar"


def _dns(policy: Policy, reach: links.Reach) -> Iterator[str]:
    dns = policy.dns
    if not dns.enabled:
        return
    served = {ipaddress.ip_address(address).version for address in dns.addresses}
    asked = {ipaddress.ip_address(address).version for address in dns.resolvers or reach.addresses}
    for family in policy.families:
        if VERSION[family] in asked - served:
            name = LABEL[family]
            yield f"DNS queries over {name} are not redirected: the policy has no {name} address to send them to"


def _is_strict() -> bool:
    try:
        return _LOOSE.read_text().strip() == "0"
    except FileNotFoundError:
        return False


def _listeners(port: int, mode: Mode) -> Iterator[str]:
    try:
        found = {one.transparent for one in sockets.listeners() if one.port == port}
    except Enough:
        yield f"more sockets listen than are looked at: who listens on port {port} is not known"
        return
    if mode is Mode.TPROXY and False in found:
        yield (
            f"a listener on port {port} is not transparent: in mode tproxy no connection is handed to it, "
            "and those to the workload get no answer"
        )
    if mode is Mode.REDIRECT and True in found:
        yield (
            f"a listener on port {port} is transparent: in mode redirect a client that uses one port towards "
            "two of the workload's ports hangs"
        )


def _others(policy: Policy, rules: Rules) -> Iterator[str]:
    """What rules of other programs can do to connections before tidegate's rules see them, or instead of them."""
    listing = chains.of_nf_tables()
    sentences = [
        sentence
        for asked in effects.asked(listing.chains, known=_is_known, own=_is_own)
        if _concerns(asked, rules.families)
        for sentence in _told(asked, policy, rules)
    ]
    yield from sentences[:MOST_TOLD]
    if len(sentences) > MOST_TOLD:
        yield f"{len(sentences) - MOST_TOLD} more rules of other programs may come before tidegate's"


def _is_own(chain: Chain) -> bool:
    return inventory.owner(chain) is not None or _is_of_block(chain)


def _is_of_block(chain: Chain) -> bool:
    return chain.table in block.TABLES and chain.base is not None and chain.base.drops


def _is_known(chain: Chain) -> bool:
    return _is_own(chain) or foreign.mesh_of(chain) is not None


def _concerns(asked: Asked, families: Iterable[Family]) -> bool:
    of_one = {HEADER[family] for family in Family} - {HEADER[family] for family in families}
    return asked.family in ("ip", "ip6", "inet", "netdev") and asked.family not in of_one


def _told(asked: Asked, policy: Policy, rules: Rules) -> Iterator[str]:
    kind = "legacy" if asked.store is Store.LEGACY else "nftables"
    where = f"chain {shown(asked.name)} of the {kind} table {asked.family} {shown(asked.table)}"
    hook = asked.base.hook
    if not asked.found.is_whole and hook in _SENTENCES:
        yield f"{where} ({hook}) was not looked at to its end: its rules may come before tidegate's"
    yield from (f"{where} {what}" for what in _SENTENCES.get(hook, _nothing)(asked, policy, rules))


def _nothing(_asked: Asked, _policy: Policy, _rules: Rules) -> Iterator[str]:
    yield from ()


def _of_output(asked: Asked, policy: Policy, rules: Rules) -> Iterator[str]:
    base, found = asked.base, asked.found
    own = POINTS[Hook.OUTBOUND]
    if rules.lines(Hook.OUTBOUND) and base.priority <= own.priority:
        if base.kind == "nat":
            does = found.before.anywhere
            # What goes to loopback is left alone but for queries, such as those to Docker's resolver.
            does |= found.before.loopback if policy.dns.enabled else Effect.NONE
            if Effect.TRANSLATE in does:
                yield f"translates connections that the workload opens, and {_turn(base, own)}"
        else:
            yield from _untracked(asked, "that the workload sends")
            yield from _rewritten(asked, "that the workload sends")
            if Effect.HAND_OVER in found.effects.anywhere:
                yield "hands packets that the workload sends to a program (queue) before tidegate's rules see them"
            if policy.proxy.mark and Effect.MARK in found.effects.anywhere:
                yield (
                    "sets marks, and the policy tells the sidecar apart by a mark: connections of others may pass "
                    "for the sidecar's"
                )
    yield from _of_policy(asked, policy)


def _of_prerouting(asked: Asked, policy: Policy, rules: Rules) -> Iterator[str]:
    base, found = asked.base, asked.found
    tproxy = bool(rules.lines(Hook.INBOUND_TPROXY))
    own = POINTS[Hook.INBOUND_TPROXY if tproxy else Hook.INBOUND]
    if base.kind == "nat":
        earlier = base.priority <= POINTS[Hook.INBOUND].priority
        if rules.lines(Hook.INBOUND) and earlier and Effect.TRANSLATE in found.before.anywhere:
            yield f"translates connections that arrive, and {_turn(base, POINTS[Hook.INBOUND])}"
    elif tproxy or rules.lines(Hook.INBOUND):
        if not tproxy:
            yield from _untracked(asked, "that arrive")
        if base.priority <= own.priority:
            yield from _rewritten(asked, "that arrive")
        # Translation leaves a packet with the socket that it was given to.
        given = found.before if tproxy else found.effects
        if Effect.HAND_OVER in given.anywhere and (not tproxy or base.priority <= own.priority):
            yield "hands over packets that arrive (tproxy, queue): they may not come to the sidecar"
    yield from _of_policy(asked, policy)


def _rewritten(asked: Asked, which: str) -> Iterator[str]:
    if Effect.REWRITE in asked.found.effects.anywhere:
        yield f"rewrites packets {which} before tidegate's rules see them"


def _untracked(asked: Asked, which: str) -> Iterator[str]:
    if Effect.UNTRACK in asked.found.effects.anywhere and asked.base.priority < _TRACKED_AT:
        yield (
            f"keeps packets {which} from connection tracking: "
            "connections that would be redirected are dropped"
        )


def _turn(base: Base, own: Point) -> str:
    if base.priority < own.priority:
        return "is asked before tidegate's rules: it decides first"
    return "is asked at the same priority as tidegate's rules: it may decide first"


def _of_policy(asked: Asked, policy: Policy) -> Iterator[str]:
    if asked.base.drops:
        directions = (policy.inbound, policy.outbound)
        ports = sorted({direction.port for direction in directions if direction.enabled})
        yield (
            f"drops what its rules do not accept ({asked.base.hook}): connections to the sidecar's "
            f"ports ({', '.join(map(str, ports))}) have to be accepted there"
        )


def _of_input(asked: Asked, policy: Policy, _rules: Rules) -> Iterator[str]:
    yield from _of_policy(asked, policy)


def _of_device(asked: Asked, _policy: Policy, _rules: Rules) -> Iterator[str]:
    when = "arrive, before" if asked.base.hook == "ingress" else "leave, after"
    words = {
        Effect.REWRITE: "rewrites",
        Effect.HAND_OVER: "hands over",
        Effect.DROP: "drops",
    }
    does = [word for effect, word in words.items() if effect in asked.found.effects.anywhere]
    if asked.base.drops and "drops" not in does:
        does.append("drops")
    if does:
        yield f"{' and '.join(does)} packets that {when} tidegate's rules see them"


_SENTENCES = {
    "output": _of_output,
    "prerouting": _of_prerouting,
    "input": _of_input,
    "ingress": _of_device,
    "egress": _of_device,
}
"""What there is to say of a chain, by its hook."""
