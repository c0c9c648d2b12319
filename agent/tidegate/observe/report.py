"""What was seen, as people and programs read it: one row for each flow and each edge, and everything that was lost.

Pure. Joins what the flow map has of a connection with the names in its ClientHello. The same for an interface that is
watched and for a capture that is played.
"""

from collections import Counter
from collections.abc import Iterable

import msgspec

from tidegate.addresses import endpoint
from tidegate.model import Direction, Edge, FlowClass, Hint
from tidegate.observe import abi
from tidegate.observe.classifier import FlowRecord, Losses
from tidegate.observe.hellos import HelloBook, Names

_IGNORED = (abi.Counter.NOT_IP, abi.Counter.NOT_TCP)
"""What there is on every interface, and what is understood well enough: it is none of the classifier's."""
_FLAGS = ("SERVER_FIRST", "CLOSED", "OVERLAP", "PROXY", "SSLV2")
"""Of enum tg_flow_flag, those that say something of the connection; the others are the programs' own bookkeeping."""


class FlowRow(msgspec.Struct, frozen=True, kw_only=True):
    """One connection. Bytes are TCP payload by stream position."""

    direction: Direction
    client: str
    """address:port, [address]:port for IPv6."""
    server: str
    flow_class: FlowClass = msgspec.field(name="class")
    hint: Hint | None
    alpn: tuple[str, ...]
    sni: str | None
    syn_seen: bool
    first_byte_seen: bool
    bytes_to_server: int
    bytes_to_client: int
    segments: int
    flags: tuple[str, ...]
    """Names in lower case of enum tg_flow_flag, and of what the ClientHello says of itself."""


class EdgeRow(msgspec.Struct, frozen=True, kw_only=True):
    """All connections with one peer and server port that turned out to be of one class."""

    direction: Direction
    peer: str
    port: int
    flow_class: FlowClass = msgspec.field(name="class")
    connections: int
    bytes_to_server: int
    bytes_to_client: int
    hints: tuple[Hint, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One observation."""

    flows: tuple[FlowRow, ...]
    edges: tuple[EdgeRow, ...]
    counters: dict[str, int]
    """Every way in which something could be lost or not understood, by name; all 0 when nothing was."""
    ignored: dict[str, int]
    """Packets that are not TCP over IP, by name."""
    flows_not_listed: int
    """Connections that are in the edges' sums and not among the flows."""
    notes: tuple[str, ...] = ()
    """What else whoever reads this should know, a sentence each."""


class CaptureLosses(msgspec.Struct, frozen=True, kw_only=True):
    """What was lost before it came to the programs: nothing, where packets come from an interface."""

    packet_truncated: int = 0
    """Packets that a capture has not in full."""
    link_type_unknown: int = 0
    """Packets of links that are not read."""


def flow_row(record: FlowRecord, names: Names) -> FlowRow:
    """A connection as it is told."""
    local = endpoint(record.local, record.local_port)
    peer = endpoint(record.peer, record.peer_port)
    inbound = record.direction is Direction.INBOUND
    flags = [flag.name.lower() for flag in record.flags if flag.name in _FLAGS]
    return FlowRow(
        direction=record.direction,
        client=peer if inbound else local,
        server=local if inbound else peer,
        flow_class=record.flow_class,
        hint=record.hint,
        alpn=names.alpn,
        sni=names.sni,
        syn_seen=abi.FlowFlag.SYN_SEEN in record.flags,
        first_byte_seen=abi.FlowFlag.FIRST_BYTE_SEEN in record.flags,
        bytes_to_server=record.bytes_to_server,
        bytes_to_client=record.bytes_to_client,
        segments=record.segments,
        flags=(*flags, *names.flags),
    )


def report(
    *,
    records: Iterable[FlowRecord],
    hellos: HelloBook,
    edges: Iterable[Edge],
    losses: Losses,
    capture: CaptureLosses = CaptureLosses(),  # noqa: B008 - frozen
    notes: tuple[str, ...] = (),
) -> Report:
    """Everything that was seen. Edges that all connections have left for another are not told."""
    rows = tuple(flow_row(one, hellos.names((one.key, one.opened_ns))) for one in records)
    seen = sorted((edge for edge in edges if _says_something(edge)), key=lambda edge: edge.key)
    counted = {
        counter.name.lower(): getattr(losses, counter.name.lower()) for counter in abi.Counter
    }
    ignored = {counter.name.lower(): counted.pop(counter.name.lower()) for counter in _IGNORED}
    overflow = sum(losses.overflow.values())
    total = sum(edge.count.connections for edge in seen) + overflow
    return Report(
        flows=rows,
        edges=tuple(map(_edge_row, seen)),
        counters=counted | {"overflow": overflow} | msgspec.structs.asdict(capture),
        ignored=ignored,
        flows_not_listed=max(total - len(rows), 0),
        notes=notes,
    )


def classes(rows: Iterable[EdgeRow]) -> dict[FlowClass, int]:
    """Connections by class, in the order of FlowClass."""
    counted: Counter[FlowClass] = Counter()
    for row in rows:
        counted[row.flow_class] += row.connections
    return {each: counted[each] for each in FlowClass if counted[each]}


def _says_something(edge: Edge) -> bool:
    count = edge.count
    return bool(count.connections or count.bytes_to_server or count.bytes_to_client)


def _edge_row(edge: Edge) -> EdgeRow:
    return EdgeRow(
        direction=edge.key.direction,
        peer=edge.key.peer,
        port=edge.key.port,
        flow_class=edge.key.flow_class,
        connections=edge.count.connections,
        bytes_to_server=edge.count.bytes_to_server,
        bytes_to_client=edge.count.bytes_to_client,
        hints=edge.count.hints,
    )
