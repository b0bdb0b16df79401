"""Our contestant: the transformer, trained to convergence."""

from __future__ import annotations

from dataclasses import asdict, replace

from benchmarks.training.contestant import Contest
from components.training.config import EpochRecord
from components.training.presets import CONVERGED
from components.training.trainer import train_transformer


def main() -> None:
    contest = Contest.enter("ours")
    split = contest.split
    config = replace(CONVERGED, threads=1, max_seconds=contest.seconds)

    def on_epoch(record: EpochRecord) -> None:
        contest.validated(record.epoch, record.valid_ndcg_at_10)

    contest.start()
    trained = train_transformer(
        split.train, split.histories("valid"), split.valid_target, split.n_items, config, on_epoch=on_epoch
    )
    contest.finish(
        trained.module,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        seconds=trained.seconds,
        stopped_early=trained.stopped_early,
        config=asdict(config),
    )


if __name__ == "__main__":
    main()
