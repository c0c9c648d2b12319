"""What is wrong at the moment, by what it is about and whom: told once in the log, shown until it is cleared."""

import contextlib
from collections.abc import Iterator

from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.node.log import Log

log = Log("daemon")


class Problems:
    """Of one agent. `key` is a workload's id, or the directory of what a former agent left; "" for the whole agent."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._told.values()))

    def tell(self, what: str, problem: str, key: str = "") -> None:
        """This is wrong; logged when it is something new."""
        if self._told.get((what, key)) != problem:
            log.warning(problem)
        self._told[what, key] = problem

    def tell_defect(self, what: str, key: str, name: str, error: Exception) -> None:
        """What is done for a workload came upon a defect."""
        problem = f"{name} is not worked on, by a defect of the agent; see its log ({error!r})"
        if self._told.get((what, key)) != problem:
            log.exception(problem, error)
        self._told[what, key] = problem

    def clear(self, what: str, key: str = "") -> None:
        """This is well."""
        self._told.pop((what, key), None)

    def forget(self, key: str) -> None:
        """Nothing is wrong any more with a workload that is gone."""
        for about in [about for about in tuple(self._told) if about[1] == key]:
            self._told.pop(about, None)

    @contextlib.contextmanager
    def defects_told(self, what: str, key: str, name: str) -> Iterator[None]:
        """A defect in what is done for one workload is that workload's problem: the round goes on."""
        try:
            yield
        except (TidegateError, KernelError, OSError):
            raise
        except Exception as error:  # noqa: BLE001 - it is logged as the defect that it is
            self.tell_defect(what, key, name, error)
        else:
            self.clear(what, key)
