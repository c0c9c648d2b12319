"""Redirect rules through the legacy tables: chains TIDEGATE_* with one jump each from a built-in chain.

Renders the lines of rules.py as iptables-restore(8) and ipset(8) would read them, loads exactly that text, reads back
what the kernel has and tells the difference. Nothing else of a table is touched, and a table of a family that is off
is not even looked at: the kernel makes one when it is asked for it. What goes where is decided in rules.py.

A table is replaced as a whole. Several tables cannot be replaced in one step: what is added comes before what goes,
so that no connection goes around the sidecar in between, and when a table is refused the others become what they were.
"""

import functools
import hashlib
import ipaddress
import itertools
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, assert_never

import msgspec

from tidegate.enforce.redirect.backend import BackendName, Change, InstalledLine
from tidegate.enforce.redirect.rules import (
    Action,
    ByGroup,
    ByUser,
    Drop,
    FromNetwork,
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
    OnInterface,
    Opening,
    Redirect,
    Rules,
    ToNetwork,
    ToPort,
    ToSelf,
    Tproxy,
    Translate,
    Translated,
    Zone,
    lines_of_family,
)
from tidegate.enforce.redirect.text import shown
from tidegate.intent.policy import Family, IdRange, PortRange, Protocol
from tidegate.kernel import cgroups, conntrack, ipset, netns, xtables
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError
from tidegate.kernel.xtables import Content, Entry

SET_PREFIX = "tidegate-"
"""With what the names of all sets begin; no others are touched."""


class _Place(NamedTuple):
    """Where a hook's list is."""

    table: str
    built_in: str
    """The chain that jumps there."""
    chain: str


_PLACES = {
    Hook.OUTBOUND: _Place("nat", "OUTPUT", "TIDEGATE_OUTBOUND"),
    Hook.INBOUND: _Place("nat", "PREROUTING", "TIDEGATE_INBOUND"),
    Hook.INVALID: _Place("mangle", "PREROUTING", "TIDEGATE_INVALID"),
    Hook.INBOUND_TPROXY: _Place("mangle", "PREROUTING", "TIDEGATE_TPROXY"),
    Hook.DNS_ZONE: _Place("raw", "OUTPUT", "TIDEGATE_DNS_ZONE"),
}
"""In the order in which they are asked where one chain jumps to two: packets that are dropped come first."""

_TABLES = ("raw", "mangle", "nat")
"""In the order in which packets pass them, and in which they are filled: a query's zone before its translation."""

OWNED = f"(?:{'|'.join(place.chain for place in _PLACES.values())})(?:_[0-9]+)?"
"""Pattern of the chains that are tidegate's. Those with a number hold the rest of a list; see _Writer."""

_FAMILIES = {Family.IPV4: xtables.Family.IPV4, Family.IPV6: xtables.Family.IPV6}
_SET_SECTION = "# sets"
_SECTIONS = {family: f"# {family}" for family in _FAMILIES.values()}

_MULTIPORT_SLOTS = 15
"""XT_MULTI_PORTS of linux/netfilter/xt_multiport.h; a range takes two."""
_MAX_INTERFACE_NAME = 15
"""IFNAMSIZ, less its end"""
_OPENING = "-m tcp {}--tcp-flags FIN,SYN,RST,ACK SYN"


