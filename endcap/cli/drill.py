"""``endcap drill``: break something on purpose, and measure how long it hurts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import JsonOption, TargetOption
from endcap.errors import InputError, OutcomeError

app = typer.Typer(no_args_is_help=True, help="Drills: Chaos Toolkit experiments on a running target.")


@app.command("list")
def list_drills(json_output: JsonOption = False) -> None:
    """The drills that endcap brings along."""
    from chaos.drills import drill_names

    console = Console(json_output=json_output)
    for name in drill_names():
        console.say(name)
    console.result(drill_names())


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A drill's name (see `endcap drill list`).")],
    out: Annotated[Path, typer.Option(help="Folder for the journal.")] = Path("out/drills"),
    target: TargetOption = None,
    objectives: Annotated[
        Path | None, typer.Option(help="Objectives file; default: the one that the target was started with.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses what is hit.")] = 7,
    json_output: JsonOption = False,
) -> None:
    """Run a drill on a target under load. Exits 4 when the steady state did not come back."""
    from chaos.drills import run_drill

    if target is None:
        raise InputError("no target to drill", next_step="give --target or set ENDCAP_TARGET")
    console = Console(json_output=json_output)
    with console.task(name):
        result = run_drill(
            name,
            target=target.absolute(),
            out=out.absolute() / name,
            seed=seed,
            objectives=objectives.absolute() if objectives else None,
        )
    (console.good if result.held else console.bad)(f"{name}: {result.describe()}")
    console.result(asdict(result))
    if not result.held:
        raise OutcomeError(f"the steady state was not held: {result.describe()}", where=out / name / "journal.json")
