"""Configuration of `tidegate server`: a YAML file, checked as a whole before anything is touched."""

import contextlib
import enum
import ipaddress
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from tidegate import durations
from tidegate.catalog.rights import Right, Token
from tidegate.errors import InputError
from tidegate.identity import spiffe

MIN_LEAF_TTL_S = 1.0
MAX_LEAF_TTL_S = 72 * 3600.0
SHORTEST_SECRET = 16
LONGEST_SOCKET_PATH = 107
"""Bytes, without the closing 0 (linux/un.h, UNIX_PATH_MAX)."""


class IntentionPolicy(enum.StrEnum):
    """What holds between services for which there is no intention (Consul's agent option)."""

    ALLOW = "allow"
    DENY = "deny"


class TokenConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One token that requests may bear."""

    name: str
    """Told in refusals and logs, where the secret never is."""
    secret_file: Path
    """File with the secret, for its owner only; spaces around it do not count."""
    rights: tuple[Right, ...]


class TLSFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What https needs: PEM files."""

    cert_file: Path
    """The server's certificate, and after it what it chains by."""
    key_file: Path
    client_ca_file: Path | None = None
    """Where it is set, only clients with a certificate of this CA get an answer."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of `tidegate server`."""

    state_dir: Path
    """Directory of the store and the CA, made 0700 if it is missing."""
    listen: str | tuple[str, ...] = "unix:///run/tidegate/server.sock"
    """One or several of unix:///path, http://ADDRESS:PORT with a loopback address, https://ADDRESS:PORT."""
    tls: TLSFiles | None = None
    tokens: tuple[TokenConfig, ...] = ()
    """Who may do what; a server that others than this machine reach has to have some."""
    trust_domain: str
    datacenter: str = "dc1"
    default_intention_policy: IntentionPolicy = IntentionPolicy.DENY
    leaf_lifetime: float | str = "1h"
    """Lifetime of a leaf where a request names none: seconds, or Go's notation such as "1h30m"."""

    @property
    def leaf_lifetime_s(self) -> float:
        """The lifetime in seconds; 0 when `leaf_lifetime` is no duration."""
        if isinstance(self.leaf_lifetime, str):
            return durations.parse(self.leaf_lifetime) or 0.0
        return float(self.leaf_lifetime)

    @property
    def listens(self) -> tuple[str, ...]:
        """The addresses as they are written."""
        return (self.listen,) if isinstance(self.listen, str) else self.listen

    @property
    def addresses(self) -> tuple["Listening", ...]:
        """Where the server listens. Raises InputError."""
        return tuple(_listening(text) for text in self.listens)


class TCPAddress(NamedTuple):
    host: str
    port: int
    tls: bool


Listening = Path | TCPAddress


def _decode_path(kind: type[object], text: object) -> object:
    if kind is Path and isinstance(text, str):
        return Path(text)
    raise TypeError(f"expected text, got {type(text).__name__}")


def load_config(path: Path) -> ServerConfig:
    """Reads a YAML or JSON file; raises InputError with file and field."""
    source = str(path)
    try:
        config = msgspec.yaml.decode(path.read_bytes(), type=ServerConfig, dec_hook=_decode_path)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", source=source, expected="a server configuration"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(" ".join(str(error).split()), source=source) from error
    try:
        check_config(config)
    except InputError as error:
        raise InputError(
            error.problem, source=source, field=error.field, expected=error.expected
        ) from error
    return config


def check_config(config: ServerConfig) -> None:
    """Raises InputError, with the field, for what cannot be."""
    spiffe.trust_domain(config.trust_domain)
    spiffe.label(config.datacenter, "datacenter")
    _check_listening(config)
    load_tokens(config.tokens)
    if not MIN_LEAF_TTL_S <= config.leaf_lifetime_s <= MAX_LEAF_TTL_S:
        raise InputError(
            f"{config.leaf_lifetime!r} is no lifetime of a leaf certificate",
            field="leaf_lifetime",
            expected='seconds or a duration such as "1h", from 1s to 72h',
        )


def load_tokens(configs: Iterable[TokenConfig]) -> tuple[Token, ...]:
    """The tokens with their secrets. InputError for a file that is missing, or that others can read."""
    tokens: list[Token] = []
    for number, config in enumerate(configs):
        field = f"tokens[{number}]"
        if not config.name.isprintable() or not config.name:
            raise InputError(f"{config.name!r} is no name", field=f"{field}.name")
        secret = _secret(config.secret_file, f"{field}.secret_file")
        if config.name in [token.name for token in tokens]:
            raise InputError(f"{config.name!r} is there twice", field=f"{field}.name")
        if secret in [token.secret for token in tokens]:
            raise InputError("holds the secret of another token", field=f"{field}.secret_file")
        tokens.append(Token(name=config.name, secret=secret, rights=frozenset(config.rights)))
    return tuple(tokens)


def _secret(path: Path, field: str) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        secret = path.read_bytes().decode().strip()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", field=field) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8", field=field) from error
    if mode & 0o077:
        raise InputError(f"{path} has mode {mode:04o}", field=field, expected="0600: a secret")
    if len(secret) < SHORTEST_SECRET or not secret.isascii() or not secret.isprintable():
        raise InputError(
            f"{path} holds no secret", field=field, expected=f"{SHORTEST_SECRET} characters or more"
        )
    return secret


def _check_listening(config: ServerConfig) -> None:
    if not config.addresses:
        raise InputError("is empty", field="listen", expected="unix:///path or an address")
    for address in config.addresses:
        if isinstance(address, Path):
            continue
        if address.tls and config.tls is None:
            raise InputError("is missing, and https needs it", field="tls")
        if not ipaddress.ip_address(address.host).is_loopback and not config.tokens:
            raise InputError(
                f"are missing, and others than this machine reach {address.host}",
                field="tokens",
                expected="a token for each who may read or write",
            )


def _listening(text: str) -> Listening:
    if text.startswith("unix://"):
        path = Path(text.removeprefix("unix://"))
        if path.is_absolute() and len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
            return path
    else:
        with contextlib.suppress(ValueError):
            url = urlsplit(text)
            address = ipaddress.ip_address(url.hostname or "")
            tls = url.scheme == "https"
            if url.port and (tls or (url.scheme == "http" and address.is_loopback)):
                return TCPAddress(str(address), url.port, tls)
    raise InputError(
        f"{text!r} is no address to listen on",
        field="listen",
        expected=f"unix:///path (at most {LONGEST_SOCKET_PATH} characters), http://ADDRESS:PORT with"
        " a loopback address, or https://ADDRESS:PORT with tls and tokens",
    )
