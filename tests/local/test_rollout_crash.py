"""The engine is killed for good, with SIGKILL, at every write and every call to its target, and run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rollout.crash import SCENARIOS, Scenario, crash_points


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.name for scenario in SCENARIOS])
def test_killed_anywhere_it_resumes_to_the_right_end(scenario: Scenario, tmp_path: Path) -> None:
    result = crash_points(tmp_path, (scenario,))
    assert result.wrong == ()
    assert result.tried > 90
