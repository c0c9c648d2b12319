"""What the classifier's tests share: a private bpffs, and a bench that plays packets to the programs."""

import itertools
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packets import Packet

from tidegate.model import Direction, Edge, FlowClass
from tidegate.observe import abi
from tidegate.observe.classifier import Classifier, FlowRecord, Losses

HOST_SCOPE = 0
LOOPBACK = 1
"""The interface that BPF_PROG_TEST_RUN says a packet is on."""

TCX_NEXT = -1

_workloads = itertools.count(1)


@contextmanager
def bpffs(directory: Path) -> Iterator[Path]:
    """A BPF file system of its own, empty when it goes."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "bpf", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


class Bench:
    """Plays packets to the programs as if they came by the interface of one workload."""

    def __init__(self, classifier: Classifier) -> None:
        self._from_pod, self._to_pod = classifier.programs
        self.classifier = classifier
        self.workload = 0
        self._losses: Losses = classifier.losses()

    def begin(self, service_ports: tuple[int, ...] = ()) -> None:
        """From now on the packets are those of a workload never seen before."""
        self.workload = next(_workloads)
        self._losses = self.classifier.losses()
        self.evict_flows()
        self.classifier.enter(self.workload, (HOST_SCOPE, LOOPBACK), service_ports)

    def play(self, packets: list[Packet], direction: Direction) -> None:
        for packet in packets:
            from_pod = packet.from_client == (direction is Direction.OUTBOUND)
            program = self._from_pod if from_pod else self._to_pod
            assert program.test_run(packet.frame).returned == TCX_NEXT

    def evict_flows(self) -> None:
        """What the LRU map does when it has no room."""
        for flow in self.classifier.flows():
            self.classifier.take_flow(flow.key)

    def edges(self) -> list[Edge]:
        """The edges that have connections or bytes."""
        return [
            edge
            for edge in self.classifier.edges()
            if edge.key.workload == self.workload
            and (edge.count.connections or edge.count.bytes_to_server or edge.count.bytes_to_client)
        ]

    def classes(self) -> dict[FlowClass, int]:
        """Connections by class; classes without any are left out."""
        classes: Counter[FlowClass] = Counter()
        for edge in self.edges():
            classes[edge.key.flow_class] += edge.count.connections
        return dict(+classes)

    def flows(self) -> list[FlowRecord]:
        return [flow for flow in self.classifier.flows() if flow.workload == self.workload]

    def counted(self) -> dict[str, int]:
        """Counters that moved since the beginning."""
        now = self.classifier.losses()
        return {
            counter.name.lower(): moved
            for counter in abi.Counter
            if (
                moved := getattr(now, counter.name.lower())
                - getattr(self._losses, counter.name.lower())
            )
        }
