"""Which counters of the kernel can be given back: a decision about edges, pure.

The kernel has a fixed number of counters and gives none back by itself. Nothing is lost by giving one back: an edge
that comes into use again is counted by another.
"""

from collections.abc import Iterable

from tidegate.observe.counting import Counter

IDLE_S = 600.0
"""How long an edge has to be out of use for its counter to go."""

HURRIED_IDLE_S = 5.0
"""The same where a workload has more than its share."""

_FULL = 3 / 4
"""Of all counters: with more in use, shares count."""


def dispensable(counters: Iterable[Counter], now: float, room: int) -> list[tuple[int, int]]:
    """Slot and generation of those that can go, of `room` counters that there are.

    While most counters are in use, every workload has an equal share of them: one that has more (a flood of peers
    or ports) loses those that are out of use for longest, until it has no more than its share.
    """
    live = [each for each in counters if each.live and not each.waits]
    chosen = [each for each in live if each.edge.last_seen < now - IDLE_S]
    in_use = len(live) - len(chosen)
    if in_use > room * _FULL:
        by_workload: dict[int, list[Counter]] = {}
        for each in live:
            if each.edge.last_seen >= now - IDLE_S:
                by_workload.setdefault(each.edge.key.workload, []).append(each)
        share = int(room * _FULL) // len(by_workload)
        for held in by_workload.values():
            chosen += _longest_idle(held, len(held) - share, now)
    return [(each.slot, each.generation) for each in chosen]


def _longest_idle(counters: list[Counter], count: int, now: float) -> list[Counter]:
    if count <= 0:
        return []
    idle = [each for each in counters if each.edge.last_seen < now - HURRIED_IDLE_S]
    return sorted(idle, key=lambda each: each.edge.last_seen)[:count]
