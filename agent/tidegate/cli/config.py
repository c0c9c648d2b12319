"""`tidegate config write|read|list|delete`: Consul's commands for config entries, flags, output and exit included.

Calls the client and prints. Exits as Consul does, 0 or 1, whatever is wrong.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from tidegate.catalog.client import CatalogClient, CatalogRefused, CatalogUnreachable
from tidegate.catalog.embedded import EmbeddedClient, embedded
from tidegate.catalog.store import StoreError
from tidegate.cli import validate
from tidegate.cli.arguments import (
    ExamplesFormatter,
    add_json,
    exiting_as_consul,
    source_of,
    text_of,
)
from tidegate.cli.target import access, add_access_options, add_options, server_address
from tidegate.errors import InputError
from tidegate.intent.entries import (
    Entry,
    EntryKey,
    Kind,
    make_kind,
    parse_entries,
    to_consul,
    warning_for,
)
from tidegate.intent.filtering.fault import FilterError
from tidegate.intent.filtering.grammar import parse
from tidegate.intent.resolve import turned_strict
from tidegate.model import DEFAULT_TENANT

T = TypeVar("T")

Client = CatalogClient | EmbeddedClient

_CatalogErrors = (CatalogRefused, CatalogUnreachable, StoreError)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `config`."""
    group = subparsers.add_parser(
        "config",
        help="config entries: write, read, list, delete, validate",
        description="What should be, in Consul's config entries: modes, intentions, the mesh's settings. The commands, "
        "their flags and output are Consul's.",
    )
    commands = group.add_subparsers(dest="config_command", required=True, metavar="COMMAND")

    write = _command(
        commands,
        "write",
        run_write,
        "create or update config entries from a file",
        "tidegate config write api.hcl",
        """echo 'Kind = "mesh" AllowEnablingPermissiveMutualTLS = true' | tidegate config write -""",
    )
    write.add_argument("file", metavar="FILE", help="HCL, JSON or YAML; - for standard input")
    _add_cas(write)

    read = _command(
        commands,
        "read",
        run_read,
        "print one config entry as JSON",
        "tidegate config read -kind service-defaults -name api",
        "tidegate config read -kind mesh -name mesh",
    )
    _add_kind(read)
    _add_name(read)

    list_ = _command(
        commands,
        "list",
        run_list,
        "print the names of the config entries of a kind",
        "tidegate config list -kind service-intentions",
        """tidegate config list -kind service-defaults -filter 'MutualTLSMode == "permissive"'""",
    )
    _add_kind(list_)
    list_.add_argument(
        "-filter",
        "--filter",
        default="",
        metavar="EXPRESSION",
        help="""only those of which this is true, such as 'MutualTLSMode == "permissive"'""",
    )

    delete = _command(
        commands,
        "delete",
        run_delete,
        "delete one config entry",
        "tidegate config delete -kind service-intentions -name api",
    )
    _add_kind(delete)
    _add_name(delete)
    delete.add_argument(
        "-filename",
        "--filename",
        default="",
        metavar="FILE",
        help="a file with the entry, instead of -kind and -name",
    )
    _add_cas(delete)

    validate.add_command(commands)


def run_write(args: argparse.Namespace) -> int:
    """Writes every entry of the file, in order; stops at the first that is refused."""
    if args.modify_index and not args.cas:
        return _error("Cannot specify -modify-index without -cas")
    entries = parse_entries(text_of(args.file), source_of(args.file))
    if args.cas and len(entries) > 1:
        return _error("Cannot specify -cas for several config entries")
    written: list[dict[str, Any]] = []
    for entry in entries:
        label = f"{entry.kind}/{entry.name}"
        try:
            cas = args.modify_index if args.cas else None
            done, warnings = _ask(args, _telling(_writing(args, entry, cas)))
        except _CatalogErrors as error:
            return _error(f"Error writing config entry {label}: {error}")
        if not done:
            return _error(f"Config entry not updated: {label}")
        if own := warning_for(entry):
            warnings = (own, *warnings)
        written.append(_told(entry.key, "Written", warnings))
        if not args.json:
            print(f"Config entry written: {label}")
        _warn(warnings)
    if args.json:
        print(json.dumps(written, indent=4))
    return 0


