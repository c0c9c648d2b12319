"""`tidegate config write|read|list|delete`: Consul's commands for config entries, flags and output included.

Calls the client and prints. Exits as Consul does (0 or 1); a file that is wrong exits 2 with what is wrong.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tidegate.catalog.client import CatalogClient, CatalogRefused, CatalogUnreachable
from tidegate.cli.arguments import source_of, text_of
from tidegate.cli.target import add_options, server_address
from tidegate.intent.entries import Entry, make_kind, parse_entries, to_consul, warning_for
from tidegate.intent.resolve import turned_strict

T = TypeVar("T")

_CatalogErrors = (CatalogRefused, CatalogUnreachable)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `config`."""
    group = subparsers.add_parser("config", help="config entries: write, read, list, delete")
    commands = group.add_subparsers(dest="config_command", required=True, metavar="COMMAND")

    write = _command(commands, "write", run_write, "create or update config entries from a file")
    write.add_argument("file", metavar="FILE", help="HCL, JSON or YAML; - for standard input")
    _add_cas(write)

    read = _command(commands, "read", run_read, "print one config entry as JSON")
    _add_kind(read)
    _add_name(read)

    list_ = _command(commands, "list", run_list, "print the names of the config entries of a kind")
    _add_kind(list_)

    delete = _command(commands, "delete", run_delete, "delete one config entry")
    _add_kind(delete)
    _add_name(delete)
    _add_cas(delete)


def run_write(args: argparse.Namespace) -> int:
    """Writes every entry of the file, in order; stops at the first that is refused."""
    if args.modify_index and not args.cas:
        return _error("Cannot specify -modify-index without -cas")
    entries = parse_entries(text_of(args.file), source_of(args.file))
    for entry in entries:
        label = f"{entry.kind}/{entry.name}"
        try:
            cas = args.modify_index if args.cas else None
            written, strict = _ask(args, _telling(_writing(entry, cas)))
        except _CatalogErrors as error:
            return _error(f"Error writing config entry {label}: {error}")
        if not written:
            return _error(f"Config entry not updated: {label}")
        print(f"Config entry written: {label}")
        if warning := warning_for(entry):
            print(f"WARNING: {warning}", file=sys.stderr)
        _warn_of(strict)
    return 0


def run_read(args: argparse.Namespace) -> int:
    """Prints one entry, indented as Consul indents it."""
    if missing := _missing(args):
        return _error(missing)
    kind = make_kind(args.kind)
    try:
        entry = _ask(args, lambda client: client.read_entry(kind, args.name))
    except _CatalogErrors as error:
        return _error(f"Error reading config entry {kind}/{args.name}: {error}")
    print(json.dumps(to_consul(entry), indent=4))
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Prints the names of the entries of a kind, one per line."""
    if not args.kind:
        return _error("Must specify the -kind parameter")
    kind = make_kind(args.kind)
    try:
        entries = _ask(args, lambda client: client.read_entries(kind))
    except _CatalogErrors as error:
        return _error(f'Error listing config entries for kind "{kind}": {error}')
    for entry in entries:
        print(entry.name)
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Deletes one entry; one that is missing counts as deleted, as in Consul."""
    if missing := _missing(args):
        return _error(missing)
    if args.cas and not args.modify_index:
        return _error("Must specify a -modify-index greater than 0 with -cas")
    if args.modify_index and not args.cas:
        return _error("Cannot specify -modify-index without -cas")
    kind = make_kind(args.kind)
    label = f"{kind}/{args.name}"
    cas = args.modify_index if args.cas else None
    try:
        deleting = _telling(lambda client: client.delete_entry(kind, args.name, cas))
        deleted, strict = _ask(args, deleting)
    except _CatalogErrors as error:
        return _error(f"Error deleting config entry {label}: {error}")
    if not deleted:
        return _error(f"Config entry not deleted: {label}")
    print(f"Config entry deleted: {label}")
    _warn_of(strict)
    return 0


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.set_defaults(run=run)
    add_options(parser)
    return parser


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-kind", "--kind", default="", help="such as service-defaults")


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-name", "--name", default="", help="the service; mesh for mesh, global for proxy-defaults"
    )


def _add_cas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-cas", "--cas", action="store_true", help="only if -modify-index is still current"
    )
    parser.add_argument(
        "-modify-index",
        "--modify-index",
        type=int,
        default=0,
        metavar="N",
        help="ModifyIndex of the entry that was read (write: 0 for one that must not exist yet)",
    )


def _missing(args: argparse.Namespace) -> str:
    if not args.kind:
        return "Must specify the -kind parameter"
    return "" if args.name else "Must specify the -name parameter"


def _writing(entry: Entry, cas: int | None) -> Callable[[CatalogClient], Awaitable[bool]]:
    return lambda client: client.write_entry(entry, cas)


def _telling(
    change: Callable[[CatalogClient], Awaitable[bool]],
) -> Callable[[CatalogClient], Awaitable[tuple[bool, tuple[str, ...]]]]:
    """A change that also tells which services with a sidecar it made strict."""

    async def change_and_compare(client: CatalogClient) -> tuple[bool, tuple[str, ...]]:
        before = await client.snapshot()
        done = await change(client)
        after = await client.snapshot()
        meshed = {one.service for one in after.living().values() if one.meshed}
        return done, turned_strict(before.entries, after.entries, meshed)

    return change_and_compare


def _warn_of(strict: tuple[str, ...]) -> None:
    for service in strict:
        print(
            f"WARNING: {service} is strict now, and nobody guards it: callers without mTLS are refused. "
            f"`tidegate strict {service}` looks first and guards. To go back, write "
            'MutualTLSMode = "permissive" again.',
            file=sys.stderr,
        )


def _ask(args: argparse.Namespace, question: Callable[[CatalogClient], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with CatalogClient(server_address(args)) as client:
            return await question(client)

    return asyncio.run(ask())


def _error(message: str) -> int:
    print(message, file=sys.stderr)
    return 1
