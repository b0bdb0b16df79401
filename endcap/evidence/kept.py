"""Evidence as JSON, and read back to the bit: so that who goes on with a rollout need not fold all its looks again.

Arrays are base64 of little-endian doubles: exact, and half the size of decimal numbers. The size depends on the number
of objectives alone. What is read back is checked against the evidence that the same objectives begin with, so a damaged
or foreign document is an error and never evidence.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endcap.evidence.intervals import Intervals
from endcap.evidence.kernel import BetsState, State
from endcap.evidence.splits import SplitTest
from endcap.evidence.verdicts import Evidence

__all__ = ["evidence_from_json", "evidence_to_json", "split_from_json", "split_to_json"]

Floats = NDArray[np.float64]

_SUMS = ("control_bad", "control_total", "recent_bad", "recent_total", "recent_canary", "usual_share", "peak")


def evidence_to_json(evidence: Evidence) -> dict[str, Any]:
    """All that ``evidence`` has come to, about 4 KB for three objectives; with intervals about 35 KB."""
    state, intervals = evidence.state, evidence.intervals
    return {
        "objectives": list(evidence.kernel.names), "alpha": evidence.alpha, "beta": evidence.beta,
        "looks": evidence.looks, "seen": _text(evidence.seen), "bets": _bets_to_json(state.bets),
        "kernel_looks": state.looks, **{name: _text(getattr(state, name)) for name in _SUMS},
        "intervals": None if intervals is None else {
            "bets": _bets_to_json(intervals.bets), "seen": _text(intervals.seen), "recent": _text(intervals.recent),
            "ruled_out": _text(intervals.ruled_out.astype(np.float64)),
        },
    }  # fmt: skip


def evidence_from_json(document: Mapping[str, Any], start: Evidence) -> Evidence:
    """The inverse of :func:`evidence_to_json`. ``start``: the evidence of the same objectives before any look.

    Intervals that ``start`` keeps and the document does not begin anew: they stay valid, and are wider.

    Raises:
        KeyError, TypeError, ValueError: it is no evidence of these objectives at these levels.
    """
    told = (tuple(document["objectives"]), float(document["alpha"]), float(document["beta"]))
    if told != (start.kernel.names, start.alpha, start.beta):
        raise ValueError("evidence of other objectives or at other levels")
    state, kept = start.state, document["intervals"]
    sums = {name: _floats(document[name], getattr(state, name)) for name in _SUMS}
    bets = _bets_from_json(document["bets"], state.bets)
    intervals = start.intervals
    if intervals is not None and kept is not None:
        intervals = _intervals(kept, intervals)
    return replace(
        start, state=State(bets, **sums, looks=_count(document["kernel_looks"])),
        seen=_floats(document["seen"], start.seen), looks=_count(document["looks"]), intervals=intervals,
    )  # fmt: skip


def _intervals(kept: Mapping[str, Any], start: Intervals) -> Intervals:
    return replace(
        start, bets=_bets_from_json(kept["bets"], start.bets), seen=_floats(kept["seen"], start.seen),
        recent=_floats(kept["recent"], start.recent),
        ruled_out=_floats(kept["ruled_out"], start.ruled_out.astype(np.float64)) > 0,
    )  # fmt: skip


def split_to_json(split: SplitTest) -> dict[str, Any]:
    return asdict(split)


def split_from_json(document: Mapping[str, Any]) -> SplitTest:
    """The inverse of :func:`split_to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    log_e = tuple(float(value) for value in document["log_e"])
    if len(log_e) != len(SplitTest().log_e):
        raise ValueError("a split test of other bets")
    return SplitTest(
        _count(document["canary"]), _count(document["total"]), float(document["expected"]), log_e,
        float(document["peak_log_e"]),
    )  # fmt: skip


def _bets_to_json(bets: BetsState) -> dict[str, Any]:
    return {"log_e": _text(bets.log_e), "x": _text(bets.x), "settled": bets.settled}


def _bets_from_json(document: Mapping[str, Any], start: BetsState) -> BetsState:
    if not isinstance(document["settled"], bool):
        raise ValueError("bets that are neither settled nor not")
    return BetsState(_floats(document["log_e"], start.log_e), _floats(document["x"], start.x), document["settled"])


def _text(array: Floats) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<f8").tobytes()).decode()


def _floats(text: object, like: Floats) -> Floats:
    if not isinstance(text, str):
        raise TypeError("an array is a text")
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("an array that is no base64") from error
    if len(raw) != like.size * 8:
        raise ValueError(f"an array of {len(raw)} bytes where {like.size * 8} were due")
    found = np.frombuffer(raw, dtype="<f8").astype(np.float64).reshape(like.shape)
    if not np.isfinite(found).all():
        raise ValueError("an array with numbers that are none")
    return found


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
