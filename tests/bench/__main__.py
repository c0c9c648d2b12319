"""`python -m tests.bench [PART ...]`: runs the benchmarks, prints tables, removes what it made."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from tests.bench import agent, flows, ledger, node, redirect, report
from tests.bench.measure import Measurement
from tests.bench.site import Site, site

from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError

PARTS: dict[str, Callable[[Site], Iterator[Measurement]]] = {
    redirect.PART: redirect.measure,
    flows.PART: flows.measure,
    ledger.PART: ledger.measure,
    agent.PART: agent.measure,
    node.PART: node.measure,
}


def main() -> int:
    """0 when everything was measured, whatever came out; 1 when something could not be."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures tidegate on this machine; see docs/bench.md. Needs root.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all samples to FILE")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    if os.geteuid() != 0:
        print("the benchmarks make network namespaces: run sudo make bench", file=sys.stderr)
        return 1
    try:
        run = _run([part for part in PARTS if part in (args.parts or PARTS)])
    except (KernelError, TidegateError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything it made is removed", file=sys.stderr)
        return 130
    report.show(report.console(), run)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1))
    return 0


def _run(parts: list[str]) -> report.Run:
    began, load = time.time(), os.getloadavg()[0]
    measurements: list[Measurement] = []
    with site() as here:
        for part in parts:
            for measurement in PARTS[part](here):
                elapsed = time.time() - began
                print(f"{elapsed:5.0f} s  {part}: {measurement.title}", file=sys.stderr)
                measurements.append(measurement)
    return report.Run(
        at=began,
        took_s=time.time() - began,
        kernel=os.uname().release,
        processors=os.cpu_count() or 1,
        load=(load, os.getloadavg()[0]),
        measurements=tuple(measurements),
        not_measured=tuple(
            sentence
            for part in (redirect, flows)
            if part.PART in parts
            for sentence in part.not_measured()
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
