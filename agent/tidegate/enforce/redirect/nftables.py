"""Redirect rules through nftables: the table `tidegate` of a workload's network namespace.

Renders the lines of rules.py to nft(8)'s syntax, for people as for the library that knows it, loads them in one
transaction, and tells how the kernel differs. It never touches a table of another name. What goes where is decided in
rules.py.

What the kernel should have is told by a twin: the text, loaded by libnftables into a scratch namespace and read back.
The twin's own messages are what a workload's namespace gets, and what it has is compared with them. The kernel counts
the transactions of a namespace; where it still has the number that the last comparison or load ended with, nothing is
read at all, and a load is taken only if nothing came since it was looked at.

A pod may be allowed to change its own nftables, and libnftables parses what it finds. So there it only words what is
different, in a child of its own (kernel/isolation.py); the messages need neither the library nor what others have.
"""

import errno
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, assert_never

from tidegate.enforce.redirect import translations
from tidegate.enforce.redirect.backend import BackendName, Change, InstalledLine
from tidegate.enforce.redirect.recent import Recent
from tidegate.enforce.redirect.rules import (
    Action,
    ByGroup,
    ByUser,
    Criterion,
    Drop,
    First,
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
from tidegate.intent.policy import Family
from tidegate.kernel import (
    cgroups,
    isolation,
    netns,
    nf_tables,
    nf_transaction,
    nfnetlink,
    nftables,
)
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError
from tidegate.kernel.nf_tables import Contents
from tidegate.kernel.nf_transaction import Step

TABLE = "tidegate"

_BOTH = "inet"
_HEADER = {Family.IPV4: "ip", Family.IPV6: "ip6"}
"""What nft calls a family's header, and the tables that only its packets come to."""
FAMILIES = (_BOTH, *_HEADER.values())

_CHAINS = {
    Hook.OUTBOUND: "type nat hook output priority -100",
    Hook.INBOUND: "type nat hook prerouting priority -100",
    Hook.INBOUND_TPROXY: "type filter hook prerouting priority -150",
    Hook.DNS_ZONE: "type filter hook output priority -300",
    Hook.INVALID: "type filter hook prerouting priority -151",
    Hook.INVALID_OUTBOUND: "type filter hook output priority -150",
}
_TRANSLATING = (Hook.OUTBOUND, Hook.INBOUND)
_SENDING = (Hook.OUTBOUND, Hook.DNS_ZONE, Hook.INVALID_OUTBOUND)
"""Where a packet has an interface that it leaves by."""
_ARRIVING = (Hook.INBOUND,)
"""Where a redirected packet keeps its address: `redirect` would take one of the interface that it arrives on."""
_ASKS_AS = {
    Hook.INVALID: Hook.INBOUND,
    Hook.INVALID_OUTBOUND: Hook.OUTBOUND,
    Hook.DNS_ZONE: Hook.OUTBOUND,
}
"""Lists that ask much of what another list asks, and so look into its sets."""

_UNTOUCHED = 1
"""The generation of a namespace whose nftables nobody has ever changed (nf_tables_init_net)."""

_TABLE_FLAGS = {1: "dormant", 2: "owner", 4: "persist"}
"""enum nft_table_flags"""

_RACES = frozenset({errno.ERESTART, errno.EAGAIN, errno.EINTR})
"""How the kernel refuses a transaction because of what else happened meanwhile."""
_TRIES = 6

_TOLD = 40
"""Most differences that are told one by one."""
_LISTING_S = 1.0
"""How long a listing may take that is only for telling what is different."""
_WIDTH = 96
"""Most characters of a row of elements."""
_TIMES, _SLACK = 4, 4096
"""Bytes that are read of a table: so many times what its twin has, and so many more, for handles and counts."""
_TWIN_BYTES = 2**24


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

    def __init__(self) -> None:
        self._twins: Recent[bytes, _Twin] = Recent(64)
        self._seen: Recent[int, _Seen] = Recent(4096)

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
            nfnetlink.pause(attempt)
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
            nfnetlink.pause(attempt)
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
            nfnetlink.pause(attempt)
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
            twin = netns.run_in_new(_make_twin, wanted)
            self._twins.put(wanted.digest, twin)
        return twin

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
        found = list(_differing(wanted))
        yield from found[:_TOLD]
        if len(found) > _TOLD:
            yield f"{len(found) - _TOLD} more differences"


def _seen(generation: int, found: _Wanted | None) -> _Seen:
    return _Seen(generation, found.digest, found.resolvers) if found else _Seen(generation, b"")


def _tables(seen: _Seen) -> list[str]:
    """Families of the tables of tidegate's name."""
    if seen.generation == _UNTOUCHED:
        return []
    return [family for family in FAMILIES if nf_tables.table_flags(family, TABLE) is not None]


def _deletion(there: Iterable[str]) -> tuple[Step, ...]:
    return tuple(nf_transaction.deletion(family, TABLE) for family in there)


def _clearance() -> tuple[Step, ...]:
    return tuple(step for family in FAMILIES for step in nf_transaction.clearance(family, TABLE))


def _translated(there: Iterable[str]) -> list[Family]:
    """Of which families tables translate, as their chains tell."""
    headers = {
        header
        for table in there
        if any(nf_tables.has_chain(table, TABLE, hook) for hook in _TRANSLATING)
        for header in (_HEADER.values() if table == _BOTH else (table,))
    }
    return [family for family, header in _HEADER.items() if header in headers]


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
    return _rendered(rules, tuple(cgroups.find(path) for path in _cgroup_paths(rules)))


def _cgroup_paths(rules: Rules) -> Iterator[str]:
    for _, lines in rules.lists:
        for line in lines:
            for match in line.matches:
                criterion = match.criterion if isinstance(match, Not) else match
                if isinstance(criterion, InCgroup):
                    yield criterion.path


@functools.lru_cache(256)
def _rendered(rules: Rules, found: tuple[Cgroup, ...]) -> _Wanted:
    family = _BOTH if len(rules.families) > 1 else _HEADER[rules.families[0]]
    of_path = dict(zip(_cgroup_paths(rules), found, strict=True))
    writer = _Writer(family, of_path)
    chains = [
        writer.chain(hook, lines if family == _BOTH else lines_of_family(lines, rules.families[0]))
        for hook, lines in rules.lists
    ]
    body = "\n".join((*writer.sets, *chains))
    text = f"create table {family} {TABLE}\ntable {family} {TABLE} {{\n{body}}}\n"
    digest = hashlib.sha256(f"{sorted(one.id for one in found)}\n{text}".encode()).digest()
    return _Wanted(
        family=family,
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


class _Words(NamedTuple):
    """A criterion in nft's words: the packet's `left` is one of `values`."""

    left: str
    values: Sequence[str]
    type: str = ""
    """Of a set of such values; without one they are written where they are used."""
    plural: str = ""
    """What tells such a set from others of the same line."""
    intervals: bool = False
    compared: bool = False
    """Whether "is" needs an operator of its own."""


class _Writer:
    """Writes the chains of one table, and gathers the sets that they look into."""

    def __init__(self, family: str, of_path: dict[str, Cgroup]) -> None:
        self._family = family
        self._cgroups = of_path
        self._made: dict[str, _Words] = {}

    @property
    def sets(self) -> Iterator[str]:
        """The sets that the chains so far look into."""
        return (_set(name, words) for name, words in self._made.items())

    def chain(self, hook: Hook, lines: Iterable[Line]) -> str:
        head = f"\tchain {hook} {{\n\t\t{_CHAINS[hook]}; policy accept;\n"
        rules = "".join(f"\t\t{self._rule(hook, line)}\n" for line in lines)
        return f"{head}{rules}\t}}\n"

    def _rule(self, hook: Hook, line: Line) -> str:
        words = [self._words(match, line, hook) for match in line.matches]
        listed = sum(len(one.values) > 1 and one.type != "" for _, one in words)
        parts = []
        for operator, one in words:
            right = one.values[0]
            if len(one.values) > 1 and one.type:
                name = line.name if listed == 1 else f"{line.name}-{one.plural}"
                right = f"@{self._set(hook, name, one)}"
            elif len(one.values) > 1:
                right = f"{{ {', '.join(one.values)} }}"
            parts.append(f"{one.left} {operator}{right}")
        said = " ".join(part for part in parts if not _goes_without_saying(part, parts))
        return f'{said} counter {self._action(line.action, hook)} comment "{line.name}"'.lstrip()

    def _set(self, hook: Hook, name: str, words: _Words) -> str:
        """The name of a set of these values: one that is there already, if its list has the same line."""
        theirs = f"{_ASKS_AS.get(hook, hook)}-{name}"
        if self._made.get(theirs) == words:
            return theirs
        own = f"{hook}-{name}"
        self._made[own] = words
        return own

    def _words(self, match: Match, line: Line, hook: Hook) -> tuple[str, _Words]:
        """A match's operator, with the blank after it, and its words."""
        if isinstance(match, Not):
            return "!= ", self._criterion(match.criterion, line, hook)
        words = self._criterion(match, line, hook)
        return "== " if words.compared else "", words

    def _criterion(self, criterion: Criterion, line: Line, hook: Hook) -> _Words:
        match criterion:
            case OfProtocol(protocols):
                return _Words("meta l4proto", protocols)
            case Opening():
                return _Words("tcp flags & (fin | syn | rst | ack)", ("syn",), compared=True)
            case OfKnownSocket():
                return _Words("socket wildcard", ("0",))
            case OfFamily(family):
                return _Words("meta nfproto", (family,))
            case ByUser(uids):
                return _Words("meta skuid", _texts(uids), "uid", "users", intervals=True)
            case ByGroup(gids):
                return _Words("meta skgid", _texts(gids), "gid", "groups", intervals=True)
            case Marked(mark):
                left = "meta mark" if mark.mask == _ALL_BITS else f"meta mark & {mark.mask:#010x}"
                return _Words(left, (f"{mark.value:#010x}",), compared=mark.mask != _ALL_BITS)
            case InCgroup(path):
                cgroup = self._cgroups[path]
                return _Words(f"socket cgroupv2 level {cgroup.level}", (_quoted(cgroup.path),))
            case OnInterface(interfaces):
                left = "oifname" if hook in _SENDING else "iifname"
                names = tuple(_quoted(name) for name in interfaces)
                return _Words(left, names, "ifname", "interfaces")
            case ToPort(ports):
                left = f"{_transport(line)} dport"
                return _Words(left, _texts(ports), "inet_service", "ports", intervals=True)
            case ToNetwork(family, networks):
                return self._networks(family, "daddr", networks, "destinations")
            case FromNetwork(family, networks):
                return self._networks(family, "saddr", networks, "sources")
            case ToSelf():
                return _Words("fib daddr type", ("local",))
            case Invalid():
                return _Words("ct state", ("invalid",))
            case First():
                return _Words("ct status & confirmed", ("0",), compared=True)
            case Translated():
                return _Words("ct status", ("dnat",))
            case _:
                assert_never(criterion)

    def _networks(
        self, family: Family, field: str, networks: tuple[str, ...], plural: str
    ) -> _Words:
        values = tuple(network.removesuffix(_HOST[family]) for network in networks)
        left = f"{_HEADER[family]} {field}"
        return _Words(left, values, f"{family}_addr", plural, intervals=True)

    def _action(self, action: Action, hook: Hook) -> str:
        match action:
            case Leave():
                return "return"
            case Redirect(port):
                return f"dnat to :{port}" if hook in _ARRIVING else f"redirect to :{port}"
            case Tproxy(port):
                return f"tproxy to :{port} accept"
            case Translate(address, port):
                header = _HEADER[Family.IPV6 if ":" in address else Family.IPV4]
                family = f"{header} " if self._family == _BOTH else ""
                host = f"[{address}]" if ":" in address else address
                return f"dnat {family}to {host}:{port}"
            case Zone(number):
                return f"ct original zone set {number} return"
            case Drop():
                return "drop"
            case _:
                assert_never(action)


_IMPLIED = {
    "meta l4proto tcp": "tcp ",
    "meta l4proto udp": "udp ",
    "meta nfproto ipv4": "ip ",
    "meta nfproto ipv6": "ip6 ",
}
"""Matches that nft makes by itself before it looks into a header."""


def _goes_without_saying(part: str, parts: Iterable[str]) -> bool:
    return part in _IMPLIED and any(other.startswith(_IMPLIED[part]) for other in parts)


_ALL_BITS = 2**32 - 1
_HOST = {Family.IPV4: "/32", Family.IPV6: "/128"}
"""The prefix of a network of one address."""


def _transport(line: Line) -> str:
    """Whose header a line's ports are in: "th" for whichever there is."""
    for match in line.matches:
        if isinstance(match, OfProtocol) and len(match.protocols) == 1:
            return match.protocols[0]
    return "th"


def _texts(ranges: Iterable[object]) -> tuple[str, ...]:
    return tuple(map(str, ranges))


_PLAIN = re.compile(r"""[^\s"\\*\x00-\x1f\x7f-\x9f]+""")
"""Names that nft(8)'s quoted strings can hold and mean nothing else than themselves."""


def _quoted(name: str) -> str:
    if not _PLAIN.fullmatch(name):
        raise KernelError(f"{name!r} cannot be written in nftables' syntax", errno.EINVAL)
    return f'"{name}"'


def _set(name: str, words: _Words) -> str:
    flags = "\t\tflags interval\n" if words.intervals else ""
    rows, row = [], ""
    for value in words.values:
        longer = f"{row}, {value}" if row else value
        if len(longer) > _WIDTH:
            rows.append(row)
            longer = value
        row = longer
    elements = ",\n\t\t\t".join((*rows, row))
    return f"\tset {name} {{\n\t\ttype {words.type}\n{flags}\t\telements = {{ {elements} }}\n\t}}\n"


def _differing(wanted: _Wanted) -> Iterator[str]:
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
    should = netns.run_in_new(_list_twin, wanted)
    found = list(_compared(_parts(should), _parts(listed)))
    yield from found or (f"{name} differs in something that its listing does not show",)


def _compared(should: dict[str, str], has: dict[str, str]) -> Iterator[str]:
    yield from (f"{part} is missing" for part in should if part not in has)
    yield from (f"{shown(part)} is there and should not be" for part in has if part not in should)
    for part, what in should.items():
        if part in has and has[part] != what:
            yield f"{part} is {shown(has[part])}, should be {shown(what)}"
    if should.keys() == has.keys() and list(should) != list(has):
        yield "the lines are in another order"


_OBJECT = re.compile(r"\t(?P<kind>[a-z ]+) (?P<name>\S+) \{")
_RULE = re.compile(r"\t\t\S")
"""In a chain, after the row that says what the chain is; what a rule goes on with is indented further."""
_COMMENT = re.compile(r"""(?P<rule>.*?) ?comment "(?P<name>[^"]*)\"""")


def _parts(listing: str) -> dict[str, str]:
    """What each object and rule of a table's listing is, by a name for people, in order."""
    parts: dict[str, list[str]] = {}
    seen: Counter[str] = Counter()

    def part(name: str, *rows: str) -> list[str]:
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name} (number {seen[name]})"
        parts[numbered] = list(rows)
        return parts[numbered]

    where, is_chain = "table", False
    head = last = part(where)
    for row in listing.split("\n")[1:]:
        opened = _OBJECT.fullmatch(row)
        if opened:
            where, is_chain = f"{opened['kind']} {opened['name']}", opened["kind"] == "chain"
            head = last = part(where)
        elif is_chain and head and _RULE.match(row):
            rule = _COMMENT.fullmatch(row[2:])
            name = rule["name"] if rule else "without a name"
            last = part(f"line {name} of {where}", rule["rule"] if rule else row[2:])
        elif row.strip() not in ("", "}"):
            last.append(row.strip())
    return {name: " ".join(rows) for name, rows in parts.items()}
