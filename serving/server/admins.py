"""Who may load, unload and read metrics: who has the admin key, or a token (JWT) that a trusted key signed.

Keys come from files, and each public key has one algorithm: what a token's own header names is never believed. Public
keys are read again when their file changes, so that an issuer can change its own.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from endcap.errors import InputError, from_os_error
from endcap.files import open_to_others
from serving.asgi import Headers
from serving.watched import Watched, read_bounded

__all__ = ["AdminKey", "Admins", "NotAllowedError", "PublicKey", "Tokens", "read_public_keys"]

MAX_KEYS_BYTES = 64 * 1024
MAX_KEYS = 64
MAX_TOKEN_BYTES = 8 * 1024
LEEWAY_S = 30
"""By how much the clocks of the issuer and of this machine may differ."""
_LEAST_RSA_BITS = 2048
_KEY = re.compile(rb"[\x21-\x7e]{16,512}")


class NotAllowedError(InputError):
    """Neither the admin key nor a good token came with the request: 401."""


@dataclass(frozen=True, slots=True)
class AdminKey:
    """What an operator sends as ``Authorization: Bearer <key>``."""

    key: bytes

    @staticmethod
    def read(path: Path) -> AdminKey:
        """The key in a file that only its owner can read.

        Raises:
            InputError: missing, open to others, or no key of 16 to 512 visible ASCII characters.
        """
        try:
            with path.open("rb") as file:
                exposed = open_to_others(path)
                raw = file.read(1024).strip()
        except FileNotFoundError as error:
            raise InputError("no admin key", where=path, next_step="write one there, readable by its owner") from error
        except OSError as error:
            raise from_os_error(error, doing=f"reading {path}") from error
        if exposed:
            raise InputError("the admin key can be read by others", where=path,
                             next_step=f"chmod 600 {path}, and think about a new key")  # fmt: skip
        if _KEY.fullmatch(raw) is None:
            raise InputError("not an admin key", where=path, next_step="write 16 to 512 visible ASCII characters")
        return AdminKey(raw)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An issuer's key and the one algorithm that it signs by."""

    algorithm: str
    key: Any


PublicKeys = Mapping[str | None, PublicKey]
"""By ``kid``; None for a key that has none."""


class Tokens:
    """Which tokens are good: signed by one of ``keys``, for ``audience``, not expired, and of ``issuer`` where one is
    named. A token must say when it expires."""

    def __init__(self, keys: Watched[PublicKeys], *, audience: str, issuer: str | None = None) -> None:
        self.keys = keys
        self._audience = audience
        self._issuer = issuer

    def check(self, token: bytes) -> None:
        """Nothing.

        Raises:
            NotAllowedError: it is not good; why is said in general terms.
        """
        import jwt

        required = ["exp", "aud", *(["iss"] if self._issuer is not None else [])]
        try:
            if len(token) > MAX_TOKEN_BYTES:
                raise _refused(f"is longer than {MAX_TOKEN_BYTES} bytes")
            found = self._key_of(jwt.get_unverified_header(token).get("kid"))
            jwt.decode(token, found.key, algorithms=[found.algorithm], audience=self._audience, issuer=self._issuer,
                       leeway=LEEWAY_S, options={"require": required})  # fmt: skip
        except jwt.ExpiredSignatureError:
            raise _refused("has expired") from None
        except jwt.InvalidAudienceError:
            raise _refused("is for another audience") from None
        except jwt.InvalidIssuerError:
            raise _refused("is of another issuer") from None
        except jwt.MissingRequiredClaimError:
            raise _refused(f"must say {', '.join(required)}") from None
        except jwt.PyJWTError:
            raise _refused("is none of a key that is trusted here") from None

    def _key_of(self, kid: object) -> PublicKey:
        keys = self.keys.value
        found = keys.get(kid) if isinstance(kid, str) else None
        if found is None and (kid is None or None in keys) and len(keys) == 1:
            found = next(iter(keys.values()))
        if found is None:
            raise _refused("is none of a key that is trusted here")
        return found


def _refused(why: str) -> NotAllowedError:
    return NotAllowedError(f"the token {why}", where="Authorization",
                           next_step="send Authorization: Bearer <a good token>")  # fmt: skip


