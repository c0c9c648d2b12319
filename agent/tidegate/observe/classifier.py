"""The flow classifier of this node: attaches it to workloads' interfaces, reads what it counted.

All state is in the kernel, pinned below one directory of a bpffs: an agent that dies leaves everything running,
and the next one finds maps, programs, links and attachments again and takes them over. What the programs do is
told in bpf/classifier.bpf.c. Failures are KernelErrors; names and ports that do not fit, InputErrors.
"""

import ctypes
import enum
import errno
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tidegate.errors import InputError
from tidegate.kernel.bpf import Program, RingBuffer
from tidegate.kernel.errors import KernelError
from tidegate.model import CountedEdge, Direction, Edge, FlowClass, Hint
from tidegate.observe import abi
from tidegate.observe.edges import CLASSES, DIRECTIONS, HINTS, EdgeTable, address
from tidegate.observe.flow_map import FlowMap, key_of
from tidegate.observe.hold import BEST, HELLOS, PACKAGED_OBJECT, By, Hold, Way, scope_here
from tidegate.observe.pins import Pinned
from tidegate.observe.private import Private

_COMMON_PROFILE = 0
"""The profile of all attachments that have none of their own."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Side(enum.StrEnum):
    """Which end of the workload's interface the programs are on."""

    HOST = "host"
    """The end of the veth in the node's namespace: what comes in there comes from the pod."""
    INSIDE = "inside"
    """The interface in the workload's own namespace, where there is no other end to be had."""


_SIDES = (Side.HOST, Side.INSIDE)
_WAYS: dict[Side, tuple[Way, Way]] = {
    # Where packets from the pod pass, and where packets to the pod pass.
    Side.HOST: (Way.INGRESS, Way.EGRESS),
    Side.INSIDE: (Way.EGRESS, Way.INGRESS),
}


class MeshProfile(msgspec.Struct, frozen=True, kw_only=True):
    """How a ClientHello of the mesh's own mTLS is recognised: by any of the three."""

    name: str
    sni_suffixes: tuple[str, ...] = ()
    """Ends of the server name, at a dot: ".internal.x" is the end of "a.internal.x", not of "b-internal.x"."""
    alpn: tuple[str, ...] = ()
    """Protocol names that nobody but the mesh offers."""
    proxy_ports: tuple[int, ...] = ()
    """Ports of the mesh's own listeners: every ClientHello that comes there is the mesh's."""


def consul_profile(trust_domain: str) -> MeshProfile:
    """Consul's: SNI of connect's ServiceSNI (consul agent/connect/sni.go), in any partition."""
    return MeshProfile(
        name="consul",
        sni_suffixes=(f".internal.{trust_domain}", f".internal-v1.{trust_domain}"),
    )


ISTIO = MeshProfile(
    name="istio",
    alpn=("istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"),
)
"""Istio's: mtlsTCPWithMxcALPNs and mtlsHTTPALPNs of pilot/pkg/networking/core/listener.go."""

