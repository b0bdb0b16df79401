"""The gates that a candidate passes before it gets any traffic: verify, offline quality, segments, a replay."""

from serving.gates.report import GateReport, GateResult
from serving.gates.run import run_gates
from serving.gates.settings import GateSettings

__all__ = ["GateReport", "GateResult", "GateSettings", "run_gates"]
