"""Connections that connection tracking keeps from translation do not go around the sidecar, through any backend."""

from collections import Counter

import msgspec
import pytest
from cells import (
    BACKENDS,
    FAR,
    INTO,
    PEER,
    PEER_APP,
    STRANGER,
    counts,
    decided_by,
    dials_of,
    ids,
    ports,
    shown,
)
from matrix import (
    INBOUND,
    OUTBOUND,
    SILENT,
    TENANT_UID,
    Dial,
    address,
    decide,
    expected,
    owner,
    send_unanswered,
    site,
)

from tidegate.enforce.redirect.rules import Drop, Hook, Tracked, rules_for
from tidegate.intent.policy import DEFAULT, Dns, Inbound, Mode, Outbound, Policy, Proxy
from tidegate.kernel import conntrack, netns, nftables, rawtcp


@pytest.fixture(scope="module")
def lab():
    with site() as made:
        yield made


@pytest.fixture(params=BACKENDS)
def backend(request, lab):
    made = BACKENDS[request.param]()
    yield made
    made.remove(lab.pod)


MISSED_CASES = {
    "default": DEFAULT,
    "exclusions": Policy(
        proxy=Proxy(self_calls_inbound=True),
        inbound=Inbound(exclude_ports=ports(8081), exclude_cidrs=STRANGER),
        outbound=Outbound(
            exclude_ports=ports(5432),
            exclude_cidrs=FAR,
            exclude_uids=ids(TENANT_UID),
            exclude_interfaces=("net1",),
        ),
        dns=Dns(enabled=True, addresses=("198.51.100.10", "2001:db8:2::10"), port=53),
    ),
    "only some": Policy(
        inbound=Inbound(include_ports=ports(8080, INBOUND), include_interfaces=("eth0",)),
        outbound=Outbound(include_cidrs=PEER, include_ports=ports(9090)),
    ),
}
MISSED = (
    *(Dial("pod", "peer", 8080, user) for user in ("app", "proxy", "tenant", "clerk")),
    *(Dial("pod", "peer", port) for port in (53, 5432, 9090, OUTBOUND)),
    *(Dial("pod", to, 8080) for to in ("far", "peer-net1", "pod", "loopback", "guest")),
    Dial("pod", "farther", 53),
    Dial("pod", "pod", 8080, "proxy"),
    *(Dial("peer", "pod", port) for port in (8080, 8081, 9090, OUTBOUND, INBOUND)),
    *(Dial("peer", "pod", 8080, source=source) for source in ("stranger", "far")),
    Dial("peer", "pod-net1", 8080),
    Dial("peer", "pod-bare0", 8080),
    Dial("guest", "peer", 8080),
    Dial("peer", "guest", 8080),
)
"""Connections that are opened while connection tracking holds another one with their addresses and ports."""

MISSED_BY_HAND = {
    "default": {
        "app to peer:8080": SILENT,
        "app to guest:8080": SILENT,
        "proxy to peer:8080": PEER_APP,
        "app to pod:8080": "pod:8080",
        "app to loopback:8080": "pod:8080",
        "guest to peer:8080": PEER_APP,
        "peer to guest:8080": "guest:8080",
    },
    "exclusions": {
        "app to peer:5432": "peer:5432",
        "app to far:8080": PEER_APP,
        "tenant to peer:8080": PEER_APP,
        "app to peer:53": SILENT,
        "app to farther:53": "peer:53",
        "proxy to pod:8080": SILENT,
    },
    "only some": {
        "app to peer:8080": SILENT,
        "app to far:8080": PEER_APP,
        "app to peer:9090": SILENT,
    },
}
MISSED_BY_HAND_INBOUND = {
    "default": {"peer to pod:8080": SILENT, "peer to pod:15001": SILENT, "peer to pod:20000": INTO},
    "exclusions": {
        "peer to pod:8080": SILENT,
        "peer to pod:8081": "pod:8081",
        "peer to pod:8080 from stranger": "pod:8080",
    },
    "only some": {
        "peer to pod:8080": SILENT,
        "peer to pod:9090": "pod:9090",
        "peer to pod-net1:8080": "pod:8080",
    },
}
"""The same in mode redirect, where nothing else is dropped."""


