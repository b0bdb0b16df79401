"""RecBole's SASRec with its own defaults, driven by its own trainer. Runs in an environment of its own.

Two things are ours, for both contestants to be measured alike. The ranking: RecBole does not mask a shopper's own
history when it ranks for sequential models, which would count against it. And the end: when its own patience runs out
(10 validations without a better one), or when the time is over.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config  # type: ignore[import-not-found]
from recbole.data import create_dataset, data_preparation  # type: ignore[import-not-found]
from recbole.model.sequential_recommender import SASRec  # type: ignore[import-not-found]
from recbole.trainer import Trainer  # type: ignore[import-not-found]
from recbole.utils import init_seed  # type: ignore[import-not-found]

from benchmarks.training.contestant import Contest, quality
from components.data.split import LeaveOneOut
from components.evaluation.ranking import ndcg_at


class _OutOfTimeError(Exception):
    pass


def write_atomic_files(folder: Path, split: LeaveOneOut) -> None:
    """RecBole's form of the same sequences; the place in the sequence is the time."""
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for shopper, sequence in enumerate(split.histories("test")):
        whole = [*sequence.tolist(), int(split.test_target[shopper])]
        rows += [f"{shopper}\t{item}\t{place}" for place, item in enumerate(whole)]
    (folder / "shop").mkdir()
    (folder / "shop" / "shop.inter").write_text("\n".join(rows) + "\n")


def settings(folder: Path, history: int) -> dict[str, Any]:
    """What differs from RecBole's defaults: the data, leave-one-out, the softmax loss, what is not written."""
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": history,
        "valid_metric": "NDCG@10",
        "topk": [10],
        "metrics": ["NDCG", "Hit"],
        "use_gpu": False,
        "show_progress": False,
        "state": "WARNING",
    }


def main() -> None:
    contest = Contest.enter("recbole")
    # In a folder that the parent clears: RecBole writes its data, and its logs to wherever it runs.
    folder = contest.out / "recbole"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        write_atomic_files(folder, contest.split)
        _race(contest, folder)


def _race(contest: Contest, folder: Path) -> None:
    config = Config(model="SASRec", dataset="shop", config_dict=settings(folder, contest.history))
    logging.disable(logging.INFO)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    split = contest.split
    theirs = torch.zeros(split.n_items + 1, dtype=torch.int64)
    theirs[1:] = torch.from_numpy(dataset.token2id(dataset.iid_field, [str(i) for i in range(1, split.n_items + 1)]))
    _same_split(valid.dataset, split, "valid", theirs, dataset, contest.history)
    _same_split(test.dataset, split, "test", theirs, dataset, contest.history)

    def score(history: torch.Tensor) -> torch.Tensor:
        """Our left-padded batch, right-padded as they want it; scores in our numbering."""
        shown = history[:, -contest.history :]
        lengths = (shown > 0).sum(dim=1)
        sequence = torch.zeros(len(shown), contest.history, dtype=torch.int64)
        place = torch.arange(shown.shape[1])[None, :] - (shown.shape[1] - lengths)[:, None]
        real = shown > 0
        sequence[torch.arange(len(shown))[:, None].expand_as(shown)[real], place[real]] = theirs[shown[real]]
        batch = {model.ITEM_SEQ: sequence, model.ITEM_SEQ_LEN: lengths}
        return torch.as_tensor(model.full_sort_predict(batch))[:, theirs]

    best: dict[str, Any] = {"ndcg": -1.0, "epoch": 0, "weights": {}}

    class Timed(Trainer):  # type: ignore[misc]
        """Their trainer, validated by the shared ranking and stopped by the shared clock."""

        epochs_done = 0

        def _train_epoch(self, train_data: Any, epoch_idx: int, *_: Any, **__: Any) -> Any:
            def loss(interaction: Any) -> Any:
                if contest.elapsed() > contest.seconds:
                    raise _OutOfTimeError
                return self.model.calculate_loss(interaction)

            return super()._train_epoch(train_data, epoch_idx, loss_func=loss)

        def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
            self.model.eval()
            ndcg = float(ndcg_at(contest.rank("valid", score), 10).mean())
            self.epochs_done += 1
            contest.validated(self.epochs_done, ndcg)
            if ndcg > best["ndcg"]:
                weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
                best.update(ndcg=ndcg, epoch=self.epochs_done, weights=weights)
            return ndcg, {"ndcg@10": ndcg}

    trainer = Timed(config, model)
    contest.start()
    converged = True
    try:
        trainer.fit(train, valid, saved=False, verbose=False)
    except _OutOfTimeError:
        converged = False
    seconds = contest.elapsed()
    if best["weights"]:
        model.load_state_dict(best["weights"])
    model.eval()
    contest.finish(
        score,
        epochs=trainer.epochs_done,
        best_epoch=best["epoch"],
        seconds=seconds,
        stopped_early=converged,
        unmasked_test=_unmasked(contest, score),
        config={
            key: config[key]
            for key in ("learning_rate", "train_batch_size", "n_layers", "n_heads", "hidden_size", "inner_size",
                        "hidden_dropout_prob", "attn_dropout_prob", "loss_type", "MAX_ITEM_LIST_LENGTH", "seed",
                        "stopping_step")
        },
    )  # fmt: skip


def _same_split(theirs: Any, split: LeaveOneOut, which: str, numbers: torch.Tensor, dataset: Any, history: int) -> None:
    """Every shopper's history and target in RecBole's own evaluation set are the ones that we rank."""
    histories = split.histories("valid" if which == "valid" else "test")
    targets = split.targets("valid" if which == "valid" else "test")
    rows = theirs.inter_feat
    shoppers = dataset.id2token(dataset.uid_field, rows[dataset.uid_field].numpy()).astype(np.int64)
    if sorted(shoppers.tolist()) != list(range(len(histories))):
        raise SystemExit(f"RecBole's {which} split does not have each shopper once")
    for row, shopper in enumerate(shoppers.tolist()):
        expected = numbers[torch.from_numpy(histories[shopper][-history:].astype(np.int64))]
        length = int(rows["item_length"][row])
        same = length == len(expected) and torch.equal(rows["item_id_list"][row][:length], expected)
        if not same or int(rows["item_id"][row]) != int(numbers[int(targets[shopper])]):
            raise SystemExit(f"RecBole's {which} split differs for shopper {shopper}")


def _unmasked(contest: Contest, score: Any) -> dict[str, float]:
    """Test quality as RecBole would print it: the shopper's own history competes."""
    histories = contest.split.histories("test")
    targets = contest.split.targets("test")
    ranks = []
    with torch.inference_mode():
        for start in range(0, len(histories), 256):
            chunk = histories[start : start + 256]
            width = max(len(history) for history in chunk)
            batch = torch.from_numpy(
                np.stack([np.pad(history.astype(np.int64), (width - len(history), 0)) for history in chunk])
            )
            scores = score(batch)
            scores[:, 0] = -torch.inf
            target = torch.from_numpy(targets[start : start + 256].astype(np.int64))[:, None]
            ranks.append(((scores >= scores.gather(1, target)).sum(dim=1) - 1).numpy())
    return quality(np.concatenate(ranks))


if __name__ == "__main__":
    main()
