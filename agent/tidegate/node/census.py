"""Which workloads this node has: what its sources tell, put together once in each round.

Each source is asked in a thread of its own. One that does not answer in time, or comes upon a defect, costs nothing but
its news: what it told before holds until it answers. What no source knows of a workload the kernel is asked for.
"""

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from tidegate.kernel import links, netns
from tidegate.kernel.errors import KernelError
from tidegate.model import Workload
from tidegate.node.log import Log
from tidegate.node.pool import Pool
from tidegate.node.problems import Problems
from tidegate.state_files import write_atomically
from tidegate.workloads.merge import Merged, merge
from tidegate.workloads.source import Description, LeftAlone, Source, Treatment

PATIENCE_S = 0.3
"""How long a round waits for the sources; they go on beside later rounds."""
SILENT_S = 2.0
"""A source that takes longer is told as a problem."""
ADDRESSES_S = 30.0
"""How often the kernel is asked again for addresses that no source knows; while there are none, in each round."""

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESRCH)

log = Log("census")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What one source said when it was asked last."""

    descriptions: tuple[Description, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    problems: tuple[str, ...] = ()
    is_complete: bool = False


class _Asked:
    """One source, and how it has answered."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.answer = Answer()
        self.asked_at = 0.0
        self.defect = ""
        self.is_silent = False

    def ask(self) -> None:
        """Runs in the source's thread."""
        descriptions = self.source.list()
        self.answer = Answer(
            descriptions=descriptions,
            left_alone=self.source.left_alone(),
            problems=self.source.problems(),
            is_complete=self.source.is_complete,
        )
        self.defect = ""


