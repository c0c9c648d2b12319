"""Decision lists as text for the legacy tables: what iptables-restore(8), ip6tables-restore(8) and ipset(8) would read.

A list becomes a chain TIDEGATE_* with one jump from a built-in chain, a line one rule or several, a list of ports or
networks a set. No kernel is asked here. What goes where is decided in rules.py; what becomes of the text is in
iptables.py.
"""

import functools
import hashlib
import ipaddress
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, assert_never

from tidegate.enforce.redirect.families import HEADER
from tidegate.enforce.redirect.rules import (
    HANDED_OVER,
    POINTS,
    SENDING,
    Action,
    ByGroup,
    ByUser,
    Drop,
    First,
    FromNetwork,
    HandedOver,
    Hook,
    InCgroup,
    Invalid,
    Leave,
    Line,
    Marked,
    Match,
    Not,
    OfFamily,
    OfKnownSocket,
    OfProtocol,
    OfTransparentSocket,
    OnInterface,
    Opening,
    Point,
    Redirect,
    Rules,
    ToNetwork,
    ToPort,
    ToSelf,
    Tproxy,
    Translate,
    Translated,
    Untracked,
    Zone,
    lines_of_family,
)
from tidegate.intent.policy import Family, IdRange, PortRange, Protocol
from tidegate.kernel import ipset, legacy_tables
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError
from tidegate.kernel.xtables_rules import quoted

SET_PREFIX = "tidegate-"
"""With what the names of all sets begin; no others are touched."""


class Place(NamedTuple):
    """Where a hook's list is."""

    table: str
    built_in: str
    """The chain that jumps there."""
    chain: str


_CHAINS = {
    Hook.OUTBOUND: "TIDEGATE_OUTBOUND",
    Hook.INBOUND: "TIDEGATE_INBOUND",
    Hook.INVALID: "TIDEGATE_INVALID",
    Hook.INBOUND_TPROXY: "TIDEGATE_TPROXY",
    Hook.INVALID_OUTBOUND: "TIDEGATE_INVALID_OUTBOUND",
    Hook.DNS_ZONE: "TIDEGATE_DNS_ZONE",
}
_RAW_AT = -300
"""The priority of table raw (NF_IP_PRI_RAW)"""


def _table(point: Point) -> str:
    """The table that is asked there. Table mangle is asked at one priority alone, -150 (NF_IP_PRI_MANGLE)."""
    if point.kind == "nat":
        return "nat"
    return "raw" if point.priority == _RAW_AT else "mangle"


PLACES = {
    hook: Place(_table(POINTS[hook]), POINTS[hook].hook.upper(), chain)
    for hook, chain in _CHAINS.items()
}
"""In the order in which they are asked where one chain jumps to two: packets that are dropped come first."""

TABLES = ("raw", "mangle", "nat")
"""In the order in which packets pass them, and in which they are filled: a query's zone before its translation."""

OWNED = f"(?:{'|'.join(place.chain for place in PLACES.values())})(?:_[0-9]+)?"
"""Pattern of the chains that are tidegate's. Those with a number hold the rest of a list; see _Writer."""

FAMILIES = {family: legacy_tables.Family(header) for family, header in HEADER.items()}
SET_SECTION = "# sets"
"""What the section for ipset begins with."""
SECTIONS = {family: f"# {family}" for family in FAMILIES.values()}
"""And those for iptables-restore and ip6tables-restore."""

MARKING = "CONNMARK"
"""Target of rules that only prepare what the next one does."""

_MULTIPORT_SLOTS = 15
"""XT_MULTI_PORTS of linux/netfilter/xt_multiport.h; a range takes two."""
_MAX_INTERFACE_NAME = 15
"""IFNAMSIZ, less its end"""
_OPENING = "-m tcp {}--tcp-flags FIN,SYN,RST,ACK SYN"
_TO_BE_MARKED = f"{_OPENING.format('')} -m conntrack --ctdir ORIGINAL"
"""And not in the way of a connection that was opened from here."""


@functools.lru_cache(maxsize=256)
def rendered(rules: Rules, with_sets: bool, found: tuple[tuple[str, Cgroup], ...]) -> str:
    """Sections for sets and for each family; "" when nothing is redirected.

    `with_sets` says whether long lists become IP sets; `found` are the cgroups that are spoken of, by path.
    KernelError for a line that cannot be written.
    """
    writers = [_Writer(rules, family, with_sets, dict(found)) for family in rules.families]
    sets = {one.name: one for writer in writers for one in writer.sets}
    sections = [SET_SECTION, *_set_lines(sets.values())] if sets else []
    for writer in writers:
        if writer.tables:
            sections += [SECTIONS[FAMILIES[writer.family]], *writer.text()]
    return "".join(f"{line}\n" for line in sections)