KUMA = MeshProfile(name="kuma", alpn=("kuma",))
"""Kuma's: KumaALPNProtocols of pkg/xds/envoy/tls."""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """One interface that is being observed."""

    workload_key: int
    ifindex: int
    side: Side
    attached_at: float
    """Since when both ways are observed without a gap, seconds since the Unix epoch."""
    scope: int
    """The inode number of the network namespace in which the interface is."""


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the classifier did not look at, did not understand or could not hold, since it was loaded.

    What each field means stands in bpf/consts.h, enum tg_counter.
    """

    not_ip: int = 0
    not_tcp: int = 0
    joined_midstream: int = 0
    hello_malformed: int = 0
    bad_headers: int = 0
    out_of_window: int = 0
    no_workload: int = 0
    hello_not_reported: int = 0
    hint_lost: int = 0
    tcp_fragment: int = 0
    too_many_headers: int = 0
    flow_not_stored: int = 0
    edge_not_stored: int = 0
    prefix_not_stored: int = 0
    prefix_evicted: int = 0
    prefix_busy: int = 0
    bytes_missed: int = 0
    race_lost: int = 0
    overflow: dict[FlowClass, int] = {}
    """Connections whose edge did not fit, by class; only classes that have any."""

    def lost_by_name(self) -> dict[str, int]:
        """Those by which evidence was lost, by name."""
        counted = {
            counter.name.lower(): getattr(self, counter.name.lower())
            for counter in abi.Counter
            if counter >= abi.COUNTER_LOSSES
        }
        return counted | {f"overflow_{each}": count for each, count in self.overflow.items()}

    @property
    def lost(self) -> int:
        """The sum of those by which evidence was lost: more than 0 and the coverage has a hole."""
        return sum(self.lost_by_name().values())


class FlowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One connection, as the flow map has it at the moment."""

    key: bytes
    """struct tg_flow_key: what the kernel knows it by."""
    interface: tuple[int, int]
    """Scope and ifindex; see Attachment."""
    workload: int
    direction: Direction
    local: str
    local_port: int
    peer: str
    peer_port: int
    flow_class: FlowClass
    settled: bool
    """Whether the class is final."""
    decided: bool
    """Whether the stream's beginning has decided it: final, but for what may follow later."""
    flags: abi.FlowFlag
    hint: Hint | None
    bytes_to_server: int
    """Payload by sequence numbers: what is sent again counts once, what was not seen before later bytes counts too."""
    bytes_to_client: int
    segments: int
    """Packets both ways, as many as they are on the wire."""
    opened: float
    """Seconds since the Unix epoch."""
    opened_ns: int
    """The same in nanoseconds of CLOCK_BOOTTIME."""


class HelloChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a ClientHello, as a program sent it."""

    key: bytes
    """Raw key of the flow."""
    opened_ns: int
    """When the flow was opened, CLOCK_BOOTTIME: the key may come again, with another connection."""
    position: int
    """Of its first byte, from the beginning of the hello's record header."""
    bytes: bytes


class _Clock:
    """From the kernel's CLOCK_BOOTTIME to Unix time.

    The same nanosecond always gives the same second, until somebody sets the clock of the machine.
    """

    STEP = 0.5

    def __init__(self) -> None:
        self._offset = self._difference()

    @staticmethod
    def _difference() -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def refresh(self) -> None:
        difference = self._difference()
        if abs(difference - self._offset) > self.STEP:
            self._offset = difference

    def boot(self) -> float:
        """The Unix time of the boot, in seconds; may be some older than `refresh`."""
        return self._offset

    def unix(self, boottime_ns: int) -> float:
        return boottime_ns / 1e9 + self._offset


