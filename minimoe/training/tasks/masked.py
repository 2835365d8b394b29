"""Masked language modelling: hidden tokens are predicted from the text on both sides (Devlin et al. 2018).

15% of all tokens are targets, drawn independently; 80% of these become the mask token, 10% a random token, and 10% stay as they are, so
that the model cannot know which of the tokens that it sees are true. With a byte tokenizer this hides single bytes, not words.

A tokenizer without a mask token (bytes, characters) gets one, the id after its last, and the model's vocabulary is one larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minimoe.config import Config
from minimoe.data.batches import IGNORE, Places, TokenRow, Tokens, inputs_and_targets, places_in_order
from minimoe.data.token_bytes import TokenBytes
from minimoe.data.tokenizer import REPLACEMENT, Tokenizer
from minimoe.engine.grad_mode import no_grad
from minimoe.engine.random import host_bits, host_words
from minimoe.errors import UserError
from minimoe.hints import command
from minimoe.model.transformer import Transformer
from minimoe.training.evaluation import Batches
from minimoe.training.tasks.language import LanguageModelling
from minimoe.training.tasks.task import Array, with_vocabulary

Words = npt.NDArray[np.int64]

TARGET, MASK, RANDOM = (int(share * 2**32) for share in (0.15, 0.12, 0.135))  # a word below TARGET hides its token, below MASK by the mask
CANDIDATES, EXAMPLES, SHOWN = 64, 3, 72  # windows tried, windows shown at the end of a run, tokens of each
LINE_END, DOT = "\u21b5", "\u00b7"
BLOCK, COUNTED = 1 << 16, 1 << 24  # tokens looked at together; tokens whose targets are counted
UNITS = {"byte": "byte", "char": "character"}  # what a token of each tokenizer is called


class MaskedLanguageModelling(LanguageModelling):
    """Inputs are windows of text with tokens hidden; targets are the hidden tokens, -100 elsewhere."""

    unit = "masked token"

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None, whole: bool = False, sha256: str | None = None) -> None:
        super().__init__(config, tokenizer, whole, sha256)
        self.mask_id = mask_id(self.tokenizer)
        rows = self.config.model.vocab_size or 0
        if self.mask_id >= rows:
            raise UserError(f"{self.source}: the model lacks the mask token (id {self.mask_id}): its embedding has {rows} rows")
        self.n_random = min(self.tokenizer.vocab_size, rows)  # random tokens are drawn from those that the model has
        if not any((self.hidden_at(places)[1] != IGNORE).any() for places in self._blocks()):
            raise UserError(f"{self.source}: too short: none of its {len(self.corpus.val)} held-out tokens is hidden: use more text")

    def _with_vocabulary(self, config: Config) -> Config:
        return with_vocabulary(config, masked_vocabulary(self.tokenizer), "the tokenizer's vocabulary with its mask token")

    def batch(self, step: int, micro: int) -> tuple[Array, ...]:
        """tokens, targets [B,T] and, if attention stays within documents, where these start [B,T]"""
        t, places = self.config.train, self._drawn(step, micro)
        tokens, _ = inputs_and_targets(self.train.tokens, places[:, 0], t.seq_len)
        words = host_bits(2 * tokens.size, t.seed, "data.mask", micro, step).reshape(*tokens.shape, 2)
        seen, targets = hide(tokens, words, self.n_random, self.mask_id)
        return seen, self.train.counted(targets, places), *self.train.starts(places)

    # ---- measuring -----------------------------------------------------------------------------------------------------------------

    def hidden_at(self, places: Places) -> tuple[Tokens, Tokens]:
        """Return what the model sees at these places of the held-out split, and the targets; which are hidden depends on the place alone.

        places [..] -> [..], [..]
        """
        words = host_words((places // 2).reshape(-1), 0, "data.mask.held_out").reshape(*places.shape, 2, 2)  # a block has those of two
        own = np.take_along_axis(words, (places % 2)[..., None, None], axis=-2)[..., 0, :]
        seen, targets = hide(self.corpus.val[places].astype(np.int32), own, self.n_random, self.mask_id)
        return seen, self.val.counted(targets, places)

    @cached_property
    def token_bytes(self) -> TokenBytes:  # type: ignore[override]
        return TokenBytes(None, "a masked model predicts some tokens from the text on both sides, which is no code for the text")

    @property
    def held_out_batches(self) -> int:
        t = self.config.train
        return -(-len(self.corpus.val) // (t.batch_size * t.seq_len))

    def held_out(self, n: int | None = None) -> Batches:
        """tokens, targets, valid [B,T]; `valid` is 0 in padding; if attention stays within documents, where these start [B,T]"""
        t = self.config.train
        for places in places_in_order(len(self.corpus.val) + 1, t.seq_len, t.batch_size, n):  # one more: no target lies beyond the end
            valid = places >= 0
            tokens, targets = self.hidden_at(np.maximum(places, 0))
            starts = self.val.starts(np.maximum(places, 0))
            yield tokens, np.where(valid, targets, IGNORE), valid.astype(np.int32), *starts

    @cached_property
    def chance(self) -> float:  # type: ignore[override]
        """Of a split of more than `COUNTED` tokens, as many or up to twice as many, evenly spaced, are counted."""
        counts = np.zeros(masked_vocabulary(self.tokenizer), np.int64)
        for places in self._blocks(max(1, len(self.corpus.val) // COUNTED)):
            targets = self.hidden_at(places)[1]
            counts += np.bincount(targets[targets != IGNORE], minlength=len(counts))
        return float(counts.max() / counts.sum())

    def _blocks(self, every: int = 1) -> Iterator[Places]:
        """Yield the places of the held-out split, or of each `every`-th token of it, a block at a time."""
        places = range(0, len(self.corpus.val), every)
        for start in range(0, len(places), BLOCK):
            part = places[start : start + BLOCK]
            yield np.arange(part.start, part.stop, every, dtype=np.int64)

    def accuracy(self, value: float | None) -> str:
        shown = "-" if value is None else f"{value:.1%}"
        return f"masked accuracy {shown} (guessing the most common {UNITS.get(self.tokenizer.name, 'token')}: {self.chance:.1%})"

    # ---- what a user sees ----------------------------------------------------------------------------------------------------------

    def show(self, model: Transformer) -> Iterator[str]:
        """Show held-out text with blanks, what the model fills in, and where it is wrong."""
        right, blanks, texts = self._filled(model, self._examples)
        yield f"Blanks in held-out text, and how they are filled (^: wrong); {right} of {blanks} are right:"
        yield from (f"\n\n{text}" for text in texts)

    def sample(self, model: Transformer, number: int) -> Iterator[str]:
        """Show one of the examples, each in turn."""
        row = number % len(self._examples)
        yield from self._filled(model, self._examples[row : row + 1])[2]

    def _filled(self, model: Transformer, positions: npt.NDArray[np.int64]) -> tuple[int, int, list[str]]:
        """Fill the blanks of windows [n,T].   -> how many are right, how many there are, and the lines of each window"""
        val, blank = self.corpus.val, self.hidden_at(positions)[1] != IGNORE
        with no_grad():
            logits = model(np.where(blank, self.mask_id, val[positions]).astype(np.int32))
        filled = np.argmax(model.backend.to_host(logits.data), axis=-1)
        parts = zip(val[positions][:, :SHOWN], filled[:, :SHOWN], blank[:, :SHOWN], strict=True)
        return int((filled == val[positions])[blank].sum()), int(blank.sum()), [self._lines(*part) for part in parts]

    @cached_property
    def _examples(self) -> npt.NDArray[np.int64]:
        """Positions of a few windows of held-out text, those with the most letters among the tokens shown.   -> [3,T]"""
        val = self.corpus.val
        n = min(self.config.train.seq_len, len(val))
        starts = np.unique(np.arange(CANDIDATES) * (len(val) - n) // (CANDIDATES - 1))
        letters = [sum(map(str.isalpha, self.tokenizer.decode(val[start : start + min(n, SHOWN)]))) for start in starts.tolist()]
        best = np.sort(np.argsort(letters, kind="stable")[-EXAMPLES:])
        return np.asarray(starts[best][:, None] + np.arange(n))

    def _lines(self, tokens: TokenRow, filled: Array, blank: Array) -> str:
        """Return a line with blanks, one with them filled in and, if anything is wrong, one with marks below it."""
        lines, before = ["", "", ""], list[int]()
        for token, guess, hidden in zip(tokens.tolist(), filled.tolist(), blank.tolist(), strict=True):
            true, given = self._piece(token, before), self._piece(guess if hidden else token, before)
            width, gap = max(len(true), len(given)), " " if len(true) > 1 and true[0] == " " else ""  # between two words
            blanks, marks = (gap + mark * (width - len(gap)) for mark in "_^")
            cells = blanks if hidden else true, given, marks if hidden and guess != token else ""
            lines = [line + cell.ljust(width) for line, cell in zip(lines, cells, strict=True)]
            before = [token]
        return "\n".join(f"  {line}".rstrip() for line in lines if line.strip())

    def _piece(self, token: int, before: list[int]) -> str:
        """Return the text that a token adds to the one before, in one line: a line's end as an arrow, what cannot be printed as a dot."""
        decode = self.tokenizer.decode
        text = "" if token == self.mask_id else decode([*before, token])[len(decode(before)) :].replace("\n", LINE_END)
        return "".join(char if char.isprintable() and char != REPLACEMENT else DOT for char in text) or DOT

    def next_command(self, run: Path) -> str:
        return command("eval", run)


def mask_id(tokenizer: Tokenizer) -> int:
    """Return the id of the mask token: the tokenizer's own, else the one after its last."""
    return tokenizer.vocab_size if tokenizer.mask_id is None else tokenizer.mask_id


def masked_vocabulary(tokenizer: Tokenizer) -> int:
    """Return how many ids a masked language model needs: its tokenizer's and the mask's."""
    return max(tokenizer.vocab_size, mask_id(tokenizer) + 1)


def hide(tokens: Tokens, words: Words, n_tokens: int, mask: int) -> tuple[Tokens, Tokens]:
    """Hide tokens, and return what the model sees and its targets.   tokens [..], words [..,2] of 32 random bits -> [..], [..]

    A token's first word decides whether and how it is hidden, the second which of `n_tokens` is the random token.
    """
    first, second = words[..., 0], words[..., 1]
    random = second * n_tokens >> 32
    seen = np.where(first < MASK, mask, np.where(first < RANDOM, random, tokens))
    return seen.astype(np.int32), np.where(first < TARGET, tokens, IGNORE).astype(np.int32)
