"""What feedback counts: rules, store and HTTP face, against a plain model of them."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import BusyError, EndcapError, InputError, StateError, StorageError
from serving import impressions
from serving.feedback import store as store_module
from serving.feedback.app import FeedbackApp, FeedbackMetrics
from serving.feedback.attribution import NEW, EventType, Outcome, attribute
from serving.feedback.events import MAX_EVENTS, Event, parse_feedback
from serving.feedback.store import _FIRST_IMPRESSIONS, FeedbackStore, Submission, VersionCounts, export
from serving.feedback.writer import Writer
from serving.impressions import Impression
from tests.asgi_client import AsgiClient, call

KEY = bytes(32)
WINDOW_US = 5_000_000


def impression(number: int, *, version: str = "2", issued_at_us: int = 0, shopper: int = 0) -> Impression:
    return Impression(number.to_bytes(16, "big").hex(), version, shopper.to_bytes(8, "big").hex(), issued_at_us / 1e6)


def shown(number: int, **more: Any) -> Event:
    return Event(impression(number, **more), EventType.SHOWN, None)


def clicked(number: int, **more: Any) -> Event:
    return Event(impression(number, **more), EventType.CLICKED, "59")


# Rules


@pytest.mark.parametrize(
    ("received_at_us", "outcome"),
    [(0, Outcome.ACCEPTED), (WINDOW_US, Outcome.ACCEPTED), (WINDOW_US + 1, Outcome.LATE)],
)
def test_the_window_includes_its_end(received_at_us: int, outcome: Outcome) -> None:
    for kind in EventType:
        found, state = attribute(NEW, kind, issued_at_us=0, received_at_us=received_at_us, window_us=WINDOW_US)
        assert found is outcome
        assert state.shown is (outcome is Outcome.ACCEPTED)


def test_a_click_implies_shown_and_shown_may_follow_it() -> None:
    _, state = attribute(NEW, EventType.CLICKED, issued_at_us=0, received_at_us=1, window_us=WINDOW_US)
    assert state.shown
    assert state.clicked
    outcome, after = attribute(state, EventType.SHOWN, issued_at_us=0, received_at_us=2, window_us=WINDOW_US)
    assert (outcome, after.shown, after.clicked) == (Outcome.ACCEPTED, True, True)
    assert (
        attribute(after, EventType.CLICKED, issued_at_us=0, received_at_us=3, window_us=WINDOW_US)[0]
        is Outcome.REPEATED
    )


# The store against a model that keeps everything in lists


@dataclass
class Model:
    """Says what the store must say, the slow and obvious way."""

    kept: list[tuple[Event, int]] = field(default_factory=list)

    def record(self, event: Event, now_us: int) -> Outcome:
        if any(old.impression.id == event.impression.id and old.type is event.type for old, _ in self.kept):
            return Outcome.REPEATED
        self.kept.append((event, now_us))
        return Outcome.ACCEPTED if now_us - round(event.impression.issued_at_s * 1e6) <= WINDOW_US else Outcome.LATE

    def counts(self, now_us: int, since_us: int | None) -> dict[str, VersionCounts]:
        found: dict[str, Impression] = {}
        with_click: set[str] = set()
        for event, received_at_us in self.kept:
            if received_at_us - round(event.impression.issued_at_s * 1e6) <= WINDOW_US:
                found[event.impression.id] = event.impression
                if event.type is EventType.CLICKED:
                    with_click.add(event.impression.id)
        counts: dict[str, VersionCounts] = {}
        for identity, one in found.items():
            old = counts.get(one.version, VersionCounts())
            closed = now_us - round(one.issued_at_s * 1e6) > WINDOW_US
            counts[one.version] = VersionCounts(
                old.closed + closed, old.clicked + (closed and identity in with_click), old.open + (not closed)
            )
        if since_us is not None:
            firsts: dict[str, Impression] = {}
            for one in sorted(found.values(), key=lambda one: (one.issued_at_s, one.id)):
                if round(one.issued_at_s * 1e6) >= since_us:
                    firsts.setdefault(one.shopper_hash, one)
            for one in firsts.values():
                if now_us - round(one.issued_at_s * 1e6) > WINDOW_US:
                    old = counts[one.version]
                    counts[one.version] = replace(
                        old, shoppers=old.shoppers + 1, shoppers_clicked=old.shoppers_clicked + (one.id in with_click)
                    )
        return counts


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("events"), st.lists(st.tuples(st.integers(0, 5), st.sampled_from(EventType)), max_size=4)),
        st.tuples(st.just("wait"), st.sampled_from([0, 1, WINDOW_US // 2, WINDOW_US, WINDOW_US + 1, -WINDOW_US])),
        st.tuples(st.just("look"), st.none() | st.integers(-WINDOW_US, 2 * WINDOW_US) | st.integers(0, 12)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=40,
)


@given(
    steps=STEPS,
    issued=st.lists(st.integers(-WINDOW_US, 3 * WINDOW_US) | st.sampled_from([0, 7]), min_size=6, max_size=6),
    shoppers=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_the_store_counts_as_the_model_does_through_time_and_restarts(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, Any]], issued: list[int], shoppers: list[int]
) -> None:
    """Duplicates, late clicks, a clock set back, equal times of issue, and shoppers asked for from many times."""
    path = tmp_path_factory.mktemp("store") / "feedback.sqlite"
    base_us = 1_000_000_000
    made = [
        impression(number, version=str(number % 2), issued_at_us=base_us + at, shopper=shopper)
        for number, (at, shopper) in enumerate(zip(issued, shoppers, strict=True))
    ]
    store, model, clock_us, seen_us = FeedbackStore(path, window_us=WINDOW_US), Model(), base_us, base_us
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(store_module, "_ROWS_AT_ONCE", 2)
    finals: dict[tuple[int | None, str], VersionCounts] = {}
    try:
        for what, detail in steps:
            if what == "events":
                seen_us = max(seen_us, clock_us)
                events = [Event(made[number], kind, None) for number, kind in detail]
                expected = [model.record(event, seen_us) for event in events]
                assert store.record([Submission(events, clock_us)]) == [expected]
            elif what == "wait":
                clock_us += detail
            elif what == "look":
                seen_us = max(seen_us, clock_us)
                since_us = None if detail is None else base_us + detail
                if since_us is not None and detail % 2:
                    while not store.catch_up(clock_us, shoppers_since_us=since_us):
                        pass
                evidence = store.evidence(clock_us, shoppers_since_us=since_us)
                assert evidence.versions == model.counts(seen_us, since_us)
                for version, counts in evidence.versions.items():
                    before = finals.get((since_us, version), VersionCounts())
                    for name in ("closed", "clicked", "shoppers", "shoppers_clicked"):
                        assert getattr(counts, name) >= getattr(before, name)
                    finals[since_us, version] = counts
            else:
                store.close()
                clock_us = max(clock_us, seen_us)  # a clock set back across a restart is beyond what the file knows
                store = FeedbackStore(path, window_us=WINDOW_US)
    finally:
        monkeypatch.undo()
        store.close()


def test_a_shopper_counts_once_by_the_first_impression_that_closed(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    heavy = [shown(number, version="2", issued_at_us=number, shopper=1) for number in range(10, 40)]
    store.record([
        Submission([shown(1, version="1", issued_at_us=5, shopper=1), *heavy,
                    clicked(2, version="1", issued_at_us=20, shopper=2),
                    clicked(11, version="2", issued_at_us=11, shopper=1)], 100)
    ])  # fmt: skip
    for now_us, since_us, expected in (
        (WINDOW_US, 0, {"1": (0, 0), "2": (0, 0)}),
        (WINDOW_US + 50, 0, {"1": (2, 1), "2": (0, 0)}),
        (WINDOW_US + 50, 11, {"1": (1, 1), "2": (1, 1)}),
        (WINDOW_US + 50, 12, {"1": (1, 1), "2": (1, 0)}),
        (WINDOW_US + 50, 1000, {"1": (0, 0), "2": (0, 0)}),
    ):
        found = store.evidence(now_us, shoppers_since_us=since_us).versions
        assert {label: (one.shoppers, one.shoppers_clicked) for label, one in found.items()} == expected
    # Seen again, in time and clicked: it is not their first.
    store.record([Submission([clicked(50, version="2", issued_at_us=WINDOW_US + 40, shopper=2)], WINDOW_US + 60)])
    assert store.evidence(3 * WINDOW_US, shoppers_since_us=0).versions["2"].shoppers == 0
    store.close()


def test_a_look_reads_what_closed_since_the_last_one_and_keeps_few_counts(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    store.record([
        Submission([shown(number, issued_at_us=number, shopper=number % 500) for number in range(2000)], 2000)
    ])  # fmt: skip
    work = 0

    def tick() -> None:
        nonlocal work
        work += 1

    store._db.set_progress_handler(tick, 10)
    store.evidence(WINDOW_US + 2000, shoppers_since_us=0)
    first, work = work, 0
    store.record([Submission([shown(3000, issued_at_us=2500, shopper=9000)], 2600)])
    assert store.evidence(WINDOW_US + 3000, shoppers_since_us=0).versions["2"].shoppers == 501
    assert work * 50 < first
    for since_us in range(100):
        store.evidence(WINDOW_US + 3000, shoppers_since_us=since_us)
    assert len(store._shoppers) == 8
    store.close()


def test_the_query_for_first_impressions_searches_and_never_scans(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    plan = [row[3] for row in store._db.execute("EXPLAIN QUERY PLAN " + _FIRST_IMPRESSIONS, (0, 1, 0))]
    assert not any(step.startswith("SCAN") for step in plan), plan
    assert sum("INDEX by_shopper (shopper=? AND issued_at_us" in step for step in plan) == 2, plan
    store.close()


def as_before(path: Path) -> None:
    """A database as the schema version 1 had it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("DROP INDEX by_shopper; PRAGMA user_version = 1;")


