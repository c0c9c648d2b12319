"""SPIFFE names and the mesh CA, checked by OpenSSL where a certificate has to mean something."""

import contextlib
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from cryptography import x509

from tidegate.errors import InputError
from tidegate.identity import spiffe
from tidegate.identity.ca import BACKDATE_S, IdentityError, Leaf, MeshCA

DOMAIN = "11111111-2222-3333-4444-555555555555.consul"
WEB = spiffe.service_id(DOMAIN, "web")


@pytest.fixture
def ca(tmp_path: Path) -> MeshCA:
    return MeshCA.create(tmp_path / "ca", DOMAIN)


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    return done.stdout + done.stderr


def test_names_have_the_forms_of_consul() -> None:
    assert f"spiffe://{DOMAIN}/ns/default/dc/dc1/svc/web" == WEB
    assert spiffe.service_id(DOMAIN, "shop/web", "dc2").endswith("/ns/shop/dc/dc2/svc/web")
    in_partition = spiffe.service_id(DOMAIN, "east/shop/web", "dc2")
    assert in_partition == f"spiffe://{DOMAIN}/ap/east/ns/shop/dc/dc2/svc/web"
    assert spiffe.sni(DOMAIN, "web") == f"web.default.dc1.internal.{DOMAIN}"
    assert spiffe.sni(DOMAIN, "shop/web", "dc2") == f"web.shop.dc2.internal.{DOMAIN}"
    assert (
        spiffe.sni(DOMAIN, "east/default/web", "dc2")
        == f"web.default.east.dc2.internal-v1.{DOMAIN}"
    )


@pytest.mark.parametrize(
    "name",
    ["", "Web", "web.api", "-web", "web-", "we b", "web/", "a/b/c/d", "web\n", "*", "é", "a" * 64],
)
def test_what_is_no_dns_label_is_no_part_of_a_name(name: str) -> None:
    for make in (spiffe.service_id, spiffe.sni):
        for arguments in ((name,), (f"{name}/web",), (f"{name}/default/web",), ("web", name)):
            with pytest.raises(InputError):
                make(DOMAIN, *arguments)


@pytest.mark.parametrize(
    "domain", ["", "A.consul", ".consul", "a..consul", "a/b", "a." * 130 + "a"]
)
def test_what_is_no_dns_name_is_no_trust_domain(domain: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trust domain"):
        spiffe.service_id(domain, "web")
    with pytest.raises(InputError, match="trust domain"):
        MeshCA.create(tmp_path / "ca", domain)
    assert not list(tmp_path.iterdir())


def test_a_leaf_is_accepted_by_openssl_as_client_and_as_server(ca: MeshCA, tmp_path: Path) -> None:
    leaf = ca.issue(WEB, 3600)
    (tmp_path / "roots.pem").write_text(ca.roots_pem)
    (tmp_path / "leaf.pem").write_text(leaf.certificate_pem)
    for purpose in ("sslclient", "sslserver"):
        verified = openssl(
            "verify", "-x509_strict", "-purpose", purpose,
            "-CAfile", tmp_path / "roots.pem", tmp_path / "leaf.pem",
        )  # fmt: skip
        assert "leaf.pem: OK" in verified, verified
    (tmp_path / "key.pem").write_text(leaf.key_pem)
    public = openssl("x509", "-noout", "-pubkey", "-in", tmp_path / "leaf.pem")
    assert public == openssl("pkey", "-pubout", "-in", tmp_path / "key.pem")


def test_a_leaf_is_an_x509_svid(ca: MeshCA) -> None:
    leaf = ca.issue(WEB, 3600)
    certificate = x509.load_pem_x509_certificate(leaf.certificate_pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(WEB)]
    assert not list(certificate.subject)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not constraints.value.ca
    assert int(leaf.serial, 16) == certificate.serial_number


def test_a_leaf_is_valid_from_a_minute_ago_for_its_lifetime(ca: MeshCA) -> None:
    before = time.time() - 1
    leaf = ca.issue(WEB, 600)
    assert before - BACKDATE_S <= leaf.not_before <= time.time() - BACKDATE_S
    assert before + 600 <= leaf.not_after <= time.time() + 600


def test_a_leaf_never_outlives_the_root(ca: MeshCA) -> None:
    root = x509.load_pem_x509_certificate(ca.roots_pem.encode())
    assert ca.issue(WEB, 100 * 365 * 86400).not_after == root.not_valid_after_utc.timestamp()


@pytest.mark.parametrize(
    ("uri", "lifetime_s"),
    [("spiffe://other.consul/ns/default/dc/dc1/svc/web", 60), (f"{DOMAIN}/web", 60), (WEB, 0)],
)
def test_a_leaf_is_refused_for_another_mesh_or_no_time(
    ca: MeshCA, uri: str, lifetime_s: float
) -> None:
    with pytest.raises(InputError):
        ca.issue(uri, lifetime_s)


def test_every_leaf_has_a_key_and_a_serial_of_its_own(ca: MeshCA) -> None:
    first, second = ca.issue(WEB, 60), ca.issue(WEB, 60)
    assert first.key_pem != second.key_pem
    assert first.serial != second.serial


def test_a_loaded_ca_is_the_one_that_was_created(ca: MeshCA, tmp_path: Path) -> None:
    loaded = MeshCA.load(tmp_path / "ca")
    assert (loaded.roots_pem, loaded.trust_domain) == (ca.roots_pem, DOMAIN)
    certificate = x509.load_pem_x509_certificate(loaded.issue(WEB, 60).certificate_pem.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.roots_pem.encode()))


