"""Rules of the legacy tables as text: from the words of iptables-restore(8) to what the kernel takes, and back.

`parse` takes the part of the text that it knows and nothing else. `compiled` turns rules into entries, once per rule:
libxtables does that, which leaks, keeps state for one family at a time and calls exit(3), so it works in a process of
its own. Asks no table of anybody; those are in xtables.py.

python-iptables 1.2 is gone around where Rule6 writes wrong masks for interfaces, and for "not this protocol" a rule
for any: the header of an entry is written here.
"""

import ctypes
import errno
import ipaddress
import re
import shlex
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from tidegate.kernel import ipset, isolation, libxtables, netns
from tidegate.kernel.errors import KernelError
from tidegate.kernel.legacy_tables import EXTENSION, LAYOUTS, Family, Layout
from tidegate.kernel.xtables import (
    SET_INDEX_SIZE,
    Content,
    Counted,
    Entry,
    InstalledJump,
    goes_elsewhere,
    normal,
    parts,
)

MAX_CHAIN_NAME = 28
"""Most characters of a chain's name (XT_EXTENSION_MAXNAMELEN of linux/netfilter/x_tables.h, less its end)."""


class Jump(msgspec.Struct, frozen=True, order=True):
    """A rule of a built-in chain that jumps to a chain."""

    chain: str
    position: int
    """From 1 on."""
    rule: str
    """Its words behind the chain, as iptables-restore reads them."""


class Chain(msgspec.Struct, frozen=True):
    """A chain that is not built in."""

    name: str
    rules: tuple[str, ...]
    """The words of each rule, behind the chain."""


class Table(msgspec.Struct, frozen=True):
    """What a text says about one table."""

    name: str
    chains: tuple[Chain, ...]
    jumps: tuple[Jump, ...]


_COMMENT = "#"
_CHAIN_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_CHAIN_NAME}}}")
_DECLARATION = re.compile(r":(?P<name>\S+) - \[0:0\]")


def parse(text: str) -> tuple[Table, ...]:
    """The tables of a text for one family. KernelError for what is not understood, with the number of the line.

    A table begins with *NAME and ends with COMMIT. In between are declarations `:CHAIN - [0:0]`, rules
    `-A CHAIN WORDS` of declared chains, and jumps `-I CHAIN POSITION WORDS` from built-in ones. Lines that begin
    with # and empty ones do not matter.
    """
    tables: list[Table] = []
    name, chains, jumps = "", dict[str, list[str]](), list[Jump]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith(_COMMENT):
            continue
        kind, _, rest = line.partition(" ")
        if not name and line.startswith("*") and line[1:].isalnum():
            name, chains, jumps = line[1:], {}, []
        elif name and line == "COMMIT":
            made = tuple(Chain(chain, tuple(rules)) for chain, rules in chains.items())
            tables.append(Table(name, made, tuple(jumps)))
            name = ""
        elif name and (declared := _DECLARATION.fullmatch(line)):
            if not _CHAIN_NAME.fullmatch(declared["name"]):
                raise _not_understood(number, line)
            chains[declared["name"]] = []
        elif name and kind == "-A" and (target := rest.partition(" "))[0] in chains:
            chains[target[0]].append(target[2])
        elif name and kind == "-I" and (place := rest.split(" ", 2))[1:2] and place[1].isdecimal():
            jumps.append(Jump(place[0], int(place[1]), " ".join(place[2:])))
        else:
            raise _not_understood(number, line)
    if name:
        raise KernelError(f"table {name} has no COMMIT", errno.EINVAL)
    return tuple(tables)


def _not_understood(number: int, line: str) -> KernelError:
    return KernelError(f"line {number} of the rules is not understood: {line}", errno.EINVAL)


def words(text: str) -> list[str]:
    """The words of a rule; those with spaces are between double quotes."""
    return shlex.split(text) if '"' in text or "\\" in text else text.split()


