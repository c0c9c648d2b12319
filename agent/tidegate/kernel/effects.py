"""What rules can do to packets, whoever made them: which chains the kernel asks, and what for.

Looks at the chains that the kernel asks by itself and at those that their rules lead to, in nf_tables and in the legacy
tables, in the calling thread's namespace. What a rule matches is not told, except whether that is only packets for
loopback addresses: an effect is what a rule can do, to some packet or other. Anybody may have made these rules, so
there is a bound on how many are looked at.
"""

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from tidegate.kernel import legacy_tables, nf_tables, nfnetlink
from tidegate.kernel import nf_tables_h as h
from tidegate.kernel.chains import MOST_LEGACY_BYTES, Base, Chain, Store
from tidegate.kernel.legacy_tables import Family
from tidegate.kernel.netlink import (
    Disturbed,
    Enough,
    attributes_in,
    number_of,
    text_attribute,
    text_of,
)
from tidegate.kernel.nfnetlink import Conversation

MOST_RULES = 200
"""How many rules are looked at of a chain that the kernel asks and of those that it leads to, together."""
MOST_CHAINS = 32
"""Of how many chains of nf_tables that the kernel asks rules are looked at."""


class Effect(enum.Flag):
    """What a rule can do."""

    NONE = 0
    TRANSLATE = enum.auto()
    """Give a connection another destination (dnat, redirect)."""
    HAND_OVER = enum.auto()
    """Give a packet to a socket (tproxy), to another interface (fwd, dup) or to a program (queue)."""
    UNTRACK = enum.auto()
    """Keep a packet from connection tracking."""
    MARK = enum.auto()
    """Set a packet's mark."""
    REWRITE = enum.auto()
    """Write into a packet's addresses, or into its TCP or UDP header."""
    DROP = enum.auto()
    """End a packet's way, with an answer or without."""


class Effects(msgspec.Struct, frozen=True):
    """What several rules can do."""

    anywhere: Effect = Effect.NONE
    loopback: Effect = Effect.NONE
    """What they can do to packets for loopback addresses, and to no others."""


class Found(NamedTuple):
    """What was found in a chain; rules that lead to known chains do not count."""

    effects: Effects
    before: Effects
    """Of the rules before the first one that leads to a chain of one's own; of all where there is none."""
    is_whole: bool
    """Whether all rules were looked at."""


class Asked(msgspec.Struct, frozen=True):
    """A chain that the kernel asks."""

    store: Store
    family: str
    table: str
    name: str
    base: Base
    found: Found


class _Familiar(NamedTuple):
    known: Callable[[Chain], bool]
    own: Callable[[Chain], bool]


def asked(
    chains: Iterable[Chain], *, known: Callable[[Chain], bool], own: Callable[[Chain], bool]
) -> tuple[Asked, ...]:
    """Those of these chains (chains.of_nf_tables) that the kernel asks, and all built-in ones of the legacy tables.

    None that is `known` (of which some are one's `own`). Legacy tables of more than MOST_LEGACY_BYTES are left out.
    KernelError when the kernel refuses.
    """
    familiar = _Familiar(known, own)
    return (*_of_nf_tables(tuple(chains), familiar), *_of_legacy_tables(familiar))


class _Rule(NamedTuple):
    effect: Effect
    to_loopback: bool
    goes_to: tuple[str, ...]
    """The chains that it can lead to."""


class _TooMany(Exception):
    """There are more rules than are looked at, or they change meanwhile."""


class _Walk:
    """The way through the rules of one chain, and of those that it leads to."""

    def __init__(
        self,
        read: Callable[[str], Iterable[_Rule]],
        place: tuple[Store, str, str],
        familiar: _Familiar,
    ) -> None:
        """`read` gives the rules of a chain of the place (store, family, table)."""
        self._read = read
        self._place = place
        self._familiar = familiar
        self._left = MOST_RULES
        self._visited: set[tuple[str, bool]] = set()
        self._of = dict.fromkeys((False, True), Effect.NONE)

    def through(self, rules: Iterable[_Rule]) -> Found:
        before: Effects | None = None
        is_whole = True
        try:
            for rule in rules:
                if before is None and any(map(self._is_own, rule.goes_to)):
                    before = self._effects
                ways = self._taken(rule, to_loopback=False)
                while ways:
                    name, to_loopback = ways.pop()
                    for following in self._read(name):
                        ways += self._taken(following, to_loopback=to_loopback)
        except (_TooMany, Disturbed, Enough):
            is_whole = False
        return Found(self._effects, before or self._effects, is_whole)

    def _is_known(self, name: str) -> bool:
        return self._familiar.known(Chain(*self._place, name))

    def _is_own(self, name: str) -> bool:
        return self._familiar.own(Chain(*self._place, name))

    @property
    def _effects(self) -> Effects:
        return Effects(self._of[False], self._of[True])

    def _taken(self, rule: _Rule, *, to_loopback: bool) -> list[tuple[str, bool]]:
        """Count a rule, and say to which chains it leads that were not looked at, with what packets."""
        if not self._left:
            raise _TooMany
        self._left -= 1
        to_loopback = to_loopback or rule.to_loopback
        self._of[to_loopback] |= rule.effect
        ways = [
            (name, to_loopback)
            for name in rule.goes_to
            if not self._is_known(name) and not {(name, to_loopback), (name, False)} & self._visited
        ]
        self._visited.update(ways)
        return ways


