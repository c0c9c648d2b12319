"""Redirect rules through the legacy tables: chains TIDEGATE_* with one jump each from a built-in chain.

Loads exactly the text of iptables_rules.py, reads back what the kernel has and tells the difference. Nothing else of
a table is touched, and a table of a family that is off is not even looked at: the kernel makes one when it is asked
for it.

A table is replaced as a whole. Several tables cannot be replaced in one step: what is added comes before what goes,
so that no connection goes around the sidecar in between, and when a table is refused the others become what they were.
"""

import errno
import functools
import itertools
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from tidegate.enforce.redirect import translations
from tidegate.enforce.redirect.backend import BackendName, Change, InstalledLine
from tidegate.enforce.redirect.iptables_rules import (
    FAMILIES,
    MARKING,
    OWNED,
    PLACES,
    SECTIONS,
    SET_PREFIX,
    SET_SECTION,
    TABLES,
    Place,
    chain_names,
    rendered,
)
from tidegate.enforce.redirect.rules import Hook, Rules, cgroup_paths
from tidegate.enforce.redirect.text import shown
from tidegate.intent.policy import Family
from tidegate.kernel import cgroups, ipset, legacy_tables, netns, xtables, xtables_rules
from tidegate.kernel.errors import KernelError
from tidegate.kernel.xtables import Content, Entry


class IptablesBackend:
    """The backend for kernels without nf_tables."""

    name = BackendName.IPTABLES

    def __init__(self, *, with_sets: bool | None = None) -> None:
        """`with_sets` says whether long lists become IP sets; None to ask the kernel."""
        self._with_sets = with_sets

    def render(self, rules: Rules) -> str:
        """Sections for ipset restore, iptables-restore and ip6tables-restore; "" when nothing is redirected."""
        with_sets = _kernel_has_sets() if self._with_sets is None else self._with_sets
        found = {path: cgroups.find(path) for path in cgroup_paths(rules)}
        return rendered(rules, with_sets, tuple(found.items()))

    def apply(self, netns_path: str, rules: Rules) -> Change:
        """See Backend. KernelError as well when another program does not let go of the xtables lock."""
        text = self.render(rules)
        if not text:
            return self.remove(netns_path)
        return netns.run_in(netns_path, _apply, _wanted(text), translations.resolvers(rules))

    def create(self, netns_path: str, rules: Rules) -> bool:
        """False: the legacy tables cannot be compared any shorter than by `check`."""
        return False

    def check(self, netns_path: str, rules: Rules) -> tuple[str, ...]:
        """See Backend."""
        wanted = _wanted(self.render(rules))
        return tuple(_told(_differences(wanted, netns.run_in(netns_path, _present, wanted))))

    def current(self, netns_path: str) -> tuple[InstalledLine, ...] | None:
        """See Backend. A line that several rules or both families have is told once, with all of its packets."""
        present = netns.run_in(netns_path, _present, _NOTHING)
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


# Reading the text again, and applying it.


class _Wanted(msgspec.Struct, frozen=True):
    """What a text says."""

    sets: tuple[ipset.Set, ...]
    tables: dict[legacy_tables.Family, dict[str, Content]]

    def of(self, family: legacy_tables.Family, table: str) -> Content:
        return self.tables.get(family, {}).get(table, xtables.EMPTY)


class _Held(NamedTuple):
    """The set of the namespace that is, or is to be, a wanted one."""

    name: str
    """Of the wanted set, unless somebody else uses a set of another kind there."""
    found: ipset.Found | None
    """None when it is not there, or of another kind and used by nobody."""
    content: ipset.Set | None
    """None when there is none, or it holds something that no wanted set does."""

    def is_as_wanted(self, wanted: ipset.Set) -> bool:
        return self.content is not None and self.content.entries == wanted.entries


class _Present(msgspec.Struct, frozen=True):
    """What a namespace has of tidegate's. Tables that it does not have are not there."""

    sets: dict[str, _Held]
    """By the names that are wanted."""
    strays: tuple[str, ...]
    """Other sets of tidegate's names that nobody uses."""
    set_names: dict[int, str]
    """What the sets of rules are called in `tables`: as it is wanted."""
    tables: dict[legacy_tables.Family, dict[str, Content]]

    def contents(self) -> Iterator[Content]:
        for tables in self.tables.values():
            yield from tables.values()

    def of(self, family: legacy_tables.Family, table: str) -> Content:
        return self.tables.get(family, {}).get(table, xtables.EMPTY)

    @property
    def has_rules(self) -> bool:
        return not all(content.is_empty for content in self.contents())

    @property
    def is_empty(self) -> bool:
        has_sets = bool(self.strays) or any(held.found for held in self.sets.values())
        return not has_sets and not self.has_rules


