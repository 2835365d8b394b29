"""Language modelling: every token is predicted from the tokens before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from minimoe.config import Config
from minimoe.data.batches import (
    IGNORE,
    Places,
    TokenRow,
    Tokens,
    at_places,
    batch_starts,
    inputs_and_targets,
    mixed_starts,
    places_in_order,
    sample_windows,
    windows,
)
from minimoe.data.corpus import Corpus
from minimoe.data.mixture import load_data
from minimoe.data.sources import IMAGE_SOURCES
from minimoe.data.split import Split
from minimoe.data.token_bytes import TokenBytes, token_bytes
from minimoe.data.tokenizer import Tokenizer, check_rows
from minimoe.errors import UserError
from minimoe.hints import command
from minimoe.model.transformer import Transformer
from minimoe.training.evaluation import Batches, Evaluation, evaluate
from minimoe.training.tasks.task import Array, Task, with_vocabulary

PROMPT = "The "
SAMPLE, SHORT = 300, 100  # tokens shown at the end of a run, and while it trains


class LanguageModelling(Task):
    """Inputs are windows of text, targets the same windows shifted by one token."""

    corpus: Corpus
    tokenizer: Tokenizer

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None, whole: bool = False, sha256: str | None = None) -> None:
        self.corpus = read_corpus(config, tokenizer, whole, sha256)
        self.tokenizer, self.source, self.sha256 = self.corpus.tokenizer, self.corpus.source, self.corpus.sha256
        c, apart = self.corpus, config.data.within_documents
        self.train = Split(c.train, c.train_learned, c.train_documents if apart else None)
        self.val = Split(c.val, c.val_learned, c.val_documents if apart else None)
        if whole:  # a trained model is measured: a text without the tokens that its embedding lacks can be
            check_rows(self.tokenizer, np.asarray(self.corpus.val), config.model.vocab_size or 0, self.source)
        self.config = config if whole else self._with_vocabulary(config)
        self._check_learned()

    def _check_learned(self) -> None:
        """Raise `UserError` if the loss counts none of a split's tokens."""
        for name, split in (("training", self.train), ("validation", self.val)):
            if split.learned is not None and not np.asarray(split.learned).any():
                raise UserError(
                    f"{self.source}: none of the {len(split.tokens):,} tokens of the {name} split are of answers, which the loss counts: "
                    "use more chats, or set data.loss_on = 'all'"
                )

    def _with_vocabulary(self, config: Config) -> Config:
        return with_vocabulary(config, self.tokenizer.vocab_size)

    def batch(self, step: int, micro: int) -> tuple[Array, ...]:
        """tokens, targets [B,T] and, if attention stays within documents, where these start [B,T]"""
        places = self._drawn(step, micro)
        tokens, targets = inputs_and_targets(self.train.tokens, places[:, 0], self.config.train.seq_len)
        return tokens, self.train.following(targets, places + 1), *self.train.starts(places)

    def _drawn(self, step: int, micro: int) -> Places:
        """Return the places of a micro-batch's tokens in the training split.   -> [B,T]"""
        t, parts = self.config.train, self.corpus.parts
        if parts:
            starts = mixed_starts(parts, t.seed, step, micro, t.batch_size, t.seq_len)
        else:
            starts = batch_starts(len(self.train.tokens), t.seed, step, micro, t.batch_size, t.seq_len)
        return np.asarray(starts[:, None] + np.arange(t.seq_len))

    def size(self) -> str:
        return f"{len(self.corpus.train):,} + {len(self.corpus.val):,} tokens"

    def read(self) -> list[str]:
        lines, config = list(self.corpus.summary), self.config
        if config.data.within_documents and self.corpus.train_documents is None:
            lines.append(f"data.within_documents changes nothing: {self.source} is one document")
        return lines

    def passes(self) -> float:
        return self.config.train.steps * self.tokens_per_step / len(self.corpus.train)

    @cached_property
    def token_bytes(self) -> TokenBytes:  # type: ignore[override]
        return token_bytes(self.tokenizer)

    @property
    def held_out_batches(self) -> int:
        t = self.config.train
        return -(-(len(self.corpus.val) - 1) // (t.batch_size * t.seq_len))

    def held_out(self, n: int | None = None) -> Batches:
        """tokens, targets [B,T]; with answers or documents also valid, which is 0 in padding, and where documents start [B,T]"""
        split, t = self.val, self.config.train
        if split.plain:
            yield from self._cut(split.tokens, n)
            return
        for places in places_in_order(len(split.tokens), t.seq_len, t.batch_size, n):
            valid, (tokens, targets) = places >= 0, at_places(split.tokens, places)
            targets = np.where(valid, split.following(targets, np.where(valid, places + 1, 0)), np.int32(IGNORE))
            yield tokens, targets, valid.astype(np.int32), *split.starts(np.maximum(places, 0))

    def _cut(self, tokens: TokenRow, n: int | None) -> Iterator[tuple[Tokens, Tokens]]:
        """Cut a split into all its windows, or into `n` batches of evenly spaced ones."""
        t = self.config.train
        return windows(tokens, t.seq_len, t.batch_size) if n is None else sample_windows(tokens, t.seq_len, t.batch_size, n)

    def measure(
        self, model: Transformer, n: int | None = None, by_domain: bool = False, after_batch: Callable[[], None] | None = None
    ) -> Evaluation:
        sides = self.corpus.val_domains
        if n is not None or not by_domain or sides is None:
            return super().measure(model, n, after_batch=after_batch)
        domains = (first for first, _ in self._cut(sides, None))  # that of each input token
        return evaluate(model, self.held_out(), domains, len(self.corpus.domains), after_batch, self.token_bytes.counts)

    def show(self, model: Transformer) -> Iterator[str]:
        """Generate a sample of text."""
        yield "A sample:\n"
        yield from self._text(model, SAMPLE)

    def sample(self, model: Transformer, number: int) -> Iterator[str]:
        return self._text(model, SHORT)

    def _text(self, model: Transformer, tokens: int) -> Iterator[str]:
        from minimoe.generation.generation import Sampling, default_prompt, generate

        return generate(model, self.tokenizer, default_prompt(self.tokenizer), tokens, Sampling(top_k=40))

    def next_command(self, run: Path) -> str:
        try:
            self.tokenizer.encode(PROMPT)
        except UserError:  # a tokenizer of characters that lacks one of them
            return command("generate", run)
        return command("generate", run, "--prompt", PROMPT)


def read_corpus(config: Config, tokenizer: Tokenizer | None, whole: bool, sha256: str | None = None) -> Corpus:
    """Read the text to train on or, if `whole`, to measure on all of it; `sha256` is the digest that a run recorded, if there is one.

    Raises `UserError` for data that are images.
    """
    source = next((part.source for part in config.data.parts if part.source in IMAGE_SOURCES), None)
    if source is not None:
        raise UserError(
            f"data.source = {source!r} is images, {config.name!r} reads text: give python-docs, python-code, python-mix, a text file or a "
            f"folder of them (a folder of that name as ./{source})"
        )
    if not whole:
        return load_data(config.data, tokenizer=tokenizer, seq_len=config.train.seq_len, sha256=sha256)
    corpus = load_data(config.data, tokenizer=tokenizer, whole=True)
    if len(corpus.val) < 2:
        raise UserError(f"{corpus.source}: too short: an evaluation needs two tokens or more")
    return corpus