def is_dropped(rules, dial, version, tracked):
    return decide(rules, dial, version, tracked).action == Drop()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(
    ("case", "dropping"), [*((case, False) for case in MISSED_CASES), ("exclusions", True)]
)
def test_a_connection_that_nat_misses_is_dropped_where_it_would_be_redirected(
    lab, backend, case, mode, dropping
):
    rules = rules_for(msgspec.structs.replace(MISSED_CASES[case], mode=mode, drop_invalid=dropping))
    lab.prepare(mode)
    backend.apply(lab.pod, rules)
    before = counts(backend, lab.pod)
    dropped = Counter()
    for tracked in (Tracked.KNOWN, Tracked.INVALID):
        dials = dials_of(MISSED)
        by_hand = MISSED_BY_HAND[case]
        if dropping and tracked is Tracked.INVALID:
            # What answers a SYN that cannot be placed cannot be placed either.
            dials = [
                (dial, version)
                for dial, version in dials
                if dial.at == owner(dial) == "pod" or is_dropped(rules, dial, version, tracked)
            ]
            by_hand = {}
        elif mode is Mode.REDIRECT:
            by_hand = by_hand | MISSED_BY_HAND_INBOUND[case]
        attempts = lab.open_missed(rules, dials, tracked)
        for attempt, want in attempts:
            dial, what = attempt.dial, (attempt.version, attempt.dial.name, tracked)
            assert shown(attempt.outcome) == shown(want), what
            assert shown(attempt.outcome) == by_hand.get(dial.name, shown(want)), what
            if want == SILENT:
                hook = Hook.INVALID_OUTBOUND if dial.at == "pod" else Hook.INVALID
                dropped[hook, decide(rules, dial, attempt.version, tracked).line] += 1
        lab.hang_up([attempt for attempt, _ in attempts])
    assert dropped
    after = counts(backend, lab.pod)
    too_few = [at for at, n in dropped.items() if after[at] - before.get(at, 0) < n]
    assert too_few == []


@pytest.mark.parametrize("tracked", [Tracked.KNOWN, Tracked.INVALID])
def test_a_syn_that_was_dropped_reaches_the_sidecar_when_nothing_is_in_its_way_any_more(
    lab, backend, tracked
):
    rules = rules_for(DEFAULT)
    lab.prepare(Mode.REDIRECT)
    backend.apply(lab.pod, rules)
    dials = dials_of([Dial("peer", "pod", 8080), Dial("pod", "peer", 8080)])
    attempts = lab.open(dials, before=tracked, deadline_s=0.1)
    assert [attempt.outcome for attempt in attempts] == [SILENT] * len(dials)
    netns.run_in(lab.pod, conntrack.flush)
    waiting = list(attempts)

    def decided():
        waiting[:] = [attempt for attempt in waiting if not attempt.read()]
        return not waiting

    lab.serve_until(decided, "the SYN that is sent again")
    for attempt in attempts:
        assert attempt.outcome == expected(rules, attempt.dial, attempt.version, attempt.client)
    lab.hang_up(attempts)


@pytest.mark.parametrize("speaks_first", ["client", "server"])
def test_the_port_of_an_older_connection_that_was_reset_is_no_way_around_the_sidecar(
    lab, backend, speaks_first
):
    lab.prepare(Mode.REDIRECT)
    dials = dials_of([Dial("peer", "pod", 8080), Dial("pod", "peer", 8080)])
    older = lab.open(dials)
    backend.apply(lab.pod, rules_for(DEFAULT))
    for attempt in older:
        lab.speak(attempt, speaks_first)
        lab.reset(attempt, "server" if speaks_first == "client" else "client")
        again = lab.open(
            [(attempt.dial, attempt.version)], source_port=attempt.client[1], deadline_s=0.1
        )
        assert [shown(one.outcome) for one in again] == [SILENT]
        lab.hang_up(again)
    hooks = {at for at, n in counts(backend, lab.pod).items() if n and at[1].startswith("to-")}
    assert hooks == {
        (Hook.INVALID, "to-inbound-listener"),
        (Hook.INVALID_OUTBOUND, "to-outbound-listener"),
    }


