"""The classifier: nanoseconds per packet, and what it takes from the traffic of a veth pair.

Packets are run through the classifier's own code by BPF_PROG_TEST_RUN. Each repetition sees another packet
(steps.bpf.c); what making it another one takes is measured beside it and taken off.
"""

import contextlib
import ctypes
import functools
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import veth
from tests.bench.measure import Alternative, Bound, Limit, Measurement, Unit, interleaved
from tests.bench.site import Site
from tests.kernel.packets import (
    DESTINATION,
    HOP_BY_HOP,
    IPV4,
    IPV6,
    ROUTING,
    Network,
    Packet,
    Talk,
    hello,
    ip,
    ipv6,
    with_extension,
)

from tidegate.errors import TidegateError
from tidegate.kernel.bpf import Map
from tidegate.kernel.bpf_object import Object
from tidegate.observe import abi
from tidegate.observe.flow_map import FlowMap

PART = "flows"

_REPETITIONS = 20_000
_OPENED = 5_000
"""Fewer than the flow map holds, or the oldest would be gone before their first bytes come."""
_ROUNDS = 25

_NAMES = ("nothing", "only_find", "only_add", "only_step", "step_and_observe", "from_pod")
_SOURCES = Path(__file__).parents[2] / "bpf"
_PROGRAMS = Path(__file__).parent / "steps.bpf.c"
_SLOTS = 1000
"""More edges than these packets make."""
_LOOPBACK = 1
"""The interface that BPF_PROG_TEST_RUN says a packet is on."""
_WORKLOAD = 0x7E57

_ETHERNET, _TCP_HEADER = 14, 20
_SEQUENCE = 4
"""Offset in struct tcphdr."""
_SOURCE_ENDS = {4: 16, 6: 24}
"""Where the source address ends in the IP header of each version."""

_SUFFIX = ".internal.bench.consul"
_PAYLOAD = b"x" * 1000
_HTTP = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
_MESH = hello(f"api.default.dc1{_SUFFIX}")
_POST_QUANTUM = with_extension(_MESH, 0xFE00, bytes(1700))

_OPTIONS = b"\0" + bytes(6)
"""A hop-by-hop, routing or destination header of eight bytes, without its first one."""
_EXTENSIONS = ((HOP_BY_HOP, _OPTIONS), (ROUTING, _OPTIONS), (DESTINATION, _OPTIONS))


def measure(site: Site) -> Iterator[Measurement]:
    """All measurements of this part."""
    compiled = _compile(site.directory)
    yield _classified(compiled)
    yield _beginnings(compiled)
    with Object.open(compiled) as opened:
        opened.load()
        with opened.program("nothing") as nothing:
            yield from veth.measure(PART, site, nothing)


def not_measured() -> tuple[str, ...]:
    """What this machine does not allow to be measured."""
    return veth.not_measured()


