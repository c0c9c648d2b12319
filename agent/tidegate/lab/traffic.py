"""The lab's applications: servers that answer, callers that check every answer and count.

Run inside a pod as `python -m tidegate.lab.traffic FILE`, where FILE is an AppConfig as JSON. Reads what only
root may read and binds its port, then becomes nobody. Knows addresses and protocols, nothing of meshes: what
stands between caller and server must not matter to either.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from tidegate.lab.spec import AppKind, CallKind
from tidegate.lab.state import AppStatistics, TargetStatistics

NOBODY = 65534
"""User and group that applications run as."""

WRITE_EVERY_S = 0.25
TRIGGER = signal.SIGUSR1
"""Makes every `manual` call of an application once."""

MAX_LINE_BYTES = 4096
MAX_BODY_BYTES = 1 << 16
MAX_CONNECTIONS = 4096
MAX_KEYS = 10_000
MAX_ERROR_CHARS = 200


class CallConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A spec.CallSpec with the names resolved."""

    target: str
    addresses: tuple[str, ...]
    """All addresses of the target; connections take turns."""
    answers: tuple[str, ...]
    """Names of the pods that may answer."""
    port: int
    kind: CallKind
    every_s: float | None
    keepalive: int
    timeout_s: float
    trusted_certificates: str = ""
    """PEM certificates of the targets that speak TLS of their own."""
    server_name: str = ""


class AppConfig(msgspec.Struct, frozen=True, kw_only=True):
    pod: str
    kind: AppKind
    ports: tuple[int, ...]
    """Where it answers, if its kind does."""
    statistics: str
    """File that the statistics are written to, in a directory that nobody may write to."""
    certificate: str = ""
    key: str = ""
    """Files with the certificate and key of an application of kind tls."""
    calls: tuple[CallConfig, ...] = ()


class WrongAnswerError(Exception):
    """The answer came and was not the right one."""


