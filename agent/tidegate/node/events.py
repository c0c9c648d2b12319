"""Waiting for one of several events."""

import asyncio


async def first_of(seconds: float | None, *events: asyncio.Event) -> None:
    """Waits for any of the events, or until the time is over, if there is one."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in waiting:
            future.cancel()
