"""Decision lists as text for nft(8): one table, a chain for each list, a rule for each line, and sets of their values.

No kernel is asked here. What goes where is decided in rules.py; what becomes of the text is in nftables.py.
"""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, assert_never

from tidegate.enforce.redirect.families import HEADER, family_of
from tidegate.enforce.redirect.rules import (
    HANDED_OVER,
    POINTS,
    SENDING,
    Action,
    ByGroup,
    ByUser,
    Criterion,
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
from tidegate.intent.policy import Family
from tidegate.kernel.cgroups import Cgroup
from tidegate.kernel.errors import KernelError

TABLE = "tidegate"
DORMANT_TABLE = "tidegate-dormant"
"""What `dormant` calls it: packets never come to it."""

BOTH = "inet"
FAMILIES = (BOTH, *HEADER.values())

_ARRIVING = (Hook.INBOUND,)
"""Where a redirected packet keeps its address: `redirect` would take one of the interface that it arrives on."""
_ASKS_AS = {
    Hook.INVALID: Hook.INBOUND,
    Hook.INVALID_OUTBOUND: Hook.OUTBOUND,
    Hook.DNS_ZONE: Hook.OUTBOUND,
}
"""Lists that ask much of what another list asks, and so look into its sets."""
_WIDTH = 96
"""Most characters of a row of elements."""


def table_family(rules: Rules) -> str:
    """The family of the table that packets of these rules come to."""
    return BOTH if len(rules.families) > 1 else HEADER[rules.families[0]]


def rendered(rules: Rules, of_path: Mapping[str, Cgroup]) -> str:
    """The transaction that makes the table where there is none; `of_path` are the cgroups that are spoken of.

    KernelError for a name that nft(8)'s syntax has no words for.
    """
    family = table_family(rules)
    writer = _Writer(family, of_path)
    chains = [
        writer.chain(hook, lines if family == BOTH else lines_of_family(lines, rules.families[0]))
        for hook, lines in rules.lists
    ]
    body = "\n".join((*writer.sets, *chains))
    return f"create table {family} {TABLE}\ntable {family} {TABLE} {{\n{body}}}\n"


def dormant(family: str, text: str) -> str:
    """What `rendered` wrote for a table of this family, as a table of another name that packets never come to."""
    body = text.removeprefix(f"create table {family} {TABLE}\ntable {family} {TABLE} {{\n")
    return f"table {family} {DORMANT_TABLE} {{\n\tflags dormant;\n{body}"


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

    def __init__(self, family: str, of_path: Mapping[str, Cgroup]) -> None:
        self._family = family
        self._cgroups = of_path
        self._made: dict[str, _Words] = {}

    @property
    def sets(self) -> Iterator[str]:
        """The sets that the chains so far look into."""
        return (_set(name, words) for name, words in self._made.items())

    def chain(self, hook: Hook, lines: Iterable[Line]) -> str:
        kind, at, priority = POINTS[hook]
        asked = f"type {kind} hook {at} priority {priority}"
        head = f"\tchain {hook} {{\n\t\t{asked}; policy accept;\n"
        rules = "".join(f"\t\t{rule}\n" for line in lines for rule in self._rules(hook, line))
        return f"{head}{rules}\t}}\n"

    def _rules(self, hook: Hook, line: Line) -> Iterator[str]:
        """The line's rule, and before it one that only marks, where the line says so."""
        if isinstance(line.action, Tproxy):
            said = self._said(hook, Line(line.name, (Opening(), *line.matches)))
            # Not for a SYN that comes in the way of a connection which was opened from here.
            mark = f"ct direction original ct mark set ct mark | {HANDED_OVER:#010x}"
            yield f'{said} {mark} comment "{line.name}"'
        said = self._said(hook, line)
        yield f'{said} counter {self._action(line.action, hook)} comment "{line.name}"'.lstrip()

    def _said(self, hook: Hook, line: Line) -> str:
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
        return " ".join(part for part in parts if not _goes_without_saying(part, parts))

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
            case OfTransparentSocket():
                return _Words("socket transparent", ("1",))
            case HandedOver():
                bit = f"{HANDED_OVER:#010x}"
                return _Words(f"ct mark & {bit}", (bit,), compared=True)
            case Untracked():
                return _Words("ct state", ("invalid", "untracked"))
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
                left = "oifname" if hook in SENDING else "iifname"
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
        left = f"{HEADER[family]} {field}"
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
                header = HEADER[family_of(address)]
                family = f"{header} " if self._family == BOTH else ""
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
