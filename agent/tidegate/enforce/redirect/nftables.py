"""Redirect rules through nftables: the table `tidegate` of a workload's network namespace.

Loads what nftables_rules.py writes in one transaction, and tells how the kernel differs from it. It never touches a
table of another name. What goes where is decided in rules.py.

What the kernel should have is told by a twin: the text, loaded by libnftables into a scratch namespace and read back.
The twin's own messages are what a workload's namespace gets, and what it has is compared with them. The kernel counts
the transactions of a namespace; where it still has the number that the last comparison or load ended with, nothing is
read at all, and a load is taken only if nothing came since it was looked at.

Who may not make network namespaces has the twin as a dormant table of another name, next to the workload's own: for an
init container, which comes before whoever could put something there, and has nothing to lose but its pod.

A pod may be allowed to change its own nftables, and libnftables parses what it finds. So there it only words what is
different, in a child of its own (kernel/isolation.py); the messages need neither the library nor what others have.
"""

import enum
import errno
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, assert_never

from tidegate.enforce.redirect import nftables_listing, translations
from tidegate.enforce.redirect.backend import BackendName, Change, InstalledLine
from tidegate.enforce.redirect.families import HEADER
from tidegate.enforce.redirect.nftables_rules import (
    BOTH,
    DORMANT_TABLE,
    FAMILIES,
    TABLE,
    dormant,
    rendered,
    table_family,
)
from tidegate.enforce.redirect.recent import Recent
from tidegate.enforce.redirect.rules import (
    Hook,
    Redirect,
    Rules,
    Translate,
    cgroup_paths,
    lines_of_family,
)
from tidegate.enforce.redirect.text import shown
from tidegate.intent.policy import Family
from tidegate.kernel import (
    cgroups,
    isolation,
    netlink,
    netns,
    nf_exchange,
    nf_tables,
    nf_transaction,
    nftables,
)
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError
from tidegate.kernel.nf_exchange import Exchange
from tidegate.kernel.nf_tables import Contents
from tidegate.kernel.nf_transaction import Step

_TRANSLATING = (Hook.OUTBOUND, Hook.INBOUND)

_TABLE_FLAGS = {1: "dormant", 2: "owner", 4: "persist"}
"""enum nft_table_flags"""

_RACES = frozenset({errno.ERESTART, errno.EAGAIN, errno.EINTR})
"""How the kernel refuses a transaction because of what else happened meanwhile."""
_TRIES = 6

_TOLD = 40
"""Most differences that are told one by one."""
_LISTING_S = 1.0
"""How long a listing may take that is only for telling what is different."""
_TIMES, _SLACK = 4, 4096
"""Bytes that are read of a table: so many times what its twin has, and so many more, for handles and counts."""
_TWIN_BYTES = 2**24


class Twins(enum.Enum):
    """Where the kernel is asked what it makes of a text."""

    APART = enum.auto()
    """In a network namespace made for that, which takes CAP_SYS_ADMIN."""
    BESIDE = enum.auto()
    """In the workload's own, as a dormant table, which takes CAP_NET_ADMIN. libnftables then reads what is there."""


class _Wanted(NamedTuple):
    """Rules as the kernel should have them."""

    family: str
    chains: tuple[str, ...]
    text: str
    digest: bytes
    """Of the text and the ids of its cgroups."""
    translated: frozenset[Family]
    """Of which families connections are redirected by translation."""
    resolvers: Mapping[Family, tuple[str, int]]
    """Where queries are redirected to."""


class _Twin(NamedTuple):
    """What the kernel makes of a text."""

    contents: Contents
    creation: tuple[Step, ...]


class _Seen(NamedTuple):
    """What a namespace had when it was last looked at."""

    generation: int
    """Before it was looked at: a number that has passed never comes again, so what came between is not taken for it."""
    digest: bytes
    """Of the rules that it had; empty for none of tidegate's, and where that is not known."""
    resolvers: Mapping[Family, tuple[str, int]] | None = None
    """Where these redirect queries to; None where that is not known."""


