"""Whether traffic is split as it was told to be.

:class:`SplitTest` is the sample-ratio mismatch test: each newly counted shopper should be canary's with a chance equal
to the share in force. It is an e-process over looks (Lindon, Malek, "Anytime-valid inference for multinomial count
data", NeurIPS 2022), so it may be looked at any time. Their mixture over a fixed share is a Beta distribution; here the
share changes from step to step while what is wrong stays, so the mixture is over the factor by which canary's odds are
off: its bets carry over when the share changes, and the state is one number a factor.

:func:`share_follows` asks far less, of requests: is what canary received in a step roughly the share that was set?
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SplitTest", "share_follows"]

_LOG_FACTORS = tuple(sign * step for step in (0.02, 0.05, 0.12, 0.3, 0.7, 1.6) for sign in (-1, 1))


@dataclass(frozen=True, slots=True)
class SplitTest:
    """Immutable; :meth:`update` returns the test after one more look.

    ``canary``, ``total``: shoppers so far. ``expected``: how many of them were due to canary.
    """

    canary: int = 0
    total: int = 0
    expected: float = 0.0
    log_e: tuple[float, ...] = (0.0,) * len(_LOG_FACTORS)
    peak_log_e: float = 0.0

    def update(self, canary_new: int, total_new: int, share: float) -> SplitTest:
        """``canary_new`` of ``total_new`` new shoppers were canary's while its share was ``share``.

        Where all or nothing is canary's there is no chance involved, and so no evidence.
        """
        if total_new <= 0 or not 0 < share < 1:
            return self
        # With odds e^f times those due, canary's share is s e^f / (1 + s (e^f - 1)) and the rest (1 - s) over the same.
        log_e = tuple(
            log_e + canary_new * factor - total_new * math.log1p(share * math.expm1(factor))
            for log_e, factor in zip(self.log_e, _LOG_FACTORS, strict=True)
        )
        top = max(log_e)
        mean = top + math.log(sum(math.exp(value - top) for value in log_e) / len(log_e))
        return SplitTest(
            self.canary + canary_new, self.total + total_new,
            self.expected + total_new * share, log_e, max(self.peak_log_e, mean),
        )  # fmt: skip

    def rejects(self, alpha: float) -> bool:
        """A mismatch is shown at level ``alpha``; once shown it stays shown (Ville's inequality)."""
        return self.peak_log_e >= -math.log(alpha)


def share_follows(
    canary: int, total: int, share: float, *, tolerance: float = 1.5, level: float = 1e-6
) -> bool:  # fmt: skip
    """False once ``canary`` of ``total`` requests is shown to be grossly another share than ``share``.

    Grossly: odds more than ``tolerance`` times those of the share, or less than the inverse. Shown: at ``level``,
    by the likelihood under a Beta(1/2, 1/2) mixture over that under the nearest tolerated share, which is an e-value
    for each tolerated one and may be looked at after each look (Wasserman, Ramdas, Balakrishnan, "Universal
    inference", PNAS 117, 2020). Requests come in clumps, hence the wide tolerance. A share of 0 or 1 has no odds:
    there anything follows.
    """
    if total <= 0 or not 0 < share < 1:
        return True
    odds, other = share / (1 - share), total - canary
    seen = canary / other if other else math.inf
    nearest = min(max(seen, odds / tolerance), odds * tolerance)
    if nearest == seen:
        return True
    due = nearest / (1 + nearest)
    mixture = math.lgamma(canary + 0.5) + math.lgamma(other + 0.5) - math.lgamma(total + 1.0) - math.log(math.pi)
    return mixture - canary * math.log(due) - other * math.log1p(-due) < -math.log(level)
