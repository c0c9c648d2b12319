"""The agent as a process: its directories and sockets held, the parts of it started and stopped in their order."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from tidegate.addresses import Endpoint
from tidegate.catalog.client import CatalogClient
from tidegate.catalog.settings import ServerConfig
from tidegate.errors import InputError, TidegateError
from tidegate.kernel.memory import use_one_arena
from tidegate.node import api, notify
from tidegate.node.config import AgentConfig
from tidegate.node.daemon import Daemon
from tidegate.node.events import first_of
from tidegate.node.holding import held_alone
from tidegate.node.listening import listening
from tidegate.node.log import Log
from tidegate.node.standby import stand_by

_FOR_LIFE = (
    "node",
    "run_dir",
    "state_dir",
    "bpffs",
    "server",
    "embedded_server",
    "trust_domain",
    "datacenter",
)
"""What an agent holds, or is known by, as long as it runs."""

log = Log("daemon")


async def run_agent(
    config: AgentConfig,
    *,
    stands_by: bool = False,
    reread: Callable[[], AgentConfig] | None = None,
) -> None:
    """Runs until SIGTERM or SIGINT. TidegateError or KernelError when the agent cannot start.

    Where another agent runs on this node already, one that `stands_by` begins when that ends. At SIGHUP it goes on by
    what `reread` gives; what cannot be used, and what only a restart can change, is told and leaves all as it is.
    """
    use_one_arena()
    _make_directories(config)
    stop, asked = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    if stands_by:
        await stand_by(config, stop)
    if stop.is_set():
        return
    async with contextlib.AsyncExitStack() as stack:
        for directory in (config.run_dir, config.state_dir, config.bpffs):
            stack.enter_context(held_alone(directory))
        if config.embedded_server is not None:
            await stack.enter_async_context(_embedded(config.embedded_server))
        wanted: AgentConfig | None = config
        while wanted is not None:
            config = wanted
            wanted = await _run(config, stop, _Rereading(config, reread, asked))
        notify.stopping()
    log.info("agent stopped; rules, programs and sidecars stay", node=config.node)


class _Rereading:
    """When somebody asks for it, the configuration as it is by then."""

    def __init__(
        self,
        config: AgentConfig,
        reread: Callable[[], AgentConfig] | None,
        asked: asyncio.Event,
    ) -> None:
        self._config = config
        self._reread = reread
        self._asked = asked

    async def next(self, stop: asyncio.Event) -> AgentConfig | None:
        """Waits for another configuration that can be used; None when it is to stop."""
        while not stop.is_set():
            await first_of(None, stop, self._asked)
            if self._asked.is_set():
                self._asked.clear()
                notify.reloading()
                try:
                    return self._read()
                except TidegateError as error:
                    problem = f"the configuration stays as it was: {error}"
                    log.warning(problem)
                    notify.status(problem)
                    notify.ready()
        return None

    def _read(self) -> AgentConfig:
        if self._reread is None:
            return self._config
        found = self._reread()
        fixed = [name for name in _FOR_LIFE if getattr(found, name) != getattr(self._config, name)]
        if fixed:
            raise InputError(
                "cannot change while the agent runs",
                field=", ".join(fixed),
                expected="a restart, which loses nothing",
            )
        notify.status("")
        return found


async def _run(
    config: AgentConfig, stop: asyncio.Event, rereading: _Rereading
) -> AgentConfig | None:
    """Runs by one configuration; the next one, None when it is to stop."""
    end = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        # Whoever cannot listen there has touched nothing else.
        api.make_room(config.socket)
        catalog = await stack.enter_async_context(CatalogClient(config.server, config.consul))
        daemon = await Daemon.open(config, catalog)
        stack.push_async_callback(daemon.close)
        runner = web.AppRunner(daemon.app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await stack.enter_async_context(
            api.serving_at(config.socket, lambda listener: _site(runner, listener))
        )
        if config.metrics:
            place = Endpoint.of(config.metrics)
            await stack.enter_async_context(listening(place, daemon.exposition, daemon.pulse))
        log.info("agent started", node=config.node, server=config.server)
        following = asyncio.create_task(rereading.next(stop))
        following.add_done_callback(lambda _: end.set())
        try:
            await daemon.run(end)
            return await following
        finally:
            following.cancel()


@contextlib.asynccontextmanager
async def _embedded(config: ServerConfig) -> AsyncIterator[None]:
    """The intent server in this process. Agents without one do without its CA, which takes memory."""
    from tidegate.catalog.server import running

    async with running(config):
        yield


def _make_directories(config: AgentConfig) -> None:
    """The proxy user has to pass run_dir to its sidecar's directory; nobody has to see the rest."""
    for directory, mode in (
        (config.run_dir, 0o711),
        (config.run_dir / "sidecars", 0o711),
        (config.state_dir, 0o700),
        (config.bpffs, 0o700),
    ):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(mode)
        except OSError as error:
            hint = "" if directory != config.bpffs else "; is a BPF file system mounted there?"
            raise TidegateError(f"{directory} cannot be used: {error.strerror}{hint}") from error


@contextlib.asynccontextmanager
async def _site(runner: web.AppRunner, listener: socket.socket) -> AsyncIterator[None]:
    site = web.SockSite(runner, listener)
    await site.start()
    try:
        yield
    finally:
        await site.stop()
