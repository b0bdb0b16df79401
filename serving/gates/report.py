"""What the gates found: one result a gate, in the order in which they ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from endcap.errors import StateError
from endcap.evidence import Verdict

__all__ = ["GATES", "Figures", "GateReport", "GateResult", "not_run"]

GATES = ("verify", "offline", "segments", "replay")
"""Every gate, in order."""

Figures = Mapping[str, JsonValue]
"""What a verdict stands on, by name, as it is shown and kept."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate. Only ``fail`` stops a rollout; ``inconclusive`` leaves the question to the evidence of its steps."""

    name: str
    verdict: Verdict
    reason: str
    figures: Figures = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.verdict is not Verdict.FAIL

    def to_json(self) -> dict[str, JsonValue]:
        return {"name": self.name, "passed": self.passed, "verdict": self.verdict.value, "reason": self.reason,
                "figures": dict(self.figures)}  # fmt: skip

    @staticmethod
    def from_json(document: JsonValue) -> GateResult:
        """The inverse of :meth:`to_json`; ValueError where it is not of that form."""
        if not isinstance(document, dict):
            raise ValueError("a gate's result is an object")
        name, reason, figures = document.get("name"), document.get("reason"), document.get("figures")
        if not isinstance(name, str) or not isinstance(reason, str) or not isinstance(figures, dict):
            raise ValueError("a gate's result has name, reason and figures")
        return GateResult(name, Verdict(str(document.get("verdict"))), reason, figures)


def not_run(name: str, why: str) -> GateResult:
    """A gate that says nothing about the candidate, and why."""
    return GateResult(name, Verdict.INCONCLUSIVE, f"not run: {why}")


@dataclass(frozen=True, slots=True)
class GateReport:
    gates: tuple[GateResult, ...]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def reason(self) -> str:
        """The first failing gate's, or what the gates that ran say together."""
        for gate in self.gates:
            if not gate.passed:
                return f"{gate.name}: {gate.reason}"
        return "; ".join(f"{gate.name}: {gate.reason}" for gate in self.gates)

    def to_json(self) -> dict[str, JsonValue]:
        return {"passed": self.passed, "reason": self.reason, "gates": [gate.to_json() for gate in self.gates]}

    @staticmethod
    def from_json(document: JsonValue, *, where: Path) -> GateReport:
        """The inverse of :meth:`to_json`.

        Raises:
            StateError: not of that form; the message names the file.
        """
        try:
            if not isinstance(document, dict) or not isinstance(gates := document.get("gates"), list) or not gates:
                raise ValueError("a report has gates")
            return GateReport(tuple(GateResult.from_json(gate) for gate in gates))
        except ValueError as error:
            raise StateError(f"damaged, not a report of gates ({error})", where=where,
                             next_step="remove the file: the gates are then run again") from error  # fmt: skip