def quoted(word: str) -> str:
    """A word as iptables-restore and `words` read it. KernelError for one that cannot be written there."""
    if not word.isprintable() or word in ("", "!") or word.startswith("-"):
        raise KernelError(f"{word!r} cannot be part of a rule", errno.EINVAL)
    if re.fullmatch(r"[A-Za-z0-9_./:,@%+=-]+", word):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


# Compiling: from words to entries.


def compiled(family: Family, tables: Iterable[Table]) -> dict[str, Content]:
    """What the kernel would have of these tables, by their names. KernelError for a rule that cannot be written.

    May be called from any thread. What was compiled before is remembered.
    """
    wanted = tuple(tables)
    entries = _entries(family, {rule for table in wanted for rule in _rules(table)})
    return {
        table.name: Content(
            chains={
                chain.name: tuple(Counted(entries[rule], 0) for rule in chain.rules)
                for chain in table.chains
            },
            jumps=tuple(
                InstalledJump(jump.chain, jump.position, entries[jump.rule])
                for jump in sorted(table.jumps)
            ),
        )
        for table in wanted
    }


def _rules(table: Table) -> Iterator[str]:
    for chain in table.chains:
        yield from chain.rules
    for jump in table.jumps:
        yield jump.rule


_COMPILE_S = 10.0
_COMPILE_RULE_S = 0.1
"""Most seconds for compiling, and for one rule more; it takes 0.5 ms."""

_MAX_REMEMBERED = 20_000
"""Most rules to remember; an entry is about 1 KB."""

_remembered: dict[tuple[Family, str], Entry] = {}


def _entries(family: Family, rules: set[str]) -> dict[str, Entry]:
    found = {rule: _remembered.get((family, rule)) for rule in rules}
    entries = {rule: entry for rule, entry in found.items() if entry is not None}
    missing = sorted(rules - entries.keys())
    if missing:
        if any(f"--{_MATCH_SET}" in rule for rule in missing):
            answer = netns.run_in_new(_compiled_next_to_a_set, family, missing)
        else:
            answer = _compiled_elsewhere(family, missing)
        if len(_remembered) > _MAX_REMEMBERED:
            _remembered.clear()
        made = msgspec.msgpack.decode(answer, type=list[Entry])
        for rule, entry in zip(missing, made, strict=True):
            entries[rule] = _remembered[family, rule] = entry
    return entries


def _compiled_next_to_a_set(family: Family, rules: list[str]) -> bytes:
    # libxtables asks the kernel for the index of a set, so there has to be one: here, where nobody looks.
    ipset.create([ipset.Set(_ANY_SET, ipset.Kind.PORTS, ())])
    return _compiled_elsewhere(family, rules)


def _compiled_elsewhere(family: Family, rules: list[str]) -> bytes:
    libxtables.loaded()
    deadline_s = _COMPILE_S + len(rules) * _COMPILE_RULE_S
    answer: bytes = isolation.run_in(netns.CURRENT, _compile, family, rules, deadline_s=deadline_s)
    return answer


def _compile(family: Family, rules: list[str]) -> bytes:
    return msgspec.msgpack.encode([_compiled_rule(family, rule) for rule in rules])


_MATCH_SET = "match-set"
_ANY_SET = "any"


class _Option(NamedTuple):
    """An option of a match or a target, without its dashes."""

    name: str
    inverted: bool
    values: list[str]


class _Extension(NamedTuple):
    """-m for a match, -j for a target, -g for a chain that does not come back here."""

    kind: str
    name: str
    options: list[_Option]


class _Spec(NamedTuple):
    """The words of a rule, sorted."""

    header: dict[str, tuple[str, bool]]
    """What is said about -s, -d, -i, -o and -p, and whether not."""
    extensions: list[_Extension]


_HEADER_OPTIONS = ("-s", "-d", "-i", "-o", "-p")


