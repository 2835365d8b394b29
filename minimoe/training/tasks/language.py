"""Language modelling: every token is predicted from the tokens before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from minimoe.config import Config
from minimoe.data.batches import TokenRow, Tokens, batch, sample_windows, windows
from minimoe.data.corpus import Corpus, load_corpus, whole_corpus
from minimoe.data.sources import IMAGE_SOURCES
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
        if whole:  # a trained model is measured: a text without the tokens that its embedding lacks can be
            check_rows(self.tokenizer, self.corpus.val, config.model.vocab_size or 0, self.source)
        self.config = config if whole else self._with_vocabulary(config)

    def _with_vocabulary(self, config: Config) -> Config:
        return with_vocabulary(config, self.tokenizer.vocab_size)

    def batch(self, step: int, micro: int) -> tuple[Array, Array]:
        """tokens, targets [B,T]"""
        t = self.config.train
        return batch(self.corpus.train, t.seed, step, micro, t.batch_size, t.seq_len)

    def size(self) -> str:
        return f"{len(self.corpus.train):,} + {len(self.corpus.val):,} tokens"

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
        """tokens, targets [B,T]"""
        return self._cut(self.corpus.val, n)

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
    source = config.data.source
    if source in IMAGE_SOURCES:
        raise UserError(
            f"data.source = {source!r} is images, {config.name!r} reads text: give python-docs, python-code, python-mix, a text file or a "
            f"folder of them (a folder of that name as ./{source})"
        )
    if not whole:
        return load_corpus(config.data, tokenizer=tokenizer, seq_len=config.train.seq_len, sha256=sha256)
    corpus = whole_corpus(source, config.data.tokenizer, tokenizer=tokenizer)
    if len(corpus.val) < 2:
        raise UserError(f"{source}: too short: an evaluation needs two tokens or more")
    return corpus
