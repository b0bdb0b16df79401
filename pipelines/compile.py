"""The pipeline as the YAML that Kubeflow Pipelines takes; and sending it there."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endcap.errors import TargetError
from endcap.files import write_atomic

__all__ = ["compile_recommender", "schedule", "submit"]


def compile_recommender(path: Path) -> None:
    """Write the compiled pipeline to ``path``; the same bytes each time.

    Raises:
        StorageError: no space, or not allowed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kfp import compiler

        from pipelines.recommender import recommender

        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "pipeline.yaml"
            compiler.Compiler().compile(recommender, str(made))
            write_atomic(path, made.read_bytes())


def submit(host: str, arguments: Mapping[str, Any], *, experiment: str = "endcap", token: str | None = None) -> str:
    """Run the pipeline once on the Kubeflow Pipelines endpoint ``host``; returns the run's id.

    Raises:
        TargetError: the endpoint does not answer, or refuses.
    """
    with _sending(host, token) as (client, compiled):
        run = client.create_run_from_pipeline_package(
            compiled, arguments=dict(arguments), experiment_name=experiment
        )  # fmt: skip
        return str(run.run_id)


def schedule(host: str, arguments: Mapping[str, Any], *, cron: str, name: str, experiment: str = "endcap",
             token: str | None = None) -> str:  # fmt: skip
    """Run the pipeline by the six-field ``cron`` on ``host``; returns the recurring run's id.

    Raises:
        TargetError: the endpoint does not answer, or refuses.
    """
    with _sending(host, token) as (client, compiled):
        made = client.create_recurring_run(
            experiment_id=client.create_experiment(experiment).experiment_id, job_name=name,
            cron_expression=cron, max_concurrency=1, no_catchup=True,
            pipeline_package_path=compiled, params=dict(arguments),
        )  # fmt: skip
        return str(made.recurring_run_id)


@contextmanager
def _sending(host: str, token: str | None) -> Iterator[tuple[Any, str]]:
    """A client of ``host`` and the compiled pipeline's path; what the client raises becomes our error."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = Path(scratch) / "pipeline.yaml"
        compile_recommender(compiled)
        import kfp

        try:
            yield kfp.Client(host=host, existing_token=token), str(compiled)
        except Exception as error:  # its exceptions share no base but this
            raise _refused(host, error) from error


def _refused(host: str, error: Exception) -> TargetError:
    text = str(error).strip().splitlines()
    return TargetError(f"Kubeflow Pipelines did not take the run ({text[0][:200] if text else type(error).__name__})",
                       where=host, next_step="check the host, and the token")  # fmt: skip