class Admins:
    """Who is let in. ``key`` and ``tokens``: either suffices, and at least one must be there."""

    def __init__(self, key: AdminKey | None = None, tokens: Tokens | None = None) -> None:
        self.tokens = tokens
        self._key = key

    def check(self, headers: Headers) -> None:
        """Nothing.

        Raises:
            NotAllowedError: neither came with the request.
        """
        sent = next((value for name, value in headers if name == b"authorization"), b"")
        if self._key is not None and hmac.compare_digest(sent, b"Bearer " + self._key.key):
            return
        if self.tokens is not None and sent[:7].lower() == b"bearer " and sent.count(b".") == 2:
            self.tokens.check(sent[7:].strip())
            return
        taken = (("the admin key", self._key), ("a token", self.tokens))
        asked = " or ".join(what for what, known in taken if known is not None)
        raise NotAllowedError(f"{asked} is missing or wrong", where="Authorization",
                              next_step="send Authorization: Bearer <it>")  # fmt: skip


def read_public_keys(path: Path) -> PublicKeys:
    """The keys of a JWKS file (RFC 7517), or of a PEM file with one public key.

    Raises:
        InputError: the file cannot be read, holds a secret, or a key that is none of RSA (2048 bits at least), P-256,
            P-384, P-521 or Ed25519.
    """
    raw = read_bounded(path, limit=MAX_KEYS_BYTES, what="file of public keys")
    if b"PRIVATE KEY" in raw:
        raise InputError("holds a private key", where=path, next_step="give the public half alone, and make a new key")
    if raw.lstrip()[:1] == b"{":
        return _of_jwks(raw, path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError("neither a JWKS nor a public key in PEM form", where=path) from error
    return {None: PublicKey(_algorithm_of(key, path), key)}


_BY_ALGORITHM = {
    "RS256": "RSA", "RS384": "RSA", "RS512": "RSA", "PS256": "RSA", "PS384": "RSA", "PS512": "RSA",
    "ES256": "ES256", "ES384": "ES384", "ES512": "ES512", "EdDSA": "EdDSA",
}  # fmt: skip
"""The algorithms that there are, by the kind of key that they take. None is symmetric."""


def _of_jwks(raw: bytes, path: Path) -> PublicKeys:
    from jwt import PyJWK, PyJWTError

    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InputError("not a JWKS", where=path) from error
    entries = document.get("keys")
    if type(entries) is not list or not 0 < len(entries) <= MAX_KEYS:
        raise InputError(f"not a JWKS of 1 to {MAX_KEYS} keys", where=path, next_step='{"keys": [...]}')
    keys: dict[str | None, PublicKey] = {}
    for place, entry in enumerate(entries):
        where = f"{path}: keys.{place}"
        if type(entry) is not dict or entry.get("use", "sig") != "sig":
            continue
        if entry.keys() & {"d", "k", "p", "q"}:
            raise InputError("holds a secret", where=where, next_step="give the public halves alone, and make new keys")
        kid, said = entry.get("kid"), entry.get("alg")
        if kid in keys or not (kid is None or type(kid) is str):
            raise InputError("two keys of one kid, or a kid that is no text", where=where)
        try:
            key = PyJWK.from_dict(entry, algorithm=said if said in _BY_ALGORITHM else _default(entry)).key
        except (PyJWTError, ValueError, TypeError) as error:
            raise InputError("a key that cannot be used", where=where) from error
        default = _algorithm_of(key, where)
        if said is not None and _BY_ALGORITHM.get(said) != ("RSA" if default == "RS256" else default):
            raise InputError("its alg is none of its key's", where=where)
        keys[kid] = PublicKey(default if said is None else said, key)
    if not keys:
        raise InputError("a JWKS without a key that signs", where=path)
    return keys


def _default(entry: Mapping[str, object]) -> str:
    """For PyJWT, which wants to be told; what the key really is decides afterwards."""
    curves = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
    match entry.get("kty"):
        case "EC":
            return curves.get(str(entry.get("crv")), "ES256")
        case "OKP":
            return "EdDSA"
        case _:
            return "RS256"


def _algorithm_of(key: object, where: object) -> str:
    """The algorithm of a key that does not name its own."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _LEAST_RSA_BITS:
            raise InputError(f"an RSA key of {key.key_size} bits", where=str(where), next_step="2048 or more")
        return "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey):
        found = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}.get(key.curve.name)
        if found is not None:
            return found
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "EdDSA"
    raise InputError("a key of no kind that is taken", where=str(where),
                     next_step="RSA, P-256, P-384, P-521 or Ed25519")  # fmt: skip
