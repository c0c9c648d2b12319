"""What the classifier has in the kernel: upgrades, crashes, filters beside other people's, and what is left behind."""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from classifying import bpffs
from namespaces import DEADLINE_S, Pair, eventually, serving
from pinning import (
    FOREIGN,
    OTHER_WORKLOAD,
    PORT,
    STUB,
    TELLER,
    WORKLOAD,
    Foreign,
    Node,
    build,
    crashes,
    filters,
    in_child,
    index,
    is_there,
    qdiscs,
    run_tc,
)

from tidegate.kernel import interfaces, links, netns, tc, tun
from tidegate.kernel.bpf import AttachType, Link, Program, RingBuffer
from tidegate.kernel.bpf_object import Object
from tidegate.kernel.errors import KernelError
from tidegate.observe import abi, classifier, hold
from tidegate.observe.classifier import Classifier, Side
from tidegate.observe.hold import BEST, HELLOS, PACKAGED_OBJECT, By
from tidegate.observe.pins import ANOTHER_LAYOUT, LOST_MAP
from tidegate.observe.private import Private

pytestmark = pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
needs_tc = pytest.mark.skipif(not shutil.which("tc"), reason="needs the tc command")
every_way = pytest.mark.parametrize("by", By)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("stub"), "stub", STUB)


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory, stub: Path) -> Path:
    """The same programs in another file."""
    other = tmp_path_factory.mktemp("upgraded") / "stub.bpf.o"
    other.write_bytes(stub.read_bytes() + b"\0")
    return other


@pytest.fixture(scope="module")
def other_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs with two fields of a map's value in each other's place: no size tells."""
    return build(tmp_path_factory.mktemp("layout"), "stub", STUB, "-DOTHER_LAYOUT")


@pytest.fixture(scope="module")
def teller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that send an entry to a ring buffer, and return their constants."""
    places = [
        f"-DKEY_AT={abi.HelloChunk.key.offset}",
        f"-DBYTES_AT={abi.HelloChunk.bytes.offset}",
    ]
    return build(tmp_path_factory.mktemp("teller"), "teller", TELLER, *places)


@pytest.fixture
def bpf(tmp_path: Path) -> Iterator[Path]:
    with bpffs(tmp_path / "bpf") as directory:
        yield directory


@pytest.fixture(scope="module")
def foreign_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("foreign"), "foreign", FOREIGN)


@pytest.fixture(params=["passes", "drops"])
def foreign(
    pair: Pair, bpf: Path, foreign_object: Path, request: pytest.FixtureRequest
) -> Iterator[Foreign]:
    with contextlib.closing(Foreign(pair, bpf, foreign_object, request.param)) as made:
        yield made


@pytest.fixture
def node(pair: Pair, bpf: Path, by: By, stub: Path) -> Node:
    return Node(pair, bpf, (by,), stub)


def connect(pair: Pair, timeout: float = DEADLINE_S) -> None:
    """One connection from the pod to the peer and its end, with nothing said."""
    netns.run_in(pair.pod, socket.create_connection, (pair.peer_ipv4, PORT), timeout).close()


def connections(classifier: Classifier, inside: bool = False) -> int:
    """How many SYNs the stub has counted."""
    value = classifier._maps["seen"].lookup(struct.pack("=I", inside))
    return struct.unpack("=QQ", value)[0]


@every_way
def test_an_upgrade_replaces_every_program_and_goes_on_observing(
    node: Node, upgraded: Path
) -> None:
    first = node.open()
    before = [node.observe(first), node.observe_inside(first)]
    generation, old = first.generation, node.programs()
    first.close()
    second = node.open(upgraded)
    assert second.generation == generation
    assert second.notes == ()
    after = node.attachments(second)
    assert [each.workload_key for each in after] == [WORKLOAD, OTHER_WORKLOAD]
    for one, other in zip(before, after, strict=True):
        assert other.attached_at == pytest.approx(one.attached_at, abs=0.1)
    assert len(node.programs()) == 4
    assert not node.programs() & old
    eventually(lambda: not any(is_there("programs", number) for number in old))
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    assert connections(second) == connections(second, inside=True) == 1
    node.remove(second)