def _set_lines(sets: Iterable[ipset.Set]) -> Iterator[str]:
    for one in sets:
        yield f"create {one.name} {one.kind}"
        yield from (f"add {one.name} {entry}" for entry in one.entries)


class _Words(NamedTuple):
    """A condition on packets, in iptables' words."""

    header: str = ""
    """An option of the packet's header, such as -d 10.0.0.0/8; each may stand once in a rule."""
    match: str = ""
    """A match with its options."""


class _Condition(NamedTuple):
    """What a packet has to be: any of these, and none of those."""

    one_of: tuple[_Words, ...]
    none_of: tuple[_Words, ...] = ()
    """What cannot be said by "!" in one rule."""


_ALWAYS = _Condition((_Words(),))
_NEVER = _Condition(())


class _Writer:
    """The lists of one family on their way to text.

    A line becomes one rule or several, which all bear its name as their last comment. Where a line is for packets that
    are none of several things, rules go to another chain (-g) for each of these things: the rest of the list is
    there. Those bear its name too, and count for no line.
    """

    def __init__(
        self, rules: Rules, family: Family, with_sets: bool, found: dict[str, Cgroup]
    ) -> None:
        self.family = family
        self.sets: list[ipset.Set] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        """Rules by table and chain."""
        self.jumps: dict[str, list[str]] = {}
        self._with_sets = with_sets
        self._cgroups = found
        for hook, place in PLACES.items():
            if lines := lines_of_family(rules.lines(hook), family):
                self._write(hook, place, lines)

    def text(self) -> Iterator[str]:
        """What iptables-restore --noflush reads."""
        for table in TABLES:
            if table not in self.tables:
                continue
            yield f"*{table}"
            yield from (f":{chain} - [0:0]" for chain in self.tables[table])
            yield from self.jumps[table]
            for chain, rules in self.tables[table].items():
                yield from (f"-A {chain} {rule}" for rule in rules)
            yield "COMMIT"

    def _write(self, hook: Hook, place: Place, lines: tuple[Line, ...]) -> None:
        chains = self.tables.setdefault(place.table, {})
        jumps = self.jumps.setdefault(place.table, [])
        position = sum(jump.split()[1] == place.built_in for jump in jumps) + 1
        jumps.append(f"-I {place.built_in} {position} -j {place.chain}")
        names = chain_names(place)
        chain = next(names)
        chains[chain] = []
        remaining: tuple[Protocol, ...] | None = None
        for line in lines:
            others, rules = self._rules(hook, line, remaining)
            if others:
                rest = next(names)
                chains[chain] += [f"{words} -g {rest}" for words in others]
                chains[chain] += rules
                if not _decides_on_all(line):
                    chains[chain].append(f"{_joined((), line)} -g {rest}")
                chain = rest
                chains[chain] = []
            else:
                chains[chain] += rules
            remaining = _remaining(line, remaining)

    def _rules(
        self, hook: Hook, line: Line, remaining: tuple[Protocol, ...] | None
    ) -> tuple[list[str], list[str]]:
        """A line's rules: those for packets that it is not for, without target, and those for its own."""
        others: list[str] = []
        rules: list[str] = []
        for protocol in _protocols(line, remaining):
            conditions = [self._condition(hook, line, match, protocol) for match in line.matches]
            if protocol is not None:
                conditions.append(_Condition((_Words(f"-p {protocol}"),)))
            for excluded in itertools.chain(*(one.none_of for one in conditions)):
                if (words := _joined((excluded,), line)) not in others:
                    others.append(words)
            for chosen in itertools.product(*(one.one_of for one in conditions)):
                words = _joined(chosen, line)
                if isinstance(line.action, Tproxy):
                    opening = _joined((*chosen, _Words(match=_TO_BE_MARKED)), line)
                    rules.append(
                        f"{opening} -j {MARKING} --set-xmark {HANDED_OVER:#x}/{HANDED_OVER:#x}"
                    )
                rules.append(f"{words} -j {_target(hook, line.action)}")
        return others, rules

    def _condition(
        self, hook: Hook, line: Line, match: Match, protocol: Protocol | None
    ) -> _Condition:
        negated = isinstance(match, Not)
        criterion = match.criterion if isinstance(match, Not) else match
        not_ = "! " if negated else ""
        match criterion:
            case OfProtocol(protocols):
                return _protocol_condition(protocols, negated, protocol)
            case Opening():
                if protocol is Protocol.TCP:
                    return _Condition((_Words(match=_OPENING.format(not_)),))
                return _ALWAYS if negated else _NEVER
            case OfKnownSocket():
                known = (_Words(match="-m socket"),)
                return _Condition((_Words(),), known) if negated else _Condition(known)
            case OfTransparentSocket():
                known = (_Words(match="-m socket --transparent"),)
                return _Condition((_Words(),), known) if negated else _Condition(known)
            case HandedOver():
                words = f"-m connmark {not_}--mark {HANDED_OVER:#x}/{HANDED_OVER:#x}"
                return _Condition((_Words(match=words),))
            case Untracked():
                words = f"-m conntrack {not_}--ctstate INVALID,UNTRACKED"
                return _Condition((_Words(match=words),))
            case OfFamily(family):
                return _ALWAYS if (family is self.family) is not negated else _NEVER
            case ByUser(uids):
                return _owner("uid", uids, negated)
            case ByGroup(gids):
                return _owner("gid", gids, negated)
            case Marked(mark):
                words = f"-m mark {not_}--mark {mark.value:#x}/{mark.mask:#x}"
                return _Condition((_Words(match=words),))
            case InCgroup(path):
                # The kernel looks the path up once: a cgroup that is made anew there needs a rule that is.
                made = f"-m comment --comment cgroup-{self._cgroups[path].id}"
                words = f"-m cgroup {not_}--path {quoted(path)} {made}"
                return _Condition((_Words(match=words),))
            case OnInterface(interfaces):
                option = "-o" if hook in SENDING else "-i"
                return _headers(option, tuple(map(_interface, interfaces)), negated)
            case ToPort(ports):
                return self._ports(line, ports, negated)
            case ToNetwork(family, networks):
                return self._networks(
                    line, "-d", networks if family is self.family else (), negated
                )
            case FromNetwork(family, networks):
                return self._networks(
                    line, "-s", networks if family is self.family else (), negated
                )
            case ToSelf():
                return _Condition((_Words(match=f"-m addrtype {not_}--dst-type LOCAL"),))
            case Invalid():
                return _Condition((_Words(match=f"-m conntrack {not_}--ctstate INVALID"),))
            case First():
                unless = "" if negated else "! "
                return _Condition((_Words(match=f"-m conntrack {unless}--ctstatus CONFIRMED"),))
            case Translated():
                return _Condition((_Words(match=f"-m conntrack {not_}--ctstate DNAT"),))
            case _:
                assert_never(criterion)

    def _ports(self, line: Line, ports: tuple[PortRange, ...], negated: bool) -> _Condition:
        if not ports:
            return _ALWAYS if negated else _NEVER
        not_ = "! " if negated else ""
        chunks = list(_chunks(ports))
        if len(chunks) > 1 and self._with_sets:
            name = self._set(line, ipset.Kind.PORTS, tuple(str(range_) for range_ in ports))
            return _Condition((_Words(match=f"-m set {not_}--match-set {name} dst"),))
        matches = [f"-m multiport {not_}--dports {chunk}" for chunk in chunks]
        if negated:
            return _Condition((_Words(match=" ".join(matches)),))
        return _Condition(tuple(_Words(match=match) for match in matches))

    def _networks(
        self, line: Line, option: str, networks: tuple[str, ...], negated: bool
    ) -> _Condition:
        if len(networks) > 1 and self._with_sets:
            not_ = "! " if negated else ""
            is_ipv4 = self.family is Family.IPV4
            kind = ipset.Kind.IPV4_NETWORKS if is_ipv4 else ipset.Kind.IPV6_NETWORKS
            entries = tuple(str(one) for one in sorted(map(ipaddress.ip_network, networks)))
            name = self._set(line, kind, entries)
            side = "dst" if option == "-d" else "src"
            return _Condition((_Words(match=f"-m set {not_}--match-set {name} {side}"),))
        return _headers(option, networks, negated)

    def _set(self, line: Line, kind: ipset.Kind, entries: tuple[str, ...]) -> str:
        """The name of a set with these entries. It tells the content, so that another content is another set."""
        digest = hashlib.sha256("\n".join((kind, *entries)).encode()).hexdigest()[:8]
        name = f"{SET_PREFIX}{digest}-{line.name}"[: ipset.MAX_NAME]
        self.sets.append(ipset.Set(name, kind, entries))
        return name


