"""How `observe` and `classify` are told to recognise a mesh: the name of one they know, or a file."""

import argparse
from collections.abc import Iterable

import msgspec

from tidegate.cli.arguments import source_of, text_of
from tidegate.cli.workloads import Mesh
from tidegate.errors import InputError
from tidegate.intent.documents import read_documents
from tidegate.observe.classifier import ISTIO, KUMA, MeshProfile, consul_profile

ANY_TRUST_DOMAIN = "*.consul"
"""Consul's trust domains are a cluster's UUID and this ending (agent/connect/uri_signing.go)."""

KNOWN = {
    "consul": consul_profile(ANY_TRUST_DOMAIN),
    "istio": ISTIO,
    "kuma": KUMA,
}


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A profile that a person wrote, in YAML, JSON or HCL. Field by field as in MeshProfile."""

    name: str = "custom"
    sni_suffixes: tuple[str, ...] = ()
    alpn: tuple[str, ...] = ()
    proxy_ports: tuple[int, ...] = ()


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --profile."""
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"how the mesh's own mTLS is recognised: {', '.join(KNOWN)} (default: consul, for workloads of "
        "an agent as that does), or a YAML, JSON or HCL file with any of sni_suffixes, alpn and proxy_ports",
    )


def chosen(name: str | None, meshes: Iterable[Mesh] = ()) -> MeshProfile:
    """The profile of that name, or in that file; without a name those of these meshes, or else Consul's.

    InputError for what is neither, and for a file with a fault.
    """
    if name is None:
        own = [_of(mesh) for mesh in sorted(meshes)] or [KNOWN["consul"]]
        return MeshProfile(
            name=", ".join(dict.fromkeys(profile.name for profile in own)),
            sni_suffixes=tuple(suffix for profile in own for suffix in profile.sni_suffixes),
            alpn=tuple(dict.fromkeys(name for profile in own for name in profile.alpn)),
        )
    if name in KNOWN:
        return KNOWN[name]
    try:
        text = text_of(name)
    except InputError as error:
        if "/" in name or "." in name:
            raise
        raise InputError(
            f"there is no profile {name!r}",
            field="--profile",
            expected=f"{', '.join(KNOWN)}, or a file",
        ) from error
    source = source_of(name)
    documents = read_documents(text, source)
    if len(documents) > 1:
        raise InputError(
            f"holds {len(documents)} profiles", source=source, expected="one for each file"
        )
    try:
        read = msgspec.convert(documents[0] if documents else {}, type=_File)
    except msgspec.ValidationError as error:
        raise InputError(str(error), source=source) from error
    _check(read, source)
    return MeshProfile(
        name=read.name,
        sni_suffixes=read.sni_suffixes,
        alpn=read.alpn,
        proxy_ports=read.proxy_ports,
    )


def _of(mesh: Mesh) -> MeshProfile:
    if mesh.profile in KNOWN and mesh.profile != "consul":
        return KNOWN[mesh.profile]
    return consul_profile(mesh.trust_domain)


def _check(read: _File, source: str) -> None:
    if not (read.sni_suffixes or read.alpn or read.proxy_ports):
        raise InputError(
            "recognises nothing", source=source, expected="sni_suffixes, alpn or proxy_ports"
        )
    for port in read.proxy_ports:
        if not 1 <= port <= 65535:
            raise InputError(
                f"{port} is no port", source=source, field="proxy_ports", expected="1 to 65535"
            )
    for field, names in (("sni_suffixes", read.sni_suffixes), ("alpn", read.alpn)):
        for name in names:
            if not name.strip(".") or not name.isascii():
                raise InputError(
                    f"{name!r} is no name", source=source, field=field, expected="ASCII letters"
                )
