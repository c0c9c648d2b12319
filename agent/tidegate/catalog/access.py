"""How one speaks to a server of the API: token, TLS, and which datacenter, namespace and partition is meant.

The words are those of Consul's command line and its HTTP API.
"""

import ssl
from pathlib import Path

import msgspec

from tidegate.catalog.settings import IntentionPolicy
from tidegate.errors import InputError


class Access(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything but the address. What is empty is the server's to choose."""

    token: str = ""
    token_file: Path | None = None
    """Read again when the server refuses: tokens are replaced."""
    ca_file: Path | None = None
    """PEM; the system's CAs where it is not set."""
    client_cert: Path | None = None
    client_key: Path | None = None
    server_name: str = ""
    """What the server's certificate has to be for, where that is not the address."""
    datacenter: str = ""
    namespace: str = ""
    """Of queries; "*" for those of all. What is written says its own."""
    partition: str = ""
    stale: bool = False
    """Whether a server that is not the leader may answer what is read."""
    default_intention_policy: IntentionPolicy | None = None
    """What holds between services without an intention; None: what the server says. A Consul server with a
    default_intention_policy of its own tells only its ACL default policy."""

    def __repr__(self) -> str:
        return f"Access(datacenter={self.datacenter!r}, partition={self.partition!r})"

    def secret(self) -> str:
        """The token, "" for none. InputError for a file that cannot be read."""
        if self.token_file is None:
            return self.token
        try:
            secret = self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise InputError(
                f"{self.token_file}: {reason}", field="token_file", expected="a file with a token"
            ) from error
        if not secret.isascii() or not secret.isprintable():
            raise InputError(f"{self.token_file} holds no token", field="token_file")
        return secret

    def tls(self) -> ssl.SSLContext:
        """What https is spoken with. InputError for files that are no certificates or key."""
        if (self.client_cert is None) != (self.client_key is None):
            raise InputError(
                "one of them is missing",
                field="client_cert, client_key",
                expected="both or neither",
            )
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.client_cert is not None:
                context.load_cert_chain(self.client_cert, self.client_key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"cannot be used: {error.strerror or error}",
                field="ca_file, client_cert, client_key",
                expected="PEM files",
            ) from error
        return context

    @property
    def query(self) -> dict[str, str]:
        """The parameters of every query."""
        said = {"dc": self.datacenter, "partition": self.partition}
        found = {name: value for name, value in said.items() if value}
        return found | ({"stale": ""} if self.stale else {})


ACCESS_FOR_ALL = Access()
"""Of a server that asks for nothing, such as that behind a unix socket."""
