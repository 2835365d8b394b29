"""A Transformer with what belongs to its files: where it came from, its tokenizer, its end tokens, and how to save it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimoe.backend import Array, Backend
from minimoe.config import ModelConfig
from minimoe.data.tokenizer import Ids, Tokenizer, check_rows, note_of_dropped
from minimoe.engine.tensor import Tensor
from minimoe.errors import UserError, notice
from minimoe.layers.balance import MoEStats
from minimoe.model.transformer import Transformer
from minimoe.pretrained.on_demand import FileWeights
from minimoe.pretrained.saving import Provenance, save_pretrained


class PretrainedTransformer(Transformer):
    """`mm.Transformer`, which `mm.load` and `mm.train` return: the network of `model/`, with what belongs to its files.

    Attributes without a file have their defaults: a model that was just made has no tokenizer and no folder.
    """

    provenance: Provenance | None = None  # the model folder that it was opened from
    file_weights: FileWeights | None = None  # that folder's weights, which are read when they are needed
    end_tokens: tuple[int, ...] = ()  # ids that end a text
    expert_rows: Sequence[Array] = ()  # rows that the experts [E] of each routed layer were given; counted for a model folder

    def __init__(
        self, config: ModelConfig, seed: int | None = 0, dtype: str = "float32", backend: Backend | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, seed, dtype, backend)
        self.tokenizer = tokenizer

    @property
    def resident(self) -> bool:
        """True if all weights are in memory and stay there."""
        return self.file_weights is None or self.file_weights.complete

    def hidden(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[MoEStats]]:
        """Does what `Transformer.hidden` does, and adds to `expert_rows` if these are counted."""
        x, stats = super().hidden(*args, **kwargs)
        for rows, layer_stats in zip(self.expert_rows, stats, strict=False):
            rows += layer_stats.counts  # one call, so that threads do not overwrite each other's counts
        return x, stats

    def encode(self, text: str) -> Ids:
        """Return the ids [T] of a text as this model reads it: `model(model.encode("a text")[None])`.

        An encoder reads all that its tokenizer puts around a text ([CLS] ... [SEP]), a causal model only what precedes a text. Raises
        `UserError` if the model has no tokenizer, or if its embedding lacks a token of the text; a `Notice` counts characters that the
        tokenizer drops.
        """
        if self.tokenizer is None:
            raise UserError("encode: this model has no tokenizer: give it one, as in model.tokenizer = load_tokenizer(path)")
        ids = self.tokenizer.encode_prompt(text) if self.config.causal else self.tokenizer.encode_template(text)
        check_rows(self.tokenizer, ids, self.config.vocab_size or 0, "text")
        for text_of_note in note_of_dropped(self.tokenizer, text, "the text"):
            notice(text_of_note)
        return ids

    def save_pretrained(self, path: str | Path, dtype: str | None = None) -> None:
        """Write the model as a folder that transformers opens, with its tokenizer. Errors and `dtype` are those of `saving`."""
        save_pretrained(self, path, dtype, self.tokenizer, self.provenance)
