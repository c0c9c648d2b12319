"""`tidegate ca`: the mesh's certificate authority. Its roots, and a new one in the present one's place."""

import argparse
import asyncio
import datetime

import msgspec
from cryptography import x509

from tidegate import durations
from tidegate.catalog.client import CatalogClient, CatalogRefused, Root
from tidegate.catalog.settings import MAX_LEAF_TTL_S
from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.cli.target import access, add_access_options, add_options, server_address
from tidegate.errors import TidegateError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `ca`."""
    group = subparsers.add_parser(
        "ca",
        help="the mesh's root certificates: list, rotate",
        description="The certificates by which sidecars trust each other. They are the intent server's.",
    )
    commands = group.add_subparsers(dest="ca_command", required=True, metavar="COMMAND")
    roots = commands.add_parser(
        "roots",
        help="which roots are trusted, and which one issues",
        description="Lists the root certificates that sidecars of the mesh trust. The active one issues leaves.",
    )
    rotate = commands.add_parser(
        "rotate",
        help="let a new root issue, while the present one stays trusted",
        formatter_class=ExamplesFormatter,
        description="Makes a new root, signed by the present one as well, and has leaves issued by it. The present one "
        "stays trusted for --keep, so that no sidecar refuses another: at least as long as leaves live.",
        epilog="examples:\n  tidegate ca rotate\n  tidegate ca rotate --keep 24h\n"
        "  tidegate ca roots",
    )
    rotate.add_argument(
        "--keep",
        type=_keep,
        default=MAX_LEAF_TTL_S,
        metavar="TIME",
        help="how long the present root stays trusted "
        f"(default: {durations.span(MAX_LEAF_TTL_S)}, as long as leaves live at most)",
    )
    for parser, run in ((roots, run_roots), (rotate, run_rotate)):
        parser.set_defaults(run=run)
        add_json(parser)
        add_options(parser)
        add_access_options(parser)


def run_roots(args: argparse.Namespace) -> int:
    """Lists the roots."""

    async def ask() -> tuple[Root, ...]:
        async with CatalogClient(server_address(args), access(args)) as client:
            return await client.list_roots()

    _print(asyncio.run(ask()), as_json=args.json)
    return 0


def run_rotate(args: argparse.Namespace) -> int:
    """Rotates the root, and lists what is trusted then."""

    async def ask() -> tuple[Root, ...]:
        async with CatalogClient(server_address(args), access(args)) as client:
            try:
                return await client.rotate_root(args.keep)
            except CatalogRefused as error:
                if error.status != 404:
                    raise
                raise TidegateError(
                    f"{client.address} is Consul's, whose roots `consul connect ca set-config` rotates"
                ) from error

    _print(asyncio.run(ask()), as_json=args.json)
    return 0


def _keep(text: str) -> float:
    seconds = durations.parse(text.strip())
    if seconds is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {durations.SHAPE}")
    return seconds


def _print(roots: tuple[Root, ...], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.format(msgspec.json.encode({"roots": roots}), indent=2).decode())
        return
    for root in roots:
        word = "active " if root.active else "trusted"
        print(f"{word}  {root.id}  valid until {_until(root):%Y-%m-%d} (UTC)")


def _until(root: Root) -> datetime.datetime:
    try:
        return x509.load_pem_x509_certificate(root.root_cert.encode()).not_valid_after_utc
    except ValueError as error:
        raise TidegateError(f"the server's root {root.id} is no certificate: {error}") from error