class Classifier:
    """The classifier in the kernel; make one with `open`."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._maps = hold.maps
        self._clock = _Clock()
        self._ring = RingBuffer(hold.maps[HELLOS]) if HELLOS in hold.maps else None
        self._table = EdgeTable(hold.maps)
        self._flows = FlowMap(hold.maps)

    @classmethod
    def open(
        cls, pin_dir: Path, object_path: Path = PACKAGED_OBJECT, *, by: tuple[By, ...] = BEST
    ) -> "Classifier":
        """Takes over what a former agent left below pin_dir, or loads and pins.

        pin_dir has to be a directory on a bpffs. Programs of another object than that of object_path are replaced
        where they are attached, without a gap; where its maps have another layout, everything begins anew. `by` is
        what may hold the programs on interfaces. A KernelError says why the kernel refused the programs.
        """
        classifier = cls(Pinned.open(pin_dir / "classifier", object_path, by))
        classifier._forget_lost_interfaces()
        return classifier

    @classmethod
    def private(
        cls,
        *,
        report: bool,
        flows: int | None = None,
        object_path: Path = PACKAGED_OBJECT,
        by: tuple[By, ...] = BEST,
    ) -> "Classifier":
        """A classifier of this process alone, which is gone when it is closed, or when the process ends.

        With `report` the programs send the bytes of each ClientHello (`hellos`). `flows` is how many connections the
        flow map holds, where that should not be as many as it holds for a node. Filters of clsact, where there is no
        tcx, go with `close`; those of a process that was killed, with the next classifier that is opened.
        """
        return cls(Private(object_path, by, report=report, flows=flows))

    @property
    def programs(self) -> tuple[Program, Program]:
        """What packets are given to that pass no interface: one for those from the pod, one for those to it."""
        return self._hold.programs

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how observation began and what it met, a sentence each."""
        return self._hold.notes

    @property
    def generation(self) -> str:
        """Identity of the edge map: its counts began at 0 when this became what it is."""
        return f"{_BOOT_ID.read_text().strip()} {self._maps['edges'].id}"

    @property
    def room(self) -> int:
        """How many edges can be counted at once."""
        return self._maps["edges"].max_entries

    def set_profile(self, profile: MeshProfile, workload_key: int | None = None) -> None:
        """How the mesh is recognised from now on, by flows that are not decided yet.

        For one workload, which has to be attached, or for all that have no profile of their own.
        """
        number = _COMMON_PROFILE if workload_key is None else self._own_profile(workload_key)
        self._maps["profiles"].update(_u32(number), _profile_value(profile))

    def _own_profile(self, workload_key: int) -> int:
        """The number of a workload's profile, given to its attachments if they have none."""
        entries = self._entries()
        own = [(interface, entry) for interface, entry in entries if entry.workload == workload_key]
        if not own:
            raise KernelError(f"workload {workload_key:016x} is not attached", errno.ENOENT)
        taken = {entry.profile for _, entry in entries}
        number: int = max(entry.profile for _, entry in own) or next(
            free for free in itertools.count(_COMMON_PROFILE + 1) if free not in taken
        )
        for interface, entry in own:
            if entry.profile != number:
                entry.profile = number
                self._maps["attachments"].update(bytes(interface), bytes(entry))
        return number

    def attach(
        self,
        workload_key: int,
        ifindex: int,
        side: Side,
        service_ports: tuple[int, ...],
    ) -> Attachment:
        """Observes an interface from now on, or goes on observing it: then only the ports change.

        The calling thread has to be in the interface's network namespace. service_ports (at most 16) tell the
        direction of connections that were open before.
        """
        if len(service_ports) > abi.SERVICE_PORTS:
            raise InputError(
                f"{len(service_ports)} service ports", expected=f"at most {abi.SERVICE_PORTS}"
            )
        interface = abi.Interface(scope=scope_here(), ifindex=ifindex)
        known = self._attachment(interface)
        entry = abi.Attachment(
            workload=workload_key,
            side=_SIDES.index(side),
            port_count=len(service_ports),
            ports=service_ports,
        )
        if (
            known is not None
            and known.workload == workload_key
            and known.attached_at
            and self._hold.is_attached(interface)
        ):
            entry.attached_at = known.attached_at
            entry.profile = known.profile
            self._maps["attachments"].update(bytes(interface), bytes(entry))
            return self._record(interface, entry)
        self._detach(interface)
        # Attached from the moment that both programs are: until then the entry says 0, also after a crash.
        self._maps["attachments"].update(bytes(interface), bytes(entry))
        try:
            self._hold.attach(interface, _WAYS[side])
        except KernelError:
            self._detach(interface)
            raise
        entry.attached_at = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._maps["attachments"].update(bytes(interface), bytes(entry))
        return self._record(interface, entry)

    def attachments(self) -> list[Attachment]:
        """What is being observed: interfaces that are there and have both programs."""
        self._clock.refresh()
        return [
            self._record(interface, entry)
            for interface, entry in self._entries()
            if entry.attached_at and self._hold.is_attached(interface)
        ]

    def detach(self, workload_key: int) -> None:
        """Stops observing every interface of a workload. Its edges stay until they are forgotten."""
        self._detach_all(workload_key, None)

    def detach_others(self, workload_key: int, ifindex: int) -> None:
        """Stops observing what other interfaces a workload has than this one of the calling thread's namespace."""
        self._detach_all(workload_key, (scope_here(), ifindex))

    def _detach_all(self, workload_key: int, but: tuple[int, int] | None) -> None:
        for interface, entry in self._entries():
            if entry.workload == workload_key and (interface.scope, interface.ifindex) != but:
                self._detach(interface)

    def forget_edges(self, workload_key: int) -> None:
        """Removes what was counted for a workload, which should not be observed any more, and its connections.

        The last counts come with the next `changed_edges`.
        """
        self._flows.forget(workload_key)
        self._table.forget_all(lambda workload: workload == workload_key)

    def forget(self, slots: Iterable[tuple[int, int]]) -> None:
        """Gives edges back, by CountedEdge.slot and generation, so that there is room for others.

        Their last counts come with the next `changed_edges`, and their slots are free when that is called once
        more: whoever keeps the counts has kept the last ones by then. Where the generation is another one, nothing
        happens. Takes some milliseconds.
        """
        self._table.forget(slots)

    def edges(self) -> list[Edge]:
        """All edges of all workloads, also those that every connection has left: who saw one come must see it go.

        A connection is on one edge at a time. It moves when its class becomes known or changes, so all counts but
        those of final classes can go down again.
        """
        self._clock.refresh()
        return self._table.all(self._clock.boot())

    def changed_edges(self) -> list[CountedEdge]:
        """What is not as this object's last call told it; the first call tells all.

        Counts are those since the slot was taken for the edge. An edge's sum is that of its slots: the one that it
        has, and those that it had.
        """
        self._clock.refresh()
        return self._table.changed(self._clock.boot())

    def losses(self) -> Losses:
        """The counters, summed over all processors, since the maps were made."""
        counters = {}
        for counter in abi.Counter:
            raw = self._maps["counters"].lookup(_u32(counter)) or b""
            counters[counter.name.lower()] = sum(memoryview(raw).cast("Q"))
        overflow = {}
        for number, flow_class in CLASSES.items():
            raw = self._maps["overflow"].lookup(_u32(number)) or bytes(ctypes.sizeof(abi.Edge))
            connections = abi.Edge.from_buffer_copy(raw).tally[abi.Tally.CONNECTION]
            if connections > 0:
                overflow[flow_class] = connections
        return Losses(overflow=overflow, **counters)

    def flows(self) -> list[FlowRecord]:
        """The connections that the flow map holds, open and closed, for looking at."""
        self._clock.refresh()
        return [self.flow_record(value) for value in self._flows.values()]

    def flow_record(self, value: bytes) -> FlowRecord:
        """What an entry of the flow map says, a struct tg_flow."""
        flow = abi.Flow.from_buffer_copy(value)
        where = flow.key
        to_server, to_client = (
            flow.tally[role] & ((1 << abi.Place.SHIFT) - 1)
            for role in (abi.Role.CLIENT, abi.Role.SERVER)
        )
        return FlowRecord(
            key=key_of(value),
            interface=(where.interface.scope, where.interface.ifindex),
            workload=flow.workload,
            direction=DIRECTIONS[flow.direction],
            local=address(bytes(where.local)),
            local_port=where.ports >> 16,
            peer=address(bytes(where.peer)),
            peer_port=where.ports & 0xFFFF,
            flow_class=CLASSES[flow.verdict & abi.Verdict.CLASS],
            settled=bool(flow.verdict & abi.Verdict.SETTLED),
            decided=bool(flow.verdict & (abi.Verdict.SETTLED | abi.Verdict.DECIDED)),
            flags=abi.FlowFlag(flow.flags),
            hint=HINTS.get(flow.hint),
            bytes_to_server=to_server,
            bytes_to_client=to_client,
            segments=flow.segments,
            opened=self._clock.unix(flow.opened),
            opened_ns=flow.opened,
        )

    def take_flow(self, key: bytes) -> bytes | None:
        """Takes a connection out of the flow map: its struct tg_flow, None where there is none."""
        return self._flows.take(key)

    def put_flow(self, value: bytes) -> None:
        """Puts back what take_flow gave."""
        self._flows.put(value)

    def enter(
        self, workload_key: int, interface: tuple[int, int], service_ports: tuple[int, ...]
    ) -> None:
        """Says whose an interface (scope, ifindex) is, without attaching anything: for packets of a test run."""
        scope, ifindex = interface
        entry = abi.Attachment(
            workload=workload_key,
            attached_at=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            port_count=len(service_ports),
            ports=service_ports,
        )
        self._maps["attachments"].update(bytes(abi.Interface(scope, ifindex)), bytes(entry))

    def hellos(self) -> list[HelloChunk]:
        """Parts of ClientHellos that were seen since the last time, in the order in which they passed.

        4096 at most; the others next time. None where the programs do not report.
        """
        if self._ring is None:
            return []
        return [_chunk(entry) for entry in self._ring.drain()]

    def close(self) -> None:
        """Lets go of the kernel objects; everything pinned stays and goes on counting."""
        self._close_ring()
        self._hold.close()

    def remove(self) -> None:
        """Takes everything out of the kernel: programs, links, maps and all that was counted."""
        self._close_ring()
        self._hold.remove()

    def _close_ring(self) -> None:
        if self._ring is not None:
            self._ring.close()

    def _detach(self, interface: abi.Interface) -> None:
        self._hold.detach(interface)
        self._maps["attachments"].delete(bytes(interface))

    def _attachment(self, interface: abi.Interface) -> abi.Attachment | None:
        raw = self._maps["attachments"].lookup(bytes(interface))
        return None if raw is None else abi.Attachment.from_buffer_copy(raw)

    def _entries(self) -> list[tuple[abi.Interface, abi.Attachment]]:
        return [
            (abi.Interface.from_buffer_copy(key), abi.Attachment.from_buffer_copy(value))
            for key, value in self._maps["attachments"].items()
        ]

    def _record(self, interface: abi.Interface, entry: abi.Attachment) -> Attachment:
        return Attachment(
            workload_key=entry.workload,
            ifindex=interface.ifindex,
            side=_SIDES[entry.side],
            attached_at=self._clock.unix(entry.attached_at),
            scope=interface.scope,
        )

    def _forget_lost_interfaces(self) -> None:
        """Interfaces that went away while no agent looked."""
        known = [interface for interface, _ in self._entries()]
        for interface in known:
            if not self._hold.is_attached(interface):
                self._detach(interface)
        self._hold.detach_all_but(known)


