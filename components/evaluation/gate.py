"""May the candidate take the champion's place? A pure decision on paired evidence."""

from __future__ import annotations

from dataclasses import dataclass

from components.evaluation.evaluation import Paired

__all__ = ["GateDecision", "decide_gate"]


@dataclass(frozen=True)
class GateDecision:
    """The verdict (``pass`` or ``fail``) with its reason in words.

    Attributes:
        champion: label of the champion it was compared with; None where there was none.
        paired: the evidence; None where there was no champion.
    """

    passed: bool
    reason: str
    candidate: str
    champion: str | None = None
    paired: Paired | None = None


def decide_gate(candidate: str, champion: str | None, paired: Paired | None) -> GateDecision:
    """Pass a candidate that beats the champion for certain: the interval of the paired difference is all above zero.

    The first champion has nothing to beat. A champion without evidence is never beaten.

    Args:
        candidate: the model, in words.
        champion: the champion's label, or None where the registry has none.
        paired: candidate less champion on the test split; None where it could not be measured.
    """
    if champion is None:
        return GateDecision(True, "there is no champion yet", candidate)
    if paired is None:
        return GateDecision(False, "no evidence: the champion could not be compared", candidate, champion)
    numbers = f"{paired.metric} {paired.difference:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]"
    if paired.low > 0.0:
        return GateDecision(True, f"beats the champion: {numbers}", candidate, champion, paired)
    if paired.high < 0.0:
        return GateDecision(False, f"worse than the champion: {numbers}", candidate, champion, paired)
    return GateDecision(False, f"not surely better than the champion: {numbers}", candidate, champion, paired)