@every_way
def test_no_connection_is_missed_while_programs_are_replaced(node: Node, upgraded: Path) -> None:
    first = node.open()
    node.observe(first)
    first.close()
    made, over = [], threading.Event()

    def call() -> None:
        while not over.is_set():
            connect(node.pair)
            made.append(1)

    with serving(node.pair.peer, "peer", [PORT]):
        caller = threading.Thread(target=call)
        caller.start()
        try:
            for object_path in (upgraded, node.stub, upgraded):
                so_far = len(made)
                eventually(lambda so_far=so_far: len(made) > so_far)
                node.open(object_path).close()
        finally:
            over.set()
            caller.join()
    last = node.open(upgraded)
    assert connections(last) == len(made)
    node.remove(last)


@every_way
def test_a_crash_at_any_step_of_an_upgrade_is_completed_by_the_next_start(
    node: Node, upgraded: Path
) -> None:
    first = node.open()
    node.observe(first)
    node.observe_inside(first)
    generation = first.generation
    first.close()
    here, there = node.stub, upgraded
    for _ in crashes(lambda: node.open(there)):
        assert len(node.programs()) >= 4, "each is attached, the old one or the new one"
        completed = node.open(there)
        assert len(node.attachments(completed)) == 2
        assert completed.generation == generation
        assert len(list((node.directory / "classifier" / "programs").iterdir())) == 2
        pinned = {number for kind, number in node.kept() if kind == "programs"}
        assert node.programs() == pinned
        completed.close()
        node.open(here).close()
    last = node.open(here)
    assert len(node.attachments(last)) == 2
    node.remove(last)


@every_way
def test_a_crash_at_any_step_of_a_first_start_is_completed_by_the_next(node: Node) -> None:
    def start() -> None:
        classifier = node.open()
        node.observe(classifier)
        node.observe_inside(classifier)

    for _ in crashes(start):
        second = node.open()
        assert second.notes == ()
        node.observe(second)
        node.observe_inside(second)
        assert len(node.attachments(second)) == 2
        assert len(node.programs()) == 4
        node.remove(second)
        assert node.programs() == set()
        assert qdiscs(node.pair.peer) == qdiscs(node.pair.pod) == ()
    node.remove(node.open())


@every_way
def test_a_crash_at_any_step_of_removing_is_completed_by_the_next(node: Node) -> None:
    def start() -> Classifier:
        classifier = node.open()
        node.observe(classifier)
        node.observe_inside(classifier)
        return classifier

    start().close()
    for _ in crashes(lambda: node.remove(node.open())):
        again = node.open()
        node.remove(again)
        assert node.programs() == set()
        assert qdiscs(node.pair.peer) == qdiscs(node.pair.pod) == ()
        start().close()


@every_way
def test_maps_of_another_layout_are_given_up_and_that_is_said(
    node: Node, other_layout: Path
) -> None:
    first = node.open()
    node.observe(first)
    generation = first.generation
    old = node.kept()
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    first.close()
    second = node.open(other_layout)
    assert second.notes == (ANOTHER_LAYOUT,)
    assert second.generation != generation
    assert connections(second) == 0
    assert node.attachments(second) == []
    assert node.programs() == set()
    eventually(lambda: not any(is_there(*each) for each in old))
    second.close()
    third = node.open(other_layout)
    assert third.notes == ()
    node.remove(third)


@every_way
def test_a_crash_at_any_step_of_a_change_of_layout_is_completed_by_the_next_start(
    node: Node, other_layout: Path
) -> None:
    def start(object_path: Path) -> str:
        classifier = node.open(object_path)
        node.observe(classifier)
        classifier.close()
        return classifier.generation

    generation = start(node.stub)
    for _ in crashes(lambda: node.open(other_layout)):
        second = node.open(other_layout)
        assert second.generation != generation
        assert node.attachments(second) == []
        assert node.programs() == set()
        node.remove(second)
        generation = start(node.stub)


