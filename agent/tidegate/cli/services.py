"""`tidegate services register|deregister`: service definitions into the catalog and out of it, as Consul's commands.

Consul's register with the agent of their node; here the catalog is told, and which node it is.
"""

import argparse
import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain

import msgspec

from tidegate.catalog.client import CatalogClient, CatalogRefused, CatalogUnreachable
from tidegate.catalog.definitions import services_for
from tidegate.catalog.registration import Service
from tidegate.cli.arguments import ExamplesFormatter, exiting_as_consul, source_of, text_of
from tidegate.cli.target import access, add_access_options, add_options, server_address
from tidegate.intent.services import ServiceDefinition, parse_services
from tidegate.model import DEFAULT_TENANT


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `services`."""
    group = subparsers.add_parser(
        "services",
        help="service definitions: register, deregister",
        description="Puts services that no agent looks after into the catalog, from Consul's service definitions.",
    )
    commands = group.add_subparsers(dest="services_command", required=True, metavar="COMMAND")
    register = _command(commands, "register", run_register, "register the services of files")
    register.add_argument(
        "-node-address",
        "--node-address",
        default="",
        metavar="ADDRESS",
        help="the node's address, for a node that the catalog does not know yet",
    )
    _command(commands, "deregister", run_deregister, "take the services of files out again")


def run_register(args: argparse.Namespace) -> int:
    """Registers every service of the files, in order; stops at the first that is refused."""

    async def register(client: CatalogClient, service: Service) -> None:
        await client.register_service(args.node, args.node_address, service)

    return _each(args, _services(args), register, "Registered", "registering")


def run_deregister(args: argparse.Namespace) -> int:
    """Takes every service of the files out of the catalog, the last one first."""

    async def deregister(client: CatalogClient, service: Service) -> None:
        await client.deregister_service(args.node, service)

    services = tuple(reversed(_services(args)))
    return _each(args, services, deregister, "Deregistered", "deregistering")


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}, as Consul's command does. Exits 0 or 1.",
        epilog=f"examples:\n  tidegate services {name} web.hcl\n  tidegate services {name} -node vm1 web.hcl",
        formatter_class=ExamplesFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=exiting_as_consul(run))
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="HCL, JSON or YAML; - for standard input"
    )
    parser.add_argument(
        "-node",
        "--node",
        default=socket.gethostname(),
        metavar="NAME",
        help="the node that they run on (default: this host's name)",
    )
    add_options(parser)
    add_access_options(parser)
    return parser


def _services(args: argparse.Namespace) -> tuple[Service, ...]:
    """All services of the files, in the namespace and partition that the options say where a file says none."""
    said = access(args)
    read = (parse_services(text_of(file), source_of(file)) for file in args.files)
    definitions = [
        _placed(one, said.namespace, said.partition) for one in chain.from_iterable(read)
    ]
    return services_for(definitions)


def _placed(one: ServiceDefinition, namespace: str, partition: str) -> ServiceDefinition:
    return msgspec.structs.replace(
        one,
        namespace=one.namespace if one.namespace != DEFAULT_TENANT else namespace or DEFAULT_TENANT,
        partition=one.partition if one.partition != DEFAULT_TENANT else partition or DEFAULT_TENANT,
    )


def _each(
    args: argparse.Namespace,
    services: Sequence[Service],
    change: Callable[[CatalogClient, Service], Awaitable[None]],
    done: str,
    doing: str,
) -> int:
    async def ask() -> int:
        said = msgspec.structs.replace(access(args), namespace="", partition="")
        async with CatalogClient(server_address(args), said) as client:
            for service in services:
                try:
                    await change(client, service)
                except (CatalogRefused, CatalogUnreachable) as error:
                    print(f'Error {doing} service "{service.id}": {error}', file=sys.stderr)
                    return 1
                print(f"{done} service: {service.id}")
        return 0

    return asyncio.run(ask())
