"""The pipeline as the YAML that Kubeflow Pipelines takes."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from endcap.files import write_atomic
from pipelines.settings import PipelineSettings, arrange

__all__ = ["compile_recommender", "compiled_recommender", "without_caching"]


def compile_recommender(path: Path, settings: PipelineSettings | None = None) -> None:
    """Write the compiled pipeline to ``path``; the same bytes each time.

    Raises:
        StorageError: no space, or not allowed.
    """
    write_atomic(path, _compiled(settings))


def compiled_recommender(settings: PipelineSettings | None = None) -> dict[str, Any]:
    """The compiled pipeline as the API takes it: the pipeline's spec, or with a platform's, both by name."""
    spec, *platform = yaml.safe_load_all(_compiled(settings))
    return {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else dict(spec)


def without_caching(compiled: Mapping[str, Any]) -> dict[str, Any]:
    """The same, every step run anew. Steps behind a condition too, which kfp's own client leaves out.

    There is no contrary: what must not be cached (it looks at the registry) says so itself.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: {} if key == "cachingOptions" else plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return dict(plain(compiled))


def _compiled(settings: PipelineSettings | None) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kfp import compiler

        from pipelines.recommender import make_recommender, recommender

        pipeline = recommender if settings is None else make_recommender(partial(arrange, settings=settings))
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "pipeline.yaml"
            compiler.Compiler().compile(pipeline, str(made))
            return made.read_bytes()
