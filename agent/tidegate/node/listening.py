"""What the agent tells anybody on the network: GET /metrics, /healthz and /readyz, and nothing else.

Whoever reaches the port may be anybody: requests are bounded in number, bytes and time, each is answered once and its
connection closed, nothing that was sent is read beyond the head, and scrapes that come together are answered by one.
"""

import asyncio
import contextlib
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import NamedTuple

from tidegate.addresses import Endpoint
from tidegate.errors import TidegateError
from tidegate.kernel.errors import KernelError
from tidegate.node.log import Log
from tidegate.node.metrics import CONTENT_TYPE
from tidegate.node.pulse import Pulse

MAX_CONNECTIONS = 32
"""Further ones are closed unanswered."""
MAX_HEAD_BYTES = 8 << 10
DEADLINE_S = 10.0
"""From the first byte of a connection to the last of its answer: as long as Prometheus waits by default."""
FRESH_S = 0.2
"""A scrape so soon after another is answered by the same words."""

_REQUEST = re.compile(rb"([A-Z]+) (\S+) HTTP/1\.[01]\r?\n")
_TEXT = "text/plain; charset=utf-8"

log = Log("listening")


class _Answer(NamedTuple):
    status: HTTPStatus
    text: bytes
    content_type: str = _TEXT


@contextlib.asynccontextmanager
async def listening(
    place: Endpoint, exposition: Callable[[], Awaitable[bytes]], pulse: Pulse
) -> AsyncIterator[Endpoint]:
    """Answers meanwhile; yields where (port 0 asks for a free one). TidegateError when it cannot listen there."""
    site = _Site(exposition, pulse)
    try:
        server = await asyncio.start_server(
            site.serve, place.address, place.port, limit=MAX_HEAD_BYTES
        )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise TidegateError(f"cannot listen on {place}: {reason}") from error
    async with server:
        found = server.sockets[0].getsockname()
        try:
            yield Endpoint(found[0], found[1])
        finally:
            site.hang_up()


class _Site:
    def __init__(self, exposition: Callable[[], Awaitable[bytes]], pulse: Pulse) -> None:
        self._exposition = exposition
        self._pulse = pulse
        self._open: set[asyncio.StreamWriter] = set()
        self._scraping = asyncio.Lock()
        self._scraped = b""
        self._scraped_at = -FRESH_S

    def hang_up(self) -> None:
        """Ends every connection."""
        for writer in self._open:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        if len(self._open) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._answer(reader, writer)
        except (TimeoutError, ConnectionError):
            # It was too slow, or went away: nobody is there to be told.
            writer.transport.abort()
        finally:
            self._open.remove(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            answer, with_text = _told(HTTPStatus.BAD_REQUEST), True
        else:
            answer, with_text = await self._to(head)
        status, text, content_type = answer
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"Content-Type: {content_type}\r\n"
            f"Content-Length: {len(text)}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        if with_text:
            writer.write(text)
        await writer.drain()

    async def _to(self, head: bytes) -> tuple[_Answer, bool]:
        """The answer to a request, and whether its text is to be sent."""
        request = _REQUEST.match(head)
        if request is None:
            return _told(HTTPStatus.BAD_REQUEST), True
        method, target = request.groups()
        if method not in (b"GET", b"HEAD"):
            return _told(HTTPStatus.METHOD_NOT_ALLOWED), True
        return await self._page(target.partition(b"?")[0]), method == b"GET"

    async def _page(self, path: bytes) -> _Answer:
        match path:
            case b"/metrics":
                return await self._metrics()
            case b"/healthz":
                return _health(self._pulse.unwell())
            case b"/readyz":
                return _health(self._pulse.unready())
            case _:
                return _told(HTTPStatus.NOT_FOUND)

    async def _metrics(self) -> _Answer:
        async with self._scraping:
            if time.monotonic() - self._scraped_at >= FRESH_S:
                try:
                    self._scraped = await self._exposition()
                except (TidegateError, KernelError) as error:
                    log.warning("metrics cannot be told", reason=str(error))
                    return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
                self._scraped_at = time.monotonic()
            return _Answer(HTTPStatus.OK, self._scraped, CONTENT_TYPE)


def _told(status: HTTPStatus) -> _Answer:
    return _Answer(status, f"{status.phrase}\n".encode())


def _health(problem: str) -> _Answer:
    if problem:
        return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{problem}\n".encode())
    return _Answer(HTTPStatus.OK, b"ok\n")