def test_a_database_of_the_schema_before_is_taken_on_with_all_its_events(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    store = FeedbackStore(path, window_us=WINDOW_US)
    store.record([Submission([shown(1), clicked(2, shopper=2), shown(3, issued_at_us=2)], 100)])
    store.close()
    as_before(path)
    for _ in range(2):
        store = FeedbackStore(path, window_us=WINDOW_US)
        assert store.evidence(WINDOW_US + 9, shoppers_since_us=0).versions == {"2": VersionCounts(3, 1, 0, 2, 1)}
        assert store._db.execute("PRAGMA user_version").fetchone() == (2,)
        store.close()


def test_a_disk_that_is_full_while_a_database_is_taken_on_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    store = FeedbackStore(path, window_us=WINDOW_US)
    store.record([Submission([shown(number) for number in range(3000)], 100)])
    store.close()
    as_before(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 20, hard))
    try:
        with pytest.raises(StorageError):
            FeedbackStore(path, window_us=WINDOW_US)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store = FeedbackStore(path, window_us=WINDOW_US)
    assert store.evidence(WINDOW_US + 9, shoppers_since_us=0).versions["2"] == VersionCounts(3000, 0, 0, 1, 0)
    store.close()


def test_a_database_of_a_later_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    FeedbackStore(path, window_us=WINDOW_US).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(StateError, match="not a feedback database of this release"):
        FeedbackStore(path, window_us=WINDOW_US)


