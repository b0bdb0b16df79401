"""``endcap pipeline``: from purchases to a signed package in the registry."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from endcap.cli.console import Console, Task
from endcap.cli.options import DEFAULT_REGISTRY, JsonOption, RegistryOption
from endcap.errors import OutcomeError

if TYPE_CHECKING:
    from pipelines.run import StepEvent

app = typer.Typer(no_args_is_help=True, help="Train, evaluate, gate, export, sign, register: a Kubeflow pipeline.")


@app.command("compile")
def compile_pipeline(
    out: Annotated[Path, typer.Option("--out", "-o", help="The YAML file to write.")] = Path("recommender.yaml"),
) -> None:
    """Write the pipeline as YAML for a Kubeflow cluster."""
    from pipelines.compile import compile_recommender

    compile_recommender(out)
    Console().good(f"compiled: {out}")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("out/pipeline"),
    data: Annotated[Path | None, typer.Option(help="Data file: `shopper item item ...` a line.")] = None,
    sha256: Annotated[str | None, typer.Option(help="What the data file must have.")] = None,
    dataset: Annotated[str, typer.Option(help="Published data by name: beauty, or synthetic.")] = "beauty",
    candidate: Annotated[str, typer.Option(help="Model to offer: best (on validation), or one by name.")] = "best",
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 7,
    train_seconds: Annotated[float | None, typer.Option(help="Time budget of the transformer.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Most epochs of the transformer.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that an interrupted run in this folder began.")
    ] = False,
    name: Annotated[str, typer.Option(help="Name of the registered model.")] = "recommender",
    keys: Annotated[Path, typer.Option(help="Folder of the signing key; made on first use.")] = Path("out/keys"),
    registry: RegistryOption = DEFAULT_REGISTRY,
    json_output: JsonOption = False,
) -> None:
    """Run the pipeline on this machine. Exits 4 when the gate does not let the candidate through."""
    from endcap.cli.registries import open_registry
    from pipelines.run import RunConfig, run_recommender

    console = Console(json_output=json_output)
    with console.task("pipeline") as task:
        result = run_recommender(
            RunConfig(
                out=out.absolute(), registry_uri=open_registry(registry).uri, keys=keys.absolute(), name=name,
                file=data, sha256=sha256, dataset=dataset, candidate=candidate, seed=seed, epochs=epochs,
                training_seconds=train_seconds, checkpoint=out.absolute() / "checkpoint.npz", resume=resume,
            ),
            on_event=tell_progress(task),
        )  # fmt: skip
    if result.data.synthetic:
        console.say(f"  the data is SYNTHETIC: {result.data.origin}", style="yellow")
    (console.good if result.promoted_by_gate else console.bad)(result.gate_reason)
    console.result(
        {"version": result.version, "package": result.package, "gate": result.gate_reason,
         "registered": result.promoted_by_gate, "data": asdict(result.data), "step_seconds": dict(result.step_seconds)}
    )  # fmt: skip
    if not result.promoted_by_gate:
        raise OutcomeError(f"the gate did not let the candidate through: {result.gate_reason}", where=out)


HostOption = Annotated[str, typer.Option(envvar="KFP_HOST", help="URL of the Kubeflow Pipelines API.")]
ClusterRegistryOption = Annotated[
    str, typer.Option("--registry", help="MLflow tracking URI as the cluster reaches it.")
]
ClusterKeysOption = Annotated[str, typer.Option("--keys", help="Folder of the signing key as the steps see it.")]
NameOption = Annotated[str, typer.Option(help="Name of the registered model.")]


@app.command()
def submit(
    host: HostOption, registry: ClusterRegistryOption, keys: ClusterKeysOption = "/keys",
    name: NameOption = "recommender",
    json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Run the pipeline once on a Kubeflow cluster. A token, where one is needed, is read from KFP_TOKEN."""
    from pipelines.compile import submit as submit_run

    console = Console(json_output=json_output)
    run_id = submit_run(host, _arguments(registry, keys, name), token=os.environ.get("KFP_TOKEN"))
    console.good(f"submitted: run {run_id}")
    console.result({"run": run_id})


@app.command()
def schedule(
    host: HostOption, registry: ClusterRegistryOption,
    cron: Annotated[str, typer.Option(help="Six fields, seconds first: '0 0 4 * * *' is 4 each night.")],
    keys: ClusterKeysOption = "/keys", name: NameOption = "recommender", json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Run the pipeline again and again on a Kubeflow cluster."""
    from pipelines.compile import schedule as schedule_run

    console = Console(json_output=json_output)
    run_id = schedule_run(
        host, _arguments(registry, keys, name), cron=cron, name=name, token=os.environ.get("KFP_TOKEN")
    )
    console.good(f"scheduled: {run_id}, {cron}")
    console.result({"recurring_run": run_id})


def _arguments(registry: str, keys: str, name: str) -> dict[str, str]:
    return {"registry": registry, "keys": keys, "name": name}


def tell_progress(task: Task) -> Callable[[StepEvent], None]:
    """Show a pipeline's events as the progress of ``task``."""
    from pipelines.run import STEPS

    def tell(event: StepEvent) -> None:
        at = STEPS.index(event.step) if event.step in STEPS else 0
        if event.event == "started":
            task.update(event.step, done=at, total=len(STEPS), now=True)
        elif event.event == "epoch":
            quality = event.details.get("valid_ndcg_at_10")
            told = f"epoch {event.details.get('epoch')}"
            task.update(told if quality is None else f"{told}, validation NDCG@10 {quality:.4f}", done=at,
                        total=len(STEPS))  # fmt: skip

    return tell
