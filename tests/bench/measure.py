"""Alternatives measured side by side in one run: A B B A ..., medians, ratios of neighbours.

The machine is shared and its speed changes from second to second. So no alternative is measured on its
own: each round measures all of them, one right after the other, and a ratio is the median of the ratios
within the rounds. What is measured is the parts' business.
"""

import enum
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec

WARM_UPS = 1


class Unit(enum.StrEnum):
    """What a sample counts; its value is how people write it."""

    NANOSECONDS = "ns"
    MICROSECONDS = "µs"
    MILLISECONDS = "ms"
    SECONDS = "s"
    PER_SECOND = "1/s"
    GIGABITS_PER_SECOND = "Gbit/s"
    MEGABYTES = "MB"


class Bound(enum.StrEnum):
    """What a limit limits, and from which side."""

    MEDIAN_AT_MOST = "median <="
    RATIO_AT_MOST = "ratio <="
    RATIO_AT_LEAST = "ratio >="


class Limit(msgspec.Struct, frozen=True):
    """A number that the project promises to hold."""

    bound: Bound
    value: float

    def holds(self, median: float, ratio: float) -> bool:
        """Whether a measured line keeps it."""
        match self.bound:
            case Bound.MEDIAN_AT_MOST:
                return median <= self.value
            case Bound.RATIO_AT_MOST:
                return ratio <= self.value
            case Bound.RATIO_AT_LEAST:
                return ratio >= self.value


class Alternative(msgspec.Struct, frozen=True):
    """One way of doing the thing that is measured. Each call of `sample` does it and gives one value."""

    name: str
    sample: Callable[[], float]
    limit: Limit | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one alternative."""

    name: str
    samples: tuple[float, ...]
    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    ratio: float
    """To the first line of the measurement: the median of the ratios within the rounds."""
    limit: Limit | None = None
    holds: bool | None = None


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Some alternatives; the first one is what the ratios refer to."""

    part: str
    title: str
    unit: Unit
    lines: tuple[Line, ...]


def interleaved(
    part: str, title: str, unit: Unit, rounds: int, alternatives: Sequence[Alternative]
) -> Measurement:
    """Measures the alternatives `rounds` times, in turns, after a round that does not count."""
    samples: list[list[float]] = [[] for _ in alternatives]
    for number in range(-WARM_UPS, rounds):
        turn = list(zip(alternatives, samples, strict=True))
        for alternative, found in turn if number % 2 else reversed(turn):
            value = alternative.sample()
            if number >= 0:
                found.append(value)
    return from_samples(part, title, unit, list(zip(alternatives, samples, strict=True)))


def from_samples(
    part: str, title: str, unit: Unit, sampled: Sequence[tuple[Alternative, Sequence[float]]]
) -> Measurement:
    """The measurement that samples taken otherwise add up to; as many of each alternative."""
    reference = sampled[0][1]
    lines = tuple(_line(alternative, samples, reference) for alternative, samples in sampled)
    return Measurement(part=part, title=title, unit=unit, lines=lines)


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def milliseconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    return seconds(action) * 1e3


def microseconds_each(count: int, action: Callable[[], object]) -> float:
    """How long each of `count` things takes, of a call that does them all."""
    return seconds(action) * 1e6 / count


def _line(alternative: Alternative, samples: Sequence[float], reference: Sequence[float]) -> Line:
    median = statistics.median(samples)
    low, high = median, median
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    ratio = statistics.median(
        mine / theirs for mine, theirs in zip(samples, reference, strict=True)
    )
    limit = alternative.limit
    return Line(
        name=alternative.name,
        samples=tuple(samples),
        median=median,
        low=low,
        high=high,
        ratio=ratio,
        limit=limit,
        holds=None if limit is None else limit.holds(median, ratio),
    )