@pytest.mark.parametrize("by", [By.TCX])
def test_maps_without_a_word_about_their_layout_are_not_used(node: Node) -> None:
    first = node.open()
    node.observe(first)
    generation = first.generation
    first.close()
    (layout,) = (node.directory / "classifier").glob("layout-*")
    layout.rmdir()
    second = node.open()
    assert second.notes == (ANOTHER_LAYOUT,)
    assert second.generation != generation
    node.remove(second)


@pytest.mark.parametrize("by", [By.TCX])
def test_a_map_that_is_not_what_it_is_called_is_not_used(node: Node) -> None:
    node.open().close()
    maps = node.directory / "classifier" / "maps"
    for old, new in (("seen", "between"), ("flows", "seen"), ("between", "flows")):
        (maps / old).rename(maps / new)
    second = node.open()
    assert second.notes == (ANOTHER_LAYOUT,)
    assert connections(second) == 0
    node.remove(second)


@pytest.mark.parametrize("by", [By.TCX])
def test_a_lost_map_is_told(node: Node) -> None:
    node.open().close()
    (node.directory / "classifier" / "maps" / "flows").unlink()
    second = node.open()
    assert second.notes == (LOST_MAP,)
    node.remove(second)


@every_way
def test_programs_that_the_kernel_refuses_leave_those_that_run(node: Node, tmp_path: Path) -> None:
    first = node.open()
    node.observe(first)
    first.close()
    attached = node.programs()
    source = STUB.replace("return -1", "return *(int *)(long)skb->data")
    refused = build(tmp_path, "refused", source)
    with pytest.raises(KernelError, match="the verifier rejects from_pod"):
        node.open(refused)
    assert node.programs() == attached
    second = node.open()
    assert len(node.attachments(second)) == 1
    assert second.notes == ()
    node.remove(second)


@pytest.mark.parametrize("by", [By.TCX])
def test_a_package_that_is_upgraded_under_a_running_agent_changes_nothing_until_its_next_start(
    node: Node, tmp_path: Path
) -> None:
    installed = tmp_path / "classifier.bpf.o"
    shutil.copy(node.stub, installed)
    first = node.open(installed)
    installed.write_text("half of a new package")
    node.observe(first)
    node.observe_inside(first)
    programs = list((node.directory / "classifier" / "programs").iterdir())
    assert len({each.name.partition("-")[0] for each in programs}) == 1
    node.remove(first)


@every_way
def test_removing_leaves_nothing_in_the_kernel(node: Node) -> None:
    before = (qdiscs(node.pair.peer), qdiscs(node.pair.pod))
    classifier = node.open()
    node.observe(classifier)
    node.observe_inside(classifier)
    kept, attached = node.kept(), node.programs()
    assert {kind for kind, _ in kept} == {"maps", "programs"} | (
        {"links"} if by_links(node) else set()
    )
    assert len(attached) == 4
    node.remove(classifier)
    assert not (node.directory / "classifier").exists()
    assert (qdiscs(node.pair.peer), qdiscs(node.pair.pod)) == before == ((), ())
    assert filters(node.pair.peer, "host0") == filters(node.pair.pod, "eth0") == ()
    gone = kept | {("programs", number) for number in attached}
    eventually(lambda: not any(is_there(*each) for each in gone))


def by_links(node: Node) -> bool:
    return node.by == (By.TCX,)


@every_way
def test_copies_for_a_namespace_go_with_its_last_interface(node: Node) -> None:
    classifier = node.open()
    node.observe(classifier)
    programs = node.directory / "classifier" / "programs"
    alone = set(programs.iterdir())
    node.observe_inside(classifier)
    assert len(list(programs.iterdir())) == 2
    node.here(classifier.detach, OTHER_WORKLOAD)
    assert set(programs.iterdir()) == alone
    assert len(node.attachments(classifier)) == 1
    node.remove(classifier)


