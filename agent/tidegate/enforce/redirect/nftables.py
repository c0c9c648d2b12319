"""Redirect rules through nftables: the table `inet tidegate` of a workload's network namespace.

Renders the lines of rules.py to one transaction of libnftables' JSON, loads it, reads back what the
kernel has and tells the difference. It never touches another table. What goes where is decided in
rules.py.
"""

import enum
import ipaddress
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, assert_never

import msgspec

from tidegate.enforce.redirect.rules import (
    Action,
    Anything,
    Line,
    Match,
    NotOpening,
    NotTcp,
    OfFamily,
    OnInterface,
    OpenedBy,
    Rules,
    ToNetwork,
    ToPort,
    rules_for,
)
from tidegate.intent.policy import Family, Policy, PortRange
from tidegate.kernel import conntrack, netns, nftables
from tidegate.kernel.nftables import Object
from tidegate.model import Direction

FAMILY = "inet"
TABLE = "tidegate"

_CHAINS = {Direction.OUTBOUND: "output", Direction.INBOUND: "prerouting"}
"""Each direction's base chain, named after its hook."""

_PRIORITY_DSTNAT = -100
# linux/netfilter.h (NFPROTO_*), linux/in.h (IPPROTO_TCP)
_NFPROTO = {Family.IPV4: 2, Family.IPV6: 10}
_IPPROTO_TCP = 6
# linux/tcp.h (TCPHDR_*)
_FIN, _SYN, _RST, _ACK = 0x01, 0x02, 0x04, 0x10
_ADDRESS = {Family.IPV4: ("ip", "ipv4_addr"), Family.IPV6: ("ip6", "ipv6_addr")}
"""Header that holds each family's addresses, and the type of a set of them."""

_SHOWN = 300
"""Most characters of a rule or set that a difference repeats."""


class Change(enum.StrEnum):
    """What a call did to the kernel."""

    UNCHANGED = "unchanged"
    CREATED = "created"
    REPLACED = "replaced"
    REMOVED = "removed"