def _spec(rule: str) -> _Spec:
    header: dict[str, tuple[str, bool]] = {}
    extensions: list[_Extension] = []
    rest = words(rule)[::-1]
    while rest:
        inverted = rest[-1] == "!"
        if inverted:
            rest.pop()
        option = rest.pop()
        if option in _HEADER_OPTIONS and option not in header:
            header[option] = (rest.pop(), inverted)
        elif option in ("-m", "-j", "-g") and not inverted:
            extensions.append(_Extension(option, rest.pop(), []))
        elif option.startswith("--") and extensions:
            values = []
            while rest and rest[-1] != "!" and not rest[-1].startswith("-"):
                values.append(rest.pop())
            extensions[-1].options.append(_Option(option[2:], inverted, values))
        else:
            raise ValueError(f"{option} is not understood")
    if [extension.kind != "-m" for extension in extensions].count(True) != 1:
        raise ValueError("it has not exactly one target")
    return _Spec(header, extensions)


def _compiled_rule(family: Family, rule: str) -> Entry:
    try:
        spec = _spec(rule)
        raw, sets = _raw_entry(family, spec)
    except Exception as error:
        # The library raises what it has at hand: ValueError, AttributeError, XTablesError, ...
        raise KernelError(f"cannot write the rule '{rule}': {error}", errno.EINVAL) from error
    target = next(part.name for part in spec.extensions if part.kind != "-m")
    names = iter(sets)
    return normal(LAYOUTS[family], raw, target, lambda _: next(names))


def _rule(family: Family) -> Any:
    """A rule of python-iptables' that is being made."""
    libraries = libxtables.loaded()
    return libraries.rule4() if family is Family.IPV4 else libraries.rule6()


def _raw_entry(family: Family, spec: _Spec) -> tuple[bytes, list[str]]:
    """The entry as python-iptables makes it, and the names of the sets that it asks, in order."""
    rule = _rule(family)
    header = _header(LAYOUTS[family], spec.header)
    ctypes.memmove(ctypes.addressof(rule.entry), header, len(header))
    sets = []
    for kind, name, options in spec.extensions:
        is_match = kind == "-m"
        extension = (
            rule.create_match(name) if is_match else rule.create_target(name, goto=kind == "-g")
        )
        for option in options:
            values = option.values
            if option.name == _MATCH_SET:
                sets.append(values[0])
                values = [_ANY_SET, *values[1:]]
            extension.set_parameter(option.name, ["!", *values] if option.inverted else values)
        # Not the public final_check: that writes the parameters out and reads them in again, all through a pipe.
        extension._final_check()
    return bytes(rule.rule), sets


_INVERTED = {"-i": 0x01, "-o": 0x02, "-s": 0x08, "-d": 0x10, "-p": 0x40}
"""IPT_INV_* of linux/netfilter_ipv4/ip_tables.h, the same for IPv6"""
_SET_INVERTED = 0x01
_SET_SOURCE = 0x02
"""IPSET_INV_MATCH, IPSET_DIM_ONE_SRC; struct xt_set_info has such flags behind index and number of dimensions."""
_INTERFACE_BYTES = 16
_PROTOCOLS = {
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
    "ipv6-icmp": socket.IPPROTO_ICMPV6,
}


def _header(layout: Layout, said: Mapping[str, tuple[str, bool]]) -> bytes:
    inverted = sum(_INVERTED[option] for option, (_, negated) in said.items() if negated)
    values = {option: value for option, (value, _) in said.items()}
    source, source_mask = _address(layout, values.get("-s"))
    destination, destination_mask = _address(layout, values.get("-d"))
    incoming, incoming_mask = _interface(values.get("-i", ""))
    outgoing, outgoing_mask = _interface(values.get("-o", ""))
    protocol = _PROTOCOLS[values["-p"]] if "-p" in values else 0
    flags = layout.has_protocol if protocol else 0
    return layout.header.pack(
        source, destination, source_mask, destination_mask,
        incoming, outgoing, incoming_mask, outgoing_mask,
        protocol, flags, inverted,
    )  # fmt: skip


