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
        self._defects: list[BaseException] = []

    def submit(self, key: str, work: Callable[[], None]) -> bool:
        """Have the work done for a workload; False, and it is not done, while other work for it goes on."""
        with self._lock:
            if self._is_busy(key):
                return False
            begun = self._executor.submit(work)
            self._begun[key] = begun
        begun.add_done_callback(self._note)
        return True

    def is_busy(self, key: str) -> bool:
        """Whether work for a workload goes on, or waits for a thread."""
        with self._lock:
            return self._is_busy(key)

    def wait(self, keys: Iterable[str], timeout_s: float) -> None:
        """Wait until nothing goes on for these workloads, `timeout_s` seconds at most."""
        with self._lock:
            begun = [self._begun[key] for key in keys if key in self._begun]
        concurrent.futures.wait(begun, timeout_s)

    def forget(self, key: str) -> None:
        """There will be no more work for this workload."""
        with self._lock:
            self._begun.pop(key, None)

    def raise_defect(self) -> None:
        """Raise an exception that came out of some work since it was asked last, if any did."""
        with self._lock:
            defect = self._defects.pop() if self._defects else None
            self._defects.clear()
        if defect is not None:
            raise defect

    def close(self) -> None:
        """Begin nothing any more, and wait for what goes on."""
        self._executor.shutdown(cancel_futures=True)

    def _is_busy(self, key: str) -> bool:
        begun = self._begun.get(key)
        return begun is not None and not begun.done()

    def _note(self, ended: "concurrent.futures.Future[None]") -> None:
        if not ended.cancelled() and (defect := ended.exception()) is not None:
            with self._lock:
                self._defects.append(defect)
