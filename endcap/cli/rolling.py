"""A rollout as commands and the demo run it: the engine with its gates, sources and notices, told to a person."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from endcap.cli.console import Console, Task
from endcap.errors import BusyError, InputError
from endcap.files import FolderLock
from endcap.objectives import Good, Objectives
from serving.gates import GateReport, GateSettings, run_gates
from serving.rollout.audit import LOOK, Decision
from serving.rollout.declared import read_declared
from serving.rollout.engine import CountSource, Gatekeeper, RolloutResult, run_rollout
from serving.rollout.events import Commanded, Gated
from serving.rollout.notices import Notifier, webhook_url
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Phase, State
from serving.rollout.store import load_state
from serving.targets import LocalTarget, ModelVersion

__all__ = ["PROMETHEUS_TOKEN", "bring_back", "has_ended", "resolve_candidate", "roll_out"]

PROMETHEUS_TOKEN = "ENDCAP_PROMETHEUS_TOKEN"  # noqa: S105 - the name of an environment variable
"""The variable with the bearer token for Prometheus, where it wants one."""


def resolve_candidate(uri: str, registry: str) -> ModelVersion:
    """The candidate of a rollout, ``models:/name/version``, from the registry."""
    from endcap.cli.registries import open_registry

    version = open_registry(registry).resolve(uri)
    return ModelVersion(version.version, version.package)


def has_ended(folder: Path) -> bool:
    """Whether a folder holds a rollout that came to its end."""
    state = load_state(folder)
    return state is not None and state.ended


def roll_out(
    console: Console, spec: RolloutSpec, objectives: Objectives, candidate: ModelVersion, target: LocalTarget,
    folder: Path,
) -> RolloutResult:  # fmt: skip
    """Run the rollout, or go on with it. One a service at a time: the target's folder is held while it runs.

    Raises:
        BusyError: a rollout of the service runs on this target already.
        And what :func:`serving.rollout.engine.run_rollout` and :func:`serving.gates.run_gates` raise.
    """
    judged = spec.judged(objectives)
    packages = target.state().versions
    with ExitStack() as held:
        held.enter_context(_only_rollout(target, spec.service))
        url = webhook_url(spec.webhook_from)
        notifier = None if url is None else held.enter_context(Notifier(url, spec, folder))
        if notifier is not None:
            console.say(f"  notices go to {notifier.address}", style="dim")
        task = held.enter_context(console.task(f"rollout {candidate.label}"))

        def tell(decided: Decision) -> None:
            if notifier is not None:
                notifier.tell(decided)
            _tell(console, task, spec, decided)

        gates = _gatekeeper(spec, judged, target.found.public_key, folder)
        source = _source(spec, judged, target, held)
        return run_rollout(spec, objectives, candidate, target, folder, packages=packages, gates=gates,
                           source=source, on_decision=tell)  # fmt: skip


def bring_back(console: Console, state: State, target: LocalTarget, folder: Path) -> RolloutResult:
    """Run the engine of a rollout that was told to abort, from its folder alone: no document, no registry.

    Raises:
        InputError: the target is not the one that the rollout runs on.
    """
    declared, known = read_declared(folder), target.state().versions
    if state.stable not in known:
        raise InputError(f"version {state.stable}, which the traffic would return to, is unknown to this target",
                         where=target.folder, next_step="name the rollout's own with --target")  # fmt: skip
    # A canary that the target does not know has nothing to be taken from, and its package is not needed.
    candidate = ModelVersion(state.canary, known.get(state.canary, folder))
    return roll_out(console, declared.spec, declared.objectives, candidate, target, folder)


@contextmanager
def _only_rollout(target: LocalTarget, service: str) -> Iterator[None]:
    lock = FolderLock(target.folder, name=f".rollout-{service}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(lock)
        except BusyError as error:
            raise BusyError(f"a rollout of {service} runs here already ({error.what})", where=target.folder,
                            next_step="wait for it, or end it: endcap rollout abort") from error  # fmt: skip
        yield


def _gatekeeper(spec: RolloutSpec, objectives: Objectives, public_key: Path, folder: Path) -> Gatekeeper:
    asked = spec.gates
    settings = GateSettings(
        asked.offline_margin_relative, asked.segment_margin_relative, asked.segment_min_shoppers, asked.max_shoppers,
        asked.replayed_requests,
    )  # fmt: skip
    requests = None if asked.requests is None else Path(asked.requests)

    def check(candidate: Path, stable: Path) -> Gated:
        report = run_gates(settings, candidate, stable, public_key, objectives, requests=requests, folder=folder)
        if requests is None:  # the others had nothing to look at, which need not be said of each
            report = GateReport(report.gates[:1])
        return Gated(report.passed, report.reason)

    return check


def _source(spec: RolloutSpec, objectives: Objectives, target: LocalTarget, held: ExitStack) -> CountSource | None:
    """What counts the objectives that the target does not; closed with ``held``."""
    if not any(objective.good is Good.COUNTED for objective in objectives.objectives):
        return None
    from serving.sources import MetricsEndpoint, PrometheusAccess, Sources

    def endpoints() -> list[MetricsEndpoint]:
        return [MetricsEndpoint(f"http://127.0.0.1:{replica.port}/metrics", replica.version)
                for replica in target.replicas()]  # fmt: skip

    token = PROMETHEUS_TOKEN if os.environ.get(PROMETHEUS_TOKEN) else None
    prometheus = None if spec.prometheus_url is None else PrometheusAccess(spec.prometheus_url, token_env=token)
    sources = Sources(objectives, prometheus=prometheus, endpoints=endpoints, envoy_url=target.found.envoy_admin_url)
    held.callback(sources.close)
    return sources


def _tell(console: Console, task: Task, spec: RolloutSpec, decided: Decision) -> None:
    before, state = decided.before, decided.after
    match decided.event:
        case Gated(passed=True, reason=reason):
            console.say(f"    checked: {reason}", style="dim")
        case Commanded(command=command, by=by):
            console.say(f"    {by}: {command}", style="yellow")
        case _:
            pass
    if state.waiting is not None and (before is None or before.waiting != state.waiting):
        console.say(f"    waits: {state.waiting}", style="yellow")
    seen = ", ".join(f"{name} {decided.evidence.verdict_of(name)}" for name in decided.evidence.by_objective)
    share = spec.steps[state.step].share
    match state.phase:
        case Phase.GATING:
            task.update("checks before any traffic")
        case Phase.SHADOWING:
            task.update("copies of requests, before any traffic")
        case Phase.OBSERVING | Phase.HOLDING:
            where = "held at" if state.phase is Phase.HOLDING else "at"
            task.update(f"{where} {share:.0%}: {seen}", done=state.step + 1, total=len(spec.steps))
        case _:
            pass
    if decided.action == LOOK or before is None or before.phase is state.phase:
        return
    if state.phase is Phase.GROWING:
        console.say(f"    {state.canary}: getting ready for {share:.0%}", style="dim")
    elif state.phase is Phase.HOLDING:
        console.say(f"    {state.canary}: {state.reason}; held for up to {spec.hold_s:g} s", style="yellow")
    elif state.phase is Phase.RETURNING:
        console.say(f"    {state.canary}: back to {state.stable}: {state.reason}", style="dim")
