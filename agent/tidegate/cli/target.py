"""Which tidegate a command speaks to: a node's agent, the intent server, or a lab on this machine.

Options win over environment variables, which win over what is found running. Where that leaves a choice,
the error lists it.
"""

import argparse
import os
import socket
from pathlib import Path

from tidegate.catalog.access import Access
from tidegate.errors import InputError, TidegateError
from tidegate.lab import state

AGENT_SOCKET = Path("/run/tidegate/agent.sock")
SERVER_SOCKET = Path("/run/tidegate/server.sock")


class CannotAsk(TidegateError):
    """Nobody answers to the end, or the user may not ask. Exits 2, as nothing is known then: 1 is an answer."""

    exit_code = 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the target."""
    group = parser.add_argument_group("where to ask (default: this node, or the lab that is up)")
    group.add_argument("--lab", metavar="NAME", help="the lab of that name (TIDEGATE_LAB)")
    group.add_argument("--socket", metavar="PATH", help="unix socket of an agent (TIDEGATE_SOCKET)")
    group.add_argument(
        "--http-addr",
        "-http-addr",
        metavar="ADDR",
        help="intent server: unix:///path, http://host:port, https://host:port or host:port"
        " (TIDEGATE_HTTP_ADDR; CONSUL_HTTP_ADDR where nothing of tidegate runs)",
    )


def add_access_options(parser: argparse.ArgumentParser) -> None:
    """Adds what Consul's commands take to reach a server (command/flags/http.go), with one dash or two."""
    group = parser.add_argument_group("how to ask the intent server, as Consul's commands")
    for name, metavar, text in (
        ("token", "TOKEN", "token of the request (CONSUL_HTTP_TOKEN)"),
        ("token-file", "FILE", "file with the token (CONSUL_HTTP_TOKEN_FILE)"),
        ("ca-file", "FILE", "PEM file of the CAs to trust (CONSUL_CACERT)"),
        ("client-cert", "FILE", "client certificate, PEM (CONSUL_CLIENT_CERT)"),
        ("client-key", "FILE", "its key, PEM (CONSUL_CLIENT_KEY)"),
        ("tls-server-name", "NAME", "whom its certificate is for (CONSUL_TLS_SERVER_NAME)"),
        ("datacenter", "NAME", "the datacenter that is meant"),
        ("namespace", "NAME", "the namespace that is meant (CONSUL_NAMESPACE)"),
        ("partition", "NAME", "the admin partition that is meant (CONSUL_PARTITION)"),
    ):
        group.add_argument(f"-{name}", f"--{name}", default="", metavar=metavar, help=text)
    group.add_argument(
        "-stale", "--stale", action="store_true", help="let any server answer what is read"
    )


def access(args: argparse.Namespace) -> Access:
    """How to speak to the intent server, by the options of `add_access_options`.

    Environment variables are Consul's. They count where an address is given: what is found running on this
    machine is another server than that which they are about.
    """
    heeded = os.environ if _given_address(args) else {}

    def said(option: str, variable: str) -> str:
        return str(getattr(args, option)) or heeded.get(variable, "")

    def file(option: str, variable: str) -> Path | None:
        text = said(option, variable)
        return Path(text) if text else None

    return Access(
        token=said("token", "CONSUL_HTTP_TOKEN"),
        token_file=None if args.token else file("token_file", "CONSUL_HTTP_TOKEN_FILE"),
        ca_file=file("ca_file", "CONSUL_CACERT"),
        client_cert=file("client_cert", "CONSUL_CLIENT_CERT"),
        client_key=file("client_key", "CONSUL_CLIENT_KEY"),
        server_name=said("tls_server_name", "CONSUL_TLS_SERVER_NAME"),
        datacenter=args.datacenter,
        namespace=said("namespace", "CONSUL_NAMESPACE"),
        partition=said("partition", "CONSUL_PARTITION"),
        stale=args.stale,
    )


def is_root() -> bool:
    """Whether the effective user is root."""
    return os.geteuid() == 0


def require_root(why: str) -> None:
    """Raises a CannotAsk, which says what a command does that others may not, unless the user is root."""
    if not is_root():
        raise CannotAsk(f"this needs root: {why}; try sudo")