class IptablesBackend:
    """The backend for kernels without nf_tables."""

    name = BackendName.IPTABLES

    def __init__(self, *, with_sets: bool | None = None) -> None:
        """`with_sets` says whether long lists become IP sets; None to ask the kernel."""
        self._with_sets = with_sets

    def render(self, rules: Rules) -> str:
        """Sections for ipset restore, iptables-restore and ip6tables-restore; "" when nothing is redirected."""
        with_sets = _kernel_has_sets() if self._with_sets is None else self._with_sets
        found = {path: cgroups.find(path) for path in _cgroup_paths(rules)}
        return _rendered(rules, with_sets, tuple(found.items()))

    def apply(self, netns_path: str, rules: Rules) -> Change:
        """See Backend. KernelError as well when another program does not let go of the xtables lock."""
        text = self.render(rules)
        if not text:
            return self.remove(netns_path)
        return netns.run_in(netns_path, _apply, _wanted(text))

    def check(self, netns_path: str, rules: Rules) -> tuple[str, ...]:
        """See Backend."""
        wanted = _wanted(self.render(rules))
        return tuple(_differences(wanted, netns.run_in(netns_path, _present)))

    def current(self, netns_path: str) -> tuple[InstalledLine, ...] | None:
        """See Backend. A line that several rules or both families have is told once, with all of its packets."""
        present = netns.run_in(netns_path, _present)
        if not any(content.chains for content in present.contents()):
            return None
        return tuple(_installed_lines(present))

    def withdraw(self, netns_path: str) -> Change:
        """See Backend, and `remove`. The kernel stops tracking, and so translating, when nobody's rules need it."""
        return netns.run_in(netns_path, _withdraw)

    def remove(self, netns_path: str) -> Change:
        """See Backend. Tables that the kernel made for the rules stay, without a rule: it keeps them."""
        return netns.run_in(netns_path, _remove)


@functools.cache
def _kernel_has_sets() -> bool:
    return ipset.is_available()


# Rendering.


@functools.lru_cache(maxsize=256)
def _rendered(rules: Rules, with_sets: bool, found: tuple[tuple[str, Cgroup], ...]) -> str:
    writers = [_Writer(rules, family, with_sets, dict(found)) for family in rules.families]
    sets = {one.name: one for writer in writers for one in writer.sets}
    sections = [_SET_SECTION, *_set_lines(sets.values())] if sets else []
    for writer in writers:
        if writer.tables:
            sections += [_SECTIONS[_FAMILIES[writer.family]], *writer.text()]
    return "".join(f"{line}\n" for line in sections)


def _cgroup_paths(rules: Rules) -> Iterator[str]:
    for _, lines in rules.lists:
        for match in itertools.chain.from_iterable(line.matches for line in lines):
            criterion = match.criterion if isinstance(match, Not) else match
            if isinstance(criterion, InCgroup):
                yield criterion.path


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
        for hook, place in _PLACES.items():
            if lines := lines_of_family(rules.lines(hook), family):
                self._write(hook, place, lines)

    def text(self) -> Iterator[str]:
        """What iptables-restore --noflush reads."""
        for table in _TABLES:
            if table not in self.tables:
                continue
            yield f"*{table}"
            yield from (f":{chain} - [0:0]" for chain in self.tables[table])
            yield from self.jumps[table]
            for chain, rules in self.tables[table].items():
                yield from (f"-A {chain} {rule}" for rule in rules)
            yield "COMMIT"

    def _write(self, hook: Hook, place: _Place, lines: tuple[Line, ...]) -> None:
        chains = self.tables.setdefault(place.table, {})
        jumps = self.jumps.setdefault(place.table, [])
        position = sum(jump.split()[1] == place.built_in for jump in jumps) + 1
        jumps.append(f"-I {place.built_in} {position} -j {place.chain}")
        names = _chain_names(place)
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
                rules.append(f"{_joined(chosen, line)} -j {_target(line.action)}")
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
                words = f"-m cgroup {not_}--path {xtables.quoted(path)} {made}"
                return _Condition((_Words(match=words),))
            case OnInterface(interfaces):
                option = "-o" if hook in (Hook.OUTBOUND, Hook.DNS_ZONE) else "-i"
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


def _chain_names(place: _Place) -> Iterator[str]:
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
    return xtables.quoted(name)


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
    return " ".join((*headers, *matches, f"-m comment --comment {xtables.quoted(line.name)}"))


_OPTIONS = ("-s", "-d", "-i", "-o", "-p")


def _option(header: str) -> str:
    return header.removeprefix("! ").partition(" ")[0]


def _rank(header: str) -> int:
    return _OPTIONS.index(_option(header))


