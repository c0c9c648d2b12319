"""The `tidegate` command: finds the command group, turns errors into one sentence and an exit code."""

import argparse
import importlib.metadata
import os
import sys

from tidegate.cli import agent, config, doctor, evidence, lab, server
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError

GROUPS = (lab, evidence, config, agent, server, doctor)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each group adds its commands with their `run`."""
    parser = argparse.ArgumentParser(
        prog="tidegate",
        description="Moves service-mesh workloads from plaintext to strict mTLS, on evidence.",
        epilog="Start with: sudo tidegate doctor; sudo tidegate lab up; sudo tidegate flows",
    )
    parser.add_argument(
        "--version", action="version", version=f"tidegate {importlib.metadata.version('tidegate')}"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 good, 1 failed or not ready, 2 bad input or unknown."""
    args = make_parser().parse_args(argv)
    try:
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
