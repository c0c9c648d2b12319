"""Questions to one API server, and its answers: bounded in time and size, errors in words.

Knows HTTP, tokens, TLS, lists in pages and watches (Kubernetes documentation, "Kubernetes API Concepts"); nothing of
what is asked for. Objects stay bytes: one that is wrong is the reader's concern, and says nothing about the others.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec

from tidegate.errors import InputError
from tidegate.kubeapi.access import ApiAccess
from tidegate.kubeapi.errors import UNREADABLE, ApiRefused, ApiTooLarge, ApiUnreachable

ANSWER_S = 30.0
"""How long a question may take; a watch, until it begins."""
IDLE_S = 130.0
"""How long a watch may be silent. A server sends a bookmark each minute; one that does not is only asked anew."""
PAGE = 100
"""Objects of one answer to a list, where the server keeps to it. It does not where a list of version 0 is asked for,
which comes from a cache without pages."""
SMALL_PAGE = 5
"""Objects of one answer where they turned out to be large. Of etcd's 1.5 MB each they are half of MAX_ANSWER_BYTES."""
MAX_ANSWER_BYTES = 16 << 20
MAX_EVENT_BYTES = 8 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_ERROR_TEXT = 500
_MAX_RETRY_AFTER_S = 60.0

# A server that went without a word is noticed within half a minute: linux/tcp.h.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a list."""

    items: tuple[msgspec.Raw, ...]
    version: str
    """Of the whole list, to watch from."""
    more: str
    """What the next part is asked for with, "" after the last."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a watch."""

    type: str
    """ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""
    object: msgspec.Raw


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    more: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: tuple[msgspec.Raw, ...] | None = None
    """null where Go has a list without elements."""


class _Cause(msgspec.Struct):
    reason: str = ""


class _Details(msgspec.Struct):
    causes: tuple[_Cause, ...] | None = None


class _Status(msgspec.Struct):
    """meta/v1 Status: why not."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None


