"""``endcap rollout``: give a model version traffic step by step, and let the evidence decide."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from endcap.cli.console import Console
from endcap.cli.options import DEFAULT_REGISTRY, JsonOption, RegistryOption, TargetOption
from endcap.cli.simulate import simulate
from endcap.errors import EndcapError, InputError, OutcomeError, StateError, StorageError

if TYPE_CHECKING:
    from endcap.cli.standing import Standing
    from serving.rollout.events import Command
    from serving.rollout.state import Outcome, State
    from serving.targets import LocalTarget

app = typer.Typer(no_args_is_help=True, help="Roll out a model version, decided by evidence.")

DEFAULT_FOLDER = Path("out/rollouts")
_WATCH_S = 0.5
_ENGINE_S = 30.0

FolderArgument = Annotated[
    Path, typer.Argument(help="The rollout's folder; with --context the Rollout's name.", show_default=False)
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        help="Context of the kubeconfig: the rollout is an object of that cluster, named instead of a folder.",
        show_default=False,
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace (with --context; default: the context's).", show_default=False),
]
ByOption = Annotated[str | None, typer.Option("--by", help="Who asks (default: user@host).", show_default=False)]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0, help="Seconds to wait until the rollout's engine has taken it up.")
]


# ---- the engine --------------------------------------------------------------------------------------


@app.command()
def start(
    file: Annotated[Path, typer.Argument(help="File with a Rollout document.")],
    objectives: Annotated[
        Path | None,
        typer.Option(help="File with the service's Objectives document (default: the target's).", show_default=False),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of this rollout (default: out/rollouts/SERVICE-VERSION); one that was cut off is gone on "
            "with, one that ended stays so.",
            show_default=False,
        ),
    ] = None,
    target: TargetOption = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    package: Annotated[
        Path | None, typer.Option(help="The candidate's package, where no registry is at hand (with --label).")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Label of the version in --package (default: the document's).", show_default=False),
    ] = None,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Start a rollout, or go on with one that was cut off. Exits 4 when it ends in anything but a promotion.

    The candidate, models:/NAME/VERSION, is fetched from the registry. It runs until the rollout ends; Ctrl-C or
    SIGTERM end it earlier (130, 143): what was decided stays, and the same command goes on. With --context the
    documents are applied to a cluster, whose operator runs the rollout; this command follows it.
    """
    if context is not None:
        _start_on_cluster(file, objectives, context, namespace, json_output)
        return
    from endcap.cli.rolling import has_ended, resolve_candidate, roll_out
    from endcap.cli.serve import checked_label
    from endcap.objectives import load_objectives
    from serving.rollout.spec import load_rollout
    from serving.targets import ModelVersion, open_target

    console = Console(json_output=json_output)
    spec, running = load_rollout(file), open_target(target)
    declared = load_objectives(objectives or _objectives_of(running))
    try:
        spec.judged(declared)  # what does not fit is said before anything is fetched
    except InputError as error:
        raise InputError(error.what, where=file, next_step=error.next_step) from error
    if package is not None:
        candidate = ModelVersion(checked_label(label or _label_of(spec.candidate)), _existing(package))
    else:
        candidate = resolve_candidate(spec.candidate, registry)
    if spec.baseline and candidate.label.endswith("-baseline"):
        raise InputError(f"{candidate.label!r} is what stable's fresh copy is called", where="--label",
                         next_step="choose another label")  # fmt: skip
    folder = folder or DEFAULT_FOLDER / f"{spec.service}-{candidate.label}"
    console.say(f"  folder {folder}", style="dim")
    if has_ended(folder):
        console.say("  this rollout has ended; to roll the version out again choose another --folder", style="yellow")
    try:
        result = roll_out(console, spec, declared, candidate, running, folder)
    except (KeyboardInterrupt, SystemExit):
        console.say(f"  stopped: version {candidate.label} keeps the share it has, and nobody watches it. The same "
                    f"command goes on with the rollout; endcap rollout abort {shlex.quote(str(folder))} returns its "
                    "traffic.", style="yellow")  # fmt: skip
        raise
    console.result({"from": result.stable, "to": result.canary, "verdict": result.outcome,
                    "reason": result.reason, "seconds": round(result.seconds, 3), "folder": str(folder)})  # fmt: skip
    if result.outcome != "promoted":
        raise OutcomeError(_not_promoted(result.canary, result.outcome, result.reason))
    console.good(f"version {result.canary} was promoted: {result.reason}")


