"""Round every experiment: whatever was stopped goes on when it ends, also when it was interrupted or failed."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import FrameType
from typing import Any

from chaoslib.exceptions import InterruptExecution  # type: ignore[import-untyped]

from chaos import faults

__all__ = ["after_activity_control", "after_experiment_control", "before_experiment_control", "cleanup_control"]

_LEAVE_WITH_ROLLBACKS = 20
"""What Chaos Toolkit's own SIGUSR1 exits with."""


def before_experiment_control(context: Any, **_: Any) -> None:
    """Called by Chaos Toolkit at the start of an experiment, from the main thread.

    Its own answer to SIGTERM is an ``Exception``, which an activity that is running swallows as its own failure, and
    the drill goes on. This one ends it, rollbacks played.
    """
    signal.signal(signal.SIGTERM, _leave)


def _leave(_: int, __: FrameType | None) -> None:
    raise SystemExit(_LEAVE_WITH_ROLLBACKS)


def after_activity_control(context: Mapping[str, Any], state: Mapping[str, Any] | None = None, **_: Any) -> None:
    """A drill whose action failed is over: what follows would measure something else."""
    if context.get("type") == "action" and state is not None and state.get("status") == "failed":
        raise InterruptExecution(f"{context.get('name')} failed")


def after_experiment_control(context: Any, **_: Any) -> None:
    """Called by Chaos Toolkit at the end of an experiment, its rollbacks played or not."""
    faults.revert_all()


def cleanup_control() -> None:
    """Called by Chaos Toolkit last, whatever was raised before."""
    faults.revert_all()
