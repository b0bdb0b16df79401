"""Tokens: which are good, and which files of keys are taken."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from endcap.errors import InputError
from serving.server.admins import AdminKey, Admins, NotAllowedError, Tokens, read_public_keys
from serving.watched import Watched

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
GOOD: dict[str, Any] = {"aud": "endcap", "iss": "https://issuer", "sub": "ci"}


def pem(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))


def jwk(key: Any, **more: object) -> dict[str, Any]:
    algorithm = RSAAlgorithm if key is RSA else OKPAlgorithm if key is ED else ECAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), **more}


def token(key: Any, algorithm: str, *, kid: str | None = None, lasts_s: float = 60, **claims: object) -> bytes:
    said = {**GOOD, "exp": time.time() + lasts_s, **claims}
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, key, algorithm=algorithm, headers=None if kid is None else {"kid": kid}).encode()


def tokens(path: Path, *, issuer: str | None = "https://issuer") -> Tokens:
    return Tokens(Watched(path, read_public_keys), audience="endcap", issuer=issuer)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(RSA, kid="r", use="sig"), jwk(EC, kid="e"), jwk(ED, kid="d"),
                                         jwk(OTHER, kid="x", use="enc")]}))  # fmt: skip
    return path


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(RSA, "RS256", "r"), (EC, "ES256", "e"), (ED, "EdDSA", "d")])
def test_a_token_of_a_trusted_key_is_good(keys: Path, key: Any, algorithm: str, kid: str) -> None:
    tokens(keys).check(token(key, algorithm, kid=kid))
    tokens(keys).check(token(key, algorithm, kid=kid, aud=["others", "endcap"]))


def forged(header: Mapping[str, object], claims: Mapping[str, object], signature: bytes = b"") -> bytes:
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)


def by_public_key_as_secret() -> bytes:
    import hashlib
    import hmac

    secret = pem(RSA)
    unsigned = forged({"alg": "HS256", "kid": "r"}, {**GOOD, "exp": time.time() + 60})[:-1]
    signature = hmac.digest(secret, unsigned, hashlib.sha256)
    return unsigned + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (lambda: token(EC, "ES256", kid="e", lasts_s=-60), "has expired"),
        (lambda: token(EC, "ES256", kid="e", exp=None), "must say exp"),
        (lambda: token(EC, "ES256", kid="e", aud="others"), "another audience"),
        (lambda: token(EC, "ES256", kid="e", aud=None), "must say"),
        (lambda: token(EC, "ES256", kid="e", iss="https://others"), "another issuer"),
        (lambda: token(EC, "ES256", kid="e", nbf=time.time() + 600), "none of a key"),
        (lambda: token(OTHER, "ES256", kid="e"), "none of a key"),
        (lambda: token(OTHER, "ES256", kid="x"), "none of a key"),
        (lambda: token(EC, "ES256"), "none of a key"),
        (lambda: token(RSA, "RS512", kid="r"), "none of a key"),
        (lambda: token(RSA, "PS256", kid="r"), "none of a key"),
        (lambda: forged({"alg": "none", "kid": "e"}, {**GOOD, "exp": time.time() + 60}), "none of a key"),
        (by_public_key_as_secret, "none of a key"),
        (lambda: token(EC, "ES256", kid="e")[:-8] + b"AAAAAAAA", "none of a key"),
        (lambda: token(EC, "ES256", kid="e", more="x" * 9000), "longer than"),
        (lambda: b"a.b.c", "none of a key"),
        (lambda: b"\xff\xfe..", "none of a key"),
    ],
)
def test_any_other_is_refused_and_not_repeated(keys: Path, sent: Any, says: str) -> None:
    raw = sent()
    with pytest.raises(NotAllowedError, match=says) as refused:
        tokens(keys).check(raw)
    assert raw.decode("latin-1") not in str(refused.value)


def test_a_pem_file_holds_one_key(tmp_path: Path) -> None:
    path = tmp_path / "issuer.pem"
    path.write_bytes(pem(EC))
    checked = tokens(path, issuer=None)
    checked.check(token(EC, "ES256", kid="whatever", iss="anybody"))
    with pytest.raises(NotAllowedError):
        checked.check(token(OTHER, "ES256"))


def test_an_issuer_may_change_its_keys(keys: Path) -> None:
    checked = tokens(keys)
    keys.write_text(json.dumps({"keys": [jwk(OTHER, kid="new")]}))
    assert checked.keys.refresh()
    checked.check(token(OTHER, "ES256", kid="new"))
    with pytest.raises(NotAllowedError):
        checked.check(token(EC, "ES256", kid="e"))
    keys.write_text("{")
    assert not checked.keys.refresh()
    checked.check(token(OTHER, "ES256", kid="new"))


def private_jwk() -> dict[str, Any]:
    return dict(json.loads(ECAlgorithm.to_jwk(EC)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "neither a JWKS nor"),
        (b"{}", "not a JWKS of 1"),
        (b'{"keys": [1]}', "without a key"),
        (b"{", "not a JWKS"),
        (json.dumps({"keys": [private_jwk()]}).encode(), "holds a secret"),
        (json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}]}).encode(), "holds a secret"),
        (json.dumps({"keys": [jwk(EC, kid="1"), jwk(RSA, kid="1")]}).encode(), "two keys of one kid"),
        (json.dumps({"keys": [jwk(EC, alg="RS256")]}).encode(), "cannot be used"),
        (json.dumps({"keys": [jwk(RSA, alg="HS256")]}).encode(), "none of its key's"),
        (json.dumps({"keys": [jwk(RSA, alg="none")]}).encode(), "none of its key's"),
        (pem(rsa.generate_private_key(65537, 1024)), "of 1024 bits"),  # noqa: S505 - weak on purpose
        (pem(ec.generate_private_key(ec.SECP256K1())), "no kind that is taken"),
        (EC.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                          serialization.NoEncryption()), "private key"),
        (b"x" * 70_000, "larger than"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_public_keys_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_public_keys(path)


def test_an_alg_of_a_jwk_is_the_one_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(json.dumps({"keys": [jwk(RSA, alg="PS256", kid="r")]}))
    tokens(path).check(token(RSA, "PS256", kid="r"))
    with pytest.raises(NotAllowedError):
        tokens(path).check(token(RSA, "RS256", kid="r"))


def test_either_the_key_or_a_token_lets_in(keys: Path) -> None:
    key = AdminKey(b"an-admin-key-of-some-length")
    both, key_alone = Admins(key, tokens(keys)), Admins(key)
    good = token(EC, "ES256", kid="e")
    for admins in (both, key_alone):
        admins.check([(b"host", b"x"), (b"authorization", b"Bearer " + key.key)])
    both.check([(b"authorization", b"bearer " + good)])
    for admins, headers in (
        (key_alone, [(b"authorization", b"Bearer " + good)]),
        (both, [(b"authorization", b"Bearer wrong")]),
        (both, [(b"authorization", b"Basic " + good)]),
        (both, []),
    ):
        with pytest.raises(NotAllowedError, match="missing or wrong"):
            admins.check(headers)
