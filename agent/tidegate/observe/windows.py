"""Which parts of the history answer a window: rows of minutes and hours, the present minute's sums, packed rounds.

Rows have everything but the present minute; rounds are details of the same, as far back as they are kept. So the whole
minutes of a window come from rows, what is cut off at its ends from rounds. Pure. All moments are milliseconds since
the epoch, all spans include both ends.
"""

import msgspec

from tidegate.observe.history import HOURS, MINUTES

_NEVER = 1 << 62


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """How far the rounds reach."""

    exact_from: int
    """Since when every round is kept."""
    latest: int
    """The date of the latest round."""
    minute: int
    """Start of the present minute, the rounds of which are not in rows."""


class Sources(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be added up."""

    minutes_from: int
    """Rows of minutes from this start on, up to `rows_until`; hours likewise."""
    hours_from: int
    rows_until: int
    present: bool
    """The sums of the present minute."""
    rounds: tuple[tuple[int, int], ...]


def sources(since: int, until: int, extent: Extent) -> Sources:
    """As exact as the history is, from as few rounds as possible.

    Where rounds do not reach, a minute or hour that is partly in the window counts whole.
    """
    exact = extent.exact_from <= since
    minutes_from = _up(since) if exact else since - MINUTES.span_ms + 1
    hours_from = _NEVER if exact else since - HOURS.span_ms + 1
    last = until - until % MINUTES.span_ms
    if until >= extent.latest or extent.exact_from > last:
        rows_until = until
        after: tuple[tuple[int, int], ...] = ()
    elif minutes_from > last:
        rows_until = last - 1
        after = ()
    else:
        rows_until = last - 1
        after = ((last, until),)
    before = ((since, min(minutes_from - 1, until)),) if since < minutes_from else ()
    return Sources(
        minutes_from=minutes_from,
        hours_from=hours_from,
        rows_until=rows_until,
        present=minutes_from <= extent.minute <= rows_until,
        rounds=(*before, *after),
    )


def in_detail(since: int, until: int, extent: Extent) -> Sources:
    """The same, in steps that are as fine as the history has them."""
    if extent.exact_from <= since:
        return Sources(
            minutes_from=_NEVER,
            hours_from=_NEVER,
            rows_until=until,
            present=False,
            rounds=((since, until),),
        )
    rounds_from = _up(extent.exact_from)
    within = rounds_from <= until
    rows_until = rounds_from - 1 if within else until
    return Sources(
        minutes_from=since - MINUTES.span_ms + 1,
        hours_from=since - HOURS.span_ms + 1,
        rows_until=rows_until,
        present=extent.minute <= rows_until,
        rounds=((rounds_from, until),) if within else (),
    )


def _up(moment: int) -> int:
    """The start of the first minute that is not begun before `moment`."""
    return moment + -moment % MINUTES.span_ms