def chosen_lab(args: argparse.Namespace) -> str | None:
    """The lab that the options or the environment name; None when they name none."""
    name: str | None = args.lab or os.environ.get("TIDEGATE_LAB")
    if name and not state.LabPaths(name).root.is_dir():
        running = ", ".join(state.labs()) or "none"
        raise InputError(f"no lab {name!r} is up (up: {running})", field="--lab")
    return name


def the_lab(args: argparse.Namespace) -> str:
    """The lab to use: the named one, else the only one that is up."""
    name = chosen_lab(args)
    if name:
        return name
    running = state.labs()
    if len(running) == 1:
        return running[0]
    if not running:
        raise TidegateError("no lab is up; `tidegate lab up` starts one")
    raise InputError(f"several labs are up: {', '.join(running)}", expected="--lab NAME")


def server_address(args: argparse.Namespace) -> str:
    """Address of the intent server, as CatalogClient takes it."""
    address = _given_address(args)
    if address:
        return _with_scheme(address)
    if chosen_lab(args) is None:
        if SERVER_SOCKET.exists():
            return f"unix://{SERVER_SOCKET}"
        if not state.labs():
            raise TidegateError(
                f"no intent server runs here: there is no {SERVER_SOCKET}, and no lab is up; expected --http-addr "
                "with the address of one, or a lab: `tidegate lab up`"
            )
    return f"unix://{state.LabPaths(the_lab(args)).server_socket}"


def _given_address(args: argparse.Namespace) -> str:
    """The address that the options or the environment name; CONSUL_HTTP_ADDR only where nothing of tidegate runs."""
    if args.http_addr or args.lab:
        return args.http_addr or ""
    named = os.environ.get("TIDEGATE_HTTP_ADDR", "")
    if named or os.environ.get("TIDEGATE_LAB") or SERVER_SOCKET.exists() or state.labs():
        return named
    return os.environ.get("CONSUL_HTTP_ADDR", "")


def _with_scheme(address: str) -> str:
    """Consul's commands take an address without a scheme; CONSUL_HTTP_SSL then says which."""
    if "://" in address:
        return address
    secure = os.environ.get("CONSUL_HTTP_SSL", "").lower() in ("1", "t", "true")
    return f"{'https' if secure else 'http'}://{address}"


def agent_address(args: argparse.Namespace) -> str:
    """Address of an agent that can answer for the whole mesh, as AgentClient takes it. CannotAsk when none does."""
    addresses = agent_addresses(args)
    for address in addresses:
        if _answers(address):
            return address
    raise CannotAsk(
        f"no agent answers at {' or '.join(addresses)}: it has ended, or is just beginning; `tidegate doctor` says "
        "what stands in its way, and its log (`journalctl -u tidegate-agent`, `kubectl logs`) why it ended"
    )


def agent_addresses(args: argparse.Namespace) -> tuple[str, ...]:
    """Addresses of the agents of the chosen place: one, or in a lab one for each node.

    CannotAsk where nothing of tidegate runs.
    """
    named: str | None = args.socket
    path = named or ("" if args.lab else os.environ.get("TIDEGATE_SOCKET"))
    if path:
        return (f"unix://{path}",)
    if chosen_lab(args) is None:
        if AGENT_SOCKET.exists():
            return (f"unix://{AGENT_SOCKET}",)
        if not state.labs():
            raise CannotAsk(
                f"no agent runs here: there is no {AGENT_SOCKET}, and no lab is up; start the agent "
                "(`systemctl start tidegate-agent`), name its socket with --socket, or try a lab: `tidegate lab up`"
            )
    paths = state.LabPaths(the_lab(args))
    return tuple(f"unix://{paths.agent_socket(node)}" for node in state.read_spec(paths).nodes)


def agents_of_this_machine() -> tuple[str, ...]:
    """Addresses of every agent that answers here: this node's own, and those of the labs that are up."""
    sockets = [AGENT_SOCKET]
    for lab in state.labs():
        sockets += sorted(state.LabPaths(lab).nodes.glob("*/agent.sock"))
    return tuple(filter(_answers, (f"unix://{path}" for path in sockets)))


def _answers(address: str) -> bool:
    """Whether somebody listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.removeprefix("unix://"))
        except OSError:
            return False
    return True
