"""Counting attempts and outcomes from Envoy's log lines, whole, torn or damaged."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from endcap.files import JsonLines
from serving.gateway import Tail, Tally
from serving.gateway.logs import parse_attempt, parse_outcome


def line(cluster: str | None = "version-2", code: int = 200, flags: str = "-", duration_ms: float = 3,
         **more: object) -> bytes:  # fmt: skip
    fields = {
        "at_s": "1795324521.477486", "cluster": cluster, "code": code, "details": None, "duration_ms": duration_ms,
        "flags": flags, "host": "127.0.0.1:5", "request_id": "r1", "route": "recommend", **more,
    }  # fmt: skip
    return json.dumps(fields).encode()


def test_each_kind_of_failed_attempt_counts_against_its_version() -> None:
    tally = Tally([100])
    tally.add_attempts([
        line(), line(code=404), line(code=500), line(code=429),
        line(code=0, flags="UT", duration_ms=500),  # hung: the try's timeout
        line(code=0, flags="UC"),  # cut
        line(code=0, flags="UF"),  # refused
    ])  # fmt: skip
    counts = tally.versions()["2"]
    assert (counts.good, counts.total) == (2, 7)


def test_a_shopper_who_leaves_is_nobodys_failure() -> None:
    tally = Tally()
    tally.add_attempts([line(code=0, flags="-", duration_ms=200)])  # as Envoy logs it for the attempt
    tally.add_outcomes([line(code=0, flags="DC", duration_ms=200, attempts=1)])  # and for the outcome
    assert tally.versions() == {}
    assert tally.outcomes_total == 0


def test_time_is_judged_for_answers_only() -> None:
    tally = Tally([100, 250])
    tally.add_attempts([line(duration_ms=100), line(duration_ms=101), line(duration_ms=300), line(code=500)])
    counts = tally.versions()["2"]
    assert counts.within_ms == {100: 1, 250: 2}
    assert counts.good == 3


def test_outcomes_count_what_shoppers_saw_and_no_health_or_feedback_requests() -> None:
    tally = Tally()
    tally.add_outcomes([
        line(attempts=3), line(code=503, flags="URX,UF", attempts=3), line(route="infer", attempts=1),
        line(route="healthz", cluster=None), line(route="feedback", cluster="feedback", code=503),
    ])  # fmt: skip
    assert (tally.outcomes_good, tally.outcomes_total) == (2, 3)


def test_a_request_counts_once_for_its_version_however_often_it_was_retried() -> None:
    tally = Tally()
    tally.add_attempts([line(code=500), line(), line(code=500), line(code=500), line(code=500)])
    tally.add_outcomes([
        line(attempts=2), line(code=500, attempts=3), line(code=0, flags="DC", attempts=1),
        line(cluster="version-1", code=404, attempts=1), line(cluster=None, code=503, route="recommend"),
    ])  # fmt: skip
    versions = tally.versions()
    assert (versions["2"].requests_good, versions["2"].requests_total) == (1, 2)
    assert (versions["1"].requests_good, versions["1"].requests_total) == (1, 1)
    assert tally.outcomes_total == 4


def test_a_first_attempt_that_failed_stays_one_whatever_its_retries_came_to() -> None:
    tally = Tally()
    tally.add_outcomes([
        line(attempts=1), line(attempts=2), line(code=500, attempts=3), line(code=503, flags="UH", attempts=0),
        line(code=0, flags="DC", attempts=2), line(code=0, flags="DC", attempts=1), line(code=429, attempts=1),
        line(route="healthz", cluster=None),
    ])  # fmt: skip
    versions = tally.versions()
    assert (versions["2"].first_good, versions["2"].first_total) == (1, 6)
    assert Tally(begin=tally.counts()).versions() == versions


def test_copies_to_a_shadow_are_nobody_s_attempts_and_nobody_s_requests() -> None:
    tally = Tally()
    tally.add_attempts([line(cluster="shadow-2")])
    tally.add_outcomes([line(cluster="shadow-2", attempts=1)])
    assert tally.versions() == {}


lines = st.builds(
    line, cluster=st.sampled_from(["version-1", "version-2", "feedback"]), code=st.sampled_from([0, 200, 500]),
    flags=st.sampled_from(["-", "UT", "DC", "UH"]), duration_ms=st.integers(0, 200), attempts=st.integers(0, 3),
)  # fmt: skip


@given(st.lists(lines, max_size=12), st.integers(0, 12))
def test_a_tally_that_goes_on_from_what_was_counted_counts_the_same(found: list[bytes], cut: int) -> None:
    whole, first = Tally([100]), Tally([100])
    for tally, part in ((whole, found), (first, found[:cut])):
        tally.add_attempts(part)
        tally.add_outcomes(part)
    second = Tally([100], begin=first.counts())
    second.add_attempts(found[cut:])
    second.add_outcomes(found[cut:])
    assert second.counts() == whole.counts()


def test_a_version_without_a_replica_to_try_fails_though_no_attempt_was_made() -> None:
    tally = Tally()
    tally.add_outcomes([line(code=503, flags="UH", host=None, attempts=1)])
    counts = tally.versions()["2"]
    assert (counts.good, counts.total) == (0, 1)


def test_other_clusters_are_no_version() -> None:
    tally = Tally()
    tally.add_attempts([line(cluster="feedback"), line(cluster=None)])
    assert tally.versions() == {}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_line_or_damaged_and_never_an_error(raw: bytes) -> None:
    parse_attempt(raw)
    parse_outcome(raw)
    tally = Tally([100])
    tally.add_attempts([raw])
    tally.add_outcomes([raw])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=3
)


@given(st.dictionaries(st.sampled_from(["at_s", "code", "flags", "duration_ms", "cluster", "attempts"]), json_values))
def test_any_fields_are_a_line_or_damaged_and_never_an_error(fields: dict[str, object]) -> None:
    raw = json.dumps(fields).encode()
    parse_attempt(raw)
    parse_outcome(raw)


@given(st.lists(st.integers(0, 10**6), max_size=20), st.integers(1, 9), st.integers(1, 64))
def test_the_tail_yields_every_line_once_however_the_writes_are_cut(
    tmp_path_factory: object, numbers: list[int], step: int, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("tail")  # type: ignore[attr-defined]
    path: Path = folder / "log"
    tail, found = Tail(path), []
    raw = b"".join(b"%d\n" % number for number in numbers)
    for start in range(0, len(raw), step):
        with path.open("ab") as file:
            file.write(raw[start : start + step])
        found += tail.lines(chunk_bytes=chunk)
    assert [int(line) for line in found] == numbers


def test_a_torn_last_line_waits_for_its_rest(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    tail = Tail(path)
    assert tail.lines() == [b"one"]
    assert tail.lines() == []
    with path.open("ab") as file:
        file.write(b"o\n")
    assert tail.lines() == [b"two"]


def test_a_torn_line_that_is_cut_off_makes_no_line_count_twice(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntw")
    tail = Tail(path)
    assert tail.lines() == [b"one"]
    JsonLines(path).close()  # what is done before a killed gateway starts again
    assert path.read_bytes() == b"one\n"
    assert tail.lines() == []
    with path.open("ab") as file:
        file.write(b"three\n")
    assert tail.lines() == [b"three"]


def test_a_file_that_is_rotated_cut_or_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_bytes(b"one\ntwo\n")
    assert tail.lines() == [b"one", b"two"]
    path.rename(tmp_path / "log.1")
    path.write_bytes(b"three\nfour\nfive\n")
    assert tail.lines() == [b"three", b"four", b"five"]
    path.write_bytes(b"six\n")
    assert tail.lines() == [b"six"]


def test_the_rest_of_a_rotated_file_is_read_before_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    tail = Tail(path)
    assert tail.lines() == [b"one"]
    with path.open("ab") as file:
        file.write(b"two\nthree\n")
    path.rename(tmp_path / "log.1")
    path.write_bytes(b"four\n")
    assert tail.lines() == [b"two", b"three", b"four"]


def test_a_tail_that_goes_on_from_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree\n")
    first = Tail(path)
    assert first.lines(chunk_bytes=4, at_most_bytes=4) == [b"one"]
    again = Tail(path, offset=first.mark.offset, inode=first.mark.inode)
    assert again.lines(chunk_bytes=4, at_most_bytes=1) == [b"two"]
    assert again.lines() == [b"three"]


def test_a_tail_begins_where_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old\nnew\n")
    assert Tail(path, offset=4).lines() == [b"new"]
