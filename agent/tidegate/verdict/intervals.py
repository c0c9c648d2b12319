"""Arithmetic on spans of time: what coverage and its gaps are computed with.

Intervals are closed and in seconds. An interval that ends before it starts is empty and is ignored.
Every result is sorted and disjoint; intervals that touch are one.
"""

from collections.abc import Iterable

from tidegate.model import Interval


def union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same moments, sorted and disjoint."""
    merged: list[Interval] = []
    for interval in sorted(each for each in intervals if each.end >= each.start):
        if merged and interval.start <= merged[-1].end:
            merged[-1] = Interval(merged[-1].start, max(merged[-1].end, interval.end))
        else:
            merged.append(interval)
    return tuple(merged)


def clip(intervals: Iterable[Interval], start: float, end: float) -> tuple[Interval, ...]:
    """Only what lies in [start, end]."""
    return union(Interval(max(each.start, start), min(each.end, end)) for each in intervals)


def gaps(intervals: Iterable[Interval], start: float, end: float) -> tuple[Interval, ...]:
    """The spans of [start, end] that no interval covers, each longer than nothing."""
    found: list[Interval] = []
    reached = start
    for covered in clip(intervals, start, end):
        if covered.start > reached:
            found.append(Interval(reached, covered.start))
        reached = covered.end
    if end > reached:
        found.append(Interval(reached, end))
    return tuple(found)


def total(intervals: Iterable[Interval]) -> float:
    """Seconds covered; overlapping time counts once."""
    return sum(each.end - each.start for each in union(intervals))