def test_an_open_impression_is_no_evidence_and_a_closed_one_is_final(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    store.record([Submission([shown(1), shown(2), clicked(2)], 100)])
    assert store.evidence(WINDOW_US).versions == {"2": VersionCounts(closed=0, clicked=0, open=2)}
    assert store.evidence(WINDOW_US + 1).versions == {"2": VersionCounts(closed=2, clicked=1, open=0)}
    assert store.record([Submission([clicked(1)], WINDOW_US + 2)]) == [[Outcome.LATE]]
    assert store.evidence(WINDOW_US + 3).versions == {"2": VersionCounts(closed=2, clicked=1, open=0)}
    store.close()


def test_the_export_holds_every_event_once_in_order_and_goes_on_from_where_one_was(tmp_path: Path) -> None:
    path = tmp_path / "feedback.sqlite"
    store = FeedbackStore(path, window_us=WINDOW_US)
    store.record([Submission([shown(number, issued_at_us=number), clicked(number)], 10) for number in range(25)])
    store.record([Submission([shown(99)], WINDOW_US + 1)])
    events = [event for part in export(path, rows_at_once=7) for event in part]
    assert [event["seq"] for event in events] == list(range(1, 52))
    assert events[0] == {
        "seq": 1, "impression": "00" * 16, "version": "2", "shopper": "00" * 8, "type": "shown", "item": None,
        "issued_at_s": 0.0, "received_at_s": 1e-05, "late": False,
    }  # fmt: skip
    assert events[-1]["late"] is True
    assert [event["seq"] for part in export(path, after=49) for event in part] == [50, 51]
    store.close()


def test_a_full_disk_keeps_nothing_of_the_commit_and_recovers(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    store.record([Submission([shown(1)], 1)])
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    many = Submission([shown(number) for number in range(2, 500)], 2)
    with pytest.raises(StorageError, match="no space left"):
        store.record([many])
    assert store.evidence(3).versions == {"2": VersionCounts(open=1)}
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert store.record([many]) == [[Outcome.ACCEPTED] * 498]
    store.close()


def test_two_collectors_do_not_share_a_database(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    with pytest.raises(BusyError):
        FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
    store.close()
    FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US).close()


@pytest.mark.parametrize("damage", ["header", "middle", "foreign"])
def test_a_damaged_database_is_named_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "feedback.sqlite"
    if damage == "foreign":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE mine (x)")
        db.close()
    else:
        store = FeedbackStore(path, window_us=WINDOW_US)
        store.record([Submission([shown(number) for number in range(400)], 1)])
        store.close()
        raw = bytearray(path.read_bytes())
        start = 0 if damage == "header" else 4096
        raw[start : len(raw) if damage == "middle" else 100] = bytes(len(raw) - 4096 if damage == "middle" else 100)
        path.write_bytes(raw)
    before = path.read_bytes()
    with pytest.raises(StateError) as caught:
        FeedbackStore(path, window_us=WINDOW_US)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


# The writer


def test_requests_that_came_together_share_commits_and_each_gets_its_own_answer(tmp_path: Path) -> None:
    commits: list[int] = []

    async def crowd() -> list[list[Outcome]]:
        store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
        writer = Writer(store, now_us=lambda: 1, on_commit=lambda seconds, requests: commits.append(requests))
        answers = await asyncio.gather(*(writer.record([shown(number % 150)]) for number in range(200)))
        assert (await writer.evidence()).versions == {"2": VersionCounts(open=150)}
        writer.close()
        return answers

    answers = asyncio.run(crowd())
    assert answers == [[Outcome.ACCEPTED]] * 150 + [[Outcome.REPEATED]] * 50
    assert sum(commits) == 200
    assert len(commits) < 200


def test_a_long_count_is_made_in_parts_and_events_are_kept_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_ROWS_AT_ONCE", 100)
    order: list[str] = []

    async def work() -> None:
        store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
        store.record([
            Submission([shown(number, issued_at_us=number // 3, shopper=number % 700) for number in range(3000)], 9)
        ])  # fmt: skip
        writer = Writer(store, now_us=lambda: WINDOW_US + 990, on_commit=lambda seconds, requests: order.append("kept"))
        looks = [asyncio.create_task(writer.evidence(shoppers_since_us=since_us)) for since_us in (0, 0, *range(20))]
        looks[0].add_done_callback(lambda look: order.append("looked"))
        await asyncio.sleep(0)
        await writer.record([shown(9000, issued_at_us=WINDOW_US)])
        found = [(await look).versions["2"] for look in looks]
        assert found == [VersionCounts(2970, 0, 31, 700, 0)] * 22
        assert order == ["kept", "looked"]
        # Told to end, it still answers those who wait.
        last = asyncio.create_task(writer.evidence(shoppers_since_us=60))
        await asyncio.sleep(0)
        await asyncio.to_thread(writer.close)
        assert (await last).versions["2"].shoppers == 700

    asyncio.run(work())


def test_damage_found_at_work_reaches_who_waits_and_the_process(tmp_path: Path) -> None:
    found: list[EndcapError] = []

    async def work() -> None:
        store = FeedbackStore(tmp_path / "feedback.sqlite", window_us=WINDOW_US)
        store._db.execute("DROP TABLE events")
        writer = Writer(store, now_us=lambda: 1, on_damage=found.append)
        with pytest.raises(StorageError):
            await writer.record([shown(1)])
        store.record = lambda submissions: (_ for _ in ()).throw(StateError("damaged"))  # type: ignore[method-assign]
        with pytest.raises(StateError):
            await writer.record([shown(1)])
        writer.close()

    asyncio.run(work())
    assert [error.what for error in found] == ["damaged"]


# HTTP


@pytest.fixture
def client(tmp_path: Path) -> Iterator[AsgiClient]:
    path = tmp_path / "feedback.sqlite"
    app = FeedbackApp(path, KEY, FeedbackMetrics())
    with AsgiClient(app) as client:
        store = FeedbackStore(path, window_us=WINDOW_US)
        writers: list[Writer] = []

        async def start() -> None:
            writers.append(Writer(store, now_us=lambda: 10_000_000))
            app.open(writers[0])

        client.run(start())
        yield client
        writers[0].close()


def token(*, version: str = "2", issued_at_s: float = 9.0, key: bytes = KEY) -> str:
    return impressions.mint(key, version=version, shopper="7", now_s=issued_at_s)[1]


def send(client: AsgiClient, *events: Any) -> Any:
    answer = client.post("/v1/feedback", {"events": list(events)})
    return answer.status, answer.json


def test_keys_are_changed_under_a_running_collector(client: AsgiClient, tmp_path: Path) -> None:
    """No event is lost that a server signed with the new key before the collector had looked at the file."""
    path = tmp_path / "impression.key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    young = bytes(range(32))
    client.app._key = impressions.watched_keys(path)
    assert send(client, {"impression": token(), "type": "shown"})[0] == 200
    path.write_text(f"{young.hex()}\n{KEY.hex()}\n")
    new = impressions.mint(impressions.read_keys(path), version="2", shopper="7", now_s=9.0)[1]
    for one in (token(), new):
        assert send(client, {"impression": one, "type": "shown"})[1]["accepted"] == 1
    path.write_text(young.hex())
    client.app._key.refresh()
    assert send(client, {"impression": new, "type": "clicked"})[1]["accepted"] == 1
    assert "forged" in send(client, {"impression": token(), "type": "shown"})[1]["refused"][0]["reason"]


def test_each_event_is_judged_by_itself(client: AsgiClient) -> None:
    first, old = token(), token(issued_at_s=4.0)
    forged = token(key=KEY[:-1] + b"\x01")
    status, answer = send(
        client,
        {"impression": first, "type": "shown"},
        {"impression": first, "type": "clicked", "item": "59", "version": "2"},
        {"impression": first, "type": "clicked", "item": "60"},
        {"impression": forged, "type": "clicked"},
        {"impression": first, "type": "clicked", "version": "3"},
        {"impression": first, "type": "bought"},
        {"impression": first, "type": "shown", "item": 7},
        "shown",
        {"impression": old, "type": "clicked"},
    )
    assert status == 200
    assert (answer["accepted"], answer["repeated"], answer["late"]) == (2, 1, 1)
    assert [(refusal["index"], refusal["reason"][:12]) for refusal in answer["refused"]] == [
        (3, "the impressi"), (4, "version is n"), (5, "type must be"), (6, "item must be"), (7, "an event mus"),
    ]  # fmt: skip
    evidence = client.get("/v1/evidence").json
    assert evidence == {"at_s": 10.0, "window_s": 5.0, "versions": {"2": {"closed": 0, "clicked": 0, "open": 1}}}
    exported = [orjson.loads(line) for line in client.get("/v1/export").body.splitlines()]
    assert [(event["type"], event["item"]) for event in exported] == [
        ("shown", None), ("clicked", "59"), ("clicked", None),
    ]  # fmt: skip
    assert client.get("/v1/export", query=b"after=1").body.count(b"\n") == 2
    assert client.get("/v1/export", query=b"after=x").status == 400


def test_shoppers_are_counted_when_a_time_is_asked_for(client: AsgiClient) -> None:
    for issued_at_s, version in ((1.5, "3"), (2.0, "2"), (4.0, "3")):
        store = client.app.writer._store
        event = Event(impression(int(issued_at_s * 2), version=version, issued_at_us=round(issued_at_s * 1e6)),
                      EventType.CLICKED, None)  # fmt: skip
        store.record([Submission([event], round(issued_at_s * 1e6))])
    answer = client.get("/v1/evidence", query=b"shoppers_since_s=1.750000").json
    assert answer == {
        "at_s": 10.0, "window_s": 5.0, "shoppers_since_s": 1.75,
        "versions": {
            "2": {"closed": 1, "clicked": 1, "open": 0, "shoppers": 1, "shoppers_clicked": 1},
            "3": {"closed": 2, "clicked": 2, "open": 0, "shoppers": 0, "shoppers_clicked": 0},
        },
    }  # fmt: skip
    assert "shoppers" not in client.get("/v1/evidence").json["versions"]["2"]
    closed = client.get("/v1/evidence").json["versions"]["2"]["closed"]
    assert f'endcap_feedback_impressions_total{{version="2"}} {float(closed)}' in client.get("/metrics").body.decode()
    for said in (b"", b"now", b"-1", b"nan", b"1e9", b"9" * 13, b"1.", b"%00"):
        refused = client.get("/v1/evidence", query=b"shoppers_since_s=" + said)
        assert (refused.status, refused.json["error"]["where"]) == (400, "shoppers_since_s")


def test_a_request_of_which_nothing_can_be_taken_is_refused(client: AsgiClient) -> None:
    status, answer = send(client, {"impression": "forged", "type": "clicked"})
    assert status == 400
    assert answer["error"]["next"]
    assert answer["refused"] == [{"index": 0, "reason": "not an impression token"}]
    assert client.get("/v1/evidence").json["versions"] == {}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", {}, {"events": {}}, {"events": []}, {"events": [{}] * 101}])
def test_a_body_of_another_form_is_told_what_where_and_what_next(client: AsgiClient, body: Any) -> None:
    answer = client.post("/v1/feedback", body)
    assert answer.status == 400
    assert all(answer.json["error"].values())


def test_other_paths_methods_and_sizes(client: AsgiClient) -> None:
    assert client.get("/v1/feedback").status == 405
    assert client.post("/v1/evidence", b"").status == 405
    assert client.get("/nope").status == 404
    assert client.post("/v1/feedback", b" " * 300_000).status == 413
    assert client.get("/healthz").json == {"status": "ok", "storage": "ok"}
    assert b"endcap_feedback_events_total" in client.get("/metrics").body


def test_a_full_disk_is_a_507_that_says_so_and_the_next_that_fits_is_taken(client: AsgiClient) -> None:
    store = client.app.writer._store
    store._db.execute("PRAGMA max_page_count = 1")  # SQLite makes that the number of pages in use
    events = [{"impression": token(), "type": "shown"} for _ in range(MAX_EVENTS)]
    statuses = [client.post("/v1/feedback", {"events": events}).status]
    for _ in range(20):
        events = [{"impression": token(), "type": "shown"} for _ in range(MAX_EVENTS)]
        answer = client.post("/v1/feedback", {"events": events})
        statuses.append(answer.status)
        if answer.status == 507:
            break
    assert statuses[-1] == 507
    assert "no space left" in answer.json["error"]["what"]
    assert "no space left" in client.get("/healthz").json["storage"]
    store._db.execute("PRAGMA max_page_count = 1000000")
    assert client.post("/v1/feedback", {"events": events}).json["accepted"] == MAX_EVENTS
    assert client.get("/healthz").json["storage"] == "ok"


def test_nothing_is_taken_before_the_database_is_open(tmp_path: Path) -> None:
    with AsgiClient(FeedbackApp(tmp_path / "feedback.sqlite", KEY, FeedbackMetrics())) as client:
        assert client.post("/v1/feedback", {"events": [{"impression": token(), "type": "shown"}]}).status == 503


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=8),
              st.sampled_from([token(), token(version="3"), "shown", "clicked"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["events", "impression", "type", "item", "version"]), inner, max_size=5),
    ),
    max_leaves=12,
)  # fmt: skip
ALMOST = st.fixed_dictionaries(
    {"impression": st.one_of(st.sampled_from([token(), token(issued_at_s=1.0)]), JSON),
     "type": st.one_of(st.sampled_from(["shown", "clicked"]), JSON)},
    optional={"item": JSON, "version": JSON},
)  # fmt: skip


BODIES = st.one_of(st.binary(max_size=200), JSON, st.fixed_dictionaries({"events": st.lists(ALMOST, max_size=4)}))


@given(body=BODIES)
def test_any_body_is_parsed_or_refused(body: Any) -> None:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    try:
        events, refused = parse_feedback(raw, KEY)
    except InputError:
        return
    assert len(events) + len(refused) == len(orjson.loads(raw)["events"])


def test_no_body_makes_a_server_error(client: AsgiClient) -> None:
    @given(
        body=st.one_of(st.binary(max_size=200), JSON, st.fixed_dictionaries({"events": st.lists(ALMOST, max_size=4)}))
    )
    def try_one(body: Any) -> None:
        assert client.run(call(client.app, "POST", "/v1/feedback", body)).status in (200, 400)

    try_one()
