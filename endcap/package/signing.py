"""Signing and verification by OpenSSF model-signing (https://github.com/sigstore/model-transparency, spec v1.0).

The signature covers a hash of every file in the package, the manifest included. Keys are elliptic-curve (P-256) PEM
files; the private one is made on first use and kept readable by its owner alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from endcap.errors import PackageError, VerificationError
from endcap.files import open_to_others, write_atomic
from endcap.package.contract import SIGNATURE_FILE, Manifest, read_manifest, verify_digests

__all__ = ["PRIVATE_KEY_FILE", "PUBLIC_KEY_FILE", "ensure_signing_key", "sign_package", "verify_package"]

PRIVATE_KEY_FILE = "signing.key"
PUBLIC_KEY_FILE = "signing.pub"


def ensure_signing_key(folder: Path) -> tuple[Path, Path]:
    """The (private, public) key files in ``folder``, made on first use; the private one has mode 0600.

    Raises:
        PackageError: the private key can be read by others, or is damaged.
    """
    private, public = folder / PRIVATE_KEY_FILE, folder / PUBLIC_KEY_FILE
    if not private.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomic(
            private,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            mode=0o600,
        )
    if open_to_others(private):
        raise PackageError("the signing key can be read by others", where=private,
                           next_step=f"chmod 600 {private}, and think about a new key")  # fmt: skip
    if not public.exists():
        try:
            loaded = serialization.load_pem_private_key(private.read_bytes(), password=None)
        except ValueError as error:
            raise PackageError("the signing key is damaged", where=private) from error
        write_atomic(
            public,
            loaded.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        )
    return private, public


def sign_package(folder: Path, private_key: Path) -> Path:
    """Sign a sealed package; returns the signature file.

    Raises:
        PackageError: the package is not sealed, or the key cannot be used.
    """
    import model_signing

    manifest = read_manifest(folder)
    verify_digests(folder, manifest)
    signature = folder / SIGNATURE_FILE
    try:
        model_signing.signing.Config().use_elliptic_key_signer(private_key=private_key).set_hashing_config(
            _hashing()
        ).sign(folder, signature)
    except (ValueError, OSError, TypeError) as error:
        raise PackageError(f"could not sign: {error}", where=folder) from error
    return signature


def verify_package(folder: Path, public_key: Path) -> Manifest:
    """The manifest of a package whose signature and digests verify. Call it before anything of the package is loaded.

    Raises:
        VerificationError: unsigned, signed with another key, or changed since.
        PackageError: not a package at all.
    """
    import model_signing

    signature = folder / SIGNATURE_FILE
    if not folder.is_dir():
        raise PackageError("no such package folder", where=folder)
    if not signature.is_file():
        raise VerificationError("the package is not signed", where=folder,
                                next_step="sign it with `endcap model sign`")  # fmt: skip
    if not public_key.is_file():
        raise VerificationError("no public key to verify with", where=public_key)
    try:
        serialization.load_pem_public_key(public_key.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VerificationError(
            "not a public key in PEM form", where=public_key, next_step=f"give the signer's {PUBLIC_KEY_FILE}"
        ) from error
    try:
        model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key).set_hashing_config(
            _hashing()
        ).verify(_unlinked(folder), signature)
    except Exception as error:
        raise VerificationError(
            f"the signature does not verify: {_reason(error)}",
            where=folder,
            next_step="get the package again from the registry; do not load this one",
        ) from error
    manifest = read_manifest(folder)
    verify_digests(folder, manifest)
    return manifest


def _unlinked(folder: Path) -> Path:
    """What a folder that is a link leads to, followed once: a package that KServe brings as an image is a link into
    another container's files, where no path can be resolved further. Links inside of a package are refused."""
    return folder.parent / folder.readlink() if folder.is_symlink() else folder


def _hashing() -> Any:
    import model_signing

    # Relative to the package, whatever folder this process runs in.
    return model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _reason(error: Exception) -> str:
    """model-signing's own words, without the raw digests it prints."""
    text = " ".join(str(error).split()) or type(error).__name__
    # The list is printed as Python does: a digest with a quote among its bytes has all quotes escaped.
    changed = re.findall(r"""Hash mismatch for \\?['"]([^'"\\]+)""", text)
    if changed:
        return f"{', '.join(changed)} changed after signing"
    return text[:200]