def _address(layout: Layout, network: str | None) -> tuple[bytes, bytes]:
    if network is None:
        return b"", b""
    parsed = ipaddress.ip_network(network)
    if parsed.version != layout.version:
        raise ValueError(f"{network} is of another family")
    return parsed.network_address.packed, parsed.netmask.packed


def _interface(name: str) -> tuple[bytes, bytes]:
    encoded = name.encode()
    if len(encoded) >= _INTERFACE_BYTES or name.endswith("+"):
        raise ValueError(f"{name} is not the name of an interface")
    # The end of the name is compared as well, so that it does not match longer ones.
    return encoded, b"\xff" * (len(encoded) + 1) if encoded else b""


# Spelling: from entries to words, for people.


def spelled(family: Family, entries: Iterable[Entry]) -> list[str]:
    """The words of rules as iptables-save(8) would write them. From any thread; KernelError."""
    libxtables.loaded()
    answer = isolation.run_in(netns.CURRENT, _spelled, family, tuple(entries))
    return [str(words) for words in answer]


def _spelled(family: Family, entries: tuple[Entry, ...]) -> list[str]:
    return [" ".join(_spell(family, entry)) for entry in entries]


def _spell(family: Family, entry: Entry) -> Iterator[str]:
    layout = LAYOUTS[family]
    rule = _rule(family)
    ctypes.memmove(ctypes.addressof(rule.entry), entry.data, layout.size)
    yield from _spelled_header(layout, entry)
    sets = iter(name for _, name in entry.sets)
    for kind, name, part in parts(layout, entry):
        body = part[EXTENSION.size :]
        goes = kind == "-j" and goes_elsewhere(family, entry)
        yield f"-g {name}" if goes else f"{kind} {name}"
        if name == "set":
            flags = body[SET_INDEX_SIZE + 1]
            inverted = "! " if flags & _SET_INVERTED else ""
            side = "src" if flags & _SET_SOURCE else "dst"
            yield f"{inverted}--{_MATCH_SET} {next(sets)} {side}"
        elif body.strip(b"\0"):
            yield _saved(rule, kind, part)


def _spelled_header(layout: Layout, entry: Entry) -> Iterator[str]:
    fields = layout.header.unpack_from(entry.data)
    inverted = fields[-1]

    def said(option: str, value: str) -> str:
        return f"! {option} {value}" if inverted & _INVERTED[option] else f"{option} {value}"

    for option, address, mask in (("-s", fields[0], fields[2]), ("-d", fields[1], fields[3])):
        if any(mask):
            prefix = int.from_bytes(mask, "big").bit_count()
            yield said(option, f"{ipaddress.ip_address(address)}/{prefix}")
    for option, name, mask in (("-i", fields[4], fields[6]), ("-o", fields[5], fields[7])):
        if any(mask):
            shown = name.partition(b"\0")[0].decode(errors="replace")
            yield said(option, shown if mask[len(shown.encode())] else f"{shown}+")
    if fields[8]:
        names = {number: name for name, number in _PROTOCOLS.items()}
        yield said("-p", names.get(fields[8], str(fields[8])))


def _saved(rule: Any, kind: str, part: bytes) -> str:
    """The options of a match or a target; "" when nobody knows how to write them."""
    libraries = libxtables.loaded()
    buffer = ctypes.create_string_buffer(part, len(part))
    try:
        if kind == "-m":
            raw = ctypes.cast(buffer, ctypes.POINTER(libraries.xtables.xt_entry_match)).contents
            extension = libraries.iptc.Match(rule, match=raw)
        else:
            raw = ctypes.cast(buffer, ctypes.POINTER(libraries.xtables.xt_entry_target)).contents
            extension = libraries.iptc.Target(rule, target=raw)
    except libraries.iptc.XTablesError:
        return ""
    # Not the public get_all_parameters: that sorts out what is in the text, and the text is what is wanted.
    text: bytes = extension._get_saved_buf(rule.get_ip()) or b""
    return text.decode(errors="replace").strip()
