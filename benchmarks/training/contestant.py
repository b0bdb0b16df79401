"""What both contestants share: where they write, how they are timed, how their models are ranked.

Imported in RecBole's environment too, so it needs no more than NumPy and PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from components.data.split import LeaveOneOut, load_split
from components.evaluation.ranking import Scorer, hit_rate_at, ndcg_at, rank_targets
from endcap.files import JsonLines, write_json
from endcap.processes import bind_to_parent

__all__ = ["Contest", "quality"]


def quality(ranks: NDArray[np.int64]) -> dict[str, float]:
    """NDCG and hit rate at 10."""
    return {"ndcg_at_10": float(ndcg_at(ranks, 10).mean()), "hr_at_10": float(hit_rate_at(ranks, 10).mean())}


@dataclass
class Contest:
    """One contestant's run: its arguments, its clock and its records."""

    name: str
    split: LeaveOneOut
    out: Path
    seconds: float
    """Wall time it may train."""
    history: int
    """Newest items of a history that RecBole is shown (its cost grows with this); ours has its own."""

    @staticmethod
    def enter(name: str, arguments: Sequence[str] | None = None) -> Contest:
        """Read the arguments, take one core and one thread."""
        bind_to_parent()
        parser = argparse.ArgumentParser(prog=f"benchmarks.training.{name}")
        parser.add_argument("--split", type=Path, required=True)
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--seconds", type=float, required=True)
        parser.add_argument("--core", type=int, required=True)
        parser.add_argument("--history", type=int, default=50)
        given = parser.parse_args(arguments)
        os.sched_setaffinity(0, {given.core})
        torch.set_num_threads(1)
        return Contest(name, load_split(given.split), given.out, given.seconds, given.history)

    def start(self) -> None:
        """Training starts now; what came before (imports, reading data) is not counted, for either."""
        self._records = JsonLines(self.out / f"{self.name}.jsonl")
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def elapsed(self) -> float:
        """Wall seconds since the start."""
        return time.monotonic() - self._wall

    def validated(self, epoch: int, ndcg_at_10: float) -> None:
        """Record a validation: the one thing that both are allowed to choose by."""
        self._records.append(
            {
                "epoch": epoch,
                "wall_s": round(self.elapsed(), 3),
                "cpu_s": round(time.process_time() - self._cpu, 3),
                "valid_ndcg_at_10": ndcg_at_10,
            }
        )

    def rank(self, which: Literal["valid", "test"], scorer: Scorer) -> NDArray[np.int64]:
        """Full ranking with the history masked, by the same code for both."""
        return rank_targets(scorer, self.split.histories(which), self.split.targets(which))

    def finish(self, scorer: Scorer, **facts: object) -> None:
        """Rank the test targets with the weights chosen on validation, once."""
        document = {"name": self.name, "test": quality(self.rank("test", scorer)), **facts}
        write_json(self.out / f"{self.name}.json", json.loads(json.dumps(document)))
