"""Waiting for one of several events."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class StoppedError(Exception):
    """It came to an event before the answer that was waited for."""


async def first_of(seconds: float | None, *events: asyncio.Event) -> None:
    """Waits for any of the events, or until the time is over, if there is one."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in waiting:
            future.cancel()


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T:
    """What the work gives. StoppedError when the event is set before that; the work is cancelled then."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise StoppedError
        return working.result()
    finally:
        for future in (working, waiting):
            future.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)