def _chunk(entry: bytes) -> HelloChunk:
    head = abi.HelloChunk.from_buffer_copy(entry.ljust(ctypes.sizeof(abi.HelloChunk), b"\0"))
    begin = abi.HelloChunk.bytes.offset
    return HelloChunk(
        key=bytes(head.key),
        opened_ns=head.opened,
        position=head.position,
        bytes=entry[begin : begin + head.length],
    )


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _profile_value(profile: MeshProfile) -> bytes:
    value = abi.Profile(
        suffix_count=len(profile.sni_suffixes),
        alpn_count=len(profile.alpn),
        port_count=len(profile.proxy_ports),
    )
    for count, most, field in (
        (value.suffix_count, abi.NAMES, "sni_suffixes"),
        (value.alpn_count, abi.NAMES, "alpn"),
        (value.port_count, abi.PROXY_PORTS, "proxy_ports"),
    ):
        if count > most:
            raise InputError(
                f"{count} {'ports' if field == 'proxy_ports' else 'names'}",
                source=f"profile {profile.name}",
                field=field,
                expected=f"at most {most}",
            )
    suffixes = ["." + suffix.lower().strip(".") for suffix in profile.sni_suffixes]
    for texts, names, field in (
        (value.suffixes, suffixes, "sni_suffixes"),
        (value.alpns, list(profile.alpn), "alpn"),
    ):
        for text, name in zip(texts, names, strict=False):
            _set_text(text, name, profile, field)
    for port in profile.proxy_ports:
        if not 1 <= port <= 65535:
            raise InputError(
                f"{port} is no TCP port",
                source=f"profile {profile.name}",
                field="proxy_ports",
                expected="1 to 65535",
            )
    value.ports[: len(profile.proxy_ports)] = profile.proxy_ports
    return bytes(value)


def _set_text(text: abi.Text, name: str, profile: MeshProfile, field: str) -> None:
    encoded = name.encode()
    if not 1 <= len(encoded) <= abi.TEXT_BYTES:
        raise InputError(
            f"{name!r} has {len(encoded)} bytes",
            source=f"profile {profile.name}",
            field=field,
            expected=f"1 to {abi.TEXT_BYTES}",
        )
    text.length = len(encoded)
    text.bytes[: len(encoded)] = encoded
