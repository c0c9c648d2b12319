"""The mesh CA: a root, kept in a directory, that issues short-lived leaves to sidecars.

Certificates follow the X.509-SVID specification of SPIFFE: one URI name, critical because the
subject is empty. Keys are ECDSA P-256. Knows nothing of who may have which name, nor of where
leaves are used; no key ever shows in a repr or a message.

A root can be exchanged while the mesh works. The former root stays trusted until its leaves have ended; and because
it has signed the new root's key as well, in a certificate that goes with each new leaf, those are accepted by whoever
knows only the former root.
"""

import contextlib
import datetime
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tidegate.errors import InputError, TidegateError
from tidegate.identity import spiffe

MOST_CROSSED = 1
"""How many certificates of other roots' keys may stand between a root and a leaf."""
ROOT_LIFETIME_S = 10 * 365 * 86400
BACKDATE_S = 60
"""How far a certificate's validity begins in the past: what clocks of nodes may differ by."""

_CERTIFICATE = "root.pem"
"""The root, after it the certificate of its key by the former root where there was one."""
_KEY = "root.key"
_NEXT_KEY = "next.key"
"""The key of the root that comes next, for the moment between its certificate's coming and the key's."""
_FORMER = "former.json"

_NO_USAGE = {
    "digital_signature": False,
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}
_ROOT_USAGE = x509.KeyUsage(**(_NO_USAGE | {"key_cert_sign": True, "crl_sign": True}))
_LEAF_USAGE = x509.KeyUsage(**(_NO_USAGE | {"digital_signature": True}))


class IdentityError(TidegateError):
    """The mesh CA cannot be made, read or used."""


class _Former(msgspec.Struct, frozen=True, kw_only=True):
    """A root that does not issue any more."""

    certificate_pem: str
    trusted_until: float


class Leaf(msgspec.Struct, frozen=True, kw_only=True):
    """A leaf certificate with its key. Times in seconds since the epoch, serial in hexadecimal."""

    spiffe_uri: str
    certificate_pem: str
    """The leaf, and after it what leads to the former root, where there was one."""
    key_pem: str
    not_before: float
    not_after: float
    serial: str

    def __repr__(self) -> str:
        return (
            f"Leaf({self.spiffe_uri!r}, serial={self.serial!r},"
            f" not_before={self.not_before!r}, not_after={self.not_after!r})"
        )


