"""The result of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.config import Config
from minimoe.data.corpus import Corpus
from minimoe.errors import UserError
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.runs.checkpoint import read_best
from minimoe.runs.run import Run
from minimoe.runs.summary import summary
from minimoe.training.tasks import Task
from minimoe.training.validation import compared_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(repr=False)
class TrainedRun:
    """The result of `minimoe.train` and `minimoe.resume`: the run's folder, the model in memory, and every step's metrics.

    It serves wherever the folder's path does: `minimoe.load(run)`, `minimoe.resume(run, steps=600)`.
    """

    run: Run
    model: PretrainedTransformer
    task: Task
    metrics: list[dict[str, Any]]

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return summary(self.run, self.metrics)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.run.path

    @property
    def config(self) -> Config:
        return self.run.config

    def samples(self) -> list[dict[str, Any]]:
        """Return the samples that `train.sample_every` took: the step and the text of each, as docs/runs.md describes."""
        return self.run.samples()

    def plot(self, load: bool = False) -> Figure:
        """Return a picture of the losses and, with `load`, of the load of each expert; in a notebook it shows itself (extra `plot`).

        Raises `UserError` if matplotlib is missing.
        """
        return self.run.plot(load)

    @property
    def corpus(self) -> Corpus:
        """The text that the model was trained on. Raises `UserError` if it was trained on images."""
        if self.task.corpus is None:
            raise UserError(f"{self.path}: trained on {self.task.source}, which is not text")
        return self.task.corpus

    @property
    def val_loss(self) -> float:
        """Mean cross-entropy over the whole validation split at the end, in nats per token (per masked token, per image)."""
        last = self.metrics[-1]["val_loss"]  # null in the file if it was not finite
        return float("nan") if last is None else float(last)

    @property
    def val_bits_per_byte(self) -> float | None:
        """The same loss in bits per UTF-8 byte of the text; None for a task or a tokenizer without a count of bytes."""
        found: float | None = self.metrics[-1].get("val_bits_per_byte")
        return found

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the best checkpoint, and its loss over the batches that all evaluations have in common; None if there is none."""
        step = read_best(self.run.checkpoint_folder)
        rows = {row["step"]: row for row in self.metrics if "val_loss" in row}
        return None if step is None or step not in rows else (step, compared_loss(rows[step]))

    @property
    def val_accuracy(self) -> float | None:
        """The share of hidden tokens or images of the validation split that are predicted right; None for a language model."""
        accuracy: float | None = self.metrics[-1].get("val_accuracy")
        return accuracy
