"""Arguments that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["DEFAULT_REGISTRY", "JsonOption", "RegistryOption", "TargetOption"]

DEFAULT_REGISTRY = "out/mlflow"
"""Where `endcap pipeline run` registers and all other commands look. A demo keeps its own in its folder."""

JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON document on standard output.")]
TargetOption = Annotated[
    Path | None,
    typer.Option("--target", envvar="ENDCAP_TARGET", help="Folder of the running target.", show_default=False),
]
RegistryOption = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="MLFLOW_TRACKING_URI",
        help="MLflow tracking URI, or a folder that holds (or will hold) an embedded one.",
    ),
]
