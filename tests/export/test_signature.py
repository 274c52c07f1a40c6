"""A signed bundle: by whom, or refused."""

import os
import shutil
import subprocess
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from twotower.errors import UserError
from twotower.export.bundle import read_bundle, seal


def write_key(folder, name: str, key) -> tuple[str, str]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ))  # fmt: skip
    public.write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ))  # fmt: skip
    return str(private), str(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_key(tmp_path_factory.mktemp("keys"), "ours", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def bundle(finished_run, tmp_path):
    return shutil.copytree(finished_run.bundle, tmp_path / "bundles" / "1")


@pytest.fixture
def signed(bundle, keys):
    manifest = read_bundle(bundle).manifest
    (bundle / "manifest.json").unlink()
    seal(bundle, manifest, keys[0])
    return bundle


def test_a_signature_is_checked_when_it_is_demanded(signed, keys, tmp_path) -> None:
    assert read_bundle(signed, signed_by=keys[1]).manifest.version == 1
    assert read_bundle(signed).manifest.version == 1
    _, other = write_key(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UserError, match=r"manifest.sig, is not by .*other"):
        read_bundle(signed, signed_by=other)
    (signed / "manifest.sig").write_bytes(b"")
    with pytest.raises(UserError, match="is not by"):
        read_bundle(signed, signed_by=keys[1])


def test_an_unsigned_bundle_is_refused_where_a_signature_is_demanded(bundle, keys) -> None:
    with pytest.raises(UserError, match="is not signed, and a signature by"):
        read_bundle(bundle, signed_by=keys[1])


def test_a_changed_and_resealed_bundle_is_refused(signed, keys) -> None:
    """Whoever changes a file and its SHA-256 lacks the key."""
    signature = (signed / "manifest.sig").read_bytes()
    (signed / "golden.json").write_text("[]")
    manifest = read_bundle(signed, verify=False).manifest
    (signed / "manifest.json").unlink()
    (signed / "manifest.sig").unlink()
    seal(signed, replace(manifest, sha256=""))
    (signed / "manifest.sig").write_bytes(signature)
    read_bundle(signed)
    with pytest.raises(UserError, match="not of this manifest"):
        read_bundle(signed, signed_by=keys[1])


def test_openssl_checks_the_signature_too(signed, keys) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    done = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys[1], "-rawin",
         "-in", signed / "manifest.json", "-sigfile", signed / "manifest.sig"],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("kind", ["missing", "text", "elliptic curve", "private for public"])
def test_what_is_no_key_is_refused(kind, signed, keys, tmp_path) -> None:
    path = tmp_path / "key"
    if kind == "text":
        path.write_text("hello")
    elif kind == "elliptic curve":
        path = write_key(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))[1]
    elif kind == "private for public":
        path = keys[0]
    words = "no public key here" if kind == "missing" else "holds no ed25519 public key"
    with pytest.raises(UserError, match=words):
        read_bundle(signed, signed_by=str(path))


def test_the_commands_sign_and_demand_signatures(signed, keys, twotower, tmp_path) -> None:
    demand = f"--require-signature={keys[1]}"
    done = twotower("bundle", "inspect", "bundles", demand, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "every file is as it was written" in done.stdout
    done = twotower("index", "bundles", "--remove=item-000001", demand, cwd=tmp_path)
    assert done.returncode == 2
    assert "--sign-with" in done.stderr
    done = twotower(
        "index", "bundles", "--remove=item-000001", demand, f"--sign-with={keys[0]}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert read_bundle(tmp_path / "bundles" / "2", signed_by=keys[1]).manifest.base == 1
    (tmp_path / "bundles" / "2" / "manifest.sig").unlink()
    done = twotower("bundle", "inspect", "bundles", demand, cwd=tmp_path)
    assert done.returncode == 2
    assert "REFUSED" in done.stdout
    assert "is not signed" in done.stdout


def test_an_unsigned_bundle_is_not_served_where_one_is_demanded(
    finished_run, keys, twotower
) -> None:
    done = twotower(
        "serve", *finished_run.arguments, f"--serve.require_signature={keys[1]}",
        cwd=finished_run.cwd,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not signed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_key_is_said_before_the_export(finished_run, twotower) -> None:
    done = twotower(
        "export", *finished_run.arguments, "--export.sign_with=none.pem", cwd=finished_run.cwd
    )
    assert done.returncode == 2
    assert "none.pem: no private key here: make one with" in done.stderr
    assert not (finished_run.run_dir / "bundles" / "2").exists()
