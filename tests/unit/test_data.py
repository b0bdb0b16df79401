"""What a user relies on: data of the right form is kept whole, anything else is counted or refused, never guessed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.data import (
    BEAUTY,
    LeaveOneOut,
    Shop,
    Source,
    leave_one_out,
    load_dataset,
    load_split,
    obtain,
    parse_sequences,
    save_dataset,
    save_split,
    synthetic_dataset,
    synthetic_lines,
    write_shoppers,
)
from components.data import fetch as fetch_module
from endcap.errors import DataError, EndcapError, StateError
from endcap.files import read_json_lines

LINES = b"7 10 9 30\n8 9 10 10 30 4\n9 1 2\n"


def parse(raw: bytes, **options: object):
    return parse_sequences(raw, name="shop", where="shop.txt", **options)


def test_reads_sequences_and_counts_what_it_leaves_out():
    dataset = parse(LINES)
    assert dataset.item_ids == ("4", "9", "10", "30")  # by value, not by text
    assert [sequence.tolist() for sequence in dataset.sequences] == [[3, 2, 4], [2, 3, 4, 1]]
    assert dataset.shopper_ids == ("7", "8")
    assert (dataset.dropped.duplicates, dataset.dropped.short_users) == (1, 1)
    assert dataset.describe()["interactions"] == 7
    assert dataset.sha256 == hashlib.sha256(LINES).hexdigest()


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"", "empty"),
        (b"1 2 3 4\n\xff\xfe 1\n", "line 2"),
        (b"<html><body>moved</body></html>\n", "line 1"),
        (b"user,item\n1,2\n", "line 1"),
        (b"1 2 3 4\n2\n", "line 2"),
        (b"1 2 3 4\n1 5 6 7\n", "line 2"),
        (b"1 2 2 2 3 4\n", "2 of 5 purchases"),
        (b"1 2\n2 3\n", "fewer than 3"),
    ],
)
def test_a_file_of_another_form_is_refused_with_file_and_line(raw: bytes, place: str):
    with pytest.raises(DataError) as refused:
        parse(raw)
    assert place in str(refused.value) and "shop.txt" in str(refused.value)


def test_a_few_malformed_lines_are_counted():
    lines = [f"{shopper} 1 2 3" for shopper in range(200)]
    lines[17] = "17 1 2;3"
    assert parse("\n".join(lines).encode()).dropped.malformed_lines == 1


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(raw: bytes):
    try:
        dataset = parse(raw)
    except EndcapError:
        return
    assert all(len(sequence) >= 3 for sequence in dataset.sequences)


ids = st.text("abcXYZ019-_.", min_size=1, max_size=6).filter(lambda text: text[0].isalnum())


@given(st.dictionaries(ids, st.lists(ids, min_size=3, max_size=9, unique=True), min_size=1, max_size=8))
def test_what_is_written_in_the_form_comes_back(shop: dict[str, list[str]]):
    dataset = parse("\n".join(" ".join([shopper, *items]) for shopper, items in shop.items()).encode())
    names = ("", *dataset.item_ids)
    read = {
        shopper: [names[item] for item in sequence]
        for shopper, sequence in zip(dataset.shopper_ids, dataset.sequences, strict=True)
    }
    assert read == shop


def test_leave_one_out_holds_out_the_last_two_and_nothing_else(tmp_path: Path):
    dataset = parse(LINES)
    split = leave_one_out(dataset)
    assert [row.tolist() for row in split.train] == [[3], [2, 3]]
    assert split.valid_target.tolist() == [2, 4] and split.test_target.tolist() == [4, 1]
    assert [row.tolist() for row in split.histories("test")] == [[3, 2], [2, 3, 4]]
    assert split.histories("valid") is split.train
    save_split(tmp_path / "split", split)
    again = load_split(tmp_path / "split")
    assert isinstance(again, LeaveOneOut) and again.n_items == 4
    assert [row.tolist() for row in again.train] == [[3], [2, 3]]
    save_dataset(tmp_path / "data", dataset)
    assert load_dataset(tmp_path / "data").describe() == dataset.describe()
    write_shoppers(tmp_path / "shoppers.jsonl", dataset)
    assert list(read_json_lines(tmp_path / "shoppers.jsonl"))[1] == {
        "shopper": "8", "history": ["9", "10", "30"], "next": "4",
    }  # fmt: skip


def test_a_damaged_intermediate_file_is_named(tmp_path: Path):
    save_split(tmp_path / "split", leave_one_out(parse(LINES)))
    whole = (tmp_path / "split").read_bytes()
    (tmp_path / "split").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="split"):
        load_split(tmp_path / "split")


def test_the_synthetic_shop_is_the_same_for_a_seed_and_says_that_it_is_synthetic():
    shop = Shop(shoppers=120, items=80)
    assert synthetic_lines(shop, 3) == synthetic_lines(shop, 3) != synthetic_lines(shop, 4)
    dataset = synthetic_dataset(shop, 3)
    assert dataset.synthetic and len(dataset.sequences) == 120 and dataset.n_items <= 80
    assert min(len(sequence) for sequence in dataset.sequences) >= 5
    counts = np.sort(np.bincount(np.concatenate(dataset.sequences))[1:])[::-1]
    assert counts[:8].sum() > counts[-40:].sum()  # a tenth of the items outsells half of them


def test_a_given_file_is_used_and_its_checksum_held_to(tmp_path: Path):
    path = tmp_path / "mine.txt"
    path.write_bytes(LINES)
    obtained = obtain(Source(file=path, sha256=hashlib.sha256(LINES).hexdigest()))
    assert obtained.dataset.name == "mine" and not obtained.dataset.synthetic
    with pytest.raises(DataError, match="SHA-256"):
        obtain(Source(file=path, sha256="0" * 64))
    with pytest.raises(DataError, match="no such data file"):
        obtain(Source(file=tmp_path / "gone.txt"))


def test_what_is_known_of_published_data_goes_with_it_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "copied.txt"
    path.write_bytes(LINES)
    known = fetch_module.KnownData(**{**vars(BEAUTY), "sha256": hashlib.sha256(LINES).hexdigest()})
    assert obtain(Source(file=path)).dataset.caveats == ()
    monkeypatch.setattr(fetch_module, "BEAUTY", known)
    dataset = obtain(Source(file=path)).dataset
    assert dataset.describe()["caveats"] == [BEAUTY.caveat] and "same day" in BEAUTY.caveat
    save_dataset(tmp_path / "data", dataset)
    assert load_dataset(tmp_path / "data").caveats == dataset.caveats


def test_a_mirror_with_another_file_is_refused_not_replaced(tmp_path: Path):
    (tmp_path / "beauty").mkdir()
    (tmp_path / "beauty" / BEAUTY.file).write_bytes(LINES)
    with pytest.raises(DataError, match="SHA-256"):
        obtain(Source(mirror=tmp_path))
    with pytest.raises(DataError, match="not a folder"):
        obtain(Source(mirror=tmp_path / "nowhere"))


def test_a_cached_file_that_is_damaged_is_refused_when_it_cannot_be_fetched_again(tmp_path, monkeypatch):
    _unreachable(monkeypatch)
    (tmp_path / BEAUTY.file).write_bytes(LINES)
    with pytest.raises(DataError, match="SHA-256"):
        obtain(Source(cache=tmp_path))


def test_only_where_nothing_can_be_had_the_shop_is_synthetic_and_says_why(tmp_path, monkeypatch):
    _unreachable(monkeypatch)
    obtained = obtain(Source(cache=tmp_path, shop=Shop(shoppers=50, items=60)))
    assert obtained.dataset.synthetic and "could not be fetched" in obtained.origin


def _unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fetch_module.MIRROR_VARIABLE, raising=False)
    # A closed port of this machine answers at once, with or without a network.
    gone = fetch_module.KnownData(**{**vars(BEAUTY), "url": "http://127.0.0.1:9/Beauty.txt"})
    monkeypatch.setattr(fetch_module, "BEAUTY", gone)
