"""What drills do, as Chaos Toolkit actions. The target is the one that ENDCAP_TARGET names."""

from __future__ import annotations

import time
from collections.abc import Mapping

from chaos import faults
from endcap.errors import TargetError
from serving.targets import LocalTarget, open_target

__all__ = ["keep", "kill_replica", "let_zone_go_on", "stop_zone", "wait_until_ready"]

_POLL_S = 0.1


def kill_replica(drill: str, seed: int = 7, zone: str | None = None) -> str:
    """SIGKILL one ready replica of the version with the largest share; returns its name."""
    target = open_target()
    try:
        chosen = faults.choose_replica(target.replicas(), seed=seed, version=_largest(target), zone=zone or None)
        faults.kill(chosen, drill=drill, records=target.records)
        return faults.subject_of(chosen)
    finally:
        target.close()


def stop_zone(drill: str, seed: int = 7, zone: str | None = None) -> list[str]:
    """SIGSTOP every replica of one zone, so that connections hang; returns their names."""
    target = open_target()
    try:
        chosen = faults.choose_zone(target.replicas(), seed=seed, zone=zone or None)
        faults.stop(chosen, drill=drill, records=target.records)
        return [faults.subject_of(one) for one in chosen]
    finally:
        target.close()


def let_zone_go_on() -> int:
    """SIGCONT what this experiment stopped; returns how many faults were in force. Safe to repeat."""
    return faults.revert_all()


def keep(seconds: float) -> float:
    """Leave things as they are for ``seconds``: a drill is about what happens meanwhile."""
    time.sleep(seconds)
    return seconds


def wait_until_ready(within_s: float) -> float:
    """Return how many seconds it took until the gateway sends requests to every replica again.

    Raises:
        TargetError: it took longer than ``within_s``; the message names those that are missing.
    """
    started_s = time.monotonic()
    target = open_target()
    try:
        while True:
            missing = [faults.subject_of(one) for one in target.replicas() if not one.ready]
            waited_s = time.monotonic() - started_s
            if not missing:
                return waited_s
            if waited_s > within_s:
                raise TargetError(f"not ready after {within_s:g} s: {', '.join(missing)}", where=target.folder)
            time.sleep(_POLL_S)
    finally:
        target.close()


def _largest(target: LocalTarget) -> str | None:
    shares: Mapping[str, float] = target.observe().shares
    return max(shares, key=lambda label: shares[label], default=None)
