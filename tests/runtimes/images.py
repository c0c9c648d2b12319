"""A container image made on this machine: a file system of busybox, as an archive in OCI's image layout.

No registry is asked: containerd and podman load the archive (opencontainers/image-spec, image-layout.md, config.md).
"""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

NAME = "localhost/tidegate/box:1"
_APPLETS = ("sh", "sleep", "wget", "httpd", "nc", "cat", "id", "ip", "true", "su")
SIDECAR = "sidecar"
"""The user of the image as which a proxy runs; its id is DEFAULT_PROXY_UID."""

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def build(archive: Path, busybox: Path) -> None:
    """Writes an image whose containers have a shell and the network's tools; `busybox` is linked statically."""
    layer = _layer(busybox)
    config = _json(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sleep", "2147483647"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            "history": [],
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _described(_CONFIG, config),
            "layers": [_described(_LAYER, layer)],
        }
    )
    name = {"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": NAME}
    index = {"schemaVersion": 2, "manifests": [_described(_MANIFEST, manifest, name)]}
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", _json(index))
        for blob in (layer, config, manifest):
            _add(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)


def _layer(busybox: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp", "www"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        _add(tar, "bin/busybox", busybox.read_bytes(), 0o755)
        for applet in _APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/:/bin/sh\nsidecar:x:5995:5995::/:/bin/sh\n")
        _add(tar, "etc/group", b"root:x:0:\nsidecar:x:5995:\n")
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _described(kind: str, blob: bytes, annotations: dict[str, str] | None = None) -> dict[str, Any]:
    described: dict[str, Any] = {"mediaType": kind, "digest": _digest(blob), "size": len(blob)}
    return described if annotations is None else {**described, "annotations": annotations}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(document: object) -> bytes:
    return json.dumps(document).encode()