class _Steps:
    """The programs with maps of their own, loaded for one field that counts up.

    The field is 32 bits at the offset `at` of the packet, and counts by `by`.
    """

    def __init__(self, compiled: Path, at: int, by: int) -> None:
        self._at, self._by = at, by
        with contextlib.ExitStack() as handles, Object.open(compiled) as opened:
            opened.set_constants(step_at=at, step_by=by)
            opened.load()
            self._programs = {name: handles.enter_context(opened.program(name)) for name in _NAMES}
            self._edges = handles.enter_context(opened.map("edges"))
            names = ("attachments", "profiles", "flows", "flow_seed")
            with contextlib.ExitStack() as opening:
                maps = {name: opening.enter_context(opened.map(name)) for name in names}
                _attach(maps["attachments"])
                _set_profile(maps["profiles"])
                FlowMap(maps)
                maps["flows"].update(bytes(8), bytes(ctypes.sizeof(abi.Flow)))
            self._handles = handles.pop_all()

    def close(self) -> None:
        """Lets the programs go."""
        self._handles.close()

    def same(self, packet: Packet, program: str = "from_pod") -> float:
        """Nanoseconds per packet, which is the same again and again."""
        return self._run(program, packet.frame, _REPETITIONS)

    def play(self, packet: Packet, first: int, repetitions: int) -> float:
        """Nanoseconds per packet, stepping included; the field counts up from `first`."""
        frame = self._before(packet, first)
        return self._run("step_and_observe", frame, repetitions)

    def next(self, packet: Packet, first: int, repetitions: int) -> float:
        """Nanoseconds per packet, as if the packets had come by themselves."""
        frame = self._before(packet, first)
        stepped = self._run("only_step", frame, repetitions)
        nothing = self._run("nothing", frame, repetitions)
        return self.play(packet, first, repetitions) - stepped + nothing

    def counted(self, flow_class: abi.Class) -> tuple[int, int]:
        """Connections and bytes to the server of a class."""
        connections = to_server = 0
        for slot in range(_SLOTS):
            edge = abi.Edge.from_buffer_copy(
                self._edges.lookup(slot.to_bytes(4, sys.byteorder)) or b""
            )
            if edge.state == abi.EdgeState.LIVE and edge.key.flow_class == flow_class:
                connections += edge.tally[abi.Tally.CONNECTION]
                to_server += edge.tally[abi.Role.CLIENT]
        return connections, to_server

    def _run(self, program: str, frame: bytes, repetitions: int) -> float:
        return self._programs[program].test_run(frame, repetitions).duration_ns

    def _before(self, packet: Packet, first: int) -> bytes:
        frame = bytearray(packet.frame)
        struct.pack_into("!I", frame, self._at, (first - self._by) & 0xFFFFFFFF)
        return bytes(frame)


class _Stream:
    """A connection whose class is known, and which goes on sending."""

    def __init__(self, compiled: Path, talk: Talk) -> None:
        self._packet = talk.up(len(_HTTP), _PAYLOAD)
        tcp = len(self._packet.frame) - len(_PAYLOAD) - _TCP_HEADER
        self.steps = _Steps(compiled, tcp + _SEQUENCE, len(_PAYLOAD))
        self._next = talk.client_isn + 1 + len(_HTTP)
        self._sent = len(_HTTP)
        for packet in (talk.syn(), talk.up(0, _HTTP)):
            self.steps.same(packet)

    def sample(self) -> float:
        """Nanoseconds per packet with payload that was not there before."""
        took = self.steps.next(self._packet, self._next, _REPETITIONS)
        self._next += _REPETITIONS * len(_PAYLOAD)
        self._sent += _REPETITIONS * len(_PAYLOAD)
        counted = self.steps.counted(abi.Class.PLAINTEXT)
        assert counted == (1, self._sent), (counted, self._sent)
        return took


class _Openings:
    """Connections that are opened, each by another client."""

    def __init__(self, compiled: Path, talk: Talk) -> None:
        self._talk = talk
        packet = talk.syn()
        at = _ETHERNET + _SOURCE_ENDS[packet.frame[_ETHERNET] >> 4] - 4
        self._client: int = struct.unpack_from("!I", packet.frame, at)[0]
        self.steps = _Steps(compiled, at, 1)

    def syn(self) -> float:
        """Nanoseconds per SYN."""
        first = self._advance(_REPETITIONS)
        return self.steps.next(self._talk.syn(), first, _REPETITIONS)

    def first_bytes(self, data: bytes, flow_class: abi.Class) -> float:
        """Nanoseconds per packet that brings a connection's first bytes, all in one."""
        first = self._advance(_OPENED)
        self.steps.play(self._talk.syn(), first, _OPENED)
        before, _ = self.steps.counted(flow_class)
        took = self.steps.next(self._talk.up(0, data), first, _OPENED)
        after, _ = self.steps.counted(flow_class)
        assert after - before == _OPENED, f"{after - before} of {_OPENED} became {flow_class.name}"
        return took

    def _advance(self, clients: int) -> int:
        first = self._client
        self._client += clients
        return first


