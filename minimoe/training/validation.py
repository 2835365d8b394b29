"""What an evaluation during training measures, by which figure evaluations are compared, and how a signal ends one.

Each evaluation measures the same `train.eval_batches` batches, so that their losses can be compared and the best checkpoint be found. The
last also measures the whole split, or the `train.final_eval_batches` batches that cap it; that loss is the run's result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import monotonic as now
from typing import Any

from minimoe.config import TrainConfig
from minimoe.model.transformer import Transformer
from minimoe.training.tasks import Task

PATIENCE = 2.0  # seconds; an evaluation that takes less is done as soon as it could be ended


class Stopped(Exception):
    """A signal ended an evaluation."""


class Watch:
    """Called after each batch of an evaluation: tells how far it is, and ends it after a signal by raising `Stopped`."""

    def __init__(self, batches: int, signals: Sequence[int], tell: Callable[[int, int], None]) -> None:
        self.done, self.batches, self.signals, self.tell = 0, batches, signals, tell
        self.began = now()
        tell(0, batches)

    def __call__(self) -> None:
        self.done += 1
        self.tell(self.done, self.batches)
        if self.signals and self.done < self.batches and now() - self.began >= PATIENCE:
            raise Stopped


def validate(
    task: Task, model: Transformer, settings: TrainConfig, last: bool, signals: Sequence[int], tell: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return what an evaluation adds to its line of metrics, as docs/runs.md describes. Raises `Stopped` after a signal.

    `tell` is called with the number of batches done and that of all, before the first batch and after each.
    """
    whole = task.held_out_batches
    sample = min(settings.eval_batches, whole)
    measured = min(settings.final_eval_batches or whole, whole) if last else sample
    after_batch = Watch(measured if measured == sample else measured + sample, signals, tell)
    found = task.measure(model, measured, after_batch=after_batch)
    row: dict[str, Any] = {"val_loss": found.loss}
    if found.bits_per_byte is not None:
        row["val_bits_per_byte"] = found.bits_per_byte
    if found.accuracy is not None:
        row["val_accuracy"] = found.accuracy
    if measured != sample:
        row["val_loss_sampled"] = task.measure(model, sample, after_batch=after_batch).loss
    if last and measured != whole:
        row["val_batches"] = [measured, whole]
    return row


def without_evaluation(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line as it is before its evaluation."""
    return {key: value for key, value in row.items() if not key.startswith("val_")}


def compared_loss(row: dict[str, Any]) -> float:
    """Return the loss by which a line's evaluation is compared with others; NaN if it is not finite."""
    loss = row.get("val_loss_sampled", row["val_loss"])
    return loss if loss is not None and math.isfinite(loss) else math.nan
