"""Headers in, edges out: what the classifier reads, what it counts, and where, also with several processors at it."""

import ctypes
import functools
import itertools
import os
import random
import selectors
import shutil
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from classifying import HOST_SCOPE, LOOPBACK, Bench, bpffs
from namespaces import DEADLINE_S, namespace, serving
from packets import (
    ACK,
    AUTHENTICATION,
    DESTINATION,
    FRAGMENT,
    HOP_BY_HOP,
    IPV4,
    IPV6,
    ROUTING,
    Packet,
    Talk,
    hello,
    ipv4,
    ipv6,
    tcp,
)

from tidegate.errors import InputError
from tidegate.kernel import netns, tun
from tidegate.kernel.bpf import Map
from tidegate.kernel.bpf_object import Object
from tidegate.kernel.errors import KernelError
from tidegate.model import CountedEdge, Direction, EdgeKey, FlowClass, Hint
from tidegate.observe import abi
from tidegate.observe.classifier import Classifier, FlowRecord, MeshProfile, Side

HTTP = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
BANNER = b"220 mail ESMTP\r\n"
TLS = hello("pay.example.org")
MOBILITY = 135
EIGHT = b"\0" + bytes(6)
"""What follows the first byte of an extension header of eight bytes."""
GIB = 1 << 30


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Path]]:
    with bpffs(tmp_path_factory.mktemp("packets") / "bpf") as pins:
        classifier = Classifier.open(pins)
        try:
            yield Bench(classifier), pins / "classifier" / "maps"
        finally:
            classifier.remove()


@pytest.fixture
def bench(opened: tuple[Bench, Path]) -> Bench:
    bench, _ = opened
    bench.begin()
    return bench


@pytest.fixture
def maps(opened: tuple[Bench, Path]) -> Path:
    return opened[1]


def talk_of(version: int = 4, port: int = 40000) -> Talk:
    client, server = IPV4 if version == 4 else IPV6
    return Talk(client=(client, port), server=(server, 8443))


def only_flow(bench: Bench) -> FlowRecord:
    (flow,) = bench.flows()
    return flow


# Headers


@pytest.mark.parametrize(
    "chain",
    [
        [(HOP_BY_HOP, EIGHT)],
        [(ROUTING, EIGHT)],
        [(DESTINATION, EIGHT)],
        [(FRAGMENT, bytes(7))],
        [(AUTHENTICATION, b"\1" + bytes(10))],
        [(MOBILITY, EIGHT)],
        [(DESTINATION, b"\xff" + bytes(2046))],
        [(HOP_BY_HOP, EIGHT), (DESTINATION, b"\2" + bytes(22)), (ROUTING, EIGHT)],
        [(DESTINATION, EIGHT)] * 4,
        [(DESTINATION, EIGHT)] * 5,
        [(HOP_BY_HOP, EIGHT), (FRAGMENT, bytes(7)), (DESTINATION, EIGHT)],
        [(DESTINATION, EIGHT)] * 8,
    ],
    ids=lambda chain: "-".join(str(kind) for kind, _ in chain),
)
def test_every_kind_of_extension_header_is_passed_over(
    bench: Bench, chain: list[tuple[int, bytes]]
) -> None:
    talk = talk_of(6)
    talk.network = lambda s, d, segment: ipv6(s, d, segment, chain)
    talk.options = b"\1" * 12
    bench.play([*talk.opening(), talk.up(0, HTTP), talk.down(0, b"y" * 99)], Direction.INBOUND)
    (edge,) = bench.edges()
    assert (edge.key.peer, edge.key.port) == (IPV6[0], 8443)
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (len(HTTP), 99)
    assert bench.counted() == {}


def segment_with(offset: int, flags: int = ACK) -> bytes:
    """A TCP header that says that it has so many words."""
    header = bytearray(tcp(40000, 8443, 1, 1, flags, b""))
    header[12] = offset << 4
    return bytes(header)


