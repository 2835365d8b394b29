"""Decodes a batch of texts: the model reads each prompt once, then one token per row and step, through a cache.

Prompts of unequal length are padded on the left, and padding does not count. A step of one token per row is recorded and repeated if the
backend can record and the weights are in memory. When the context is full, the older half is dropped and the rest is read again; in a batch
all rows do so when the longest must. A model whose layers all have a window, and which has no learned positions, never drops anything.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Array, Backend
from minimoe.config import ModelConfig
from minimoe.engine.grad_mode import no_grad
from minimoe.engine.recording import Recorded
from minimoe.layers.cache import Cache
from minimoe.model.transformer import Transformer
from minimoe.pretrained.transformer import PretrainedTransformer

Floats = npt.NDArray[Any]
ROOM = 4096  # new tokens that a text has room for at first: most texts end before they have all that were asked for


class Decoder:
    """The texts of a batch [B,.] int32, and the model's predictions of what follows."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """`tokens`: the most tokens that will be added to each prompt (of one id or more)."""
        self.model = model
        self.lengths = np.asarray([len(prompt) for prompt in prompts], dtype=np.int32)
        longest = int(self.lengths.max()) + tokens
        self.texts = np.zeros((len(prompts), min(longest, int(self.lengths.max()) + ROOM)), dtype=np.int32)
        for row, prompt in enumerate(prompts):
            self.texts[row, : len(prompt)] = prompt
        self.limit = context_of(model.config)
        self.cache = Cache(model, len(prompts), min(model.config.max_seq_len, max(1, longest - 1)))
        self.positions = np.zeros((len(prompts), 1), dtype=np.int32)  # of the next token
        if isinstance(model, PretrainedTransformer) and model.file_weights is not None:
            model.file_weights.read_if_small()
        self.recorded = Recorded(self._step, model.backend, lambda why: None, self._state) if can_record(model) else None

    def predict(self) -> Floats:
        """Return the logits of the token that follows each text.   [B,V]"""
        with no_grad(), np.errstate(all="ignore"):
            if not self.cache.length:
                logits = self._read(self.limit)
            elif self.limit is not None and self.cache.length == self.limit:
                logits = self._read(max(1, self.limit // 2))
            else:
                logits = self._next()
            return self.model.backend.to_host(logits)[:, -1, :]

    def add(self, tokens: Sequence[int]) -> None:
        """Append a token to each text."""
        if int(self.lengths.max()) == self.texts.shape[1]:
            self.texts = np.pad(self.texts, ((0, 0), (0, self.texts.shape[1])))
        self.texts[np.arange(len(self.texts)), self.lengths] = tokens
        self.lengths += 1

    def _read(self, most: int | None) -> Array:
        """Clear the cache, read the last `most` tokens of each text, and return the last logits.   [B,1,V]"""
        longest = int(self.lengths.max())
        counts = np.minimum(self.lengths, longest if most is None else min(most, longest))  # a claimed context may exceed int32
        width = int(counts.max())
        column = np.arange(width, dtype=np.int32) - (width - counts)[:, None]  # 0, 1, ... after the padding   [B,T]
        mask, positions = column >= 0, np.maximum(column, 0)
        tokens = np.where(mask, np.take_along_axis(self.texts, positions + (self.lengths - counts)[:, None], axis=1), 0)
        self.positions[:, 0] = counts
        self.cache.clear()
        padding, given = (None, None) if mask.all() else (mask.astype(np.int32), positions)
        x, _ = self.model.hidden(tokens, padding, given, cache=self.cache)
        return self.model.logits(x[:, -1:, :]).data

    def _next(self) -> Array:
        """Read the last token of each text and return its logits.   [B,1,V]"""
        tokens = self.texts[np.arange(len(self.texts)), self.lengths - 1][:, None]
        if self.recorded is None:
            x, _ = self.model.hidden(tokens, positions=self.positions, cache=self.cache)
            logits = self.model.logits(x).data
        else:
            slots = [np.asarray([slot], dtype=np.int32) for slot in self.cache.next_slots()]
            logits = self.recorded(*(self.model.backend.from_host(array) for array in (tokens, self.positions, *slots)))
            self.cache.length += 1
        self.positions += 1
        return logits

    def _state(self) -> list[Array]:
        """Return the weights that a step reads and the cache that it updates."""
        return [*self.model.state_dict().values(), *self.cache.arrays()]

    def _step(self, tokens: Array, positions: Array, *slots: Array) -> Array:
        """The work of `_next` on device arrays, which is recorded."""
        x, _ = self.model.hidden(tokens, positions=positions, cache=self.cache.at(slots))
        return self.model.logits(x).data


def context_of(config: ModelConfig) -> int | None:
    """Return how many tokens a model reads at most; None if no layer looks further back than its window: a text may be of any length."""
    windows = [config.window(layer) for layer in range(config.n_layers)]
    endless = config.position != "learned" and all(0 < window <= config.max_seq_len for window in windows)
    return None if endless else config.max_seq_len


def can_record(model: Transformer) -> bool:
    """Return True if the backend can repeat a step and all weights are in memory."""
    resident = not isinstance(model, PretrainedTransformer) or model.resident
    return type(model.backend).record is not Backend.record and resident
