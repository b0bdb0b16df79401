"""Impression tokens: who served which shopper when, in a form that only holders of the key can make.

A token is ``base64url(payload || HMAC-SHA-256(key, payload))``; the payload is, in network byte order::

    1 byte   format: 1, or 2, which names its key
    1 byte   (format 2 only) key id: one byte of a BLAKE2b of the key, so that only the right key need be tried
    16 bytes impression id (random)
    8 bytes  time of issue, microseconds since the Unix epoch
    8 bytes  shopper hash (keyed BLAKE2b: equal shoppers match, nobody without the key can tell who they are)
    1..64    label of the model version, ASCII

So it is at most 174 characters. Nothing in it is secret to the shopper who carries it, and nothing can be changed.

A key file holds one key or, while keys are changed, several: a line of hex each, newest first; ``#`` begins a comment.
All verify; the first that is not marked ``next`` signs. With one key tokens are of format 1, which earlier releases
read too. The last key makes the shopper hashes, so that a shopper stays the same one while keys are changed; taking it
away makes all shoppers new ones, so do that between rollouts. To change a key that several machines hold: put
``next <new key>`` on top on all of them, then take away the word, and last the old key, when its last impression's
window has closed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from endcap.errors import InputError, from_os_error
from endcap.files import open_to_others, write_atomic
from serving.watched import Watched

__all__ = [
    "MAX_KEYS", "MAX_TOKEN_CHARS", "Impression", "Keys", "ensure_key", "id_in_clear", "mint", "read", "read_key",
    "read_keys", "watched_keys",
]  # fmt: skip

MAX_TOKEN_CHARS = 300
MAX_KEYS = 8
_MAX_KEY_FILE_BYTES = 16384
_HEAD = struct.Struct("!B16sQ8s")
_HEAD_OF_KEY = struct.Struct("!BB16sQ8s")
_MAC_BYTES = 32
_KEY_BYTES = 32
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Impression:
    """One answer shown to one shopper. ``id`` and ``shopper_hash`` are hex; ``issued_at_s`` is Unix time."""

    id: str
    version: str
    shopper_hash: str
    issued_at_s: float


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a key file, newest first: 1 to :data:`MAX_KEYS`, each of 32 bytes. Never shown.

    ``signing``: the place of the one that signs; those before it only verify, for now.
    """

    every: tuple[bytes, ...] = field(repr=False)
    signing: int = 0
    ids: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", b"".join(map(_key_id, self.every)))

    @property
    def signs(self) -> bytes:
        """The key that signs."""
        return self.every[self.signing]


def mint(key: bytes | Keys, *, version: str, shopper: str, now_s: float) -> tuple[str, str]:
    """A new impression: (its id, its token)."""
    if _VERSION.fullmatch(version) is None:
        raise InputError("a version label is 1 to 64 letters, digits, dots, dashes or underscores", where=version)
    keys = key if isinstance(key, Keys) else Keys((key,))
    identity = os.urandom(16)
    shopper_hash = hashlib.blake2b(
        shopper.encode("utf-8", "surrogatepass"), key=keys.every[-1], digest_size=8
    ).digest()  # fmt: skip
    issued_at_us = round(now_s * 1e6)
    if len(keys.every) == 1:
        head = _HEAD.pack(1, identity, issued_at_us, shopper_hash)
    else:
        head = _HEAD_OF_KEY.pack(2, keys.ids[keys.signing], identity, issued_at_us, shopper_hash)
    payload = head + version.encode()
    return identity.hex(), _encode(payload + hmac.digest(keys.signs, payload, "sha256"))


def read(key: bytes | Keys, token: str) -> Impression:
    """The impression that a token stands for.

    Raises:
        InputError: not a token, or not one that was made with ``key``, or one of them.
    """
    if len(token) > MAX_TOKEN_CHARS or not token.isascii():
        raise InputError("not an impression token")
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("not an impression token") from error
    if _encode(raw) != token:  # base64 has several spellings of the same bytes; a token has one
        raise InputError("not an impression token")
    payload, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    if len(payload) <= _HEAD.size or not _made_with(key, payload, mac):
        raise InputError("the impression token is forged or damaged")
    if payload[0] == 2 and len(payload) > _HEAD_OF_KEY.size:
        _, _, identity, issued_at_us, shopper_hash = _HEAD_OF_KEY.unpack_from(payload)
        label = payload[_HEAD_OF_KEY.size :]
    else:
        _, identity, issued_at_us, shopper_hash = _HEAD.unpack_from(payload)
        label = payload[_HEAD.size :]
    version = label.decode("ascii", "replace")
    if payload[0] not in (1, 2) or _VERSION.fullmatch(version) is None:
        raise InputError("an impression token of an unknown format",
                         next_step="run the same release of endcap everywhere")  # fmt: skip
    return Impression(identity.hex(), version, shopper_hash.hex(), issued_at_us / 1e6)


