"""Round every experiment: whatever was stopped goes on when it ends, also when it was interrupted or failed."""

from __future__ import annotations

from typing import Any

from chaos import faults

__all__ = ["after_experiment_control", "cleanup_control"]


def after_experiment_control(context: Any, **_: Any) -> None:
    """Called by Chaos Toolkit at the end of an experiment, its rollbacks played or not."""
    faults.revert_all()


def cleanup_control() -> None:
    """Called by Chaos Toolkit last, whatever was raised before."""
    faults.revert_all()
