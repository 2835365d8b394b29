"""Generates one text or a batch, token by token, each drawn from the model's prediction after all tokens before it.

Tokens become text as they are drawn. Text that may begin a stop string waits until that is decided.
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
    """Yield up to `tokens` ids that continue a prompt [T] of one id or more. An end token ends it, and is not yielded."""
    for (token,) in generate_batch(model, [prompt], tokens, how):
        assert token is not None
        yield token


def generate_batch(
    model: Transformer, prompts: Sequence[npt.ArrayLike], tokens: int, how: Sampling | None = None
) -> Iterator[list[int | None]]:
    """Yield up to `tokens` lists of one id per prompt [T]; an id is None once an end token has come. Prompts may differ in length.

    Each row draws from its own random stream: the first row draws as it would alone. Rows that have ended are computed until all have.
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


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int = 200, how: Sampling | None = None) -> Iterator[str]:
    """Yield the text that continues a prompt, as characters become complete. It ends before the first string of `how.stop`."""
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
    """Yield (index of a prompt, the text that continues it) as each text becomes complete; all are generated as one batch."""
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
    """Turns one row's tokens into text as they are drawn, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, how: Sampling | None = None) -> None:
        self.stream, self.stop = tokenizer.stream(), how.stop if how else ()
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
    """Return a newline if the tokenizer has one, else its first token."""
    try:
        if len(tokenizer.encode("\n")):
            return "\n"
    except UserError:  # a char tokenizer without a newline
        pass
    return tokenizer.decode([0])
