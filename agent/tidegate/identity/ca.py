"""The mesh CA: one root, kept in a directory, that issues short-lived leaves to sidecars.

Certificates follow the X.509-SVID specification of SPIFFE: one URI name, critical because the
subject is empty. Keys are ECDSA P-256. Knows nothing of who may have which name, nor of where
leaves are used; no key ever shows in a repr or a message.
"""

import contextlib
import datetime
import os
import shutil
import tempfile
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tidegate.errors import InputError, TidegateError
from tidegate.identity import spiffe

ROOT_LIFETIME_S = 10 * 365 * 86400
BACKDATE_S = 60
"""How far a certificate's validity begins in the past: what clocks of nodes may differ by."""

_CERTIFICATE = "root.pem"
_KEY = "root.key"

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


class Leaf(msgspec.Struct, frozen=True, kw_only=True):
    """A leaf certificate with its key. Times in seconds since the epoch, serial in hexadecimal."""

    spiffe_uri: str
    certificate_pem: str
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
        self, directory: Path, key: ec.EllipticCurvePrivateKey, root: x509.Certificate
    ) -> None:
        self._directory = directory
        self._key = key
        self._root = root
        self.trust_domain = _trust_domain_of(root, directory)
        self.roots_pem = root.public_bytes(serialization.Encoding.PEM).decode()
        """The trust bundle: all certificates that leaves of this mesh may chain to."""

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
            key = serialization.load_pem_private_key(files[_KEY].read_bytes(), password=None)
            root = x509.load_pem_x509_certificate(files[_CERTIFICATE].read_bytes())
        except ValueError as error:
            raise IdentityError(
                f"{directory}: this mesh CA is damaged: {_KEY} or {_CERTIFICATE} is not PEM;"
                " restore it, or remove the directory and create a new CA"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != root.public_key():
            raise IdentityError(f"{directory}: {_KEY} is not the key of {_CERTIFICATE}")
        return cls(directory, key, root)

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
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            key_pem=_private_pem(key).decode(),
            not_before=certificate.not_valid_before_utc.timestamp(),
            not_after=certificate.not_valid_after_utc.timestamp(),
            serial=f"{certificate.serial_number:x}",
        )


def _make_root(key: ec.EllipticCurvePrivateKey, trust_domain: str) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tidegate mesh root")])
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
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_ROOT_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
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