@needs_tc
@pytest.mark.parametrize("by", [By.TCX])
@pytest.mark.parametrize("foreign_first", [True, False])
@pytest.mark.parametrize("how", ["tcx", "tc"])
def test_another_program_beside_links_keeps_its_verdict_and_hides_nothing(
    node: Node, foreign: Foreign, foreign_first: bool, how: str
) -> None:
    attach = foreign.attach_by_tcx if how == "tcx" else lambda: foreign.attach_by_tc(1)
    beside(node, foreign, attach, foreign_first)


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
@pytest.mark.parametrize("foreign_first", [True, False])
def test_another_filter_beside_filters_keeps_its_verdict_and_hides_nothing(
    node: Node, foreign: Foreign, foreign_first: bool
) -> None:
    beside(node, foreign, lambda: foreign.attach_by_tc(50), foreign_first)


def beside(node: Node, foreign: Foreign, attach: Callable[[], None], foreign_first: bool) -> None:
    classifier = node.open()
    if foreign_first:
        attach()
    node.observe(classifier)
    if not foreign_first:
        attach()
    assert classifier.notes == ()
    with serving(node.pair.peer, "peer", [PORT]):
        if foreign.program.name == "drops":
            with pytest.raises(TimeoutError):
                connect(node.pair, timeout=0.2)
        else:
            connect(node.pair)
    assert foreign.count() > 0
    assert connections(classifier) == 1
    node.here(classifier.detach, WORKLOAD)
    before = foreign.count()
    with serving(node.pair.peer, "peer", [PORT]), contextlib.suppress(TimeoutError):
        connect(node.pair, timeout=0.2)
    assert foreign.count() > before, "it is still there"
    node.remove(classifier)


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
@pytest.mark.parametrize("foreign", ["passes"], indirect=True)
def test_a_filter_that_comes_before_all_others_is_told(node: Node, foreign: Foreign) -> None:
    foreign.attach_by_tc(1)
    classifier = node.open()
    node.observe(classifier)
    (note,) = classifier.notes
    assert "another program before the classifier (ingress filter" in note
    assert node.private().notes == ()
    again = node.open()
    assert node.attachments(again)
    assert again.notes == classifier.notes
    again.close()
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    assert foreign.count() > 0
    node.remove(classifier)
    (left,) = filters(node.pair.peer, "host0")
    assert (left.priority, left.handle) == (1, 1)
    assert len(qdiscs(node.pair.peer)) == 1


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
@pytest.mark.parametrize("foreign", ["passes"], indirect=True)
def test_a_priority_that_somebody_has_is_not_taken(node: Node, foreign: Foreign) -> None:
    foreign.attach_by_tc(2)
    classifier = node.open()
    node.observe(classifier)
    places = {(each.hook, each.priority) for each in filters(node.pair.peer, "host0")}
    assert places == {(tc.Hook.INGRESS, 2), (tc.Hook.INGRESS, 3), (tc.Hook.EGRESS, 2)}
    node.remove(classifier)


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
def test_a_qdisc_that_was_there_stays(node: Node) -> None:
    run_tc(node.pair.peer, "qdisc add dev host0 clsact")
    classifier = node.open()
    node.observe(classifier)
    node.remove(classifier)
    assert filters(node.pair.peer, "host0") == ()
    assert len(qdiscs(node.pair.peer)) == 1


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
@pytest.mark.parametrize("foreign", ["passes"], indirect=True)
def test_a_qdisc_that_somebody_uses_meanwhile_stays(node: Node, foreign: Foreign) -> None:
    classifier = node.open()
    node.observe(classifier)
    foreign.attach_by_tc(50)
    node.remove(classifier)
    assert [each.priority for each in filters(node.pair.peer, "host0")] == [50]


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
def test_a_qdisc_that_leaves_no_room_is_told_and_nothing_stays(node: Node) -> None:
    run_tc(node.pair.peer, "qdisc add dev host0 ingress")
    classifier = node.open()
    with pytest.raises(KernelError, match="a qdisc of kind ingress"):
        node.observe(classifier)
    assert node.attachments(classifier) == []
    assert list((node.directory / "classifier" / "links").iterdir()) == []
    node.remove(classifier)


@every_way
def test_a_returning_agent_finds_links_and_filters_again(node: Node) -> None:
    first = node.open()
    before = [node.observe(first), node.observe_inside(first)]
    attached = node.programs()
    first.close()
    second = node.open()
    found = node.attachments(second)
    assert [(each.workload_key, each.side, each.scope) for each in found] == [
        (each.workload_key, each.side, each.scope) for each in before
    ]
    again = [node.observe(second), node.observe_inside(second)]
    assert [each.attached_at for each in again] == [each.attached_at for each in found]
    assert node.programs() == attached
    node.remove(second)


