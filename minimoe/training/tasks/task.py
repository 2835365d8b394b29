"""The one interface of all tasks: how a micro-batch is drawn, how a model is measured, what the end of a run shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
from msgspec.structs import replace

from minimoe.config import Config
from minimoe.data.corpus import Corpus
from minimoe.data.tokenizer import Tokenizer
from minimoe.errors import ConfigError
from minimoe.model.transformer import Transformer
from minimoe.training.evaluation import Batches, Evaluation, evaluate

Array = npt.NDArray[Any]


class Task(ABC):
    """A model's task and its data. Nothing in it changes while a model trains: every batch is a pure function of (seed, step, micro)."""

    unit = "token"  # what the loss is a mean over
    config: Config  # with what the data decide filled in: the vocabulary, an image's length of sequence
    source: str
    sha256: str  # of the data
    tokenizer: Tokenizer | None = None
    corpus: Corpus | None = None  # of the tasks that read text
    chance: float | None = None  # the accuracy of always guessing the commonest held-out target; None where accuracy is not measured

    # ---- training ------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def batch(self, step: int, micro: int) -> tuple[Array, Array]:
        """What `model.loss` gets in a micro-batch: inputs and int32 targets, of the same shapes at every step."""

    @abstractmethod
    def size(self) -> str:
        """How much there is to train on and to measure on: "419,645 + 46,628 tokens"."""

    @abstractmethod
    def passes(self) -> float:
        """How many times the whole training goes through the training data."""

    def step_size(self) -> str:
        """How much a step sees: "2,048 tokens"."""
        return f"{self.tokens_a_step:,} tokens"

    @property
    def tokens_a_step(self) -> int:
        """Positions that the blocks compute in a step; an image has one for each patch and one for its class token."""
        t = self.config.train
        return t.accumulate * t.batch_size * t.seq_len

    # ---- measuring -----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def held_out(self, whole: bool = True) -> Batches:
        """The held-out data, all of them or `eval_batches` fixed batches, the same at every call and for every seed."""

    def measure(self, model: Transformer, whole: bool = True, by_domain: bool = False) -> Evaluation:
        """The model's loss, and accuracy where the task has one, on held-out data; `by_domain`: its load too, where domains are known."""
        return evaluate(model, self.held_out(whole))

    def accuracy(self, value: float | None) -> str:
        """An accuracy in words, beside that of the best constant guess; empty where the task measures none."""
        return ""

    # ---- what a user sees ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def show(self, model: Transformer) -> Iterator[str]:
        """What the model has learnt, to look at: text, piece by piece, without the last line's end."""

    @abstractmethod
    def next_command(self, run: str) -> str:
        """The command that uses such a run."""


def with_vocabulary(config: Config, needed: int, of: str = "the tokenizer's vocabulary") -> Config:
    """The model's vocabulary is what its tokens need, unless a larger one is given."""
    given = config.model.vocab_size
    if given is not None and given < needed:
        raise ConfigError(f"model.vocab_size ({given}) is smaller than {of} ({needed})")
    return config if given is not None else replace(config, model=replace(config.model, vocab_size=needed))
