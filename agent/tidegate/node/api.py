"""The agent's local HTTP API, on a unix socket that only root may open.

    GET  /v1/status                       this node's workloads
    GET  /v1/flows?service=&window=       edges of the whole mesh
    GET  /v1/ready[/SERVICE]?window=      verdicts
    POST /v1/strict                       {"service", "guard_s", "force"}: flip and guard, one JSON event per line
    GET  /v1/node/evidence/SERVICE?window=   this node's evidence, for the agents of other nodes
    GET  /v1/node/flows?window=              this node's edges, for the agents of other nodes

Failures answer {"error": sentence, "exit_code": n}.
"""

import re
import socket
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
        return _json(await mesh.flows(service and _service(service), _window(request)))

    async def get_ready(request: web.Request) -> web.Response:
        window = _window(request)
        named = request.match_info.get("service")
        services = (_service(named),) if named else await mesh.services()
        return _json({"verdicts": [await mesh.verdict(name, window) for name in services]})

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
        except msgspec.DecodeError as error:
            raise InputError(str(error), source="POST /v1/strict") from error
        if not 0 < asked.guard_s <= MAX_WINDOW_S:
            raise InputError(
                f"a guard of {asked.guard_s} s", field="guard_s", expected="up to 30 days"
            )
        events = guard.strict(_service(asked.service), asked.guard_s, force=asked.force)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
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

    A socket file that nobody answers at is replaced; TidegateError when somebody does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.settimeout(1.0)
        probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        path.unlink(missing_ok=True)
    else:
        raise TidegateError(f"an agent answers at {path} already")
    finally:
        probe.close()
    listener = socket.socket(socket.AF_UNIX)
    # Nobody can connect between bind and listen, so the mode is right before anybody could.
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(64)
    return listener


@web.middleware
async def _failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TidegateError as error:
        status = 400 if isinstance(error, InputError) else 409
        return _json({"error": str(error), "exit_code": error.exit_code}, status)


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
