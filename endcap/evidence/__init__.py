"""Evidence: counts kept as strata, and statistics that may be looked at any time."""

from endcap.evidence.intervals import Interval, Intervals
from endcap.evidence.judgement import Judgement, Verdict
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
    "share_follows",
]