# nf_tables.

# linux/netfilter.h
_VERDICTS = {0: Effect.DROP, 3: Effect.HAND_OVER}
"""NF_DROP, NF_QUEUE"""
_VERDICT_MASK = 0xFF
"""What is left of a verdict without the number of its queue (NF_VERDICT_MASK)."""
_EXPRESSIONS = {
    "redir": Effect.TRANSLATE,
    "tproxy": Effect.HAND_OVER,
    "fwd": Effect.HAND_OVER,
    "dup": Effect.HAND_OVER,
    "queue": Effect.HAND_OVER,
    "synproxy": Effect.HAND_OVER,
    "notrack": Effect.UNTRACK,
    "reject": Effect.DROP,
}
"""What those do that always do the same."""
_DESTINATIONS = ((16, 127), (24, 0))
"""Where a destination is in an IPv4 and in an IPv6 header, and the first byte of what is a loopback address there."""
_LOOPBACK_IPV6 = bytes(15) + b"\1"
_SHORTEST_ADDRESS = 4
"""Bytes; less is written into an IP header for its other fields."""
_WHAT = "read the nftables rules"
_MOST_BYTES = 2**20


def _of_nf_tables(chains: tuple[Chain, ...], familiar: _Familiar) -> Iterator[Asked]:
    led_to: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for chain in chains:
        if chain.store is Store.NF_TABLES and chain.base is None:
            led_to[chain.family, chain.table].append(chain.name)
    left = MOST_CHAINS
    for chain in chains:
        if chain.base is None or familiar.known(chain):
            continue
        place = chain.family, chain.table
        found = Found(Effects(), Effects(), is_whole=chain.is_empty)
        if left and not chain.is_empty:
            left -= 1
            found = _walked(place, chain.name, tuple(led_to[place]), familiar)
        yield Asked(chain.store, *place, chain.name, chain.base, found)


def _walked(
    place: tuple[str, str], name: str, led_to: tuple[str, ...], familiar: _Familiar
) -> Found:
    walk = _Walk(lambda name: _nft_rules(*place, name, led_to), (Store.NF_TABLES, *place), familiar)
    return walk.through(_nft_rules(*place, name, led_to))


def _nft_rules(family: str, table: str, chain: str, led_to: tuple[str, ...]) -> Iterator[_Rule]:
    asked = text_attribute(h.NFTA_RULE_TABLE, table) + text_attribute(h.NFTA_RULE_CHAIN, chain)
    number = nf_tables.FAMILIES[family]
    with Conversation(nfnetlink.SUBSYSTEM_NFTABLES, number, _WHAT, _MOST_BYTES) as kernel:
        for answer in kernel.dump(h.NFT_MSG_GETRULE, asked):
            parts = dict(attributes_in(answer.attributes))
            yield _nft_rule(parts.get(h.NFTA_RULE_EXPRESSIONS, b""), led_to)


def _nft_rule(expressions: bytes, led_to: tuple[str, ...]) -> _Rule:
    effect, to_loopback, goes_to = Effect.NONE, False, set[str]()
    loopback_byte: int | None = None
    for _, expression in attributes_in(expressions):
        named = dict(attributes_in(expression))
        name = text_of(named[h.NFTA_EXPR_NAME])
        data = dict(attributes_in(named.get(h.NFTA_EXPR_DATA, b"")))
        effect |= _nft_effect(name, data)
        if name == "immediate":
            verdict = nf_tables.verdict_in(data)
            if verdict is not None and verdict.chain is not None:
                goes_to.add(verdict.chain)
        elif name == "lookup" and h.NFTA_LOOKUP_DREG in data:
            # A verdict map. Where its elements lead is not looked at: it can be any chain of the table.
            is_verdict = number_of(data[h.NFTA_LOOKUP_DREG]) == h.NFT_REG_VERDICT
            goes_to |= set(led_to) if is_verdict else set()
        elif name == "cmp":
            to_loopback = to_loopback or _is_loopback(data, loopback_byte)
        if name != "bitwise":
            loopback_byte = _destination(data) if name == "payload" else None
    return _Rule(effect, to_loopback, tuple(sorted(goes_to)))