class Census:
    """The sources of one node. `take` is called from one thread; the rest from any."""

    def __init__(
        self,
        node: str,
        sources: Mapping[str, Source],
        aliases_file: Path,
        problems: Problems,
        is_leaving: Callable[[netns.Identity], bool] = lambda _place: False,
    ) -> None:
        """`sources` by what a person calls them; `is_leaving` says of which namespaces the workload ends, although
        sources may still tell of it: they count as gone.
        """
        self._node = node
        self._asked = {name: _Asked(source) for name, source in sources.items()}
        self._pool = Pool(max(1, len(self._asked)))
        self._problems = problems
        self._is_leaving = is_leaving
        self._of_node = _namespaces_of_node()
        self._merged = Merged()
        self._places: dict[str, netns.Identity] = {}
        """Where each path led when it was last looked at."""
        self._addresses: dict[str, tuple[netns.Identity | None, float, tuple[str, ...]]] = {}
        """By id of the workload: where and when the kernel was asked, and what it said."""
        self._logged: frozenset[str] = frozenset()
        """The problems of the last round, which are told in the log."""
        self._logged_left: frozenset[str] = frozenset()
        """Ids of what was left alone in the last round."""
        self._aliases_file = aliases_file
        self._aliases = self._recall()

    def close(self) -> None:
        """Asks nothing any more."""
        self._pool.close()

    @property
    def is_complete(self) -> bool:
        """Whether a workload that is not among those of the last `take` is gone."""
        return all(
            one.answer.is_complete and not one.defect and not one.is_silent
            for one in self._asked.values()
        )

    @property
    def left_alone(self) -> tuple[LeftAlone, ...]:
        """What sources know and do not look after."""
        told = (one for asked in self._asked.values() for one in asked.answer.left_alone)
        return (*told, *self._merged.left_alone)

    def problems(self) -> tuple[str, ...]:
        """What sources could not find out, and where they contradict each other."""
        told = (problem for one in self._asked.values() for problem in one.answer.problems)
        return (*told, *self._merged.problems)

    def take(self) -> tuple[Workload, ...]:
        """All workloads, as they are understood now."""
        self._ask()
        places: dict[str, netns.Identity] = {}

        def place_of(path: str) -> netns.Identity | None:
            if path not in places:
                found = self._place_of(path)
                if found is None:
                    return None
                places[path] = found
            return places[path]

        before = {one.id: one for one in self._merged.workloads}
        excluded = {
            one.id
            for asked in self._asked.values()
            for one in asked.answer.left_alone
            if one.treatment is Treatment.EXCLUDED
        }
        told = [
            one
            for asked in self._asked.values()
            for one in asked.answer.descriptions
            # A CNI call goes by what was configured then.
            if one.id not in excluded
        ]
        merged = merge(
            told,
            place_of,
            node=self._node,
            before=before,
            aliases=self._aliases,
            of_node=self._of_node,
        )
        self._places = places
        workloads = self._with_addresses(merged.workloads, place_of)
        self._merged = msgspec.structs.replace(merged, workloads=workloads)
        self._remember(merged.aliases, told)
        self._log_news()
        return workloads

    def _ask(self) -> None:
        now = time.monotonic()
        for name, one in self._asked.items():
            if self._pool.submit(name, one.ask):
                one.asked_at = now
        self._pool.wait(self._asked, PATIENCE_S)
        for name, defect in self._pool.defects().items():
            self._asked[name].defect = repr(defect)
            self._problems.tell_defect("source defect", name, f"the source {name}", defect)
        for name, one in self._asked.items():
            silent_s = time.monotonic() - one.asked_at
            one.is_silent = self._pool.is_busy(name)
            if one.is_silent and silent_s > SILENT_S:
                # Without its number of seconds, which would be something new to log in each round.
                self._problems.tell("source", f"{name} takes long to tell its workloads", name)
            elif not one.is_silent:
                self._problems.clear("source", name)
            if not one.defect:
                self._problems.clear("source defect", name)

    def _place_of(self, path: str) -> netns.Identity | None:
        try:
            found: netns.Identity | None = netns.identity(path)
        except KernelError as error:
            if error.errno in _GONE:
                return None
            # What cannot be looked at is not gone.
            found = self._places.get(path)
        return None if found is None or self._is_leaving(found) else found

    def _log_news(self) -> None:
        problems, left_alone = self.problems(), self.left_alone
        for problem in problems:
            if problem not in self._logged:
                log.warning(problem)
        for one in left_alone:
            if one.id not in self._logged_left:
                log.info(
                    "left alone",
                    workload=one.name,
                    namespace=one.namespace,
                    treatment=one.treatment,
                    reason=one.reason,
                )
        self._logged = frozenset(problems)
        self._logged_left = frozenset(one.id for one in left_alone)

    def _with_addresses(
        self,
        workloads: tuple[Workload, ...],
        place_of: Callable[[str], netns.Identity | None],
    ) -> tuple[Workload, ...]:
        """The kernel's addresses where no source has any."""
        asked, self._addresses = self._addresses, {}
        now = time.monotonic()
        filled = []
        for one in workloads:
            if one.addresses:
                filled.append(one)
                continue
            place = place_of(one.netns)
            where, at, addresses = asked.get(one.id, (None, 0.0, ()))
            if where != place or not addresses or now - at > ADDRESSES_S:
                addresses, at = _addresses_of(one) if place else (), now
            self._addresses[one.id] = place, at, addresses
            filled.append(msgspec.structs.replace(one, addresses=addresses))
        return tuple(filled)

    def _remember(self, aliases: dict[str, str], told: Iterable[Description]) -> None:
        """Aliases outlive what they were found by: a source may be away when the agent comes back."""
        if self.is_complete:
            ids = {one.id for one in told} | {one.id for one in self._merged.workloads}
            kept = {one: by for one, by in self._aliases.items() if one in ids or by in ids}
        else:
            kept = self._aliases
        wanted = kept | aliases
        if wanted == self._aliases:
            return
        self._aliases = wanted
        try:
            write_atomically(self._aliases_file, msgspec.json.encode(wanted))
        except OSError as error:
            self._problems.tell(
                "aliases", f"{self._aliases_file} cannot be written: {error.strerror}"
            )
        else:
            self._problems.clear("aliases")

    def _recall(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._aliases_file.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            file = str(self._aliases_file)
            log.warning("ids of before are unreadable", file=file, reason=str(error))
            return {}


def _namespaces_of_node() -> frozenset[netns.Identity]:
    """The agent's own network namespace, and that of the machine's first process, where that may be seen."""
    found = {netns.identity(netns.CURRENT)}
    with contextlib.suppress(KernelError):
        found.add(netns.identity("/proc/1/ns/net"))
    return frozenset(found)


def _addresses_of(workload: Workload) -> tuple[str, ...]:
    """None while its namespace does not let itself be looked into: its keeper tells that."""
    try:
        return links.addresses(workload.netns, workload.interface)
    except KernelError:
        return ()
