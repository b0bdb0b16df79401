"""Evidence: counts kept as strata, and statistics that may be looked at any time."""

from endcap.evidence.intervals import Interval, Intervals
from endcap.evidence.judgement import Judgement, Verdict
from endcap.evidence.kept import evidence_from_json, evidence_to_json, split_from_json, split_to_json
from endcap.evidence.kernel import Kernel
from endcap.evidence.splits import SplitTest, share_follows
from endcap.evidence.strata import Counts, Stratum
from endcap.evidence.verdicts import Evidence, ObjectiveEvidence

__all__ = [
    "Counts",
    "Evidence",
    "Interval",
    "Intervals",
    "Judgement",
    "Kernel",
    "ObjectiveEvidence",
    "SplitTest",
    "Stratum",
    "Verdict",
    "evidence_from_json",
    "evidence_to_json",
    "share_follows",
    "split_from_json",
    "split_to_json",
]
