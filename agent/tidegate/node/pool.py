"""Threads for the workloads of a node: several are worked on at the same time, each in one thread at a time.

So a workload in whose namespace everything takes long, by accident or because somebody there wants it so, costs the
others one thread of several and nothing else. Knows nothing of what the work is.
"""

import concurrent.futures
import threading
from collections.abc import Callable, Iterable

THREADS = 8
"""Of them one is taken, for up to some ten seconds at a time, by a workload in whose namespace nothing answers."""


class Pool:
    """May be called from any thread."""

    def __init__(self, threads: int = THREADS) -> None:
        self._executor = concurrent.futures.ThreadPoolExecutor(threads, "workload")
        self._lock = threading.Lock()
        self._begun: dict[str, concurrent.futures.Future[None]] = {}
        """What goes on, or waits for a thread."""
        self._defects: dict[str, Exception] = {}

    def submit(self, key: str, work: Callable[[], None]) -> bool:
        """Have the work done for a workload; False, and it is not done, while other work for it goes on."""
        with self._lock:
            if key in self._begun:
                return False
            self._begun[key] = self._executor.submit(self._run, key, work)
        return True

    def is_busy(self, key: str) -> bool:
        """Whether work for a workload goes on, or waits for a thread."""
        with self._lock:
            return key in self._begun

    def wait(self, keys: Iterable[str], timeout_s: float) -> None:
        """Wait until nothing goes on for these workloads, `timeout_s` seconds at most."""
        with self._lock:
            begun = [self._begun[key] for key in keys if key in self._begun]
        concurrent.futures.wait(begun, timeout_s)

    def defects(self) -> dict[str, Exception]:
        """What came out of the work for workloads since that was asked last: the latest exception of each."""
        with self._lock:
            defects, self._defects = self._defects, {}
        return defects

    def close(self) -> None:
        """Begin nothing any more, and wait for what goes on."""
        self._executor.shutdown(cancel_futures=True)

    def _run(self, key: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as defect:  # noqa: BLE001 - whoever asks for defects is told
            with self._lock:
                self._defects[key] = defect
        finally:
            with self._lock:
                del self._begun[key]
