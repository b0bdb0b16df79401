"""``endcap demo``: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import JsonOption

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo makes; an earlier demo's is emptied.")
    ] = Path("out/demo"),
    data: Annotated[
        Path | None, typer.Option(help="Data file, one line a shopper: `shopper item item ...`, oldest first.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Published data by name: beauty, or synthetic.")] = "beauty",
    seed: Annotated[int, typer.Option(help="Seed of training, load and drills.")] = 7,
    rate: Annotated[float, typer.Option(min=1, max=2000, help="Shoppers' requests a second.")] = 150.0,
    train_seconds: Annotated[float, typer.Option(min=1, help="Time budget of the transformer's training.")] = 100.0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most epochs of the transformer; default: its own.")] = None,
    package: Annotated[
        list[Path] | None,
        typer.Option(help="A further signed package to roll out after the demo's own; may be repeated."),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Folder of the signing key (default: keys, beside OUT); made on first use.")
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Train, register, serve, roll out, load, drill, report: all of it, for real, on this machine.

    Exits 4 and says which when an outcome that had to happen did not.
    """
    from endcap.cli.demo.run import DemoConfig, run_demo

    console = Console(json_output=json_output)
    config = DemoConfig(
        out=out.absolute(),
        data=data.absolute() if data else None,
        dataset=dataset,
        seed=seed,
        rate_rps=rate,
        train_s=train_seconds,
        epochs=epochs,
        packages=tuple(path.absolute() for path in package or ()),
        keys=(keys or out.absolute().parent / "keys").absolute(),
    )
    console.result(run_demo(config, console))
