"""``endcap pipeline``: from purchases to a signed package in the registry."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from endcap.cli.console import Console, Task
from endcap.cli.options import DEFAULT_REGISTRY, JsonOption, RegistryOption
from endcap.errors import InputError, OutcomeError

if TYPE_CHECKING:
    from pipelines.host import Host, Job
    from pipelines.run import StepEvent

app = typer.Typer(no_args_is_help=True, help="Train, evaluate, gate, export, sign, register: a Kubeflow pipeline.")


@app.command("compile")
def compile_pipeline(
    out: Annotated[Path, typer.Option("--out", "-o", help="The YAML file to write.")] = Path("recommender.yaml"),
    settings: Annotated[
        Path | None,
        typer.Option(help="PipelineSettings: image, resources, GPU, secrets, volumes.", show_default=False),
    ] = None,
) -> None:
    """Write the pipeline as YAML for a Kubeflow cluster."""
    from pipelines.compile import compile_recommender
    from pipelines.settings import load_settings

    compile_recommender(out, None if settings is None else load_settings(settings))
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
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", envvar=["KFP_TOKEN_FILE", "KF_PIPELINES_SA_TOKEN_PATH"], show_default=False,
                 help="File of the bearer token, read before every request; else the token is KFP_TOKEN's."),
]  # fmt: skip
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", envvar="KFP_NAMESPACE", help="The profile's, where Kubeflow has many users.",
                 show_default=False),
]  # fmt: skip
CaOption = Annotated[
    Path | None, typer.Option("--ca", help="PEM file of the host's own authority.", show_default=False)
]
ExperimentOption = Annotated[str, typer.Option(help="Kubeflow's folder for runs; made where there is none.")]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="Of the pipeline; may be repeated.",
                 show_default=False),
]  # fmt: skip
CachingOption = Annotated[
    bool,
    typer.Option("--caching/--no-caching", help="Take over what a step made before from the same inputs."),
]
SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", help="PipelineSettings: image, resources, GPU, secrets, volumes.", show_default=False),
]
ServiceAccountOption = Annotated[
    str | None, typer.Option("--service-account", help="That the steps run as.", show_default=False)
]
ClusterRegistryOption = Annotated[
    str, typer.Option("--registry", help="MLflow tracking URI as the cluster reaches it.")
]
ClusterKeysOption = Annotated[str, typer.Option("--keys", help="Folder of the signing key as the steps see it.")]
NameOption = Annotated[str, typer.Option(help="Name of the registered model.")]
TimeoutOption = Annotated[float, typer.Option("--timeout-s", min=1, help="How long to wait for the run to end.")]


@app.command()
def submit(
    host: HostOption, registry: ClusterRegistryOption, keys: ClusterKeysOption = "/keys",
    name: NameOption = "recommender", experiment: ExperimentOption = "endcap",
    run_name: Annotated[str | None, typer.Option(help="Shown in Kubeflow.", show_default="NAME and the time")] = None,
    parameter: ParameterOption = None, caching: CachingOption = True, settings: SettingsOption = None,
    service_account: ServiceAccountOption = None, token_file: TokenFileOption = None,
    namespace: NamespaceOption = None, ca: CaOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until the run has ended.")] = False,
    timeout_s: TimeoutOption = 21_600.0,
    json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Run the pipeline once on a Kubeflow cluster.

    With --wait it exits with 0 when the run registered a version, 4 when it failed or its gate let nothing through,
    and 5 when the time was out first (the run goes on).
    """
    from pipelines.host import submit as submit_run

    console = Console(json_output=json_output)
    where = _host(host, token_file, namespace, ca)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    job = _job(run_name or f"{name} {now}", experiment, registry, keys, name, parameter, caching, settings,
               service_account)  # fmt: skip
    run_id = submit_run(where, job)
    console.good(f"submitted: run {run_id}")
    if wait:
        _wait(console, where, run_id, timeout_s)
    else:
        console.say(f"  next: endcap pipeline wait {run_id}")
        console.result({"run": run_id})


