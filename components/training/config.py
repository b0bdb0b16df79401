"""What a training run is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from components.models.transformer import TransformerConfig
from components.models.warm_start import WarmStartConfig

__all__ = ["EpochRecord", "TrainingConfig"]


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the outcome of a training run, but the data."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    """Shape of the transformer."""
    warm_start: WarmStartConfig | None = field(default_factory=WarmStartConfig)
    """Start the item vectors from co-occurrence; None: from noise."""
    seed: int = 7
    """Of everything random: start, order of batches, negatives, dropout."""
    epochs: int = 14
    """Passes over the training sequences; the learning rate falls to its floor over them."""
    learning_rate: float = 4e-3
    """Highest learning rate, reached after the warm-up."""
    warm_up_steps: int = 100
    """Batches over which the learning rate rises from zero."""
    learning_rate_floor: float = 0.02
    """Learning rate at the end, as a share of the highest."""
    weight_decay: float = 0.01
    """AdamW's, decoupled."""
    tokens_a_batch: int = 1024
    """Places (predictions) a batch, padding included; sequences of a batch have about the same length."""
    negatives: int | None = 1024
    """Items drawn a batch to stand for all others in the softmax; None: the full softmax."""
    patience: int = 5
    """Epochs without a better validation after which the run stops early."""
    validation_shoppers: int | None = None
    """Shoppers (drawn by the seed) that each epoch is validated on; None: all."""
    threads: int | None = None
    """Threads of PyTorch while training; None: as it is. Another number may change the last bits of the result."""
    max_seconds: float | None = None
    """Time budget. Epochs that would not fit are left out and the learning rate falls over those that do."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a training run."""

    epoch: int
    """From 1."""
    seconds: float
    """Since the run's start, earlier parts of a resumed run included."""
    loss: float
    """Mean training loss of the epoch, nats a prediction."""
    valid_ndcg_at_10: float
    """Full ranking, own history masked."""
