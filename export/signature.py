"""An ed25519 signature of a bundle's manifest, which holds the SHA-256 of every other file.

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub.pem

`manifest.sig` holds the 64 bytes of the signature, which OpenSSL checks too:
`openssl pkeyutl -verify -pubin -inkey key.pub.pem -rawin -in manifest.json -sigfile manifest.sig`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twotower.errors import UserError

SIGNATURE = "manifest.sig"
MAKE = {
    "private": "make one with `openssl genpkey -algorithm ed25519 -out key.pem`",
    "public": "take it from the private one with `openssl pkey -in key.pem -pubout -out FILE`",
}


def read_private_key(path: str) -> Any:
    """Return the key that signs.

    Raises:
        UserError: for a file that holds none.
    """
    return _read_key(path, "private")


def sign(content: bytes, key: Any) -> bytes:
    """Return the signature (64 bytes) of a manifest's bytes."""
    signature: bytes = key.sign(content)
    return signature


def check_signature(content: bytes, signature: bytes | None, public_key: str) -> None:
    """Refuse a manifest that the owner of a key did not sign.

    Args:
        content: of the manifest.
        signature: None where there is none.
        public_key: PEM file.

    Raises:
        UserError: saying whether there is no signature, or a wrong one.
    """
    key = _read_key(public_key, "public")
    if signature is None:
        raise UserError(
            f"is not signed, and a signature by {public_key} is demanded: sign it with "
            "export.sign_with, or do not demand one"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, content)
    except InvalidSignature:
        raise UserError(
            f"its signature, {SIGNATURE}, is not by {public_key} or not of this manifest: do not "
            "use the bundle"
        ) from None


def _read_key(path: str, kind: str) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import (
            load_pem_private_key,
            load_pem_public_key,
        )
    except ImportError:
        raise UserError("signatures need cryptography: pip install 'twotower[sign]'") from None
    if not Path(path).is_file():
        raise UserError(f"{path}: no {kind} key here: {MAKE[kind]}")
    content = Path(path).read_bytes()
    try:
        if kind == "private":
            key: Any = load_pem_private_key(content, password=None)
            fits = isinstance(key, ed25519.Ed25519PrivateKey)
        else:
            key = load_pem_public_key(content)
            fits = isinstance(key, ed25519.Ed25519PublicKey)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        fits = False
    if not fits:
        raise UserError(
            f"{path}: holds no ed25519 {kind} key in PEM without password: {MAKE[kind]}"
        )
    return key
