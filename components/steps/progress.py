"""What a step tells of itself while it runs: started, what it made, finished or failed with its own error.

Events are JSON lines in the file named by ``ENDCAP_PROGRESS`` (nothing is told where it is not set, as on a cluster):
``{"at_s", "step", "event": "started" | "epoch" | "produced" | "finished" | "failed", ...}``. A failed step's event
carries its :class:`~endcap.errors.EndcapError`, which Kubeflow's local runner would otherwise swallow.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endcap.errors import EndcapError, from_os_error
from endcap.files import JsonLines
from endcap.processes import bind_to_lifeline

__all__ = ["PROGRESS_VARIABLE", "Progress", "step"]

PROGRESS_VARIABLE = "ENDCAP_PROGRESS"
_log = logging.getLogger("endcap.pipeline")


class Progress:
    """The running step's voice."""

    def __init__(self, name: str) -> None:
        self.name = name
        path = os.environ.get(PROGRESS_VARIABLE)
        self._path = Path(path) if path else None

    def tell(self, event: str, **fields: Any) -> None:
        """Append one event."""
        if self._path is not None:
            with JsonLines(self._path) as lines:
                lines.append({"at_s": time.time(), "step": self.name, "event": event, **fields})

    def produced(self, file: str, path: str | Path) -> None:
        """Say that ``path`` is to be kept in the run folder as ``file``."""
        self.tell("produced", file=file, path=str(path))


@contextmanager
def step(name: str) -> Iterator[Progress]:
    """Run a step's body: bound to the process that runs the pipeline, its outcome told.

    Raises:
        EndcapError: what the body raised; an ``OSError`` becomes a StorageError, anything else is wrapped.
    """
    bind_to_lifeline()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    progress = Progress(name)
    started_s = time.monotonic()
    progress.tell("started")
    try:
        yield progress
    except EndcapError as error:
        progress.tell("failed", error=error.to_json())
        raise
    except OSError as error:
        known = from_os_error(error, doing=f"running the step {name}")
        progress.tell("failed", error=known.to_json())
        raise known from error
    except Exception as error:
        _log.exception("the step %s failed", name)
        wrapped = EndcapError(f"{type(error).__name__}: {error}", where=f"step {name}",
                              next_step="the pipeline's log has the details")  # fmt: skip
        progress.tell("failed", error=wrapped.to_json())
        raise wrapped from error
    progress.tell("finished", seconds=round(time.monotonic() - started_s, 3))
