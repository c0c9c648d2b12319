"""Plays a capture to the classifier's programs, packet by packet, by the kernel's program test run.

The local end of each connection is the sender of its first packet. What a test run cannot take as it was is cut, and
what cutting changes is put right afterwards: packets are counted as the wire had them, bytes as the headers say. So
that no flow falls out of the flow map, those that have been silent longest are kept here once the map is half full,
and put back when they go on.
"""

import contextlib
import ctypes
import itertools
import math
from collections.abc import Iterable, Iterator

import msgspec

from tidegate.model import Direction, Edge, EdgeKey
from tidegate.observe import abi, capture
from tidegate.observe.capture import Packet
from tidegate.observe.classifier import Classifier, FlowRecord, MeshProfile
from tidegate.observe.hellos import HelloBook
from tidegate.observe.report import CaptureLosses, Report, report
from tidegate.observe.segments import SYN, NotTcp, Segment, largest_segment, parse, pieces

FLOWS = 65_536
"""Room in the flow map."""
MAX_FRAME_BYTES = 3_500
"""A test run takes what fits into a page besides what the kernel needs there (bpf_test_init of net/bpf/test_run.c)."""
USUAL_SEGMENT_BYTES = 1_460
"""MSS of connections whose SYN the capture does not have; with Ethernet's usual MTU."""

_WORKLOAD = 1
_LOOPBACK = 1
"""The interface that a test run says a packet is on."""
_HELLO_ROUND = 64
"""Packets after which hellos are fetched: they fill at most a fraction of the ring buffer."""
_TCP_HEADER = 20
_HALF = 1 << 31

_Ends = tuple[bytes, int, bytes, int]
"""Address and port of the local end, and of the peer."""


class _Connection:
    """What is known of a pair of endpoints besides what the kernel knows."""

    __slots__ = ("delivered", "key", "mss", "parked", "segments", "sent")

    def __init__(self, ends: _Ends) -> None:
        self.key = _flow_key(ends)
        self.parked: bytes | None = None
        """The kernel's value while it is not in the flow map."""
        self.begin()

    def begin(self) -> None:
        """A new connection of the same endpoints."""
        self.mss: int | None = None
        self.segments = 0
        """Segments of the capture, less those that were played for them."""
        self.sent: list[int | None] = [None, None]
        """First sequence number beyond what each end sent: the local one, and the peer."""
        self.delivered: list[int | None] = [None, None]
        """The same, of what was played."""

    def missing(self, end: int) -> int:
        """Bytes at the end of a stream that were never played."""
        sent, delivered = self.sent[end], self.delivered[end]
        if sent is None or delivered is None:
            return 0
        ahead = (sent - delivered) % (2 * _HALF)
        return ahead if ahead < _HALF else 0