def chain_names(place: Place) -> Iterator[str]:
    """The chains that a list takes, as many as it takes."""
    yield place.chain
    yield from (f"{place.chain}_{number}" for number in itertools.count(2))


def _decides_on_all(line: Line) -> bool:
    """Whether a line is for all packets but those that its only criterion excludes."""
    return len(line.matches) == 1


def _protocols(line: Line, remaining: tuple[Protocol, ...] | None) -> tuple[Protocol | None, ...]:
    """For which protocols a line needs a rule; None for one that need not say.

    `remaining` are those that packets can still have here, None for any.
    """
    criteria = [match.criterion if isinstance(match, Not) else match for match in line.matches]
    named = [match.protocols for match in line.matches if isinstance(match, OfProtocol)]
    speaks_of_ports = any(isinstance(criterion, ToPort | Opening) for criterion in criteria)
    if not named and not speaks_of_ports and isinstance(line.action, Leave | Drop | Zone):
        return (None,)
    if not named and remaining is None:
        raise KernelError(f"iptables cannot write line {line.name}: it is for any protocol")
    sets = [set(protocols) for protocols in (*named, *([remaining] if remaining else ()))]
    return tuple(protocol for protocol in Protocol if all(protocol in one for one in sets))


def _remaining(line: Line, before: tuple[Protocol, ...] | None) -> tuple[Protocol, ...] | None:
    """Which protocols packets can have behind a line."""
    match line.matches:
        case (Not(OfProtocol(protocols)),):
            return protocols if before is None else tuple(set(before) & set(protocols))
    return before


