"""Generation: one token after the other, each drawn from the model's prediction after all before it; of one text or of a batch.

Tokens are made text as they come. What may be the beginning of a string that ends the text waits until it is clear.
"""


from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from minimoe.data.tokenizer import Tokenizer
from minimoe.errors import ConfigError, UserError
from minimoe.generation.decoding import Decoder
from minimoe.generation.sampling import Flags, Sampling, draw
from minimoe.model.transformer import Transformer
from minimoe.pretrained.transformer import PretrainedTransformer

__all__ = ["Sampling", "default_prompt", "draw", "generate", "generate_batch", "generate_ids", "generate_texts"]


# ---- ids -----------------------------------------------------------------------------------------------------------------------------


def generate_ids(model: Transformer, prompt: npt.ArrayLike, tokens: int, how: Sampling | None = None) -> Iterator[int]:
    """`tokens` ids that go on from a prompt [T] (one id or more); fewer where an end token comes, which is not given."""
    for (token,) in generate_batch(model, [prompt], tokens, how):
        assert token is not None
        yield token


def generate_batch(
    model: Transformer, prompts: Sequence[npt.ArrayLike], tokens: int, how: Sampling | None = None
) -> Iterator[list[int | None]]:
    """`tokens` times an id for each prompt [T], which may differ in length; None from where an end token came, until all rows are over.

    A row's chance is its own: the first row draws as it would alone. Rows that are over are computed to the end, and not given.
    """
    how = how or Sampling()
    if model.config.head != "lm" or not model.config.causal:
        given = f"head = {model.config.head!r}, causal = {str(model.config.causal).lower()}"
        raise ConfigError(f"generation needs a causal language model: this one has {given}")
    rows = [[int(i) for i in np.asarray(prompt).reshape(-1)] for prompt in prompts]
    if not rows or not all(rows):
        raise ConfigError("the prompt is empty: give at least one character")
    ends = set(how.end or (model.end_tokens if isinstance(model, PretrainedTransformer) else ()))
    decoder, going, seen = Decoder(model, rows, tokens), [True] * len(rows), _Seen(rows, how)
    for position in range(tokens):
        logits = decoder.predict()
        if not np.isfinite(logits).all():
            raise ConfigError("the model's predictions are not finite numbers: it was trained into NaN or infinity")
        drawn = [draw(z, how, position, row, seen.of(row, len(z))) for row, z in enumerate(logits)]
        going = [goes and token not in ends for goes, token in zip(going, drawn, strict=True)]
        if not any(going):
            return
        decoder.add(drawn)
        seen.add(drawn)
        yield [token if goes else None for goes, token in zip(going, drawn, strict=True)]


class _Seen:
    """Which tokens each row of a batch has had, where they are to be penalised."""

    def __init__(self, rows: list[list[int]], how: Sampling) -> None:
        self.rows, self.wanted = rows, how.repetition_penalty != 1.0
        self.flags: list[Flags] = []

    def of(self, row: int, vocab: int) -> Flags | None:
        """[V]"""
        if not self.wanted:
            return None
        if not self.flags:
            self.flags = [np.isin(np.arange(vocab), ids) for ids in self.rows]
        return self.flags[row]

    def add(self, tokens: list[int]) -> None:
        for flags, token in zip(self.flags, tokens, strict=False):
            flags[token] = True


# ---- text ----------------------------------------------------------------------------------------------------------------------------


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int = 200, how: Sampling | None = None) -> Iterator[str]:
    """The text that goes on from a prompt, piece by piece as characters become complete; it ends before the first string of `how.stop`."""
    writer = Writer(tokenizer, how)
    for token in generate_ids(model, tokenizer.encode_prompt(prompt), tokens, how):
        piece = writer.push(token)
        if piece:
            yield piece
        if writer.over:
            return
    rest = writer.finish()
    if rest:
        yield rest


def generate_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int = 200, how: Sampling | None = None
) -> Iterator[tuple[int, str]]:
    """The number of a prompt and the text that goes on from it, each as soon as it is complete; all are made as one batch."""
    open_rows = {row: (Writer(tokenizer, how), list[str]()) for row in range(len(prompts))}
    for drawn in generate_batch(model, [tokenizer.encode_prompt(prompt) for prompt in prompts], tokens, how):
        for row, (writer, parts) in list(open_rows.items()):
            token = drawn[row]
            parts.append(writer.finish() if token is None else writer.push(token))
            if writer.over:
                del open_rows[row]
                yield row, "".join(parts)
        if not open_rows:
            return
    for row, (writer, parts) in open_rows.items():
        yield row, "".join(parts) + writer.finish()


class Writer:
    """The text of one row's tokens as they come, up to the first string that ends it."""

    def __init__(self, tokenizer: Tokenizer, how: Sampling | None = None) -> None:
        self.stream, self.stop = tokenizer.stream(), how.stop if how else ()
        self.waiting, self.over = "", False  # what may be the beginning of a stop string; has the text ended?

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        return self._shown(self.stream.push(token))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        text = self._shown(self.stream.flush())
        rest, self.waiting, self.over = self.waiting, "", True
        return text + rest

    def _shown(self, text: str) -> str:
        """Character by character, so that it does not matter in which pieces text comes: the string that is complete first ends it."""
        if not self.stop:
            return text
        shown = ""
        for character in text:
            self.waiting += character
            ended = max((len(string) for string in self.stop if self.waiting.endswith(string)), default=0)
            if ended:
                shown, self.waiting, self.over = shown + self.waiting[:-ended], "", True
                return shown
            keep = next(n for n in range(len(self.waiting), -1, -1) if self._begins(self.waiting[len(self.waiting) - n :]))
            clear = len(self.waiting) - keep
            shown, self.waiting = shown + self.waiting[:clear], self.waiting[clear:]
        return shown

    def _begins(self, text: str) -> bool:
        return any(string.startswith(text) for string in self.stop)


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line's end, where the tokenizer knows it; else its first token."""
    try:
        if len(tokenizer.encode("\n")):
            return "\n"
    except UserError:  # a char tokenizer without a line's end
        pass
    return tokenizer.decode([0])
