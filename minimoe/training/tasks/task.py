"""The interface of all tasks: how a micro-batch is drawn, how a model is measured, what is shown at the end of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
from msgspec.structs import replace

from minimoe.config import Config
from minimoe.data.corpus import Corpus
from minimoe.data.token_bytes import TokenBytes
from minimoe.data.tokenizer import Tokenizer
from minimoe.errors import ConfigError
from minimoe.model.transformer import Transformer
from minimoe.training.evaluation import Batches, Evaluation, evaluate

Array = npt.NDArray[Any]


class Task(ABC):
    """A model's task and its data. It does not change during training: every batch is a pure function of (seed, step, micro)."""

    unit = "token"  # what the loss is a mean over
    config: Config  # includes what depends on the data: the vocabulary, the sequence length of an image
    source: str
    sha256: str  # digest of the data
    tokenizer: Tokenizer | None = None
    corpus: Corpus | None = None  # None for images
    token_bytes = TokenBytes(None, "images have no text")  # what bits per byte are counted by
    chance: float | None = None  # accuracy of always guessing the most common held-out target; None if accuracy is not measured

    # ---- training ------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def batch(self, step: int, micro: int) -> tuple[Array, ...]:
        """Draw a micro-batch for `model.loss`: inputs, int32 targets and perhaps `document_starts`, of the same shapes at every step."""

    @abstractmethod
    def size(self) -> str:
        """Return the size of the training and the held-out data: "419,645 + 46,628 tokens"."""

    def read(self) -> list[str]:
        """Return lines about what was read, if the size does not say all."""
        return []

    @abstractmethod
    def passes(self) -> float:
        """Return how many times the run goes through the training data."""

    def step_size(self) -> str:
        """Return the size of a step: "2,048 tokens"."""
        return f"{self.tokens_per_step:,} tokens"

    @property
    def tokens_per_step(self) -> int:
        """Positions that the blocks compute in one step; an image has one for each patch and one for its class token."""
        t = self.config.train
        return t.accumulate * t.batch_size * t.seq_len

    # ---- measuring -----------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def held_out_batches(self) -> int:
        """Return how many batches cover all held-out data."""

    @abstractmethod
    def held_out(self, n: int | None = None) -> Batches:
        """Return all held-out data, or `n` fixed batches of them; the same at every call and for every seed."""

    def measure(
        self, model: Transformer, n: int | None = None, by_domain: bool = False, after_batch: Callable[[], None] | None = None
    ) -> Evaluation:
        """Measure the loss, and the accuracy if the task has one, on all held-out data or `n` batches of them.

        With `by_domain` also the load of each domain, on all of them. `after_batch` may end the evaluation by raising.
        """
        return evaluate(model, self.held_out(n), after_batch=after_batch, token_bytes=self.token_bytes.counts)

    def accuracy(self, value: float | None) -> str:
        """Return an accuracy in words, next to that of the best constant guess; empty if the task measures none."""
        return ""

    # ---- what a user sees ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def show(self, model: Transformer) -> Iterator[str]:
        """Show what the model has learned, as text, piece by piece, without the end of the last line."""

    @abstractmethod
    def sample(self, model: Transformer, number: int) -> Iterator[str]:
        """Show in a few lines what the model does now, piece by piece, for the `number`-th sample of a run; of a bounded length."""

    @abstractmethod
    def next_command(self, run: Path) -> str:
        """Return the command to try next with this run."""


def with_vocabulary(config: Config, needed: int, of: str = "the tokenizer's vocabulary") -> Config:
    """Set the vocabulary to what the tokens need, unless a larger one is given. Raises `ConfigError` if it is too small."""
    given = config.model.vocab_size
    if given is not None and given < needed:
        raise ConfigError(f"model.vocab_size ({given}) is smaller than {of} ({needed})")
    return config if given is not None else replace(config, model=replace(config.model, vocab_size=needed))