def _compile(directory: Path) -> Path:
    """The programs, made by the classifier's own Makefile."""
    compiled = directory / "steps.bpf.o"
    command = ["make", "--no-print-directory", "-C", str(_SOURCES)]
    variables = [f"OUT={directory}", f"VPATH={_PROGRAMS.parent}"]
    done = subprocess.run(
        [*command, *variables, str(compiled)], text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise TidegateError(f"{_PROGRAMS.name} does not compile: {done.stderr.strip()}")
    return compiled


def _attach(attachments: Map) -> None:
    entry = abi.Attachment(workload=_WORKLOAD, attached_at=1)
    attachments.update(bytes(abi.Interface(0, _LOOPBACK)), bytes(entry))


def _set_profile(profiles: Map) -> None:
    profile = abi.Profile(suffix_count=1)
    profile.suffixes[0].length = len(_SUFFIX)
    profile.suffixes[0].bytes[: len(_SUFFIX)] = _SUFFIX.encode()
    profiles.update((0).to_bytes(4, sys.byteorder), bytes(profile))


def _talk(addresses: tuple[str, str], network: Network = ip) -> Talk:
    client, server = addresses
    return Talk(client=(client, 40_000), server=(server, 8443), network=network)


def _classified(compiled: Path) -> Measurement:
    """Packets of a connection that its first bytes showed to be plaintext."""
    extended = functools.partial(ipv6, extensions=_EXTENSIONS)
    with contextlib.ExitStack() as stack:
        four, six, extensions = (
            _Stream(compiled, talk) for talk in (_talk(IPV4), _talk(IPV6), _talk(IPV6, extended))
        )
        for stream in (four, six, extensions):
            stack.callback(stream.steps.close)
        acknowledgement = _talk(IPV4).up(len(_HTTP), b"")

        def same(program: str) -> Callable[[], float]:
            return functools.partial(four.steps.same, acknowledgement, program)

        limit, with_extensions = (Limit(Bound.MEDIAN_AT_MOST, ns) for ns in (60, 100))
        return interleaved(
            PART,
            "packet of a classified flow, by program test run",
            Unit.NANOSECONDS,
            _ROUNDS,
            [
                Alternative("an empty program", same("nothing")),
                Alternative("one look-up in the flow map", same("only_find")),
                Alternative("one atomic addition", same("only_add")),
                Alternative("bare ACK, IPv4", same("from_pod"), limit),
                Alternative("payload, IPv4", four.sample, limit),
                Alternative("payload, IPv6", six.sample),
                Alternative(
                    f"payload, IPv6, {len(_EXTENSIONS)} extension headers",
                    extensions.sample,
                    with_extensions,
                ),
            ],
        )


def _beginnings(compiled: Path) -> Measurement:
    """Packets that begin a connection or decide its class."""
    with contextlib.ExitStack() as stack:
        four, six = (_Openings(compiled, _talk(addresses)) for addresses in (IPV4, IPV6))
        for openings in (four, six):
            stack.callback(openings.steps.close)

        def first(data: bytes, flow_class: abi.Class) -> Callable[[], float]:
            return functools.partial(four.first_bytes, data, flow_class)

        return interleaved(
            PART,
            "packet that begins a flow, by program test run",
            Unit.NANOSECONDS,
            _ROUNDS,
            [
                Alternative("SYN of a new flow, IPv4", four.syn),
                Alternative("SYN of a new flow, IPv6", six.syn),
                Alternative("first bytes, plaintext", first(_HTTP, abi.Class.PLAINTEXT)),
                Alternative(f"ClientHello of {len(_MESH)} bytes", first(_MESH, abi.Class.MESH)),
                Alternative(
                    f"ClientHello of {len(_POST_QUANTUM)} bytes",
                    first(_POST_QUANTUM, abi.Class.MESH),
                ),
            ],
        )