def _target(action: Action) -> str:
    match action:
        case Leave():
            return "RETURN"
        case Drop():
            return "DROP"
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


# Reading the text again, and applying it.


class _Wanted(msgspec.Struct, frozen=True):
    """What a text says."""

    sets: tuple[ipset.Set, ...]
    tables: dict[xtables.Family, dict[str, Content]]

    def of(self, family: xtables.Family, table: str) -> Content:
        return self.tables.get(family, {}).get(table, xtables.EMPTY)


class _Present(msgspec.Struct, frozen=True):
    """What a namespace has of tidegate's. Tables that it does not have are not there."""

    sets: tuple[ipset.Found, ...]
    tables: dict[xtables.Family, dict[str, Content]]

    def contents(self) -> Iterator[Content]:
        for tables in self.tables.values():
            yield from tables.values()

    def of(self, family: xtables.Family, table: str) -> Content:
        return self.tables.get(family, {}).get(table, xtables.EMPTY)

    @property
    def is_empty(self) -> bool:
        return not self.sets and all(content.is_empty for content in self.contents())


_NOTHING = _Wanted(sets=(), tables={})


@functools.lru_cache(maxsize=256)
def _wanted(text: str) -> _Wanted:
    if not text:
        return _NOTHING
    sections: dict[str, list[str]] = {}
    for line in text.removesuffix("\n").split("\n"):
        if line == _SET_SECTION or line in _SECTIONS.values():
            sections[line] = []
        else:
            sections[list(sections)[-1]].append(line)
    tables = {
        family: xtables.compiled(family, xtables.parse("\n".join(sections[section])))
        for family, section in _SECTIONS.items()
        if section in sections
    }
    return _Wanted(tuple(_sets(sections.get(_SET_SECTION, []))), tables)


def _sets(lines: list[str]) -> Iterator[ipset.Set]:
    entries: dict[str, list[str]] = {}
    kinds: dict[str, ipset.Kind] = {}
    for line in lines:
        command, name, rest = line.split(" ", 2)
        if command == "create":
            kinds[name], entries[name] = ipset.Kind(rest), []
        else:
            entries[name].append(rest)
    for name, kind in kinds.items():
        yield ipset.Set(name, kind, tuple(entries[name]))


def _present() -> _Present:
    sets = ipset.found(SET_PREFIX)
    names = {found.index: found.name for found in sets}
    return _Present(
        sets,
        {
            family: {
                table: xtables.content(family, table, OWNED, names)
                for table in _TABLES
                if table in existing
            }
            for family in xtables.Family
            if (existing := xtables.existing(family))
        },
    )


_NUMBERS = {xtables.Family.IPV4: socket.AF_INET, xtables.Family.IPV6: socket.AF_INET6}
"""Whose connections are forgotten when they are translated no more. Translations outlive the rules, for days; with
the next rules they would come to life again, and reset a new connection that has the ports of an old one."""


def _withdraw() -> Change:
    return _apply(_NOTHING)


def _remove() -> Change:
    change = _withdraw()
    if change is Change.REMOVED:
        conntrack.flush()
    return change


def _apply(wanted: _Wanted) -> Change:
    # Most calls change nothing; those need not wait for anybody.
    if _is_as_wanted(_present(), wanted):
        return Change.UNCHANGED
    with xtables.locked():
        present = _present()
        if _is_as_wanted(present, wanted):
            return Change.UNCHANGED
        _load(present, wanted)
    if wanted == _NOTHING:
        return Change.REMOVED
    for family, number in _NUMBERS.items():
        if present.of(family, "nat").chains and not wanted.of(family, "nat").chains:
            conntrack.flush(number)
    return Change.CREATED if present.is_empty else Change.REPLACED


def _is_as_wanted(present: _Present, wanted: _Wanted) -> bool:
    return _sets_by_name(present) == {one.name: one for one in wanted.sets} and all(
        present.of(family, table).equals(wanted.of(family, table))
        for family in xtables.Family
        for table in _TABLES
    )


def _sets_by_name(present: _Present) -> dict[str, ipset.Set | None]:
    return {found.name: found.set for found in present.sets}


