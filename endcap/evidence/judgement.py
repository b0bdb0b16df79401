"""What evidence comes to: the part of it that decisions are made of, and replayed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Judgement", "Verdict"]


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and its reason, as a whole and by objective."""

    verdict: Verdict
    by_objective: Mapping[str, Verdict] = field(default_factory=dict)
    reason: str = ""
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        objectives = {
            name: {"verdict": verdict.value, "reason": self.reasons.get(name, "")}
            for name, verdict in self.by_objective.items()
        }
        return {"verdict": self.verdict.value, "reason": self.reason, "objectives": objectives}

    @staticmethod
    def from_json(document: object) -> Judgement:
        """The inverse of :meth:`to_json`. Raises ValueError on anything else."""
        try:
            whole = _object(document)
            objectives = {name: _object(value) for name, value in _object(whole["objectives"]).items()}
            return Judgement(
                Verdict(_text(whole["verdict"])),
                {name: Verdict(_text(value["verdict"])) for name, value in objectives.items()},
                _text(whole["reason"]),
                {name: _text(value["reason"]) for name, value in objectives.items()},
            )
        except KeyError as missing:
            raise ValueError(f"a judgement without {missing}") from missing


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError("a judgement is a JSON object")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a judgement's verdicts and reasons are texts")
    return value