@app.command("wait")
def wait_for(
    run_id: Annotated[str, typer.Argument(help="As `endcap pipeline submit` printed it.")],
    host: HostOption, token_file: TokenFileOption = None, namespace: NamespaceOption = None, ca: CaOption = None,
    timeout_s: TimeoutOption = 21_600.0, json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Wait until a run has ended; exit codes as for `submit --wait`."""
    _wait(Console(json_output=json_output), _host(host, token_file, namespace, ca), run_id, timeout_s)


@app.command()
def schedule(
    host: HostOption, registry: ClusterRegistryOption,
    cron: Annotated[str, typer.Option(help="Six fields, seconds first: '0 0 4 * * *' is 4 each night.")],
    keys: ClusterKeysOption = "/keys", name: NameOption = "recommender", experiment: ExperimentOption = "endcap",
    schedule_name: Annotated[
        str | None, typer.Option(help="One of a name is kept.", show_default="the model's name")
    ] = None,
    parameter: ParameterOption = None, caching: CachingOption = True, settings: SettingsOption = None,
    service_account: ServiceAccountOption = None, token_file: TokenFileOption = None,
    namespace: NamespaceOption = None, ca: CaOption = None, json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Run the pipeline again and again on a Kubeflow cluster. Said twice, it is scheduled once."""
    from pipelines.host import schedule as schedule_run

    console = Console(json_output=json_output)
    job = _job(schedule_name or name, experiment, registry, keys, name, parameter, caching, settings, service_account)
    made = schedule_run(_host(host, token_file, namespace, ca), job, cron=cron)
    console.good(f"{'scheduled' if made.created else 'was scheduled already'}: {made.id}, {cron}")
    if made.replaced:
        console.say(f"  in place of {', '.join(made.replaced)}")
    if not made.enabled:
        console.say("  it is disabled, and stays so until somebody enables it in Kubeflow", style="yellow")
    console.result({"recurring_run": made.id, "created": made.created, "enabled": made.enabled,
                    "replaced": list(made.replaced)})  # fmt: skip


def _host(url: str, token_file: Path | None, namespace: str | None, ca: Path | None) -> Host:
    from pipelines.host import Host, read_token

    value = os.environ.get("KFP_TOKEN", "").strip()
    token: Callable[[], str] | None = None
    if token_file is not None:
        token = partial(read_token, token_file)
        token()  # what is wrong with it is said before anything is compiled
    elif value:
        token = lambda: value  # noqa: E731
    if ca is not None and not ca.is_file():
        raise InputError("no such file", where=ca)
    return Host(url, token=token, namespace=namespace, ca=ca)


def _job(
    title: str, experiment: str, registry: str, keys: str, name: str, parameter: list[str] | None, caching: bool,
    settings: Path | None, service_account: str | None,
) -> Job:  # fmt: skip
    from pipelines.compile import compiled_recommender, without_caching
    from pipelines.host import Job
    from pipelines.parameters import parse_assignments, typed_parameters
    from pipelines.settings import load_settings

    given = parse_assignments(parameter or ())
    own = {"registry": registry, "keys": keys, "name": name}
    twice = sorted(set(given) & set(own))
    if twice:
        raise InputError(f"{twice[0]!r} has an option of its own", where="--parameter", next_step=f"use --{twice[0]}")
    compiled = compiled_recommender(None if settings is None else load_settings(settings))
    parameters = typed_parameters(compiled, own | given)
    return Job(title, experiment, compiled if caching else without_caching(compiled), parameters, service_account)


def _wait(console: Console, host: Host, run_id: str, timeout_s: float) -> None:
    from pipelines.host import wait_for_run

    with console.task(f"run {run_id}") as task:
        state = wait_for_run(host, run_id, timeout_s=timeout_s, on_state=lambda seen: task.update(seen.state))
    console.result({"run": run_id, **asdict(state)})
    if state.state != "SUCCEEDED":
        steps = f" in {', '.join(state.failed_steps)}" if state.failed_steps else ""
        raise OutcomeError(f"the run ended as {state.state}{steps}" + (f": {state.error}" if state.error else ""),
                           where=f"run {run_id}", next_step="see the step's log in Kubeflow")  # fmt: skip
    if state.registered is False:
        raise OutcomeError("the gate did not let the candidate through: nothing was registered",
                           where=f"run {run_id}")  # fmt: skip
    console.good("registered" if state.registered else "succeeded; the host does not tell whether its gate passed")


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
