"""``endcap serve``: a local target; two zones of model servers behind a real Envoy."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import JsonOption, TargetOption
from endcap.errors import BusyError, CapacityError, InputError, PackageError, TargetError
from endcap.files import FolderLock, write_atomic

if TYPE_CHECKING:
    from serving.targets.config import Kept

app = typer.Typer(no_args_is_help=True, help="Serve a model version on this machine.")


@app.command()
def up(
    package: Annotated[Path, typer.Argument(help="The signed package to serve.")],
    public_key: Annotated[Path, typer.Option(help="Key that the package must be signed with.")],
    folder: Annotated[Path, typer.Option(help="Folder for the target's own files.")] = Path("out/target"),
    label: Annotated[str, typer.Option(help="Label of this model version.")] = "1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the gateway; 0 takes any free one.")] = 0,
    objectives: Annotated[Path | None, typer.Option(help="Objectives file (latency thresholds, click window).")] = None,
    variant: Annotated[str, typer.Option(help="Which graph of each package: float32 or int8.")] = "float32",
) -> None:
    """Serve a package until Ctrl-C or SIGTERM. A folder that served before goes on with what it served."""
    from endcap.objectives import load_objectives
    from serving.targets import StableVersion, SupervisorConfig, start_local_target
    from serving.targets.config import read_state

    console = Console()
    declared = load_objectives(objectives) if objectives else None
    folder, package = folder.absolute(), package.absolute()
    _check(package, label, read_state(folder), folder)
    config = SupervisorConfig(
        folder=folder,
        records=folder / "records",
        public_key=public_key.absolute(),
        stable=StableVersion(label=label, package=package),
        thresholds_ms=declared.latency_thresholds_ms if declared else (100,),
        window_s=(declared.click_window_s if declared else None) or 10.0,
        gateway_port=port,
        server_arguments=("--variant", variant),
    )
    with console.task("starting replicas and gateway"):
        target = start_local_target(config)
    if objectives is not None:  # drills judge the steady state by them
        write_atomic(folder / "objectives.yaml", objectives.read_bytes())
    with target:
        served = " and ".join(f"version {served}" for served, share in target.observe().shares.items() if share > 0)
        console.good(f"{served} is served at {target.url}/v1/recommend")
        console.say(f"  export ENDCAP_TARGET={shlex.quote(str(folder))}")
        with contextlib.suppress(KeyboardInterrupt):
            if target.wait() != 0:
                raise TargetError("the target ended by itself", where=folder / "logs" / "supervisor.log",
                                  next_step="see the end of that log, then start it again")  # fmt: skip
            console.good("ended by `endcap serve down`, or by a signal to the target")


def _check(package: Path, label: str, kept: Kept | None, folder: Path) -> None:
    """A target resumes with what it served before, which must not be taken for the package that is asked for."""
    checked_label(label)
    if not package.is_dir():
        raise PackageError("no such package folder", where=package)
    if kept is None or not kept.versions:
        return
    shares = dict(kept.shares)
    before = [version for version in kept.versions if shares.get(version.label, 0) > 0]
    if package not in {version.package for version in before}:
        served = ", ".join(f"version {version.label} from {version.package}" for version in before) or "nothing"
        raise InputError(
            f"it served {served}, and would again, not {package}", where=folder,
            next_step="choose another --folder, or start it with what it served and roll the other out: "
            "endcap rollout start",
        )  # fmt: skip


def checked_label(label: str) -> str:
    """``label``, which names a model version at a target. Raises InputError where it cannot."""
    from serving.targets.config import LABEL

    if re.fullmatch(LABEL, label) is None:
        raise InputError(f"{label!r} is no label", where="--label", next_step="use letters, digits, dashes, dots")
    return label


@app.command()
def status(target: TargetOption = None, json_output: JsonOption = False) -> None:
    """Versions, shares and replicas of a running target."""
    from serving.targets import open_target

    console = Console(json_output=json_output)
    running = open_target(target)
    state = running.state()
    shares = dict(state.shares)
    console.say(f"{running.url}  supervisor {running.found.pid}")
    console.table(
        ["version", "share", "zone", "replica", "pid", "ready"],
        [
            (r.version, f"{shares.get(r.version, 0):.2%}", r.zone, r.index, r.pid, "yes" if r.ready else "no")
            for r in state.replicas
        ],
    )
    console.result(state.model_dump(mode="json"))


@app.command()
def restore(
    version: Annotated[str, typer.Argument(help="Label of a version that runs here; see endcap serve status.")],
    target: TargetOption = None,
) -> None:
    """Give all traffic to one version by hand: the way back where a rollout's folder is lost or damaged.

    Where the rollout's folder is whole, endcap rollout abort does it, and keeps who did it.
    """
    from serving.targets import ModelVersion, open_target

    running = open_target(target)
    versions = running.state().versions
    if version not in versions:
        raise InputError(f"version {version} does not run here", where=running.folder,
                         next_step=f"known: {', '.join(sorted(versions))}")  # fmt: skip
    shares = {ModelVersion(version, versions[version]): 1.0}
    with contextlib.ExitStack() as held:
        for lock in sorted(running.folder.glob(".rollout-*.lock")):
            try:
                held.enter_context(FolderLock(running.folder, name=lock.name))
            except BusyError as error:
                raise BusyError(f"a rollout runs here ({error.what})", where=running.folder,
                                next_step="end it: endcap rollout abort FOLDER") from error  # fmt: skip
        token = running.acquire("restored by hand")
        running.set_shadow(None, token=token)
        try:
            running.ensure_capacity(shares, token=token)
        except CapacityError:  # what it has is better than a canary that has to go, and is then all that is left
            running.set_shares(shares, token=token)
            raise
        running.set_shares(shares, token=token)
        for other in sorted(versions.keys() - {version}):
            running.retire(other, token=token)
    Console().good(f"all traffic is on version {version}")


@app.command()
def down(target: TargetOption = None) -> None:
    """End a running target, its gateway and all its replicas."""
    from serving.targets import open_target

    running = open_target(target)
    os.kill(running.found.pid, signal.SIGTERM)
    if not _wait_for_end(running.found.pid, timeout_s=30):
        raise TargetError("the target has not ended after 30 s", where=running.folder)
    Console().good("ended")


def _wait_for_end(pid: int, *, timeout_s: float | None = None) -> bool:
    """Whether the process has ended; waits for it."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)
