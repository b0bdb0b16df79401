"""The trainer learns, stops when told, and goes on after a kill as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from components.evaluation.ranking import hit_rate_at, ndcg_at, rank_targets
from components.models.graph import PopularityScorer
from components.models.popularity import fit_popularity
from components.models.transformer import TransformerConfig
from components.training.config import EpochRecord, TrainingConfig
from components.training.trainer import TrainedTransformer, train_transformer
from endcap.errors import InputError, StateError

N_ITEMS = 40
SMALL = TrainingConfig(
    model=TransformerConfig(dimensions=16, max_history=12),
    epochs=6,
    learning_rate=1e-2,
    warm_up_steps=5,
    tokens_a_batch=128,
    negatives=16,
    threads=1,
)


def planted(shoppers: int = 150) -> tuple[list[NDArray[np.int32]], NDArray[np.int32]]:
    """Everybody walks round the same ring of items, in steps of 3 from a random start: the next item is certain."""
    random = np.random.default_rng(5)
    walks = []
    for _ in range(shoppers):
        start, length = random.integers(N_ITEMS), random.integers(4, 11)
        walks.append(((start + 3 * np.arange(length)) % N_ITEMS + 1).astype(np.int32))
    return [walk[:-1] for walk in walks], np.array([walk[-1] for walk in walks], dtype=np.int32)


def run(config: TrainingConfig, checkpoint: Path | None = None, **more: object) -> TrainedTransformer:
    train, target = planted()
    return train_transformer(train, train, target, N_ITEMS, config, checkpoint=checkpoint, **more)  # type: ignore[arg-type]


def same_weights(a: TrainedTransformer, b: TrainedTransformer) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("negatives", [16, None], ids=["sampled", "full"])
def test_learns_a_pattern_that_popularity_cannot(negatives: int | None) -> None:
    train, target = planted()
    trained = run(replace(SMALL, negatives=negatives))
    ranks = rank_targets(trained.module, train, target)
    popular = rank_targets(PopularityScorer(fit_popularity(train, N_ITEMS)), train, target)
    assert hit_rate_at(ranks, 1).mean() > 0.8 > hit_rate_at(popular, 1).mean() + 0.5
    # The module that is handed out is the one whose validation is in the curve.
    best = max(record.valid_ndcg_at_10 for record in trained.curve)
    assert ndcg_at(ranks, 10).mean() == pytest.approx(best)
    assert not trained.module.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    short = replace(SMALL, epochs=2)
    assert same_weights(run(short), run(short))
    assert not same_weights(run(short), run(replace(short, seed=8)))


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    # A process of its own that dies by SIGKILL inside its third epoch's callback.
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from tests.unit.test_training_trainer import SMALL, run
        def on_epoch(record):
            if record.epoch == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        run(SMALL, Path({str(checkpoint)!r}), on_epoch=on_epoch)
        """
    )
    root = Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False
    )
    assert died.returncode == -signal.SIGKILL
    seen: list[EpochRecord] = []
    resumed = run(SMALL, checkpoint, on_epoch=seen.append)
    whole = run(SMALL)
    assert same_weights(resumed, whole)
    assert [record.epoch for record in seen] == [4, 5, 6]
    assert [(r.epoch, r.loss, r.valid_ndcg_at_10) for r in resumed.curve] == [
        (r.epoch, r.loss, r.valid_ndcg_at_10) for r in whole.curve
    ]
    # A finished run is not trained again.
    again = run(SMALL, checkpoint, on_epoch=lambda record: pytest.fail(f"trained epoch {record.epoch} again"))
    assert same_weights(again, whole)


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    run(replace(SMALL, epochs=1), checkpoint)
    sound = checkpoint.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 0xFF
    for damaged in (sound[: len(sound) // 2], bytes(flipped), b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        with pytest.raises(StateError, match=r"checkpoint\.npz"):
            run(replace(SMALL, epochs=1), checkpoint)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    run(replace(SMALL, epochs=1), checkpoint)
    with pytest.raises(InputError, match="another configuration"):
        run(replace(SMALL, epochs=1, seed=9), checkpoint)


def test_stops_when_validation_no_longer_gets_better() -> None:
    trained = run(replace(SMALL, epochs=40, patience=2))
    assert trained.stopped_early
    assert trained.epochs == trained.best_epoch + 2 < 40


def test_a_time_budget_ends_the_run_and_the_learning_rate_falls_within_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"
    seconds = iter(np.arange(0.0, 1e6, 0.25))
    budget = 60.0
    config = replace(SMALL, epochs=1000, patience=1000, max_seconds=budget)
    trained = run(config, checkpoint, clock=lambda: float(next(seconds)))
    assert trained.stopped_early
    assert 2 <= trained.epochs < 100
    assert trained.curve[-1].seconds <= budget * 1.05
    with np.load(checkpoint, allow_pickle=False) as archive:
        progress = json.loads(archive["facts"].tobytes())["progress"]
    assert progress > 0.8
