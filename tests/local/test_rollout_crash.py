"""The engine is killed for good, with SIGKILL, at every write and every call to its target, and run again."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks.rollout.crash import SCENARIOS, Scenario, crash_points


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.name for scenario in SCENARIOS])
def test_killed_anywhere_it_resumes_to_the_right_end(scenario: Scenario, tmp_path: Path) -> None:
    # Thousands of forks, each as slow as the process is large; that of the tests has grown by then.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as small:
        result = small.submit(crash_points, tmp_path, (scenario,)).result()
    assert result.wrong == ()
    assert result.tried > 90