class NftablesBackend:
    """The backend for kernels with nf_tables (backend.Backend)."""

    name = BackendName.NFTABLES

    def __init__(self, twins: Twins = Twins.APART) -> None:
        self._made = twins
        self._twins: Recent[bytes, _Twin] = Recent(64)
        self._exchanges: Recent[bytes, Exchange] = Recent(64)
        self._seen: Recent[int, _Seen] = Recent(1024)

    def render(self, rules: Rules) -> str:
        """The transaction that loads the rules where none are; "" when nothing is redirected.

        KernelError for a cgroup that does not exist, and for a name that nft(8)'s syntax has no words for.
        """
        wanted = _wanted(rules)
        return wanted.text if wanted else ""

    def apply(self, netns_path: str, rules: Rules) -> Change:
        """Make the namespace follow the rules, in one transaction or not at all; with none, remove what is there.

        Open connections stay as they are. KernelError when the namespace is gone, the kernel refuses, or no scratch
        namespace can be made; the rules are then what they were.
        """
        wanted = _wanted(rules)
        if wanted is None:
            return self.remove(netns_path)
        return netns.run_in(netns_path, self._apply, wanted)

    def create(self, netns_path: str, rules: Rules) -> bool:
        """Have exactly these rules in a namespace that has none of anybody, and compare; whether that is so then.

        KernelError as of `apply`.
        """
        wanted = _wanted(rules)
        if wanted is None or self._made is not Twins.APART:
            return False
        return netns.run_in(netns_path, self._create, wanted)

    def check(self, netns_path: str, rules: Rules) -> tuple[str, ...]:
        """How the kernel differs from the rules, one sentence each; () when it does not.

        KernelError when that cannot be told, such as where no scratch namespace can be made.
        """
        return netns.run_in(netns_path, self._check, _wanted(rules))

    def current(self, netns_path: str) -> tuple[InstalledLine, ...] | None:
        """The lines that the namespace has, in order, with their counters; None without a table."""
        return netns.run_in(netns_path, _current)

    def withdraw(self, netns_path: str) -> Change:
        """Take the tables away; redirected connections go on where other nat rules are in place."""
        return netns.run_in(netns_path, self._withdraw)

    def remove(self, netns_path: str) -> Change:
        """Take the tables away. Connections that run through the sidecar end with them."""
        return netns.run_in(netns_path, self._remove)

    def _create(self, wanted: _Wanted) -> bool:
        if not nf_exchange.repeated(self._exchange(wanted)):
            return False
        self._seen.put(netns.cookie(netns.CURRENT), _seen(nf_tables.UNTOUCHED + 1, wanted))
        return True

    def _apply(self, wanted: _Wanted) -> Change:
        cookie = netns.cookie(netns.CURRENT)
        for attempt in range(_TRIES):
            before = self._look(cookie)
            if before.digest == wanted.digest:
                return Change.UNCHANGED
            there = _tables(before)
            if there and not before.digest and self._has(wanted, there):
                self._seen.put(cookie, _seen(before.generation, wanted))
                return Change.UNCHANGED
            twin = self._twin(wanted)
            going = [one for one in _translated(there) if one not in wanted.translated]
            if attempt == 0:
                translations.end(going)
            astray = _zoned(there) and before.resolvers != wanted.resolvers
            if self._change(cookie, before, (*_deletion(there), *twin.creation), wanted):
                break
            netlink.pause(attempt)
        else:
            # Somebody changes something all the time: these steps are right whatever that is.
            nf_transaction.run((*_clearance(), *twin.creation))
        if going:
            translations.forget(going)
        if astray:
            translations.forget_queries(wanted.resolvers)
        return Change.REPLACED if there else Change.CREATED

    def _check(self, wanted: _Wanted | None) -> tuple[str, ...]:
        cookie = netns.cookie(netns.CURRENT)
        for attempt in range(_TRIES):
            before = self._look(cookie)
            if wanted and before.digest == wanted.digest:
                return ()
            there = _tables(before)
            if self._equals(wanted, there):
                self._seen.put(cookie, _seen(before.generation, wanted))
                return ()
            if nf_tables.generation() == before.generation:
                break
            # Some of it may have been read before a change and some after it.
            netlink.pause(attempt)
        return tuple(self._differences(wanted, there))

    def _remove(self) -> Change:
        if not _tables(self._look(netns.cookie(netns.CURRENT))):
            return Change.UNCHANGED
        translations.end(Family)
        change = self._withdraw()
        translations.forget(Family)
        return change

    def _withdraw(self) -> Change:
        cookie = netns.cookie(netns.CURRENT)
        for attempt in range(_TRIES):
            before = self._look(cookie)
            there = _tables(before)
            if not there:
                return Change.UNCHANGED
            if self._change(cookie, before, _deletion(there), None):
                return Change.REMOVED
            netlink.pause(attempt)
        nf_transaction.run(_clearance())
        return Change.REMOVED

    def _look(self, cookie: int) -> _Seen:
        """What is known of the namespace as it is now."""
        generation = nf_tables.generation()
        seen = self._seen.get(cookie)
        if seen is not None and seen.generation == generation:
            return seen
        return _Seen(generation, b"")

    def _change(
        self, cookie: int, before: _Seen, steps: Sequence[Step], wanted: _Wanted | None
    ) -> bool:
        """Take steps that lead to what is wanted, if nothing has changed the namespace since `before`; whether so."""
        try:
            nf_transaction.run(steps, before.generation)
        except KernelError as error:
            if error.errno not in _RACES:
                raise
            return False
        self._seen.put(cookie, _seen(before.generation + 1, wanted))
        return True

    def _has(self, wanted: _Wanted, there: Sequence[str]) -> bool:
        """Whether the namespace has the rules and nothing else, as far as that can be told."""
        try:
            return self._equals(wanted, there)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            return False

    def _equals(self, wanted: _Wanted | None, there: Sequence[str]) -> bool:
        if wanted is None:
            return not there
        if list(there) != [wanted.family]:
            return False
        twin = self._twin(wanted).contents
        most = _TIMES * twin.size + _SLACK
        return twin == nf_tables.contents(wanted.family, TABLE, wanted.chains, most)

    def _twin(self, wanted: _Wanted) -> _Twin:
        twin = self._twins.get(wanted.digest)
        if twin is None:
            match self._made:
                case Twins.APART:
                    twin = netns.run_in_new(_make_twin, wanted)
                case Twins.BESIDE:
                    twin = _make_dormant_twin(wanted)
                case _:
                    assert_never(self._made)
            self._twins.put(wanted.digest, twin)
        return twin

    def _exchange(self, wanted: _Wanted) -> Exchange:
        exchange = self._exchanges.get(wanted.digest)
        if exchange is None:
            exchange = netns.run_in_new(_rehearse, wanted, self._twin(wanted))
            self._exchanges.put(wanted.digest, exchange)
        return exchange

    def _differences(self, wanted: _Wanted | None, there: Sequence[str]) -> Iterator[str]:
        for family in there:
            if wanted is None or family != wanted.family:
                yield f"table {family} {TABLE} is there and should not be"
        if wanted is None:
            return
        if wanted.family not in there:
            yield f"table {wanted.family} {TABLE} is missing"
            return
        if self._equals(wanted, [wanted.family]):
            return
        found = list(_differing(wanted, self._made))
        yield from found[:_TOLD]
        if len(found) > _TOLD:
            yield f"{len(found) - _TOLD} more differences"