@every_way
def test_an_agent_in_another_namespace_than_the_last_one_finds_links_and_filters_again(
    node: Node, upgraded: Path
) -> None:
    first = node.open()
    node.observe(first)
    attached = node.programs()
    first.close()
    moved = netns.run_in(node.pair.pod, Classifier.open, node.directory, upgraded, by=node.by)
    assert node.programs().isdisjoint(attached), "the new programs are in the place of the old ones"
    node.observe(moved)
    assert len(node.programs()) == 2
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    assert connections(moved) == 1
    assert len(netns.run_in(node.pair.pod, moved.attachments)) == 1
    moved.close()
    again = node.open(upgraded)
    assert len(node.attachments(again)) == 1
    node.remove(again)


@needs_tc
@pytest.mark.parametrize("by", [By.CLSACT])
def test_filters_that_somebody_removed_are_missed_and_put_back(node: Node) -> None:
    classifier = node.open()
    first = node.observe(classifier)
    run_tc(node.pair.peer, "filter del dev host0 egress")
    assert node.attachments(classifier) == []
    second = node.observe(classifier)
    assert second.attached_at > first.attached_at
    assert len(filters(node.pair.peer, "host0")) == 2
    run_tc(node.pair.peer, "qdisc del dev host0 clsact")
    assert node.attachments(classifier) == []
    node.observe(classifier)
    node.remove(classifier)
    assert qdiscs(node.pair.peer) == ()


@every_way
def test_an_interface_that_went_takes_its_attachment_along(node: Node) -> None:
    classifier = node.open()
    node.observe(classifier)
    node.observe_inside(classifier)
    links.delete_link(node.pair.pod, "eth0")
    assert node.attachments(classifier) == []
    classifier.close()
    second = node.open()
    assert list((node.directory / "classifier" / "links").iterdir()) == []
    assert len(list((node.directory / "classifier" / "programs").iterdir())) == 1
    node.remove(second)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "private"])
def test_a_kernel_without_links_is_given_filters(
    pair: Pair, bpf: Path, stub: Path, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """As a kernel before 6.6 refuses them; on the node's side, and in the workload's namespace."""

    def no_links(program: Program, ifindex: int, _where: AttachType) -> Link:
        raise KernelError(f"cannot attach {program.name} to interface {ifindex}", 22)

    monkeypatch.setattr(Link, "attach", no_links)
    node = Node(pair, bpf, BEST, stub)
    classifier = node.open() if pinned else node.private()
    node.observe(classifier)
    node.observe_inside(classifier)
    assert len(node.attachments(classifier)) == 2
    assert len(filters(pair.peer, "host0")) == len(filters(pair.pod, "eth0")) == 2
    with serving(pair.peer, "peer", [PORT]):
        connect(pair)
    assert connections(classifier) == connections(classifier, inside=True) == 1
    node.remove(classifier)
    assert qdiscs(pair.peer) == qdiscs(pair.pod) == ()


@every_way
def test_a_private_classifier_pins_nothing_and_is_gone_when_it_is_closed(node: Node) -> None:
    classifier = node.private()
    node.observe(classifier)
    node.observe_inside(classifier)
    assert len(node.attachments(classifier)) == 2
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    assert connections(classifier) == connections(classifier, inside=True) == 1
    made = {("programs", program.id) for program in classifier.programs}
    assert not (node.directory / "classifier").exists()
    node.here(classifier.close)
    eventually(lambda: not any(is_there(*each) for each in made))
    assert qdiscs(node.pair.peer) == qdiscs(node.pair.pod) == ()


@every_way
def test_a_private_classifier_beside_a_pinned_one_takes_nothing_from_it(node: Node) -> None:
    pinned, private = node.open(), node.private()
    node.observe(pinned)
    node.observe(private)
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    assert connections(pinned) == connections(private) == 1
    node.here(private.close)
    with serving(node.pair.peer, "peer", [PORT]):
        connect(node.pair)
    assert connections(pinned) == 2
    assert len(node.attachments(pinned)) == 1
    node.remove(pinned)
    assert qdiscs(node.pair.peer) == ()


@pytest.mark.parametrize("by", [By.CLSACT])
def test_whoever_goes_last_takes_the_qdisc_along(node: Node) -> None:
    pinned, private = node.open(), node.private()
    node.observe(pinned)
    node.observe(private)
    node.remove(pinned)
    assert len(node.attachments(private)) == 1
    node.here(private.close)
    assert qdiscs(node.pair.peer) == ()


@every_way
def test_what_a_killed_private_classifier_left_goes_with_the_next_start(node: Node) -> None:
    def hold() -> None:
        classifier = node.private()
        node.observe(classifier)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold) == -signal.SIGKILL
    assert len(filters(node.pair.peer, "host0")) == (0 if by_links(node) else 2)
    mine = node.private()
    node.observe(mine)
    node.open().close()
    owners = {each.owner for each in filters(node.pair.peer, "host0")}
    assert owners <= {f"tidegate-{os.getpid()}-{Path('/proc/self/ns/pid').stat().st_ino}"}
    assert len(node.attachments(mine)) == 1, "one that lives is left alone"
    node.here(mine.close)
    assert qdiscs(node.pair.peer) == ()
    node.remove(node.open())


