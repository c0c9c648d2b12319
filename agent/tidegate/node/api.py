"""The agent's local HTTP API, on a unix socket that only root may open.

    GET  /metrics                         this node's metrics, as Prometheus reads them
    GET  /healthz                         200 while the agent lives, however its workloads are
    GET  /readyz                          200 once it has looked at everything
    GET  /v1/status                       this node's workloads
    GET  /v1/flows?service=&window=       edges of the whole mesh
    GET  /v1/ready[/SERVICE]?window=      verdicts
    GET  /v1/onboard/status?window=       every service, who it waits for, the steps that bring the mesh furthest
    GET  /v1/onboard/plan?services=&window=  the steps of services, named with commas between, or of all
    GET  /v1/intentions/suggest?service=&window=&callers=  intentions that what was seen lacks; callers=all or mesh
    POST /v1/intentions                   {"service", "window_s", "all_callers"}: writes them
    POST /v1/strict                       {"service", "guard_s", "force"}: flip and guard, one JSON event per line
    POST /v1/permissive                   {"service", "force"}: flip back, one JSON event per line
    POST /v1/resecure                     {"window_s", "force"}: the last step, one JSON event per line
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
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from tidegate.errors import InputError, TidegateError
from tidegate.node import changes, metrics
from tidegate.node.guard import Guard
from tidegate.node.log import Log
from tidegate.node.mesh import LocalEvidence, MeshView
from tidegate.node.onboarding import Onboarding
from tidegate.node.pulse import Pulse

MAX_BODY_BYTES = 64 << 10
MAX_WINDOW_S = 30 * 86400.0
MAX_GUARD_S = 7 * 86400.0
"""Below MAX_WINDOW_S: a guard asks for everything since its flip, also after a time without agent."""
LOOK_S = 1.0
"""How often it is looked whether a socket is still there: /run/tidegate may be cleared by somebody's script."""
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"({_LABEL}/){{0,2}}{_LABEL}")
"""Text of a model.ServiceName."""

_T = TypeVar("_T")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = Log("api")


class StrictRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/strict."""

    service: str
    guard_s: float
    force: bool = False


class PermissiveRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/permissive."""

    service: str
    force: bool = False


class ResecureRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/resecure."""

    window_s: float | None = None
    force: bool = False


class IntentionsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /v1/intentions."""

    service: str | None = None
    window_s: float | None = None
    all_callers: bool = False


def make_peer_app(local: LocalEvidence) -> web.Application:
    """What agents of other machines may ask: this node's evidence, and nothing else."""
    app = web.Application(middlewares=[_failures], client_max_size=MAX_BODY_BYTES)
    app.add_routes(_evidence_routes(local))
    return app


def _evidence_routes(local: LocalEvidence) -> list[web.RouteDef]:
    async def get_evidence(request: web.Request) -> web.Response:
        window = _window(request)
        if window is None:
            raise InputError("no window", field="window", expected="seconds")
        return _json(await local.evidence(_service(request.match_info["service"]), window))

    async def get_flows(request: web.Request) -> web.Response:
        return _json(await local.flows(_window(request)))

    return [
        web.get(r"/v1/node/evidence/{service:[\s\S]+}", get_evidence),
        web.get("/v1/node/flows", get_flows),
    ]


def make_app(
    mesh: MeshView,
    local: LocalEvidence,
    guard: Guard,
    status: Callable[[], Awaitable[object]],
    exposition: Callable[[], Awaitable[bytes]],
    pulse: Pulse,
) -> web.Application:
    """The application; `status` gives what GET /v1/status answers, `exposition` what GET /metrics does."""
    onboarding = Onboarding(mesh)

    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=await exposition(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def get_health(_request: web.Request) -> web.Response:
        return _health(pulse.unwell())

    async def get_readiness(_request: web.Request) -> web.Response:
        return _health(pulse.unready())

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

    async def get_onboard_status(request: web.Request) -> web.Response:
        return _json(await onboarding.status(_window(request)))

    async def get_onboard_plan(request: web.Request) -> web.Response:
        named = [text for text in request.query.get("services", "").split(",") if text]
        return _json(await onboarding.plan(tuple(map(_service, named)), _window(request)))

    async def get_suggestions(request: web.Request) -> web.Response:
        service = request.query.get("service")
        callers = request.query.get("callers", "mesh")
        if callers not in ("mesh", "all"):
            raise InputError(f"callers {callers!r}", field="callers", expected="mesh or all")
        found = await onboarding.suggestions(
            None if service is None else _service(service),
            _window(request),
            all_callers=callers == "all",
        )
        return _json(found)

    async def post_intentions(request: web.Request) -> web.Response:
        asked = await _body(request, IntentionsRequest)
        done = await onboarding.write_suggestions(
            None if asked.service is None else _service(asked.service),
            _checked_window(asked.window_s),
            all_callers=asked.all_callers,
        )
        return _json(done)

    async def post_strict(request: web.Request) -> web.StreamResponse:
        asked = await _body(request, StrictRequest)
        if not 0 < asked.guard_s <= MAX_GUARD_S:
            raise InputError(
                f"a guard of {asked.guard_s} s", field="guard_s", expected="seconds, up to 7 days"
            )
        events = guard.strict(_service(asked.service), asked.guard_s, force=asked.force)

        async def told() -> AsyncIterator[object]:
            while (event := await events.get()) is not None:
                yield event

        return await _stream(request, told())

    async def post_permissive(request: web.Request) -> web.StreamResponse:
        asked = await _body(request, PermissiveRequest)
        events = changes.permissive(mesh, _service(asked.service), force=asked.force)
        return await _stream(request, events)

    async def post_resecure(request: web.Request) -> web.StreamResponse:
        asked = await _body(request, ResecureRequest)
        window = _checked_window(asked.window_s)
        return await _stream(request, changes.resecure(mesh, onboarding, window, force=asked.force))

    app = web.Application(middlewares=[_failures], client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get("/metrics", get_metrics),
            web.get("/healthz", get_health),
            web.get("/readyz", get_readiness),
            web.get("/v1/status", get_status),
            web.get("/v1/flows", get_flows),
            web.get("/v1/ready", get_ready),
            web.get(r"/v1/ready/{service:[\s\S]+}", get_ready),
            web.get("/v1/onboard/status", get_onboard_status),
            web.get("/v1/onboard/plan", get_onboard_plan),
            web.get("/v1/intentions/suggest", get_suggestions),
            *_evidence_routes(local),
            web.post("/v1/intentions", post_intentions),
            web.post("/v1/strict", post_strict),
            web.post("/v1/permissive", post_permissive),
            web.post("/v1/resecure", post_resecure),
        ]
    )
    return app


