"""Requests to one server of the API, and its answers: bounded in time and size, errors in words.

Knows HTTP, token and TLS; nothing of what is asked.
"""

import re
from typing import Any, TypeVar

import aiohttp
import msgspec

from tidegate.catalog.access import Access
from tidegate.errors import InputError, TidegateError

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_TEXT = 2000
_ADDRESS = re.compile(r"unix:///.+|https?://[^/]+/?")

T = TypeVar("T")


class CatalogUnreachable(TidegateError):
    """No server answers at the address, or not in time."""


class CatalogRefused(TidegateError):
    """The server answered and said no: `status` is HTTP's, `text` the server's words."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text
        super().__init__(f"Unexpected response code: {status} ({text})")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    tag: str
    """ETag."""
    index: int
    """X-Consul-Index, 0 where there is none."""
    default_policy: str
    """X-Consul-Default-Acl-Policy: which action holds where no intention matches."""
    date: str
    """Date, as HTTP has it."""
    body: bytes
    source: str

    def decoded(self, shape: type[T]) -> T:
        """The body. CatalogRefused when it is something else."""
        try:
            return msgspec.json.decode(self.body, type=shape)
        except msgspec.DecodeError as error:
            raise not_understood(self.source, str(error)) from error


def not_understood(source: str, detail: str) -> CatalogRefused:
    return CatalogRefused(200, f"{source} answers something else than expected: {detail}")


class Transport:
    """Speaks to one server. `address` is unix:///path, http://host:port or https://host:port.

    Belongs to the event loop of its first request.
    """

    def __init__(self, address: str, access: Access) -> None:
        """InputError for an address of another form, and for a token or TLS files that cannot be read."""
        if not _ADDRESS.fullmatch(address):
            raise InputError(
                f"{address!r} is no server address",
                expected="unix:///path, http://host:port or https://host:port",
            )
        self.address = address
        self.access = access
        self._secret = access.secret()
        self._tls = access.tls() if address.startswith("https://") else None
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes the connections; the transport can be used again afterwards."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        limit_s: float = TIMEOUT_S,
    ) -> Answer:
        """The answer to a request. CatalogUnreachable, or CatalogRefused for any status but 200 and 304."""
        answer = await self._once(method, path, query, body, headers or {}, limit_s)
        if answer.status == 403 and (secret := self.access.secret()) != self._secret:
            self._secret = secret
            answer = await self._once(method, path, query, body, headers or {}, limit_s)
        if answer.status not in (200, 304):
            text = answer.body[:_MAX_ERROR_TEXT].decode(errors="replace").strip()
            raise CatalogRefused(answer.status, text)
        return answer

    async def _once(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None,
        body: dict[str, Any] | None,
        headers: dict[str, str],
        limit_s: float,
    ) -> Answer:
        if self._secret:
            headers = headers | {"X-Consul-Token": self._secret}
        try:
            async with self._open_session().request(
                method,
                self._base() + path,
                params=self.access.query | (query or {}),
                data=None if body is None else msgspec.json.encode(body),
                headers={"Content-Type": "application/json", **headers},
                timeout=aiohttp.ClientTimeout(total=limit_s),
                allow_redirects=False,
                server_hostname=self.access.server_name or None,
            ) as response:
                index = response.headers.get("X-Consul-Index", "")
                return Answer(
                    status=response.status,
                    tag=response.headers.get("ETag", ""),
                    index=int(index) if index.isdecimal() and len(index) < 20 else 0,
                    default_policy=response.headers.get("X-Consul-Default-Acl-Policy", ""),
                    date=response.headers.get("Date", ""),
                    body=await _bounded(response.content),
                    source=self.address,
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CatalogUnreachable(
                f"no server answers at {self.address} ({_reason(error, limit_s)})"
            ) from error

    def _base(self) -> str:
        return "http://server" if self.address.startswith("unix://") else self.address.rstrip("/")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self.address.startswith("unix://"):
                connector = aiohttp.UnixConnector(self.address.removeprefix("unix://"))
            else:
                connector = aiohttp.TCPConnector(ssl=self._tls or True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session


def _reason(error: Exception, limit_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"not within {limit_s:g} s"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or str(error.os_error)
    return str(error) or type(error).__name__


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    chunks = []
    size = 0
    async for chunk in content.iter_any():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise aiohttp.ClientPayloadError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