_NOTHING = _Wanted(sets=(), tables={})


@functools.lru_cache(maxsize=256)
def _wanted(text: str) -> _Wanted:
    if not text:
        return _NOTHING
    sections: dict[str, list[str]] = {}
    for line in text.removesuffix("\n").split("\n"):
        if line == SET_SECTION or line in SECTIONS.values():
            sections[line] = []
        else:
            sections[list(sections)[-1]].append(line)
    tables = {
        family: xtables_rules.compiled(family, xtables_rules.parse("\n".join(sections[section])))
        for family, section in SECTIONS.items()
        if section in sections
    }
    return _Wanted(tuple(_sets(sections.get(SET_SECTION, []))), tables)


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


def _present(wanted: _Wanted) -> _Present:
    listed = ipset.found(SET_PREFIX)
    held = _held(wanted.sets)
    used = {one.name for one in held.values()}
    names = {one.index: one.name for one in listed if one.name not in held}
    names |= {one.found.index: name for name, one in held.items() if one.found}
    return _Present(
        sets=held,
        strays=tuple(one.name for one in listed if not one.in_use and one.name not in used),
        set_names=names,
        tables={
            family: {
                table: xtables.content(family, table, OWNED, names)
                for table in TABLES
                if table in existing
            }
            for family in legacy_tables.Family
            if (existing := legacy_tables.existing(family))
        },
    )


_OTHER_NAMES = 8
"""How many other names a set may have where somebody else uses one of another kind."""


def _held(wanted: tuple[ipset.Set, ...]) -> dict[str, _Held]:
    if not wanted:
        return {}
    there = ipset.find(one.name for one in wanted)
    held = {}
    for one in wanted:
        name = one.name
        if _is_in_the_way(there.get(name), one):
            name = _other_name(one)
            there |= ipset.find([name])
        found = there.get(name)
        if found is None or found.kind is not one.kind:
            held[one.name] = _Held(name, None, None)
        else:
            held[one.name] = _Held(name, found, ipset.content(found, one.size))
    return held


def _other_name(wanted: ipset.Set) -> str:
    names = [
        f"{wanted.name[: ipset.MAX_NAME - 2]}.{number}" for number in range(1, _OTHER_NAMES + 1)
    ]
    there = ipset.find(names)
    for name in names:
        if not _is_in_the_way(there.get(name), wanted):
            return name
    raise KernelError(f"the names for the set {wanted.name} all belong to sets of other kinds")


def _is_in_the_way(found: ipset.Found | None, wanted: ipset.Set) -> bool:
    """Whether a set can neither be what is wanted nor be taken away for it."""
    return found is not None and found.in_use and found.kind is not wanted.kind


def _apply(wanted: _Wanted, resolvers: Mapping[Family, tuple[str, int]]) -> Change:
    before = _present(wanted)
    # Most calls change nothing; those need not wait for anybody.
    if _is_as_wanted(before, wanted):
        return Change.UNCHANGED
    going = [
        family
        for family, table in FAMILIES.items()
        if before.of(table, "nat").chains and not wanted.of(table, "nat").chains
    ]
    change = _replace(wanted, going)
    if _translating(before) not in ([], _translating(wanted)):
        translations.forget_queries(resolvers)
    return change


def _withdraw() -> Change:
    if _is_as_wanted(_present(_NOTHING), _NOTHING):
        return Change.UNCHANGED
    return _replace(_NOTHING, ())


def _remove() -> Change:
    before = _present(_NOTHING)
    if _is_as_wanted(before, _NOTHING):
        return Change.UNCHANGED
    return _replace(_NOTHING, Family if before.has_rules else ())


def _replace(wanted: _Wanted, going: Iterable[Family]) -> Change:
    """Load what is wanted, unless somebody else has done so meanwhile.

    Of the families `going` nothing is to be translated any more. Their connections end first: the lock, for which
    others wait, is not held for as long as that takes.
    """
    families = tuple(going)
    if families:
        translations.end(families)
    with xtables.locked():
        present = _present(wanted)
        if _is_as_wanted(present, wanted):
            return Change.UNCHANGED
        _load(present, wanted)
    if families:
        translations.forget(families)
    if wanted == _NOTHING:
        return Change.REMOVED
    return Change.CREATED if present.is_empty else Change.REPLACED


def _translating(tables: "_Wanted | _Present") -> list[Entry]:
    """The rules that send queries elsewhere."""
    return [
        rule.entry
        for family in legacy_tables.Family
        for name, rules in tables.of(family, "nat").chains.items()
        if name.startswith(PLACES[Hook.OUTBOUND].chain)
        for rule in rules
        if xtables.target(family, rule.entry) == "DNAT"
    ]