def _nft_effect(name: str, data: dict[int, bytes]) -> Effect:
    match name:
        case "nat":
            is_destination = number_of(data.get(h.NFTA_NAT_TYPE, b"")) == h.NFT_NAT_DNAT
            return Effect.TRANSLATE if is_destination else Effect.NONE
        case "meta":
            sets_mark = (
                h.NFTA_META_SREG in data and number_of(data[h.NFTA_META_KEY]) == h.NFT_META_MARK
            )
            return Effect.MARK if sets_mark else Effect.NONE
        case "payload":
            return Effect.REWRITE if _rewrites(data) else Effect.NONE
        case "immediate":
            return _verdict_effect(nf_tables.verdict_in(data))
        case "target":
            target = text_of(data.get(h.NFTA_TARGET_NAME, b""))
            return _target_effect(target, data.get(h.NFTA_TARGET_INFO, b""))
    return _EXPRESSIONS.get(name, Effect.NONE)


def _rewrites(payload: dict[int, bytes]) -> bool:
    if h.NFTA_PAYLOAD_SREG not in payload:
        return False
    header = number_of(payload[h.NFTA_PAYLOAD_BASE])
    is_address = number_of(payload[h.NFTA_PAYLOAD_LEN]) >= _SHORTEST_ADDRESS
    return header == h.NFT_PAYLOAD_TRANSPORT_HEADER or (
        header == h.NFT_PAYLOAD_NETWORK_HEADER and is_address
    )


def _verdict_effect(verdict: nf_tables.Verdict | None) -> Effect:
    if verdict is None or verdict.code < 0:
        return Effect.NONE
    return _VERDICTS.get(verdict.code & _VERDICT_MASK, Effect.NONE)


def _destination(payload: dict[int, bytes]) -> int | None:
    """If it loads a destination address or its beginning, what that begins with for loopback."""
    if h.NFTA_PAYLOAD_SREG in payload:
        return None
    if number_of(payload.get(h.NFTA_PAYLOAD_BASE, b"")) != h.NFT_PAYLOAD_NETWORK_HEADER:
        return None
    return dict(_DESTINATIONS).get(number_of(payload.get(h.NFTA_PAYLOAD_OFFSET, b"")))


def _is_loopback(cmp: dict[int, bytes], begins: int | None) -> bool:
    if begins is None or number_of(cmp.get(h.NFTA_CMP_OP, b"\1")) != h.NFT_CMP_EQ:
        return False
    value = dict(attributes_in(cmp.get(h.NFTA_CMP_DATA, b""))).get(h.NFTA_DATA_VALUE, b"")
    return value == _LOOPBACK_IPV6 if begins == 0 else value[:1] == bytes([begins])


# The targets of iptables, in both stores.

_TARGETS = {
    "DNAT": Effect.TRANSLATE,
    "REDIRECT": Effect.TRANSLATE,
    "NETMAP": Effect.TRANSLATE,
    "TPROXY": Effect.HAND_OVER,
    "NFQUEUE": Effect.HAND_OVER,
    "SYNPROXY": Effect.HAND_OVER,
    "NOTRACK": Effect.UNTRACK,
    "MARK": Effect.MARK,
    "CONNMARK": Effect.MARK,
    "REJECT": Effect.DROP,
}
_XT_CT_NOTRACK = 1
"""Flag of struct xt_ct_target_info, its first field (linux/netfilter/xt_CT.h)."""


def _target_effect(target: str, info: bytes) -> Effect:
    if target == "CT":
        return Effect.UNTRACK if info[:1] and info[0] & _XT_CT_NOTRACK else Effect.NONE
    return _TARGETS.get(target, Effect.NONE)


# The legacy tables.

_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
"""enum nf_ip_hook_priorities"""
_NAT_PRIORITIES = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}


def _of_legacy_tables(familiar: _Familiar) -> Iterator[Asked]:
    for family in Family:
        for name in sorted(legacy_tables.existing(family)):
            table = legacy_tables.read(family, name, MOST_LEGACY_BYTES)
            if not isinstance(table, legacy_tables.Unread):
                yield from (
                    _built_in(family, name, table, hook, familiar) for hook in table.hooks()
                )


def _built_in(
    family: Family, name: str, table: legacy_tables.Table, hook: str, familiar: _Familiar
) -> Asked:
    place = Store.LEGACY, family.value, name
    walk = _Walk(lambda chain: map(_legacy_rule, table.rules(chain)), place, familiar)
    found = walk.through(map(_legacy_rule, table.built_in(hook)))
    is_nat = name == "nat"
    priority = _NAT_PRIORITIES[hook] if is_nat else _PRIORITIES.get(name, 0)
    base = Base("nat" if is_nat else "filter", hook, priority, table.drops(hook))
    return Asked(*place, hook.upper(), base, found)


def _legacy_rule(rule: legacy_tables.Rule) -> _Rule:
    effect = _target_effect(rule.target, rule.info)
    if rule.verdict is not None:
        effect |= _VERDICTS.get(rule.verdict & _VERDICT_MASK, Effect.NONE)
    goes_to = () if rule.goes_to is None else (rule.goes_to,)
    return _Rule(effect, rule.to_loopback, goes_to)