class MeshCA:
    """A root certificate and its key. Made by `create`, found again by `load`."""

    def __init__(
        self,
        directory: Path,
        key: ec.EllipticCurvePrivateKey,
        root: x509.Certificate,
        crossed: x509.Certificate | None = None,
        former: tuple[_Former, ...] = (),
    ) -> None:
        self._directory = directory
        self._key = key
        self._root = root
        self._crossed = crossed
        self._former = former
        self.trust_domain = _trust_domain_of(root, directory)

    @property
    def roots(self) -> tuple[str, ...]:
        """The certificates, PEM, that leaves of this mesh may chain to: the one that issues, then former ones."""
        own = _pem(self._root)
        now = time.time()
        former = (one.certificate_pem for one in self._former if one.trusted_until > now)
        return (own, *(certificate for certificate in former if certificate != own))

    @property
    def roots_pem(self) -> str:
        """The trust bundle: all of `roots` together."""
        return "".join(self.roots)

    def __repr__(self) -> str:
        return f"MeshCA({str(self._directory)!r}, {self.trust_domain!r})"

    @classmethod
    def create(cls, directory: Path, trust_domain: str) -> "MeshCA":
        """Make a new root and put it into `directory`, in whole or not at all.

        IdentityError when something is there already, InputError when `trust_domain` is no name.
        """
        spiffe.trust_domain(trust_domain)
        key = ec.generate_private_key(ec.SECP256R1())
        root = _make_root(key, trust_domain)
        directory.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp gives mode 0700.
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            _write(staging / _KEY, _private_pem(key), mode=0o600)
            _write(
                staging / _CERTIFICATE, root.public_bytes(serialization.Encoding.PEM), mode=0o644
            )
            try:
                staging.rename(directory)
            except OSError as error:
                raise IdentityError(
                    f"{directory}: cannot put a new mesh CA here: {error.strerror};"
                    " expected a path where nothing is yet"
                ) from error
        except BaseException:
            shutil.rmtree(staging)
            raise
        return cls(directory, key, root)

    @classmethod
    def load(cls, directory: Path) -> "MeshCA":
        """Read the CA that `create` made.

        IdentityError when it is missing, incomplete or damaged, or when others can read the key.
        """
        if not directory.is_dir():
            raise IdentityError(f"{directory}: there is no mesh CA; create one first")
        files = {name: directory / name for name in (_KEY, _CERTIFICATE)}
        next_key = directory / _NEXT_KEY
        missing = sorted(name for name, path in files.items() if not path.is_file())
        if missing:
            raise IdentityError(
                f"{directory}: this mesh CA is incomplete, {' and '.join(missing)} missing;"
                " restore it, or remove the directory and create a new CA"
            )
        mode = files[_KEY].stat().st_mode & 0o777
        if mode & 0o077:
            raise IdentityError(
                f"{files[_KEY]}: mode is {mode:04o}, so others can read the key; expected 0600"
            )
        try:
            root, *crossed = x509.load_pem_x509_certificates(files[_CERTIFICATE].read_bytes())
            key = _load_key(files[_KEY])
            if key.public_key() != root.public_key() and next_key.is_file():
                # A rotation was interrupted after the certificate had come.
                next_key.replace(files[_KEY])
                key = _load_key(files[_KEY])
            former = _load_former(directory / _FORMER)
        except ValueError as error:
            raise IdentityError(
                f"{directory}: this mesh CA is damaged: {_KEY} or {_CERTIFICATE} is not PEM;"
                " restore it, or remove the directory and create a new CA"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
            raise IdentityError(f"{directory}: {_KEY} is not the key of {_CERTIFICATE}")
        return cls(directory, key, root, crossed[0] if crossed else None, former)

    def rotate(self, keep_s: float) -> "MeshCA":
        """Puts a new root in the place of this one, in whole or not at all, and gives the CA that has it.

        The present root stays trusted for `keep_s` seconds: at least as long as leaves live that it has issued.
        InputError when that is negative. One process at a time.
        """
        if keep_s < 0:
            raise InputError(f"a root cannot be kept for {keep_s} s", expected="0 s or more")
        now = time.time()
        key = ec.generate_private_key(ec.SECP256R1())
        root = _make_root(key, self.trust_domain)
        crossed = _cross_signed(root, self._root, self._key)
        kept = [one for one in self._former if one.trusted_until > now]
        former = (
            *(one for one in kept if one.certificate_pem != _pem(self._root)),
            _Former(certificate_pem=_pem(self._root), trusted_until=now + keep_s),
        )
        # Until the certificate comes the former CA is whole, and from then on the new one is.
        _replace(self._directory / _FORMER, msgspec.json.encode(former), mode=0o644)
        _replace(self._directory / _NEXT_KEY, _private_pem(key), mode=0o600)
        _replace(self._directory / _CERTIFICATE, (_pem(root) + _pem(crossed)).encode(), mode=0o644)
        (self._directory / _NEXT_KEY).replace(self._directory / _KEY)
        _sync(self._directory)
        return MeshCA(self._directory, key, root, crossed, former)

    def issue(self, spiffe_uri: str, lifetime_s: float) -> Leaf:
        """Issue a leaf for one SPIFFE URI, valid from a minute ago until `lifetime_s` from now.

        It never outlives the root. InputError when the URI is not of this trust domain or the
        lifetime is not positive, IdentityError when the root has expired.
        """
        if not spiffe_uri.startswith(f"spiffe://{self.trust_domain}/"):
            raise InputError(
                f"{spiffe_uri!r} is not of this mesh", expected=f"spiffe://{self.trust_domain}/..."
            )
        if lifetime_s <= 0:
            raise InputError(f"lifetime {lifetime_s} s", expected="more than 0 s")
        now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        end_of_root = self._root.not_valid_after_utc
        if now >= end_of_root:
            raise IdentityError(
                f"{self._directory}: the root certificate expired on {end_of_root:%Y-%m-%d} (UTC)"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(seconds=BACKDATE_S))
            .not_valid_after(min(now + datetime.timedelta(seconds=lifetime_s), end_of_root))
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_uri)]),
                critical=True,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_LEAF_USAGE, critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return Leaf(
            spiffe_uri=spiffe_uri,
            certificate_pem=_pem(certificate) + (_pem(self._crossed) if self._crossed else ""),
            key_pem=_private_pem(key).decode(),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            serial=f"{certificate.serial_number:x}",
        )


def _make_root(key: ec.EllipticCurvePrivateKey, trust_domain: str) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    # Verifiers look for an issuer by its name: each root has one of its own.
    common_name = f"tidegate mesh root {secrets.token_hex(4)}"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=BACKDATE_S))
        .not_valid_after(now + datetime.timedelta(seconds=ROOT_LIFETIME_S))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]
            ),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=MOST_CROSSED), critical=True)
        .add_extension(_ROOT_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _cross_signed(
    root: x509.Certificate, by: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """A certificate for a root's name and key by another root, of which it outlives nothing."""
    public = root.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise TypeError("a root's key is an ECDSA key")
    return (
        x509.CertificateBuilder()
        .subject_name(root.subject)
        .issuer_name(by.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(root.not_valid_before_utc)
        .not_valid_after(min(root.not_valid_after_utc, by.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_ROOT_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )


def _trust_domain_of(root: x509.Certificate, directory: Path) -> str:
    try:
        root.verify_directly_issued_by(root)
        names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return spiffe.trust_domain(uri.removeprefix("spiffe://"))
    except (InvalidSignature, ValueError, x509.ExtensionNotFound, InputError) as error:
        raise IdentityError(
            f"{directory / _CERTIFICATE}: not a self-signed root with one SPIFFE trust domain"
        ) from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """ValueError when it is none."""
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is not an ECDSA key")
    return key


def _load_former(path: Path) -> tuple[_Former, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[_Former, ...])
    except FileNotFoundError:
        return ()
    except msgspec.DecodeError as error:
        raise IdentityError(f"{path}: damaged; restore it, or remove it: {error}") from error


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with contextlib.closing(os.fdopen(descriptor, "wb")) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes, *, mode: int) -> None:
    """One file in the place of another, at once and on the disk."""
    staging = path.with_name(f".{path.name}.new")
    staging.unlink(missing_ok=True)
    _write(staging, content, mode=mode)
    staging.replace(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