@pytest.mark.parametrize("by", [By.TCX])
def test_the_flow_map_of_a_private_classifier_can_be_small(node: Node) -> None:
    classifier = node.private(flows=64)
    assert classifier._maps["flows"].max_entries == 64
    node.observe_inside(classifier)
    assert len(node.attachments(classifier)) == 1
    node.here(classifier.close)


@pytest.fixture
def told(teller: Path) -> Iterator[tuple[Program, RingBuffer]]:
    """A program that reports, and what reads its reports."""
    with contextlib.closing(Private(teller, report=True)) as private:
        ring = RingBuffer(private.maps[HELLOS])
        yield private.programs[0], ring
        ring.close()


def test_chunks_of_hellos_come_as_the_programs_sent_them(told: tuple[Program, RingBuffer]) -> None:
    from_pod, ring = told
    assert ring.drain() == []
    for length in (60, 61):
        from_pod.test_run(bytes(length))
    first, second = (classifier._chunk(entry) for entry in ring.drain())
    assert first.key == bytes([5]).ljust(ctypes.sizeof(abi.FlowKey), b"\0")
    assert (first.opened_ns, first.position, first.bytes) == (9, 60, b"hi")
    assert (second.position, second.bytes) == (61, b"hi")
    assert ring.drain() == []


