"""The agent's local HTTP API, on a unix socket that only root may open.

    GET  /v1/status                       this node's workloads
    GET  /v1/flows?service=&window=       edges of the whole mesh
    GET  /v1/ready[/SERVICE]?window=      verdicts
    POST /v1/strict                       {"service", "guard_s", "force"}: flip and guard, one JSON event per line
    GET  /v1/node/evidence/SERVICE?window=   this node's evidence, for the agents of other nodes
    GET  /v1/node/flows?window=              this node's edges, for the agents of other nodes

Failures answer {"error": sentence, "exit_code": n}.
"""

import asyncio
import contextlib
import os
import re
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web

from tidegate.errors import InputError, TidegateError
from tidegate.node.guard import Guard
from tidegate.node.log import Log
from tidegate.node.mesh import LocalEvidence, MeshView

MAX_BODY_BYTES = 64 << 10
MAX_WINDOW_S = 30 * 86400.0
MAX_GUARD_S = 7 * 86400.0
"""Below MAX_WINDOW_S: a guard asks for everything since its flip, also after a time without agent."""
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = Log("api")


class StrictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/strict."""

    service: str
    guard_s: float
    force: bool = False


def make_app(
    mesh: MeshView, local: LocalEvidence, guard: Guard, status: Callable[[], Awaitable[object]]
) -> web.Application:
    """The application; `status` gives what GET /v1/status answers."""

    async def get_status(_request: web.Request) -> web.Response:
        return _json(await status())

    async def get_flows(request: web.Request) -> web.Response:
        service = request.query.get("service")
        named = None if service is None else _service(service)
        return _json(await mesh.flows(named, _window(request)))

    async def get_ready(request: web.Request) -> web.Response:
        window = _window(request)
        named = request.match_info.get("service")
        services = (_service(named),) if named else await mesh.services()
        verdicts = await asyncio.gather(*(mesh.verdict(name, window) for name in services))
        return _json({"verdicts": verdicts})

    async def get_node_evidence(request: web.Request) -> web.Response:
        window = _window(request)
        if window is None:
            raise InputError("no window", field="window", expected="seconds")
        return _json(await local.evidence(_service(request.match_info["service"]), window))

    async def get_node_flows(request: web.Request) -> web.Response:
        return _json(await local.flows(_window(request)))

    async def post_strict(request: web.Request) -> web.StreamResponse:
        try:
            asked = msgspec.json.decode(await request.read(), type=StrictRequest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(str(error), source="POST /v1/strict") from error
        if not 0 < asked.guard_s <= MAX_GUARD_S:
            raise InputError(
                f"a guard of {asked.guard_s} s", field="guard_s", expected="seconds, up to 7 days"
            )
        events = guard.strict(_service(asked.service), asked.guard_s, force=asked.force)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        # Whoever asked may leave; the flip goes on.
        with contextlib.suppress(ConnectionResetError):
            while (event := await events.get()) is not None:
                await response.write(msgspec.json.encode(event) + b"\n")
            await response.write_eof()
        return response

    app = web.Application(middlewares=[_failures], client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get("/v1/status", get_status),
            web.get("/v1/flows", get_flows),
            web.get("/v1/ready", get_ready),
            web.get("/v1/ready/{service}", get_ready),
            web.get("/v1/node/evidence/{service}", get_node_evidence),
            web.get("/v1/node/flows", get_node_flows),
            web.post("/v1/strict", post_strict),
        ]
    )
    return app


def listen(path: Path) -> socket.socket:
    """A listening unix socket with mode 0600 from its first moment.

    A socket that nobody answers at is replaced. TidegateError when somebody does, when the path is
    something else than a socket, and when the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise TidegateError(f"{path} is there and is no socket")
            if _answers(path):
                raise TidegateError(f"an agent answers at {path} already")
            path.unlink()
        listener = socket.socket(socket.AF_UNIX)
        try:
            # unix(7): the socket's own mode is that of the file that bind makes.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(path))
            listener.listen(64)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise TidegateError(f"cannot listen at {path}: {error.strerror or error}") from error
    return listener


def _answers(path: Path) -> bool:
    """Whether somebody listens at a unix socket, also if too busy to take another connection now."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except (TimeoutError, BlockingIOError):
            return True
    return True


@web.middleware
async def _failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TidegateError as error:
        status = 400 if isinstance(error, InputError) else 409
        return _failure(status, str(error), error.exit_code)
    except web.HTTPRequestEntityTooLarge:
        return _failure(400, f"the body is larger than {MAX_BODY_BYTES} bytes", 2)
    except web.HTTPException as error:
        return _failure(error.status, f"{request.method} {request.path}: {error.reason}", 2)


def _failure(status: int, error: str, exit_code: int) -> web.Response:
    return _json({"error": error, "exit_code": exit_code}, status)


def _json(answer: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(answer), status=status, content_type="application/json"
    )


def _service(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is not a service name", expected="a DNS label, such as api")
    return name


def _window(request: web.Request) -> float | None:
    text = request.query.get("window")
    if text is None:
        return None
    try:
        window = float(text)
    except ValueError:
        window = 0.0
    if not 0 < window <= MAX_WINDOW_S:
        raise InputError(f"a window of {text!r}", field="window", expected="seconds, up to 30 days")
    return window