class ApiClient:
    """Asks one API server. Belongs to the event loop of its first question."""

    def __init__(self, access: ApiAccess) -> None:
        self._access = access
        self._session: aiohttp.ClientSession | None = None

    @property
    def address(self) -> str:
        """Where the server is, for messages."""
        try:
            return self._access.address()
        except InputError:
            return "an unknown address"

    async def close(self) -> None:
        """Ends the connections; the client can be used again afterwards."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, path: str, *, limit_s: float = ANSWER_S) -> bytes | None:
        """One object as JSON, None when there is none of that name. ApiError when nobody can say."""
        try:
            async with self._answer(path, {}, limit_s) as response:
                return await _bounded(response, MAX_ANSWER_BYTES)
        except ApiRefused as error:
            if error.status == 404 and error.reason == "NotFound":
                return None
            raise

    async def page(self, path: str, query: Mapping[str, str], limit: int = PAGE) -> Page:
        """One part of a list, of at most `limit` objects where the server keeps to that. ApiError."""
        async with self._answer(path, {**query, "limit": str(limit)}, ANSWER_S) as response:
            body = await _bounded(response, MAX_ANSWER_BYTES)
        try:
            found = msgspec.json.decode(body, type=_List)
        except UNREADABLE as error:
            raise self.nonsense(f"no list: {error}") from error
        return Page(
            items=found.items or (),
            version=found.metadata.resource_version,
            more=found.metadata.more,
        )

    @contextlib.asynccontextmanager
    async def watch(
        self, path: str, query: Mapping[str, str]
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """What happens from now on, until the server ends it. ApiError, also in the middle, or after IDLE_S of silence.

        An ERROR that the server sends in place of an event is raised as ApiRefused.
        """
        async with self._answer(path, {**query, "watch": "1"}, None) as response:
            connection = response.connection
            if connection is not None and connection.transport is not None:
                _keep_alive(connection.transport.get_extra_info("socket"))
            yield self._events(response)

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
        async for line in _lines(response):
            yield self._event(line)

    def _event(self, line: bytes) -> Event:
        try:
            event = msgspec.json.decode(line, type=Event)
        except UNREADABLE as error:
            raise self.nonsense(f"no event: {error}") from error
        if event.type == "ERROR":
            raise self._refused(0, bytes(event.object), 0.0)
        return event

    @contextlib.asynccontextmanager
    async def _answer(
        self, path: str, query: Mapping[str, str], limit_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """`limit_s` bounds the whole answer; None is for a watch, whose beginning and silences are bounded."""
        try:
            headers = {"Accept": "application/json"}
            if token := self._access.token():
                headers["Authorization"] = f"Bearer {token}"
            address, session = self._access.address(), self._opened()
        except InputError as error:
            raise ApiUnreachable(str(error)) from error
        try:
            request = session.get(
                address + path,
                params=query,
                headers=headers,
                timeout=aiohttp.ClientTimeout(
                    total=limit_s, sock_connect=ANSWER_S, sock_read=IDLE_S
                ),
                allow_redirects=False,
            )
            async with asyncio.timeout(ANSWER_S):
                response = await request
            async with response:
                if response.status != 200:
                    body = await _bounded(response, _MAX_ERROR_BYTES)
                    raise self._refused(response.status, body, _retry_after(response), path)
                yield response
        except _TooLargeError as error:
            raise ApiTooLarge(self.address, error.limit) from error
        except aiohttp.ClientConnectorCertificateError as error:
            # The file with the CA is read when a session begins, and the cluster may have another CA by now.
            await self.close()
            raise self._unreachable(
                f"its certificate is not trusted: {error.certificate_error}"
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise self._unreachable(error.os_error.strerror or str(error.os_error)) from error
        except TimeoutError as error:
            raise self._unreachable("not in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(str(error) or type(error).__name__) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            tls = self._access.address().startswith("https://")
            connector = aiohttp.TCPConnector(ssl=self._access.tls() if tls else True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    def _unreachable(self, why: str) -> ApiUnreachable:
        return ApiUnreachable(f"no Kubernetes API server answers at {self.address} ({why})")

    def nonsense(self, what: str) -> ApiRefused:
        """That the server sends something that it should not."""
        return ApiRefused(200, "", f"the Kubernetes API server at {self.address} sends {what}")

    def _refused(
        self, status: int, body: bytes, retry_after_s: float, path: str = ""
    ) -> ApiRefused:
        """What an answer that is no success says; `status` 0 is that of the Status object itself.

        What is not there at all, such as custom resources, the server does not name: then `path` does.
        """
        try:
            said = msgspec.json.decode(body, type=_Status)
        except UNREADABLE:
            text = " ".join(body[:_MAX_ERROR_TEXT].decode(errors="replace").split())
            said = _Status(message=text)
        code = status or said.code
        message = ascii(said.message[:_MAX_ERROR_TEXT])[1:-1] or "no reason given"
        if code == 404 and path:
            message = f"{message} ({path})"
        causes = said.details.causes if said.details and said.details.causes else ()
        return ApiRefused(
            code,
            said.reason,
            f"the Kubernetes API server at {self.address} refuses with {code}: {message}",
            retry_after_s=retry_after_s,
            causes=" ".join(cause.reason for cause in causes),
        )


class _TooLargeError(Exception):
    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


def _retry_after(response: aiohttp.ClientResponse) -> float:
    text = response.headers.get("Retry-After", "")
    seconds = float(text) if text.isdecimal() and len(text) < 10 else 0.0
    return min(seconds, _MAX_RETRY_AFTER_S)


def _keep_alive(connection: Any) -> None:
    if connection is None:
        return
    for level, name, value in _KEEPALIVE:
        # It may have been closed by now; what is read from it next says so.
        with contextlib.suppress(OSError):
            connection.setsockopt(level, name, value)


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            raise _TooLargeError(limit)
    return bytes(content)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines that are not empty."""
    begun = bytearray()
    async for chunk in response.content.iter_any():
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            line = bytes(begun) + end
            begun.clear()
            if line.strip():
                yield line
        begun += rest
        if len(begun) > MAX_EVENT_BYTES:
            raise _TooLargeError(MAX_EVENT_BYTES)
    if begun.strip():
        raise aiohttp.ClientPayloadError("its answer ends in the middle of an event")
