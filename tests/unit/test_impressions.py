"""Impression tokens name who served them and cannot be forged."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from serving import impressions
from serving.impressions import Keys

KEY = bytes(range(32))
KEYS = Keys((KEY[::-1], KEY))
"""A new key above the old one."""
LABELS = st.text("abcXYZ019._-", min_size=1, max_size=64)
TIMES = st.floats(0, 4e9)


@given(version=LABELS, shopper=st.text(max_size=300), now_s=TIMES)
def test_what_was_minted_is_read_back(version: str, shopper: str, now_s: float) -> None:
    identity, token = impressions.mint(KEY, version=version, shopper=shopper, now_s=now_s)
    impression = impressions.read(KEY, token)
    assert (impression.id, impression.version) == (identity, version)
    assert impressions.id_in_clear(token) == identity
    assert abs(impression.issued_at_s - now_s) < 1e-6 * max(1.0, now_s / 1e9)
    assert len(token) < 300
    assert token.isascii()


def test_equal_shoppers_share_a_hash_that_needs_the_key_and_ids_differ() -> None:
    def hash_of(key: bytes, shopper: str) -> str:
        return impressions.read(key, impressions.mint(key, version="1", shopper=shopper, now_s=1.0)[1]).shopper_hash

    assert hash_of(KEY, "7") == hash_of(KEY, "7") != hash_of(KEY, "8")
    assert hash_of(KEY, "7") != hash_of(KEY[::-1], "7")
    assert len({impressions.mint(KEY, version="1", shopper="7", now_s=1.0)[0] for _ in range(100)}) == 100


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_one_changed_bit_is_refused(place: int, bit: int) -> None:
    _, token = impressions.mint(KEY, version="12", shopper="7", now_s=1.5)
    raw = bytearray(token.encode())
    raw[place % len(raw)] ^= 1 << bit
    with pytest.raises(InputError):
        impressions.read(KEY, raw.decode("latin-1"))


@given(st.text(max_size=40))
def test_the_id_in_clear_of_any_text_is_an_id_or_none(text: str) -> None:
    found = impressions.id_in_clear(text)
    assert found is None or len(found) == 32


@given(st.one_of(st.text(max_size=400), st.binary(max_size=220).map(lambda raw: raw.hex())))
def test_any_text_is_refused_and_nothing_else_is_raised(text: str) -> None:
    with pytest.raises(InputError):
        impressions.read(KEY, text)


def test_a_token_of_another_key_is_refused() -> None:
    _, token = impressions.mint(KEY, version="1", shopper="7", now_s=1.0)
    with pytest.raises(InputError, match="forged"):
        impressions.read(KEY[::-1], token)


@pytest.mark.parametrize("version", ["", "a b", "é", "x" * 65, "a\n"])
def test_a_label_that_no_header_could_carry_is_refused(version: str) -> None:
    with pytest.raises(InputError):
        impressions.mint(KEY, version=version, shopper="7", now_s=1.0)


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "impression.key"
    key = impressions.ensure_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert impressions.ensure_key(path) == key == impressions.read_key(path)


@pytest.mark.parametrize("text", ["", "zz", "ab" * 31, "é" * 64])
def test_a_damaged_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "impression.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InputError, match="damaged"):
        impressions.read_key(path)


def test_a_key_that_others_can_read_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "impression.key"
    with pytest.raises(InputError, match="no impression key"):
        impressions.read_key(path)
    impressions.ensure_key(path)
    path.chmod(0o644)
    with pytest.raises(InputError, match="read by others"):
        impressions.read_key(path)


# ---- changing keys ---------------------------------------------------------------------------------------------------


def key_file(path: Path, *keys: bytes, text: str | None = None) -> Path:
    path.write_text("".join(f"{key.hex()}\n" for key in keys) if text is None else text)
    path.chmod(0o600)
    return path


@given(version=LABELS, shopper=st.text(max_size=300), count=st.integers(1, impressions.MAX_KEYS))
def test_the_newest_key_signs_and_all_verify(version: str, shopper: str, count: int) -> None:
    keys = Keys(tuple(bytes([number]) * 32 for number in range(count)))
    identity, token = impressions.mint(keys, version=version, shopper=shopper, now_s=1.0)
    assert impressions.read(keys, token) == impressions.read(keys.every[0], token)
    assert (impressions.read(keys, token).id, impressions.read(keys, token).version) == (identity, version)
    assert impressions.id_in_clear(token) == identity
    _, old = impressions.mint(keys.every[-1], version=version, shopper=shopper, now_s=1.0)
    assert impressions.read(keys, old).shopper_hash == impressions.read(keys, token).shopper_hash


def test_a_token_names_its_key_only_when_there_are_several() -> None:
    """An earlier release reads the tokens of a single key."""
    heads = [impressions.mint(keys, version="1", shopper="7", now_s=1.0)[1][:2] for keys in (KEY, Keys((KEY,)), KEYS)]
    assert [base64.b64decode(head + "==")[0] for head in heads] == [1, 1, 2]


def test_a_key_that_was_taken_away_verifies_no_more() -> None:
    for signing in (Keys((KEY,)), KEYS):
        _, token = impressions.mint(signing, version="1", shopper="7", now_s=1.0)
        with pytest.raises(InputError, match="forged"):
            impressions.read(Keys((b"\x07" * 32, b"\x08" * 32)), token)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_one_changed_bit_of_a_token_that_names_its_key_is_refused(place: int, bit: int) -> None:
    _, token = impressions.mint(KEYS, version="12", shopper="7", now_s=1.5)
    raw = bytearray(token.encode())
    raw[place % len(raw)] ^= 1 << bit
    with pytest.raises(InputError):
        impressions.read(KEYS, raw.decode("latin-1"))


@given(st.one_of(st.text(max_size=400), st.binary(max_size=220).map(lambda raw: raw.hex())))
def test_any_text_is_refused_by_several_keys_too(text: str) -> None:
    with pytest.raises(InputError):
        impressions.read(KEYS, text)


def test_a_file_of_several_keys(tmp_path: Path) -> None:
    text = f"# changed in May\n{KEY[::-1].hex()}  # new\n\n{KEY.hex()}\n"
    path = key_file(tmp_path / "impression.key", text=text)
    assert impressions.read_keys(path) == KEYS
    assert impressions.read_key(path) == impressions.ensure_key(path) == KEY[::-1]


def test_a_key_that_is_to_come_verifies_and_does_not_sign(tmp_path: Path) -> None:
    path = key_file(tmp_path / "impression.key", text=f"next {KEY[::-1].hex()}\n{KEY.hex()}\n")
    keys = impressions.read_keys(path)
    assert keys == Keys((KEY[::-1], KEY), signing=1) and impressions.read_key(path) == KEY
    _, token = impressions.mint(keys, version="1", shopper="7", now_s=1.0)
    _, to_come = impressions.mint(KEYS, version="1", shopper="7", now_s=1.0)
    seen = [impressions.read(any_keys, one) for any_keys in (keys, KEYS) for one in (token, to_come)]
    assert len({one.shopper_hash for one in seen}) == 1
    assert impressions.read(KEY, token) and impressions.read(KEY[::-1], to_come)


def test_keys_are_never_shown() -> None:
    assert KEY.hex() not in repr(KEYS) and str(KEY) not in repr(KEYS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{KEY.hex()}\n{KEY.hex()}\n", "impression.key:2: the impression key is there twice"),
        (f"{KEY.hex()}\nxx\n", r"impression.key:2: the impression key is damaged \(not hex\)"),
        (f"{KEY.hex()}\nab\n", "impression.key:2: the impression key is damaged"),
        ("\n".join(f"{number:064x}" for number in range(9)), "9 keys"),
        ("# nothing\n", "0 keys"),
        (f"next {KEY.hex()}\n", "1 keys, 1 of them yet to come"),
        (f"{KEY.hex()}\nnext {KEY[::-1].hex()}\n", "impression.key:2: a key that is to come stands below"),
        ("ab" * 20_000, "more than 16384 bytes"),
    ],
)
def test_a_damaged_file_of_keys_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        impressions.read_keys(key_file(tmp_path / "impression.key", text=text))


def test_a_key_file_is_read_again_when_it_changes_and_a_damaged_one_changes_nothing(tmp_path: Path) -> None:
    path = key_file(tmp_path / "impression.key", KEY)
    keys = impressions.watched_keys(path)
    assert not keys.refresh()
    key_file(path, KEY[::-1], KEY)
    assert keys.refresh() and keys.value == KEYS
    for damage in ("zz", "", f"{KEY.hex()}\n{KEY.hex()}"):
        key_file(path, text=damage)
        assert not keys.refresh() and not keys.refresh()
    path.unlink()
    assert not keys.refresh()
    assert keys.failures == 4 and keys.value == KEYS
    path.write_text(KEY.hex())
    path.chmod(0o644)
    assert not keys.refresh()
    path.chmod(0o600)
    assert keys.refresh() and keys.value == Keys((KEY,))
