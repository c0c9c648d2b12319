"""The least intentions that what was seen needs: one for each caller of a service that no intention is about.

Two kinds, told apart: callers whose connections are mesh mTLS already, and callers that would need one once they
are in the mesh. What an intention denies is denied on purpose and is told, never undone; what is there stays, also
where it allows more than was seen. Pure: entries are made from this elsewhere.
"""

import enum
from collections.abc import Iterator

import msgspec

from tidegate.model import FlowClass
from tidegate.verdict.onboarding import (
    Downstream,
    MeshFacts,
    ServiceFacts,
    downstreams,
    listed,
)
from tidegate.verdict.permission import Permission


class Because(enum.StrEnum):
    MESH = "mesh"
    """Its mesh mTLS connections were seen."""
    ONBOARDING = "onboarding"
    """It calls without mesh mTLS; it needs the intention to use the mesh."""


class SuggestedSource(msgspec.Struct, frozen=True, kw_only=True):
    """One caller that needs an intention."""

    source: str
    """Service."""
    because: Because
    classes: tuple[FlowClass, ...]
    connections: int
    last_seen: float


class Suggestion(msgspec.Struct, frozen=True, kw_only=True):
    """What the intentions towards one service lack."""

    destination: str
    sources: tuple[SuggestedSource, ...] = ()
    denied: tuple[str, ...] = ()
    """Services that call although an intention denies it."""
    unnameable: tuple[str, ...] = ()
    """Addresses that call and that no intention can be about."""
    unseen: tuple[str, ...] = ()
    """Sources that intentions allow and that were not seen in the window."""

    def named(self, *, all_callers: bool) -> tuple[str, ...]:
        """The sources to allow: those of mesh mTLS alone, or all callers."""
        return tuple(
            one.source for one in self.sources if all_callers or one.because is Because.MESH
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know before writing it."""
        told = []
        if self.denied:
            told.append(f"an intention denies {listed(self.denied)}, and it calls all the same")
        if self.unnameable:
            told.append(f"no workload has the address {listed(self.unnameable)}, which calls")
        if self.unseen:
            told.append(f"{listed(self.unseen)} may call and was not seen in the window")
        return tuple(told)


def suggestions(facts: MeshFacts, service: str | None = None) -> tuple[Suggestion, ...]:
    """What is to be said of the intentions towards each service, or towards the one that is named."""
    found = (_suggestion(one) for one in facts.services if service in (None, one.service))
    return tuple(one for one in found if one.sources or one.remarks)


def _suggestion(service: ServiceFacts) -> Suggestion:
    using = tuple(one for one in downstreams(service) if not one.passes_by)
    seen = {one.service for one in using}
    return Suggestion(
        destination=service.service,
        sources=tuple(_sources(service, using)),
        denied=tuple(one.service for one in using if one.permission is Permission.DENIED),
        unnameable=tuple(one.name for one in using if not one.service),
        unseen=tuple(
            rule.source
            for rule in service.intent.intentions
            if rule.allow and "*" not in rule.source and rule.source not in seen
        ),
    )


def _sources(service: ServiceFacts, using: tuple[Downstream, ...]) -> Iterator[SuggestedSource]:
    for one in using:
        lacks = one.permission in (Permission.MISSING, Permission.BY_DEFAULT)
        if one.service and lacks and one.service != service.service:
            yield SuggestedSource(
                source=one.service,
                because=Because.MESH if one.uses_mesh else Because.ONBOARDING,
                classes=one.classes,
                connections=one.connections,
                last_seen=one.last_seen,
            )
