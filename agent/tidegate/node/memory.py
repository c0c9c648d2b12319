"""What an agent that returns must know of a workload that it did not redirect itself: a file in run_dir for each."""

from pathlib import Path

import msgspec

from tidegate.enforce.sidecar.spec import SidecarSpec
from tidegate.errors import TidegateError
from tidegate.intent.policy import Policy
from tidegate.kernel import netns
from tidegate.model import Workload
from tidegate.node.log import Log
from tidegate.state_files import write_atomically

_FILE = "memory.json"

log = Log("memory")


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One workload that is or was to be redirected."""

    workload: Workload
    policy: Policy
    spec: SidecarSpec | None = None
    """What the sidecar was last told to do; None where the agent runs none."""
    leaf_for: tuple[str, ...] = ()
    """SPIFFE URIs that the leaf certificates were fetched for."""
    leaf_from: float = 0.0
    """When they were fetched: their own notBefore lies earlier, for clocks that run behind."""
    leaf_until: float = 0.0
    """When the first of them ends."""
    leaf_root: str = ""
    """Which root they were issued by, as far as the server said."""
    redirected_in: netns.Identity | None = None
    """The namespace in which the rules were in force when an agent last looked."""
    listened_in: netns.Identity | None = None
    """The namespace in which a sidecar of the workload's own was seen to listen."""
    begun_at: float = 0.0
    """When the rules came into that namespace by this agent or a former one; 0 where that was not seen."""


class MemoryFile:
    """The file of one workload, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written = self.content = remembered(directory)

    def keep(self, memory: Memory) -> None:
        """Hold it, and write it down if it is something new. OSError when that cannot be: it holds all the same."""
        self.content = memory
        if memory != self._written or not (self._directory / _FILE).exists():
            self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            write_atomically(self._directory / _FILE, msgspec.json.encode(memory))
            self._written = memory

    def forget(self) -> None:
        """The directory is gone, and the file with it."""
        self._written = self.content = None


def remembered(directory: Path) -> Memory | None:
    """What a former agent knew; None when it knew nothing, or when that cannot be read."""
    path = directory / _FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Memory)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, TidegateError, OSError) as error:
        log.warning("what a former agent knew is unreadable", file=str(path), reason=str(error))
        return None
