"""What a server holds while it runs: its state directory, alone, and the sockets that it listens on."""

import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from tidegate.catalog.settings import Listening, ServerConfig, TCPAddress, TLSFiles
from tidegate.catalog.store import Store, held_alone
from tidegate.errors import InputError, TidegateError
from tidegate.identity.ca import MeshCA

STORE_NAME = "catalog.db"


@contextlib.contextmanager
def held_state(config: ServerConfig) -> Iterator[tuple[Store, MeshCA]]:
    """The store and the CA in the state directory, which no second server uses meanwhile. Raises TidegateError."""
    directory = config.state_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TidegateError(f"{directory}: cannot be used: {error.strerror}") from error
    path = directory / STORE_NAME
    with held_alone(path, "a tidegate server"):
        authority = directory / "ca"
        ca = (
            MeshCA.load(authority)
            if authority.exists()
            else MeshCA.create(authority, config.trust_domain)
        )
        if ca.trust_domain != config.trust_domain:
            raise InputError(
                f"{config.trust_domain!r} is not the trust domain of the CA in {authority}",
                field="trust_domain",
                expected=ca.trust_domain,
            )
        with contextlib.closing(Store(path)) as store:
            yield store, ca


def tls_context(files: TLSFiles) -> ssl.SSLContext:
    """What https is served with. InputError for files that are no certificate, key or CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.cert_file, files.key_file)
        if files.client_ca_file is not None:
            context.load_verify_locations(files.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or error
        raise InputError(f"cannot be used: {reason}", field="tls", expected="PEM files") from error
    return context


@contextlib.contextmanager
def bound(address: Listening) -> Iterator[socket.socket]:
    """A socket bound to `address`; that of a server that is gone is replaced."""
    if isinstance(address, TCPAddress):
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address.host, address.port))
            except OSError as error:
                raise TidegateError(
                    f"cannot listen on {address.host} port {address.port}: {error.strerror}"
                ) from error
            yield listener
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            address.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _remove_stale(address)
            before = os.umask(0o177)
            try:
                listener.bind(str(address))
            finally:
                os.umask(before)
            mine = address.stat().st_ino
        except OSError as error:
            raise TidegateError(f"cannot listen on {address}: {error.strerror}") from error
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                if address.stat().st_ino == mine:
                    address.unlink()


def _remove_stale(path: Path) -> None:
    """Removes the socket of a server that is gone. Raises TidegateError when one answers there."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise TidegateError(f"{path} is there and is no socket; remove it or listen elsewhere")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        problem = probe.connect_ex(str(path))
    if problem != errno.ECONNREFUSED:
        raise TidegateError(f"another server listens on {path}; stop it or listen elsewhere")
    path.unlink()