def test_only_the_owner_reads_the_key(ca: MeshCA, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "ca" / "root.key").stat().st_mode) == 0o600
    (tmp_path / "ca" / "root.key").chmod(0o640)
    with pytest.raises(IdentityError, match="0640"):
        MeshCA.load(tmp_path / "ca")


def test_creating_never_replaces_a_ca(ca: MeshCA, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="where nothing is yet"):
        MeshCA.create(tmp_path / "ca", DOMAIN)
    assert MeshCA.load(tmp_path / "ca").roots_pem == ca.roots_pem
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


@pytest.mark.parametrize("missing", ["root.key", "root.pem"])
def test_a_half_written_ca_is_told_from_a_missing_and_a_damaged_one(
    ca: MeshCA, tmp_path: Path, missing: str
) -> None:
    (tmp_path / "ca" / missing).write_text("no PEM")
    with pytest.raises(IdentityError, match="damaged"):
        MeshCA.load(tmp_path / "ca")
    (tmp_path / "ca" / missing).unlink()
    with pytest.raises(IdentityError, match=rf"incomplete, {missing} missing"):
        MeshCA.load(tmp_path / "ca")
    with pytest.raises(IdentityError, match="there is no mesh CA"):
        MeshCA.load(tmp_path / "elsewhere")


def test_a_key_of_another_root_is_found_out(ca: MeshCA, tmp_path: Path) -> None:
    MeshCA.create(tmp_path / "other", DOMAIN)
    (tmp_path / "other" / "root.key").rename(tmp_path / "ca" / "root.key")
    with pytest.raises(IdentityError, match="not the key of"):
        MeshCA.load(tmp_path / "ca")


def test_a_key_shows_in_no_repr(ca: MeshCA) -> None:
    leaf = ca.issue(WEB, 60)
    secret = leaf.key_pem.splitlines()[1]
    for shown in (repr(ca), str(ca), repr(leaf), str(leaf), f"{[leaf]}"):
        assert secret not in shown
        assert "PRIVATE" not in shown


def is_accepted(directory: Path, roots_pem: str, leaf: Leaf) -> bool:
    """Whether somebody who trusts these roots accepts what a sidecar shows with this leaf."""
    own, *others = re.findall(
        "-----BEGIN.+?END CERTIFICATE-----\n", leaf.certificate_pem, re.DOTALL
    )
    for name, text in (("roots", roots_pem), ("leaf", own), ("others", "".join(others))):
        (directory / f"{name}.pem").write_text(text)
    more = ("-untrusted", directory / "others.pem") if others else ()
    verified = openssl(
        "verify", "-x509_strict", "-purpose", "sslserver",
        "-CAfile", directory / "roots.pem", *more, directory / "leaf.pem",
    )  # fmt: skip
    return "leaf.pem: OK" in verified


def test_while_a_root_is_exchanged_everybody_accepts_everybody(ca: MeshCA, tmp_path: Path) -> None:
    rotated = ca.rotate(keep_s=3600)
    for issuer in (ca, rotated):
        leaf = issuer.issue(WEB, 600)
        for trusted in (ca.roots_pem, rotated.roots_pem):
            assert is_accepted(tmp_path, trusted, leaf)
    assert rotated.roots == (rotated.roots[0], ca.roots_pem)
    again = rotated.rotate(keep_s=3600)
    assert len(again.roots) == 3
    for issuer in (ca, rotated, again):
        assert is_accepted(tmp_path, again.roots_pem, issuer.issue(WEB, 600))
    assert is_accepted(tmp_path, rotated.roots_pem, again.issue(WEB, 600))


def test_a_former_root_is_trusted_as_long_as_it_was_kept(ca: MeshCA, tmp_path: Path) -> None:
    rotated = ca.rotate(keep_s=0)
    assert not is_accepted(tmp_path, rotated.roots_pem, ca.issue(WEB, 600))
    assert is_accepted(tmp_path, rotated.roots_pem, rotated.issue(WEB, 600))
    with pytest.raises(InputError, match="-1 s"):
        rotated.rotate(keep_s=-1)


def test_an_exchanged_root_is_found_again(ca: MeshCA, tmp_path: Path) -> None:
    rotated = ca.rotate(keep_s=3600)
    loaded = MeshCA.load(tmp_path / "ca")
    assert loaded.roots == rotated.roots
    assert is_accepted(tmp_path, ca.roots_pem, loaded.issue(WEB, 600)), "by the former root"
    mode = stat.S_IMODE((tmp_path / "ca" / "root.key").stat().st_mode)
    assert mode == 0o600
    assert {path.name for path in (tmp_path / "ca").iterdir()} == {
        "root.key",
        "root.pem",
        "former.json",
    }


def test_an_exchange_that_is_interrupted_anywhere_leaves_a_whole_ca(
    ca: MeshCA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "ca", before)
    replace = Path.replace
    for completed in range(5):
        directory = tmp_path / f"ca-{completed}"
        shutil.copytree(before, directory)
        left = iter(range(completed))

        def interrupted(path: Path, target: Path, left=left) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return replace(path, target)

        whole = MeshCA.load(directory)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                whole.rotate(keep_s=3600)
        found = MeshCA.load(directory)
        issued = found.issue(WEB, 600)
        assert is_accepted(tmp_path, ca.roots_pem, issued)
        assert is_accepted(tmp_path, found.roots_pem, ca.issue(WEB, 600))
        assert is_accepted(tmp_path, found.rotate(keep_s=60).roots_pem, issued)
