"""All that the looks so far come to: the evidence, what was received, the split of shoppers, the shadow.

Its size does not depend on how many looks there were; neither does that of its JSON, from which an engine goes on
without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from endcap.evidence import (
    Counts,
    Evidence,
    SplitTest,
    Verdict,
    evidence_from_json,
    evidence_to_json,
    share_follows,
    split_from_json,
    split_to_json,
)
from endcap.objectives import Good, Objectives
from serving.rollout.events import Looked, Received, ShadowSeen
from serving.rollout.looks import Lately, Look, LookFold, shadow_from_json, shadow_strata, shadow_to_json
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Phase, State
from serving.targets.base import Observation, ShadowObservation

__all__ = ["SIGHT_FORMAT", "Sight"]

SIGHT_FORMAT = 1
"""Raised when its JSON says other things, or the same in another way."""
_MISMATCH_ALPHA = 0.001
_FEW_SHOPPERS_TOLERANCE = 4.0
"""With sticky assignment a few heavy shoppers are a share of their own: only a gross difference is no share at all."""


class Sight:
    """Folds over looks. ``intervals``: keep the confidence sequences for people too."""

    def __init__(
        self, spec: RolloutSpec, objectives: Objectives, canary: str, baseline: str, *, intervals: bool = True
    ) -> None:
        self._spec, self._objectives, self._canary = spec, objectives, canary
        self._fold = LookFold(objectives, canary=canary, baseline=baseline if spec.baseline else None)
        self.evidence = Evidence.start(
            objectives, alpha=spec.alpha, beta=spec.beta, primary=spec.primary, intervals=intervals
        )
        self._split = SplitTest()
        answered = tuple(objective for objective in objectives.objectives if objective.good is Good.ANSWERED)
        self._shadow_evidence = (
            Evidence.start(replace(objectives, objectives=answered), alpha=spec.alpha, beta=spec.beta, intervals=False)
            if answered and spec.shadow is not None else None
        )  # fmt: skip
        self._shadow: ShadowObservation | None = None
        self._lately = Lately(objectives)
        self._counted: dict[str, dict[str, Counts]] = {}
        self.looked_at_s: float | None = None
        """When the last look was; None before the first."""

    @property
    def received(self) -> Received:
        return self._fold.received

    def take(self, seen: Observation) -> Look:
        self.looked_at_s = seen.at_s
        for label, version in seen.versions.items():
            for name, counts in version.measured.items():
                self._counted.setdefault(name, {})[label] = counts
        look = self._fold.fold(seen)
        self.evidence = self.evidence.update(look.strata)
        self._lately.take(look)
        if look.split is not None:
            self._split = self._split.update(look.split.canary, look.split.total, look.split.share)
        if seen.shadow is not None and seen.shadow.version == self._canary:
            if self._shadow_evidence is not None:
                strata = shadow_strata(self._objectives, self._shadow, seen.shadow)
                self._shadow_evidence = self._shadow_evidence.update(strata)
            self._shadow = seen.shadow
        return look

    def counted(self) -> dict[str, dict[str, Counts]]:
        """By objective and version, what sources beside the target had counted when they last told of it."""
        return {name: dict(by_version) for name, by_version in self._counted.items()}

    def judge(self, state: State, look: Look, trouble: str | None) -> Looked:
        """The event that the looks so far make; ``look`` is the last one."""
        judged = self.evidence.judgement
        return Looked(
            verdict=judged.verdict,
            reason=judged.reason if trouble is None else f"{judged.reason}; {trouble}",
            received=self.received,
            canary_new=look.canary_new,
            control_new=look.control_new,
            follows=self._follows(state),
            mismatch=self._mismatch(),
            troubled=self._lately.troubled,
            shadow=self._shadow_seen(),
        )

    # ---- kept, and gone on from ----

    def to_json(self) -> dict[str, Any]:
        shadow, own = self._shadow, self._shadow_evidence
        return {
            "format": SIGHT_FORMAT, "canary": self._canary, "looked_at_s": self.looked_at_s,
            "fold": self._fold.to_json(), "evidence": evidence_to_json(self.evidence),
            "split": split_to_json(self._split), "lately": self._lately.to_json(),
            "shadow": None if shadow is None else shadow_to_json(shadow),
            "shadow_evidence": None if own is None else evidence_to_json(own),
            "counted": {
                name: {label: [counts.good, counts.total] for label, counts in by_version.items()}
                for name, by_version in self._counted.items()
            },
        }  # fmt: skip

    def restore(self, document: Mapping[str, Any]) -> None:
        """Go on from what :meth:`to_json` gave, to the bit.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is no sight of this rollout. Nothing holds then.
        """
        if document["format"] != SIGHT_FORMAT:
            raise ValueError(f"format {document['format']!r}; this version reads {SIGHT_FORMAT}")
        if document["canary"] != self._canary:
            raise ValueError(f"looks at version {document['canary']!r}")
        shadow, kept_own, looked_at_s = document["shadow"], document["shadow_evidence"], document["looked_at_s"]
        self.evidence = evidence_from_json(document["evidence"], self.evidence)
        if self._shadow_evidence is not None and kept_own is not None:
            self._shadow_evidence = evidence_from_json(kept_own, self._shadow_evidence)
        self._split = split_from_json(document["split"])
        self._shadow = None if shadow is None else shadow_from_json(shadow)
        self._lately.restore(document["lately"])
        self._fold.restore(document["fold"])
        self._counted = {
            str(name): {str(label): Counts(int(good), int(total)) for label, (good, total) in by_version.items()}
            for name, by_version in document["counted"].items()
        }
        self.looked_at_s = None if looked_at_s is None else float(looked_at_s)

    # ---- what it says ----

    def _follows(self, state: State) -> bool:
        if state.phase not in (Phase.OBSERVING, Phase.HOLDING):
            return True
        canary = self.received.canary_requests - state.step_from.canary_requests
        requests = self.received.requests - state.step_from.requests
        share = self._spec.steps[state.step].share
        if share == 1:
            return True  # there the old version is waited for until it receives nothing
        tolerance = 1.5 if self._spec.sticky is None else _FEW_SHOPPERS_TOLERANCE
        return share_follows(canary, requests, share, tolerance=tolerance)

    def _mismatch(self) -> str | None:
        if not self._split.rejects(_MISMATCH_ALPHA):
            return None
        split = self._split
        due = f"{split.canary} of {split.total} new shoppers are canary's, {split.expected:.0f} were due"
        return f"sample-ratio mismatch: {due}"

    def _shadow_seen(self) -> ShadowSeen | None:
        if self._shadow is None:
            return None
        evidence = self._shadow_evidence
        verdict, reason = (Verdict.INCONCLUSIVE, "") if evidence is None else (evidence.verdict, evidence.reason)
        return ShadowSeen(verdict, reason, self._shadow.pairs, self._shadow.overlap)

    @property
    def shadow_json(self) -> dict[str, float | int] | None:
        seen = self._shadow
        if seen is None:
            return None
        return {"pairs": seen.pairs, "overlap": seen.overlap, "score_drift": seen.score_drift,
                "answered": seen.answered.good, "asked": seen.answered.total}  # fmt: skip