def _made_with(key: bytes | Keys, payload: bytes, mac: bytes) -> bool:
    """Whether one of the keys made ``mac``; of a token that names its key only those that bear the name are tried."""
    if isinstance(key, bytes):
        tried: tuple[bytes, ...] = (key,)
    elif payload[0] == 2:
        tried = tuple(one for one, name in zip(key.every, key.ids, strict=True) if name == payload[1])
    else:
        tried = key.every
    return any(hmac.compare_digest(mac, hmac.digest(one, payload, "sha256")) for one in tried)


def _key_id(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=1, person=b"endcap key id").digest()


def id_in_clear(token: str) -> str | None:
    """The impression id that a token bears, for those who do not hold the key; None where it is no token at all.

    Nothing is verified: good for joining records, never for counting.
    """
    try:
        raw = base64.b64decode(token[:24], altchars=b"-_", validate=True)  # 18 bytes: format, key id, id are 17 or 18
    except (binascii.Error, ValueError):
        return None
    if len(raw) < 18 or raw[0] not in (1, 2):
        return None
    return raw[raw[0] : raw[0] + 16].hex()


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def ensure_key(path: Path) -> bytes:
    """The key in ``path`` (hex, mode 0600), made on first use."""
    if not path.exists():
        write_atomic(path, os.urandom(_KEY_BYTES).hex() + "\n", mode=0o600)
    return read_key(path)


def read_key(path: Path) -> bytes:
    """The key in ``path`` that signs, 32 bytes. Raises as :func:`read_keys` does."""
    return read_keys(path).signs


def read_keys(path: Path) -> Keys:
    """All keys in ``path``.

    Raises:
        InputError: the file is missing, damaged, or can be read by others.
    """
    try:
        exposed = open_to_others(path)
        with path.open("rb") as file:
            raw = file.read(_MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError("no impression key", where=path) from error
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    keys = _parse_keys(raw, path)
    if exposed:
        raise InputError("the impression key can be read by others", where=path,
                         next_step=f"chmod 600 {path}, and think about a new key")  # fmt: skip
    return keys


def _parse_keys(raw: bytes, path: Path) -> Keys:
    if len(raw) > _MAX_KEY_FILE_BYTES:
        raise InputError(f"the impression key is damaged (more than {_MAX_KEY_FILE_BYTES} bytes)", where=path)
    found: list[bytes] = []
    coming = 0
    for number, line in enumerate(raw.splitlines(), 1):
        text = line.partition(b"#")[0].strip()
        if not text:
            continue
        where = path if len(raw.splitlines()) == 1 else f"{path}:{number}"
        if text.startswith(b"next "):
            if coming < len(found):
                raise InputError("a key that is to come stands below one that signs", where=where,
                                 next_step="put it on top")  # fmt: skip
            text, coming = text[5:].strip(), coming + 1
        try:
            key = bytes.fromhex(text.decode("ascii"))
        except ValueError as error:
            raise InputError("the impression key is damaged (not hex)", where=where) from error
        if len(key) != _KEY_BYTES:
            raise InputError(f"the impression key is damaged (not {_KEY_BYTES} bytes)", where=where,
                             next_step="one key a line, in hex, newest first")  # fmt: skip
        if key in found:
            raise InputError("the impression key is there twice", where=where, next_step="take one of them away")
        found.append(key)
    if not coming < len(found) <= MAX_KEYS:
        raise InputError(f"the impression key is damaged ({len(found)} keys, {coming} of them yet to come)", where=path,
                         next_step=f"keep 1 to {MAX_KEYS} keys, one a line, in hex, newest first")  # fmt: skip
    return Keys(tuple(found), coming)


def watched_keys(path: Path) -> Watched[Keys]:
    """The keys in ``path``, now and whenever the file changes. Raises as :func:`read_keys` does."""
    return Watched(path, read_keys)