def _seen(generation: int, found: _Wanted | None) -> _Seen:
    return _Seen(generation, found.digest, found.resolvers) if found else _Seen(generation, b"")


def _tables(seen: _Seen) -> list[str]:
    """Families of the tables of tidegate's name."""
    if seen.generation == nf_tables.UNTOUCHED:
        return []
    return [family for family in FAMILIES if nf_tables.table_flags(family, TABLE) is not None]


def _deletion(there: Iterable[str]) -> tuple[Step, ...]:
    return tuple(nf_transaction.deletion(family, TABLE) for family in there)


def _clearance() -> tuple[Step, ...]:
    return tuple(nf_transaction.clearance(family, TABLE) for family in FAMILIES)


def _translated(there: Iterable[str]) -> list[Family]:
    """Of which families tables translate, as their chains tell."""
    headers = {
        header
        for table in there
        if any(nf_tables.has_chain(table, TABLE, hook) for hook in _TRANSLATING)
        for header in (HEADER.values() if table == BOTH else (table,))
    }
    return [family for family, header in HEADER.items() if header in headers]


def _zoned(there: Iterable[str]) -> bool:
    """Whether tables redirect queries that go by UDP."""
    return any(nf_tables.has_chain(family, TABLE, Hook.DNS_ZONE) for family in there)


def _make_twin(wanted: _Wanted) -> _Twin:
    nftables.load(wanted.text)
    made = nf_tables.contents(wanted.family, TABLE, wanted.chains, _TWIN_BYTES)
    if made is None or not made.complete:
        problem = f"the table {TABLE} cannot be read back after it was loaded"
        raise KernelError(problem, errno.EPROTO)
    return _Twin(made, tuple(nf_transaction.creation(wanted.family, made)))


