"""How coverage grows: from "this attachment is still in place" to intervals of observation.

Level-triggered: each round says since when the present attachment has been counting, and the
interval it continues, or the new one it begins, follows. Arithmetic on finished intervals is in
verdict/intervals.py.
"""

from tidegate.model import Interval


def extend(last: Interval | None, attached_at: float, now: float) -> Interval:
    """The interval in which `now` is covered by an attachment that has counted since `attached_at`.

    It continues `last` where the attachment began within it (the same one, or one that took over
    without a gap), or before it, and is a new one otherwise. Never shorter than `last` when it
    continues it: a clock that steps back takes nothing away. One that steps back behind `last`
    begins anew.
    """
    if last is not None and attached_at <= last.end and last.start <= now:
        return Interval(last.start, max(last.end, now))
    return Interval(attached_at, max(attached_at, now))
