"""`tidegate config validate`: checks files of config entries and service definitions, for pipelines.

Asks no server: what a server would refuse because of what it has, such as the permissive gate, is not told.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from typing import Any

import msgspec

from tidegate.cli.arguments import ExamplesFormatter, add_json, source_of, text_of
from tidegate.errors import InputError, InputErrors
from tidegate.intent.documents import read_documents
from tidegate.intent.entries import Entry, parse_entries
from tidegate.intent.services import ServiceDefinition, looks_like_services, parse_services
from tidegate.model import ServiceName

_LINE = re.compile(r"line (\d+)\b")


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    """An entry or a service definition that is right."""

    source: str
    kind: str
    name: str
    """What is unique of its kind: an entry's name, a service's id."""
    namespace: str
    partition: str

    @property
    def label(self) -> str:
        return f"{self.kind}/{ServiceName(self.name, self.namespace, self.partition)}"


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `validate` to the group `config`."""
    summary = "check files of config entries and service definitions; exits 1 if anything is wrong"
    parser = commands.add_parser(
        "validate",
        help=summary,
        description="Checks files of config entries and service definitions without asking a server: every fault of "
        "all files, with its line. Exits 0 when all is right, else 1.",
        epilog="examples:\n  tidegate config validate entries/*.hcl\n  tidegate config validate --json web.yaml",
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="HCL, JSON or YAML; - for standard input"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each entry that is right, and for each fault of all files."""
    found: list[_Found] = []
    faults: list[InputError] = []
    for file in dict.fromkeys(args.files):
        try:
            found += _read(file)
        except InputErrors as error:
            faults += error.faults
        except InputError as error:
            faults.append(error)
    faults += _repeated(found)
    if args.json:
        print(json.dumps(_report(found, faults), indent=2))
    else:
        for one in found:
            print(f"{one.source}: {one.label}: ok")
        for fault in faults:
            print(f"tidegate: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _read(file: str) -> list[_Found]:
    text, source = text_of(file), source_of(file)
    kinds = {looks_like_services(document) for document in read_documents(text, source)}
    if len(kinds) > 1:
        raise InputError(
            "holds config entries and service definitions",
            source=source,
            expected="a file for each",
        )
    if True in kinds:
        return [_of_service(service, source) for service in parse_services(text, source)]
    return [_of_entry(entry, source) for entry in parse_entries(text, source)]


def _of_entry(entry: Entry, source: str) -> _Found:
    return _Found(source=source, **entry.key._asdict())


def _of_service(service: ServiceDefinition, source: str) -> _Found:
    return _Found(
        source=source,
        kind=service.kind or "service",
        name=service.id,
        namespace=service.namespace,
        partition=service.partition,
    )


def _repeated(found: Iterable[_Found]) -> list[InputError]:
    """What several of the files, or places of one, say: only the last would hold."""
    first: dict[str, _Found] = {}
    faults = []
    for one in found:
        other = first.setdefault(one.label, one)
        if other is not one:
            where = "twice" if other.source == one.source else f"in {other.source} too"
            problem = f"is there {where}"
            faults.append(
                InputError(problem, source=one.source, field=one.label, expected="it once")
            )
    return faults


def _report(found: Iterable[_Found], faults: Iterable[InputError]) -> dict[str, Any]:
    return {
        "valid": [msgspec.to_builtins(one) for one in found],
        "faults": [
            {
                "source": fault.source,
                "line": int(match.group(1)) if (match := _LINE.match(fault.field)) else 0,
                "field": fault.field,
                "problem": fault.problem,
                "expected": fault.expected,
            }
            for fault in faults
        ],
    }
