"""The redirect engine: applying rules, applying them again, and what they cost each connection.

Compares the engine with starting programs: `nft -f -` with the whole table, and one `nft` per rule through
nsenter, which is how consul-cni runs iptables.
"""

import itertools
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator

from tests.bench.measure import (
    Alternative,
    Bound,
    Limit,
    Measurement,
    Unit,
    interleaved,
    microseconds_each,
    milliseconds,
    seconds,
)
from tests.bench.site import NODE_IPV4, Pair, Site

from tidegate.enforce.redirect import nftables
from tidegate.intent.policy import DEFAULT, Outbound, Policy, PortRange
from tidegate.kernel import netns

PART = "redirect"
NO_PROGRAM = "redirect by processes: there is no nft program (Debian has it in nftables)"

_WORKLOADS = 110
_FIRST_APPLIES = 25
_REAPPLIES = 40
_NODES_ROUNDS = 2
_CONNECTIONS = 100
_CONNECTION_ROUNDS = 80

_DIALLED = 9000
"""TCP port that the connections go to."""
_TABLE = f"{nftables.FAMILY} {nftables.TABLE}"
_CHAIN = re.compile(r"\tchain (\S+) \{")
_RULE = re.compile(r"\t\t(\S.*)")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: no TIME_WAIT, or the ports would run out."""


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    namespaces = [site.namespace() for _ in range(_WORKLOADS)]
    programs = _programs(namespaces[0])
    yield _first_apply(namespaces, programs)
    yield _re_apply(namespaces)
    yield _many(namespaces, programs)
    for namespace in namespaces:
        site.remove_namespace(namespace)
    yield _set_up_redirected(site)
    yield _set_up_excluded(site)


def not_measured() -> tuple[str, ...]:
    """What this machine does not allow to be measured."""
    return () if shutil.which("nft") else (NO_PROGRAM,)


class _Programs:
    """The default policy's table, as programs load it."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._commands = _commands(table)

    def __len__(self) -> int:
        """Of how many programs one per rule consists."""
        return len(self._commands)

    def at_once(self, namespace: str) -> None:
        """One nft for everything."""
        _nft(namespace, "-f", "-", text=self._table)

    def one_by_one(self, namespace: str) -> None:
        """One nft for the table, each chain and each rule."""
        for command in self._commands:
            _nft(namespace, command)


def _programs(namespace: str) -> _Programs | None:
    if not_measured():
        return None
    nftables.apply(namespace, DEFAULT)
    table = _nft(namespace, f"list table {_TABLE}")
    nftables.remove(namespace)
    return _Programs(table)


def _nft(namespace: str, *arguments: str, text: str = "") -> str:
    command = ["nsenter", f"--net={namespace}", "nft", *arguments]
    return subprocess.run(command, input=text, text=True, capture_output=True, check=True).stdout


def _commands(table: str) -> list[str]:
    """The commands that build a table, from its listing."""
    commands, chain = [f"add table {_TABLE}"], ""
    for line in table.splitlines():
        if match := _CHAIN.fullmatch(line):
            chain = match[1]
        elif (match := _RULE.fullmatch(line)) and match[1].startswith("type "):
            commands.append(f"add chain {_TABLE} {chain} {{ {match[1]} }}")
        elif match:
            commands.append(f"add rule {_TABLE} {chain} {match[1]}")
    return commands


def _apply(namespace: str) -> None:
    change = nftables.apply(namespace, DEFAULT)
    assert change is nftables.Change.CREATED, change


def _first_apply(namespaces: list[str], programs: _Programs | None) -> Measurement:
    fresh = iter(namespaces)

    def first(apply: Callable[[str], None]) -> Callable[[], float]:
        def sample() -> float:
            namespace = next(fresh)
            took = milliseconds(lambda: apply(namespace))
            assert not nftables.check(namespace, DEFAULT)
            return took

        return sample

    limit = Limit(Bound.MEDIAN_AT_MOST, 3.0)
    alternatives = [Alternative("in-process", first(_apply), limit)]
    if programs:
        alternatives += [
            Alternative("one nft -f process", first(programs.at_once)),
            Alternative(
                f"one nft process per rule: {len(programs)}",
                first(programs.one_by_one),
                Limit(Bound.RATIO_AT_LEAST, 8.0),
            ),
        ]
    title = "first apply of the default policy in a fresh namespace"
    measured = interleaved(PART, title, Unit.MILLISECONDS, _FIRST_APPLIES, alternatives)
    for namespace in namespaces:
        nftables.remove(namespace)
    return measured


def _for_each(namespaces: list[str], apply: Callable[[str], None]) -> None:
    for namespace in namespaces:
        apply(namespace)


