"""A short run of ``make fuzz``, and the judgement that both end with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from endcap.files import write_json
from tests.fuzz.campaign import Findings, growth_mb, judge


def test_two_thousand_fuzzed_requests_do_no_harm(tmp_path: Path) -> None:
    write_json(tmp_path / "serving.json", {"ready_s": 1.0})
    run = [sys.executable, "-m", "tests.fuzz", "--requests", "2000", "--out", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "serving.json").read_text())
    fuzzed = document["fuzzed"]
    assert document["ready_s"] == 1.0
    assert (fuzzed["status_5xx"], fuzzed["hangs"], fuzzed["verdict"]) == (0, 0, "pass")
    assert fuzzed["requests"] >= 2000
    assert min(fuzzed["by_kind"].values()) >= 200
    assert {"200", "400", "404", "grpc 0", "grpc 3"} <= fuzzed["answers"].keys()


@pytest.mark.parametrize("name", ["status_5xx", "hangs", "unusable", "undocumented"])
def test_one_thing_wrong_is_enough(name: str) -> None:
    assert judge(Findings()) == []
    assert len(judge(Findings(**{name: 1}))) == 1  # type: ignore[arg-type]


def test_memory_that_grows_is_told_from_arenas_that_fill() -> None:
    filled = [100.0, 110.0, 120.0, *[130.0] * 6]
    assert growth_mb(filled) == 0.0
    assert judge(Findings(rss_mb={"a": filled})) == []
    assert len(judge(Findings(rss_mb={"a": [100.0 + 4 * sample for sample in range(9)]}))) == 1
    assert growth_mb([1.0, 900.0]) == 0.0
