"""How a command that watches is told to end: by a signal, and then it prints what it has seen."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ENDINGS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def told_to_end() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the next ones do what they always do."""
    end = threading.Event()
    before = {number: signal.getsignal(number) for number in _ENDINGS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def tell(_number: int, _frame: FrameType | None) -> None:
        end.set()
        restore()

    for number in _ENDINGS:
        signal.signal(number, tell)
    try:
        yield end
    finally:
        restore()