def test_a_syn_that_is_sent_again_stays_with_the_sidecar(lab, backend):
    lab.prepare(Mode.REDIRECT)
    backend.apply(lab.pod, rules_for(DEFAULT))
    for version in (4, 6):
        ends = [(address("peer", version), 29_000), (address("pod", version), 8080)]
        for hook, at, (source, destination) in (
            (Hook.INVALID, "peer", ends),
            (Hook.INVALID_OUTBOUND, "pod", ends[::-1]),
        ):
            before = counts(backend, lab.pod)
            for _ in range(2):
                netns.run_in(lab.paths[at], send_unanswered, source, destination, rawtcp.SYN)
            grown = Counter(counts(backend, lab.pod))
            grown.subtract(before)
            assert decided_by(grown, hook) == {"first": 1, "translated": 1}


NO_TRACKING = """
table inet someone {
    chain arriving { type filter hook prerouting priority raw; tcp dport 8080 notrack; }
    chain leaving { type filter hook output priority raw; tcp dport 8080 notrack; }
}
"""


def test_connections_that_somebody_keeps_from_being_tracked_do_not_go_around_the_sidecar(
    lab, backend
):
    lab.prepare(Mode.REDIRECT)
    backend.apply(lab.pod, rules_for(DEFAULT))
    netns.run_in(lab.pod, nftables.load, NO_TRACKING)
    try:
        dials = [Dial("peer", "pod", 8080), Dial("pod", "peer", 8080)]
        attempts = lab.open(dials_of(dials), deadline_s=0.1)
        assert [attempt.outcome for attempt in attempts] == [SILENT] * len(attempts)
        left_alone = lab.open(dials_of([Dial("pod", "peer", 8080, "proxy")]))
        assert [shown(attempt.outcome) for attempt in left_alone] == [PEER_APP, PEER_APP]
    finally:
        netns.run_in(lab.pod, nftables.load, "delete table inet someone")
    lab.hang_up(attempts + left_alone)


@pytest.mark.parametrize("dropping", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_a_segment_out_of_place_resets_nothing_only_when_invalid_ones_are_dropped(
    lab, backend, version, dropping
):
    lab.prepare(Mode.REDIRECT)
    backend.apply(lab.pod, rules_for(Policy(drop_invalid=dropping)))
    dial = Dial("peer", "pod", 8080)
    (attempt,) = lab.open([(dial, version)])
    source, port = attempt.client
    with netns.run_in(
        lab.paths["peer"], rawtcp.open_raw, address("pod", version), rawtcp.Sender(), hops=64
    ) as raw:
        # At least one of these is out of any window.
        for sequence in (1, 2**31 + 1):
            segment = rawtcp.Segment(
                source=source,
                source_port=port,
                destination=address("pod", version),
                destination_port=8080,
                sequence=sequence,
                acknowledged=7,
                flags=rawtcp.ACK,
            )
            raw.send(rawtcp.pack(segment))
        heard = []

        def done():
            heard.extend(rawtcp.received(raw))
            if dropping:
                return counts(backend, lab.pod)[Hook.INVALID, "invalid"] > 0
            return any(is_reset(segment) for segment in heard)

        def is_reset(segment):
            return bool(segment.flags & rawtcp.RST) and segment.source_port == 8080

        lab.serve_until(done, "what becomes of the segment")
        heard.extend(rawtcp.received(raw))
    assert any(map(is_reset, heard)) is not dropping
    assert lab.echoes(attempt)
    lab.hang_up([attempt])