def changed(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


FOUR, SIX = ipv4(*IPV4, segment_with(5)), ipv6(*IPV6, segment_with(5))
"""Two bytes of ethertype, then the IP header."""


@pytest.mark.parametrize(
    ("packet", "counted"),
    [
        (ipv4(*IPV4, segment_with(4)), "bad_headers"),
        (ipv4(*IPV4, segment_with(6)), "bad_headers"),
        (ipv6(*IPV6, segment_with(4)), "bad_headers"),
        (ipv6(*IPV6, segment_with(15)), "bad_headers"),
        (ipv6(*IPV6, segment_with(15), [(ROUTING, EIGHT)]), "bad_headers"),
        (changed(FOUR, 2, b"\x55"), "bad_headers"),
        (changed(FOUR, 4, b"\0\x29"), "bad_headers"),
        (changed(FOUR, 4, b"\0\x10"), "bad_headers"),
        (changed(SIX, 2, b"\x40"), "bad_headers"),
        (changed(SIX, 6, b"\0\x15"), "bad_headers"),
        (ipv6(*IPV6, segment_with(5), [(DESTINATION, b"\7" + bytes(6))]), "bad_headers"),
        (ipv6(*IPV6, segment_with(5), [(HOP_BY_HOP, EIGHT)], next_header=59), "not_tcp"),
        (ipv6(*IPV6, bytes(20), [(FRAGMENT, b"\0\0\x08" + bytes(4))], 17), "not_tcp"),
        (changed(FOUR, 11, b"\x11"), "not_tcp"),
        (changed(changed(FOUR, 11, b"\x11"), 8, b"\x20\0"), "not_tcp"),
    ],
    ids=[
        "doff-4",
        "doff-beyond",
        "six-doff-4",
        "six-doff-beyond",
        "doff-beyond-behind-routing",
        "version-5",
        "total-beyond",
        "total-within-header",
        "six-version-4",
        "six-payload-beyond",
        "extension-beyond",
        "no-next-header",
        "later-fragment-udp",
        "udp",
        "first-fragment-udp",
    ],
)
def test_headers_that_contradict_themselves_or_are_not_tcps_are_counted_and_left(
    bench: Bench, packet: bytes, counted: str
) -> None:
    frame = Packet(True, bytes(12) + packet)
    bench.play([frame], Direction.OUTBOUND)
    assert bench.flows() == []
    assert bench.counted() == {counted: 1}


@pytest.mark.parametrize("accepted", [0, 60, len(TLS)])
def test_data_in_the_syn_counts_once_whether_it_is_taken_or_comes_again(
    bench: Bench, accepted: int
) -> None:
    talk = talk_of()
    bench.play(
        [talk.syn(TLS), talk.syn_ack(accepted), talk.up(accepted, TLS[accepted:])],
        Direction.INBOUND,
    )
    (edge,) = bench.edges()
    assert (edge.key.flow_class, edge.count.bytes_to_server) == (FlowClass.TLS, len(TLS))
    assert only_flow(bench).bytes_to_server == len(TLS)


# Bytes and packets of a flow


@pytest.mark.parametrize("isn", [1000, 0xFFFFFFF0])
def test_bytes_go_on_counting_where_sequence_numbers_have_wrapped(bench: Bench, isn: int) -> None:
    talk = talk_of()
    talk.client_isn = talk.server_isn = isn
    bench.play([*talk.opening(), talk.up(0, HTTP)], Direction.OUTBOUND)
    end = len(HTTP)
    for _ in range(9):
        end += GIB - 7
        bench.play([talk.up(end - 1, b"x")], Direction.OUTBOUND)
    bench.play([talk.down(0, BANNER, end)], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert end > 1 << 33
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (end, len(BANNER))
    flow = only_flow(bench)
    assert (flow.bytes_to_server, flow.bytes_to_client) == (end, len(BANNER))


def test_all_bytes_move_with_their_connection_also_gigabytes(bench: Bench) -> None:
    talk = talk_of()
    bench.play(talk.opening(), Direction.OUTBOUND)
    end = 0
    for _ in range(5):
        end += GIB
        bench.play([talk.down(end - 1, b"x")], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert (edge.key.flow_class, edge.count.bytes_to_client) == (FlowClass.SERVER_FIRST, end)
    bench.play([talk.up(0, TLS)], Direction.OUTBOUND)
    (edge,) = bench.edges()
    assert edge.key.flow_class is FlowClass.STARTTLS
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (len(TLS), end)


def test_a_flow_tells_what_it_is_and_how_much_it_carried(bench: Bench) -> None:
    talk = talk_of(6)
    packets = [*talk.opening(), talk.up(0, HTTP), talk.up(0, HTTP), talk.down(0, BANNER, len(HTTP))]
    bench.play(packets, Direction.INBOUND)
    flow = only_flow(bench)
    assert flow.interface == (HOST_SCOPE, LOOPBACK)
    assert (flow.local, flow.local_port) == (IPV6[1], 8443)
    assert (flow.peer, flow.peer_port) == (IPV6[0], 40000)
    assert flow.flow_class is FlowClass.PLAINTEXT
    assert (flow.bytes_to_server, flow.bytes_to_client) == (len(HTTP), len(BANNER))
    assert flow.segments == len(packets)
    assert flow.hint is Hint.HTTP1
    (edge,) = bench.edges()
    assert edge.count.first_seen == pytest.approx(flow.opened, abs=1)
    assert bench.classifier.flow_record(bench.classifier.take_flow(flow.key)) == flow
    assert bench.flows() == []
    assert bench.classifier.take_flow(flow.key) is None


def test_bytes_of_a_connection_that_was_open_before_count_from_the_first_that_was_seen(
    bench: Bench,
) -> None:
    talk = talk_of()
    bench.play(
        [
            talk.up(5000, b""),
            talk.up(5000, b"a" * 100),
            talk.down(9, b"b" * 10, 5100),
            talk.up(5100, b"c" * 50),
            talk.up(5100, b"c" * 50),
        ],
        Direction.INBOUND,
    )
    flow = only_flow(bench)
    assert (flow.bytes_to_server, flow.bytes_to_client) == (150, 10)


def test_a_hint_goes_with_the_connection_from_edge_to_edge(bench: Bench) -> None:
    talk = talk_of()
    bench.play([*talk.opening(), talk.down(0, BANNER)], Direction.INBOUND)
    flow = only_flow(bench)
    value = abi.Flow.from_buffer_copy(bench.classifier.take_flow(flow.key))
    value.hint = abi.Hint.MYSQL
    bench.classifier.put_flow(bytes(value))
    bench.play([talk.up(0, TLS)], Direction.INBOUND)
    (edge,) = bench.edges()
    assert (edge.key.flow_class, edge.count.hints) == (FlowClass.STARTTLS, (Hint.MYSQL,))
    assert only_flow(bench).hint is Hint.MYSQL


# The flow map


def test_of_two_connections_with_the_same_hash_the_second_is_not_stored_and_that_is_counted() -> (
    None
):
    with closing(Classifier.private(report=False, flows=64)) as classifier:
        # Without a seed the ports of IPv4 connections make no difference to the hash.
        classifier._maps["flow_seed"].update(bytes(4), bytes(ctypes.sizeof(abi.FlowSeed)))
        bench = Bench(classifier)
        bench.begin()
        first, second = talk_of(port=40001), talk_of(port=40002)
        bench.play(
            [*first.opening(), *second.opening(), second.up(0, HTTP), first.up(0, TLS)],
            Direction.INBOUND,
        )
        assert (only_flow(bench).peer_port, only_flow(bench).bytes_to_server) == (40001, len(TLS))
        assert bench.classes() == {FlowClass.TLS: 1}
        assert bench.counted() == {"flow_not_stored": 2, "joined_midstream": 1}


def test_whoever_takes_the_maps_over_finds_the_connections_by_the_same_hash(
    tmp_path: Path,
) -> None:
    talk = talk_of()
    with bpffs(tmp_path / "bpf") as pins:
        with closing(Classifier.open(pins)) as before:
            bench = Bench(before)
            bench.begin()
            bench.play([*talk.opening(), talk.up(0, HTTP)], Direction.INBOUND)
        after = Classifier.open(pins)
        with closing(after):
            Bench(after).play([talk.up(len(HTTP), HTTP)], Direction.INBOUND)
            (flow,) = after.flows()
            assert flow.bytes_to_server == 2 * len(HTTP)
            assert after.losses().joined_midstream == 0
            assert after.take_flow(flow.key) is not None
            after.remove()


def test_every_classifier_has_a_hash_of_its_own() -> None:
    seeds = set()
    for _ in range(2):
        with closing(Classifier.private(report=False, flows=64)) as classifier:
            seeds.add(classifier._maps["flow_seed"].lookup(bytes(4)))
    assert len(seeds) == 2


# Edges and their slots


def told(bench: Bench) -> list[CountedEdge]:
    changed = bench.classifier.changed_edges()
    return [edge for edge in changed if edge.key.workload == bench.workload]


def settled(bench: Bench) -> None:
    """Nothing has changed, and nothing waits to be given back."""
    while bench.classifier.changed_edges():
        pass


def exchange(talk: Talk, data: bytes = HTTP) -> list[Packet]:
    return [*talk.opening(), talk.up(0, data)]


def test_only_edges_that_changed_are_told(bench: Bench) -> None:
    settled(bench)
    first, second = talk_of(4), talk_of(6)
    bench.play([*exchange(first), *exchange(second)], Direction.INBOUND)
    edges = {(edge.key.peer, edge.key.flow_class): edge for edge in told(bench)}
    assert set(edges) == set(
        itertools.product((IPV4[0], IPV6[0]), (FlowClass.EMPTY, FlowClass.PLAINTEXT))
    )
    assert told(bench) == []
    bench.play([second.up(len(HTTP), b"more")], Direction.INBOUND)
    (edge,) = told(bench)
    before = edges[IPV6[0], FlowClass.PLAINTEXT]
    assert (edge.slot, edge.generation, edge.live) == (before.slot, before.generation, True)
    assert edge.key is before.key
    assert edge.count.bytes_to_server == len(HTTP) + 4
    assert {(each.key, each.count) for each in bench.edges()} >= {(edge.key, edge.count)}


def test_a_forgotten_edge_is_told_once_more_and_its_slot_taken_again_after_that(
    bench: Bench,
) -> None:
    settled(bench)
    bench.play(exchange(talk_of()), Direction.INBOUND)
    slots = [(edge.slot, edge.generation) for edge in told(bench)]
    counts = {edge.key: edge.count for edge in bench.edges()}
    bench.classifier.forget([*slots, (slots[0][0], slots[0][1] + 7)])
    assert bench.edges() == []
    last = told(bench)
    assert sorted((edge.slot, edge.generation) for edge in last) == sorted(slots)
    assert not any(edge.live for edge in last)
    assert {edge.key: edge.count for edge in last if edge.count.connections} == counts
    bench.play(exchange(talk_of(6)), Direction.INBOUND)
    assert {edge.slot for edge in told(bench)}.isdisjoint(slot for slot, _ in slots)
    bench.play(exchange(talk_of(4, 1234)), Direction.INBOUND)
    again = told(bench)
    assert {(edge.slot, edge.generation) for edge in again} == {(s, g + 1) for s, g in slots}
    assert all(edge.live for edge in again)
    plaintext = next(edge for edge in again if edge.key.flow_class is FlowClass.PLAINTEXT)
    assert (plaintext.count.connections, plaintext.count.bytes_to_server) == (1, len(HTTP))


def test_what_was_forgotten_and_not_told_is_told_by_the_next_agent(
    bench: Bench, maps: Path
) -> None:
    settled(bench)
    bench.play(exchange(talk_of()), Direction.INBOUND)
    slots = {(edge.slot, edge.generation) for edge in told(bench)}
    bench.classifier.forget(slots)
    following = Classifier.open(maps.parents[1])
    try:
        found = [e for e in following.changed_edges() if e.key.workload == bench.workload]
        assert {(edge.slot, edge.generation) for edge in found} == slots
        assert not any(edge.live for edge in found)
        assert [e for e in following.changed_edges() if e.key.workload == bench.workload] == []
    finally:
        following.close()
    # The next agent also took the workload's entry away: nothing is attached here.
    bench.classifier.enter(bench.workload, (HOST_SCOPE, LOOPBACK), ())
    bench.play(exchange(talk_of(4, 1234)), Direction.INBOUND)
    assert bench.classes() == {FlowClass.PLAINTEXT: 1}


class Sums:
    """What a ledger would have: the sum of all counters by edge."""

    def __init__(self) -> None:
        self.counters: dict[tuple[int, int], CountedEdge] = {}

    def take(self, edges: list[CountedEdge]) -> None:
        for edge in edges:
            self.counters[edge.slot, edge.generation] = edge

    def by_class(self) -> dict[FlowClass, tuple[int, int, int]]:
        sums: dict[FlowClass, Counter[str]] = {}
        for edge in self.counters.values():
            count = edge.count
            sums.setdefault(edge.key.flow_class, Counter()).update(
                connections=count.connections,
                to_server=count.bytes_to_server,
                to_client=count.bytes_to_client,
            )
        return {
            kind: (total["connections"], total["to_server"], total["to_client"])
            for kind, total in sums.items()
            if any(total.values())
        }


def test_a_flow_whose_edge_was_given_back_counts_on_and_moves_exactly(bench: Bench) -> None:
    settled(bench)
    sums, talk, other = Sums(), talk_of(), talk_of(6)
    bench.play([*talk.opening(), talk.down(0, BANNER)], Direction.INBOUND)
    sums.take(told(bench))
    bench.classifier.forget(list(sums.counters))
    sums.take(told(bench))
    sums.take(told(bench))
    # Others have taken the slots by now.
    bench.play(exchange(other), Direction.INBOUND)
    bench.play([talk.down(len(BANNER), b"more")], Direction.INBOUND)
    sums.take(told(bench))
    assert sums.by_class() == {
        FlowClass.SERVER_FIRST: (1, 0, len(BANNER) + 4),
        FlowClass.PLAINTEXT: (1, len(HTTP), 0),
    }
    bench.play([talk.up(0, TLS)], Direction.INBOUND)
    sums.take(told(bench))
    assert sums.by_class() == {
        FlowClass.STARTTLS: (1, len(TLS), len(BANNER) + 4),
        FlowClass.PLAINTEXT: (1, len(HTTP), 0),
    }


@contextmanager
def no_room(maps: Path) -> Iterator[None]:
    """All slots are taken that were not taken before, and none was given back."""
    with (
        Map.open_pinned(maps / "edge_pool") as pool,
        Map.open_pinned(maps / "free_slots") as free,
    ):
        used = pool.lookup(bytes(4))
        given_back = list(popped(free))
        pool.update(bytes(4), struct.pack("=I", abi.EDGES_MAX))
        try:
            yield
        finally:
            pool.update(bytes(4), used)
            for slot in given_back:
                free.push(slot)


def popped(stack: Map) -> Iterator[bytes]:
    libbpf = ctypes.CDLL("libbpf.so.1")
    value = ctypes.create_string_buffer(stack.value_size)
    while libbpf.bpf_map_lookup_and_delete_elem(stack.fd, None, value) == 0:
        yield value.raw


def overflow(bench: Bench) -> dict[FlowClass, int]:
    return bench.classifier.losses().overflow


def test_without_a_slot_a_connection_is_lost_by_class_until_there_is_room(
    bench: Bench, maps: Path
) -> None:
    settled(bench)
    kept, lost, closed = talk_of(4), talk_of(6), talk_of(6, 50_000)
    bench.play(exchange(kept), Direction.INBOUND)
    with no_room(maps):
        bench.play([*exchange(lost), *exchange(closed, TLS)], Direction.INBOUND)
        bench.play([kept.up(len(HTTP), b"more")], Direction.INBOUND)
        assert overflow(bench) == {FlowClass.PLAINTEXT: 1, FlowClass.TLS: 1}
        assert bench.classes() == {FlowClass.PLAINTEXT: 1}
        (edge,) = bench.edges()
        assert edge.count.bytes_to_server == len(HTTP) + 4
        before = bench.counted()["edge_not_stored"]
        bench.play([lost.up(len(HTTP), b"12345")], Direction.INBOUND)
        assert bench.counted()["edge_not_stored"] == before + 1
    bench.play([lost.up(len(HTTP) + 5, b"678")], Direction.INBOUND)
    assert overflow(bench) == {FlowClass.TLS: 1}
    edges = {edge.key.peer: edge.count for edge in bench.edges()}
    assert edges[IPV6[0]].connections == 1
    assert edges[IPV6[0]].bytes_to_server == len(HTTP) + 8
    bench.play([closed.down(0, b"late", len(TLS))], Direction.INBOUND)
    assert overflow(bench) == {}
    assert bench.classes() == {FlowClass.PLAINTEXT: 2, FlowClass.TLS: 1}


def test_an_edge_that_was_given_back_makes_room(bench: Bench, maps: Path) -> None:
    settled(bench)
    first, second = talk_of(4), talk_of(6)
    bench.play(exchange(first), Direction.INBOUND)
    slots = [(edge.slot, edge.generation) for edge in told(bench)]
    with no_room(maps):
        bench.play(exchange(second), Direction.INBOUND)
        assert overflow(bench) == {FlowClass.PLAINTEXT: 1}
        bench.classifier.forget(slots)
        settled(bench)
        bench.play([second.up(len(HTTP), b"more")], Direction.INBOUND)
        assert overflow(bench) == {}
        (edge,) = bench.edges()
        assert edge.key.peer == IPV6[0]
        assert edge.count.bytes_to_server == len(HTTP) + 4


def test_a_departed_workload_leaves_neither_edges_nor_flows(bench: Bench) -> None:
    gone = bench.workload
    bench.play([*exchange(talk_of()), *exchange(talk_of(6), TLS)], Direction.OUTBOUND)
    bench.classifier.forget_edges(gone)
    assert bench.edges() == bench.flows() == []
    bench.begin()
    bench.play(exchange(talk_of()), Direction.OUTBOUND)
    assert bench.classes() == {FlowClass.PLAINTEXT: 1}


@pytest.mark.parametrize("seed", range(3))
def test_two_processors_and_somebody_who_gives_edges_back_lose_and_double_nothing(
    bench: Bench, seed: int
) -> None:
    """Both sides of the same flows at once, each by a thread of its own, while their classes change."""
    settled(bench)
    dice = random.Random(seed)
    connections, size, answer = 60, 4000, b"z" * 3000
    talks = [talk_of(dice.choice((4, 6)), 10_000 + number) for number in range(connections)]
    for talk in talks:
        bench.play([talk.syn(), talk.syn_ack()], Direction.INBOUND)
    data = TLS + b"x" * (size - len(TLS))
    sides = []
    for _ in range(2):
        packets = []
        for talk in talks:
            packets += [
                *talk.segments(data, 190),
                *(talk.down(at, answer[at : at + 100]) for at in range(0, len(answer), 100)),
            ]
        # Each flow's packets come close together, and by both threads.
        for start in range(0, len(packets), 50):
            part = packets[start : start + 50]
            dice.shuffle(part)
            packets[start : start + 50] = part
        sides.append(packets)
    sums, done = Sums(), threading.Event()

    def give_back() -> None:
        while not done.is_set():
            edges = told(bench)
            sums.take(edges)
            bench.classifier.forget([(edge.slot, edge.generation) for edge in edges if edge.live])

    threads = [
        threading.Thread(target=bench.play, args=(side, Direction.INBOUND)) for side in sides
    ]
    taker = threading.Thread(target=give_back)
    for thread in (taker, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    taker.join()
    while edges := told(bench):
        sums.take(edges)
    by_class = sums.by_class()
    assert set(by_class) <= {FlowClass.TLS, FlowClass.STARTTLS, FlowClass.UNKNOWN}
    total = [sum(column) for column in zip(*by_class.values(), strict=True)]
    assert total == [connections, connections * size, connections * len(answer)]
    flows = bench.flows()
    assert Counter(flow.flow_class for flow in flows) == {
        kind: count for kind, (count, _, _) in by_class.items()
    }
    assert {(flow.bytes_to_server, flow.bytes_to_client) for flow in flows} == {(size, len(answer))}
    assert sum(flow.segments for flow in flows) == sum(map(len, sides)) + 2 * connections


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier's programs, given another packet in each repetition of a test run."""
    if shutil.which("clang") is None:
        pytest.skip("needs clang")
    directory = tmp_path_factory.mktemp("steps")
    source = Path(__file__).parents[1] / "bench" / "steps.bpf.c"
    subprocess.run(
        [
            "make", "-C", Path(__file__).parents[2] / "bpf", f"OUT={directory}",
            f"VPATH={source.parent}", directory / "steps.bpf.o",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return directory / "steps.bpf.o"


class Stepper:
    """Test runs in which 32 bits of the packet count up."""

    def __init__(self, bench: Bench, maps: Path, compiled: Path, at: int, by: int) -> None:
        self._at, self._by = at, by
        self._programs = {}
        with Object.open(compiled) as opened:
            for name in opened.map_names():
                if (maps / name).exists():
                    with Map.open_pinned(maps / name) as existing:
                        opened.reuse(existing)
            opened.set_constants(step_at=at, step_by=by)
            opened.load()
            for way in ("step_and_observe", "step_and_observe_to_pod"):
                self._programs[way] = opened.program(way)

    def close(self) -> None:
        for program in self._programs.values():
            program.close()

    def play(self, packet: Packet, repetitions: int) -> None:
        """From the packet as it is, by steps; the client is in the pod."""
        frame = bytearray(packet.frame)
        (first,) = struct.unpack_from("!I", frame, self._at)
        struct.pack_into("!I", frame, self._at, (first - self._by) & 0xFFFFFFFF)
        way = "step_and_observe" if packet.from_client else "step_and_observe_to_pod"
        self._programs[way].test_run(bytes(frame), repetitions)


def at_once(*actions: Callable[[], None]) -> None:
    """Each on a processor of its own, as far as there are enough."""
    ready = threading.Barrier(len(actions))
    processors = sorted(os.sched_getaffinity(0))

    def act(number: int, action: Callable[[], None]) -> None:
        os.sched_setaffinity(0, {processors[number % len(processors)]})
        ready.wait()
        action()

    threads = [threading.Thread(target=act, args=each) for each in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


SEQUENCE_AT, SERVER_AT = 14 + 20 + 4, 14 + 16


def test_two_processors_count_the_bytes_of_one_flow_and_of_one_edge_once(
    bench: Bench, maps: Path, stepping: Path
) -> None:
    first, second = talk_of(4, 40_000), talk_of(4, 40_001)
    step, rounds = 10, 500_000
    bench.play([*exchange(first), *exchange(second)], Direction.OUTBOUND)
    stepper = Stepper(bench, maps, stepping, SEQUENCE_AT, step)
    more = [talk.up(len(HTTP), b"x" * step) for talk in (first, second)]
    answer = first.down(0, b"y" * step, len(HTTP))
    for packets in (more, [answer, answer]):
        at_once(*(functools.partial(stepper.play, packet, rounds) for packet in packets))
    stepper.close()
    (edge,) = bench.edges()
    sent = len(HTTP) + rounds * step
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (2 * sent, rounds * step)
    flows = {flow.local_port: flow for flow in bench.flows()}
    assert [flows[port].bytes_to_server for port in (40_000, 40_001)] == [sent, sent]
    assert flows[40_000].bytes_to_client == rounds * step
    assert [flows[port].segments - 4 for port in (40_000, 40_001)] == [3 * rounds, rounds]
    assert bench.counted() == {}


def test_two_processors_open_and_decide_the_same_connections_once(
    bench: Bench, maps: Path, stepping: Path
) -> None:
    """Each connection is to another server, so each has edges of its own, which both want to make."""
    talk, servers = talk_of(), 10_000
    stepper = Stepper(bench, maps, stepping, SERVER_AT, 1)
    play = functools.partial(stepper.play, repetitions=servers)
    at_once(*(functools.partial(play, talk.syn()) for _ in range(2)))
    assert bench.classes() == {FlowClass.EMPTY: servers}
    at_once(*(functools.partial(play, talk.up(0, HTTP)) for _ in range(2)))
    stepper.close()
    assert bench.classes() == {FlowClass.PLAINTEXT: servers}
    edges = bench.edges()
    assert len(edges) == servers
    assert {edge.count.bytes_to_server for edge in edges} == {len(HTTP)}
    assert bench.counted() == {}


def test_bytes_that_come_while_their_connection_moves_are_counted_once(
    bench: Bench, maps: Path, stepping: Path
) -> None:
    """One processor counts what the server sends, and the other sees meanwhile what the client speaks."""
    undecided, word, size, rounds, connections = b"\x16", b"no hello", 10, 2000, 150
    stepper = Stepper(bench, maps, stepping, SEQUENCE_AT, size)
    for port in range(30_000, 30_000 + connections):
        talk = talk_of(4, port)
        bench.play([talk.syn(), talk.up(0, undecided)], Direction.OUTBOUND)
        at_once(
            functools.partial(stepper.play, talk.down(0, b"y" * size, len(undecided)), rounds),
            functools.partial(bench.play, [talk.up(len(undecided), word)], Direction.OUTBOUND),
        )
    stepper.close()
    (edge,) = bench.edges()
    sent = len(undecided + word), rounds * size
    assert edge.key.flow_class is FlowClass.PLAINTEXT
    assert Counter((flow.bytes_to_server, flow.bytes_to_client) for flow in bench.flows()) == {
        sent: connections
    }
    count = edge.count
    assert (count.bytes_to_server, count.bytes_to_client) == tuple(connections * n for n in sent)
    assert bench.counted() == {}


# Profiles


def test_a_workload_can_have_a_profile_of_its_own(bench: Bench) -> None:
    with pytest.raises(KernelError, match="is not attached"):
        bench.classifier.set_profile(MeshProfile(name="own"), 0xDEAD)
    bench.classifier.set_profile(MeshProfile(name="common", alpn=("h9",)))
    bench.classifier.set_profile(
        MeshProfile(name="own", alpn=("mine",), proxy_ports=(20000,)), bench.workload
    )
    bench.play(exchange(talk_of(4), hello(None, ["mine"])), Direction.INBOUND)
    bench.play(exchange(talk_of(6), hello(None, ["h9"])), Direction.INBOUND)
    assert bench.classes() == {FlowClass.MESH: 1, FlowClass.TLS: 1}
    bench.begin()
    bench.play(exchange(talk_of(4), hello(None, ["mine"])), Direction.INBOUND)
    bench.play(exchange(talk_of(6), hello(None, ["h9"])), Direction.INBOUND)
    assert bench.classes() == {FlowClass.MESH: 1, FlowClass.TLS: 1}
    assert {edge.key.flow_class: edge.key.peer for edge in bench.edges()} == {
        FlowClass.TLS: IPV4[0],
        FlowClass.MESH: IPV6[0],
    }


@pytest.mark.parametrize(
    ("ports", "problem"),
    [
        ((0,), "profile own: proxy_ports: 0 is no TCP port"),
        ((65536,), "profile own: proxy_ports: 65536 is no TCP port"),
        (tuple(range(1, 18)), "profile own: proxy_ports: 17 ports"),
    ],
)
def test_proxy_ports_that_do_not_fit_are_refused(
    bench: Bench, ports: tuple[int, ...], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        bench.classifier.set_profile(MeshProfile(name="own", proxy_ports=ports))


# Interfaces without an Ethernet header


ADDRESSES = {"pod": ("10.88.0.2", "fd88::2"), "peer": ("10.88.0.1", "fd88::1")}


@contextmanager
def tunnel() -> Iterator[dict[str, str]]:
    """Two namespaces joined by tun0 on either side: bare IP packets, carried across by this process."""
    with ExitStack() as stack:
        paths = {name: stack.enter_context(namespace()) for name in ADDRESSES}
        ends = {}
        for name, path in paths.items():
            ends[name] = netns.run_in(path, stack.enter_context, tun.opened("tun0"))
            for address in ADDRESSES[name]:
                netns.run_in(path, ends[name].add_address, address)
        for name, other in (("pod", "peer"), ("peer", "pod")):
            for address in ADDRESSES[other]:
                netns.run_in(paths[name], ends[name].add_route, address)
        wake, stop = socket.socketpair()
        stack.callback(wake.close)
        carrier = threading.Thread(target=carry, args=(ends["pod"], ends["peer"], wake))
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(stop.close)
        yield paths


def carry(one: tun.Tun, other: tun.Tun, wake: socket.socket) -> None:
    with selectors.DefaultSelector() as ready:
        ready.register(one, selectors.EVENT_READ, other)
        ready.register(other, selectors.EVENT_READ, one)
        ready.register(wake, selectors.EVENT_READ, None)
        while True:
            for key, _ in ready.select():
                if key.data is None:
                    return
                for packet in key.fileobj.packets():
                    key.data.write(packet)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("side", Side)
def test_an_interface_of_bare_ip_packets_is_observed_like_any_other(
    bench: Bench, side: Side, version: int
) -> None:
    """The pod's own end, and the other one, which is where a node would look."""
    classifier = bench.classifier
    with tunnel() as paths:
        where = paths["pod"] if side is Side.INSIDE else paths["peer"]
        ifindex = netns.run_in(where, socket.if_nametoindex, "tun0")
        netns.run_in(where, classifier.attach, bench.workload, ifindex, side, (8080,))
        server = ADDRESSES["pod"][version == 6]
        try:
            with (
                serving(paths["pod"], "pod", [8080]),
                netns.run_in(
                    paths["peer"], socket.create_connection, (server, 8080), DEADLINE_S
                ) as connection,
            ):
                greeting = len(connection.recv(100))
                connection.sendall(b"ping\n")
                assert connection.recv(100) == b"ping\n"
            (edge,) = [e for e in bench.edges() if e.count.connections]
        finally:
            classifier.detach(bench.workload)
    assert edge.key == EdgeKey(
        workload=bench.workload,
        direction=Direction.INBOUND,
        peer=ADDRESSES["peer"][version == 6],
        port=8080,
        flow_class=FlowClass.SERVER_FIRST,
    )
    assert (edge.count.bytes_to_server, edge.count.bytes_to_client) == (5, greeting + 5)
    assert bench.counted() == {}
