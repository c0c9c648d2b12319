"""Client of an agent's local API, for the command line and for the agents of other nodes."""

import errno
import os
import ssl
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from tidegate.errors import TidegateError

TIMEOUT_S = 30.0
"""More than an agent waits for the intent server and then for the agents of other nodes."""
MAX_ANSWER_BYTES = 64 << 20
MAX_LINE_BYTES = 4 << 20
"""Of a streamed answer: an event with the reasons of the largest verdict."""


class AgentUnreachable(TidegateError):
    """No agent answers at that address. Exits 2, as nothing is known then: 1 is an answer."""

    exit_code = 2


class AgentRefused(TidegateError):
    """The agent understood and said no; `exit_code` is what the command should exit with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class AgentClient:
    """Speaks to one agent. `address` is unix:///path or https://host:port; an answer may take `timeout_s`."""

    def __init__(
        self, address: str, timeout_s: float = TIMEOUT_S, tls: ssl.SSLContext | None = None
    ) -> None:
        """`tls` is for https: whom it trusts, and by what certificate the other end knows this one."""
        self.address = address
        self._timeout_s = timeout_s
        connector: aiohttp.BaseConnector
        if address.startswith("unix://"):
            connector = aiohttp.UnixConnector(address.removeprefix("unix://"))
            self._base = "http://agent"
        else:
            connector = aiohttp.TCPConnector(ssl=tls or True)
            self._base = address.rstrip("/")
        self._session = aiohttp.ClientSession(connector=connector, read_bufsize=MAX_LINE_BYTES)

    async def __aenter__(self) -> "AgentClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def get(self, path: str, **query: str) -> Any:
        """The decoded JSON answer to GET `path`."""
        try:
            async with self._session.get(
                self._base + path, params=query, timeout=aiohttp.ClientTimeout(self._timeout_s)
            ) as response:
                return await _answer(response)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from error

    async def stream(self, path: str, body: dict[str, object]) -> AsyncIterator[dict[str, Any]]:
        """POSTs `body` and yields each JSON line of the answer as it comes."""
        try:
            async with self._session.post(
                self._base + path,
                data=msgspec.json.encode(body),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s),
            ) as response:
                if response.status != 200:
                    await _answer(response)
                async for line in response.content:
                    yield _decoded(line)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> AgentUnreachable:
        return AgentUnreachable(f"no agent answers at {self.address} ({self._reason(error)})")

    def _reason(self, error: Exception) -> str:
        """What happened, without what the HTTP library tells of itself."""
        if isinstance(error, TimeoutError):
            return f"nothing came within {self._timeout_s:g} s"
        number = error.errno if isinstance(error, OSError) else None
        # A name that is not found has a number below zero, of getaddrinfo(3).
        if number is not None and number > 0:
            ended = ": it has ended, and its log says why" if number == errno.ECONNREFUSED else ""
            return os.strerror(number).lower() + ended
        return str(error) or type(error).__name__


async def _answer(response: aiohttp.ClientResponse) -> Any:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise AgentRefused("the agent's answer is too large", 1)
    if response.status == 200:
        return _decoded(body)
    try:
        failure = msgspec.json.decode(body)
        message, exit_code = str(failure["error"]), int(failure["exit_code"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        message, exit_code = f"the agent answered {response.status}: {bytes(body[:200])!r}", 1
    raise AgentRefused(message, exit_code)


def _decoded(body: bytes | bytearray) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AgentRefused(f"the agent's answer is not whole or no JSON: {error}", 1) from error
