"""``endcap report``: from raw records to a page that a person can decide from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import JsonOption

app = typer.Typer(no_args_is_help=True, help="Reports, computed from raw records alone.")


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="A run's folder, such as out/demo.")], json_output: JsonOption = False
) -> None:
    """Write report.html and summary.json from the records in FOLDER. Safe to repeat."""
    from endcap.report import build as build_report

    console = Console(json_output=json_output)
    with console.task("building the report"):
        summary = build_report(folder)
    console.good(f"{folder / 'report.html'}")
    console.result(summary.to_json())
