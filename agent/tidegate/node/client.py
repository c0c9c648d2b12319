"""Client of an agent's local API, for the command line and for the agents of other nodes."""

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from tidegate.errors import TidegateError

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 << 20


class AgentUnreachable(TidegateError):
    """No agent answers at that address."""


class AgentRefused(TidegateError):
    """The agent understood and said no; `exit_code` is what the command should exit with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class AgentClient:
    """Speaks to one agent. `address` is unix:///path or http://host:port."""

    def __init__(self, address: str) -> None:
        self.address = address
        connector: aiohttp.BaseConnector
        if address.startswith("unix://"):
            connector = aiohttp.UnixConnector(address.removeprefix("unix://"))
            self._base = "http://agent"
        else:
            connector = aiohttp.TCPConnector()
            self._base = address.rstrip("/")
        self._session = aiohttp.ClientSession(connector=connector)

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
                self._base + path, params=query, timeout=aiohttp.ClientTimeout(TIMEOUT_S)
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
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S),
            ) as response:
                if response.status != 200:
                    await _answer(response)
                async for line in response.content:
                    yield msgspec.json.decode(line)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> AgentUnreachable:
        reason = str(error) or type(error).__name__
        return AgentUnreachable(f"no agent answers at {self.address} ({reason})")


async def _answer(response: aiohttp.ClientResponse) -> Any:
    if (response.content_length or 0) > MAX_ANSWER_BYTES:
        raise AgentRefused("the agent's answer is too large", 1)
    body = await response.read()
    if response.status == 200:
        return msgspec.json.decode(body)
    try:
        failure = msgspec.json.decode(body)
        message, exit_code = str(failure["error"]), int(failure["exit_code"])
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        message, exit_code = f"the agent answered {response.status}: {body[:200]!r}", 1
    raise AgentRefused(message, exit_code)