def _is_as_wanted(present: _Present, wanted: _Wanted) -> bool:
    return (
        not present.strays
        and all(present.sets[one.name].is_as_wanted(one) for one in wanted.sets)
        and all(
            present.of(family, table).equals(wanted.of(family, table))
            for family in legacy_tables.Family
            for table in TABLES
        )
    )


class _Step(NamedTuple):
    """One table to be replaced."""

    family: legacy_tables.Family
    table: str
    before: Content
    after: Content


def _load(present: _Present, wanted: _Wanted) -> None:
    made = [held.name for held in present.sets.values() if held.found is None]
    done: list[_Step] = []
    try:
        _make_sets(present, wanted)
        there = ipset.find(held.name for held in present.sets.values())
        indexes = {name: there[held.name].index for name, held in present.sets.items()}
        for step in _steps(present, wanted):
            xtables.replace(step.family, step.table, OWNED, step.after, indexes)
            done.append(step)
    except KernelError as error:
        _undo(present, done, made, error)
        if error.errno == errno.EINVAL and netns.is_of_other_users(netns.CURRENT):
            raise KernelError(f"{error}: {_OTHER_USERS}", error.errno) from error
        raise
    _destroy_strays(present)


# net/netfilter/xt_owner.c, owner_check.
_OTHER_USERS = (
    "the legacy tables do not tell users apart in a network namespace of another user namespace"
    " (a pod with hostUsers: false); expected a kernel with nf_tables and backend: auto or nftables,"
    " or a pod without hostUsers: false"
)


def _steps(present: _Present, wanted: _Wanted) -> list[_Step]:
    steps = [
        _Step(family, table, present.of(family, table), wanted.of(family, table))
        for family in legacy_tables.Family
        for table in TABLES
    ]
    changed = (step for step in steps if not step.before.equals(step.after))
    return sorted(changed, key=_turn)


def _turn(step: _Step) -> tuple[int, int]:
    """Tables that lose a list come last, in the opposite order; first of those the ones that get another for it."""
    hooks = {place.chain for place in PLACES.values()}
    before, after = hooks & step.before.chains.keys(), hooks & step.after.chains.keys()
    loses, gains = bool(before - after), bool(after - before)
    order = TABLES.index(step.table)
    if loses:
        return (1 if gains else 2), -order
    return 0, order


def _make_sets(present: _Present, wanted: _Wanted) -> None:
    """Make the sets that are missing, repair the others."""
    missing = []
    for one in wanted.sets:
        held = present.sets[one.name]
        if held.found is None:
            missing.append(msgspec.structs.replace(one, name=held.name))
        elif not held.is_as_wanted(one):
            _repair(held.name, one)
    ipset.destroy(one.name for one in missing)
    ipset.create(missing)


def _repair(name: str, wanted: ipset.Set) -> None:
    """Replace what a set holds, by changing places with a new one: rules may ask it."""
    spare = f"{SET_PREFIX}{secrets.token_hex(4)}-spare"
    try:
        ipset.create([msgspec.structs.replace(wanted, name=spare)])
        ipset.swap(spare, name)
    finally:
        ipset.destroy([spare])


_STRAYS_S = 0.02
_STRAYS_AT_ONCE = 50
"""How long one call destroys sets that nobody wants, with the lock held; the next call goes on."""


def _destroy_strays(present: _Present) -> None:
    """Without the lock, a set could go that another applier has just found and is about to use."""
    until = time.monotonic() + _STRAYS_S
    used = {*present.sets, *(held.name for held in present.sets.values()), *present.strays}
    # Those that rules asked before come first; those that other rules ask are refused, and stay.
    asked = [name for name in present.set_names.values() if name not in used]
    doomed = [*asked, *present.strays]
    for at in range(0, len(doomed), _STRAYS_AT_ONCE):
        ipset.destroy(doomed[at : at + _STRAYS_AT_ONCE])
        if time.monotonic() > until:
            return


def _undo(present: _Present, done: list[_Step], made: list[str], reason: KernelError) -> None:
    indexes = {name: index for index, name in present.set_names.items()}
    try:
        for step in reversed(done):
            xtables.replace(step.family, step.table, OWNED, step.before, indexes)
        ipset.destroy(made)
    except KernelError as error:
        problem = f"{reason}; and what was loaded before cannot be taken back: {error}"
        raise KernelError(problem, reason.errno) from error


# Telling differences and counters.


_MOST_TOLD = 100
"""What is different where somebody else wrote has no end."""


def _told(differences: Iterator[str]) -> Iterator[str]:
    yield from itertools.islice(differences, _MOST_TOLD)
    if next(differences, None) is not None:
        yield f"there are more differences than these {_MOST_TOLD}"