def _label_of(candidate: str) -> str:
    """The version that ``models:/NAME/VERSION`` names; an alias, or anything else, names none."""
    match = re.fullmatch(r"models:/[^/@]+/(\d+)", candidate)
    return "candidate" if match is None else match[1]


def _existing(package: Path) -> Path:
    if not package.is_dir():  # said here, a mistyped path does not use the rollout's folder up
        raise InputError("no such package folder", where=package)
    return package.absolute()


def _not_promoted(label: str, outcome: Outcome | None, reason: str) -> str:
    from endcap.cli.standing import said

    ended = said(outcome)
    return f"version {label} was not promoted: {reason if reason.startswith(ended) else f'{ended}, {reason}'}"


def _objectives_of(target: LocalTarget) -> Path:
    path = target.folder / "objectives.yaml"
    if not path.exists():
        raise InputError("no objectives were given, and the target was started with none", where="--objectives",
                         next_step="name the file with the service's Objectives document")  # fmt: skip
    return path


# ---- where it stands ---------------------------------------------------------------------------------


@app.command()
def status(
    folder: FolderArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end; exits 4 unless promoted.")] = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Where a rollout stands, with or without an engine."""
    if context is not None:
        _status_on_cluster(str(folder), watch, context, namespace, json_output)
        return
    from endcap.cli.standing import read_standing

    console = Console(json_output=json_output)
    standing = _follow(console, folder) if watch else read_standing(folder)
    if not watch:
        console.page(standing.page(time.time()))
    console.result(standing.to_json())
    if watch and standing.state.outcome != "promoted":
        state = standing.state
        raise OutcomeError(_not_promoted(state.canary, state.outcome, state.reason))


def _follow(console: Console, folder: Path) -> Standing:
    """Drawn anew on a terminal; elsewhere a line whenever something changes."""
    from endcap.cli.standing import read_standing

    told = ""
    with console.live() as draw:
        while True:
            standing = read_standing(folder)
            if draw is not None:
                draw(standing.page(time.time()))
            elif standing.change != told:
                told = standing.change
                console.say(f"{datetime.now(UTC):%H:%M:%S} {told}")
            if standing.state.ended:
                return standing
            time.sleep(_WATCH_S)


@app.command()
def history(
    folder: FolderArgument,
    all_looks: Annotated[bool, typer.Option("--all", help="Every look, not only what changed something.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decide it all again from the log, and compare with where it stands.")
    ] = False,
    context: ContextOption = None,
    namespace: NamespaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """What was decided, when, by whom, and on what evidence."""
    if context is not None:
        if verify or all_looks:
            raise InputError("on a cluster the last decisions are kept, and no looks", where="--context",
                             next_step="the operator's log has each decision's whole record")  # fmt: skip
        _history_on_cluster(str(folder), context, namespace, json_output)
        return
    from endcap.files import read_json_lines
    from serving.rollout.store import DECISIONS_FILE

    console = Console(json_output=json_output)
    path = folder / DECISIONS_FILE
    if not path.exists():
        raise InputError("no rollout here", where=folder)
    if verify:
        _verify(console, folder)
        return
    lines = [line for line in read_json_lines(path) if all_looks or line.get("action") != "look"]
    try:
        rows = [_history_row(line) for line in lines]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"a line is damaged ({error!r})", where=path) from error
    console.table(["seq", "at (UTC)", "step", "share", "what happened", "then", "evidence, points", "reason"], rows)
    console.result(lines)


def _history_row(line: Mapping[str, Any]) -> tuple[object, ...]:
    from endcap.cli.standing import evidence_lines

    at = datetime.fromtimestamp(float(line["at_s"]), UTC).strftime("%m-%d %H:%M:%S")
    share = None if line["share"] is None else f"{line['share']:.0%}"
    reason = line["reason"] if line["waiting"] is None else f"waits: {line['waiting']}"
    evidence = evidence_lines(line["evidence"])
    return (line["seq"], at, line["step"], share, _event(line["event"]), line["action"], evidence, reason)


def _event(event: Mapping[str, Any] | None) -> str:
    match event:
        case None:
            return "begun"
        case {"kind": "commanded", "command": command, "by": by}:
            return f"{command} by {by}"
        case {"kind": "gated", "passed": passed}:
            return "checks passed" if passed else "checks failed"
        case {"kind": "act_failed"}:
            return "could not do it"
        case {"kind": "acted"}:
            return "done"
        case _:
            return "look"


def _verify(console: Console, folder: Path) -> None:
    """The log, decided again, has to lead to every state that was kept of it."""
    from endcap.files import read_json_lines
    from serving.rollout.audit import replay
    from serving.rollout.commands import open_rollout
    from serving.rollout.declared import read_declared
    from serving.rollout.store import DECISIONS_FILE

    path, kept, spec = folder / DECISIONS_FILE, open_rollout(folder), read_declared(folder).spec
    at_checkpoint = replay(spec, (line for line in read_json_lines(path) if not _is_after(line, kept.seq)), where=path)
    if at_checkpoint != kept:
        raise StateError(f"the log does not lead to the state that was kept (decision {kept.seq})", where=path,
                         next_step="one of the two files was changed: restore them from a backup")  # fmt: skip
    last = replay(spec, read_json_lines(path), where=path)
    behind = 0 if last is None else last.seq - kept.seq
    console.good(f"the log's {kept.seq + behind} decisions, decided again, lead to the state that was kept")
    if behind:
        console.say(f"  the kept state is {behind} behind the log, as after a crash; the log is what is gone on from")
    console.result({"verified": True, "decisions": kept.seq + behind, "kept": kept.seq})


def _is_after(line: Mapping[str, Any], seq: int) -> bool:
    found = line.get("seq")
    return isinstance(found, int) and found > seq


# ---- what people ask for -----------------------------------------------------------------------------


@app.command()
def pause(
    folder: FolderArgument, by: ByOption = None, timeout_s: TimeoutOption = _ENGINE_S, context: ContextOption = None,
    namespace: NamespaceOption = None, json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Keep the share that it has. Evidence still counts, and a canary shown to be worse still loses its traffic."""
    _ask("pause", folder, by, timeout_s, json_output, context=context, namespace=namespace)


@app.command()
def resume(
    folder: FolderArgument, by: ByOption = None, timeout_s: TimeoutOption = _ENGINE_S, context: ContextOption = None,
    namespace: NamespaceOption = None, json_output: JsonOption = False,
) -> None:  # fmt: skip
    """End a pause. The time of the pause does not count against the step's."""
    _ask("resume", folder, by, timeout_s, json_output, context=context, namespace=namespace)


@app.command()
def approve(
    folder: FolderArgument, by: ByOption = None, timeout_s: TimeoutOption = _ENGINE_S, context: ContextOption = None,
    namespace: NamespaceOption = None, json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Let the step begin that waits for approval; no later one."""
    _ask("approve", folder, by, timeout_s, json_output, context=context, namespace=namespace)


@app.command()
def promote(
    folder: FolderArgument, by: ByOption = None, timeout_s: TimeoutOption = _ENGINE_S, context: ContextOption = None,
    namespace: NamespaceOption = None, json_output: JsonOption = False,
) -> None:  # fmt: skip
    """Go to the last step now, whatever the evidence says so far. One shown to be worse is still rolled back."""
    _ask("promote", folder, by, timeout_s, json_output, context=context, namespace=namespace)


@app.command()
def abort(folder: FolderArgument, by: ByOption = None, timeout_s: TimeoutOption = _ENGINE_S,
          target: TargetOption = None, context: ContextOption = None, namespace: NamespaceOption = None,
          json_output: JsonOption = False) -> None:  # fmt: skip
    """Return all traffic to the old version. Where no engine runs, this one does it (--target)."""
    _ask("abort", folder, by, timeout_s, json_output, target, context=context, namespace=namespace)


def _ask(
    verb: str, folder: Path, by: str | None, timeout_s: float, json_output: bool, target: Path | None = None, *,
    context: str | None = None, namespace: str | None = None,
) -> None:  # fmt: skip
    if context is not None:
        _ask_on_cluster(verb, str(folder), by, timeout_s, json_output, context, namespace)
        return
    from endcap.cli.standing import read_standing
    from serving.rollout.commands import ask, engine_runs
    from serving.rollout.events import Command
    from serving.rollout.store import read_commands

    console, command = Console(json_output=json_output), Command(verb)
    standing = read_standing(folder)
    waiting = bool(read_commands(folder, after=standing.state.commands))
    settled = None if waiting and not standing.state.ended else _settled(command, standing)
    if settled is not None:
        console.good(settled)
        console.result(standing.to_json())
        return
    step = _step_to_approve(standing) if command is Command.APPROVE else None
    try:
        number = ask(folder, command, by=by or _who(), step=step)
    except StorageError as error:
        if command is not Command.ABORT:
            raise
        raise StorageError(f"the abort could not be written down: {error.what}", where=error.where or folder,
                           next_step=f"{error.next_step}; or end the engine, and endcap serve restore "
                           f"{standing.state.stable} returns the traffic without it") from error  # fmt: skip
    if not engine_runs(folder):
        if command is Command.ABORT:
            _abort_here(console, standing.state, folder, target)
            console.result(read_standing(folder).to_json())
            return
        console.say(f"  asked; no engine runs: it is taken up when endcap rollout start goes on with {folder}",
                    style="yellow")  # fmt: skip
        console.result(read_standing(folder).to_json())
        return
    standing = _await(folder, number, timeout_s)
    if standing.state.commands < number:
        raise _unheard(standing, verb, timeout_s)
    console.page(standing.page(time.time()))
    console.result(standing.to_json())


def _settled(command: Command, standing: Standing) -> str | None:
    """What is to be said where what is asked is the case already; None where there is something to do."""
    state = standing.state
    who, waits = f"version {state.canary}", state.waiting is not None
    match command.value:
        case "abort" if state.ended and state.outcome != "promoted":
            return f"it has ended: {who} was {_ended(state)}; all traffic is on version {state.stable}"
        case "abort" if state.outcome == "aborted" and standing.engine:  # without one nobody returns the traffic
            return f"it is aborted already: {state.reason}"
        case "abort" if state.ended:
            raise InputError(f"it has ended: {who} was promoted and serves", where=standing.folder,
                             next_step=f"to go back, roll version {state.stable} out")  # fmt: skip
        case "promote" if state.outcome == "promoted":
            return f"{who} is promoted already"
        case "promote" if state.by_hand is not None and state.outcome is None:
            return f"{who} is on its way: promoted by {state.by_hand}"
        case "pause" if state.paused_at_s is not None:
            return f"it is paused already: {state.waiting or 'paused'}"
        case "resume" if not state.ended and state.paused_at_s is None:
            return "it is not paused"
        case "approve" if state.approved > 0 and standing.approval is None and not waits:
            return f"step {state.approved} is approved already, and no other waits: {standing.headline}"
        case _:
            return None


def _ended(state: State) -> str:
    return "held" if state.outcome is None else state.outcome.value.replace("_", " ")


def _step_to_approve(standing: Standing) -> int | None:
    if standing.state.ended:
        return None  # refused for that
    if standing.approval is not None:
        return standing.approval
    paused = standing.state.paused_at_s is not None
    raise InputError(f"nothing waits for approval: {standing.headline}", where=standing.folder,
                     next_step=f"resume it first: endcap rollout resume {standing.folder}" if paused else
                     "approve when endcap rollout status says that a step waits for it")  # fmt: skip


def _await(folder: Path, number: int, timeout_s: float) -> Standing:
    """Where it stands once the engine has taken command ``number`` up, has ended, or the time is out."""
    from endcap.cli.standing import read_standing

    ends_s = time.monotonic() + timeout_s
    while True:
        standing = read_standing(folder)
        heard = standing.state.commands >= number or standing.state.ended or not standing.engine
        if heard or time.monotonic() >= ends_s:
            return standing
        time.sleep(0.1)


def _unheard(standing: Standing, verb: str, timeout_s: float) -> EndcapError:
    from serving.rollout.commands import engine_process

    if standing.state.ended:
        return OutcomeError(f"it ended before that: {standing.headline}", where=standing.folder)
    if not standing.engine:
        return OutcomeError(f"the engine ended before it took the {verb} up; it stays asked", where=standing.folder,
                            next_step="endcap rollout start goes on with it")  # fmt: skip
    return OutcomeError(f"not taken up after {timeout_s:g} s; it stays asked: {standing.headline}",
                        where=standing.folder,
                        next_step=f"process {engine_process(standing.folder)}, the engine, may be busy: endcap rollout "
                        f"status {standing.folder}; one that hangs is ended (kill -9), then repeat this")  # fmt: skip


def _abort_here(console: Console, state: State, folder: Path, target: Path | None) -> None:
    from endcap.cli.rolling import bring_back
    from serving.targets import open_target

    console.say("  no engine runs: this one returns the traffic", style="dim")
    try:
        result = bring_back(console, state, open_target(target), folder)
    except EndcapError as error:
        by_hand = f"endcap serve restore {state.stable} returns the traffic without the rollout"
        raise type(error)(f"the abort is kept, and nothing was returned yet: {error.what}", where=error.where,
                          next_step=error.next_step or by_hand) from error  # fmt: skip
    if result.outcome == "promoted":
        raise OutcomeError(f"version {result.canary} was promoted before that", where=folder)
    console.good(f"version {result.canary} was {result.outcome.value.replace('_', ' ')}: all traffic is on version "
                 f"{result.stable}")  # fmt: skip


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"[:200]


# ---- on a cluster ------------------------------------------------------------------------------------


def _start_on_cluster(file: Path, objectives: Path | None, context: str, namespace: str | None, as_json: bool) -> None:
    from endcap.cli.cluster import answer, open_namespace

    console, there = Console(json_output=as_json), open_namespace(context, namespace)
    name = there.apply(file, objectives)
    console.say(f"  rollout {there.namespace}/{name}: its operator drives it; Ctrl-C only stops following", style="dim")
    found = there.follow(console, name)
    console.result(answer(found))
    _promoted_or_not(console, found)


def _status_on_cluster(name: str, watch: bool, context: str, namespace: str | None, as_json: bool) -> None:
    from endcap.cli.cluster import answer, open_namespace, page_of

    console, there = Console(json_output=as_json), open_namespace(context, namespace)
    found = there.follow(console, name) if watch else there.get(name)
    if not watch:
        console.page(page_of(found, time.time()))
    console.result(answer(found))
    if watch:
        _promoted_or_not(console, found)


def _history_on_cluster(name: str, context: str, namespace: str | None, as_json: bool) -> None:
    from endcap.cli.cluster import answer, history_rows, open_namespace

    console = Console(json_output=as_json)
    found = open_namespace(context, namespace).get(name)
    console.table(["seq", "at (UTC)", "step", "share", "what happened", "verdict", "by", "reason"], history_rows(found))
    console.result(list(answer(found).get("history", [])))


def _ask_on_cluster(
    verb: str, name: str, by: str | None, timeout_s: float, as_json: bool, context: str, namespace: str | None
) -> None:
    from endcap.cli.cluster import answer, open_namespace, page_of
    from serving.rollout.events import Command

    console = Console(json_output=as_json)
    found = open_namespace(context, namespace).ask(name, Command(verb), by or _who(), timeout_s)
    console.page(page_of(found, time.time()))
    console.result(answer(found))


def _promoted_or_not(console: Console, found: Mapping[str, Any]) -> None:
    status = found["status"]
    if status.get("outcome") != "promoted":
        raise OutcomeError(str(status.get("message")) + (f": {status['reason']}" if status.get("reason") else ""))
    console.good(f"version {status['canary']} was promoted: {status.get('reason')}")


app.command()(simulate)


# ---- the files that people write ---------------------------------------------------------------------


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