def run_read(args: argparse.Namespace) -> int:
    """Prints one entry, indented as Consul indents it."""
    if missing := _missing(args):
        return _error(missing)
    key = _key(args, args.kind, args.name)
    try:
        entry = _ask(args, lambda client: client.read_entry(key))
    except _CatalogErrors as error:
        return _error(f"Error reading config entry {key.kind}/{key.name}: {error}")
    print(json.dumps(to_consul(entry), indent=4))
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Prints the names of the entries of a kind, one per line."""
    if not args.kind:
        return _error("Must specify the -kind parameter")
    kind = make_kind(args.kind)
    said = access(args)
    if args.filter:
        try:
            parse(args.filter)
        except FilterError as error:
            return _error(_with_caret(str(error), error))

    async def listed(client: Client) -> tuple[Entry, ...]:
        return await client.list_entries(
            kind, args.filter, namespace=said.namespace, partition=said.partition
        )

    try:
        entries = _ask(args, listed)
    except (*_CatalogErrors, FilterError) as error:
        return _error(
            _with_caret(f'Error listing config entries for kind "{kind}": {error}', error)
        )
    if args.json:
        print(json.dumps([to_consul(entry) for entry in entries], indent=4))
        return 0
    for entry in entries:
        print(entry.name)
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Deletes one entry; one that is missing counts as deleted, as in Consul."""
    if args.filename and (args.kind or args.name):
        return _error("Cannot specify -kind or -name with -filename")
    if not args.filename and (missing := _missing(args)):
        return _error(missing)
    if args.cas and not args.modify_index:
        return _error("Must specify a -modify-index greater than 0 with -cas")
    if args.modify_index and not args.cas:
        return _error("Cannot specify -modify-index without -cas")
    key = _key_in(args) if args.filename else _key(args, args.kind, args.name)
    label = f"{key.kind}/{key.name}"
    cas = args.modify_index if args.cas else None
    try:
        done, warnings = _ask(args, _telling(lambda client: client.delete_entry(key, cas)))
    except _CatalogErrors as error:
        return _error(f"Error deleting config entry {label}: {error}")
    if not done:
        return _error(f"Config entry not deleted: {label}")
    if args.json:
        print(json.dumps(_told(key, "Deleted", warnings), indent=4))
    else:
        print(f"Config entry deleted: {label}")
    _warn(warnings)
    return 0


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *examples: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Exits 0 or 1, as Consul's command.",
        epilog="\n  ".join(("examples:", *examples)),
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=exiting_as_consul(run))
    add_options(parser)
    add_access_options(parser)
    add_json(parser, "JSON")
    parser.add_argument(
        "--store",
        type=Path,
        metavar="FILE",
        help="an embedded store (catalog.db) that no server runs on, instead of asking a server",
    )
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
    # Go's flags take a bool with a value too.
    parser.add_argument(
        "-cas=true", "--cas=true", dest="cas", action="store_true", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "-cas=false", "--cas=false", dest="cas", action="store_false", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "-modify-index",
        "--modify-index",
        type=_index,
        default=0,
        metavar="N",
        help="ModifyIndex of the entry that was read (write: 0 for one that must not exist yet)",
    )


def _index(text: str) -> int:
    if not text.isdecimal() or len(text) > 19:
        raise argparse.ArgumentTypeError(f"{text!r} is no index")
    return int(text)


def _with_caret(message: str, error: Exception) -> str:
    """The message, and below it where in the expression it is about, where that is known."""
    return f"{message}\n{error.caret}" if isinstance(error, FilterError) else message


def _missing(args: argparse.Namespace) -> str:
    if not args.kind:
        return "Must specify the -kind parameter"
    return "" if args.name else "Must specify the -name parameter"


def _key(args: argparse.Namespace, kind: str, name: str) -> EntryKey:
    said = access(args)
    return _placed(make_kind(kind), name, said.namespace, said.partition)


def _key_in(args: argparse.Namespace) -> EntryKey:
    entries = parse_entries(text_of(args.filename), source_of(args.filename))
    if len(entries) > 1:
        raise InputError(
            f"{len(entries)} entries", source=source_of(args.filename), expected="one to delete"
        )
    key, said = entries[0].key, access(args)
    own = key.namespace if key.namespace != DEFAULT_TENANT else said.namespace
    return _placed(key.kind, key.name, own, said.partition or key.partition)


def _placed(kind: Kind, name: str, namespace: str, partition: str) -> EntryKey:
    of_partition = kind in (Kind.MESH, Kind.PROXY_DEFAULTS)
    namespace = DEFAULT_TENANT if of_partition else namespace or DEFAULT_TENANT
    return EntryKey(kind, name, namespace, partition or DEFAULT_TENANT)


def _told(key: EntryKey, what: str, warnings: tuple[str, ...]) -> dict[str, Any]:
    return {"Kind": key.kind, "Name": key.name, what: True, "Warnings": list(warnings)}


def _writing(
    args: argparse.Namespace, entry: Entry, cas: int | None
) -> Callable[[Client], Awaitable[bool]]:
    said = access(args)
    return lambda client: client.write_entry(
        entry, cas, namespace=said.namespace, partition=said.partition
    )


def _telling(
    change: Callable[[Client], Awaitable[bool]],
) -> Callable[[Client], Awaitable[tuple[bool, tuple[str, ...]]]]:
    """A change that also warns of services with a sidecar that it made strict.

    Who may write need not be allowed to read the catalog: then it is said that nobody looked.
    """

    async def change_and_compare(client: Client) -> tuple[bool, tuple[str, ...]]:
        try:
            before = await client.snapshot()
        except CatalogRefused as error:
            done = await change(client)
            return done, (f"nobody looked whether a service became strict by this: {error}",)
        done = await change(client)
        after = await client.read_entries()
        meshed = {one.service for one in before.living().values() if one.meshed}
        strict = turned_strict(before.entries, after, meshed)
        return done, tuple(map(_strict_now, strict))

    return change_and_compare


def _strict_now(service: str) -> str:
    return (
        f"{service} is strict now, and nobody guards it: callers without mTLS are refused. "
        f"`tidegate strict {service}` looks first and guards. To go back, write "
        'MutualTLSMode = "permissive" again.'
    )


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)


def _ask(args: argparse.Namespace, question: Callable[[Client], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with CatalogClient(server_address(args), access(args)) as client:
            return await question(client)

    if args.store is None:
        return asyncio.run(ask())
    makes = args.config_command == "write"
    with embedded(args.store, f"`tidegate config {args.config_command}`", make=makes) as client:
        return asyncio.run(_awaited(question(client)))


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer


def _error(message: str) -> int:
    print(message, file=sys.stderr)
    return 1
