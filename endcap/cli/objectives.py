"""``endcap objectives``: what follows from a service's objectives."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml

from endcap.cli.console import Console

app = typer.Typer(no_args_is_help=True, help="What follows from a service's objectives.")


class Form(StrEnum):
    FILE = "file"
    KUBERNETES = "kubernetes"
    VALUES = "values"


@app.callback()
def _group() -> None:
    pass


@app.command()
def rules(
    objectives: Annotated[Path, typer.Argument(help="File of an Objectives document.")],
    form: Annotated[
        Form,
        typer.Option("--as", help="file: for Prometheus; kubernetes: a PrometheusRule; values: for the Helm chart."),
    ] = Form.FILE,
) -> None:
    """Print alert rules: burn rates over several windows, and no data."""
    from endcap.alerts import burn_rate_rules
    from endcap.objectives import load_objectives

    declared = load_objectives(objectives)
    made = burn_rate_rules(declared)
    match form:
        case Form.FILE:
            document = made.rule_file()
        case Form.KUBERNETES:
            document = made.kubernetes(f"endcap-{declared.name}")
        case Form.VALUES:
            document = {"prometheusRules": {"enabled": True, "groups": list(made.groups)}}
    for name, reason in made.without.items():
        Console(json_output=True).say(f"no rule for {name}: {reason}", style="yellow")
    sys.stdout.write(yaml.safe_dump(document, sort_keys=False, width=10_000))
