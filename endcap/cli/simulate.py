"""``endcap rollout simulate``: what steps and margins are worth, before any traffic."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import JsonOption
from endcap.errors import InputError

if TYPE_CHECKING:
    from endcap.objectives import Objectives
    from serving.rollout.power import Effect, Power
    from serving.rollout.spec import RolloutSpec

__all__ = ["simulate"]

_EXAMPLE_WINDOW_S = 60.0
_PLOTS = (".png", ".svg", ".html")


def simulate(
    rollout: Annotated[
        Path | None,
        typer.Option(help="File with a Rollout document (default: what a spec of three lines means).",
                     show_default=False),
    ] = None,
    objectives: Annotated[
        Path | None,
        typer.Option(help="File with an Objectives document (default: availability .999, latency .98 and "
                          "click-through .05).", show_default=False),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", show_default=False,
                     help="Stable's true share of good events in an objective; may be repeated. Default: bad events "
                          "half as many as the goal allows, clicks half as many again as the goal asks for."),
    ] = None,
    worse: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE", show_default=False,
                     help="A candidate to try: its true share of good events in one objective, all else as stable; "
                          "may be repeated. Default: each objective worse by .5, 1, 1.5, 2, 3 and 5 margins."),
    ] = None,
    requests_per_second: Annotated[float, typer.Option(help="Requests a second, of all versions together.")] = 200.0,
    new_shoppers_per_second: Annotated[
        float | None,
        typer.Option(help="Of these, by shoppers not seen since the start: click evidence counts a shopper once "
                          "(default: 30 % of the requests).", show_default=False),
    ] = None,
    shoppers: Annotated[
        int | None,
        typer.Option(help="A finite number of shoppers, some of whom come far more often, in place of the line above.",
                     min=100, max=200_000, show_default=False),
    ] = None,
    runs: Annotated[int, typer.Option(help="Simulated rollouts of each candidate.", min=20, max=100_000)] = 400,
    seconds: Annotated[
        float, typer.Option(help="How long a rollout is followed; later it counts as undecided.", min=10, max=14_400)
    ] = 3600.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same rollouts.", min=0)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write the plot here: FILE.png, FILE.svg or FILE.html.", show_default=False)
    ] = None,
    json_output: JsonOption = False,
) -> None:  # fmt: skip
    """What steps and margins are worth: chance of a verdict, time to it and shoppers hurt, by how bad a candidate is.

    Simulates whole rollouts, looked at by the same tests and rules as real ones: first a candidate as good as stable
    (how often is it rolled back all the same, how long does a promotion take), then worse ones (how surely and how
    soon are they rolled back). Nothing is served, and nothing is written but the plot.
    """
    from serving.rollout.power import Effect, power_of, usual_effects, usual_shares
    from serving.rollout.traffic import Clicks, Population, Traffic

    console = Console(json_output=json_output)
    if out is not None and out.suffix.lower() not in _PLOTS:
        raise InputError(f"a plot ends in {', '.join(_PLOTS)}", where=out)
    spec, judged = _declared(rollout, objectives)
    good = {**usual_shares(judged), **dict(_pair(text, judged, "--base") for text in base or ())}
    window_s = judged.click_window_s or _EXAMPLE_WINDOW_S
    traffic = Traffic(
        good,
        requests_per_s=requests_per_second,
        new_shoppers_per_s=0.3 * requests_per_second if new_shoppers_per_second is None else new_shoppers_per_second,
        population=None if shoppers is None else Population(shoppers=shoppers),
        clicks=Clicks(window_s=window_s, closing_every_s=window_s / 100),
    )
    traffic.check(judged)
    effects = (
        [Effect(), *(Effect(*_pair(text, judged, "--worse")) for text in worse)] if worse
        else usual_effects(judged, good)
    )  # fmt: skip
    found: list[Power] = []
    with console.task(f"simulating {runs} rollouts of {len(effects)} candidates") as task:
        for number, effect in enumerate(effects):
            task.update(_name(effect, good), done=number, total=len(effects))
            found.append(power_of(judged, spec, traffic, effect, runs=runs, seed=seed + number, horizon_s=seconds))
    _tell(console, found, good, spec)
    if out is not None:
        _draw(out, found, judged, good, spec)
        console.say(f"plot: {out}")
    console.result({
        "rollout": spec.name, "steps": [asdict(step) for step in spec.steps], "alpha": spec.alpha, "beta": spec.beta,
        "requests_per_s": traffic.requests_per_s, "new_shoppers_per_s": traffic.new_shoppers_per_s,
        "shoppers": shoppers, "stable": good, "seconds": seconds, "runs": runs, "seed": seed,
        "candidates": [asdict(one) for one in found],
    })  # fmt: skip


def _declared(rollout: Path | None, objectives: Path | None) -> tuple[RolloutSpec, Objectives]:
    from endcap.documents import Metadata
    from endcap.objectives import ObjectivesDocument, load_objectives
    from serving.rollout.spec import RolloutDocument, RolloutSpecModel, load_rollout

    if objectives is None:
        window = _EXAMPLE_WINDOW_S
        declared = ObjectivesDocument.model_validate({
            "apiVersion": "endcap.dev/v1alpha1", "kind": "Objectives", "metadata": {"name": "shop"},
            "spec": {"service": "shop", "objectives": [
                {"name": "availability", "goal": 0.999, "good": "answered"},
                {"name": "latency", "goal": 0.98, "good": "answered", "withinMs": 100},
                {"name": "click-through", "goal": 0.05, "good": "clicked", "windowSeconds": window},
            ]},
        }).to_domain()  # fmt: skip
    else:
        declared = load_objectives(objectives)
    if rollout is not None:
        spec = load_rollout(rollout)
        if objectives is None:
            declared = replace(declared, name=spec.objectives, service=spec.service)
        return spec, spec.judged(declared)
    document = RolloutDocument(
        api_version="endcap.dev/v1alpha1", metadata=Metadata(name=declared.name),
        spec=RolloutSpecModel(service=declared.service, candidate="models:/candidate/1", objectives=declared.name),
    )  # fmt: skip
    spec = document.to_domain()
    return spec, spec.judged(declared)


def _pair(text: str, objectives: Objectives, where: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    known = [objective.name for objective in objectives.objectives]
    if name not in known:
        raise InputError(f"no objective is called {name!r}", where=where, next_step=f"known: {', '.join(known)}")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"{text!r} names no share of good events", where=where, next_step=f"such as {name}=0.99")
    return name, share


def _name(effect: Effect, good: Mapping[str, float]) -> str:
    if effect.objective is None or effect.canary is None:
        return "as good as stable"
    return f"{effect.objective} {good[effect.objective]:.4g} -> {effect.canary:.4g}"


def _tell(console: Console, found: Sequence[Power], good: Mapping[str, float], spec: RolloutSpec) -> None:
    shares = ", ".join(f"{name} {share:.4g}" for name, share in good.items())
    steps = ", ".join(f"{step.share:.0%}" for step in spec.steps)
    console.say(f"stable's good events: {shares}; steps {steps}; alpha {spec.alpha:g}, beta {spec.beta:g}")
    console.table(
        ["candidate", "rolled back", "promoted", "held", "undecided", "median s", "p90 s", "canary requests",
         "shoppers hurt*, p90"],
        [
            (
                _name(one.effect, good), f"{one.rolled_back_share:.1%}", f"{one.promoted_share:.1%}",
                f"{one.held_share:.1%}", f"{one.undecided_share:.1%}", f"{one.median_s:.0f}", f"{one.p90_s:.0f}",
                f"{one.canary_requests:,.0f}", f"{one.shoppers_hurt:,.0f}, {one.shoppers_hurt_p90:,.0f}",
            )
            for one in found
        ],
    )  # fmt: skip
    console.say("* requests that failed or came too late at canary, beyond what stable would have done to them")
    for one in found:
        if one.effect.objective is None:
            console.say(f"false rollbacks: {one.rolled_back_share:.2%} of {one.runs}, "
                        f"with 95 % confidence at most {one.rolled_back_at_most:.2%}")  # fmt: skip


def _draw(
    out: Path, found: Sequence[Power], objectives: Objectives, good: Mapping[str, float], spec: RolloutSpec
) -> None:  # fmt: skip
    """Above, how rollouts end by how bad the candidate is; below, how long that takes. One column an objective."""
    import matplotlib

    from endcap.files import write_atomic
    from endcap.objectives import Good
    from serving.rollout.power import margin_of

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    same = [one for one in found if one.effect.objective is None]
    columns = [o for o in objectives.objectives if any(one.effect.objective == o.name for one in found)]
    columns = columns or list(objectives.objectives[:1])
    figure = Figure(figsize=(4 * len(columns), 6), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
    for column, objective in enumerate(columns):
        ends, times = grid[0][column], grid[1][column]
        control = good[objective.name]
        points = sorted(
            [(one.effect.canary or 0.0, one) for one in found if one.effect.objective == objective.name]
            + [(control, one) for one in same],
            key=lambda point: -point[0],
        )
        clicks = objective.good is Good.CLICKED
        margin = margin_of(objective, control)

        def place(share: float, clicks: bool = clicks) -> float:
            return 100 * (share if clicks else 1 - share)

        bad = [place(share) for share, _ in points]
        ends.plot(bad, [100 * one.rolled_back_share for _, one in points], "o-", color="#c44e52", label="rolled back")
        ends.plot(bad, [100 * one.promoted_share for _, one in points], "o-", color="#4c9a6a", label="promoted")
        ends.set_ylim(-3, 103)
        times.plot(bad, [one.median_s / 60 for _, one in points], "o-", color="#4c78a8", label="median")
        times.plot(bad, [one.p90_s / 60 for _, one in points], "o:", color="#4c78a8", label="p90")
        for axes in (ends, times):
            axes.axvline(place(control - margin), color="#888888", linestyle="--", linewidth=1, label="margin")
            axes.axvline(place(objective.goal), color="#888888", linestyle=":", linewidth=1, label="goal")
            axes.grid(alpha=0.3)
        ends.set_title(objective.name)
        times.set_xlabel("candidate's shoppers who click, %" if clicks else "candidate's bad events, %")
        if clicks:
            ends.invert_xaxis()  # worse to the right, as in the others
    grid[1][0].set_ylim(bottom=0)
    grid[0][0].set_ylabel("rollouts, %")
    grid[1][0].set_ylabel("minutes to the end")
    grid[0][-1].legend(fontsize="small")
    grid[1][-1].legend(fontsize="small")
    figure.suptitle(f"{spec.name}: {found[0].runs} simulated rollouts each", fontsize="medium")
    image = io.BytesIO()
    kind = out.suffix.lower()
    figure.savefig(image, format="png" if kind == ".png" else "svg", dpi=120, metadata={} if kind == ".png" else
                   {"Date": None})  # fmt: skip
    if kind == ".html":
        drawn = image.getvalue().decode()
        page = f'<!doctype html><meta charset="utf-8"><title>{spec.name}</title>\n{drawn[drawn.index("<svg") :]}'
        write_atomic(out, page)
    else:
        write_atomic(out, image.getvalue())
