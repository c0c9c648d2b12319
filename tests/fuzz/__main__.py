"""Runs the differential fuzzer: python -m tests.fuzz --streams 1000000 --seed 7

Ends with 0 when no stream made a difference, otherwise with 1 after telling the seed, the number and the fewest
segments that still differ. Needs root.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from . import cases, streams
from .differential import BATCH, Aspect, Difference, Differential
from .reference import ACK, FIN, RST, SYN

_REPORT_EVERY = 10.0
"""Seconds."""
_FLAGS = {SYN: "SYN", FIN: "FIN", RST: "RST", ACK: "ACK"}


def main() -> int:
    options = _parser().parse_args()
    if os.geteuid() != 0:
        print("fuzzing loads programs into the kernel: run it as root", file=sys.stderr)
        return 2
    if options.replay:
        return _replay(options)
    done: SimpleQueue[tuple[int, str]] = multiprocessing.get_context("fork").SimpleQueue()
    workers = [
        multiprocessing.get_context("fork").Process(
            target=_work, args=(options, shard, os.getpid(), done), daemon=True
        )
        for shard in range(options.jobs)
    ]
    signal.signal(signal.SIGTERM, _end)
    for worker in workers:
        worker.start()
    try:
        differences = _watch(options.streams, workers, done)
    except KeyboardInterrupt:
        return 130
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    if any(worker.exitcode for worker in workers):
        return 1
    return 1 if differences else 0


def _end(number: int, frame: object) -> None:
    """On a signal: leaves by the way that takes everything down again."""
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--streams", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--first", type=int, default=0, help="number of the first stream")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--most", type=int, default=20, help="end after so many differences")
    parser.add_argument("--save", type=Path, help="directory for the streams that differ")
    parser.add_argument(
        "--kinds", type=_names(tuple(streams.KINDS)), default=tuple(streams.KINDS),
        help=f"of conversations, with commas: {', '.join(streams.KINDS)}",
    )  # fmt: skip
    parser.add_argument(
        "--aspects", type=_names(tuple(Aspect)), default=tuple(Aspect),
        help=f"that are compared, with commas: {', '.join(Aspect)}",
    )  # fmt: skip
    parser.add_argument(
        "--report", action="store_true", help="have the programs report ClientHellos, too"
    )
    parser.add_argument("--replay", type=Path, nargs="+", help="play these cases only")
    return parser


def _names(known: tuple[str, ...]):
    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(known)}")
        return tuple(next(each for each in known if each == name) for name in names)

    return read


def _watch(
    total: int,
    workers: Sequence[multiprocessing.process.BaseProcess],
    done: "SimpleQueue[tuple[int, str]]",
) -> int:
    """Tells what the workers report until the last has ended; how many differences there were."""
    began = told = time.monotonic()
    played = differences = 0
    while True:
        alive = any(worker.is_alive() for worker in workers)
        while not done.empty():
            count, text = done.get()
            played += count
            if text:
                differences += 1
                print(text, flush=True)
        now = time.monotonic()
        if now - told >= _REPORT_EVERY or not alive:
            told = now
            speed = played / (now - began)
            print(
                f"{played} of {total} streams, {differences} differences, {speed:.0f} streams per second",
                flush=True,
            )
        if not alive:
            return differences
        workers[0].join(0.2)


def _work(
    options: argparse.Namespace, shard: int, parent: int, done: "SimpleQueue[tuple[int, str]]"
) -> None:
    """Plays every jobs-th stream, as long as there is somebody to tell it to."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    numbers = range(options.first + shard, options.first + options.streams, options.jobs)
    left = options.most
    with Differential.open(options.aspects, report=options.report) as differential:
        for at in range(0, len(numbers), BATCH):
            batch = {
                number: streams.make(options.seed, number, options.kinds)
                for number in numbers[at : at + BATCH]
            }
            found = differential.compare(list(batch.values()))
            for difference in found[:left]:
                done.put((0, _told(differential, options, batch, difference)))
            left -= len(found)
            done.put((len(batch), ""))
            if left <= 0 or os.getppid() != parent:
                return


def _told(
    differential: Differential,
    options: argparse.Namespace,
    batch: dict[int, streams.Stream],
    difference: Difference,
) -> str:
    if difference.stream is None:
        return f"seed {options.seed}, streams {min(batch)} to {max(batch)}: {difference}"
    number = next(each for each, stream in batch.items() if stream is difference.stream)
    small = differential.minimised(difference, difference.stream)
    again = [each for each in differential.compare([small]) if each.is_like(difference)]
    told = again[0] if again else difference
    if options.save:
        note = f"{told} (seed {options.seed}, number {number})"
        cases.write(options.save / f"{small.kind}-{options.seed}-{number}.json", small, note)
    head = f"seed {options.seed}, number {number}, {small.kind}: {told}"
    if not again:
        head += " (only among others)"
    return "\n".join([head, *_lines(small)])


def _lines(stream: streams.Stream) -> list[str]:
    lines = [f"  IPv{stream.version}, {'outbound' if stream.outbound else 'inbound'}"]
    for segment in stream.segments:
        who = "client" if segment.from_client else "server"
        flags = " ".join(name for flag, name in _FLAGS.items() if segment.flags & flag)
        payload = segment.payload.hex()
        if len(payload) > 240:
            payload = f"{payload[:240]}... ({len(segment.payload)} bytes)"
        lines.append(
            f"  {who} at {segment.position} {flags} acknowledges {segment.acked}: {payload or '-'}"
        )
    return lines


def _replay(options: argparse.Namespace) -> int:
    differences = 0
    with Differential.open(options.aspects, report=options.report) as differential:
        for path in options.replay:
            for difference in differential.compare([cases.read(path)]):
                differences += 1
                print(f"{path}: {difference}")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