def main(argv: list[str]) -> int:
    """Be the application that the file describes, until SIGTERM."""
    config = msgspec.json.decode(Path(argv[1]).read_bytes(), type=AppConfig)
    statistics = Path(config.statistics)
    directory = os.open(statistics.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    contexts = [_client_context(call) for call in config.calls]
    tls = _server_context(config) if config.kind is AppKind.TLS else None
    listeners: list[socket.socket] = []
    for port in config.ports if config.kind.serves else ():
        try:
            listeners += _listen(port)
        except OSError as error:
            print(f"cannot listen on port {port}: {error.strerror}", file=sys.stderr)
            return 1
    _become_nobody()
    app = _App(config, listeners, tls, contexts, directory, statistics.name)
    asyncio.run(app.run())
    return 0


class _Store:
    """What an application of kind tcp keeps, for as long as it runs."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def answer(self, line: str, pod: str) -> str:
        match line.split(" "):
            case ["PING"]:
                return f"PONG {pod}"
            case ["SET", key, value]:
                if key not in self._values and len(self._values) >= MAX_KEYS:
                    del self._values[next(iter(self._values))]
                self._values[key] = value
                return "OK"
            case ["GET", key]:
                return f"VALUE {self._values[key]}" if key in self._values else "NONE"
            case _:
                return "ERROR expected PING, SET key value or GET key"


class _App:
    def __init__(
        self,
        config: AppConfig,
        listeners: list[socket.socket],
        tls: ssl.SSLContext | None,
        contexts: list[ssl.SSLContext | None],
        directory: int,
        statistics_name: str,
    ) -> None:
        self._config = config
        self._listeners = listeners
        self._tls = tls
        self._callers = [
            _Caller(config.pod, call, context)
            for call, context in zip(config.calls, contexts, strict=True)
        ]
        self._directory = directory
        self._statistics_name = statistics_name
        self._served = 0
        self._connections = 0
        self._store = _Store()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(TRIGGER, self._trigger)
        serve = self._serve_tcp if self._config.kind is AppKind.TCP else self._serve_http
        for listener in self._listeners:
            await asyncio.start_server(
                self._counted(serve), sock=listener, ssl=self._tls, limit=MAX_LINE_BYTES
            )
        tasks = [asyncio.create_task(caller.run()) for caller in self._callers]
        tasks.append(asyncio.create_task(self._write_forever()))
        stopped = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        self._write()
        for task in done - {stopped}:
            task.result()

    def _trigger(self) -> None:
        for caller in self._callers:
            caller.trigger()

    async def _write_forever(self) -> None:
        while True:
            self._write()
            await asyncio.sleep(WRITE_EVERY_S)

    def _write(self) -> None:
        statistics = AppStatistics(
            pod=self._config.pod,
            pid=os.getpid(),
            written_at=time.time(),
            served=self._served,
            targets=tuple(caller.statistics for caller in self._callers),
        )
        temporary = f".{self._statistics_name}"
        descriptor = os.open(
            temporary,
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
            0o600,
            dir_fd=self._directory,
        )
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(msgspec.json.encode(statistics))
        os.replace(
            temporary,
            self._statistics_name,
            src_dir_fd=self._directory,
            dst_dir_fd=self._directory,
        )

    def _counted(
        self,
        serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
        async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._connections >= MAX_CONNECTIONS:
                writer.transport.abort()
                return
            self._connections += 1
            try:
                await serve(reader, writer)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                writer.transport.abort()
            finally:
                self._connections -= 1
                writer.close()

        return connection

    async def _serve_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await _read_head(reader)
            if head is None:
                return
            request, fields = head
            await _read_body(reader, fields)
            method, version = request.partition(" ")[0], request.rpartition(" ")[2]
            keep = version == "HTTP/1.1" and fields.get("connection", "").lower() != "close"
            body = f"{self._config.pod}\n".encode()
            answer = (
                "HTTP/1.1 200 OK\r\n"
                "Content-Type: text/plain\r\n"
                f"Content-Length: {len(body)}\r\n"
                f"X-Pod: {self._config.pod}\r\n"
                f"X-Request: {fields.get('x-request', '')}\r\n"
                f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
            ).encode("latin-1")
            writer.write(answer + (b"" if method == "HEAD" else body))
            await writer.drain()
            self._served += 1
            if not keep:
                return

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            text = line.decode(errors="replace").rstrip("\r\n")
            writer.write(f"{self._store.answer(text, self._config.pod)}\n".encode())
            await writer.drain()
            self._served += 1


class _Caller:
    """Calls one target again and again, over a connection per `keepalive` requests."""

    def __init__(self, pod: str, call: CallConfig, context: ssl.SSLContext | None) -> None:
        self._pod = pod
        self._call = call
        self._context = context
        self._addresses = itertools.cycle(call.addresses)
        self._numbers = itertools.count(1)
        self._triggered = asyncio.Event()
        self.statistics = TargetStatistics(target=call.target, port=call.port, kind=call.kind)

    def trigger(self) -> None:
        if self._call.every_s is None:
            self._triggered.set()

    async def run(self) -> None:
        connection: _Connection | None = None
        async for _ in self._moments():
            connection = await self._request(connection)

    async def _moments(self) -> AsyncIterator[None]:
        if self._call.every_s is None:
            while True:
                await self._triggered.wait()
                self._triggered.clear()
                yield
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            yield
            due = max(due + self._call.every_s, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _request(self, connection: "_Connection | None") -> "_Connection | None":
        """One request, counted; returns the connection if it is good for another one."""
        self._count(in_flight=1)
        try:
            async with asyncio.timeout(self._call.timeout_s):
                if connection is None or connection.closed_by_peer:
                    if connection is not None:
                        connection.close()
                    connection = await self._connect()
                await self._ask(connection)
        except (OSError, asyncio.IncompleteReadError, ValueError, WrongAnswerError) as error:
            if connection is not None:
                connection.close()
            self._count(in_flight=-1, failed=1, error=_described(error, self._call.timeout_s))
            return None
        self._count(in_flight=-1, ok=1)
        if connection.requests >= self._call.keepalive:
            connection.close()
            return None
        return connection

    async def _connect(self) -> "_Connection":
        reader, writer = await asyncio.open_connection(
            next(self._addresses),
            self._call.port,
            ssl=self._context,
            server_hostname=self._call.server_name if self._context else None,
            limit=MAX_LINE_BYTES,
        )
        self._count(connections=1)
        return _Connection(reader, writer)

    async def _ask(self, connection: "_Connection") -> None:
        connection.requests += 1
        token = f"{self._pod}-{next(self._numbers)}"
        if self._call.kind is CallKind.TCP:
            await self._ask_store(connection, token)
        else:
            await self._ask_http(connection, token)

    async def _ask_http(self, connection: "_Connection", token: str) -> None:
        last = connection.requests >= self._call.keepalive
        connection.writer.write(
            (
                f"GET /{token} HTTP/1.1\r\n"
                f"Host: {self._call.target}:{self._call.port}\r\n"
                "User-Agent: tidegate-lab\r\n"
                f"X-Request: {token}\r\n"
                f"Connection: {'close' if last else 'keep-alive'}\r\n\r\n"
            ).encode()
        )
        await connection.writer.drain()
        head = await _read_head(connection.reader)
        if head is None:
            raise ConnectionResetError("the connection was closed without an answer")
        status, fields = head
        body = await _read_body(connection.reader, fields)
        if status.split(" ")[1:2] != ["200"]:
            raise WrongAnswerError(f"answered {status!r}")
        if fields.get("x-request") != token:
            raise WrongAnswerError("answered another request")
        self._check_pod(body.decode(errors="replace").strip())

    async def _ask_store(self, connection: "_Connection", token: str) -> None:
        pong = await connection.exchange("PING")
        word, _, pod = pong.partition(" ")
        if word != "PONG":
            raise WrongAnswerError(f"answered {pong!r} to PING")
        self._check_pod(pod)
        for question, right in (
            (f"SET {self._pod} {token}", "OK"),
            (f"GET {self._pod}", f"VALUE {token}"),
        ):
            answer = await connection.exchange(question)
            if answer != right:
                raise WrongAnswerError(f"answered {answer!r} to {question!r}")

    def _check_pod(self, pod: str) -> None:
        if pod not in self._call.answers:
            raise WrongAnswerError(f"{pod!r} answered, which is not {self._call.target}")

    def _count(
        self,
        *,
        in_flight: int = 0,
        ok: int = 0,
        failed: int = 0,
        connections: int = 0,
        error: str = "",
    ) -> None:
        was, now = self.statistics, time.time()
        self.statistics = msgspec.structs.replace(
            was,
            in_flight=was.in_flight + in_flight,
            ok=was.ok + ok,
            failed=was.failed + failed,
            connections=was.connections + connections,
            last_ok_at=now if ok else was.last_ok_at,
            last_error=error or was.last_error,
            last_error_at=now if error else was.last_error_at,
        )


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.requests = 0

    @property
    def closed_by_peer(self) -> bool:
        return self.reader.at_eof() or self.writer.is_closing()

    async def exchange(self, line: str) -> str:
        self.writer.write(f"{line}\n".encode())
        await self.writer.drain()
        answer = await self.reader.readline()
        if not answer.endswith(b"\n"):
            raise ConnectionResetError("the connection was closed without an answer")
        return answer.decode(errors="replace").rstrip("\n")

    def close(self) -> None:
        self.writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]] | None:
    """First line and fields (names in lower case) of an HTTP message; None when there is no more."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    except asyncio.LimitOverrunError as error:
        raise ValueError("the message's head is too long") from error
    first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip().lower()] = value.strip()
    return first, fields


async def _read_body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
    text = fields.get("content-length", "0")
    if not text.isdecimal() or int(text) > MAX_BODY_BYTES or "transfer-encoding" in fields:
        raise ValueError(f"a body of {text} bytes is not read")
    return await reader.readexactly(int(text))


def _described(error: Exception, timeout_s: float) -> str:
    match error:
        case TimeoutError():
            text = f"no answer within {timeout_s:g} s"
        case asyncio.IncompleteReadError():
            text = "the connection was closed within the answer"
        case _:
            text = str(error) or type(error).__name__
    return text[:MAX_ERROR_CHARS]


def _listen(port: int) -> list[socket.socket]:
    """One listening socket per address family."""
    return [
        socket.create_server(("", port), backlog=1024),
        socket.create_server(("::", port), family=socket.AF_INET6, backlog=1024),
    ]


def _client_context(call: CallConfig) -> ssl.SSLContext | None:
    if call.kind is not CallKind.TLS:
        return None
    return ssl.create_default_context(cadata=call.trusted_certificates)


def _server_context(config: AppConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(config.certificate, config.key)
    return context


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv))
