"""Which workload had an address at a given time.

Addresses are reused, so a name depends on the moment: the rule is here, once, for the verdict and
for everything else that shows a flow to a person. And which services a workload has.
"""

from collections.abc import Iterable, Mapping, Sequence

from tidegate.addresses import canonical
from tidegate.model import Instance, Workload

SLACK_S = 5.0
"""A workload calls before its agent has published it, and its last packets arrive after it has
gone."""


def by_address(instances: Iterable[Instance]) -> dict[str, tuple[Instance, ...]]:
    """Every instance that ever had an address, under the canonical text of it."""
    index: dict[str, list[Instance]] = {}
    for instance in instances:
        for address in {canonical(each) for each in instance.addresses}:
            index.setdefault(address, []).append(instance)
    return {address: tuple(holders) for address, holders in index.items()}


def holder_at(holders: Sequence[Instance], when: float) -> Instance | None:
    """Who of the `holders` of one address had it at `when`: the one known nearest to that moment,
    within SLACK_S.

    Of several that are equally near, the one that got the address last.
    """
    candidates = [each for each in holders if _distance(each, when) <= SLACK_S]
    return min(
        candidates, key=lambda each: (_distance(each, when), -each.seen_from, each.id), default=None
    )


def name_at(index: Mapping[str, Sequence[Instance]], address: str, when: float) -> Instance | None:
    """The workload that had `address` at `when`, or None where the catalog knows none."""
    return holder_at(index.get(canonical(address), ()), when)


def _distance(instance: Instance, when: float) -> float:
    """Seconds between `when` and the time in which the instance was known; 0 within it."""
    if when < instance.seen_from:
        return instance.seen_from - when
    if instance.seen_until and when > instance.seen_until:
        return when - instance.seen_until
    return 0.0


def services_of(one: Instance | Workload) -> tuple[str, ...]:
    """Every service of a workload, the first one first."""
    return (one.service, *(each.service for each in one.more_ports))


def ports_of(one: Instance | Workload, service: str) -> tuple[int, ...]:
    """The ports at which a workload serves a service; none for one that only calls."""
    ports = [one.port] if one.service == service else []
    ports += [each.port for each in one.more_ports if each.service == service]
    return tuple(port for port in ports if port)
