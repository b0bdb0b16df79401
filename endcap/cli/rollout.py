"""``endcap rollout``: give a model version traffic step by step, and let the evidence decide."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import DEFAULT_REGISTRY, JsonOption, RegistryOption, TargetOption
from endcap.errors import InputError, OutcomeError

app = typer.Typer(no_args_is_help=True, help="Roll out a model version, decided by evidence.")


@app.command()
def start(
    file: Annotated[Path, typer.Argument(help="File with a Rollout document.")],
    objectives: Annotated[Path, typer.Option(help="File with the service's Objectives document.")],
    folder: Annotated[
        Path,
        typer.Option(help="Folder of this rollout; one that was cut off is gone on with, one that ended stays so."),
    ],
    target: TargetOption = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    package: Annotated[
        Path | None, typer.Option(help="The candidate's package, where no registry is at hand (with --label).")
    ] = None,
    label: Annotated[str, typer.Option(help="Label of the version in --package.")] = "candidate",
    json_output: JsonOption = False,
) -> None:
    """Start a rollout, or go on with one that was cut off. Exits 4 when it ends in anything but a promotion.

    The candidate, models:/NAME/VERSION, is fetched from the registry.
    """
    from endcap.cli.rolling import has_ended, resolve_candidate, roll_out
    from endcap.objectives import load_objectives
    from serving.rollout.spec import load_rollout
    from serving.targets import ModelVersion, open_target

    console = Console(json_output=json_output)
    spec, declared = load_rollout(file), load_objectives(objectives)
    if declared.name != spec.objectives:
        raise InputError(f"the rollout asks for objectives {spec.objectives!r}; this file has {declared.name!r}",
                         where=objectives)  # fmt: skip
    if package is not None:
        candidate = ModelVersion(label, package.absolute())
    else:
        candidate = resolve_candidate(spec.candidate, registry)
    running = open_target(target)
    if has_ended(folder):
        console.say("  this rollout has ended; to roll the version out again choose another --folder", style="yellow")
    result = roll_out(console, spec, declared, candidate, running, folder)
    console.result({"from": result.stable, "to": result.canary, "verdict": result.outcome,
                    "reason": result.reason, "seconds": round(result.seconds, 3)})  # fmt: skip
    if result.outcome != "promoted":
        raise OutcomeError(f"version {result.canary} was not promoted: {result.outcome}, {result.reason}")


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="The rollout's folder.")], json_output: JsonOption = False
) -> None:
    """Where a rollout stands."""
    from endcap.files import read_json
    from serving.rollout.state import State

    console = Console(json_output=json_output)
    document = read_json(folder / "state.json")
    state = State.from_json(document, where=folder / "state.json")
    verdict = state.outcome or "running"
    console.say(f"{state.stable} -> {state.canary}: {verdict} ({state.phase}, step {state.step + 1}): {state.reason}")
    console.result(document)


@app.command()
def history(
    folder: Annotated[Path, typer.Argument(help="The rollout's folder.")],
    all_looks: Annotated[bool, typer.Option("--all", help="Every look, not only what changed something.")] = False,
    json_output: JsonOption = False,
) -> None:
    """What was decided, when, and on what evidence."""
    from endcap.files import read_json_lines

    console = Console(json_output=json_output)
    path = folder / "decisions.jsonl"
    if not path.exists():
        raise InputError("no rollout here", where=folder)
    lines = [line for line in read_json_lines(path) if all_looks or line.get("action") != "look"]
    console.table(
        ["at", "step", "share", "action", "evidence", "reason"],
        [
            (
                datetime.fromtimestamp(float(line["at_s"]), UTC).strftime("%H:%M:%S"),
                line["step"],
                "" if line["share"] is None else f"{line['share']:.0%}",
                line["action"],
                line["verdict"],
                line["reason"],
            )
            for line in lines
        ],
    )
    console.result(lines)


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="Rollout or Objectives.")] = "Rollout") -> None:
    """The JSON schema of the files that people write."""
    import json

    from endcap.documents import Document
    from endcap.objectives import ObjectivesDocument
    from serving.rollout.spec import RolloutDocument

    models: dict[str, type[Document]] = {"rollout": RolloutDocument, "objectives": ObjectivesDocument}
    if kind.lower() not in models:
        raise InputError(f"no document of kind {kind!r}", next_step="Rollout or Objectives")
    typer.echo(json.dumps(models[kind.lower()].model_json_schema(by_alias=True), indent=2))