class _Step(NamedTuple):
    """One table to be replaced."""

    family: xtables.Family
    table: str
    before: Content
    after: Content


def _load(present: _Present, wanted: _Wanted) -> None:
    done: list[_Step] = []
    try:
        _make_sets(present, wanted)
        indexes = _set_indexes()
        for step in _steps(present, wanted):
            xtables.replace(step.family, step.table, OWNED, step.after, indexes)
            done.append(step)
    except KernelError as error:
        _undo(present, done, error)
        raise
    _destroy_all_but(one.name for one in wanted.sets)


def _set_indexes() -> dict[str, int]:
    return {found.name: found.index for found in ipset.found(SET_PREFIX)}


def _destroy_all_but(kept: Iterable[str]) -> None:
    ipset.destroy(_set_indexes().keys() - set(kept))


def _steps(present: _Present, wanted: _Wanted) -> list[_Step]:
    steps = [
        _Step(family, table, present.of(family, table), wanted.of(family, table))
        for family in xtables.Family
        for table in _TABLES
    ]
    changed = (step for step in steps if not step.before.equals(step.after))
    return sorted(changed, key=_turn)


def _turn(step: _Step) -> tuple[bool, int]:
    """Tables that lose a list come last, in the opposite order."""
    hooks = {place.chain for place in _PLACES.values()}
    loses = bool(hooks & (step.before.chains.keys() - step.after.chains.keys()))
    order = _TABLES.index(step.table)
    return loses, -order if loses else order


def _make_sets(present: _Present, wanted: _Wanted) -> None:
    """Make the sets that are missing, repair the others."""
    there = _sets_by_name(present)
    if _SPARE_SET in there:
        ipset.destroy([_SPARE_SET])
    for one in wanted.sets:
        if one.name in there and there[one.name] != one:
            ipset.create([ipset.Set(_SPARE_SET, one.kind, one.entries)])
            ipset.swap(_SPARE_SET, one.name)
            ipset.destroy([_SPARE_SET])
    ipset.create(one for one in wanted.sets if one.name not in there)


_SPARE_SET = f"{SET_PREFIX}spare"
"""A set's content is replaced by changing places with this one."""


def _undo(present: _Present, done: list[_Step], reason: KernelError) -> None:
    try:
        indexes = _set_indexes()
        for step in reversed(done):
            xtables.replace(step.family, step.table, OWNED, step.before, indexes)
        _destroy_all_but(found.name for found in present.sets)
    except KernelError as error:
        problem = f"{reason}; and what was loaded before cannot be taken back: {error}"
        raise KernelError(problem, reason.errno) from error


# Telling differences and counters.


def _differences(wanted: _Wanted, present: _Present) -> Iterator[str]:
    yield from _set_differences(wanted, present)
    for family in xtables.Family:
        for table in _TABLES:
            should, has = wanted.of(family, table), present.of(family, table)
            if not has.equals(should):
                yield from _table_differences(family, table, should, has)


def _set_differences(wanted: _Wanted, present: _Present) -> Iterator[str]:
    there = _sets_by_name(present)
    should = {one.name: one for one in wanted.sets}
    yield from (f"set {name} is missing" for name in should if name not in there)
    yield from (f"set {name} is there and should not be" for name in there if name not in should)
    for name, one in should.items():
        has = there.get(name)
        if name not in there or has == one:
            continue
        if has is None or has.kind is not one.kind:
            yield f"set {name} is of another kind, should be {one.kind}"
            continue
        for entry in sorted(set(has.entries) - set(one.entries)):
            yield f"set {name} holds {entry} and should not"
        for entry in sorted(set(one.entries) - set(has.entries)):
            yield f"set {name} does not hold {entry}"


