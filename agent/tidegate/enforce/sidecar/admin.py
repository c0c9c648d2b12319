"""Asking a running Envoy, over the unix socket of its admin API.

Knows the names of Envoy's statistics and gives typed answers. An answer is bounded in time and size:
Envoy speaks to anybody in the pod's network and may be broken. Changes nothing in Envoy.
"""

import http.client
import io
import json
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec

from tidegate.enforce.sidecar import render
from tidegate.enforce.sidecar.files import SidecarError

TIMEOUT_S = 2.0
LARGEST_ANSWER = 8 * 1024 * 1024

_PARTS = ("listener_manager.lds", "cluster_manager.cds")
_EXTENSION = "extension_config_discovery.network_filter"
_ROOTS = f"sds.{render.ROOTS_SECRET}"
_WARMING = ("listener_manager.total_listeners_warming", "cluster_manager.warming_clusters")

_PUBLIC = re.compile(rf"tcp\.{render.PUBLIC_LISTENER}\.(?P<service>.+\.)?downstream_cx_total")
_PERMISSIVE = re.compile(
    rf"tcp\.{render.PERMISSIVE_PUBLIC_LISTENER}\.(?P<service>.+\.)?downstream_cx_total"
)
_PERMISSIVE_ACTIVE = re.compile(
    rf"cluster\.{render.PERMISSIVE_LOCAL_APP}\.(?P<service>.+\.)?upstream_cx_active"
)
_DENIED = re.compile(rf"{render.RBAC_STAT_PREFIX}\.(?P<service>.+\.)?rbac\.denied")
_PASSTHROUGH = f"tcp.upstream.{render.ORIGINAL_DESTINATION}.downstream_cx_total"
_LISTENER = f"listener.{render.PUBLIC_LISTENER}"
_ACTIVE = f"{_LISTENER}.downstream_cx_active"
_LEFT_EARLY = f"{_LISTENER}.downstream_listener_filter_remote_close"
_UPTIME = "server.uptime"
_TLS = f"{_LISTENER}.ssl"
_HANDSHAKES = f"{_TLS}.handshake"
_TLS_FAILURES = (
    f"{_LISTENER}.downstream_cx_transport_socket_connect_timeout",
    f"{_TLS}.connection_error",
    f"{_TLS}.fail_verify_no_cert",
    f"{_TLS}.fail_verify_error",
    f"{_TLS}.fail_verify_san",
    f"{_TLS}.fail_verify_cert_hash",
)


_ASKED = (
    f"tcp.{render.PUBLIC_LISTENER}.",
    f"tcp.{render.PERMISSIVE_PUBLIC_LISTENER}.",
    f"cluster.{render.PERMISSIVE_LOCAL_APP}.",
    f"{render.RBAC_STAT_PREFIX}.",
    _PASSTHROUGH,
    _ACTIVE,
    _LEFT_EARLY,
    _UPTIME,
    _HANDSHAKES,
    *_TLS_FAILURES,
)


class SidecarStats(msgspec.Struct, frozen=True, kw_only=True):
    """What Envoy counted, over all services of the workload. All counters begin again at 0 when it is restarted."""

    public_connections: int
    """Connections that entered an mTLS chain, whether or not their handshake succeeded, or were closed by the
    client before it had said which."""
    permissive_connections: int
    """Connections that entered a permissive chain. Begins again at 0 after strict mode too, once
    the connections that were open at the flip have been drained."""
    passthrough_connections: int
    """Connections of the application to anything that is no upstream."""
    public_active: int
    """Connections that mTLS chains have now."""
    permissive_active: int
    """Connections that permissive chains have now, those that drain after a flip among them."""
    permissive_active_of: dict[str, int] = {}
    """The same for each service that has any, by its label in names (`render.service_label`), "" for the first."""
    rbac_denied: int
    """mTLS connections that no intention allows."""
    tls_handshakes: int
    tls_handshake_failures: int
    uptime_epoch: int
    """Seconds since this Envoy started counting (its server.uptime, brought up to date every 5 s)."""