class Replay:
    """One capture being played; make one with `replaying`."""

    def __init__(self, classifier: Classifier) -> None:
        self.packets = 0
        self._classifier = classifier
        self._from_local, self._to_local = classifier.programs
        self._connections: dict[_Ends, _Connection] = {}
        self._resident: dict[_Connection, None] = {}
        """Connections that may be in the flow map, the one that was silent longest first."""
        self._replaced: list[_Told] = []
        """Flows whose endpoints had another one later."""
        self._hellos = HelloBook()
        self._truncated = 0
        self._unreadable = 0
        self._not_tcp = 0
        self._notes: tuple[str, ...] = ()

    def play(self, packet: Packet) -> None:
        """Gives one packet to the programs."""
        self.packets += 1
        frame = capture.as_ethernet(packet)
        if frame is None:
            self._count_unreadable(packet)
            return
        segment = parse(frame)
        match segment:
            case NotTcp():
                self._play_other(packet, frame, segment)
            case Segment():
                self._play_segment(packet, frame, segment)
        if self.packets % _HELLO_ROUND == 0:
            self._hellos.take(self._classifier.hellos())

    def note_end(self, early: capture.EndsEarly) -> None:
        """That the capture goes no further, and has its last packet not in full."""
        self._truncated += 1
        self._notes += (f"{early}: all before that is told",)

    def report(self) -> Report:
        """What was seen in all packets that were played."""
        self._hellos.take(self._classifier.hellos())
        records = {record.key: record for record in self._classifier.flows()}
        told = list(self._replaced)
        for connection in self._connections.values():
            record = records.get(connection.key)
            if connection.parked is not None:
                record = self._classifier.flow_record(connection.parked)
            if record is not None:
                told.append(_told(record, connection))
        losses = self._classifier.losses()
        return report(
            records=[each.record for each in told],
            hellos=self._hellos,
            edges=_with_missing(self._classifier.edges(), told),
            losses=msgspec.structs.replace(losses, not_tcp=losses.not_tcp + self._not_tcp),
            capture=CaptureLosses(
                packet_truncated=self._truncated, link_type_unknown=self._unreadable
            ),
            notes=self._notes,
        )

    def _count_unreadable(self, packet: Packet) -> None:
        if packet.cut:
            self._truncated += 1
        else:
            self._unreadable += 1

    def _play_other(self, packet: Packet, frame: bytes, what: NotTcp) -> None:
        """What is no segment, or none that could be told: the programs count why."""
        if what.known and (packet.cut or len(frame) > MAX_FRAME_BYTES):
            self._not_tcp += 1
        elif packet.cut:
            self._truncated += 1
        else:
            self._from_local.test_run(frame[:MAX_FRAME_BYTES])

    def _play_segment(self, packet: Packet, frame: bytes, segment: Segment) -> None:
        if segment.end > len(frame):
            if not packet.cut:
                # It says more than it ever had.
                self._from_local.test_run(frame[:MAX_FRAME_BYTES])
                return
            self._truncated += 1
        connection, end = self._find(segment)
        before = self._flow(connection.key) if segment.opens else None
        played = pieces(frame, segment, MAX_FRAME_BYTES)
        program = self._to_local if end else self._from_local
        for piece in played:
            program.test_run(piece)
        if before is not None:
            after = self._flow(connection.key)
            if after is None or after.opened_ns != before.opened_ns:
                self._replaced.append(_told(before, connection))
                connection.begin()
        self._count(connection, end, frame, segment, len(played))

    def _find(self, segment: Segment) -> tuple[_Connection, int]:
        """The connection of a segment, and which end sent it: 0 the local one, 1 the peer."""
        sender = (segment.source, segment.source_port)
        receiver = (segment.destination, segment.destination_port)
        connection, end = self._connections.get((*sender, *receiver)), 0
        if connection is None:
            connection, end = self._connections.get((*receiver, *sender)), 1
        if connection is None:
            ends = (*sender, *receiver)
            connection, end = self._connections.setdefault(ends, _Connection(ends)), 0
        self._resident.pop(connection, None)
        self._resident[connection] = None
        if connection.parked is not None:
            self._classifier.put_flow(connection.parked)
            connection.parked = None
        if len(self._resident) > FLOWS // 2:
            self._park()
        return connection, end

    def _park(self) -> None:
        """Makes room in the flow map."""
        for connection in list(itertools.islice(self._resident, FLOWS // 4)):
            del self._resident[connection]
            connection.parked = self._classifier.take_flow(connection.key)

    def _flow(self, key: bytes) -> FlowRecord | None:
        value = self._classifier.take_flow(key)
        if value is None:
            return None
        self._classifier.put_flow(value)
        return self._classifier.flow_record(value)

    @staticmethod
    def _count(
        connection: _Connection, end: int, frame: bytes, segment: Segment, played: int
    ) -> None:
        """Keeps what the programs could not see of a segment that was played in pieces."""
        if segment.flags & SYN and (offered := largest_segment(frame, segment)):
            connection.mss = min(offered, connection.mss or offered)
        options = segment.payload - segment.transport - _TCP_HEADER
        each = max((connection.mss or USUAL_SEGMENT_BYTES) - options, 1)
        connection.segments += max(math.ceil(segment.length / each), 1) - played
        if segment.length:
            had = max(min(segment.end, len(frame)) - segment.payload, 0)
            connection.sent[end] = _furthest(connection.sent[end], segment.follows(segment.length))
            connection.delivered[end] = _furthest(connection.delivered[end], segment.follows(had))


class _Told(msgspec.Struct, frozen=True):
    """A flow as it was in the capture, and how many of its bytes the programs were not given."""

    record: FlowRecord
    to_server: int
    to_client: int


@contextlib.contextmanager
def replaying(profile: MeshProfile) -> Iterator[Replay]:
    """A replay with programs and maps of its own, gone afterwards. KernelError when the kernel refuses them."""
    with contextlib.closing(Classifier.private(report=True, flows=FLOWS)) as classifier:
        classifier.set_profile(profile)
        classifier.enter(_WORKLOAD, (0, _LOOPBACK), ())
        yield Replay(classifier)


def _flow_key(ends: _Ends) -> bytes:
    local, local_port, peer, peer_port = ends
    address = ctypes.c_uint8 * 16
    return bytes(
        abi.FlowKey(
            interface=abi.Interface(scope=0, ifindex=_LOOPBACK),
            local=address(*local),
            peer=address(*peer),
            ports=local_port << 16 | peer_port,
        )
    )


def _furthest(so_far: int | None, sequence: int) -> int:
    if so_far is None or (sequence - so_far) % (2 * _HALF) < _HALF:
        return sequence
    return so_far


def _told(record: FlowRecord, connection: _Connection) -> _Told:
    from_local, from_peer = connection.missing(0), connection.missing(1)
    outbound = record.direction is Direction.OUTBOUND
    to_server, to_client = (from_local, from_peer) if outbound else (from_peer, from_local)
    corrected = msgspec.structs.replace(
        record,
        bytes_to_server=record.bytes_to_server + to_server,
        bytes_to_client=record.bytes_to_client + to_client,
        segments=record.segments + connection.segments,
    )
    return _Told(corrected, to_server, to_client)


def _with_missing(edges: Iterable[Edge], told: Iterable[_Told]) -> list[Edge]:
    """The edges with the bytes that the programs were not given."""
    missing: dict[EdgeKey, tuple[int, int]] = {}
    for each in told:
        if each.to_server or each.to_client:
            record = each.record
            outbound = record.direction is Direction.OUTBOUND
            key = EdgeKey(
                workload=_WORKLOAD,
                direction=record.direction,
                peer=record.peer,
                port=record.peer_port if outbound else record.local_port,
                flow_class=record.flow_class,
            )
            to_server, to_client = missing.get(key, (0, 0))
            missing[key] = (to_server + each.to_server, to_client + each.to_client)
    return [_with_bytes(edge, *missing.get(edge.key, (0, 0))) for edge in edges]


def _with_bytes(edge: Edge, to_server: int, to_client: int) -> Edge:
    count = edge.count
    return msgspec.structs.replace(
        edge,
        count=msgspec.structs.replace(
            count,
            bytes_to_server=count.bytes_to_server + to_server,
            bytes_to_client=count.bytes_to_client + to_client,
        ),
    )
