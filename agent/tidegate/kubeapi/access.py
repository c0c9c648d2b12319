"""Where an API server is and how one proves to it who one is; by default as a pod is told it.

Kubernetes puts the address into a pod's environment, and a token and the server's CA into files that it replaces before
they expire (Kubernetes documentation, "Accessing the Kubernetes API from a Pod").
"""

import os
import re
import ssl
from pathlib import Path

import msgspec

from tidegate.errors import InputError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

_SERVER = re.compile(r"https?://[^/\s]+/?")
_MAX_TOKEN_BYTES = 64 << 10


class ApiAccess(msgspec.Struct, frozen=True, kw_only=True):
    """One API server, and as whom it is asked."""

    server: str = ""
    """https://host:port; empty: the one that the environment of a pod names."""
    token_file: Path | None = SERVICE_ACCOUNT / "token"
    """Read before each request; None: nobody is said to ask."""
    ca_file: Path | None = SERVICE_ACCOUNT / "ca.crt"
    """PEM; None: the system's CAs."""

    def address(self) -> str:
        """https://host:port. InputError where neither configuration nor environment says one."""
        if self.server:
            return self.server.rstrip("/")
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise InputError(
                "no API server is named, and KUBERNETES_SERVICE_HOST is not set",
                field="server",
                expected="https://host:port, or an agent that runs in a pod",
            )
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

    def token(self) -> str:
        """What the token file holds at the moment, "" without one. InputError when it cannot be read."""
        if self.token_file is None:
            return ""
        try:
            with self.token_file.open("rb") as stream:
                content = stream.read(_MAX_TOKEN_BYTES + 1)
        except OSError as error:
            raise InputError(
                f"{self.token_file} cannot be read: {error.strerror}", field="token_file"
            ) from error
        token = content.strip()
        if not token or len(content) > _MAX_TOKEN_BYTES or not token.isascii() or b"\n" in token:
            raise InputError(f"{self.token_file} holds no token", field="token_file")
        return token.decode()

    def tls(self) -> ssl.SSLContext:
        """What https is spoken with. InputError for a file that holds no certificates."""
        try:
            return ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"{self.ca_file} cannot be used: {error.strerror or error}",
                field="ca_file",
                expected="a PEM file",
            ) from error


def check_server(text: str) -> None:
    """InputError for what is no address of an API server; "" is one."""
    if text and not _SERVER.fullmatch(text):
        raise InputError(
            f"{text!r} is no address of an API server", field="server", expected="https://host:port"
        )