def _table_differences(
    family: xtables.Family, table: str, should: Content, has: Content
) -> Iterator[str]:
    where = f"table {table} of {family}"
    yield from (
        f"chain {chain} in {where} is missing" for chain in should.chains if chain not in has.chains
    )
    yield from (
        f"chain {chain} in {where} is there and should not be"
        for chain in has.chains
        if chain not in should.chains
    )
    if should.jumps != has.jumps:
        yield from _jump_differences(family, where, should, has)
    wanted, present = should.entries(), has.entries()
    for chain in should.chains:
        if chain in present and present[chain] != wanted[chain]:
            yield from _chain_differences(
                family, f"chain {chain} in {where}", wanted[chain], present[chain]
            )


def _jump_differences(
    family: xtables.Family, where: str, should: Content, has: Content
) -> Iterator[str]:
    jumps = (*should.jumps, *has.jumps)
    rules = dict(zip(jumps, xtables.spelled(family, [jump.entry for jump in jumps]), strict=True))
    for jump in should.jumps:
        if jump not in has.jumps:
            yield f"rule {jump.position} of {jump.chain} in {where} is not '{rules[jump]}'"
    for jump in has.jumps:
        if jump not in should.jumps:
            rule = f"'{shown(rules[jump])}'"
            yield f"rule {jump.position} of {shown(jump.chain)} in {where} is {rule} and should not be"


def _chain_differences(
    family: xtables.Family, where: str, should: list[Entry], has: list[Entry]
) -> Iterator[str]:
    wanted, present = _by_line(family, should), _by_line(family, has)
    yield from (f"{line} of {where} is missing" for line in wanted if line not in present)
    yield from (
        f"{line} of {where} is there and should not be" for line in present if line not in wanted
    )
    changed = [line for line in wanted if line in present and wanted[line] != present[line]]
    entries = [entry for line in changed for entry in (present[line], wanted[line])]
    spelled = iter(xtables.spelled(family, entries) if entries else ())
    for line in changed:
        is_, should_be = shown(next(spelled)), shown(next(spelled))
        yield f"{line} of {where} is '{is_}', should be '{should_be}'"
    if wanted == present and list(wanted) != list(present):
        yield f"the lines of {where} are in another order"


def _by_line(family: xtables.Family, entries: list[Entry]) -> dict[str, Entry]:
    """Rules by a name for people."""
    named: dict[str, Entry] = {}
    seen: Counter[str] = Counter()
    for entry in entries:
        name = f"line {_line_name(family, entry) or 'without a name'}"
        seen[name] += 1
        named[f"{name} (rule {seen[name]})" if seen[name] > 1 else name] = entry
    return named


def _line_name(family: xtables.Family, entry: Entry) -> str:
    """The last comment of a rule; see _Writer."""
    return shown((xtables.comments(family, entry) or ("",))[-1])


def _installed_lines(present: _Present) -> Iterator[InstalledLine]:
    for hook, place in _PLACES.items():
        counted = [
            _packets(family, place, tables.get(place.table, xtables.EMPTY))
            for family, tables in present.tables.items()
        ]
        for name in _interleaved([list(one) for one in counted]):
            packets = sum(one.get(name, 0) for one in counted)
            yield InstalledLine(hook=hook, name=name, packets=packets)


def _packets(family: xtables.Family, place: _Place, content: Content) -> dict[str, int]:
    """What the lines of one list counted, in their order."""
    packets: dict[str, int] = {}
    chains = itertools.takewhile(content.chains.__contains__, _chain_names(place))
    for rule in itertools.chain.from_iterable(content.chains[chain] for chain in chains):
        if not xtables.goes_elsewhere(family, rule.entry):
            name = _line_name(family, rule.entry)
            packets[name] = packets.get(name, 0) + rule.packets
    return packets


def _interleaved(orders: list[list[str]]) -> list[str]:
    """Names that come in several orders in one that agrees with all of them, as far as they agree."""
    merged: list[str] = []
    for order in orders:
        at = 0
        for name in order:
            if name in merged:
                at = merged.index(name) + 1
                continue
            # Behind what only others have there: each family's own lines stand side by side.
            while at < len(merged) and merged[at] not in order:
                at += 1
            merged.insert(at, name)
            at += 1
    return merged
