"""Standing by while another agent runs on this node: what an upgrade without a gap begins with.

A DaemonSet that surges ends the old agent only when the new one is ready, and the new one can begin only when the old
one has let go. So the new one says that it is ready as soon as it could take over, and does in the moment in which the
old one ends. Rules, programs and counts stay in the kernel meanwhile.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from tidegate.addresses import Endpoint
from tidegate.errors import TidegateError
from tidegate.kernel.memory import give_back
from tidegate.node.config import AgentConfig
from tidegate.node.events import first_of
from tidegate.node.listening import listening
from tidegate.node.log import Log
from tidegate.node.pulse import Pulse
from tidegate.observe.classifier import Classifier

POLL_S = 0.05
"""How long nobody may work on the node between two agents; flock(2) tells nobody who does not wait in the kernel."""

_FRAME = 64
"""Bytes of a packet that says nothing."""

log = Log("standby")


async def stand_by(config: AgentConfig, stop: asyncio.Event) -> None:
    """Returns when no other agent holds the directories, or `stop` is set.

    Meanwhile /healthz and /readyz are answered where the configuration says. TidegateError when that, or a directory,
    cannot be used; KernelError when the kernel refuses the programs: while another agent runs, nothing depends on them.
    """
    directories = (config.run_dir, config.state_dir, config.bpffs)
    if not _held(directories):
        return
    await asyncio.to_thread(try_programs)
    log.info("another agent runs on this node; standing by until it ends", node=config.node)
    async with AsyncExitStack() as stack:
        if config.metrics:
            pulse = _Waiting()
            place = Endpoint.of(config.metrics)
            await stack.enter_async_context(listening(place, _no_metrics, pulse))
        while _held(directories) and not stop.is_set():
            await first_of(POLL_S, stop)


def try_programs() -> None:
    """Loads the classifier beside the other agent's, and lets it go. KernelError when the kernel refuses it."""
    with contextlib.closing(Classifier.private(report=False, flows=1)) as classifier:
        classifier.programs[0].test_run(bytes(_FRAME))
    give_back()


class _Waiting(Pulse):
    """Of an agent that has nothing to do yet and could begin."""

    def unwell(self) -> str:
        return ""

    def unready(self) -> str:
        return ""


async def _no_metrics() -> bytes:
    raise TidegateError("standing by: another agent runs on this node, and has the metrics")


def _held(directories: Iterable[Path]) -> bool:
    return any(map(_is_held, directories))


def _is_held(directory: Path) -> bool:
    """Whether somebody has locked a directory (holding.py)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TidegateError(f"{directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
