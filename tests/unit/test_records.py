"""What a report relies on: no request is lost between the load and the table, whatever dies when."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endcap import records
from endcap.errors import StateError
from endcap.records import FaultRecord, RequestRecord, TargetEvent


def request(number: int, *, at_s: float = 100.0, status: int = 200) -> RequestRecord:
    return RequestRecord(f"r-{number}", "recommend", "7", at_s, at_s, at_s + 0.01, status, version="1")


def write_lines(path: Path, *written: RequestRecord, torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in written) + torn)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            RequestRecord,
            request_id=st.uuids().map(str),
            kind=st.sampled_from(["recommend", "feedback"]),
            shopper=st.text(),
            intended_s=st.floats(0, 4e9),
            sent_s=st.floats(0, 4e9),
            done_s=st.floats(0, 4e9),
            status=st.sampled_from([0, 200, 400, 429, 503]),
            error=st.none() | st.text(),
            version=st.none() | st.text(),
            impression=st.none() | st.text(),
            clicked=st.booleans(),
            fallback=st.none() | st.text(),
        ),
        unique_by=lambda record: record.request_id,
        max_size=8,
    )
)
def test_what_the_load_wrote_is_what_the_report_reads(
    tmp_path_factory: pytest.TempPathFactory, written: list[RequestRecord]
) -> None:
    folder = tmp_path_factory.mktemp("records")
    write_lines(folder / "requests-1.jsonl", *written)
    assert records.convert_requests(folder) == len(written)
    expected = sorted(written, key=lambda record: (record.intended_s, record.request_id))
    assert records.read_requests(folder) == expected
    assert not list(folder.glob("*.jsonl"))


def test_lines_left_by_a_killed_load_join_the_table_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "requests-1.jsonl", request(1))
    records.convert_requests(tmp_path)
    # Killed between writing the table and deleting the lines, and then with a torn line.
    write_lines(tmp_path / "requests-1.jsonl", request(1))
    write_lines(tmp_path / "requests-2.jsonl", request(2), torn='{"request_id": "r-3", "ki')
    assert [record.request_id for record in records.read_requests(tmp_path)] == ["r-1", "r-2"]
    assert records.convert_requests(tmp_path) == 2
    assert records.convert_requests(tmp_path) == 2
    assert [record.request_id for record in records.read_requests(tmp_path)] == ["r-1", "r-2"]


def test_a_running_load_keeps_its_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "requests-1.jsonl", request(1))
    with (tmp_path / "requests-1.jsonl").open("ab") as file:
        records.lock_request_file(file)
        assert records.leftover_request_files(tmp_path) == []
        assert records.convert_requests(tmp_path) == 0
        assert len(records.read_requests(tmp_path)) == 1
    assert records.convert_requests(tmp_path) == 1


def test_damage_is_named_and_changes_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "requests-1.jsonl", request(1), torn="not json\n")
    with pytest.raises(StateError, match=r"requests-1\.jsonl.*line 2"):
        records.convert_requests(tmp_path)
    assert (tmp_path / "requests-1.jsonl").exists()
    assert not (tmp_path / "requests.parquet").exists()
    (tmp_path / "requests-1.jsonl").unlink()
    (tmp_path / "requests.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(StateError, match=r"requests\.parquet"):
        records.read_requests(tmp_path)


@pytest.mark.parametrize(("status", "failed"), [(0, True), (200, False), (400, False), (429, True), (503, True)])
def test_which_requests_failed(status: int, failed: bool) -> None:
    assert request(1, status=status).failed is failed


def test_faults_and_events_come_back_in_order(tmp_path: Path) -> None:
    faults = [
        FaultRecord(10.0, "zone-loss", "SIGSTOP", "injected", "zone a"),
        FaultRecord(18.0, "zone-loss", "SIGSTOP", "reverted", "zone a"),
    ]
    for fault in reversed(faults):
        records.append_fault(tmp_path, fault)
    assert records.read_faults(tmp_path) == faults
    event = TargetEvent(11.0, "replica_unhealthy", "7", "a", "7/a/0")
    (tmp_path / "target.jsonl").write_text(json.dumps(asdict(event)) + "\n")
    assert records.read_target_events(tmp_path) == [event]
    assert records.read_attempts(tmp_path) == []


def test_a_gateway_line_with_envoys_dashes_is_read(tmp_path: Path) -> None:
    line = {"at_s": "1700000000.123456", "request_id": "-", "route": None, "cluster": "version-7", "host": "-",
            "code": 0, "flags": "UF,URX", "duration_ms": 501, "details": "-"}  # fmt: skip
    (tmp_path / "attempts.jsonl").write_text(json.dumps(line) + "\n")
    (attempt,) = records.read_attempts(tmp_path)
    assert attempt.at_s == 1700000000.123456
    assert (attempt.version, attempt.host, attempt.code, attempt.attempts) == ("7", None, 0, 1)
    assert attempt.failed
    (tmp_path / "attempts.jsonl").write_text('{"at_s": "soon"}\n')
    with pytest.raises(StateError, match="line 1"):
        records.read_attempts(tmp_path)
