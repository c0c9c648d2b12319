"""How measurements look to a person, a table per part, and to a program, one JSON object."""

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tests.bench.measure import Limit, Line, Measurement

PLAIN_WIDTH = 160


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the benchmarks, as --json writes it."""

    at: float
    """When it began, seconds since the Unix epoch."""
    took_s: float
    kernel: str
    processors: int
    load: tuple[float, float]
    """Load average of one minute, when it began and when it ended."""
    measurements: tuple[Measurement, ...]
    not_measured: tuple[str, ...]
    """What was left out, and why, one sentence each."""


def console() -> Console:
    """Standard output; wide where it is not a terminal, so that no line is broken for nobody."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def show(out: Console, run: Run) -> None:
    """Everything of a run."""
    for part in dict.fromkeys(measured.part for measured in run.measurements):
        out.print()
        out.print(_table([each for each in run.measurements if each.part == part]))
    out.print()
    for sentence in run.not_measured:
        out.print(Text(f"not measured: {sentence}", "yellow"))
    out.print(
        f"{run.took_s:.0f} s on {run.processors} processors, Linux {run.kernel}, load average "
        f"{run.load[0]:.1f} before and {run.load[1]:.1f} after"
    )


def _table(measurements: Sequence[Measurement]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(measurements[0].part, no_wrap=True)
    for title in ("median", "quartiles", "", "ratio", "times"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for measurement in measurements:
        table.add_row(Text(measurement.title, "bold"))
        for line in measurement.lines:
            table.add_row(
                f"  {line.name}",
                number(line.median),
                f"{number(line.low)}-{number(line.high)}",
                measurement.unit,
                "" if len(measurement.lines) == 1 else f"{line.ratio:.3g}",
                str(len(line.samples)),
                _kept(line, line.limit) if line.limit else "",
            )
    return table


def number(value: float) -> str:
    """A value with as many digits as mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _kept(line: Line, limit: Limit) -> Text:
    text = f"{limit.bound} {limit.value:g}"
    return Text(f"{text}  held", "green") if line.holds else Text(f"{text}  MISSED", "bold red")
