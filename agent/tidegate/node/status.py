"""What the agent says of its node's workloads: the answer of GET /v1/status, which its metrics are made from too."""

import enum

import msgspec

from tidegate.enforce.sidecar.closed import ClosedDestination
from tidegate.intent.policy import Policy
from tidegate.model import Sidecar
from tidegate.node.config import Profile
from tidegate.workloads.source import LeftAlone


class RedirectState(enum.StrEnum):
    """How a workload's redirection is, for a person who asks whether all is well."""

    OK = "ok"
    """The rules are in force, as the policy says."""
    DRIFTED = "drifted"
    """They were in force, and somebody changed something there that has not been put right yet."""
    BLOCKED = "blocked"
    """The rules could not be applied, and by configuration nothing passes until they can."""
    NONE = "none"
    """It is not in the mesh, and is not redirected."""
    WAITING = "waiting"
    """It is to be redirected as soon as its sidecar listens."""
    FAILED = "failed"
    """The rules could not be applied, or not all of them taken away; traffic goes as it goes with what is there."""


class WorkloadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One workload."""

    id: str
    name: str
    namespace: str
    service: str
    wanted_in_mesh: bool
    meshed: bool
    netns: str
    annotations: dict[str, str]
    namespace_annotations: dict[str, str]
    policy: Policy | None
    """What is redirected when it is meshed: the latest policy that had no fault."""
    redirect: RedirectState
    repairs: int
    """How often somebody changed the redirection and it was repaired, since this agent runs."""
    last_repair: str
    """What was different then."""
    notes: tuple[str, ...]
    """What goes around the sidecar although the redirection is as it should be."""
    sidecar: Sidecar
    """Whose sidecar it is redirected to when it is in the mesh."""
    state: str
    """Of the sidecar that the agent runs; empty while there is none."""
    pid: int
    restarts: int
    last_exit: str
    mode: str
    observed_since: float
    """0 while it is not observed."""
    closed: tuple[ClosedDestination, ...]
    """What the application tried to reach outside the mesh while only mesh destinations were open to it."""
    reason: str
    """Why it is in the mesh or not, as its source knows it."""
    problem: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /v1/status."""

    node: str
    trust_domain: str
    profile: Profile = Profile.CONSUL
    """How TLS of the mesh is recognised here."""
    round_at: float
    """When the last round was completed; 0 before the first."""
    workloads: tuple[WorkloadStatus, ...]
    left_alone: tuple[LeftAlone, ...]
    """What runs on this node and is not looked after, and why."""
    problems: tuple[str, ...]
