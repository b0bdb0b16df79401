"""The process in which Kubeflow's local runner works through the pipeline: ``python -m pipelines.local CONFIG``.

It dies with the process that started it, and the steps' processes (which stand behind a shell) with it.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from endcap.files import read_json
from endcap.processes import LIFELINE_VARIABLE, bind_to_parent

__all__ = ["main"]

_log = logging.getLogger("endcap.pipeline")


def main(argv: list[str]) -> int:
    """Run the pipeline once with the arguments in the JSON file ``argv[0]``: ``{"root", "arguments"}``."""
    bind_to_parent()
    os.environ[LIFELINE_VARIABLE] = str(os.getpid())
    config = read_json(Path(argv[0]))
    warnings.simplefilter("ignore")
    from kfp import local

    from pipelines.recommender import recommender

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=config["root"], raise_on_error=True)
    try:
        recommender(**config["arguments"])
    except RuntimeError as error:
        # The step has said what is wrong in its own event; this is Kubeflow's "inner task failed".
        _log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