def _rehearse(wanted: _Wanted, twin: _Twin) -> Exchange:
    sets = [one.set_name for one in twin.contents.elements]
    exchange = nf_exchange.recorded(twin.creation, wanted.family, TABLE, sets)
    if twin.contents == nf_tables.contents(wanted.family, TABLE, wanted.chains, _TWIN_BYTES):
        return exchange
    problem = f"the table {TABLE} does not read back as it was loaded"
    raise KernelError(problem, errno.EPROTO)


def _make_dormant_twin(wanted: _Wanted) -> _Twin:
    with _dormant(wanted):
        made = nf_tables.contents(wanted.family, DORMANT_TABLE, wanted.chains, _TWIN_BYTES)
    if made is None or not made.complete:
        problem = f"the table {DORMANT_TABLE} cannot be read back after it was loaded"
        raise KernelError(problem, errno.EPROTO)
    renamed = nf_transaction.renamed(made, TABLE)
    return _Twin(renamed, tuple(nf_transaction.creation(wanted.family, renamed)))


@contextmanager
def _dormant(wanted: _Wanted) -> Iterator[None]:
    """The rules as a table that packets do not come to, gone afterwards; one that was left behind goes first."""
    if nf_tables.table_flags(wanted.family, DORMANT_TABLE) is not None:
        nf_transaction.run([nf_transaction.deletion(wanted.family, DORMANT_TABLE)])
    nftables.load(dormant(wanted.family, wanted.text))
    try:
        yield
    finally:
        nf_transaction.run([nf_transaction.deletion(wanted.family, DORMANT_TABLE)])


def _list_twin(wanted: _Wanted) -> str:
    nftables.load(wanted.text)
    return nftables.list_text(wanted.family, TABLE) or ""


def _current() -> tuple[InstalledLine, ...] | None:
    hooks = {hook.value: hook for hook in Hook}
    packets: Counter[tuple[Hook, str]] = Counter()
    found = False
    for family in FAMILIES:
        rules = nf_tables.rules(family, TABLE)
        found = found or rules is not None
        for rule in rules or ():
            if rule.chain in hooks:
                packets[hooks[rule.chain], shown(rule.comment)] += rule.packets
    if not found:
        return None
    return tuple(
        InstalledLine(hook=hook, name=name, packets=count)
        for (hook, name), count in packets.items()
    )


def _wanted(rules: Rules) -> _Wanted | None:
    if not rules.lists:
        return None
    return _made(rules, tuple(cgroups.find(path) for path in cgroup_paths(rules)))


@functools.lru_cache(256)
def _made(rules: Rules, found: tuple[Cgroup, ...]) -> _Wanted:
    text = rendered(rules, dict(zip(cgroup_paths(rules), found, strict=True)))
    digest = hashlib.sha256(f"{sorted(one.id for one in found)}\n{text}".encode()).digest()
    return _Wanted(
        family=table_family(rules),
        chains=tuple(hook.value for hook, _ in rules.lists),
        text=text,
        digest=digest,
        translated=frozenset(one for one in rules.families if _translates(rules, one)),
        resolvers=translations.resolvers(rules),
    )


def _translates(rules: Rules, family: Family) -> bool:
    return any(
        isinstance(line.action, Redirect | Translate)
        for _, lines in rules.lists
        for line in lines_of_family(lines, family)
    )


def _differing(wanted: _Wanted, twins: Twins) -> Iterator[str]:
    """What is different in a table that is known to differ from its twin."""
    name = f"table {wanted.family} {TABLE}"
    flags = nf_tables.table_flags(wanted.family, TABLE)
    if flags:
        words = [word for bit, word in _TABLE_FLAGS.items() if flags & bit]
        yield f"{name} has the flags {flags} ({', '.join(words) or 'unknown'}), should have none"
        return
    nftables.prepare()
    try:
        listed = isolation.run_in(
            netns.CURRENT, nftables.list_text, wanted.family, TABLE, deadline_s=_LISTING_S
        )
    except KernelError as error:
        yield f"{name} is another one, and cannot be listed: {shown(str(error))}"
        return
    if listed is None:
        yield f"{name} is missing"
        return
    if twins is Twins.BESIDE:
        yield f"{name} is another one than the policy says"
        return
    should = netns.run_in_new(_list_twin, wanted)
    found = list(nftables_listing.differences(should, listed))
    yield from found or (f"{name} differs in something that its listing does not show",)
