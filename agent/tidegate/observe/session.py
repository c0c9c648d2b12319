"""Watches one interface with a classifier of its own, for a person who asks. Does what `tidegate observe` shows.

Needs no agent and leaves nothing: programs and maps are gone with the watch. Also keeps the flows that the flow map
had to give up, up to a number; what came and went between two polls is only in the edges' sums, and counted as not
listed.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator

import msgspec

from tidegate.errors import InputError, nearest
from tidegate.kernel import links, netns, routes, sockets
from tidegate.kernel.errors import KernelError
from tidegate.observe.classifier import Attachment, Classifier, FlowRecord, MeshProfile, Side
from tidegate.observe.hellos import FlowId, HelloBook
from tidegate.observe.report import Report, report

LISTED_MAX = 150_000
"""Flows that are told one by one, the latest; more than the flow map holds."""
USUAL_INTERFACE = "eth0"

_WORKLOAD = 1
_LOOPBACK = "lo"
_SERVICE_PORTS = 16
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses that are nobody's (RFC 5737, RFC 3849): what leads there is the default route."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """An interface of a network namespace."""

    netns: str
    """Its path; netns.CURRENT for the caller's own."""
    interface: str


def choose(netns_path: str, interface: str | None) -> Place:
    """The interface that was named, or else the one that is probably meant.

    That is eth0, the one of the default route, or the only one. InputError when there is none of that name, or no
    telling.
    """
    there = netns.run_in(netns_path, _interfaces)
    if interface is None:
        candidates = (USUAL_INTERFACE, *_default_routes(netns_path), *_only(there))
        interface = next((name for name in candidates if name in there), None)
        if interface is None:
            problem = "it cannot be told which interface is meant"
            raise InputError(problem, field="--interface", expected=f"one of {', '.join(there)}")
    elif interface not in there:
        problem = f"there is no interface {interface!r}"
        raise InputError(problem, field="--interface", expected=nearest(interface, there))
    return Place(netns=netns_path, interface=interface)


def _default_routes(netns_path: str) -> list[str]:
    """The interfaces that lead to everywhere else, IPv4's first."""
    found = (routes.outgoing_interface(netns_path, address) for address in _ELSEWHERE)
    return [name for name in found if name is not None]


def _only(there: list[str]) -> list[str]:
    """The only interface besides the loopback, or the loopback where that is the only one."""
    others = [name for name in there if name != _LOOPBACK] or there
    return others if len(others) == 1 else []


class Watch:
    """An interface that is being observed; make one with `watching`."""

    def __init__(self, classifier: Classifier, place: Place, attached: Attachment) -> None:
        self.place = place
        self.attached = attached
        self._classifier = classifier
        self._hellos = HelloBook(LISTED_MAX)
        self._records: dict[FlowId, FlowRecord] = {}
        self._notes: tuple[str, ...] = ()

    def fetch_hellos(self) -> None:
        """Makes room in the ring buffer. Costs next to nothing where there is nothing in it."""
        self._hellos.take(self._classifier.hellos())

    def is_there(self) -> bool:
        """Whether the interface still is, with the programs on it."""
        return any(each == self.attached for each in self._classifier.attachments())

    def keep_flows(self) -> None:
        """Reads the flow map, which gives up its oldest flows for new ones. Costs some microseconds a flow."""
        for record in self._classifier.flows():
            flow = (record.key, record.opened_ns)
            self._records.pop(flow, None)
            self._records[flow] = record
        while len(self._records) > LISTED_MAX:
            del self._records[next(iter(self._records))]

    def report(self) -> Report:
        """What was seen so far."""
        # Edges first: a connection that opens between the two readings is listed, and not in the sums.
        edges, losses = self._classifier.edges(), self._classifier.losses()
        self.fetch_hellos()
        self.keep_flows()
        return report(
            records=sorted(self._records.values(), key=lambda record: record.opened_ns),
            hellos=self._hellos,
            edges=edges,
            losses=losses,
            notes=(*self._classifier.notes, *self._notes),
        )

    def finish(self) -> Report:
        """Takes the programs off, and tells everything that was seen."""
        if not self.is_there():
            self._notes = (f"the interface {self.place.interface} has gone while it was watched",)
        self._classifier.detach(_WORKLOAD)
        return self.report()


@contextlib.contextmanager
def watching(place: Place, profile: MeshProfile) -> Iterator[Watch]:
    """Observes an interface as long as the context. KernelError when the kernel refuses, or the interface is gone."""
    with contextlib.closing(Classifier.private(report=True)) as classifier:
        classifier.set_profile(profile)
        yield Watch(classifier, place, _attach(classifier, place))


def _attach(classifier: Classifier, place: Place) -> Attachment:
    """On the host's end of a veth where the caller has that, else on the interface itself."""
    ports = netns.run_in(place.netns, _service_ports)
    ifindex = _host_end(place)
    if ifindex is not None:
        return classifier.attach(_WORKLOAD, ifindex, Side.HOST, ports)

    def attach_inside() -> Attachment:
        try:
            own = socket.if_nametoindex(place.interface)
        except OSError as error:
            raise KernelError(
                f"the interface {place.interface} has gone", error.errno or errno.ENODEV
            ) from error
        return classifier.attach(_WORKLOAD, own, Side.INSIDE, ports)

    return netns.run_in(place.netns, attach_inside)


def _host_end(place: Place) -> int | None:
    """The index, in the caller's namespace, of the other end of a veth of another namespace."""
    if netns.identity(place.netns) == netns.identity(netns.CURRENT):
        return None
    return links.host_ifindex(place.netns, place.interface)


def _service_ports() -> tuple[int, ...]:
    """The lowest ports that are listened on: they tell the direction of connections that are open already."""
    return tuple(sorted({listener.port for listener in sockets.listeners()})[:_SERVICE_PORTS])


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