class SidecarAdmin:
    """The admin API of one sidecar. Every method raises SidecarError when Envoy does not answer."""

    def __init__(self, working_directory: Path) -> None:
        self._directory = working_directory

    def ready(self) -> bool:
        """Whether Envoy has initialised and serves; False also when nobody answers."""
        try:
            status, body = self._get("/ready")
        except SidecarError:
            return False
        return status == http.client.OK and body.strip() == b"LIVE"

    def stats(self, prefixes: Iterable[str]) -> dict[str, int]:
        """All counters and gauges whose names begin with one of `prefixes`."""
        return {name: int(value) for name, value in self._stats(prefixes) if value.isdecimal()}

    def sidecar_stats(self) -> SidecarStats:
        """The counters of both listeners, for the witness."""
        found = self.stats(_ASKED)
        active = _by_service(found, _PERMISSIVE_ACTIVE)
        permissive_active = sum(active.values())
        return SidecarStats(
            public_connections=sum(_by_service(found, _PUBLIC).values())
            + found.get(_LEFT_EARLY, 0),
            permissive_connections=sum(_by_service(found, _PERMISSIVE).values()),
            passthrough_connections=found.get(_PASSTHROUGH, 0),
            public_active=max(0, found.get(_ACTIVE, 0) - permissive_active),
            permissive_active=permissive_active,
            permissive_active_of={service: number for service, number in active.items() if number},
            rbac_denied=sum(_by_service(found, _DENIED).values()),
            tls_handshakes=found.get(_HANDSHAKES, 0),
            tls_handshake_failures=sum(found.get(name, 0) for name in _TLS_FAILURES),
            uptime_epoch=found.get(_UPTIME, 0),
        )

    def applied_version(self, extensions: Iterable[str] = (render.RBAC_STAT_PREFIX,)) -> str | None:
        """Version of the Configuration that Envoy works by; `extensions` are the names of its intentions.

        None while it takes one in (something warms, parts are of different versions) and after it
        has rejected a part of one.
        """
        parts = _parts(extensions)
        texts = dict(self._stats((*parts, *_WARMING)))
        if any(texts.get(name) != "0" for name in _WARMING):
            return None
        return _common_version(texts, parts)

    def applied_secrets(self, leaves: Iterable[str] = (render.LEAF_SECRET,)) -> str | None:
        """Version of the Secrets that new connections use; `leaves` are the names of its leaves.

        None while Envoy has only a part.
        """
        parts = (_ROOTS, *(f"sds.{leaf}" for leaf in leaves))
        return _common_version(dict(self._stats(parts)), parts)

    def rejection(self, extensions: Iterable[str] = (render.RBAC_STAT_PREFIX,)) -> str | None:
        """Why Envoy did not take the last configuration, in its own words; None if it did."""
        dump = self._json("/config_dump?resource=dynamic_listeners")
        for listener in dump.get("configs", []):
            details = listener.get("error_state", {}).get("details")
            if details:
                return f"{listener['name']}: {details}"
        parts = _parts(extensions)
        texts = dict(self._stats(parts))
        versions = {part: texts.get(f"{part}.version_text") for part in parts}
        if len(set(versions.values())) == 1:
            return None
        for part, version in versions.items():
            refused = ("update_rejected", "update_failure", "config_fail")
            if any(texts.get(f"{part}.{name}", "0") != "0" for name in refused):
                return f"{part}: an update was rejected, version {version} is still in force"
        return None

    def _stats(self, prefixes: Iterable[str]) -> list[tuple[str, str]]:
        pattern = f"^({'|'.join(map(re.escape, prefixes))})"
        status, body = self._get(f"/stats?filter={urllib.parse.quote(pattern, safe='')}")
        if status != http.client.OK:
            raise self._error(f"answered {status} when asked for statistics")
        lines = body.decode("utf-8", "replace").splitlines()
        return [(name, value) for name, _, value in (line.partition(": ") for line in lines)]

    def _json(self, path: str) -> dict[str, Any]:
        status, body = self._get(path)
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise self._error(f"answered {status} and no JSON when asked for {path}") from error
        if not isinstance(answer, dict):
            raise self._error(f"answered with something else when asked for {path}")
        return answer

    def _get(self, path: str) -> tuple[int, bytes]:
        request = f"GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n"
        try:
            with _connected(self._directory) as connection:
                answer = _exchange(connection, request.encode())
            response = http.client.HTTPResponse(cast(socket.socket, _Received(answer)))
            response.begin()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._error(f"does not answer: {error}") from error

    def _error(self, what: str) -> SidecarError:
        return SidecarError(f"the Envoy of {self._directory} {what}")


def _parts(extensions: Iterable[str]) -> tuple[str, ...]:
    return (*_PARTS, *(f"{_EXTENSION}.{name}" for name in extensions))


def _by_service(found: dict[str, int], pattern: re.Pattern[str]) -> dict[str, int]:
    """The counters that a pattern matches, by the service in their names, "" for the first one's."""
    matches = ((pattern.fullmatch(name), value) for name, value in found.items())
    return {(match["service"] or "").rstrip("."): value for match, value in matches if match}


def _common_version(texts: dict[str, str], parts: Iterable[str]) -> str | None:
    versions = {texts.get(f"{part}.version_text", "").strip('"') for part in parts}
    return (versions.pop() or None) if len(versions) == 1 else None


class _Received:
    """Stands for a connection towards http.client: all that came over it."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)


def _connected(directory: Path) -> socket.socket:
    """By way of /proc/self/fd, because the path of a unix socket holds only 107 bytes."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(TIMEOUT_S)
        connection.connect(f"/proc/self/fd/{descriptor}/{render.ADMIN_SOCKET}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(descriptor)
    return connection


def _exchange(connection: socket.socket, request: bytes) -> bytes:
    deadline = time.monotonic() + TIMEOUT_S
    connection.sendall(request)
    answer = bytearray()
    while len(answer) <= LARGEST_ANSWER:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(remaining)
        piece = connection.recv(65536)
        if not piece:
            return bytes(answer)
        answer += piece
    raise OSError(f"the answer is longer than {LARGEST_ANSWER} bytes")
