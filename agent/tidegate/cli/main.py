"""The `tidegate` command: finds the command group, turns errors into one sentence and an exit code."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError

COMMANDS = {
    "lab": "lab",
    "flows": "evidence",
    "ready": "evidence",
    "onboard": "onboard",
    "permissive": "evidence",
    "intentions": "intentions",
    "strict": "evidence",
    "resecure": "resecure",
    "observe": "observe",
    "classify": "classify",
    "trace": "trace",
    "config": "config",
    "services": "services",
    "ca": "ca",
    "redirect": "redirect",
    "agent": "agent",
    "cni": "cni",
    "sidecar": "sidecar",
    "init": "init",
    "server": "server",
    "status": "status",
    "doctor": "doctor",
    "uninstall": "uninstall",
}
"""Each command and the module of tidegate.cli that has it; in the order of the help text."""


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, or of one command only: then nothing else is imported.

    For --version no command is imported.
    """
    parser = _Parser(
        prog="tidegate",
        description="Moves service-mesh workloads from plaintext to strict mTLS, on evidence.",
        epilog="Start with: sudo tidegate doctor; sudo tidegate lab up; sudo tidegate flows",
        formatter_class=_CommandsFormatter,
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in _groups(command):
        importlib.import_module(f"tidegate.cli.{group}").add_parser(subparsers)
    return parser


def _groups(command: str | None) -> Iterable[str]:
    if command == "--version":
        return ()
    return (COMMANDS[command],) if command in COMMANDS else dict.fromkeys(COMMANDS.values())


class _CommandsFormatter(argparse.HelpFormatter):
    """Gives the longest command room for its help in the same line: argparse forgets by how much it is indented."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = self._indent_increment * 2 + max(map(len, COMMANDS))


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, as all errors are told; parsers of commands are of the same class."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what it does not know itself: argparse leaves that to the parser of the whole command line."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return known, unknown

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is one argument too many"
        options = [name for name in self._option_string_actions if name.startswith("--")]
        option = word.partition("=")[0]
        near = " or ".join(difflib.get_close_matches(option, options))
        return f"there is no option {option}" + (f"; expected {near}" if near else "")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if not choices or value in choices:
            return
        near = difflib.get_close_matches(str(value), choices)
        expected = " or ".join(near) or f"one of {', '.join(choices)}"
        if action.metavar == "COMMAND":
            raise argparse.ArgumentError(
                None, f"there is no command {value!r}; expected {expected}"
            )
        raise argparse.ArgumentError(action, f"{value!r} is no choice; expected {expected}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"tidegate: {message}; see `{self.prog} --help`\n")


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(f"tidegate {importlib.metadata.version('tidegate')}")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 good, 1 failed or not ready, 2 bad input or unknown."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        make_parser().print_help(sys.stderr)
        return 2
    try:
        args = make_parser(argv[0]).parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
    except TidegateError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return error.exit_code
    except KernelError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


if __name__ == "__main__":
    sys.exit(main())