def _protocol_condition(
    protocols: tuple[Protocol, ...], negated: bool, protocol: Protocol | None
) -> _Condition:
    if protocol is not None:
        return _ALWAYS if (protocol in protocols) is not negated else _NEVER
    return _headers("-p", tuple(map(str, protocols)), negated)


def _headers(option: str, values: tuple[str, ...], negated: bool) -> _Condition:
    if not negated:
        return _Condition(tuple(_Words(header=f"{option} {value}") for value in values))
    if len(values) == 1:
        return _Condition((_Words(header=f"! {option} {values[0]}"),))
    return _Condition((_Words(),), tuple(_Words(header=f"{option} {value}") for value in values))


def _owner(kind: str, ranges: tuple[IdRange, ...], negated: bool) -> _Condition:
    if not negated:
        return _Condition(tuple(_Words(match=f"-m owner --{kind}-owner {ids}") for ids in ranges))
    words = " ".join(f"-m owner ! --{kind}-owner {ids}" for ids in ranges)
    return _Condition((_Words(match=words),))


def _interface(name: str) -> str:
    # A + at the end would stand for any end.
    if len(name.encode()) > _MAX_INTERFACE_NAME or name.endswith("+"):
        raise KernelError(f"iptables cannot write {name!r} as the name of an interface")
    return quoted(name)


def _chunks(ports: tuple[PortRange, ...]) -> Iterator[str]:
    """The ports in as few parts as multiport takes."""
    chunk: list[str] = []
    slots = 0
    for range_ in ports:
        needed = 1 if range_.first == range_.last else 2
        if slots + needed > _MULTIPORT_SLOTS:
            yield ",".join(chunk)
            chunk, slots = [], 0
        chunk.append(str(range_).replace("-", ":"))
        slots += needed
    yield ",".join(chunk)


def _joined(words: Iterable[_Words], line: Line) -> str:
    """A rule's conditions, in the order in which iptables-save writes them, and the line's name."""
    parts = list(words)
    headers = sorted((part.header for part in parts if part.header), key=_rank)
    if len({_option(header) for header in headers}) < len(headers):
        raise KernelError(f"iptables cannot write line {line.name}: it says one thing twice")
    matches = [part.match for part in parts if part.match]
    return " ".join((*headers, *matches, f"-m comment --comment {quoted(line.name)}"))


_OPTIONS = ("-s", "-d", "-i", "-o", "-p")


def _option(header: str) -> str:
    return header.removeprefix("! ").partition(" ")[0]


def _rank(header: str) -> int:
    return _OPTIONS.index(_option(header))


def _target(hook: Hook, action: Action) -> str:
    match action:
        case Leave():
            return "RETURN"
        case Drop():
            return "DROP"
        case Redirect(port) if hook is Hook.INBOUND:
            # REDIRECT would send it to an address of the interface, which may have none of the family.
            return f"DNAT --to-destination :{port}"
        case Redirect(port):
            return f"REDIRECT --to-ports {port}"
        case Tproxy(port):
            return f"TPROXY --on-port {port}"
        case Translate(address, port):
            shown = f"[{address}]" if ":" in address else address
            return f"DNAT --to-destination {shown}:{port}"
        case Zone(number):
            return f"CT --zone-orig {number}"
        case _:
            assert_never(action)
