"""`tidegate classify`: the classes of the connections in a capture, by the programs that watch interfaces."""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tidegate.cli import profiles, seen, tables
from tidegate.cli.arguments import ExamplesFormatter, add_json, source_of
from tidegate.cli.target import require_root
from tidegate.errors import InputError
from tidegate.observe import capture, replay

EXAMPLES = """\
examples:
  tidegate classify trace.pcap
  tidegate classify trace.pcap --profile istio --json
  tcpdump -c 1000 -w - tcp | tidegate classify -"""

TOLD_EVERY = 4096
"""Packets between two updates of the progress bar."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `classify`."""
    parser = subparsers.add_parser(
        "classify",
        help="tell what the connections in a capture are",
        description="Plays a capture (pcap or pcapng) to the classifier's own programs, and tells every connection as "
        "`tidegate observe` would have. The local end of a connection is the sender of its first packet. Needs "
        "root, as the programs run in the kernel; nothing is attached and no packet is sent.",
        epilog=EXAMPLES,
        formatter_class=ExamplesFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="pcap or pcapng; - for standard input")
    profiles.add_option(parser)
    add_json(parser, "flows, edges and counters as one JSON object")
    parser.set_defaults(run=run_classify)


def run_classify(args: argparse.Namespace) -> int:
    """Plays a capture and prints what was in it."""
    require_root("only root may run programs in the kernel")
    profile = profiles.chosen(args.profile)
    with ExitStack() as stack:
        stream, size = _opened(args.file, stack)
        played = stack.enter_context(replay.replaying(profile))
        tell = stack.enter_context(_Telling(size))
        try:
            for packet in capture.packets(stream, source_of(args.file)):
                played.play(packet)
                if played.packets % TOLD_EVERY == 0:
                    tell(packet.end)
        except capture.EndsEarly as early:
            if not played.packets:
                raise
            played.note_end(early)
        report = played.report()
    seen.print_report(tables.console(), report, as_json=args.json)
    return 0


def _opened(file: str, stack: ExitStack) -> tuple[IO[bytes], int | None]:
    """The capture and how many bytes it has, None where that is not known."""
    if file == "-":
        return sys.stdin.buffer, None
    path = Path(file)
    try:
        stream = stack.enter_context(path.open("rb"))
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", source=file, expected="a capture, or -"
        ) from error
    return stream, size


class _Telling:
    """A progress bar on standard error, where that is a terminal and the size of the work is known.

    It appears when there is progress to tell.
    """

    def __init__(self, size: int | None) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or size is None,
        )
        self._task = self._bar.add_task("playing the capture", total=size)

    def __enter__(self) -> Callable[[int], None]:
        return self._tell

    def _tell(self, done: int) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
