"""Checkpoints: all that a run needs to go on as if never interrupted, in one file that is never half-written.

The file is a NumPy archive without pickles (loading one can run no code); its zip checksums show damage.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.training.config import EpochRecord
from endcap.errors import InputError, StateError
from endcap.files import write_atomic

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]

_FORMAT = 1
_AGAIN = "move the file away to train from the start, or restore it from a backup"


@dataclass(frozen=True)
class Checkpoint:
    """A training run after a whole epoch. Tensors are by parameter name."""

    fingerprint: str
    """Of configuration and data; a run goes on only from its own checkpoint."""
    progress: float
    """How far the learning-rate schedule is, 0 to 1."""
    finished: bool
    """The run ended here (all epochs, early stop, or time budget)."""
    stopped_early: bool
    """It ended before all its epochs."""
    steps: int
    """Batches so far."""
    curve: tuple[EpochRecord, ...]
    """Epochs so far."""
    best_epoch: int
    """The epoch of ``best``."""
    weights: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    first_moments: Mapping[str, Tensor]
    """AdamW's running means of the gradients."""
    second_moments: Mapping[str, Tensor]
    """AdamW's running means of their squares."""


_GROUPS = ("weights", "best", "first_moments", "second_moments")


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace ``path`` by ``checkpoint``, at once or not at all.

    Raises:
        StorageError: the disk is full or refuses.
    """
    facts = {
        "format": _FORMAT,
        "fingerprint": checkpoint.fingerprint,
        "progress": checkpoint.progress,
        "finished": checkpoint.finished,
        "stopped_early": checkpoint.stopped_early,
        "steps": checkpoint.steps,
        "best_epoch": checkpoint.best_epoch,
        "curve": [asdict(record) for record in checkpoint.curve],
    }
    arrays = {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}
    for group in _GROUPS:
        tensors: Mapping[str, Tensor] = getattr(checkpoint, group)
        arrays |= {f"{group}/{name}": tensor.detach().numpy() for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomic(path, buffer.getvalue())


def read_checkpoint(path: Path, fingerprint: str) -> Checkpoint | None:
    """The checkpoint in ``path``; None when there is no such file.

    Raises:
        StateError: the file is damaged; the message names it.
        InputError: it belongs to another configuration or other data.
    """
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            facts = json.loads(archive["facts"].tobytes())
            if facts["format"] != _FORMAT:
                raise StateError(f"a checkpoint of format {facts['format']}, this is {_FORMAT}", where=path,
                                 next_step=_AGAIN)  # fmt: skip
            for key in archive.files:
                group, _, name = key.partition("/")
                if group in groups:
                    groups[group][name] = torch.from_numpy(archive[key])
            curve = tuple(EpochRecord(**record) for record in facts["curve"])
            checkpoint = Checkpoint(
                fingerprint=str(facts["fingerprint"]),
                progress=float(facts["progress"]),
                finished=bool(facts["finished"]),
                stopped_early=bool(facts["stopped_early"]),
                steps=int(facts["steps"]),
                best_epoch=int(facts["best_epoch"]),
                curve=curve,
                **groups,
            )
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"a damaged checkpoint ({error})", where=path, next_step=_AGAIN) from error
    if checkpoint.fingerprint != fingerprint:
        raise InputError("a checkpoint of another configuration or other data", where=path,
                         next_step="choose another file, or move this one away to train from the start")  # fmt: skip
    return checkpoint
