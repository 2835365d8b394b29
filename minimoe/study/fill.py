"""Fills the blanks of a text: for each [MASK] the tokens that a masked language model finds likeliest, with their probabilities.

All masks are predicted together, each as if the others stayed hidden. A run reads a text as it was trained, without special tokens; a model
folder reads it in the tokenizer's whole template ([CLS] ... [SEP]), as transformers does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from minimoe.data.tokenizer import REPLACEMENT, Ids, Tokenizer, check_rows, note_of_dropped
from minimoe.engine.grad_mode import no_grad
from minimoe.errors import ConfigError, UserError, notice
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.training.tasks.masked import mask_id

MASK = "[MASK]"  # how a blank is written for every tokenizer; its own name of the token is understood as well
EXAMPLE = f'"the {MASK} statement"'


@dataclass(frozen=True)
class Guess:
    """A token for a blank; `token` is its text, with the space before it where it begins a word."""

    token: str
    probability: float
    id: int


@dataclass(frozen=True)
class Filled:
    """A text with its blanks filled by the likeliest tokens, and for each blank the likeliest ones, best first."""

    text: str
    masks: tuple[tuple[Guess, ...], ...]


def fill(model: PretrainedTransformer, text: str, top: int = 5) -> Filled:
    """Fill the blanks of a text, written [MASK]: `fill(model, "the [MASK] statement").masks[0][0].token`.

    Raises `UserError` if the model is not a masked language model, or if the text has no blank or more tokens than the model reads.
    """
    if model.config.head != "mlm":
        other = "; `minimoe generate` continues a text with it" if model.config.head == "lm" and model.config.causal else ""
        raise UserError(f"fill needs a masked language model: this one has head = {model.config.head!r}{other}")
    if model.tokenizer is None:
        raise UserError("fill: the model has no tokenizer: a text cannot be turned into its tokens")
    if top < 1:
        raise UserError(f"fill: top ({top}) must be at least 1")
    tokenizer, mask = model.tokenizer, mask_of(model, model.tokenizer)
    parts = _parts(tokenizer, text)
    if len(parts) == 1:
        raise UserError(f"the text has no {MASK}, which stands for a token to be found, as in {EXAMPLE}: {text[:60]!r}")
    ids = _ids(model, tokenizer, parts, mask)
    if len(ids) > model.config.max_seq_len:
        raise UserError(f"the text has {len(ids):,} tokens: the model reads at most {model.config.max_seq_len:,}")
    with no_grad(), np.errstate(all="ignore"):
        logits = model.backend.to_host(model(ids[None]).data)[0][ids == mask]  # [M,V]
    if not np.isfinite(logits).all():
        raise ConfigError("the model's predictions are not finite numbers: it was trained into NaN or infinity")
    p = np.exp(np.asarray(logits, np.float64) - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")[:, :top]
    masks = tuple(
        tuple(Guess(token_text(tokenizer, id, mask), float(row[id]), id) for id in best)
        for row, best in zip(p, order.tolist(), strict=True)
    )
    return Filled(_joined(tokenizer, parts, [guesses[0] for guesses in masks]), masks)


def mask_of(model: PretrainedTransformer, tokenizer: Tokenizer) -> int:
    """Return the id of the mask token. Raises `UserError` if the tokenizer has none, and the model was not trained with one beside it."""
    mask, rows = mask_id(tokenizer), model.config.vocab_size or 0
    if mask >= rows:
        raise UserError(f"its tokenizer has no mask token, and its embedding of {rows:,} rows no room for one: it cannot fill blanks")
    return mask


def token_text(tokenizer: Tokenizer, id: int, mask: int) -> str:
    """Return the text of a token: <0xC3> for a byte that is not a character by itself, <260> for an id without a token."""
    if id == mask:
        return MASK
    text = tokenizer.decode([id]) if id < tokenizer.vocab_size else ""
    if text and REPLACEMENT not in text:
        return text
    return f"<0x{id:02X}>" if tokenizer.name == "byte" else f"<{id}>"


def _parts(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the stretches of a text between its blanks."""
    names = {MASK, *([] if tokenizer.mask_id is None else [tokenizer.token(tokenizer.mask_id)])}
    return re.split("|".join(map(re.escape, sorted(names))), text)


def _ids(model: PretrainedTransformer, tokenizer: Tokenizer, parts: list[str], mask: int) -> Ids:
    """Return the ids of a text with its blanks, int32 [T]."""
    if tokenizer.mask_id is not None:  # it may take the spaces beside the mask for a part of it
        text = tokenizer.token(mask).join(parts)
        ids = tokenizer.encode_template(text) if model.provenance is not None else tokenizer.encode(text)
    else:
        encoded = [tokenizer.encode(part) for part in parts]
        blank = np.array([mask], np.int32)
        ids = np.concatenate([piece for part in encoded for piece in (blank, part)][1:])
    known = ids[ids != mask]
    check_rows(tokenizer, known, model.config.vocab_size or 0, "text")
    for text_of_note in note_of_dropped(tokenizer, "".join(parts), "the text"):
        notice(text_of_note)
    left, blanks = int((ids == mask).sum()), len(parts) - 1
    if left != blanks:
        raise UserError(f"{tokenizer.name} does not keep the blanks of this text apart: {left} of {blanks} are left")
    return ids


def _joined(tokenizer: Tokenizer, parts: list[str], best: list[Guess]) -> str:
    """Return the text with the best token in each blank; the bytes of a character come together."""
    text, at = parts[0], 0
    while at < len(best):
        run = [best[at].id]
        while not parts[at + 1] and at + 1 < len(best):
            at += 1
            run.append(best[at].id)
        found = tokenizer.decode([id for id in run if id < tokenizer.vocab_size])
        text += (found.lstrip() if text[-1:].isspace() else found) + parts[at + 1]
        at += 1
    return text
