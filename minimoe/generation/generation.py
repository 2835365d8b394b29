"""Generates one text or a batch, token by token, each drawn from the model's prediction after all tokens before it.

Tokens become text as they are drawn. Text that may begin a stop string waits until that is decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from minimoe.data.tokenizer import Ids, Tokenizer, check_rows, note_of_dropped
from minimoe.errors import ConfigError, UserError, notice
from minimoe.generation.continuation import Continuation
from minimoe.generation.decoding import Decoder, context_of
from minimoe.generation.sampling import Flags, Sampling, draw
from minimoe.model.transformer import Transformer
from minimoe.pretrained.transformer import PretrainedTransformer

__all__ = ["Sampling", "default_prompt", "draw", "generate", "generate_batch", "generate_ids", "generate_texts", "read_prompt"]


# ---- ids -----------------------------------------------------------------------------------------------------------------------------


def generate_ids(model: Transformer, prompt: npt.ArrayLike, tokens: int, how: Sampling | None = None) -> Iterator[int]:
    """Yield up to `tokens` ids that continue a prompt [T] of one id or more. An end token ends it, and is not yielded."""
    drawn = generate_batch(model, [prompt], tokens, how)
    return (token for (token,) in drawn if token is not None)


def generate_batch(
    model: Transformer, prompts: Sequence[npt.ArrayLike], tokens: int, how: Sampling | None = None
) -> Iterator[list[int | None]]:
    """Yield up to `tokens` lists of one id per prompt [T]; an id is None once an end token has come. Prompts may differ in length.

    Each row draws from its own random stream: the first row draws as it would alone. Rows that have ended are computed until all have.
    The prompts are judged at the call, before anything is yielded: a `Notice` says if the context has no room for the beginning of one.
    """
    how = how or Sampling()
    if model.config.head != "lm" or not model.config.causal:
        given = f"head = {model.config.head!r}, causal = {str(model.config.causal).lower()}"
        raise ConfigError(f"generation needs a causal language model: this one has {given}")
    rows = [[int(i) for i in np.asarray(prompt).reshape(-1)] for prompt in prompts]
    if not rows or not all(rows):
        raise ConfigError("the prompt is empty: give at least one character")
    _warn_of_cut(model, rows)
    return _drawn(model, rows, tokens, how)


def _warn_of_cut(model: Transformer, rows: list[list[int]]) -> None:
    """Warn of prompts that are longer than the model's context."""
    limit = context_of(model.config)
    for number, row in enumerate(rows, 1):
        if limit is not None and len(row) > limit:
            which = f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt"
            notice(f"{which} has {len(row):,} tokens: the model's context holds its last {limit:,}, and the others are not read")


def _drawn(model: Transformer, rows: list[list[int]], tokens: int, how: Sampling) -> Iterator[list[int | None]]:
    """Draw a token for each row until all have ended."""
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
    """Which tokens each row of a batch contains, kept only if repetition is penalised."""

    def __init__(self, rows: list[list[int]], how: Sampling) -> None:
        self.rows, self.wanted = rows, how.repetition_penalty != 1.0
        self.flags: list[Flags] = []

    def of(self, row: int, vocab: int) -> Flags | None:
        """Return flags [V] of the tokens in a row, or None."""
        if not self.wanted:
            return None
        if not self.flags:
            self.flags = [np.isin(np.arange(vocab), ids) for ids in self.rows]
        return self.flags[row]

    def add(self, tokens: list[int]) -> None:
        for flags, token in zip(self.flags, tokens, strict=False):
            flags[token] = True


# ---- text ----------------------------------------------------------------------------------------------------------------------------


def generate(
    model: Transformer, tokenizer: Tokenizer | str, prompt: str | None = None, tokens: int = 200, how: Sampling | None = None
) -> Continuation:
    """Yield the text that continues a prompt, as characters become complete. It ends before the first string of `how.stop`.

    `generate(model, "The ")` takes the model's own tokenizer. The result can be iterated once, piece by piece; `str()` of it is the whole
    text, which a notebook shows. The prompt is judged at the call: `UserError` for one that cannot be read, or if the model has no
    tokenizer, a `Notice` if a part of the prompt is not read.
    """
    if isinstance(tokenizer, str):
        if prompt is not None:
            raise UserError("generate: takes a model, a tokenizer and a prompt, or a model that has a tokenizer and a prompt")
        own = model.tokenizer if isinstance(model, PretrainedTransformer) else None
        if own is None:
            raise UserError("generate: the model has no tokenizer: give one before the prompt")
        prompt, tokenizer = tokenizer, own
    if prompt is None:
        raise UserError('generate: the prompt is missing, as in generate(model, "The ")')
    ids = read_prompt(model, tokenizer, prompt)
    return Continuation(_pieces(generate_ids(model, ids, tokens, how), Writer(tokenizer, how, ids)))


def _pieces(drawn: Iterator[int], writer: Writer) -> Iterator[str]:
    """Yield the text of one row's tokens, as characters become complete."""
    for token in drawn:
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
    """Yield (index of a prompt, the text that continues it) as each text becomes complete; all are generated as one batch.

    The prompts are judged at the call, as in `generate`.
    """
    rows = [read_prompt(model, tokenizer, prompt) for prompt in prompts]
    return _texts(generate_batch(model, rows, tokens, how), [Writer(tokenizer, how, ids) for ids in rows])


def _texts(batch: Iterator[list[int | None]], writers: list[Writer]) -> Iterator[tuple[int, str]]:
    """Yield (row, its whole text) as each row of a batch ends."""
    open_rows = {row: (writer, list[str]()) for row, writer in enumerate(writers)}
    for drawn in batch:
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


def read_prompt(model: Transformer, tokenizer: Tokenizer, prompt: str) -> Ids:
    """Return a prompt's ids. Raises `UserError` for a token that the model lacks; a `Notice` counts characters that the tokenizer drops."""
    ids = tokenizer.encode_prompt(prompt)
    if model.config.vocab_size is not None:
        check_rows(tokenizer, ids, model.config.vocab_size, "prompt")
    for text in note_of_dropped(tokenizer, prompt, "the prompt"):
        notice(text)
    return ids


class Writer:
    """Turns one row's tokens into text as they are drawn, up to the first stop string; `prompt`: the ids that they follow."""

    def __init__(self, tokenizer: Tokenizer, how: Sampling | None = None, prompt: npt.ArrayLike = ()) -> None:
        self.stream, self.stop = tokenizer.stream(prompt), how.stop if how else ()
        self.waiting, self.over = "", False  # text that may begin a stop string; True once the text has ended

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        return self._shown(self.stream.push(token))

    def finish(self) -> str:
        """Return the rest of the text when no more tokens come."""
        text = self._shown(self.stream.flush())
        rest, self.waiting, self.over = self.waiting, "", True
        return text + rest

    def _shown(self, text: str) -> str:
        """Return what can be shown. Character by character: the stop string that is complete first ends the text, however it is split."""
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
    """Return a newline if the tokenizer has one, else nothing if a token begins every text, else the first token."""
    try:
        if len(tokenizer.encode("\n")) and not tokenizer.dropped("\n"):
            return "\n"
    except UserError:  # a char tokenizer without a newline
        pass
    return "" if len(tokenizer.encode_prompt("")) else tokenizer.decode([0])