def _differences(wanted: _Wanted, present: _Present) -> Iterator[str]:
    yield from _set_differences(wanted, present)
    for family in legacy_tables.Family:
        for table in TABLES:
            should, has = wanted.of(family, table), present.of(family, table)
            if not has.equals(should):
                yield from _table_differences(family, table, should, has)


def _set_differences(wanted: _Wanted, present: _Present) -> Iterator[str]:
    for one in wanted.sets:
        held = present.sets[one.name]
        if held.found is None:
            yield f"set {held.name} is missing"
        elif held.content is None:
            yield f"set {held.name} does not hold the {one.size} entries it should and nothing else"
        else:
            for entry in sorted(set(held.content.entries) - set(one.entries)):
                yield f"set {held.name} holds {entry} and should not"
            for entry in sorted(set(one.entries) - set(held.content.entries)):
                yield f"set {held.name} does not hold {entry}"
    yield from (f"set {shown(name)} is there and should not be" for name in present.strays)


def _table_differences(
    family: legacy_tables.Family, table: str, should: Content, has: Content
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
    family: legacy_tables.Family, where: str, should: Content, has: Content
) -> Iterator[str]:
    jumps = (*should.jumps, *has.jumps)
    rules = dict(
        zip(jumps, xtables_rules.spelled(family, [jump.entry for jump in jumps]), strict=True)
    )
    for jump in should.jumps:
        # A chain that is missing stands for the jump to it.
        if jump not in has.jumps and xtables.target(family, jump.entry) in has.chains:
            yield f"rule {jump.position} of {jump.chain} in {where} is not '{rules[jump]}'"
    for jump in has.jumps:
        if jump not in should.jumps:
            rule = f"'{shown(rules[jump])}'"
            yield f"rule {jump.position} of {shown(jump.chain)} in {where} is {rule} and should not be"


def _chain_differences(
    family: legacy_tables.Family, where: str, should: list[Entry], has: list[Entry]
) -> Iterator[str]:
    wanted, present = _by_line(family, should), _by_line(family, has)
    yield from (f"{line} of {where} is missing" for line in wanted if line not in present)
    extra = [line for line in present if line not in wanted]
    nameless = [line for line in extra if not _line_name(family, present[line])][:_MOST_TOLD]
    rules = xtables_rules.spelled(family, [present[line] for line in nameless]) if nameless else ()
    told = {line: f"rule '{shown(rule)}'" for line, rule in zip(nameless, rules, strict=True)}
    for line in extra:
        yield f"{told.get(line, line)} of {where} is there and should not be"
    changed = [line for line in wanted if line in present and wanted[line] != present[line]]
    entries = [entry for line in changed for entry in (present[line], wanted[line])]
    spelled = iter(xtables_rules.spelled(family, entries) if entries else ())
    for line in changed:
        is_, should_be = shown(next(spelled)), shown(next(spelled))
        yield f"{line} of {where} is '{is_}', should be '{should_be}'"
    if wanted == present and list(wanted) != list(present):
        yield f"the lines of {where} are in another order"


def _by_line(family: legacy_tables.Family, entries: list[Entry]) -> dict[str, Entry]:
    """Rules by a name for people."""
    named: dict[str, Entry] = {}
    seen: Counter[str] = Counter()
    for entry in entries:
        line = _line_name(family, entry)
        name = f"line {line}" if line else "rule without a name"
        seen[name] += 1
        named[f"{name} (rule {seen[name]})" if seen[name] > 1 else name] = entry
    return named


def _line_name(family: legacy_tables.Family, entry: Entry) -> str:
    """The last comment of a rule; see _Writer."""
    return shown((xtables.comments(family, entry) or ("",))[-1])


def _installed_lines(present: _Present) -> Iterator[InstalledLine]:
    for hook in Hook:
        place = PLACES[hook]
        counted = [
            _packets(family, place, tables.get(place.table, xtables.EMPTY))
            for family, tables in present.tables.items()
        ]
        for name in _interleaved([list(one) for one in counted]):
            packets = sum(one.get(name, 0) for one in counted)
            yield InstalledLine(hook=hook, name=name, packets=packets)


def _packets(family: legacy_tables.Family, place: Place, content: Content) -> dict[str, int]:
    """What the lines of one list counted, in their order."""
    packets: dict[str, int] = {}
    chains = itertools.takewhile(content.chains.__contains__, chain_names(place))
    for rule in itertools.chain.from_iterable(content.chains[chain] for chain in chains):
        prepares = xtables.target(family, rule.entry) == MARKING
        if not prepares and not xtables.goes_elsewhere(family, rule.entry):
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
