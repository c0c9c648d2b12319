"""Who may do what at the embedded server: tokens with rights, and Consul's words for a refusal. Pure.

Where no token is configured, whoever reaches the server may do everything but take keys over TCP: a unix socket is
open to its owner only, and TCP is then loopback only. Where tokens are configured, only the unix socket needs none.
"""

import enum
import hashlib
from collections.abc import Iterable

import msgspec


class Right(enum.StrEnum):
    """What a token allows. The right to write includes the right to read."""

    CONFIG_READ = "config:read"
    CONFIG_WRITE = "config:write"
    CATALOG_READ = "catalog:read"
    CATALOG_WRITE = "catalog:write"
    IDENTITY_WRITE = "identity:write"
    """To get a leaf certificate, with its key, of any service."""
    OPERATOR_WRITE = "operator:write"
    """To change the mesh's roots of trust."""


_INCLUDED = {
    Right.CONFIG_WRITE: Right.CONFIG_READ,
    Right.CATALOG_WRITE: Right.CATALOG_READ,
}


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """A secret and what it allows. `name` is told in refusals, as Consul tells a token's AccessorID."""

    name: str
    secret: str
    rights: frozenset[Right]

    def __repr__(self) -> str:
        return f"Token({self.name!r})"

    def allows(self, right: Right) -> bool:
        return right in self.rights or any(_INCLUDED.get(one) is right for one in self.rights)


class Tokens:
    """All tokens of a server."""

    def __init__(self, tokens: Iterable[Token] = ()) -> None:
        self._by_digest = {_digest(token.secret): token for token in tokens}

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def refusal(self, right: Right, secret: str, *, local: bool) -> str:
        """Why a request is refused, "" when it is allowed. `local` is a request on the unix socket."""
        if not self._by_digest:
            if right in (Right.IDENTITY_WRITE, Right.OPERATOR_WRITE) and not local:
                return (
                    "Permission denied: without tokens, keys are handed out on the unix socket only"
                )
            return ""
        if not secret:
            return "" if local else _lacks("anonymous token", right) + _ANONYMOUS
        token = self._by_digest.get(_digest(secret))
        if token is None:
            return "ACL not found"
        if token.allows(right):
            return ""
        return _lacks(f"token with AccessorID '{token.name}'", right)


_ANONYMOUS = ". The anonymous token is used implicitly when a request does not specify a token."


def _lacks(who: str, right: Right) -> str:
    """Consul's acl.PermissionDeniedError."""
    return f"Permission denied: {who} lacks permission '{right}'"


def _digest(secret: str) -> bytes:
    """What is looked up: how long that takes tells nothing of the secret."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).digest()
