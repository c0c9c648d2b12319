"""What a source of workloads is: it tells what it knows of each network namespace, and what it leaves alone.

Several sources may know of the same workload, each a part: Kubernetes the annotations of a pod, a CNI call the path of
its network namespace. `merge` puts together what is about one namespace. A source never decides for the node; what it
cannot find out it tells as a problem, and leaves what it knew as it was.
"""

import enum
from typing import Protocol

import msgspec

from tidegate.model import ServicePort, Sidecar


class Origin(enum.StrEnum):
    """The kinds of sources. Where two know the same thing of a workload, the one that stands first here is believed."""

    FILES = "files"
    KUBERNETES = "kubernetes"
    PROCESSES = "processes"
    CNI = "cni"


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What one source knows of the workload in one network namespace; None is what it does not know.

    Fields are those of model.Workload.
    """

    origin: Origin
    netns: str
    id: str
    """Unique over all nodes and times: the pod's UID where there is one."""
    name: str | None = None
    service: str | None = None
    namespace: str | None = None
    interface: str | None = None
    port: int | None = None
    more_ports: tuple[ServicePort, ...] | None = None
    addresses: tuple[str, ...] | None = None
    meshed: bool | None = None
    sidecar: Sidecar | None = None
    reason: str | None = None
    annotations: dict[str, str] | None = None
    namespace_annotations: dict[str, str] | None = None
    created_at: float | None = None


class Treatment(enum.StrEnum):
    """Why a workload that a source knows is not looked after by this node's agent."""

    HOST_NETWORK = "host-network"
    """It shares the node's network namespace, which is nobody's own."""
    FINISHED = "finished"
    """All its containers have ended for good."""
    EXCLUDED = "excluded"
    """By configuration: its namespace, or tidegate's own."""
    NOT_FOUND = "not-found"
    """It runs, and its network namespace was not found: that is a problem, not a choice."""


class LeftAlone(msgspec.Struct, frozen=True, kw_only=True):
    """A workload that a source knows and that is not looked after."""

    origin: Origin
    id: str
    name: str
    namespace: str
    treatment: Treatment
    reason: str
    """One sentence for a person."""


class WatchState(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with a source that is followed over the network."""

    is_connected: bool
    answered_at: float
    """When it last said anything; 0: never since this agent runs."""
    failures: int
    """How often asking has failed since this agent runs."""
    pods: int
    """How many of this node it has told of."""


class Source(Protocol):
    """Where workloads come from. Methods are called from one thread, which they do not block for long."""

    def list(self) -> tuple[Description, ...]:
        """All workloads of this node that the source knows, as it understands them at the moment."""

    def left_alone(self) -> tuple[LeftAlone, ...]:
        """What it knows and does not list, as of the latest `list`."""

    def problems(self) -> tuple[str, ...]:
        """One sentence for each thing that the latest `list` could not find out."""

    @property
    def is_complete(self) -> bool:
        """Whether a workload that the latest `list` does not have is gone; False while the source cannot see all."""
