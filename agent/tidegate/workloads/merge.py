"""One workload out of what several sources tell of it: pure.

What is told of one network namespace is about one workload, whatever paths lead there, and so is what is told under one
id. Of each thing the source that stands first in Origin and knows it is believed. A workload keeps the id and the path
that it had: sources come and go, and its ledger, its rules and its sidecar hang on them. Ids that turned out to be one
workload's are remembered for that.
"""

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import msgspec

from tidegate.model import DEFAULT_TENANT, Sidecar, Workload
from tidegate.workloads.source import Description, LeftAlone, Origin, Treatment

Place: TypeAlias = Hashable
"""What tells a network namespace from all others alive; paths only name it."""

DEFAULT_INTERFACE = "eth0"

_BELIEVED = {origin: number for number, origin in enumerate(Origin)}
_OF_PODS = (Origin.KUBERNETES, Origin.CNI)
"""Sources that tell of pods: one in the node's own namespace is not a workload of its own."""
_COMPARED = ("service", "namespace", "port", "meshed", "sidecar")
"""Of what a contradiction is told."""
_MAX_LABEL = 63
_SHOWN_ID = 12


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """All workloads of a node."""

    workloads: tuple[Workload, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    """Pods that turned out to be in the node's own namespace."""
    problems: tuple[str, ...] = ()
    """Where sources contradict each other or themselves, one sentence each."""
    aliases: dict[str, str] = {}
    """The id that a workload goes by, for each other id that a source has for it."""


def merge(
    descriptions: Iterable[Description],
    place_of: Callable[[str], Place | None],
    *,
    node: str,
    before: Mapping[str, Workload],
    aliases: Mapping[str, str],
    of_node: Collection[Place] = (),
) -> Merged:
    """Put together what sources tell.

    `place_of` says which namespace lies at a path, None for none; `before` are the workloads of the last time, by id;
    `aliases` what was remembered then; `of_node` the namespaces that are the node's own. Whose namespace is gone is not
    a workload any more, except where a file says so: what a person has written stays until it is changed.
    """
    problems: list[str] = []
    groups, left = _grouped(descriptions, place_of, aliases, of_node)
    known = {one.id: place_of(one.netns) for one in before.values()}
    chosen: dict[str, tuple[Place, list[Description]]] = {}
    remembered: dict[str, str] = {}
    for place, group in groups.items():
        believed = list(_one_of_each(group, aliases, problems))
        ids = list(dict.fromkeys(_alias(one.id, aliases) for one in believed))
        identifier = min(ids, key=lambda one: (known.get(one) != place, one not in known))
        present = chosen.get(identifier)
        if present is not None:
            believed, place = _later(identifier, present, (place, believed), problems)
        chosen[identifier] = place, believed
        for one in believed:
            if one.id != identifier:
                remembered[one.id] = identifier
    workloads = []
    for identifier, (place, group) in chosen.items():
        last = before.get(identifier)
        stays = last is not None and known[identifier] == place
        netns = last.netns if last is not None and stays else _path(group, place_of)
        workload = _workload(identifier, netns, node, group, last)
        workloads.append(workload)
        problems.extend(_contradictions(workload, group))
    return Merged(
        workloads=tuple(workloads),
        left_alone=tuple(left),
        problems=tuple(dict.fromkeys(problems)),
        aliases=remembered,
    )


def _grouped(
    descriptions: Iterable[Description],
    place_of: Callable[[str], Place | None],
    aliases: Mapping[str, str],
    of_node: Collection[Place],
) -> tuple[dict[Place, list[Description]], list[LeftAlone]]:
    """What is told, by namespace, the believed first; what is told of a namespace that is gone goes by its id."""
    ordered = sorted(
        descriptions, key=lambda one: (_BELIEVED[one.origin], -(one.created_at or 0.0))
    )
    groups: dict[Place, list[Description]] = {}
    placeless: list[Description] = []
    left: list[LeftAlone] = []
    for one in ordered:
        place = place_of(one.netns)
        if place is None and one.origin is Origin.FILES:
            place = "nothing", one.netns
        if place is None:
            placeless.append(one)
        elif one.origin in _OF_PODS and place in of_node:
            left.append(_of_node(one))
        else:
            groups.setdefault(place, []).append(one)
    owners = {_alias(one.id, aliases): group for group in groups.values() for one in group}
    for one in placeless:
        group = owners.get(_alias(one.id, aliases))
        if group is not None:
            group.append(one)
    for group in groups.values():
        group.sort(key=lambda one: _BELIEVED[one.origin])
    return groups, left


def _alias(identifier: str, aliases: Mapping[str, str]) -> str:
    return aliases.get(identifier, identifier)


def _of_node(one: Description) -> LeftAlone:
    return LeftAlone(
        origin=one.origin,
        id=one.id,
        name=one.name or one.id,
        namespace=one.namespace or DEFAULT_TENANT,
        treatment=Treatment.HOST_NETWORK,
        reason="it shares the node's network namespace",
    )


def _one_of_each(
    group: Sequence[Description], aliases: Mapping[str, str], problems: list[str]
) -> Iterator[Description]:
    """Of each source one description: two workloads of a source cannot be in one namespace."""
    first: dict[Origin, Description] = {}
    for one in group:
        present = first.setdefault(one.origin, one)
        if present is one or _alias(one.id, aliases) == _alias(present.id, aliases):
            yield one
        else:
            problems.append(
                f"{one.origin}: {_called(present)} and {_called(one)} are in one network namespace ({one.netns});"
                f" {_called(present)} is believed"
            )


def _later(
    identifier: str,
    present: tuple[Place, list[Description]],
    other: tuple[Place, list[Description]],
    problems: list[str],
) -> tuple[list[Description], Place]:
    """Which of two namespaces is the workload's that both are told to be: by the better source, then the later."""

    def rank(group: Sequence[Description]) -> tuple[int, float]:
        own = [one for one in group if one.id == identifier] or group
        return _BELIEVED[own[0].origin], -max(one.created_at or 0.0 for one in own)

    kept, left = sorted((present, other), key=lambda each: rank(each[1]))
    problems.append(
        f"{_called(kept[1][0])} is told to be in two network namespaces, {kept[1][0].netns} and {left[1][0].netns};"
        f" {kept[1][0].netns} is believed"
    )
    return kept[1], kept[0]


def _path(group: Sequence[Description], place_of: Callable[[str], Place | None]) -> str:
    """A path that will last: one of a process goes with that process."""
    there = [one.netns for one in group if place_of(one.netns) is not None]
    return min(there or [one.netns for one in group], key=lambda path: path.startswith("/proc/"))


def _workload(
    identifier: str, netns: str, node: str, group: Sequence[Description], last: Workload | None
) -> Workload:
    name = _first(group, "name") or (last.name if last else _name(identifier, netns))
    return Workload(
        id=identifier,
        name=name,
        service=_first(group, "service") or _label(name),
        node=node,
        netns=netns,
        interface=_first(group, "interface") or DEFAULT_INTERFACE,
        # The time of a pod's namespace, not of its entry in a list.
        created_at=max((one.created_at or 0.0 for one in group), default=0.0),
        **{
            field: value
            for field in (
                "namespace",
                "port",
                "more_ports",
                "addresses",
                "meshed",
                "sidecar",
                "reason",
                "annotations",
                "namespace_annotations",
            )
            if (value := _first(group, field)) is not None
        },
    )


def _first(group: Sequence[Description], field: str) -> Any:
    """What the first says that knows it."""
    return next((value for one in group if (value := getattr(one, field)) is not None), None)


def _name(identifier: str, netns: str) -> str:
    path = PurePosixPath(netns)
    return identifier[:_SHOWN_ID] if path.is_relative_to("/proc") else path.name


def _label(name: str) -> str:
    """A service's name out of a workload's."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    return label[:_MAX_LABEL].strip("-") or "workload"


def _contradictions(workload: Workload, group: Sequence[Description]) -> Iterator[str]:
    """What sources say differently. Not what a CNI call knew: that was how things were then."""
    told = [one for one in group if one.origin is not Origin.CNI]
    for field in _COMPARED:
        said = {one.origin: value for one in told if (value := getattr(one, field)) is not None}
        if len(set(said.values())) > 1:
            words = ", ".join(f"{origin} says {_shown(value)}" for origin, value in said.items())
            yield f"{workload.name}, {field}: {words}; {next(iter(said))} is believed"


def _shown(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case Sidecar():
            return value.value
        case _:
            return str(value)


def _called(one: Description) -> str:
    return one.name or one.id
