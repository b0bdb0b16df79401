"""Reports made from a run folder's raw records alone, by anyone, as often as they like."""

from __future__ import annotations

from pathlib import Path

from endcap.files import write_atomic, write_json
from endcap.report.drills import measure_drill
from endcap.report.page import render
from endcap.report.run import read_run
from endcap.report.summary import Summary, summarise

__all__ = ["Summary", "build"]


def build(run_folder: Path) -> Summary:
    """Write ``report.html`` and ``summary.json`` into a run folder and return the summary.

    The same records give the same bytes. Parts that are missing are named in the report, and ``ok`` is False then.

    Raises:
        InputError: there is no run in that folder.
        StateError: a file of it is damaged; the message names the file, and nothing was written.
        StorageError: no space, or not allowed to write there.
    """
    run = read_run(run_folder)
    measures = tuple(measure_drill(run, drill) for drill in run.drills)
    summary = summarise(run, measures)
    page = render(run, summary, measures)
    write_atomic(run_folder / "report.html", page)
    write_json(run_folder / "summary.json", summary.to_json())
    return summary