@contextlib.asynccontextmanager
async def serving_at(
    path: Path, serve: Callable[[socket.socket], contextlib.AbstractAsyncContextManager[None]]
) -> AsyncIterator[None]:
    """Serves at a unix socket as long as the context lasts, and at a new one when its file was taken away.

    `serve` is the context in which a listening socket is served. TidegateError as `listen`, when it begins.
    """

    async def begin() -> tuple[contextlib.AsyncExitStack, tuple[int, int] | None]:
        async with contextlib.AsyncExitStack() as stack:
            listener = stack.enter_context(listen(path))
            file = _file(path)
            await stack.enter_async_context(serve(listener))
            return stack.pop_all(), file

    serving, file = await begin()

    async def stay() -> None:
        nonlocal serving, file
        told = ""
        while True:
            await asyncio.sleep(LOOK_S)
            if file is not None and _file(path) == file:
                continue
            try:
                fresh, file = await begin()
            except (TidegateError, OSError) as error:
                if str(error) != told:
                    log.warning(f"nobody reaches this agent there any more: {error}")
                told = str(error)
                continue
            log.warning("a socket was taken away, and is there again", path=str(path))
            told = ""
            before, serving = serving, fresh
            await before.aclose()

    staying = asyncio.create_task(stay())
    try:
        yield
    finally:
        staying.cancel()
        await asyncio.gather(staying, return_exceptions=True)
        _remove(path, file)
        await serving.aclose()


def _file(path: Path) -> tuple[int, int] | None:
    """Which file is there, None when there is none or nobody can say."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove(path: Path, file: tuple[int, int] | None) -> None:
    """If it is this file that is there."""
    if _file(path) == file:
        path.unlink(missing_ok=True)


def listen(path: Path) -> socket.socket:
    """A listening unix socket with mode 0600 from its first moment. TidegateError as `make_room`."""
    make_room(path)
    try:
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
        raise _cannot_listen(path, error) from error
    return listener


def make_room(path: Path) -> None:
    """Makes the directory of a unix socket, and removes one that nobody answers at.

    TidegateError when somebody does, when the path is something else than a socket, and when the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise TidegateError(f"{path} is there and is no socket")
            if _answers(path):
                raise TidegateError(f"an agent answers at {path} already")
            path.unlink()
    except OSError as error:
        raise _cannot_listen(path, error) from error


def _cannot_listen(path: Path, error: OSError) -> TidegateError:
    return TidegateError(f"cannot listen at {path}: {error.strerror or error}")


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


def _health(problem: str) -> web.Response:
    return _failure(503, problem, 2) if problem else _json({})


def _json(answer: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(answer), status=status, content_type="application/json"
    )


def _service(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not a service name", expected="a DNS label, such as api, or namespace/api"
        )
    return name


def _window(request: web.Request) -> float | None:
    text = request.query.get("window")
    if text is None:
        return None
    try:
        window = float(text)
    except ValueError:
        window = 0.0
    return _checked_window(window, text)


def _checked_window(window: float | None, text: str = "") -> float | None:
    if window is not None and not 0 < window <= MAX_WINDOW_S:
        raise InputError(
            f"a window of {text!r}" if text else f"a window of {window} s",
            field="window",
            expected="seconds, up to 30 days",
        )
    return window


async def _body(request: web.Request, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(str(error), source=f"{request.method} {request.path}") from error


async def _stream(request: web.Request, events: AsyncIterator[object]) -> web.StreamResponse:
    """Each event as a line of JSON. What fails before the first is answered as any failure, later as an event."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    is_there = True
    try:
        async for event in events:
            if not response.prepared:
                await response.prepare(request)
            # Whoever asked may leave; what was begun goes on.
            if is_there:
                is_there = await _write(response, event)
    except TidegateError as error:
        if not response.prepared:
            raise
        log.warning("a change ended half-way", reason=str(error))
        failed = {"event": "failed", "message": str(error), "exit_code": error.exit_code}
        is_there = is_there and await _write(response, failed)
    with contextlib.suppress(ConnectionResetError):
        await response.write_eof()
    return response


async def _write(response: web.StreamResponse, event: object) -> bool:
    """Whether somebody still listens."""
    try:
        await response.write(msgspec.json.encode(event) + b"\n")
    except ConnectionResetError:
        return False
    return True
