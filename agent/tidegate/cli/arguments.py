"""What the commands' arguments share: durations, files that may be standard input, examples in help texts."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tidegate import durations
from tidegate.errors import InputError
from tidegate.intent.hcl import MAX_TEXT


class ExamplesFormatter(argparse.HelpFormatter):
    """Keeps the lines of an epilog that begins with "examples:", and folds everything else."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def duration(text: str) -> float:
    """Seconds, more than 0; raises argparse.ArgumentTypeError for anything else."""
    seconds = durations.parse(text.strip())
    if not seconds:
        raise argparse.ArgumentTypeError(f"{text!r} is not {durations.SHAPE}")
    return seconds


def add_for(parser: argparse.ArgumentParser) -> None:
    """Adds --for, `end_after` seconds, None where it is not given."""
    parser.add_argument(
        "--for",
        dest="end_after",
        type=duration,
        metavar="TIME",
        help="end after this time, such as 30 or 5m (default: on Ctrl-C)",
    )


def add_json(parser: argparse.ArgumentParser, shape: str = "one JSON object") -> None:
    """Adds --json; `shape` is what it prints."""
    parser.add_argument(
        "--json",
        action="store_true",
        help=f"print {shape} on standard output; warnings stay on standard error",
    )


def exiting_as_consul(
    run: Callable[[argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """A command that exits as Consul's commands do for input that is wrong: 1, as for everything else."""

    def run_and_exit(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except InputError as error:
            error.exit_code = 1
            raise

    return run_and_exit


def source_of(file: str) -> str:
    """What a person calls a file that is read: "-" is standard input."""
    return "standard input" if file == "-" else file


def text_of(file: str) -> str:
    """The text of a file, of standard input for "-". InputError when it cannot be read, is no UTF-8 or too large."""
    source = source_of(file)
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(MAX_TEXT * 4 + 1)
        else:
            with Path(file).open("rb") as stream:
                raw = stream.read(MAX_TEXT * 4 + 1)
        if len(raw) > MAX_TEXT * 4:
            raise InputError(
                "is too large", source=source, expected=f"at most {MAX_TEXT} characters"
            )
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start} is not UTF-8", source=source, expected="UTF-8 text"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", source=source, expected="a file, or -"
        ) from error
