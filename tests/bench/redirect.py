"""The redirect engine: applying rules, applying them again, taking them away, and what they cost each connection.

Compares the backends, by themselves and as the agent goes (by the engine), with each other and with programs
that load such rules (programs.py).
"""

import contextlib
import functools
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.bench.measure import (
    WARM_UPS,
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
from tests.bench.programs import PROCESSES, Variant, has_nft, load_nft
from tests.bench.site import NODE_IPV4, Site

from tidegate.enforce.redirect.backend import Backend, BackendName, Change
from tidegate.enforce.redirect.engine import Engine, choose
from tidegate.enforce.redirect.iptables import IptablesBackend
from tidegate.enforce.redirect.nftables import NftablesBackend
from tidegate.enforce.redirect.rules import rules_for
from tidegate.intent.policy import DEFAULT, Outbound, Policy, PortRange
from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError

PART = "redirect"

_WORKLOADS = 110
_AT_A_TIME = 8
_FIRST_APPLIES = 25
_REAPPLIES = 60
_NODES_ROUNDS = 5
_CONNECTIONS = 100
_CONNECTION_ROUNDS = 200
_MANY = 1000
"""Excluded ports."""

_DIALLED = 9000
"""TCP port that the connections go to."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""struct linger: no TIME_WAIT, or the ports would run out."""

_ANOTHERS = "table inet another { chain some { counter; }; }"

_PROGRAMS = {BackendName.IPTABLES: Variant.LEGACY, BackendName.NFTABLES: Variant.NFT}
"""The programs named iptables that need the same of the kernel as a backend."""

_FIRST = {BackendName.NFTABLES: Limit(Bound.MEDIAN_AT_MOST, 3.0)}
_UNCHANGED = {BackendName.NFTABLES: Limit(Bound.MEDIAN_AT_MOST, 1.0)}
_ONE_BY_ONE = Limit(Bound.RATIO_AT_LEAST, 8.0)
_ALL_WORKLOADS = Limit(Bound.MEDIAN_AT_MOST, 1.0)
_MANY_EXCLUSIONS = Limit(Bound.RATIO_AT_MOST, 1.05)


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    usable = [name for name in BackendName if _unusable(name) is None]
    programs = [_PROGRAMS[name] for name in usable if not _PROGRAMS[name].missing()]
    if not usable:
        return
    with _own_lock(site):
        yield _first_apply(site, usable, programs)
        yield _unchanged(site, usable)
        for backend in usable:
            yield _changes(site, backend)
        for backend in usable:
            yield _many(site, backend)
        for backend in usable:
            yield _set_up_redirected(site, backend, programs)
            yield _set_up_excluded(site, backend)


@contextlib.contextmanager
def _own_lock(site: Site) -> Iterator[None]:
    """Nobody else on the machine who changes legacy tables is waited for, or makes programs fail."""
    os.environ["XTABLES_LOCKFILE"] = str(site.directory / "xtables.lock")
    try:
        yield
    finally:
        del os.environ["XTABLES_LOCKFILE"]


def not_measured() -> tuple[str, ...]:
    """What this machine does not allow to be measured."""
    return tuple(_not_measured())


def _not_measured() -> Iterator[str]:
    for backend, programs in _PROGRAMS.items():
        if problem := _unusable(backend):
            yield f"redirect by {backend}: {problem}"
        elif missing := programs.missing():
            yield f"redirect by iptables-{programs}: there is no {missing} (Debian has it in iptables)"
    if not has_nft():
        yield "redirect by nft: there is no nft program (Debian has it in nftables)"


@functools.cache
def _unusable(backend: BackendName) -> str | None:
    """Why rules cannot be applied through this backend here."""
    try:
        choose(backend)
    except KernelError as error:
        return str(error)
    return None


class _Way(NamedTuple):
    """One way to have a namespace follow a policy: by a backend alone, or by the engine, as the agent does it."""

    by: str
    """What follows the backend's name in a line of a table."""
    apply: Callable[[str, Policy], Change]
    remove: Callable[[str], Change]


@functools.cache
def _ways(name: BackendName) -> tuple[_Way, ...]:
    backend: Backend = NftablesBackend() if name is BackendName.NFTABLES else IptablesBackend()
    engine = Engine(name)
    return (
        _Way(
            "",
            lambda namespace, policy: backend.apply(namespace, rules_for(policy)),
            backend.remove,
        ),
        _Way(
            ", by the engine",
            lambda namespace, policy: engine.apply(namespace, policy).change,
            engine.remove,
        ),
    )


def _set(way: _Way, namespace: str, policy: Policy, expected: Change) -> None:
    change = way.apply(namespace, policy)
    assert change is expected, change


@contextlib.contextmanager
def _namespaces(site: Site, number: int) -> Iterator[list[str]]:
    made = [site.namespace() for _ in range(number)]
    try:
        yield made
    finally:
        for namespace in made:
            site.remove_namespace(namespace)


class _Start(NamedTuple):
    """One way to come by the rules in a namespace that has none of ours."""

    name: str
    apply: Callable[[str], None]
    limit: Limit | None = None
    before: Callable[[str], None] | None = None
    """What is done to the namespace first, which is not measured."""


def _first_apply(
    site: Site, usable: Sequence[BackendName], programs: Sequence[Variant]
) -> Measurement:
    starts = [
        _Start(f"{backend}{way.by}", functools.partial(_first, way), _FIRST.get(backend))
        for backend in usable
        for way in _ways(backend)
    ]
    if BackendName.NFTABLES in usable:
        name = f"{BackendName.NFTABLES}, for the first time in a process"
        starts.append(_Start(name, _first_of_all, _FIRST[BackendName.NFTABLES]))
    if BackendName.NFTABLES in usable and has_nft():
        *_, way = _ways(BackendName.NFTABLES)
        name = f"{BackendName.NFTABLES}{way.by}, beside another's table"
        starts += [
            _Start(name, functools.partial(_first, way), before=_load(_ANOTHERS)),
            _Start("one nft -f process", _load(_nft_text())),
        ]
    for program in programs:
        name = f"iptables-{program}"
        starts += [
            _Start(f"one {name}-restore process per family", program.at_once),
            _Start(f"one {name} process per rule: {PROCESSES}", program.one_by_one, _ONE_BY_ONE),
        ]
    with _namespaces(site, len(starts) * (_FIRST_APPLIES + WARM_UPS)) as namespaces:
        fresh = iter(namespaces)

        def sample(start: _Start) -> float:
            namespace = next(fresh)
            if start.before:
                start.before(namespace)
            return milliseconds(lambda: start.apply(namespace))

        return interleaved(
            PART,
            "first apply of the default policy in a fresh namespace",
            Unit.MILLISECONDS,
            _FIRST_APPLIES,
            [
                Alternative(start.name, functools.partial(sample, start), start.limit)
                for start in starts
            ],
        )


def _first_of_all(namespace: str) -> None:
    """Nothing is known yet of what the kernel makes of the policy."""
    change = NftablesBackend().apply(namespace, rules_for(DEFAULT))
    assert change is Change.CREATED, change


def _load(text: str) -> Callable[[str], None]:
    return functools.partial(load_nft, text=text)


def _nft_text() -> str:
    return NftablesBackend().render(rules_for(DEFAULT))


def _first(way: _Way, namespace: str) -> None:
    _set(way, namespace, DEFAULT, Change.CREATED)


def _unchanged(site: Site, usable: Sequence[BackendName]) -> Measurement:
    ways = [(backend, way) for backend in usable for way in _ways(backend)]
    with _namespaces(site, len(ways)) as namespaces:

        def sample(namespace: str, way: _Way) -> float:
            return milliseconds(lambda: _set(way, namespace, DEFAULT, Change.UNCHANGED))

        alternatives = []
        for namespace, (backend, way) in zip(namespaces, ways, strict=True):
            _first(way, namespace)
            again = functools.partial(sample, namespace, way)
            alternatives.append(Alternative(f"{backend}{way.by}", again, _UNCHANGED.get(backend)))
        entering = Alternative(
            "of each: entering the namespace",
            lambda: milliseconds(lambda: netns.run_in(namespaces[0], int)),
        )
        title = "apply of the default policy where it is already"
        every = [*alternatives, entering]
        return interleaved(PART, title, Unit.MILLISECONDS, _REAPPLIES, every)


def _changes(site: Site, backend: BackendName) -> Measurement:
    ways = _ways(backend)
    with _namespaces(site, 2 * len(ways)) as namespaces:
        fresh = iter(namespaces)
        alternatives: list[Alternative] = []
        for way in ways:
            alternatives += _changes_by(way, next(fresh), next(fresh))
        title = f"changes where there are rules, {backend}"
        return interleaved(PART, title, Unit.MILLISECONDS, _REAPPLIES, alternatives)


def _changes_by(way: _Way, changing: str, going: str) -> Iterator[Alternative]:
    policies = itertools.cycle((_excluding(10), DEFAULT))
    _first(way, changing)

    def changed() -> float:
        policy = next(policies)
        return milliseconds(lambda: _set(way, changing, policy, Change.REPLACED))

    def removed() -> float:
        _first(way, going)
        return milliseconds(lambda: way.remove(going))

    yield Alternative(f"changed policy{way.by}", changed)
    yield Alternative(f"removal{way.by}", removed)


def _many(site: Site, backend: BackendName) -> Measurement:
    def sample(apply: Callable[[str], None], at_a_time: int) -> float:
        with _namespaces(site, _WORKLOADS) as fresh, ThreadPoolExecutor(at_a_time) as threads:
            return seconds(lambda: list(threads.map(apply, fresh)))

    *_, way = _ways(backend)
    starts = [_Start(f"{backend}{way.by}", functools.partial(_first, way), _ALL_WORKLOADS)]
    if backend is BackendName.NFTABLES and has_nft():
        starts.append(_Start("one nft -f process each", _load(_nft_text())))
    alternatives = [
        Alternative(
            f"{start.name}, {manner}",
            functools.partial(sample, start.apply, at_a_time),
            start.limit,
        )
        for start in starts
        for manner, at_a_time in (
            ("one after the other", 1),
            (f"{_AT_A_TIME} at a time", _AT_A_TIME),
        )
    ]
    title = f"first apply in {_WORKLOADS} namespaces, {backend}"
    return interleaved(PART, title, Unit.SECONDS, _NODES_ROUNDS, alternatives)


def _set_up_redirected(
    site: Site, backend: BackendName, programs: Sequence[Variant]
) -> Measurement:
    """Connections that no exclusion holds for: they come out at the outbound listener."""

    def cost(name: str, rules: Callable[[str], object], limit: Limit | None = None) -> Alternative:
        pair = site.pair()
        rules(pair.pod)
        return _set_up_cost(name, pair.pod, pair.pod, DEFAULT.outbound.port, limit)

    alternatives = [
        cost(f"{count} excluded ports", _rules(backend, _excluding(count)), limit)
        for count, limit in ((0, None), (10, None), (_MANY, _MANY_EXCLUSIONS))
    ]
    alternatives += [
        cost(
            f"{_MANY} excluded ports, Consul's rules by iptables-{program}",
            functools.partial(program.at_once, exclude_outbound_ports=_ports(_MANY)),
        )
        for program in programs
        if program is _PROGRAMS[backend]
    ]
    return _set_up(
        f"TCP connect and close, redirected to the sidecar's port, {backend}", alternatives
    )


def _set_up_excluded(site: Site, backend: BackendName) -> Measurement:
    """Connections to an excluded port: they reach the peer over the veth."""

    def cost(name: str, policy: Policy | None, limit: Limit | None = None) -> Alternative:
        pair = site.pair()
        if policy:
            _rules(backend, policy)(pair.pod)
        return _set_up_cost(name, pair.pod, pair.node, _DIALLED, limit)

    alternatives = [
        cost("1 excluded port", _excluding(1, _DIALLED)),
        cost("10 excluded ports", _excluding(10, _DIALLED)),
        cost(f"{_MANY} excluded ports", _excluding(_MANY, _DIALLED), _MANY_EXCLUSIONS),
        cost("no rules at all", None),
    ]
    return _set_up(f"TCP connect and close over veth, to an excluded port, {backend}", alternatives)


def _rules(backend: BackendName, policy: Policy) -> Callable[[str], object]:
    way, *_ = _ways(backend)
    return lambda namespace: way.apply(namespace, policy)


def _set_up(title: str, alternatives: list[Alternative]) -> Measurement:
    return interleaved(PART, title, Unit.MICROSECONDS, _CONNECTION_ROUNDS, alternatives)


def _set_up_cost(
    name: str, client: str, server: str, port: int, limit: Limit | None
) -> Alternative:
    """What a connection costs; the server side is all the kernel's."""
    listener = netns.run_in(server, _listener, port)

    def sample() -> float:
        took = netns.run_in(client, microseconds_each, _CONNECTIONS, _connect_all)
        _accept_all(listener)
        return took

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


def _excluding(count: int, *among: int) -> Policy:
    """A policy with so many excluded ports."""
    excluded = tuple(PortRange(port, port) for port in _ports(count, *among))
    return Policy(outbound=Outbound(exclude_ports=excluded))


def _ports(count: int, *among: int) -> list[int]:
    """So many ports, `among` among them, none next to another."""
    return [*among, *itertools.islice(range(20002, 65535, 2), count - len(among))]
