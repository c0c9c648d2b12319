"""Which class the flow of a traced connection has: by a classifier of the trace's own, gone with it.

It sees the interfaces of chosen network namespaces, loopback aside: what a sidecar is given in its own namespace never
passes them.
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tidegate.kernel import netns
from tidegate.kernel.errors import KernelError
from tidegate.model import FlowClass
from tidegate.observe.classifier import Classifier, MeshProfile, Side
from tidegate.observe.trace.records import Connection, End, Endpoint, Whereabouts

MOST_INTERFACES = 64
"""Interfaces that one trace observes."""
FLOWS = 16384
"""Flows that its classifier remembers."""

_LOOPBACK = "lo"
_UNDECIDED = (FlowClass.EMPTY, FlowClass.UNKNOWN)
_Wire = tuple[int, Endpoint, Endpoint]
"""Number of the network namespace, its end of the connection, the other end."""


class Seen(NamedTuple):
    """What the wire shows of a connection."""

    flow_class: FlowClass
    decided: bool
    """Whether payload has shown the class: it may change still where a protocol goes over to TLS."""


class Classes:
    """The classes of the flows in some network namespaces; make one with `observing`."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._flows: dict[_Wire, Seen] = {}
        self.notes: list[str] = []
        """What is not observed, one sentence each."""

    def attach(self, paths: Mapping[int, str]) -> None:
        """Observes every interface of these namespaces, but loopback."""
        left = MOST_INTERFACES
        for number, path in paths.items():
            names = [name for name in netns.run_in(path, _interfaces) if name != _LOOPBACK]
            for name in names[:left]:
                netns.run_in(path, self._attach, number, name)
            if len(names) > left:
                self.notes.append(
                    f"classes are told of {MOST_INTERFACES} interfaces at most: not of {names[left]} in {path}"
                )
            left = max(left - len(names), 0)

    def _attach(self, number: int, name: str) -> None:
        try:
            self._classifier.attach(number, socket.if_nametoindex(name), Side.INSIDE, ())
        except (KernelError, OSError) as error:
            self.notes.append(f"classes of connections by {name} cannot be told: {error}")

    def refresh(self) -> None:
        """Reads the flows anew."""
        self._flows = {
            (
                flow.workload,
                Endpoint(flow.local, flow.local_port),
                Endpoint(flow.peer, flow.peer_port),
            ): Seen(flow.flow_class, flow.settled or flow.flow_class not in _UNDECIDED)
            for flow in self._classifier.flows()
        }

    def of(self, connection: Connection, whereabouts: Whereabouts) -> Seen | None:
        """The class of a connection as of the last refresh; None when no flow was seen."""
        match connection.end:
            case End.CONNECT:
                ends = connection.local, whereabouts.went or connection.peer
            case End.ACCEPT:
                ends = whereabouts.dialled, connection.peer
        return self._flows.get((connection.netns, *ends))


@contextlib.contextmanager
def observing(paths: Mapping[int, str], profile: MeshProfile) -> Iterator[Classes]:
    """Classes of the connections of network namespaces, by inode number and path, as long as the context.

    KernelError when the kernel refuses the classifier.
    """
    with contextlib.closing(Classifier.private(report=False, flows=FLOWS)) as classifier:
        classifier.set_profile(profile)
        classes = Classes(classifier)
        classes.attach(paths)
        yield classes


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]
