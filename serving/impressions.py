"""Impression tokens: who served which shopper when, in a form that only holders of the key can make.

A token is ``base64url(payload || HMAC-SHA-256(key, payload))``; the payload is, in network byte order::

    1 byte   format, now 1
    16 bytes impression id (random)
    8 bytes  time of issue, microseconds since the Unix epoch
    8 bytes  shopper hash (keyed BLAKE2b: equal shoppers match, nobody without the key can tell who they are)
    1..64    label of the model version, ASCII

So it is at most 172 characters. Nothing in it is secret to the shopper who carries it, and nothing can be changed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from endcap.errors import InputError, from_os_error
from endcap.files import write_atomic

__all__ = ["MAX_TOKEN_CHARS", "Impression", "ensure_key", "id_in_clear", "mint", "read", "read_key"]

MAX_TOKEN_CHARS = 300
_FORMAT = 1
_HEAD = struct.Struct("!B16sQ8s")
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


def mint(key: bytes, *, version: str, shopper: str, now_s: float) -> tuple[str, str]:
    """A new impression: (its id, its token)."""
    if _VERSION.fullmatch(version) is None:
        raise InputError("a version label is 1 to 64 letters, digits, dots, dashes or underscores", where=version)
    identity = os.urandom(16)
    shopper_hash = hashlib.blake2b(shopper.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()
    payload = _HEAD.pack(_FORMAT, identity, round(now_s * 1e6), shopper_hash) + version.encode()
    return identity.hex(), _encode(payload + hmac.digest(key, payload, "sha256"))


def read(key: bytes, token: str) -> Impression:
    """The impression that a token stands for.

    Raises:
        InputError: not a token, or not one that was made with ``key``.
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
    if len(payload) <= _HEAD.size or not hmac.compare_digest(mac, hmac.digest(key, payload, "sha256")):
        raise InputError("the impression token is forged or damaged")
    form, identity, issued_at_us, shopper_hash = _HEAD.unpack_from(payload)
    version = payload[_HEAD.size :].decode("ascii", "replace")
    if form != _FORMAT or _VERSION.fullmatch(version) is None:
        raise InputError("an impression token of an unknown format",
                         next_step="run the same release of endcap everywhere")  # fmt: skip
    return Impression(identity.hex(), version, shopper_hash.hex(), issued_at_us / 1e6)


def id_in_clear(token: str) -> str | None:
    """The impression id that a token bears, for those who do not hold the key; None where it is no token at all.

    Nothing is verified: good for joining records, never for counting.
    """
    try:
        raw = base64.b64decode(token[:24], altchars=b"-_", validate=True)  # 18 bytes: the format and the id are 17
        form, identity = struct.unpack_from("!B16s", raw)
    except (binascii.Error, ValueError, struct.error):
        return None
    return identity.hex() if form == _FORMAT else None


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def ensure_key(path: Path) -> bytes:
    """The key in ``path`` (hex, mode 0600), made on first use."""
    if not path.exists():
        write_atomic(path, os.urandom(_KEY_BYTES).hex() + "\n", mode=0o600)
    return read_key(path)


def read_key(path: Path) -> bytes:
    """The key in ``path``, 32 bytes.

    Raises:
        InputError: the file is missing, damaged, or can be read by others.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text("ascii").strip()
        key = bytes.fromhex(text)
    except FileNotFoundError as error:
        raise InputError("no impression key", where=path) from error
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except ValueError as error:
        raise InputError("the impression key is damaged (not hex)", where=path) from error
    if len(key) != _KEY_BYTES:
        raise InputError(f"the impression key is damaged (not {_KEY_BYTES} bytes)", where=path)
    if mode & 0o077:
        raise InputError("the impression key can be read by others", where=path,
                         next_step=f"chmod 600 {path}, and think about a new key")  # fmt: skip
    return key