def _re_apply(namespaces: list[str]) -> Measurement:
    still, changing = namespaces[:2]
    policies = itertools.cycle((DEFAULT, _excluding(10)))
    nftables.apply(still, DEFAULT)
    nftables.apply(changing, next(policies))

    def again() -> None:
        change = nftables.apply(still, DEFAULT)
        assert change is nftables.Change.UNCHANGED, change

    def changed() -> None:
        change = nftables.apply(changing, next(policies))
        assert change is nftables.Change.REPLACED, change

    limit = Limit(Bound.MEDIAN_AT_MOST, 1.0)
    measured = interleaved(
        PART,
        "apply where there are rules, in-process",
        Unit.MILLISECONDS,
        _REAPPLIES,
        [
            Alternative("unchanged policy", lambda: milliseconds(again), limit),
            Alternative("changed policy", lambda: milliseconds(changed)),
            Alternative(
                "of both: entering the namespace",
                lambda: milliseconds(lambda: netns.run_in(still, int)),
            ),
        ],
    )
    for namespace in (still, changing):
        nftables.remove(namespace)
    return measured


def _many(namespaces: list[str], programs: _Programs | None) -> Measurement:
    def all_of_them(apply: Callable[[str], None]) -> Callable[[], float]:
        def sample() -> float:
            took = seconds(lambda: _for_each(namespaces, apply))
            for namespace in namespaces:
                nftables.remove(namespace)
            return took

        return sample

    limit = Limit(Bound.MEDIAN_AT_MOST, 1.0)
    alternatives = [Alternative("in-process", all_of_them(_apply), limit)]
    if programs:
        alternatives.append(Alternative("one nft -f process each", all_of_them(programs.at_once)))
    title = f"first apply in {len(namespaces)} namespaces, one after the other"
    return interleaved(PART, title, Unit.SECONDS, _NODES_ROUNDS, alternatives)


def _set_up_redirected(site: Site) -> Measurement:
    """Connections that no exclusion holds for: they come out at the outbound listener."""
    policies = {f"{count} excluded ports": _excluding(count) for count in (0, 10, 1000)}
    alternatives = [
        _set_up_cost(site.pair(), name, policy, lambda pair: pair.pod, policy.outbound.port)
        for name, policy in policies.items()
    ]
    return _set_up("TCP connect and close, redirected to the sidecar's port", alternatives)


def _set_up_excluded(site: Site) -> Measurement:
    """Connections to an excluded port: they reach the peer over the veth."""
    policies = {
        "1 excluded port": _excluding(1, _DIALLED),
        "10 excluded ports": _excluding(10, _DIALLED),
        "1000 excluded ports": _excluding(1000, _DIALLED),
        "no rules at all": None,
    }
    alternatives = [
        _set_up_cost(site.pair(), name, policy, lambda pair: pair.node, _DIALLED)
        for name, policy in policies.items()
    ]
    return _set_up("TCP connect and close over veth, to an excluded port", alternatives)


def _set_up(title: str, alternatives: list[Alternative]) -> Measurement:
    return interleaved(PART, title, Unit.MICROSECONDS, _CONNECTION_ROUNDS, alternatives)


def _set_up_cost(
    pair: Pair,
    name: str,
    policy: Policy | None,
    server: Callable[[Pair], str],
    port: int,
) -> Alternative:
    """What a connection costs under a policy; the server side is all the kernel's."""
    listener = netns.run_in(server(pair), _listener, port)
    if policy:
        nftables.apply(pair.pod, policy)

    def sample() -> float:
        took = netns.run_in(pair.pod, microseconds_each, _CONNECTIONS, _connect_all)
        _accept_all(listener)
        return took

    limit = Limit(Bound.RATIO_AT_MOST, 1.05) if name.startswith("1000 ") else None
    return Alternative(name, sample, limit)


def _listener(port: int) -> socket.socket:
    """A listener whose backlog takes a whole round, so that nobody has to accept meanwhile."""
    listener = socket.create_server(("0.0.0.0", port), backlog=2 * _CONNECTIONS)
    listener.setblocking(False)
    return listener


def _connect_all() -> None:
    for _ in range(_CONNECTIONS):
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            connection.connect((NODE_IPV4, _DIALLED))


def _accept_all(listener: socket.socket) -> None:
    for _ in range(_CONNECTIONS):
        connection, _ = listener.accept()
        connection.close()


def _excluding(count: int, *ports: int) -> Policy:
    """A policy with so many excluded ports, `ports` among them, none next to another."""
    others = itertools.islice(range(20002, 65535, 2), count - len(ports))
    excluded = tuple(PortRange(port, port) for port in (*ports, *others))
    return Policy(outbound=Outbound(exclude_ports=excluded))
