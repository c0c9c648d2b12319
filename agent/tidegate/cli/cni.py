"""`tidegate cni`: the CNI plugin on this node: putting it there, keeping it there, taking it away."""

import argparse
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tidegate.cli.arguments import ExamplesFormatter, add_json
from tidegate.errors import TidegateError
from tidegate.node import cni_install, log
from tidegate.node.cni_install import Chained, Settings, State
from tidegate.workloads.cni import (
    ALWAYS_START,
    DEFAULT_SOCKET,
    CniConfig,
    OnAgentAbsent,
    check,
)

_WORDS = {
    Chained.LAST: "has the plugin as the last of its chain",
    Chained.NOT_LAST: "has the plugin, but not as the last of its chain",
    Chained.OTHER: "has the plugin with other settings",
    Chained.MISSING: "does not have the plugin",
    Chained.NO_CHAIN: "",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command group `cni`."""
    group = subparsers.add_parser(
        "cni", help="the CNI plugin, which has containers redirected before they start"
    )
    commands = group.add_subparsers(dest="cni_command", required=True, metavar="COMMAND")
    install = commands.add_parser(
        "install",
        help="put the plugin on this node and into its network configuration",
        description="Copies the plugin, and makes it the last of the chain in the network configuration that container"
        " runtimes take: the first file of the directory. What was there is kept for `tidegate cni uninstall`.",
        formatter_class=ExamplesFormatter,
        epilog="examples:\n  tidegate cni install --keep\n  tidegate cni install --replace-consul-cni\n"
        "  tidegate cni install --no-chain    (for multus)",
    )
    add_directories(install)
    _add_settings(install)
    install.add_argument(
        "--keep",
        action="store_true",
        help="stay, wait where there is no network configuration, and put the plugin back when another program rewrites"
        " it; SIGTERM ends that and takes nothing away",
    )
    install.set_defaults(run=run_install)
    uninstall = commands.add_parser(
        "uninstall",
        help="take the plugin away",
        description="Takes the plugin out of the network configuration, which is then as it was, and removes it.",
    )
    add_directories(uninstall)
    uninstall.set_defaults(run=run_uninstall)
    status = commands.add_parser(
        "status",
        help="whether the plugin is there and in the chain",
        description="Exits 1 when containers do not go through the plugin of this version.",
    )
    add_directories(status)
    _add_settings(status)
    add_json(status)
    status.set_defaults(run=run_status)


def run_install(args: argparse.Namespace) -> int:
    """Installs once, or until told to stop."""
    settings = _settings(args)
    if args.keep:
        log.set_up()
        stop, told = os.pipe()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os.write(told, b"\0"))
        cni_install.Upkeep(settings).run(stop)
        return 0
    state = cni_install.install(settings)
    _print(_sentences(state, settings))
    if settings.chain and state.chained is Chained.NO_CHAIN:
        raise TidegateError(
            f"{settings.conf_dir} has no network configuration that the plugin could be chained into;"
            " with --keep it is waited for"
        )
    return 0


def run_uninstall(args: argparse.Namespace) -> int:
    """Takes the plugin away."""
    _print(cni_install.uninstall(args.conf_dir, args.bin_dir) or ("nothing was installed",))
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Tells what is there."""
    settings = _settings(args)
    state = cni_install.look(settings)
    if args.json:
        print(json.dumps(msgspec.to_builtins(state, enc_hook=str)))
    else:
        _print(_sentences(state, settings))
    return 0 if cni_install.is_as_wanted(state, settings) else 1


def add_directories(parser: argparse.ArgumentParser) -> None:
    """Adds --conf-dir and --bin-dir."""
    parser.add_argument(
        "--conf-dir",
        type=Path,
        default=cni_install.DEFAULT_CONF_DIR,
        metavar="DIR",
        help="where the runtime looks for network configurations (default: %(default)s)",
    )
    parser.add_argument(
        "--bin-dir",
        type=Path,
        default=cni_install.DEFAULT_BIN_DIR,
        metavar="DIR",
        help="where the runtime looks for plugins (default: %(default)s)",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cni-socket",
        type=Path,
        default=DEFAULT_SOCKET,
        metavar="PATH",
        help="where the plugin finds the agent: its setting cni.socket (default: %(default)s)",
    )
    parser.add_argument(
        "--on-agent-absent",
        type=OnAgentAbsent,
        choices=list(OnAgentAbsent),
        default=OnAgentAbsent.FAIL,
        help="what becomes of containers that start while the agent does not answer: the runtime tries again, or they"
        " start as if there was no plugin (default: fail)",
    )
    parser.add_argument(
        "--always-start",
        action="append",
        metavar="NAMESPACE",
        help="a namespace whose pods start without the agent in any case; may be repeated (default:"
        f" {', '.join(ALWAYS_START)})",
    )
    parser.add_argument(
        "--replace-consul-cni",
        action="store_true",
        help="take Consul's plugin out of the chain: this one does the same for its pods",
    )
    parser.add_argument(
        "--no-chain",
        action="store_true",
        help="only copy the plugin, for a network configuration that somebody else makes",
    )


def _settings(args: argparse.Namespace) -> Settings:
    check(CniConfig(socket=args.cni_socket), "--cni-socket")
    return Settings(
        conf_dir=args.conf_dir,
        bin_dir=args.bin_dir,
        chain=not args.no_chain,
        replace_consul=args.replace_consul_cni,
        socket=args.cni_socket,
        on_agent_absent=args.on_agent_absent,
        always_start=tuple(args.always_start or ALWAYS_START),
    )


def _sentences(state: State, settings: Settings) -> Iterable[str]:
    if not state.plugin_is_there:
        yield f"{state.plugin} is not there"
    elif not state.plugin_is_ours:
        yield f"{state.plugin} is of another version than this command"
    else:
        yield f"{state.plugin} is there"
    if settings.chain and state.configuration is None:
        yield f"{settings.conf_dir} has no network configuration that runtimes could use"
    elif settings.chain:
        yield f"{state.configuration} {_WORDS[state.chained]}"
    yield from state.problems


def _print(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(sentence)