class InstalledLine(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of tidegate's table as the kernel has it."""

    direction: Direction
    name: str
    """Name of the line in rules.py; of a rule that is not tidegate's, whatever its comment says."""
    connections: int
    """Connections that this line decided on since the table was loaded."""


def apply(netns_path: str, policy: Policy) -> Change:
    """Make the namespace redirect as the policy says, in one transaction or not at all.

    Changes nothing when the kernel has these rules already. Open connections stay as they are.
    KernelError when the namespace is gone or the kernel refuses; the rules are then what they were.
    """
    return netns.run_in(netns_path, _apply, rules_for(policy))


def check(netns_path: str, policy: Policy) -> tuple[str, ...]:
    """How the kernel differs from the policy, one sentence each; () when it does not."""
    installed = netns.run_in(netns_path, nftables.list_table, FAMILY, TABLE)
    return _differences(_wanted(rules_for(policy)), installed)


def current(netns_path: str) -> tuple[InstalledLine, ...] | None:
    """The rules that the namespace has, in order, with their counters; None without a table."""
    installed = netns.run_in(netns_path, nftables.list_table, FAMILY, TABLE)
    if installed is None:
        return None
    return tuple(_installed_lines(installed))


def remove(netns_path: str) -> Change:
    """Take the table away, if it is there. Connections that run through the sidecar end with it."""
    return netns.run_in(netns_path, _remove)


def render(rules: Rules) -> list[Object]:
    """The transaction that loads the rules where no table is; [] when nothing is redirected."""
    wanted = _wanted(rules)
    if wanted is None:
        return []
    table, *parts = wanted
    return [{"create": table}, *({"add": part} for part in parts)]


_DELETE: Object = {"delete": {"table": {"family": FAMILY, "name": TABLE}}}


def _apply(rules: Rules) -> Change:
    installed = nftables.list_table(FAMILY, TABLE)
    wanted = _wanted(rules)
    if not _differences(wanted, installed):
        return Change.UNCHANGED
    if wanted is None:
        return _remove()
    if installed is None:
        nftables.run(render(rules))
        return Change.CREATED
    nftables.run([_DELETE, *render(rules)])
    return Change.REPLACED


def _remove() -> Change:
    if nftables.list_table(FAMILY, TABLE) is None:
        return Change.UNCHANGED
    nftables.run([_DELETE])
    # Translations outlive the rules, for days. With the next rules they would come to life again, and reset a new
    # connection that has the ports of an old one.
    conntrack.flush()
    return Change.REMOVED


def _wanted(rules: Rules) -> list[Object] | None:
    """The table as the kernel would list it, without handles; None for no table at all."""
    if not rules.outbound and not rules.inbound:
        return None
    sets: list[Object] = []
    chains: list[Object] = []
    lines: list[Object] = []
    for direction, chain in _CHAINS.items():
        if rules.of(direction):
            chains.append(_chain(chain))
        for line in rules.of(direction):
            condition = _condition(line.match, direction)
            if len(condition.values) == 1:
                lines.append(_rule(chain, line, condition, condition.values[0]))
            else:
                name = f"{direction}-{line.name}"
                sets.append(_set(name, condition))
                lines.append(_rule(chain, line, condition, f"@{name}"))
    return [{"table": {"family": FAMILY, "name": TABLE}}, *sets, *chains, *lines]


class _Condition(NamedTuple):
    """A match in nftables' words: the packet's `left` is one of `values`, or with "!=" is not."""

    left: Object
    values: list[Any]
    op: str = "=="
    set_type: str = ""
    set_flags: tuple[str, ...] = ()


def _condition(match: Match, direction: Direction) -> _Condition:
    match match:
        case NotTcp():
            return _Condition({"meta": {"key": "l4proto"}}, [_IPPROTO_TCP], "!=")
        case NotOpening():
            flags = {"payload": {"protocol": "tcp", "field": "flags"}}
            return _Condition({"&": [flags, [_FIN, _SYN, _RST, _ACK]]}, [_SYN], "!=")
        case Anything():
            # The kernel takes a redirection to a port only after a match of the protocol.
            return _Condition({"meta": {"key": "l4proto"}}, [_IPPROTO_TCP])
        case OfFamily(family):
            return _Condition({"meta": {"key": "nfproto"}}, [_NFPROTO[family]])
        case OnInterface(interface):
            key = "oifname" if direction is Direction.OUTBOUND else "iifname"
            return _Condition({"meta": {"key": key}}, [interface])
        case OpenedBy(uids):
            return _Condition({"meta": {"key": "skuid"}}, list(uids), set_type="uid")
        case ToPort(ports):
            left = {"payload": {"protocol": "tcp", "field": "dport"}}
            ranges = [_port_value(range_) for range_ in ports]
            return _Condition(left, ranges, set_type="inet_service", set_flags=("interval",))
        case ToNetwork(family, networks):
            protocol, set_type = _ADDRESS[family]
            left = {"payload": {"protocol": protocol, "field": "daddr"}}
            prefixes = [_network_value(network) for network in networks]
            return _Condition(left, prefixes, set_type=set_type, set_flags=("interval",))
        case _:
            assert_never(match)


def _port_value(ports: PortRange) -> int | Object:
    return ports.first if ports.first == ports.last else {"range": [ports.first, ports.last]}


def _network_value(network: str) -> str | Object:
    parsed = ipaddress.ip_network(network)
    address = str(parsed.network_address)
    if parsed.prefixlen == parsed.max_prefixlen:
        return address
    return {"prefix": {"addr": address, "len": parsed.prefixlen}}


def _chain(name: str) -> Object:
    base = {"type": "nat", "hook": name, "prio": _PRIORITY_DSTNAT, "policy": "accept"}
    return {"chain": {"family": FAMILY, "table": TABLE, "name": name, **base}}


def _set(name: str, condition: _Condition) -> Object:
    flags = {"flags": list(condition.set_flags)} if condition.set_flags else {}
    elements = {"type": condition.set_type, **flags, "elem": condition.values}
    return {"set": {"family": FAMILY, "table": TABLE, "name": name, **elements}}


def _rule(chain: str, line: Line, condition: _Condition, right: Any) -> Object:
    expressions = [
        {"match": {"op": condition.op, "left": condition.left, "right": right}},
        {"counter": {"packets": 0, "bytes": 0}},
        {"return": None} if line.action is Action.RETURN else {"redirect": {"port": line.port}},
    ]
    place = {"family": FAMILY, "table": TABLE, "chain": chain}
    return {"rule": {**place, "comment": line.name, "expr": expressions}}


def _differences(wanted: list[Object] | None, installed: list[Object] | None) -> tuple[str, ...]:
    should, has = _parts(wanted or []), _parts(installed or [])
    missing = [f"{name} is missing" for name in should if name not in has]
    foreign = [f"{name} is there and should not be" for name in has if name not in should]
    changed = [
        f"{name} is {_clipped(has[name])}, should be {_clipped(should[name])}"
        for name in should
        if name in has and has[name] != should[name]
    ]
    if not (missing or foreign or changed) and list(should) != list(has):
        return ("the lines are in another order",)
    return (*missing, *foreign, *changed)


def _parts(listing: list[Object]) -> dict[str, str]:
    """What each object of a listing is, by a name for people, without handles and counts."""
    parts: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for item in listing:
        for kind, content in item.items():
            name = _part_name(kind, content)
            seen[name] += 1
            nth = f" (number {seen[name]})" if seen[name] > 1 else ""
            parts[f"{name}{nth}"] = _canonical(content)
    return parts


def _part_name(kind: str, content: Object) -> str:
    if kind == "rule":
        return f"line {content.get('comment', 'without a name')} of chain {content['chain']}"
    return f"{kind} {content.get('name', 'without a name')}"


def _canonical(content: Object) -> str:
    kept = {key: value for key, value in content.items() if key != "handle"}
    if "expr" in kept:
        kept["expr"] = [{"counter": None} if "counter" in part else part for part in kept["expr"]]
    if "elem" in kept:
        kept["elem"] = sorted(kept["elem"], key=msgspec.json.encode)
    return msgspec.json.encode(kept, order="sorted").decode()


def _installed_lines(installed: list[Object]) -> Iterator[InstalledLine]:
    directions = {chain: direction for direction, chain in _CHAINS.items()}
    for rule in (item["rule"] for item in installed if "rule" in item):
        direction = directions.get(rule["chain"])
        if direction is None:
            continue
        counts = [part["counter"]["packets"] for part in rule["expr"] if "counter" in part]
        yield InstalledLine(
            direction=direction, name=rule.get("comment", ""), connections=sum(counts)
        )


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
