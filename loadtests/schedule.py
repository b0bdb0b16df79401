"""When requests are meant to be sent, whatever the service does (an open loop).

Closed loops, where a user waits for an answer before asking again, slow down with the service and so hide its
stalls (Schroeder, Wierman, Harchol-Balter, "Open Versus Closed: A Cautionary Tale", NSDI 2006). Shoppers do not
wait for each other: arrivals are a Poisson process, fixed by a seed and a rate before the first request is sent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from endcap.errors import InputError

__all__ = ["Stage", "arrivals", "validate_stages"]

_MAX_RATE_RPS = 100_000


@dataclass(frozen=True, slots=True)
class Stage:
    """A rate (requests/s) held for a time. ``duration_s`` None, for the last stage only: until stopped."""

    rate_rps: float
    duration_s: float | None = None


def validate_stages(stages: Sequence[Stage]) -> None:
    """Raises InputError for stages that are no schedule."""
    if not stages:
        raise InputError("a load needs at least one stage")
    for number, stage in enumerate(stages, 1):
        if not 0 <= stage.rate_rps <= _MAX_RATE_RPS:
            raise InputError(f"the rate of stage {number} is {stage.rate_rps:g} requests/s",
                             next_step=f"give a rate between 0 and {_MAX_RATE_RPS}")  # fmt: skip
        if stage.duration_s is None and number < len(stages):
            raise InputError(f"stage {number} has no end, and others follow it")
        if stage.duration_s is not None and not stage.duration_s > 0:
            raise InputError(f"the duration of stage {number} is {stage.duration_s:g} s")


def arrivals(stages: Sequence[Stage], seed: int) -> Iterator[float]:
    """Intended send times in seconds from the start, ascending; endless if the last stage is.

    Gaps are exponential at each stage's rate; at the border between stages the clock starts anew, which a
    memoryless process allows. The same stages and seed give the same times.
    """
    validate_stages(stages)
    random_source = random.Random(f"arrivals-{seed}")  # noqa: S311 - a schedule, not a secret
    start_s = 0.0
    for stage in stages:
        end_s = float("inf") if stage.duration_s is None else start_s + stage.duration_s
        at_s = start_s
        while stage.rate_rps > 0:
            at_s += random_source.expovariate(stage.rate_rps)
            if at_s >= end_s:
                break
            yield at_s
        start_s = end_s
