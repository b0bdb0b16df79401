"""Evidence: counts kept as strata, and statistics that may be looked at any time."""

from endcap.evidence.sequential import Boundary, ConfidenceSequence, SequentialTest
from endcap.evidence.strata import Counts, Stratum
from endcap.evidence.verdicts import Evidence, ObjectiveEvidence, Verdict

__all__ = [
    "Boundary",
    "ConfidenceSequence",
    "Counts",
    "Evidence",
    "ObjectiveEvidence",
    "SequentialTest",
    "Stratum",
    "Verdict",
]