def test_a_reader_of_hellos_takes_so_many_at_a_time_and_then_the_others(
    told: tuple[Program, RingBuffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from_pod, ring = told
    monkeypatch.setattr(RingBuffer, "_MOST", 2)
    from_pod.test_run(bytes(60), 5)
    assert [len(ring.drain()) for _ in range(4)] == [2, 2, 1, 0]


def test_without_report_the_programs_send_nothing(teller: Path) -> None:
    with contextlib.closing(Private(teller, report=False)) as private:
        private.programs[0].test_run(bytes(60))
        ring = RingBuffer(private.maps[HELLOS])
        assert ring.drain() == []
        ring.close()


def test_constants_are_set_by_name_and_the_others_stay(teller: Path) -> None:
    with Object.open(teller) as compiled:
        assert set(compiled.constants()) == {"small", "large", "scope", "report"}
        compiled.set_constants(large=7, small=3)
        with pytest.raises(KernelError, match="has no constant nothing"):
            compiled.set_constants(nothing=1)
        compiled.load()
        with compiled.program("to_pod") as program:
            assert program.test_run(bytes(60)).returned == 370


def test_programs_that_cannot_report_are_not_taken_for_ones_that_do(foreign_object: Path) -> None:
    with pytest.raises(KernelError, match="has no constant report"):
        Private(foreign_object, report=True)


def test_a_layout_is_all_that_a_map_and_its_values_are(stub: Path, other_layout: Path) -> None:
    with Object.open(stub) as one, Object.open(other_layout) as other:
        assert one.layout("flows") == other.layout("flows")
        assert one.definition("seen") == other.definition("seen")
        assert one.layout("seen") != other.layout("seen")
        one.resize("flows", 1)
        assert one.layout("flows") != other.layout("flows")


def test_a_change_of_what_a_number_means_is_another_layout(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Object.open(stub) as compiled:
        before = hold._layout(compiled, ["seen"])
        assert hold._layout(compiled, ["seen"]) == before
        monkeypatch.setattr(abi, "Class", abi.Direction)
        assert hold._layout(compiled, ["seen"]) != before


def test_the_packaged_programs_are_upgraded_too(pair: Pair, bpf: Path, tmp_path: Path) -> None:
    other = tmp_path / "classifier.bpf.o"
    other.write_bytes(PACKAGED_OBJECT.read_bytes() + b"\0")
    node = Node(pair, bpf, (By.TCX,), PACKAGED_OBJECT)
    first = node.open()
    before = node.observe(first)
    attached = node.programs()
    first.close()
    second = node.open(other)
    (after,) = node.attachments(second)
    assert after.attached_at == pytest.approx(before.attached_at, abs=0.1)
    assert second.notes == ()
    assert not node.programs() & attached
    node.remove(second)


REJECTED = {
    "int *end = (void *)(long)skb->data; return *end;": (
        "the verifier rejects wrong: R1 offset is outside of the packet",
        "at instruction 1: (61) r0 = *(u32 *)(r1 +0)",
        "source: int *end = (void *)(long)skb->data; return *end;",
    ),
    "char to[4]; bpf_skb_load_bytes(skb, 0, to, skb->len); return to[0];": (
        "the verifier rejects wrong: ",
        "at instruction 4: (85) call bpf_skb_load_bytes",
        "source: char to[4]; bpf_skb_load_bytes(skb, 0, to, skb->len)",
    ),
    'int i = skb->len; while (i != 7) asm volatile("" : "+r"(i)); return i;': (
        "the verifier rejects wrong: infinite loop detected at insn 3",
        "at instruction 2: ",
        "source: int i = skb->len; while (i != 7)",
    ),
}
"""Bodies of programs, and what is said of them."""


@pytest.mark.parametrize("body", REJECTED)
def test_what_the_verifier_rejects_is_one_line_with_reason_instruction_and_source(
    tmp_path: Path, body: str
) -> None:
    source = (
        "#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n"
        f'SEC("tc") int wrong(struct __sk_buff *skb)\n{{\n\t{body}\n}}\n'
        'char LICENSE[] SEC("license") = "GPL";\n'
    )
    wrong = build(tmp_path, "wrong", source)
    with Object.open(wrong) as compiled, pytest.raises(KernelError) as refused:
        compiled.load()
    message = str(refused.value)
    assert message.startswith("cannot load wrong.bpf.o: ")
    for part in REJECTED[body]:
        assert part in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("by", [By.TCX])
def test_an_interface_whose_packets_begin_with_ip_has_a_copy_of_its_own(node: Node) -> None:
    classifier = node.open()

    def observe() -> None:
        with tun.opened("tg-tun"):
            classifier.attach(WORKLOAD, socket.if_nametoindex("tg-tun"), Side.HOST, ())
            assert len(classifier.attachments()) == 1

    node.here(observe)
    copies = (node.directory / "classifier" / "programs").iterdir()
    assert {each.name.rpartition("-")[2] for each in copies} == {"14", "0"}
    node.remove(classifier)


def test_a_header_before_ip_is_where_an_interface_has_one(
    pair: Pair,
) -> None:
    assert netns.run_in(pair.pod, interfaces.link_header, index(pair.pod, "eth0")) == 14
    assert interfaces.link_header(1) == 14

    def of_a_tun() -> int:
        with tun.opened("tg-tun"):
            return interfaces.link_header(socket.if_nametoindex("tg-tun"))

    assert netns.run_in(pair.pod, of_a_tun) == 0
    with pytest.raises(KernelError, match="interface 4000000"):
        interfaces.link_header(4_000_000)
