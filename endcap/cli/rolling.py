"""A rollout as commands and the demo run it: the engine, told to a person while it goes."""

from __future__ import annotations

from pathlib import Path

from endcap.cli.console import Console, Task
from endcap.evidence import Evidence
from endcap.files import FolderLock, read_json
from endcap.objectives import Objectives
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Phase, State
from serving.targets import LocalTarget, ModelVersion

__all__ = ["has_ended", "resolve_candidate", "roll_out"]


def resolve_candidate(uri: str, registry: str) -> ModelVersion:
    """The candidate of a rollout, ``models:/name/version``, from the registry."""
    from endcap.cli.registries import open_registry

    version = open_registry(registry).resolve(uri)
    return ModelVersion(version.version, version.package)


def has_ended(folder: Path) -> bool:
    """Whether a folder holds a rollout that came to its end."""
    path = folder / "state.json"
    return path.exists() and State.from_json(read_json(path), where=path).phase is Phase.DONE


def roll_out(
    console: Console, spec: RolloutSpec, objectives: Objectives, candidate: ModelVersion, target: LocalTarget,
    folder: Path,
) -> RolloutResult:  # fmt: skip
    """Run the rollout, or go on with it. One a service at a time: the target's folder is held while it runs."""
    packages = target.state().versions
    title = f"rollout {candidate.label}"
    with FolderLock(target.folder, name=f".rollout-{spec.service}.lock"), console.task(title) as task:

        def tell(state: State, evidence: Evidence) -> None:
            _tell(console, task, spec, state, evidence)

        return run_rollout(spec, objectives, candidate, target, folder, packages=packages, on_decision=tell)


def _tell(console: Console, task: Task, spec: RolloutSpec, state: State, evidence: Evidence) -> None:
    seen = ", ".join(f"{name} {evidence.verdict_of(name)}" for name in evidence.by_objective)
    share = spec.steps[state.step].share
    if state.phase is Phase.OBSERVING:
        task.update(f"at {share:.0%}: {seen}", done=state.step + 1, total=len(spec.steps))
    elif state.phase is Phase.GROWING:
        console.say(f"    {state.canary}: getting ready for {share:.0%}", style="dim")
    elif state.phase is Phase.RETURNING:
        console.say(f"    {state.canary}: back to {state.stable}: {state.reason}", style="dim")
