"""The training loop of the transformer.

Everything random is drawn anew for each epoch from (seed, epoch), so a checkpoint after an epoch needs no generator's
state and a run that was killed ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.evaluation.ranking import ndcg_at, rank_targets
from components.models.histories import pad_left
from components.models.transformer import Transformer
from components.models.warm_start import warm_start_vectors
from components.training.batches import epoch_batches
from components.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from components.training.config import EpochRecord, TrainingConfig
from components.training.loss import next_item_loss

__all__ = ["TrainedTransformer", "train_transformer"]

_ORDER, _NEGATIVES, _DROPOUT, _SAMPLE, _WEIGHTS = range(5)
"""What a stream of random numbers is for."""


@dataclass(frozen=True)
class TrainedTransformer:
    """The outcome of a training run."""

    module: Transformer
    """With the weights of the best validated epoch, in evaluation mode."""
    curve: tuple[EpochRecord, ...]
    """Every epoch."""
    seconds: float
    """Wall time, earlier parts of a resumed run included."""
    epochs: int
    """Epochs trained."""
    best_epoch: int
    """The epoch whose weights ``module`` has."""
    stopped_early: bool
    """The run ended before all its epochs: no better validation for a while, or out of time."""


class _OutOfTimeError(Exception):
    """The time budget ended within an epoch."""


def train_transformer(
    train: Sequence[NDArray[np.integer]],
    valid_histories: Sequence[NDArray[np.integer]],
    valid_target: NDArray[np.integer],
    n_items: int,
    config: TrainingConfig,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainedTransformer:
    """Train on ``train``, keeping the epoch with the best NDCG@10 on validation.

    The same arguments give the same bits on one machine with the same number of threads, unless the time budget binds.

    Args:
        train: sequences of item indices, oldest first.
        valid_histories: what each validation shopper bought before (for leave-one-out the same as ``train``).
        valid_target: what each bought next, ``[len(valid_histories)]``.
        n_items: items are 1 to ``n_items``.
        config: what to do.
        checkpoint: written after every epoch and, when it exists, gone on from. A finished one is returned at once.
        on_epoch: called after each epoch (and its checkpoint).
        clock: seconds, for the time budget.

    Raises:
        StateError: the checkpoint is damaged.
        InputError: the checkpoint is of another run.
        StorageError: the checkpoint cannot be written.
    """
    started = clock()
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        run = _Run(train, valid_histories, valid_target, n_items, config)
        saved = read_checkpoint(checkpoint, run.fingerprint) if checkpoint is not None else None
        if saved is not None:
            run.restore(saved)
            if saved.curve:
                started -= saved.curve[-1].seconds
        else:
            run.start()
        while not run.finished:
            record = run.epoch(lambda: clock() - started)
            if record is None:
                break
            if checkpoint is not None:
                write_checkpoint(checkpoint, run.checkpoint())
            if on_epoch is not None:
                on_epoch(record)
        return run.result(clock() - started)


class _Run:
    """The state of one training run; a step is an epoch."""

    def __init__(
        self,
        train: Sequence[NDArray[np.integer]],
        valid_histories: Sequence[NDArray[np.integer]],
        valid_target: NDArray[np.integer],
        n_items: int,
        config: TrainingConfig,
    ) -> None:
        self.config = config
        self.n_items = n_items
        reach = config.model.max_history
        self.train = [sequence[-(reach + 1) :] for sequence in train]
        self.lengths = np.array([len(sequence) for sequence in self.train], dtype=np.int64)
        shoppers = np.arange(len(valid_histories))
        if config.validation_shoppers is not None and config.validation_shoppers < len(shoppers):
            draw = np.random.default_rng([config.seed, 0, _SAMPLE])
            shoppers = np.sort(draw.choice(shoppers, config.validation_shoppers, replace=False))
        self.valid_histories = [valid_histories[int(shopper)] for shopper in shoppers]
        self.valid_target = np.asarray(valid_target)[shoppers]
        self.fingerprint = _fingerprint(train, valid_histories, valid_target, n_items, config)
        self.curve: list[EpochRecord] = []
        self.finished = False
        self.stopped_early = False
        self.progress = 0.0
        self.steps = 0
        self.best_epoch = 0
        self.best: Mapping[str, Tensor] = {}

    # --- where a run begins -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """A fresh model, warm-started if so configured."""
        torch.manual_seed(_torch_seed(self.config.seed, 0, _WEIGHTS))
        vectors = None
        if self.config.warm_start is not None:
            vectors = torch.from_numpy(
                warm_start_vectors(
                    self.train,
                    self.n_items,
                    self.config.model.dimensions,
                    seed=self.config.seed,
                    config=self.config.warm_start,
                )
            )
        self.model = Transformer(self.n_items, self.config.model, vectors)
        self._make_optimiser()

    def restore(self, saved: Checkpoint) -> None:
        """Go on from ``saved``."""
        self.model = Transformer(self.n_items, self.config.model)
        self.model.load_state_dict(dict(saved.weights))
        self._make_optimiser()
        for name, parameter in self.model.named_parameters():
            if name in saved.first_moments:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(saved.steps)),
                    "exp_avg": saved.first_moments[name].clone(),
                    "exp_avg_sq": saved.second_moments[name].clone(),
                }
        self.curve = list(saved.curve)
        self.finished, self.stopped_early = saved.finished, saved.stopped_early
        self.progress, self.steps = saved.progress, saved.steps
        self.best_epoch, self.best = saved.best_epoch, dict(saved.best)

    def _make_optimiser(self) -> None:
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            foreach=False,
            fused=True,
        )

    # --- one epoch --------------------------------------------------------------------------------------------------

    def epoch(self, elapsed: Callable[[], float]) -> EpochRecord | None:
        """Train and validate one epoch and decide whether it was the last; None when time ran out within it."""
        number = len(self.curve) + 1
        last = self._last_epoch(elapsed())
        try:
            loss = self._train_epoch(number, last, elapsed)
        except _OutOfTimeError:
            self.finished = self.stopped_early = True
            return None
        ranks = rank_targets(self.model, self.valid_histories, self.valid_target)
        record = EpochRecord(number, elapsed(), loss, float(ndcg_at(ranks, 10).mean()))
        best_so_far = max((earlier.valid_ndcg_at_10 for earlier in self.curve), default=-1.0)
        self.curve.append(record)
        if record.valid_ndcg_at_10 > best_so_far:
            self.best_epoch = number
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        impatient = number - self.best_epoch >= self.config.patience
        no_time = self._last_epoch(record.seconds) <= number
        self.finished = impatient or no_time
        self.stopped_early = self.finished and number < self.config.epochs
        return record

    def _train_epoch(self, number: int, last: int, elapsed: Callable[[], float]) -> float:
        config = self.config
        draw = np.random.default_rng([config.seed, number, _NEGATIVES])
        torch.manual_seed(_torch_seed(config.seed, number, _DROPOUT))
        batches = epoch_batches(
            self.lengths, config.tokens_a_batch, np.random.default_rng([config.seed, number, _ORDER])
        )
        begin, share = self.progress, (1.0 - self.progress) / max(1, last - number + 1)
        # Half an epoch's grace, then the best so far has to do.
        deadline = math.inf if config.max_seconds is None or not self.curve else config.max_seconds * 1.05
        self.model.train()
        total, count = 0.0, 0
        for done, index in enumerate(batches):
            if elapsed() > deadline:
                raise _OutOfTimeError
            rate = self._learning_rate(begin + share * done / len(batches))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            sequences = torch.from_numpy(pad_left([self.train[row] for row in index]))
            negatives = None
            if config.negatives is not None and config.negatives < self.n_items:
                drawn = draw.choice(self.n_items, config.negatives, replace=False, shuffle=False) + 1
                negatives = torch.from_numpy(drawn.astype(np.int64))
            loss = next_item_loss(self.model, sequences, negatives)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
            self.steps += 1
            total += float(loss.detach())
            count += 1
        self.progress = begin + share
        return total / max(1, count)

    def _learning_rate(self, progress: float) -> float:
        """Up over the warm-up, then down along a cosine."""
        config = self.config
        floor = config.learning_rate_floor
        fall = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return config.learning_rate * min(1.0, (self.steps + 1) / max(1, config.warm_up_steps)) * fall

    def _last_epoch(self, seconds: float) -> int:
        """The epoch that this run will end with, as far as can be told ``seconds`` into it."""
        if self.config.max_seconds is None or not self.curve:
            return self.config.epochs
        recent = self.curve[-4:]
        if len(recent) > 1:
            an_epoch = (recent[-1].seconds - recent[0].seconds) / (len(recent) - 1)
        else:
            an_epoch = recent[0].seconds
        fit = int((self.config.max_seconds - seconds) / max(an_epoch, 1e-9))
        return min(self.config.epochs, len(self.curve) + max(0, fit))

    # --- what is kept -----------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """All of the above."""
        states = {name: self.optimiser.state[parameter] for name, parameter in self.model.named_parameters()}
        return Checkpoint(
            fingerprint=self.fingerprint,
            progress=self.progress,
            finished=self.finished,
            stopped_early=self.stopped_early,
            steps=self.steps,
            curve=tuple(self.curve),
            best_epoch=self.best_epoch,
            weights=self.model.state_dict(),
            best=self.best,
            first_moments={name: state["exp_avg"] for name, state in states.items() if state},
            second_moments={name: state["exp_avg_sq"] for name, state in states.items() if state},
        )

    def result(self, seconds: float) -> TrainedTransformer:
        """The run's outcome, with the best epoch's weights."""
        if self.best:
            self.model.load_state_dict(dict(self.best))
        return TrainedTransformer(
            module=self.model.eval(),
            curve=tuple(self.curve),
            seconds=seconds,
            epochs=len(self.curve),
            best_epoch=self.best_epoch,
            stopped_early=self.stopped_early,
        )


def _torch_seed(seed: int, epoch: int, purpose: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, purpose]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _fingerprint(
    train: Sequence[NDArray[np.integer]],
    valid_histories: Sequence[NDArray[np.integer]],
    valid_target: NDArray[np.integer],
    n_items: int,
    config: TrainingConfig,
) -> str:
    """SHA-256 over the data and all of the configuration that decides the outcome (the time budget may be raised)."""
    settings = json.dumps(asdict(replace(config, max_seconds=None)), sort_keys=True)
    digest = hashlib.sha256(f"{n_items} {settings}".encode())
    for sequences in (train, valid_histories, [np.asarray(valid_target)]):
        digest.update(np.array([len(sequence) for sequence in sequences], dtype=np.int64).tobytes())
        for sequence in sequences:
            digest.update(np.ascontiguousarray(sequence, dtype=np.int32).tobytes())
    return digest.hexdigest()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
